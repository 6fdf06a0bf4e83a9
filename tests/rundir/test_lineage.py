"""Where a run comes from, as its folder says it: commit, changes, command, times, in git repositories; and tags."""

import csv
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import program
import pytest
from tools import assert_same_weights, interrupt, read_events, small

import fmexp
from fmexp import config, execute, sweep
from fmexp.config import resolved
from fmexp.errors import ConfigError, FmexpError
from fmexp.rundir import layout, lineage

GIT = shutil.which("git")
needs_git = pytest.mark.skipif(GIT is None, reason="needs git")
SHORT = ("model=mlp", "model.hidden=[4]", "logging=light", "train.max_steps=1")
STOPPED = ("model=mlp", "logging=light", "train.checkpoint_every=3")
MEMBERS = ("dataset=synthetic", "dataset.train_size=16", "dataset.test_size=8", "device=cpu", *SHORT)
IDENTITY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}  # fmt: skip


class Repository:
    """A git repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self("init", "-q")

    def __call__(self, *words: str) -> str:
        environment = {**os.environ, **IDENTITY}
        command = ["git", "-C", str(self.folder), *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, **files: str) -> str:
        """Write files, commit all that there is, and return the commit."""
        for name, content in files.items():
            (self.folder / name).write_text(content)
        self("add", "--all", "--force")
        self("commit", "-q", "--message", "more")
        return self("rev-parse", "HEAD")


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with one commit; the current folder is in it."""
    made = Repository(tmp_path / "repo")
    made.commit(code="one\n", other="1\n")
    monkeypatch.chdir(made.folder)
    return made


def origin(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())["lineage"]
    return found


def run(folder: Path, *words: str, command: str = "") -> dict[str, Any]:
    """Execute a short run; what its result says of where it comes from."""
    execute(small(*SHORT, *words), folder, resume_command=command)
    return origin(folder)


