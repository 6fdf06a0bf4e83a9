"""Sweeps whose members fail, whose processes are killed or told to stop, and what the same command does next."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from program import TensorBoard, alive
from sweep_tools import CHECKOUT, HERE, OWN, SMALL, Gate, Sweep, files, member, members, until
from tools import result

from fmexp import config, sweep
from fmexp.rundir import layout

pytestmark = pytest.mark.slow

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SHORT = ("dataset.train_size=64",)  # 32 batches


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long members a, b, c and d, undisturbed."""
    return Sweep(tmp_path_factory.mktemp("truth") / "sweep", *OWN, "+model.tag=a,b,c,d").end().root


def assert_as(truth: Path, root: Path, tags: str) -> None:
    """Compare the members of some tags with the undisturbed ones."""
    assert len(members(root)) == len(tags)
    for tag in tags:
        ours, theirs = member(root, f"tag-{tag}"), member(truth, f"tag-{tag}")
        assert (ours / "model.pt").read_bytes() == (theirs / "model.pt").read_bytes(), tag
        assert result(ours)["metrics"] == result(theirs)["metrics"]
        assert result(ours)["steps"] == 300
        assert layout.read_config(ours)["model"]["tag"] == tag
        assert config.digest(layout.read_config(ours)) == result(ours)["config_digest"]


def resumed(path: Path) -> bool:
    return "going on from the checkpoint at step" in (path / "fmexp.log").read_text()


