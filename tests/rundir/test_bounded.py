"""A folder that is only read is data: regular files, within bounds, nothing resolved, nothing obeyed by a terminal."""

import io
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tools import small

import fmexp
from fmexp import execute, sweep
from fmexp.config import resolved
from fmexp.errors import ConfigError, FmexpError, printable
from fmexp.rundir import bounded, layout

DEEP = "[" * 100_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")
    (path.parent / "elsewhere").write_text("{}")


def server(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # its name may not be long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


@pytest.mark.parametrize("make", [fifo, link, server, Path.mkdir])
@pytest.mark.parametrize("read", [bounded.read_json, bounded.read_yaml])
def test_only_a_file_is_opened(make: Callable[[Path], Any], read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(FmexpError, match=f"{path} "):
        read(path)
    assert bounded.last_lines(path, 3) == []
    with pytest.raises(FmexpError, match="is no file, where a run has one"):
        bounded.check_regular(path)


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (bounded.read_json, DEEP, "is damaged: maximum recursion"),
        (bounded.read_json, "1" * 10_000, "is damaged: Exceeds the limit"),
        (bounded.read_json, "{", "is damaged: Expecting property name"),
        (bounded.read_json, " " * (bounded.MOST_JSON + 1), "has more than 16,777,216 bytes"),
        (bounded.read_yaml, DEEP, "is damaged: "),
        (bounded.read_yaml, "&a " + DEEP, "is damaged: "),
        (bounded.read_yaml, "[" * 200 + "]" * 200, "is deeper or longer than what a run writes"),
        (bounded.read_yaml, f"[{'1,' * 100_000}]", "is deeper or longer than what a run writes"),
        (bounded.read_yaml, "59:" * 100_000 + "59", "is deeper or longer than what a run writes"),
        (bounded.read_yaml, f"'{'${' * 10_000}'", "has too many interpolations"),
        (bounded.read_yaml, BOMB, "is damaged: it has references"),
        (bounded.read_yaml, "a: [", "is damaged: "),
        (bounded.read_yaml, "!!python/object/apply:os.getpid []", "is damaged: it has a tag, tag:yaml.org,2002:python"),
        (bounded.read_yaml, "a: !!binary aGk=", "is damaged: it has a tag"),
        (bounded.read_yaml, "a: 1\na: 2", "is damaged: a key is there twice"),
        (bounded.read_yaml, "null: 1", "is damaged: a key is there twice, or is null"),
        (bounded.read_yaml, "a: " + "x" * bounded.MOST_YAML, "has more than 1,048,576 bytes"),
    ],
)
def test_what_is_not_within_bounds(read: Callable[[Path], Any], content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(FmexpError, match=said):
        read(tmp_path / "file")


def test_nothing_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "it is secret")
    (tmp_path / "file").write_text("['name=${oc.env:SECRET}', a&b, 1e-3]")
    assert bounded.read_yaml(tmp_path / "file") == ["name=${oc.env:SECRET}", "a&b", 1e-3]


WORDS = [
    "1e-3", "1.5e3", "1.5e-3", "1.", "1_000", "1_0e3", "1__0e3", "0.1", "-.5", "+.5e-3", ".5e3", "1E5", ".inf", "-.Inf",
    ".nan", "2001-01-01", "1:30", "12:30:45.5", "yes", "no", "on", "null", "~", "0x1f", "0o17", "017", "1e", "e5",
    "1e-3x", "_1e3", "'1e-3'", '""', "[]", "{}", "{a:}", "[1,'2',x]", "a${b}",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_value_is_read_as_what_omegaconf_has_written(word: str, tmp_path: Path) -> None:
    meant = OmegaConf.to_container(OmegaConf.create(f"a: {word}"))
    for content in (meant, {"a": word}):  # the word as YAML, and as text that must stay text
        (tmp_path / "file").write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
        assert repr(bounded.read_yaml(tmp_path / "file")) == repr(content)  # NaN is not itself


def test_a_configuration_is_read_as_omegaconf_reads_it(tmp_path: Path) -> None:
    tree = resolved(small("model=mlp", "augment=chain", "optimizer=adam", "optimizer.lr=1e-5"))
    path = tmp_path / "file"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))
    assert repr(bounded.read_yaml(path)) == repr(tree) == repr(OmegaConf.to_container(OmegaConf.load(path)))
    path.write_text("# nothing\n")
    assert bounded.read_yaml(path) == {}


