"""Members that several processes train: killed, stopped, and gone on with."""

import errno
import os
import re
import signal
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from program import alive, call, slurm_answers
from several import fmexp
from sweep_tools import CHECKOUT, HERE, OWN, SMALL, Gate, Sweep, member, members, until
from test_slurm import jobs, put_back_at_once
from tools import read_events, result, scalars

from fmexp import process, sweep
from fmexp.errors import FmexpError
from fmexp.sweep import launcher, slurm
from fmexp.sweep import processes as local
from fmexp.sweep.job import ONE_KILLED, Job
from fmexp.sweep.progress import Progress

WORDS = (*OWN, "dataset.train_size=160")  # 80 batches
LOCAL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.processes=2")
TASKS = "hydra.launcher.slurm.tasks_per_node"
# Python imports it when it starts: it kills the second process of a member, whoever has started it.
DIES = """
import os, pathlib, signal
def spawned(pid):
    return "spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
if os.environ.get("SLURM_PROCID") == "1" or spawned(os.getpid()) and spawned(os.getppid()):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The member a as a run of its own, started by torchrun."""
    folder = tmp_path_factory.mktemp("several") / "run"
    ended = fmexp(*WORDS, "+model.tag=a", f"hydra.run.dir={folder}", cwd=folder.parent, PYTHONPATH=f"{HERE}")
    assert ended.status == 0, ended.err
    return folder


def assert_same(folder: Path, truth: Path) -> None:
    """To the bit: weights, result, and all scalars, which are all that `logging=light` writes, but for the time."""
    assert (folder / "model.pt").read_bytes() == (truth / "model.pt").read_bytes()
    ours, theirs = read_events(folder), read_events(truth)
    tags = theirs.Tags()["scalars"]
    assert ours.Tags()["scalars"] == tags
    for tag in set(tags) - {"wall_seconds"}:
        assert scalars(ours, tag) == scalars(theirs, tag), tag
    for key in ("status", "objective", "metrics", "steps", "config_digest", "backend"):
        assert result(folder)[key] == result(truth)[key], key


def processes(gate: Gate, started: Sweep, count: int) -> dict[str, int]:
    """The processes that the gate holds up, by tag and rank: a0, a1 and so on."""

    def found() -> dict[str, int]:
        ranks = {file: file.read_text() for file in gate.folder.glob("*.*")}  # empty while it is written once more
        return {f"{file.stem}{rank}": int(file.suffix[1:]) for file, rank in ranks.items() if rank}

    pids: dict[str, int] = until(lambda: len(pids := found()) >= count and pids, f"{count} processes", started)
    return pids


