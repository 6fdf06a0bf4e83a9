"""`python -m fmexp.sweep --delete`: runs of one status go, once somebody has agreed, and nothing goes with them."""

import builtins
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePath

import program
import pytest
from program import Finished
from sweep_tools import SMALL, files, write_run
from tools import result, small

from fmexp import execute
from fmexp.rundir import layout
from fmexp.sweep import delete

Command = Callable[..., Finished]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all that its stages write, the projector among it, and what a kill leaves."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    execute(small("train.max_steps=1"), folder)
    assert (folder / "00000").is_dir()
    for name in (
        "checkpoint.pt",
        "checkpoint.previous.pt",
        ".model.pt.abcd_123.part",
        ".hydra/.config.yaml.abcdefgh.part",
    ):
        (folder / name).write_text("half")
    return folder


def ended(folder: Path, status: str) -> Path:
    """Give a run's folder a status."""
    if status == "interrupted":
        (folder / "result.json").unlink(missing_ok=True)
    else:
        layout.write_result(folder, {"status": status, "objective": None, "error": "out of memory\nat line 3"})
    return folder


@pytest.fixture
def failed(trained: Path, tmp_path: Path) -> Path:
    """A failed run beside one of each other status, in a sweep's folder."""
    for status in ("complete", "diverged", "interrupted"):
        write_run(tmp_path / "sweep" / status, None, status)
    return ended(shutil.copytree(trained, tmp_path / "sweep" / "failed"), "failed")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("status", delete.STATUSES)
def test_all_of_a_run_is_deleted_and_nothing_of_others(
    status: str, trained: Path, tmp_path: Path, command: Command
) -> None:
    others = [write_run(tmp_path / "sweep" / other, None, other) for other in ("complete", *delete.STATUSES)]
    (tmp_path / "sweep" / "sweep.csv").write_text("a table")
    ended(shutil.copytree(trained, tmp_path / "sweep" / "run"), status)
    with layout.lock(write_run(tmp_path / "sweep" / "running", status="interrupted")):
        before = {other.name: files(other) for other in others if other.name != status}
        done = command(str(tmp_path), "--delete", status, "--yes")
        assert done.status == 0, done
        assert names(tmp_path / "sweep") == {*before, "running", "sweep.csv"}
        assert {name: files(tmp_path / "sweep" / name) for name in before} == before
    assert f"{status}: {tmp_path / 'sweep' / 'run'}" in done.out
    assert f"{status}: {tmp_path / 'sweep' / status}" in done.out
    assert done.out.endswith("2 deleted\n")


@pytest.mark.parametrize("status", ["complete", "running"])
def test_no_option_and_no_call_deletes_what_is_complete_or_running(status: str, failed: Path, command: Command) -> None:
    assert status not in delete.STATUSES
    assert command(str(failed.parent), "--delete", status, "--yes").status == 2
    assert names(failed.parent) == {"complete", "diverged", "interrupted", "failed"}