def test_what_a_terminal_would_obey_is_shown_as_its_code() -> None:
    assert printable("a\x1b[2Jb\nc\x9b\x7f\u202e\udcffé") == "a\\x1b[2Jb\nc\\x9b\\x7f\\u202e\\udcffé"
    assert str(FmexpError("\x1b]0;title\x07")) == "\\x1b]0;title\\x07"


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 100_000 + b"\none\n\x1b[31mtwo\xff\n")
    assert bounded.last_lines(tmp_path / "log", 2) == ["one", "\\x1b[31mtwo�"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    execute(small("train.max_steps=1", "stage.model_graph.enabled=false", "stage.projector.enabled=false"), folder)
    return folder


def picture(form: str, **info: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, form, **info)
    return content.getvalue()


BLOATED = PngInfo()
BLOATED.add_text("a", "x" * 3_000_000, zip=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [(picture("GIF"), "cannot identify"), (picture("PNG", pnginfo=BLOATED), "Decompressed data")],
    ids=["GIF", "bloated"],
)
def test_pictures_are_png_alone(content: bytes, said: str, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    (first,) = (image for _, image in fmexp.read(done).images["view/images"])
    assert first.format == "PNG"
    event = event_accumulator.ImageEvent(0, 0, content, 4, 4)
    monkeypatch.setattr(event_accumulator.EventAccumulator, "Images", lambda self, tag: [event])
    with pytest.raises(FmexpError, match=f"a picture of its event files is no PNG: {said}"):
        _ = fmexp.read(done).images


@pytest.mark.parametrize("name", layout.FILES)
def test_a_run_writes_in_no_ones_link_and_waits_for_no_pipe(name: str, tmp_path: Path) -> None:
    for make in (fifo, link):
        folder = tmp_path / make.__name__
        (folder / name).parent.mkdir(parents=True)
        make(folder / name)
        before = sorted(folder.rglob("*"))
        with pytest.raises(FmexpError, match=f"{folder / name} is no file, where a run has one"):
            execute(small("train.max_steps=1", "logging=light"), folder)
        assert sorted(folder.rglob("*")) == before


@pytest.fixture
def read_only(done: Path) -> Iterator[Path]:
    """The folder of a run, where nothing can be written: root may write wherever the file system lets it."""
    root = done.parent
    if os.getuid() != 0:
        root.chmod(0o555)
        yield root
        root.chmod(0o755)
        return
    for options in (["--bind"], ["-o", "remount,bind,ro"]):
        mounted = subprocess.run(["mount", *options, str(root), str(root)], check=False, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"nothing can be mounted here: {mounted.stderr}")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_folder_where_one_may_only_read_is_read_and_the_table_printed(read_only: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in read_only.rglob("*")}
    assert fmexp.read(read_only / "run").status == "complete"
    assert [member.status for member in sweep.read(read_only)] == ["complete"]
    said = sweep.conclude(read_only)
    assert "1 members: 1 complete" in said
    assert re.search(f"not written to {read_only}: (Read-only file system|Permission denied)$", said)
    assert {path: path.stat().st_mtime_ns for path in read_only.rglob("*")} == before


def test_a_lock_is_seen_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert not layout.is_locked(tmp_path)
    with layout.lock(tmp_path):
        (tmp_path / ".lock").chmod(0o444)
        assert layout.is_locked(tmp_path)
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "), layout.lock(tmp_path):
            pass
    assert not layout.is_locked(tmp_path)
    (tmp_path / ".lock").unlink(missing_ok=True)
    layout.is_locked(tmp_path)
    assert not (tmp_path / ".lock").exists()