def test_cores_and_gpus_are_divided_among_the_processes_of_all_members(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[tuple[int, int]] = []

    def note(jobs: list[Job], workers: int, progress: Progress, *, processes: int, fail_fast: bool) -> None:
        given.append((workers, processes))

    monkeypatch.setattr(sweep.processes, "run", note)
    for module in (launcher, sweep.processes):
        monkeypatch.setattr(module, "available_cores", lambda: 9)
    words = ("-m", *SMALL, "seed=range(8)", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    for options in ("n_jobs=-1", "n_jobs=1", "n_jobs=3"):
        said = call(*words, "hydra.launcher.processes=4", f"hydra.launcher.{options}", cwd=tmp_path)
        assert ("12 processes at the same time share 9 cores" in said.out) == (options == "n_jobs=3"), said
    assert given == [(2, 4), (1, 4), (3, 4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert sweep.processes._environment(1, 2, 4) == {
        "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert sweep.processes._environment(1, 2, 4)["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert sweep.processes._environment(1, 2, 1)["CUDA_VISIBLE_DEVICES"] == "6"


def test_a_task_of_slurm_follows_as_one_of_torchrun_and_keeps_to_its_cores_and_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3",
             "MASTER_ADDR": "of the shell", "CUDA_VISIBLE_DEVICES": "5,6,7"}  # fmt: skip
    expected = {"RANK": "4", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "n1",
                "CUDA_VISIBLE_DEVICES": "5,6,7", "OMP_NUM_THREADS": "3"}  # fmt: skip
    found: list[tuple[dict[str, str], int]] = []

    def follow() -> None:
        found.append(({name: os.environ[name] for name in expected}, process.available_cores()))

    monkeypatch.setattr(slurm, "follow", follow)
    monkeypatch.setattr(process, "own_cores", 0)
    with mock.patch.dict(os.environ, given):
        os.environ.pop("OMP_NUM_THREADS", None)
        slurm.SlurmJob()(mock.Mock())
    assert found == [(expected, 3)]


@pytest.mark.slow
def test_a_process_that_is_killed_before_the_run_begins_costs_the_member(tmp_path: Path) -> None:
    root, words = tmp_path / "sweep", (*SMALL, "hydra.launcher.processes=2", "seed=1,2")
    ended = Sweep(root, *words, PYTHONPATH=dying(tmp_path))
    assert ended.wait() == 1
    assert [result(path)["error"] for path in members(root)] == [ONE_KILLED] * 2


@pytest.mark.slow
def test_an_error_in_the_first_process_ends_the_others_which_wait_for_it(tmp_path: Path) -> None:
    stage = ("_target_=sweep_parts.fails", "when=epoch", "required=true", "changes=true")  # whose changes are exchanged
    words = (*SMALL, "hydra.launcher.processes=2", "seed=1,2", *(f"+stage.fails.{word}" for word in stage))
    ended = Sweep(tmp_path / "sweep", *words)
    assert ended.wait() == 1
    for path in members(tmp_path / "sweep"):
        assert "this stage fails" in result(path)["error"]


def test_a_process_that_cannot_be_started_ends_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # which is put back
    first, second, context = mock.Mock(exitcode=0), mock.Mock(exitcode=0), mock.Mock()
    second.start.side_effect = OSError(errno.EAGAIN, "no more processes")
    context.Process.side_effect = [first, second]
    monkeypatch.setattr(local.multiprocessing, "get_context", lambda how: context)
    said = pytest.raises(FmexpError, match="one of its 3 processes cannot be started: no more processes")
    with said, local._followers(2):
        pass
    first.kill.assert_called_once_with()
    second.kill.assert_not_called()


def dying(folder: Path) -> str:
    """A PYTHONPATH with which the second process of a member dies at its start."""
    (folder / "sitecustomize.py").write_text(DIES)
    return os.pathsep.join(map(str, (folder, CHECKOUT, HERE)))


@pytest.mark.slow
def test_members_whose_processes_are_killed_or_stopped_go_on_with_the_bits_of_torchrun(
    tmp_path: Path, gate: Gate, truth: Path
) -> None:
    root, words = tmp_path / "sweep", (*WORDS, "+model.tag=a,b", *LOCAL)
    first = Sweep(root, *words, **gate.environ)
    pids = processes(gate, first, 4)
    until(lambda: all((member(root, f"tag-{t}") / "checkpoint.pt").exists() for t in "ab"), "checkpoints", first)
    kill_one(first, pids, "a", 1)
    assert alive(pids["b0"])
    assert alive(pids["b1"]), "it costs that member alone"
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert not any(map(alive, pids.values()))
    assert [m.status for m in sweep.read(root)] == ["failed", "interrupted"]
    assert (member(root, "tag-b") / "fmexp.log").read_text().count("stopped by SIGTERM") == 1

    gate.forget()
    second = Sweep(root, *words, **gate.environ)
    pids = processes(gate, second, 4)
    kill_one(second, pids, "b", 0)
    second.kill()
    until(lambda: not any(map(alive, pids.values())), "the end of what the sweep had started")

    third = Sweep(root, *words).end()
    assert "(0 to train, 2 to resume, 0 to skip)" in third.output
    for tag in "ab":
        assert (member(root, f"tag-{tag}") / "model.pt").read_bytes() == (truth / "model.pt").read_bytes()
    assert_same(member(root, "tag-a"), truth)
    for ended in (first, second, third):
        assert not re.search("Traceback|c10|gloo", ended.output), ended.output


def kill_one(started: Sweep, pids: dict[str, int], tag: str, rank: int) -> None:
    """SIGKILL one process of a member; the sweep says so, and the other ends."""
    os.kill(pids[f"{tag}{rank}"], signal.SIGKILL)
    said = f"_tag-{tag}  failed: one of its processes was killed, or ran out of memory"
    until(lambda: said in started.output, "word of the kill", started)
    until(lambda: not alive(pids[f"{tag}{1 - rank}"]), "the end of the other process")


@pytest.mark.slow
@pytest.mark.skipif(not slurm_answers(), reason="needs a Slurm that answers to sinfo and takes jobs by sbatch")
def test_a_single_run_by_slurm_on_two_tasks_is_failed_by_a_task_that_dies_and_put_back_once_at_a_signal(
    tmp_path: Path, gate: Gate, truth: Path
) -> None:
    root, words = tmp_path / "sweep", (*WORDS, "+model.tag=a", "hydra/launcher=slurm", f"{TASKS}=2")
    first = Sweep(root, *words, PYTHONPATH=dying(tmp_path))
    assert first.wait() == 1
    (folder,) = members(root)
    assert result(folder)["error"] == f"its Slurm job {job(first)} ended without a result (see {root / slurm.FOLDER})"

    second = Sweep(root, *words, **gate.environ)
    processes(gate, second, 2)
    subprocess.run(["scancel", "--signal=USR2", job(second)], check=True)  # as Slurm warns that time is running out
    put_back_at_once(job(second), gate, "a", second, tasks=2)
    gate.open()
    second.end()
    assert (folder / "fmexp.log").read_text().count("stopped by SIGUSR2") == 1
    assert "".join(path.read_text() for path in root.glob(f"{slurm.FOLDER}/*/*_log.out")).count(") - Requeued job") == 1
    assert_same(folder, truth)


def job(started: Sweep) -> str:
    """The Slurm job of a sweep's one member."""
    (number,) = jobs(started).values()
    return number