@pytest.mark.parametrize(
    ("answer", "deleted"), [("y", True), ("YES ", True), ("", False), ("n", False), ("yess", False)]
)
def test_a_terminal_is_asked_after_the_runs_were_named(
    answer: str, deleted: bool, failed: Path, command: Command, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = []

    def ask(question: str) -> str:
        asked.append((question, capsys.readouterr().out))
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", ask)
    done = command(str(failed.parent), "--delete", "failed")
    assert asked == [("Delete 1 of 4 runs? [y/N] ", f"failed: {failed}: out of memory\n")]
    assert (done.status, done.out) == (0, "1 deleted\n" if deleted else "nothing was deleted\n")
    assert failed.exists() is not deleted


@pytest.mark.parametrize("error", [EOFError, KeyboardInterrupt])
def test_no_answer_is_no(
    error: type[BaseException], failed: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str) -> str:
        raise error

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", ask)
    assert command(str(failed.parent), "--delete", "failed").out.endswith("nothing was deleted\n")
    assert failed.exists()


def test_without_a_terminal_nothing_is_deleted_but_with_yes(failed: Path) -> None:
    module = (sys.executable, "-m", "fmexp.sweep")
    done = program.run("sweep", "--delete", "failed", cwd=failed.parents[1], command=module)
    said = "Nothing was deleted: there is no terminal to ask at. Add --yes to delete them.\n"
    assert done == Finished(1, f"failed: {failed}: out of memory\n", said)
    assert failed.exists()
    done = program.run("sweep", "--delete", "failed", "--yes", cwd=failed.parents[1], command=module)
    assert (done.status, done.err) == (0, "")
    assert not failed.exists()


def test_nothing_to_delete_is_said(failed: Path, command: Command) -> None:
    done = command(str(failed.parent / "complete"), "--delete", "failed")
    assert (done.status, done.out) == (0, "0 of 1 runs failed: nothing was deleted\n")


def test_where_chooses_what_is_deleted(tmp_path: Path, command: Command) -> None:
    for seed in (1, 2):
        write_run(tmp_path / "sweep" / str(seed), None, "failed", seed=seed)
    assert command(str(tmp_path), "--delete", "failed", "--where", "seed=2", "--yes").status == 0
    assert names(tmp_path / "sweep") == {"1"}


def test_a_run_that_is_named_itself_is_deleted_and_a_folder_above_never(tmp_path: Path, command: Command) -> None:
    run = write_run(tmp_path / "runs" / "day" / "time", None, "failed")
    assert command(str(run), "--delete", "failed", "--yes").status == 0
    assert list((tmp_path / "runs" / "day").iterdir()) == []


# What stops a deletion


def add(name: str) -> Callable[[Path], object]:
    def write(folder: Path) -> object:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return (folder / name).write_text("mine")

    return write


def link(name: str, to: str) -> Callable[[Path], object]:
    def write(folder: Path) -> object:
        (folder / name).unlink(missing_ok=True)
        return (folder / name).symlink_to(folder.parents[1] / to)

    return write


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> object:
        (folder / name).unlink()
        return make(folder / name)

    return write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add("notes.txt"), "it holds notes.txt, which no run has written"),
        (add("thesis/chapter.tex"), "it holds thesis, which no run has written"),
        (add("00000/mine.txt"), "it holds 00000/mine.txt, which no run has written"),
        (add("00000/view-images/mine.txt"), "it holds 00000/view-images/mine.txt, which no run has written"),
        (add(".hydra/mine.yaml"), "it holds .hydra/mine.yaml, which no run has written"),
        (add("evaluate/time/result.json"), "it holds evaluate, which no run has written"),
        (add("model.pt.bak"), "it holds model.pt.bak, which no run has written"),
        (link("00001", "outside"), "it holds 00001, which no run has written (a link)"),
        (link("model.pt", "outside/mine.txt"), "it holds model.pt, which no run has written (a link)"),
        (link(".lock.owner", "outside/mine.txt"), "it holds .lock.owner, which no run has written (a link)"),
        (replaced("fmexp.log", os.mkfifo), "it holds fmexp.log, which no run has written"),
        (replaced("model.pt", os.mkdir), "it holds model.pt, which no run has written"),
    ],
)  # fmt: skip
def test_what_no_run_has_written_keeps_the_whole_folder(
    change: Callable[[Path], object], said: str, failed: Path, command: Command
) -> None:
    outside = failed.parents[1] / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    write_run(failed.parent / "other", None, "failed")
    change(failed)
    before = sorted(failed.rglob("*")), files(failed), files(outside)
    done = command(str(failed.parent), "--delete", "failed", "--yes")
    assert done.status == 1
    assert f"failed: {failed} is left alone: {said}" in done.out
    assert "1 deleted, 1 left" in done.out
    assert (sorted(failed.rglob("*")), files(failed), files(outside)) == before
    assert not (failed.parent / "other").exists()


def test_a_run_behind_a_link_is_left_alone(failed: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "run").symlink_to(failed)
    before = files(failed)
    for named in (tmp_path / "here", tmp_path / "here" / "run"):
        done = command(str(named), "--delete", "failed", "--yes")
        assert f"{tmp_path / 'here' / 'run'} is left alone: it is a link" in done.out
        assert done.status == 1
    assert files(failed) == before


def test_an_output_folder_of_another_program_is_no_run(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "runs" / "ours", None, "interrupted")
    for name, config in (("theirs", "db: 1"), ("alike", "{seed: 1, objective: loss, train: {tag: a}}")):
        (tmp_path / "runs" / name / ".hydra").mkdir(parents=True)
        (tmp_path / "runs" / name / ".hydra" / "config.yaml").write_text(config)
    done = command(str(tmp_path), "--delete", "interrupted", "--yes")
    assert "its configuration has no dataset, so that it is no run of fmexp" in done.out
    assert names(tmp_path / "runs") == {"theirs", "alike"}


def test_a_damaged_result_is_left_alone(failed: Path, command: Command) -> None:
    (failed / "result.json").write_text('{"status": "failed", "metrics": 3}')
    command(str(failed.parent), "--delete", "failed", "--yes")
    command(str(failed), "--delete", "interrupted", "--yes")
    assert (failed / "model.pt").exists()


