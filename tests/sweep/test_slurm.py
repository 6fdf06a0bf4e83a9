"""Sweeps through a real Slurm: members preempted, warned, cancelled; a sweep that is killed while its jobs run."""

import subprocess
from pathlib import Path

import pytest
from program import slurm_answers
from sweep_tools import OWN, Gate, Sweep, files, member, members, until
from tools import result

from fmexp import sweep
from fmexp.sweep import slurm

SLURM = ("hydra/launcher=slurm", "hydra.launcher.slurm.slurm_array_parallelism=2")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm_answers(), reason="needs a Slurm that answers to sinfo and takes jobs by sbatch"),
]


def jobs(started: Sweep) -> dict[str, str]:
    """Of each member, by its tag, the Slurm job."""
    known = until(lambda: sweep_jobs(started.root), "a submission", started)
    return {name.split("-")[-1]: job for name, job in known.items()}


def sweep_jobs(root: Path) -> dict[str, str]:
    return slurm._submitted(root)


def test_halving_decides_as_on_this_machine(tmp_path: Path) -> None:
    words = (*OWN, "dataset.train_size=60", "hydra/sweeper=halving", "hydra.sweeper.min_steps=5", "+model.tag=a,b,c,d",
             "hydra.sweeper.eta=2")  # fmt: skip
    here, there = (Sweep(tmp_path / name, *words, *more).end().root for name, more in (("here", ()), ("slurm", SLURM)))
    ours, theirs = ({m.name: (m.status, m.rungs) for m in sweep.read(root)} for root in (there, here))
    assert ours == theirs
    assert sorted(status for status, _ in ours.values()) == ["complete", *["pruned"] * 3]
    (best,) = (path.name for path in members(here) if result(path)["status"] == "complete")
    assert (there / best / "model.pt").read_bytes() == (here / best / "model.pt").read_bytes()


def put_back_at_once(job: str, gate: Gate, tag: str, started: Sweep, tasks: int = 1) -> None:
    """Wait for a requeued job of so many tasks to run again, without the two minutes that Slurm lets pass before."""

    def runs_again() -> bool:
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False)
        return len(list(gate.folder.glob(f"{tag}.*"))) == 2 * tasks

    until(runs_again, f"job {job} to run again", started)


def test_preempted_and_warned_members_go_on_from_their_checkpoints(tmp_path: Path, gate: Gate) -> None:
    truth = Sweep(tmp_path / "truth", *OWN, "+model.tag=a,b")
    root = tmp_path / "sweep"
    first = Sweep(root, *OWN, "+model.tag=a,b", *SLURM, **gate.environ)
    submitted = jobs(first)
    gate.until_waiting(first, 2)
    until(lambda: all((member(root, f"tag-{t}") / "checkpoint.pt").exists() for t in "ab"), "checkpoints", first)
    subprocess.run(["scontrol", "requeue", submitted["a"]], check=True)
    subprocess.run(["scancel", "--signal=USR2", submitted["b"]], check=True)  # as Slurm warns that time is running out
    put_back_at_once(submitted["a"], gate, "a", first)
    put_back_at_once(submitted["b"], gate, "b", first)
    gate.open()
    first.end()
    truth.end()
    for tag, reason in (("a", "SIGTERM"), ("b", "SIGUSR2")):
        text = (member(root, f"tag-{tag}") / "fmexp.log").read_text()
        assert f"stopped by {reason}" in text
        assert "going on from the checkpoint at step" in text
        assert text.count("python -m fmexp --multirun") == 1, "the command that goes on with the sweep"
    for tag in "ab":
        ours, theirs = member(root, f"tag-{tag}"), member(truth.root, f"tag-{tag}")
        assert (ours / "model.pt").read_bytes() == (theirs / "model.pt").read_bytes()
        assert result(ours)["metrics"] == result(theirs)["metrics"]
    assert "[2/2] " in first.output


def test_jobs_in_flight_are_not_submitted_twice_and_a_cancelled_one_has_failed(tmp_path: Path, gate: Gate) -> None:
    root = tmp_path / "sweep"
    words = (*OWN, "+model.tag=a,b,c", *SLURM)
    first = Sweep(root, *words, **gate.environ)
    submitted = jobs(first)
    gate.until_waiting(first, 2)
    first.kill()
    assert {m.status for m in sweep.read(root)} == {"running"}
    second = Sweep(root, *words)
    until(lambda: "0 members submitted to Slurm, 3 there already" in second.output, "word of the jobs", second)
    subprocess.run(["scancel", submitted["a"]], check=True)
    until(lambda: len(gate.waiting()) == 3, "the third member", second)
    gate.open()
    assert second.wait() == 1
    assert jobs(second) == submitted
    assert f"failed: 0_tag-a: its Slurm job {submitted['a']} ended without a result" in second.output
    assert [result(path)["status"] for path in members(root)] == ["failed", "complete", "complete"]
    before = {tag: files(member(root, f"tag-{tag}")) for tag in "bc"}
    third = Sweep(root, *words).end()
    assert "1 members submitted to Slurm, 0 there already" in third.output
    assert result(member(root, "tag-a"))["status"] == "complete"
    assert "going on from the checkpoint" in (member(root, "tag-a") / "fmexp.log").read_text()
    assert {tag: files(member(root, f"tag-{tag}")) for tag in "bc"} == before


def test_fail_fast_cancels_what_has_not_begun(tmp_path: Path, gate: Gate) -> None:
    root = tmp_path / "sweep"
    words = (*OWN, "+model.batch_fails=a", "+model.tag=a,b,c,d", "sweep.fail_fast=true", *SLURM)
    first = Sweep(root, *words, **gate.environ)
    last = jobs(first)["d"]  # waits until two of the others have ended
    gate.until_waiting(first, 1)
    until(lambda: last not in slurm._queue(), "the end of the job that has not begun", first)
    gate.open()
    assert first.wait() == 1
    assert result(member(root, "tag-a"))["status"] == "failed"
    assert result(member(root, "tag-b"))["status"] == "complete"
    assert not list(root.glob("*_tag-d"))
