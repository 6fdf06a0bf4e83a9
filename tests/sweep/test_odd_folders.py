"""Odd folders, drawn by hypothesis: whatever a folder of runs holds is read as data, in words, and left as it is."""

import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import program
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sweep_tools import SMALL, fabricate
from tools import result, small

import fmexp
from fmexp import execute, sweep
from fmexp.config import resolved
from fmexp.errors import FmexpError
from fmexp.rundir import layout
from fmexp.sweep import compare, report

ESCAPE, SECRET = "\x1b[2J\x1b]0;title\x07", "it is secret"
TEXTS = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "bytes": bytes(range(256)),
    "deep": b"[" * 2_000,
    "bomb": b"a: &a [x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nobjective: *c\n",
    "list": b"[1, 2]",
    "number": b"12",
    "words": f'["a={ESCAPE}", "b=${{oc.env:SECRET}}", "=1+1", 3, null]'.encode(),
    "result": b'{"status": "complete", "objective": 0.5, "metrics": {"a": 1e999}, "failures": {"x": []}}',
    "wrong types": b'{"status": ["complete"], "objective": {}, "metrics": 3, "steps": "x", "failures": 1}',
    "failed": b'{"status": "failed", "error": "\\u001b[2J\\u202e", "metrics": {"\\u001b[2J": 1, "a": NaN}}',
    "lineage": b'{"status": "complete", "objective": 0.5, "tags": ["\\u001b[2J|\\n"], "note": "=\\u001b\\u202e\\n", '
    b'"lineage": {"git": {"commit": "\\u001b", "\\u001b": [1, null]}}}',
    "odd lineage": b'{"status": "complete", "objective": 0.5, "tags": {"a": 1}, "note": [3], "lineage": [1]}',
    "event": b"\xff" * 8 + b"\0" * 40,
    "config": b"objective: ${oc.env:SECRET}\ntrain: {tag: 3}\n",
    "foreign config": b"{objective: [1], train: {tag: 1}, dataset: 1, model: {_target_: 3}, optimizer: null}",
    "formula": rb"['a=$\frac$', b=1e400]",
}
FILES = (
    ".hydra/config.yaml",
    ".hydra/overrides.yaml",
    "result.json",
    ".hydra/lineage.json",
    ".lock",
    "fmexp.log",
    "events.out.tfevents.9.x.1.0",
)


def harm(folder: Path, file: str, how: str) -> None:
    """Replace a file of a run's folder, which lies in a folder that the test has made."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(folder.parent / "outside")
    elif how == "link outside":
        path.symlink_to(folder.parents[1] / "outside")
    elif how == "loop":
        path.symlink_to(path)
    elif how in TEXTS:
        path.write_bytes(TEXTS[how])


HOW = st.sampled_from(["nothing", "pipe", "folder", "link", "loop", *TEXTS])
HARMS = st.dictionaries(st.tuples(st.integers(0, 2), st.sampled_from(FILES)), HOW, min_size=1, max_size=4)
NAMES = st.sampled_from(["0_lr-0.1", "1", f"2_{ESCAPE}", "3_\udcff", "summary", "=4", "5 of mine\n", "²", r"6_$\frac$"])
OWN = {"sweep.csv", "replicates.csv", "sweep.png", "sweep.svg"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    execute(small("train.max_steps=1", "logging=light"), folder)
    return folder


def content(root: Path) -> dict[Path, object]:
    """All that is in a folder but what a table writes: kind, and bytes or where a link leads."""
    found: dict[Path, object] = {}
    for path in root.rglob("*"):
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        known = {stat.S_IFREG: Path.read_bytes, stat.S_IFLNK: os.readlink}.get(kind, lambda path: None)
        if path.name not in OWN and not path.name.endswith(".sweep") and path != root / "summary":
            found[path.relative_to(root)] = kind, known(path)
    return found


@contextmanager
def no_hang() -> Iterator[None]:
    """Fail where the block waits."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def scalars(folder: Path) -> object:
    return fmexp.read(folder).scalars


def compared(root: Path) -> str:
    """The table of the runs in a folder as those of any folders, with what is said of each."""
    runs = compare.read(compare.find([root]))
    objective, runs = compare.judged(runs, "test/accuracy")
    shown = compare.with_differences(runs, compare.differing(runs))
    commands = [str(compare.command(run.folder)) for run in runs]
    rows = [*sweep.table(root, shown, objective=objective), *compare.replicates(shown, objective)[0]]
    return "\n".join([*(" ".join(row) for row in rows), *commands])


def in_words(function: Callable[[], object]) -> str:
    """What a call returns or says, as text."""
    try:
        return str(function())
    except FmexpError as error:
        return str(error)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.nightly)])
