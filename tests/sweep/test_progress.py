"""What a sweep says while it runs and when it ends: lines, the bar of a terminal, counts, tables that fit."""

import csv
import io
import logging
import os
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import program
import pytest
from sweep_tools import SMALL, fabricate, members, write_run
from tools import result, small

from fmexp import execute, sweep
from fmexp.rundir import rungs
from fmexp.sweep import launcher, progress
from fmexp.sweep.progress import Progress


class Terminal(io.StringIO):
    """A stderr that says that it is one."""

    def isatty(self) -> bool:
        return True


def test_a_member_has_one_line_and_its_log_has_all(tmp_path: Path) -> None:
    words = ["-m", *SMALL, "optimizer.lr=0.1,0.01,1e30", "seed=1,2", f"hydra.sweep.dir={tmp_path}/s"]
    done = program.call(*words, cwd=tmp_path)
    assert done.status == 0
    lines = done.out.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("optimizer.lr ")))
    assert table == 1 + 6, done.out
    assert len(lines) == 1 + 6 + 7 + 4 + 5 + 1, "members, table, replicates, closing lines, and two blank ones"
    assert [line for line in lines if "chose the best by the test split" in line] == [
        "test/accuracy chose the best by the test split, so that it is too good there. Choose by objective="
        "val/accuracy with train.validation=0.1."
    ]
    so_far = -1.0
    for number, (line, path) in enumerate(zip(lines[1:7], members(tmp_path / "s"), strict=True), 1):
        found = result(path)
        if found["status"] == "complete":
            said = f"test/accuracy {found['objective']:.4f}  {found['seconds']:.1f} s"
            if found["objective"] > so_far:
                said, so_far = f"{said}  best so far", found["objective"]
        else:
            said = f"diverged  {found['seconds']:.1f} s"
        assert line.split() == [f"[{number}/6]", path.name, *said.split()]
        log = (path / "fmexp.log").read_text()
        assert "optimizer  SGD, lr" in log
        assert ("step 8: train/loss" in log) == (found["status"] == "complete")
    assert lines[-4] == "6 members: 4 complete, 2 diverged"


def test_where_there_is_no_bar_a_line_says_now_and_then_how_far_the_sweep_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0)
    words = ["-m", *SMALL, "seed=1,2,3", f"hydra.sweep.dir={tmp_path}/s"]
    found = [line for line in program.call(*words, cwd=tmp_path).out.splitlines() if line.startswith("sweep: ")]
    assert [re.sub(r"\d\d:\d\d left, best 0\.\d{4} \(.*\)", "T", line) for line in found] == [
        "sweep: 1 of 3 members, T", "sweep: 2 of 3 members, T"]  # fmt: skip


def test_on_a_terminal_one_bar_has_the_best_so_far_and_members_show_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.QUIET, raising=False)
    terminal = Terminal()
    paths = [fabricate(tmp_path, n, {"optimizer.lr": n}, value) for n, value in enumerate((0.25, 0.75, 0.5))]
    with redirect_stderr(terminal), Progress(5, "test/accuracy") as sweeping:
        sweeping.plan(paths, paths[1:])
        assert os.environ[progress.QUIET] == "1", "for the members' own bars"
        for path in paths[1:]:
            sweeping.started(path)
            sweeping.ended(path)
        assert sweeping._bar.n == 3
        frames = [frame for frame in terminal.getvalue().split("\r") if frame.startswith("sweep ")]
    assert frames[0].startswith("sweep 1/5 |")
    assert "best 0.2500 (0_lr-0)" in terminal.getvalue()
    assert frames[-1].startswith("sweep 3/5 |")
    assert re.search(r"\d\d:\d\d<\d\d:\d\d, best 0.7500 \(1_lr-1\)", frames[-1])
    assert progress.QUIET not in os.environ
    assert terminal.getvalue().split("\r")[-2].strip() == "", "and it is gone at the end"


