"""A folder holds one run, of one configuration, written by one process; what is done is not done again."""

import json
import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from program import alive, until
from reliability_tools import BARE, NO_STAGES, RICH, Driver, all_events, assert_same, left, listing

import fmexp
from fmexp import config

WAITS = ("model=lenet", "model._target_=reliability_parts.Waits")
WORKERS = ("dataset._target_=reliability_parts.augmented", "train.num_workers=2")
KILLED = [{"steps": 8, "match": "batch trained", "do": "KILL"}]


@pytest.mark.parametrize("data", [(), WORKERS], ids=["memory", "workers"])
def test_one_process_and_a_lock_that_dies_with_it(
    driver: Driver, other_driver: Driver, tmp_path: Path, data: tuple[str, ...]
) -> None:
    args = (*NO_STAGES, *WAITS, *data, f"hydra.run.dir={tmp_path / 'run'}")
    waiting = tmp_path / "waiting"
    pid = driver.start(*args, RELIABILITY_WAITING=str(waiting))
    until(lambda: waiting.exists() or not alive(pid), "the fourth batch is not begun")
    before = listing(tmp_path / "run")
    for cli in (False, True):
        refused = other_driver.run(*args, cli=cli)
        assert refused.code == 1
        assert f"process {pid} on {socket.gethostname()} is running in this folder" in refused.output
        assert "Traceback" not in refused.output
        assert listing(tmp_path / "run") == before
    os.kill(pid, signal.SIGKILL)
    assert driver.wait(pid).code == -signal.SIGKILL
    goes_on = other_driver.run(*args)
    assert goes_on.code == 0, goes_on.output
    assert "going on from the checkpoint at step 3" in goes_on.output