def test_any_folder_is_read_as_data(
    count: int, sound: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    tree = layout.read_config(sound) | {"seed": 1}

    @settings(max_examples=count, phases=[Phase.generate])
    @given(st.lists(NAMES, min_size=1, max_size=3, unique=True), HARMS, st.integers(0, 9))
    def check(names: list[str], harms: dict[tuple[int, str], str], table: int) -> None:
        caplog.clear()
        with tempfile.TemporaryDirectory() as made, no_hang():
            root = Path(made) / "root"
            for name in names:
                shutil.copytree(sound, root / name)
            (root / "outside").write_text("not of a run")
            for (number, file), how in harms.items():
                if number < len(names):
                    harm(root / names[number], file, how)
            before = content(root)
            said = [str(sweep.read(root)), in_words(partial(compared, root))]
            for name in names:
                said.append(in_words(partial(fmexp.read, root / name)))
                said.append(in_words(partial(scalars, root / name)))
                said.append(in_words(partial(layout.check_identity, root / name, tree, resume=True)))
            if not table:  # once in ten times, for a picture takes long
                said.append(in_words(partial(sweep.conclude, root)))
                for file in OWN & {path.name for path in root.iterdir()} - {"sweep.png"}:
                    said.append((root / file).read_text())
            assert content(root) == before
            shown = caplog.text + "".join(part for part in said if not part.startswith("["))
            assert "\x1b" not in shown.replace(str(root), "")
            assert SECRET not in "".join(said) + caplog.text

    check()


@pytest.mark.parametrize(
    ("name", "file", "how"),
    [
        ("0_a", ".hydra/overrides.yaml", "formula"),
        ("²", "", ""),
        ("0_a", ".hydra/config.yaml", "foreign config"),
        ("0_a", "../optuna.db", "empty"),
        ("0_a", "../optuna.db", "link outside"),
    ],
)
def test_one_odd_member_does_not_cost_the_table(name: str, file: str, how: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    fabricate(root, 0, {"a": 1}, 0.5).rename(root / name)
    fabricate(root, 1, {"a": 2}, 0.75)
    outside.touch()
    if how:
        harm(root / name, file, how)
    before = content(root)
    assert "0.7500" in sweep.conclude(root)
    assert content(root) == before
    assert outside.read_bytes() == b""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two members that has ended."""
    root = tmp_path_factory.mktemp("swept") / "sweep"
    assert program.call("-m", *SMALL, "seed=0,1", f"hydra.sweep.dir={root}", cwd=root.parent).status == 0
    return root


@pytest.mark.parametrize(
    ("file", "how"), [("fmexp.log", "pipe"), ("fmexp.log", "link"), ("result.json", "folder"), ("result.json", "link")]
)
def test_a_sweep_goes_on_beside_an_odd_member(file: str, how: str, swept: Path, tmp_path: Path) -> None:
    root = shutil.copytree(swept, tmp_path / "sweep")
    (root / "outside").write_text("not of a run")
    harm(root / "1_seed-1", "model.pt", "link")  # which is complete, and needs nothing
    (root / "0_seed-0" / "result.json").unlink()
    harm(root / "0_seed-0", file, how)
    before = content(root / "0_seed-0")
    with no_hang():
        done = program.call("-m", *SMALL, "seed=0,1", f"hydra.sweep.dir={root}", cwd=tmp_path)
    assert done.status == 0, done.err
    assert result(root / "0_seed-0_2")["objective"] == result(swept / "0_seed-0")["objective"]
    assert content(root / "0_seed-0") == before
    assert not (root / "1_seed-1_2").exists()
    assert (root / "outside").read_text() == "not of a run"


@pytest.mark.parametrize(
    ("content", "trained"),
    [
        (TEXTS["wrong types"], True),
        (b'{"status": "complete", "objective": "best"}', True),
        (b'{"status": "complete"}', False),
    ],
    ids=["wrong types", "best", "no objective"],
)
def test_a_sweep_goes_on_beside_a_result_that_no_run_has_written(
    content: bytes, trained: bool, swept: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(swept, tmp_path / "sweep")
    (root / "0_seed-0" / "result.json").write_bytes(content)
    done = program.call("-m", *SMALL, "seed=0,1", f"hydra.sweep.dir={root}", cwd=tmp_path)
    assert done.status == 0, done.err
    expected = result(swept / "0_seed-0")["objective"] if trained else None
    assert result(root / "0_seed-0").get("objective") == expected


def test_a_folder_that_one_may_not_look_into_is_left_out() -> None:
    with tempfile.TemporaryDirectory() as made:  # tmp_path is closed to other users
        root, user = Path(made), os.geteuid()
        closed = fabricate(root, 0, {"a": 1}, 0.5) / ".hydra"
        fabricate(root, 1, {"a": 2}, 0.75)
        root.chmod(0o755)
        closed.chmod(0)
        if user == 0:  # who may look anywhere
            os.seteuid(65534)
        try:
            assert [member.objective for member in sweep.read(root)] == [0.75]
        finally:
            os.seteuid(user)
            closed.chmod(0o755)


def test_a_sweep_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "sweep").symlink_to(tmp_path / "disk")
    report.begin(tmp_path / "sweep", {tmp_path / "sweep" / "0": resolved(small())})
    (columns,) = (tmp_path / "disk").iterdir()
    assert columns.name.endswith(".sweep")