def shown(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lineage that TensorBoard shows: (step, content) of each."""
    found = read_events(folder).Tensors("lineage/text_summary")
    texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]
    return [(step, json.loads(text.removeprefix("```json\n").removesuffix("\n```"))) for step, text in texts]


@needs_git
def test_a_clean_tree(repo: Repository, tmp_path: Path) -> None:
    before = datetime.now().astimezone().replace(microsecond=0)
    found = run(tmp_path / "run", command="python -m fmexp seed=0")
    unchanged = {"dirty": False, "patch": None, "patch_sha256": None, "untracked": []}
    assert found["git"] == {"commit": repo("rev-parse", "HEAD"), **unchanged}
    assert (found["host"], found["cwd"], found["command"]) == (
        os.uname().nodename,
        os.getcwd(),
        "python -m fmexp seed=0",
    )
    start, end = datetime.fromisoformat(found["start"]), datetime.fromisoformat(found["end"])
    assert before <= start <= end <= datetime.now().astimezone()
    assert start.tzinfo
    begun = {key: value for key, value in found.items() if key != "end"}
    assert json.loads((tmp_path / "run" / layout.LINEAGE).read_text()) == begun
    assert shown(tmp_path / "run") == [(0, begun), (1, found)]
    assert fmexp.read(tmp_path / "run").git == found["git"]
    assert not (tmp_path / "run" / layout.PATCH).exists()


@needs_git
def test_the_patch_makes_the_code_again(repo: Repository, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (repo.folder / "data.bin").write_bytes(rng.bytes(5000))
    (repo.folder / "below").mkdir()
    (repo.folder / "below" / "deep").write_text("deep\n")
    commit = repo.commit(gone="gone\n", latin="x\n")
    (repo.folder / "code").write_text("two\n")
    (repo.folder / "data.bin").write_bytes(rng.bytes(5000))
    (repo.folder / "latin").write_bytes(b"caf\xe9 \x1b[2J\n")
    (repo.folder / "gone").unlink()
    (repo.folder / "staged ü").write_text("new\n")
    repo("add", "staged ü")
    (repo.folder / "not added.py").write_text("it is secret\n")
    (repo.folder / "below" / "a\nb\x1b").touch()
    os.chdir(repo.folder / "below")
    found = run(tmp_path / "run")["git"]
    assert (found["commit"], found["dirty"], found["patch"]) == (commit, True, ".hydra/uncommitted.patch")
    assert found["untracked"] == ["below/a\\nb\\x1b", "not added.py"]
    patch = tmp_path / "run" / found["patch"]
    assert b"it is secret" not in patch.read_bytes()
    again = Repository(tmp_path / "again")
    again("fetch", "-q", str(repo.folder), commit)
    again("checkout", "-q", commit)
    again("apply", str(patch))
    names = ("code", "data.bin", "latin", "staged ü", "below/deep", "other")
    assert not (again.folder / "gone").exists()
    for name in names:
        assert (again.folder / name).read_bytes() == (repo.folder / name).read_bytes(), name


@needs_git
def test_a_large_patch_is_left_out(repo: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (repo.folder / "code").write_bytes(np.random.default_rng(0).bytes(3_000_000))
    cfg = small(*STOPPED)
    interrupt(cfg, tmp_path / "run", 6)
    assert "more than 1,000,000 bytes are changed and not committed: no patch is kept" in caplog.text
    caplog.clear()
    execute(cfg, tmp_path / "run")
    found = origin(tmp_path / "run")
    assert (found["git"]["dirty"], found["git"]["patch"]) == (True, "left out: more than 1,000,000 bytes")
    assert "resumed_with" not in found  # the same changes, though not kept
    assert "code has changed" not in caplog.text
    assert not (tmp_path / "run" / layout.PATCH).exists()
    patch = repo("diff", "--binary").encode()  # of which the same part is compared at each resume
    assert found["git"]["patch_sha256"] == hashlib.sha256(patch[:1_000_001]).hexdigest()


@needs_git
def test_many_untracked_files_are_counted(repo: Repository, tmp_path: Path) -> None:
    for number in range(1234):
        (repo.folder / f"{number:04}").touch()
    names = run(tmp_path / "run")["git"]["untracked"]
    assert names == [*(f"{number:04}" for number in range(100)), "and 1,134 more"]


@needs_git
@pytest.mark.parametrize("place", ["runs/[1]", "."])
def test_the_runs_own_files_are_not_in_the_patch(place: str, repo: Repository) -> None:
    """Not even where a run's folder is committed; code beside them is, where the command was typed in that folder."""
    folder = repo.folder / place
    assert run(folder)["git"]["untracked"] == []
    repo.commit()
    (folder / "result.json").unlink()  # so that all is made again
    (folder / "fmexp.log").write_text("another\n")
    assert run(folder)["git"]["dirty"] is False
    (repo.folder / "code").write_text("two\n")
    (folder / "result.json").unlink()
    found = run(folder)["git"]
    assert found["dirty"] is True
    patch = (folder / layout.PATCH).read_text()
    assert [line for line in patch.splitlines() if line.startswith("diff ")] == ["diff --git a/code b/code"]
    if place != ".":
        assert found["untracked"] == []


@needs_git
def test_a_folder_of_code_may_hold_the_runs(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo.folder / "mine").mkdir()
    (repo.folder / "mine" / "model.py").write_text("1\n")
    repo.commit()
    (repo.folder / "mine" / "model.py").write_text("2\n")
    monkeypatch.chdir(repo.folder / "mine")
    assert run(Path.cwd())["git"]["dirty"] is True
    assert b"+2" in (repo.folder / "mine" / layout.PATCH).read_bytes()


def test_without_a_repository_git_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lineage, "_ask", None)
    found = run(tmp_path / "run")
    assert (found["git"], found["host"]) == (None, os.uname().nodename)
    assert fmexp.read(tmp_path / "run").git == {}