@pytest.fixture(scope="module")
def stopped(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert driver.run(*BARE, f"hydra.run.dir={folder}", plan=KILLED, cli=True).code == -9
    return folder


@pytest.mark.parametrize("state", ["stopped", "complete"])
@pytest.mark.parametrize("cli", [False, True])
def test_another_configuration_is_refused(
    driver: Driver, truth: Callable[..., Path], stopped: Path, state: str, cli: bool
) -> None:
    folder = stopped if state == "stopped" else truth("cli", *BARE)
    before = listing(folder)
    others = ("seed=1", "optimizer.lr=0.5", "train.log_every=5", "+stage.own={_target_: x.y, when:end}")
    ended = driver.run(*BARE, *others, f"hydra.run.dir={folder}", cli=cli)
    assert ended.code == 1
    assert "holds a run of another configuration" in ended.output
    for line in ("optimizer.lr: 0.001, now 0.5", "seed: 0, now 1", "stage.own.when: not there, now end",
                 "train.log_every: 4, now 5"):  # fmt: skip
        assert f"  {line}\n" in ended.output
    assert "train.epochs" not in ended.output.partition("holds a run")[2]
    assert "Traceback" not in ended.output
    assert listing(folder) == before


@pytest.mark.parametrize("state", ["stopped", "complete"])
def test_no_resume_is_refused(driver: Driver, truth: Callable[..., Path], stopped: Path, state: str) -> None:
    folder = stopped if state == "stopped" else truth("cli", *BARE)
    before = listing(folder)
    ended = driver.run(*BARE, "resume=false", f"hydra.run.dir={folder}", cli=True)
    assert ended.code == 1
    assert f"resume=false: {folder} holds a run already" in ended.output
    assert listing(folder) == before


def test_checkpoints_know_their_configuration(driver: Driver, tmp_path: Path) -> None:
    """.hydra/ may be lost; the run is still not taken for another one, nor written into."""
    folder = tmp_path / "run"
    driver.run(*BARE, f"hydra.run.dir={folder}", plan=KILLED)
    (folder / ".hydra" / "config.yaml").unlink()
    before = listing(folder, ".lock.owner")
    ended = driver.run(*BARE, "seed=1", f"hydra.run.dir={folder}")
    assert ended.code == 1
    assert "  seed: 0, now 1\n" in ended.output
    assert listing(folder, ".lock.owner") == before
    assert "going on from the checkpoint at step 6" in driver.run(*BARE, f"hydra.run.dir={folder}").output


@pytest.mark.parametrize("content", ["{", "", "- 1", "a: b: c", "\x00"])
def test_a_damaged_config_is_told(driver: Driver, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "run"
    driver.run(*BARE, f"hydra.run.dir={folder}", plan=KILLED)
    (folder / ".hydra" / "config.yaml").write_text(content)
    before = listing(folder)
    ended = driver.run(*BARE, f"hydra.run.dir={folder}")
    assert ended.code == 1
    assert "config.yaml" in ended.output or "another configuration" in ended.output
    assert "Traceback" not in ended.output
    assert listing(folder) == before


def test_a_complete_run_is_not_run_again(driver: Driver, truth: Callable[..., Path]) -> None:
    folder = truth("cli", *BARE)
    before = listing(folder)
    ended = driver.run(*BARE, f"hydra.run.dir={folder}", cli=True, trace=folder.parent / "again.txt")
    assert ended.code == 0
    assert "is complete already; nothing is trained" in ended.output
    assert listing(folder) == before
    assert "batch" not in (folder.parent / "again.txt").read_text()
    objective = json.loads((folder / "result.json").read_text())["objective"]
    assert fmexp.execute(fmexp.compose(BARE), folder) == objective


FREE = {
    "resume": None,  # it decides whether there is a second time, and is checked above
    "tags": "[other]",
    "note": "'another one'",
    "weights_strict": "true",  # of the weights that a run begins from, and not of one that goes on
    "device": "auto",
    "train.num_workers": "1",
    "train.checkpoint_every": "5",
    "train.keep_checkpoint": None,  # whether a file stays: test_train_further.py
    "logging.max_queue": "1",
    "logging.flush_secs": "1",
    # Where the same files come from; each is checked against its checksum.
    "dataset.root": None,
    "dataset.download": None,
    "dataset.mirrors": None,
    # Where decoded pictures are kept: tests/datasets/test_image_folder.py.
    "dataset.cache": None,
    "dataset.cache_dir": None,
    # Of the sweep, not of its members.
    "sweep.fail_fast": "true",
    "sweep.dry_run": None,
}


def test_each_key_left_out_of_the_digest_is_proven() -> None:
    assert set(FREE) == set(config.NOT_IN_DIGEST)


def test_keys_left_out_of_the_digest_change_nothing(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    args, folder = (*RICH, *WORKERS, "train.epochs=1"), tmp_path / "run"
    driver.run(*args, f"hydra.run.dir={folder}", plan=KILLED)
    others = [f"{key}={value}" for key, value in FREE.items() if value]
    ended = driver.run(*args, *others, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    assert "going on from the checkpoint at step 6" in ended.output
    assert_same(folder, truth(*args))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_same(
    driver: Driver, truth: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    args = (*BARE, *WORKERS, "train.epochs=1")
    assert driver.run(*args, f"train.num_workers={workers}", f"hydra.run.dir={tmp_path / 'run'}").code == 0
    mine, its = left(tmp_path / "run"), left(truth(*args))
    assert mine["model"] == its["model"]
    assert mine["result"]["metrics"] == its["result"]["metrics"]


def test_diverged(driver: Driver, tmp_path: Path) -> None:
    args = (*NO_STAGES, "model=lenet", "model._target_=reliability_parts.Explodes", "train.log_every=100")
    folders = {}
    # Whenever a checkpoint would be written: what is found, and what is written, is the same.
    for name, more in {"3": (), "1": ("train.checkpoint_every=1",), "null": ("train.checkpoint_every=null",)}.items():
        folder = folders[name] = tmp_path / name
        ended = driver.run(*args, *more, f"hydra.run.dir={folder}")
        assert ended.code == 0
        assert "the run diverged: the loss is nan at step 11" in ended.output
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["objective"], result["steps"]) == ("diverged", None, 11)
        assert not (folder / "model.pt").exists()
        assert not list(folder.glob("checkpoint*"))
    killed = tmp_path / "killed"
    plan = [{"steps": 11, "match": "batch trained", "do": "KILL"}]
    assert driver.run(*args, f"hydra.run.dir={killed}", plan=plan).code == -9
    assert driver.run(*args, f"hydra.run.dir={killed}").code == 0
    for folder in (killed, folders["1"], folders["null"]):
        mine, its = left(folder), left(folders["3"])
        mine["events"] = [event for event in mine["events"] if not event[1].startswith("config")]
        its["events"] = [event for event in its["events"] if not event[1].startswith("config")]
        assert mine == its
    before = listing(folders["3"])
    assert "is diverged already; nothing is trained" in driver.run(*args, f"hydra.run.dir={folders['3']}").output
    assert listing(folders["3"]) == before


def test_diverged_returns_nan(tmp_path: Path) -> None:
    cfg = fmexp.compose([*BARE, "optimizer.lr=1e30", "train.epochs=1"])
    for _ in range(2):
        assert math.isnan(fmexp.execute(cfg, tmp_path))


def test_what_is_not_ours_is_left_alone(driver: Driver, tmp_path: Path) -> None:
    """A folder of runs, or of another program's events, may be named by mistake."""
    inner = tmp_path / "1" / "00000" / "default"
    inner.mkdir(parents=True)
    (inner / "tensors.tsv").write_text("of a run below")
    (tmp_path / "00000" / "mine").mkdir(parents=True)
    (tmp_path / "00000" / "mine" / "tensors.tsv").write_text("of another program")
    (tmp_path / "events.out.tfevents.1.host.1.0").write_bytes(b"of another program")
    (tmp_path / ".mine.part").write_text("of another program")
    before = listing(tmp_path)
    assert driver.run(*BARE, f"hydra.run.dir={tmp_path}", plan=KILLED).code == -9
    assert before.items() <= listing(tmp_path).items()
    assert driver.run(*BARE, f"hydra.run.dir={tmp_path}").code == 0
    assert (inner / "tensors.tsv").exists()


def test_a_metric_that_is_no_plain_number(driver: Driver, tmp_path: Path) -> None:
    """A NumPy number, or one that is not finite, must not make a checkpoint or the result unreadable."""
    stage = "+stage.own={_target_: reliability_parts.bad_metric, when:log, required: true, value: VALUE}"
    for value in ("'1.5'", "'nan'"):
        folder = tmp_path / value
        args = (*BARE, stage.replace("VALUE", value), f"hydra.run.dir={folder}")
        driver.run(*args, plan=KILLED)
        ended = driver.run(*args)
        assert ended.code == 0, ended.output
        assert "going on from the checkpoint at step 6" in ended.output
    metrics = [json.loads((tmp_path / value / "result.json").read_text())["metrics"] for value in ("'1.5'", "'nan'")]
    assert [metric["own/metric"] for metric in metrics] == [1.5, None]


def test_a_clock_that_was_set_back(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    driver.run(*BARE, f"hydra.run.dir={folder}", plan=KILLED)
    assert driver.run(*BARE, f"hydra.run.dir={folder}", RELIABILITY_CLOCK="-86400").code == 0
    assert_same(folder, truth(*BARE))
    steps = [event.step for event in all_events(folder) for value in event.summary.value if value.tag == "train/loss"]
    assert steps == sorted(set(steps))


def test_no_wait_for_the_dead(driver: Driver, tmp_path: Path) -> None:
    """The owner that a dead process left behind names a process that may be any other by now."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".lock.owner").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert driver.run(*BARE, f"hydra.run.dir={folder}").code == 0