@pytest.mark.parametrize("hidden", [True, False])
def test_a_run_has_no_bar_of_its_own_in_a_sweep_that_has_one(
    hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setenv(progress.QUIET, "1" if hidden else "")
    with redirect_stderr(terminal):
        execute(small("train.max_steps=2", "logging=light"), tmp_path / "run")
    assert (" batches" in terminal.getvalue()) != hidden


def test_members_that_were_not_begun_are_counted_and_the_command_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = launcher.run, []

    def stopped(*arguments: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise SystemExit(143)
        original(*arguments, **more)

    monkeypatch.setattr(launcher, "run", stopped)
    words = ["-m", *SMALL, "optimizer.lr=0.1,0.01", "seed=1,2,3", f"hydra.sweep.dir={tmp_path}/s"]
    done = program.call(*words, cwd=tmp_path)
    assert done.status == 143
    assert "6 members: 2 complete, 4 not begun" in done.out.splitlines()
    assert done.out.count("go on with") == 1
    assert done.out.splitlines()[-1].endswith(f"hydra.sweep.dir={tmp_path}/s")
    monkeypatch.setattr(launcher, "run", original)
    again = program.call(*words, cwd=tmp_path)
    assert "(4 to train, 0 to resume, 2 to skip)" in again.out
    assert "[3/6] 2_lr-0.1_seed-3" in again.out
    assert "6 members: 6 complete" in again.out.splitlines()


def test_the_closing_line_counts_each_status(tmp_path: Path) -> None:
    for number, status in enumerate(("complete", "complete", "failed", "complete")):
        fabricate(tmp_path, number, {"seed": number}, 0.5 if status == "complete" else None, status=status)
    (fabricate(tmp_path, 4, {"seed": 4}, None) / "result.json").unlink()
    said = sweep.conclude(tmp_path, not_begun=7)
    assert "12 members: 3 complete, 1 failed, 1 interrupted, 7 not begun" in said.splitlines()


def test_a_member_that_was_stopped_before_it_went_on_is_not_said_to_have_paused_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose Slurm job was cancelled while it waited."""
    caplog.set_level(logging.INFO)
    path = write_run(tmp_path / "0_seed-0", None, "paused")
    rungs.write(path, 3, 0.5)
    with Progress(1, "val/accuracy") as shown:
        shown.plan([path], [path])
        shown.ended(path)
        rungs.write(path, 9, 0.75)
        shown.ended(path)
    assert [" ".join(record.message.split()) for record in caplog.records] == [
        "[1/1] 0_seed-0 stopped before it went on from step 0",
        "[1/1] 0_seed-0 step 9: test/accuracy 0.7500 1.5 s",
    ]


def test_csv_files_have_every_digit(tmp_path: Path) -> None:
    values = (1 / 3, 2 / 7, 0.1 + 0.2)
    for number, value in enumerate(values):
        fabricate(tmp_path, number, {"seed": number}, value, test__loss=value / 3)
    said = sweep.conclude(tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert {float(row["test/accuracy"]) for row in rows} == set(values)
    assert {float(row["test/loss"]) for row in rows} == {value / 3 for value in values}
    assert "0.3333" in said
    assert "0.33333" not in said
    (row,) = csv.DictReader((tmp_path / "replicates.csv").read_text().splitlines())
    assert (row["n"], float(row["mean test/accuracy"])) == ("3", pytest.approx(sum(values) / 3, rel=1e-15))
    assert "written to" in said
    assert "(sweep.csv, replicates.csv, sweep.png, sweep.svg)" in said


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_table_fits_the_terminal(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        overrides = {"optimizer.lr": 10**-number, "model": "lenet", "optimizer.momentum": 0.9}
        fabricate(tmp_path, number, overrides, 0.5, test__loss=0.5, test__accuracy__best=0.5, train__loss=0.25)
    full = sweep.conclude(tmp_path).splitlines()
    assert max(map(len, full[:4])) > 110, "elsewhere nothing is left out"
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout", Terminal())
    lines = sweep.conclude(tmp_path).splitlines()
    assert max(map(len, lines[:4])) <= width
    heads, *rows = (line.split() for line in lines[:4])
    assert heads[0] == "optimizer.lr"
    assert "test/accuracy" in heads, "the objective stays to the end"
    assert ("test/loss" in heads) == (width >= 80)
    assert all(row[-1].startswith(f"{number}_") for number, row in enumerate(rows))
    assert lines[4].startswith("not shown: ")


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv = ["fmexp", *sys.argv[1:]]
from fmexp import cli
try:
    cli.main()
finally:
    print("torch was imported to its end:", hasattr(sys.modules.get("torch"), "compile"))
"""


def test_ctrl_c_while_torch_is_imported_waits_for_the_import(tmp_path: Path) -> None:
    """An exception in the midst of it aborts the process, at some of its places."""
    command = [program.PYTHON[0], "-c", INTERRUPTED_IMPORT]
    done = program.run("-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s", cwd=tmp_path, command=command)
    assert done.status == 130
    assert "no members, 2 not begun" in done.out
    assert done.out.count("go on with") == 1
    assert "torch was imported to its end: True" in done.out
    assert "Traceback" not in done.err