@needs_git
def test_without_git_nothing_is_noted_of_it(repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(tmp_path / "run")["git"] is None


@needs_git
def test_a_repository_without_a_commit_or_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Repository(tmp_path / "empty")
    monkeypatch.chdir(empty.folder)
    assert run(tmp_path / "first")["git"] is None
    (empty.folder / ".git" / "HEAD").unlink()
    assert run(tmp_path / "second")["git"] is None


def fake_git(folder: Path, script: str) -> str:
    """A program `git` in a folder of its own; what PATH has to be."""
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@needs_git
@pytest.mark.parametrize("hangs", ["status", ""])
def test_git_that_takes_too_long_is_not_waited_for(
    hangs: str, repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = f'case "$*" in *"{hangs}"*) echo x; exec sleep 100;; esac; exec {GIT} "$@"'
    monkeypatch.setenv("PATH", fake_git(tmp_path / "bin", script))
    monkeypatch.setattr(lineage, "LIMIT_S", 1)
    monkeypatch.setattr(lineage, "_slow", set())
    for name in ("first", "second"):
        found = run(tmp_path / name)["git"]
        unknown = {"dirty": None, "patch": None, "patch_sha256": None, "untracked": []}
        assert found == ({"commit": repo("rev-parse", "HEAD"), **unknown} if hangs else None)
        monkeypatch.setattr(lineage, "_STATUS", ("must", "not", "be", "asked", "again"))
    assert "git takes more than 1 s" in caplog.text


@needs_git
def test_what_a_repository_configures_is_not_executed(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path / 'sprung'}\ncat\n")
    trap.chmod(0o755)
    repo.commit(**{".gitattributes": "code diff=own\n"})
    for name in ("post-index-change", "post-checkout", "fsmonitor-watchman"):
        hook = repo.folder / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        shutil.copy(trap, hook)
    for key in ("diff.external", "diff.own.textconv", "diff.own.command", "core.fsmonitor", "core.pager"):
        repo("config", key, str(trap))
    for key in ("diff.noprefix", "diff.mnemonicPrefix", "diff.relative", "color.ui"):
        repo("config", key, "always" if key == "color.ui" else "true")
    for name, value in {"GIT_EXTERNAL_DIFF": str(trap), "GIT_DIR": str(tmp_path), "GIT_INDEX_FILE": "x"}.items():
        monkeypatch.setenv(name, value)
    (repo.folder / "code").write_text("two\n")
    index = (repo.folder / ".git" / "index").stat().st_mtime_ns
    assert run(tmp_path / "run")["git"]["dirty"] is True
    patch = (tmp_path / "run" / layout.PATCH).read_text()
    assert patch.startswith("diff --git a/code b/code\n")
    assert patch.endswith("\n-one\n+two\n")
    assert not (tmp_path / "sprung").exists()
    assert (repo.folder / ".git" / "index").stat().st_mtime_ns == index


@needs_git
def test_a_commit_between_stop_and_resume_is_listed(
    repo: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder = small(*STOPPED), tmp_path / "run"
    execute(cfg, tmp_path / "whole")
    first = repo("rev-parse", "HEAD")
    stopped = interrupt(cfg, folder, 6)["lineage"]
    assert stopped["git"]["commit"] == first
    before = (folder / layout.LINEAGE).read_bytes()
    interrupt(cfg, folder, 10)
    assert (folder / layout.LINEAGE).read_bytes() == before  # the same code
    assert "code has changed" not in caplog.text
    second = repo.commit(code="two\n")
    monkeypatch.setattr(lineage, "_now", lambda: "2100-01-01T00:00:00+00:00")
    interrupt(cfg, folder, 12)
    assert f"{first[:12]} then, commit {second[:12]} now" in caplog.text
    (repo.folder / "code").write_text("three\n")
    interrupt(cfg, folder, 13)
    assert f"commit {second[:12]} then, commit {second[:12]} with uncommitted changes now" in caplog.text
    (repo.folder / "code").write_text("four\n")
    interrupt(cfg, folder, 14)
    interrupt(cfg, folder, 15)
    execute(cfg, folder)
    found = origin(folder)
    assert {key: value for key, value in found.items() if key not in ("end", "resumed_with")} == json.loads(before)
    later = [(one["git"]["commit"], one["git"]["dirty"], one["start"][:4]) for one in found["resumed_with"]]
    assert later == [(second, False, "2100"), (second, True, "2100"), (second, True, "2100")]
    assert found["end"][:4] == "2100"
    assert [step for step, _ in shown(folder)] == [0, 16]
    assert shown(folder)[1] == (16, found)
    assert_same_weights(folder, tmp_path / "whole")
    assert fmexp.read(folder).scalars["train/loss"] == fmexp.read(tmp_path / "whole").scalars["train/loss"]


@needs_git
def test_a_run_that_begins_anew_forgets_where_it_had_begun(repo: Repository, tmp_path: Path) -> None:
    cfg, folder = small(*SHORT[:-1], "train.checkpoint_every=100"), tmp_path / "run"
    (repo.folder / "code").write_text("two\n")
    interrupt(cfg, folder, 1)
    assert not list(folder.glob("checkpoint*"))
    assert (folder / layout.PATCH).exists()
    commit = repo.commit()
    execute(cfg, folder)
    assert (origin(folder)["git"]["commit"], origin(folder).get("resumed_with")) == (commit, None)
    assert not (folder / layout.PATCH).exists()


@needs_git
@pytest.mark.parametrize("content", [None, "{", "[]", '{"git": 1}', '{"a": NaN}', '{"git": {}, "resumed_with": 3}'])
def test_a_run_whose_beginning_is_lost_goes_on(
    content: str | None, repo: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, folder = small(*STOPPED), tmp_path / "run"
    interrupt(cfg, folder, 6)
    (folder / layout.LINEAGE).unlink()
    if content:
        (folder / layout.LINEAGE).write_text(content)
    execute(cfg, folder)
    assert "going on from the checkpoint" in (folder / "fmexp.log").read_text()
    assert ("lineage.json is damaged" in caplog.text) == (content is not None)
    found = origin(folder)
    assert found.keys() == {"resumed_with", "end"}
    assert found["resumed_with"][0]["git"]["commit"] == repo("rev-parse", "HEAD")


@needs_git
@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")], ids=["one", "joblib"])
def test_every_member_of_a_sweep_has_it_and_a_process_asks_once(
    launcher: tuple[str, ...], repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repo.folder / "code").write_text("two\n")
    asked = tmp_path / "asked"
    path = fake_git(tmp_path / "bin", f'echo "$PPID $*" >> {shlex.quote(str(asked))}; exec {GIT} "$@"')
    words = ("-m", *MEMBERS, "seed=0,1,2,3", *launcher, "hydra.sweep.dir=out", "tags=[a,b]")
    done = program.run(*words, cwd=repo.folder, env=program.environment(PATH=path))
    assert done.status == 0, done.err
    members = sweep.read(repo.folder / "out")
    assert len(members) == 4
    for member in members:
        found = origin(member.folder)
        assert (found["git"]["commit"], found["git"]["dirty"]) == (repo("rev-parse", "HEAD"), True)
        assert found["git"]["untracked"] == []
        assert b"+two" in (member.folder / layout.PATCH).read_bytes()
        assert found["command"].startswith(f"python -m fmexp {shlex.join(words[:6])}")
        assert member.tags == ["a", "b"]
    calls = Counter(line.split()[0] for line in asked.read_text().splitlines())
    assert list(calls.values()) == [3] * len(calls)  # the commit, status and diff
    assert len(calls) <= (2 if launcher else 1)


# Tags and notes


def test_tags_and_note_are_of_the_same_run(tmp_path: Path) -> None:
    plain, named = small("model=mlp"), small("model=mlp", "+tags=[baseline,old]", "note='as in the paper'")
    assert small("model=mlp", "tags=[baseline,old]").tags == named.tags == ["baseline", "old"]
    assert config.digest(resolved(plain)) == config.digest(resolved(named))
    assert not config.difference(resolved(plain), resolved(named))
    interrupt(small(*STOPPED, "note=first"), tmp_path, 6)
    execute(small(*STOPPED, "tags=[b]", "note=second"), tmp_path)
    assert "going on from the checkpoint" in (tmp_path / "fmexp.log").read_text()
    found = fmexp.read(tmp_path)
    assert (found.tags, found.note) == (["b"], "second")
    assert (found.content["tags"], found.content["note"]) == (["b"], "second")


def test_a_run_without_them(tmp_path: Path) -> None:
    run(tmp_path)
    found = fmexp.read(tmp_path)
    assert (found.tags, found.note, found.content["tags"], found.content["note"]) == ([], "", [], None)
    heads = sweep.table(tmp_path.parent, [member(found)])[0]
    assert "tags" not in heads
    assert "note" not in heads


def member(found: Any, **overrides: str) -> sweep.Member:
    return sweep.Member(**vars(found), overrides=overrides)


def test_they_are_columns_of_the_table(tmp_path: Path) -> None:
    note = "a sentence | with =signs, longer than what fits into the table of a terminal"
    for number, words in enumerate((["tags=[new,mlp]", f"note='{note}'"], ["note='=1+1'"], [])):
        folder = tmp_path / f"{number}_a"
        run(folder, f"seed={number}", *words)
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([f"seed={number}", *words]))
    (tmp_path / "2_a" / "result.json").unlink()  # as of one that is running, whose words are those of its command
    (tmp_path / "2_a" / ".hydra" / "overrides.yaml").write_text(json.dumps(["seed=2", "+tags=[x,y]", "note=z"]))
    said = sweep.conclude(tmp_path).splitlines()
    assert said[0].split()[:3] == ["seed", "tags", "note"]
    assert sum("a sentence | with =signs, longer than w…" in line for line in said) == 1
    with (tmp_path / "sweep.csv").open() as file:
        by_seed = {row["seed"]: (row["tags"], row["note"]) for row in csv.DictReader(file)}
    assert by_seed == {"0": ("new,mlp", note), "1": ("", "'=1+1"), "2": ("x,y", "z")}
    (table,) = read_events(tmp_path / "summary").Tensors("table")
    (line,) = [line for line in table.tensor_proto.string_val[0].decode().splitlines() if "a sentence" in line]
    assert r"a sentence \| with" in line
    with (tmp_path / "replicates.csv").open() as file:  # that they differ in words does not make them others
        assert [row["n"] for row in csv.DictReader(file)] == ["2"]


def test_a_member_that_failed_before_it_began_keeps_its_words(tmp_path: Path) -> None:
    tree = resolved(small("tags=[a]", "note=b"))
    layout.write_failure(tmp_path, tree, [], "boom")
    found = fmexp.read(tmp_path)
    assert (found.status, found.tags, found.note, found.git) == ("failed", ["a"], "b", {})


@pytest.mark.parametrize(
    "word", ["tags=[{a: 1}]", f"note={'x' * 10_001}", f"tags=[{'x' * 101}]"], ids=["dict", "note", "tag"]
)
def test_what_is_no_word_is_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(tags|note)=.{1,210} must be text of at most 1\d*,?\d* letters\.$"):
        execute(small(word), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [{"tags": "abc"}, {"tags": 3}, {"lineage": 3}, {"lineage": {"git": "x"}}])
def test_a_result_of_other_types_is_damaged(more: dict[str, Any], tmp_path: Path) -> None:
    layout.write_failure(tmp_path, resolved(small()), [], "boom")
    layout.write_result(tmp_path, {"status": "complete", "objective": 0.5, **more})
    with pytest.raises(FmexpError, match="is damaged"):
        fmexp.read(tmp_path)


def test_what_a_terminal_would_obey_is_shown_as_its_code(tmp_path: Path) -> None:
    layout.write_failure(tmp_path, resolved(small()), [], "boom")
    git = {"commit": "\x1b[2J", "\x1b": 1, "untracked": ["\x07", 3, None], "patch": {"a": "\x1b"}, "dirty": True}
    content = {"status": "complete", "tags": ["\x1b[2J", 1], "note": "a\x1bb", "lineage": {"git": git}}
    layout.write_result(tmp_path, content)
    found = fmexp.read(tmp_path)
    assert (found.tags, found.note) == ([r"\x1b[2J", "1"], r"a\x1bb")
    assert found.git["commit"] == r"\x1b[2J"
    assert (found.git[r"\x1b"], found.git["untracked"], found.git["dirty"]) == (1, [r"\x07", 3, None], True)
    assert "\x1b" not in found.git["patch"]