@pytest.mark.parametrize("launcher", [(), JOBLIB], ids=["basic", "joblib"])
def test_a_failing_member_harms_no_other_and_is_executed_again(launcher: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    words = (*OWN, *SHORT, "+model.batch_fails=b", "+model.tag=a,b,c", *launcher)
    first = Sweep(root, *words)
    assert first.wait() == 1
    failed = member(root, "tag-b")
    assert "Traceback" in (failed / "fmexp.log").read_text()
    printed = first.output.splitlines()
    (at,) = (place for place, line in enumerate(printed) if line.startswith("[") and "/3] 1_tag-b  failed: " in line)
    assert printed[at].endswith("failed: ValueError: the model b does not want to be trained")
    details = (failed / "fmexp.log").read_text().splitlines()[-12:]
    assert printed[at + 1 : at + 13] == [f"    {line}" for line in details], "the end of its log"
    assert "ValueError: the model b does not want to be trained" in details
    assert "ValueError" not in (member(root, "tag-a") / "fmexp.log").read_text()
    assert first.output.index("does not want") < first.output.index("  status  "), "at once, not at the end"
    assert [result(member(root, f"tag-{tag}"))["status"] for tag in "abc"] == ["complete", "failed", "complete"]
    summary = "failed: 1_tag-b: ValueError: the model b does not want to be trained (more in its fmexp.log)"
    assert summary in first.output
    assert "3 members: 2 complete, 1 failed" in first.output
    assert "1 of 3 members have no result; the same command goes on with them." in first.output
    assert first.output.count("the model b does not want to be trained\n") == 2, "when it happens, and in its details"
    with TensorBoard(root) as server:
        rows = server.hparams(3)
    assert [rows[f"{i}_tag-{t}"]["status"] for i, t in enumerate("abc")] == [
        "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_SUCCESS"]  # fmt: skip

    before = {tag: files(member(root, f"tag-{tag}")) for tag in "ac"}
    second = Sweep(root, *words, SWEEP_MENDED="1").end()
    assert "(0 to train, 1 to resume, 2 to skip)" in second.output
    assert {tag: files(member(root, f"tag-{tag}")) for tag in "ac"} == before
    assert result(failed)["status"] == "complete"
    with TensorBoard(root) as server:
        assert {row["status"] for row in server.hparams(3).values()} == {"STATUS_SUCCESS"}


def test_a_member_that_cannot_be_built_is_told_of_in_its_own_log(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    first = Sweep(root, *OWN, *SHORT, "+model.build_fails=a", "+model.tag=a,b", *JOBLIB)
    assert first.wait() == 1
    path = member(root, "tag-a")
    for text in (first.output, (path / "fmexp.log").read_text()):
        assert "the model a does not want to be built" in text
    assert "sweep_parts.py" in text
    assert result(path)["error"].startswith("model._target_=sweep_parts.Model cannot be built: the model a does not")
    assert "failed: 0_tag-a: model._target_=sweep_parts.Model cannot be built" in first.output
    assert result(member(root, "tag-b"))["status"] == "complete"


def test_images_that_are_too_small_for_a_model_cost_that_member(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    done = Sweep(root, *SMALL, "dataset.image_size=8", "model=lenet,mlp", "~model.hidden", "~model.dropout")
    assert done.wait() == 1  # for lenet has no model.hidden to take away: nothing begins
    assert not root.exists()
    words = [word for word in SMALL if not word.startswith("model")]
    done = Sweep(root, *words, "dataset.image_size=8", "model=lenet,mlp")
    assert done.wait() == 1
    assert [result(path)["status"] for path in members(root)] == ["failed", "complete"]
    assert "model._target_=fmexp.models.LeNet" in result(members(root)[0])["error"]


@pytest.mark.parametrize("launcher", [(), JOBLIB], ids=["basic", "joblib"])
def test_fail_fast_begins_no_more_members(launcher: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    done = Sweep(
        root, *OWN, *SHORT, "+model.batch_fails=a", "+model.tag=a,b,c,d,e,f,g,h", "sweep.fail_fast=true", *launcher
    )
    assert done.wait() == 1
    assert len(members(root)) < 8
    assert result(member(root, "tag-a"))["status"] == "failed"
    if not launcher:
        assert len(members(root)) == 1


def test_a_killed_worker_costs_its_member_alone(tmp_path: Path, gate: Gate, truth: Path) -> None:
    root = tmp_path / "sweep"
    words = (*OWN, "+model.tag=a,b,c", *JOBLIB)
    first = Sweep(root, *words, **gate.environ)
    pids = gate.until_waiting(first, 2)
    assert pids.keys() == {"a", "b"}
    until(lambda: (member(root, "tag-a") / "checkpoint.pt").exists(), "a checkpoint", first)
    os.kill(pids["a"], signal.SIGKILL)
    until(
        lambda: "0_tag-a  failed: its process was killed, or ran out of memory" in first.output,
        "word of the kill",
        first,
    )
    gate.open()
    assert first.wait() == 1
    assert [result(member(root, f"tag-{tag}"))["status"] for tag in "abc"] == ["failed", "complete", "complete"]
    assert "failed: 0_tag-a: its process was killed, or ran out of memory" in first.output
    second = Sweep(root, *words).end()
    assert "(0 to train, 1 to resume, 2 to skip)" in second.output
    assert resumed(member(root, "tag-a"))
    assert_as(truth, root, "abc")


def test_sigkill_of_parent_and_workers_and_then_the_same_command(tmp_path: Path, gate: Gate, truth: Path) -> None:
    root = tmp_path / "sweep"
    words = (*OWN, "+model.tag=a,b,c", *JOBLIB)
    first = Sweep(root, *words, **gate.environ)
    pids = gate.until_waiting(first, 2)
    until(lambda: all((member(root, f"tag-{t}") / "checkpoint.pt").exists() for t in "ab"), "checkpoints", first)
    first.kill(*pids.values())
    assert [m.status for m in sweep.read(root)] == ["interrupted", "interrupted"]
    (root / "2_tag-c").mkdir()  # what is left of a member that was killed before it had written anything
    (root / "2_tag-c" / ".lock").touch()
    with TensorBoard(root) as server:
        assert {row["status"] for row in server.hparams(2).values()} == {"STATUS_UNKNOWN"}  # its word for no end
    second = Sweep(root, *words).end()
    assert "(1 to train, 2 to resume, 0 to skip)" in second.output
    assert resumed(member(root, "tag-a"))
    assert resumed(member(root, "tag-b"))
    assert_as(truth, root, "abc")
    with TensorBoard(root) as server:
        rows = server.hparams(3)
    assert {row["status"] for row in rows.values()} == {"STATUS_SUCCESS"}


def test_workers_whose_parent_was_killed_save_themselves_and_the_same_command_waits_for_them(
    tmp_path: Path, gate: Gate, truth: Path
) -> None:
    root = tmp_path / "sweep"
    words = (*OWN, "+model.tag=a,b", *JOBLIB)
    first = Sweep(root, *words, **gate.environ)
    pids = gate.until_waiting(first, 2)
    (gate.folder / "hold-a").touch()  # so that it cannot finish its batch
    first.kill()
    until(lambda: not alive(pids["b"]), "the other worker's end")
    assert [m.status for m in sweep.read(root)] == ["running", "interrupted"]
    assert "stopped by SIGTERM" in (member(root, "tag-b") / "fmexp.log").read_text()
    second = Sweep(root, *words)
    until(lambda: f"0_tag-a: waiting for process {pids['a']} on" in second.output, "word of waiting", second)
    (gate.folder / "hold-a").unlink()
    second.end()
    assert not alive(pids["a"])
    assert resumed(member(root, "tag-a"))
    assert_as(truth, root, "ab")


@pytest.mark.parametrize("launcher", [(), JOBLIB], ids=["basic", "joblib"])
def test_a_sweep_that_is_told_to_stop_saves_itself_and_says_how_to_go_on(
    launcher: tuple[str, ...], tmp_path: Path, gate: Gate, truth: Path
) -> None:
    root = tmp_path / "a sweep"
    first = Sweep(root, *OWN, "+model.tag=a,b,c", *launcher, **gate.environ)
    pids = gate.until_waiting(first, 2 if launcher else 1)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert not any(alive(pid) for pid in pids.values())
    assert {m.status for m in sweep.read(root)} == {"interrupted"}
    assert all((path / "checkpoint.pt").is_file() for path in members(root))
    begun = len(pids)
    assert f"3 members: {begun} interrupted, {3 - begun} not begun" in first.output.splitlines()
    (command,) = re.findall(r"go on with\n  (.*)", first.output)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "fmexp"]
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words[1:]], env=environment, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert resumed(member(root, "tag-a"))
    assert_as(truth, root, "abc")


def test_a_sweep_with_running_and_interrupted_members_can_be_read(tmp_path: Path, gate: Gate) -> None:
    root = tmp_path / "sweep"
    first = Sweep(root, *OWN, "+model.tag=a,b,c", *JOBLIB, **gate.environ)
    pids = gate.until_waiting(first, 2)
    assert [m.status for m in sweep.read(root)] == ["running", "running"]
    assert "0_tag-a" in sweep.conclude(root)
    assert (root / "sweep.png").read_bytes().startswith(b"\x89PNG")
    first.kill(*pids.values())