def test_a_run_in_whose_folder_a_process_is_is_left(tmp_path: Path, command: Command) -> None:
    run = write_run(tmp_path / "run", None, "diverged")  # its process is about to end
    with layout.lock(run):
        before = files(run)
        done = command(str(tmp_path), "--delete", "diverged", "--yes")
        assert done.status == 1
        assert f"{run} is left: {run}: process {os.getpid()} on " in done.out
        assert files(run) == before
    assert command(str(tmp_path), "--delete", "diverged", "--yes").status == 0
    assert not run.exists()


def test_a_run_that_goes_on_while_one_is_asked_is_left(
    failed: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str) -> str:
        layout.write_result(failed, {"status": "complete", "objective": 0.5})
        return "y"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", ask)
    done = command(str(failed.parent), "--delete", "failed")
    assert (done.status, done.out.splitlines()[1:]) == (
        1, [f"{failed} is left: it is not failed any more", "0 deleted, 1 left"],
    )  # fmt: skip
    assert (failed / "model.pt").exists()


def test_what_comes_in_the_meantime_is_not_deleted(
    failed: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = delete._remove

    def and_write(top: int, path: PurePath, is_folder: bool) -> None:
        (failed / "mine.txt").write_text("mine")
        remove(top, path, is_folder)

    monkeypatch.setattr(delete, "_remove", and_write)
    done = command(str(failed.parent), "--delete", "failed", "--yes")
    assert f"{failed} is left: " in done.out
    assert (failed / "mine.txt").read_text() == "mine"


def test_a_folder_that_becomes_a_link_in_the_meantime_is_not_followed(
    failed: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = shutil.copytree(failed / ".hydra", tmp_path / "theirs")
    before, remove = files(theirs), delete._remove

    def and_swap(top: int, path: PurePath, is_folder: bool) -> None:
        if not (failed / ".hydra").is_symlink():
            (failed / ".hydra").rename(tmp_path / "away")
            (failed / ".hydra").symlink_to(theirs)
        remove(top, path, is_folder)

    monkeypatch.setattr(delete, "_remove", and_swap)
    done = command(str(failed.parent), "--delete", "failed", "--yes")
    assert done.status == 1
    assert files(theirs) == before


def test_a_deletion_that_is_killed_leaves_a_run_that_the_same_option_deletes(
    failed: Path, trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = delete._remove
    count = len(list(failed.rglob("*"))) + 2  # with the lock's files
    for kept in range(count):
        left = kept

        def until_killed(top: int, path: PurePath, is_folder: bool) -> None:
            nonlocal left
            if left == 0:
                raise OSError("killed")
            left -= 1
            remove(top, path, is_folder)

        with monkeypatch.context() as patched:
            patched.setattr(delete, "_remove", until_killed)
            command(str(failed.parent), "--delete", "failed", "--yes")
        if not failed.exists():
            break
        if layout.holds_run(failed):
            there = (failed / "checkpoint.pt").exists(), (failed / "model.pt").exists()
            assert there != (True, False)  # so that it never goes on from a checkpoint without what was before
            status = "failed" if (failed / "result.json").exists() else "interrupted"
            assert command(str(failed), "--delete", status, "--yes").status == 0
        else:
            assert names(failed) <= {".hydra", ".lock", ".lock.owner"}  # which a sweep takes for a free folder
            shutil.rmtree(failed)
        assert not failed.exists()
        ended(shutil.copytree(trained, failed), "failed")
    assert kept > 10


# Afterwards


def test_the_same_command_trains_what_was_deleted_again(tmp_path: Path, command: Command) -> None:
    sweep = ("-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep")
    assert program.call(*sweep, cwd=tmp_path).status == 0
    root = tmp_path / "sweep"
    trained, other = files(root / "1_seed-1"), files(root / "0_seed-0")
    accuracy = result(root / "1_seed-1")["objective"]
    ended(root / "1_seed-1", "failed")
    assert command(str(root), "--delete", "failed", "--yes").status == 0
    assert not (root / "1_seed-1").exists()
    done = program.call(*sweep, cwd=tmp_path)
    assert "1 to train, 0 to resume, 1 to skip" in done.err + done.out
    assert result(root / "1_seed-1")["objective"] == accuracy
    assert files(root / "1_seed-1")["model.pt"][1] == trained["model.pt"][1]
    assert files(root / "0_seed-0") == other
