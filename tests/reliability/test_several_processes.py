"""A run of several processes: stopped, killed, wrongly typed, and gone on with."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from reliability_tools import all_events, assert_same, left
from several import DRAWN, execute_all, fmexp, torchrun
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fmexp.rundir import checkpoint

# 18 batches, of which each ninth is one image; attention draws random numbers that nobody draws for the whole batch.
STRUCK = (*DRAWN, "model._target_=distributed_parts.Struck", "train.epochs=2", "train.checkpoint_every=3",
          "stage.predictions.enabled=true", "train.ema=0.9", "augment=mixup")  # fmt: skip
BATCHES = 18
OWN = ("model=resnet18", "train.sync_batchnorm=false", "hydra.run.dir=run")
LOST = "Another process of this run has ended"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The folder of the run that nothing happened to, executed when it is first asked for."""
    known: list[Path] = []

    def run() -> Path:
        if not known:
            folder = tmp_path_factory.mktemp("several") / "run"
            ended = fmexp(*STRUCK, f"hydra.run.dir={folder}", cwd=folder.parent)
            assert ended.status == 0, ended.err
            known.append(folder)
        return known[0]

    return run


def test_one_folder_and_one_log(undisturbed: Callable[[], Path]) -> None:
    """The first process alone writes; the number of processes is in the folder."""
    folder = undisturbed()
    assert len([*folder.glob("events.*")]) == 1
    said = (folder / "fmexp.log").read_text()
    assert said.count("epoch 2: test accuracy") == 1
    assert f"{BATCHES} batches of 8, cpu, 1 thread, oneDNN kernels, 2 processes" in " ".join(said.split())
    assert json.loads((folder / "result.json").read_text())["backend"]["processes"] == 2
    values = [value for event in all_events(folder) for value in event.summary.value]
    (row,) = [value.metadata.plugin_data.content for value in values if value.tag == "_hparams_/session_start_info"]
    assert HParamsPluginData.FromString(row).session_start_info.hparams["processes"].number_value == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_batch(
    undisturbed: Callable[[], Path], tmp_path: Path, rank: int
) -> None:
    where = f"hydra.run.dir={tmp_path / 'run'}"
    ended = fmexp(*STRUCK, where, cwd=tmp_path, STRIKES=f"TERM {rank} 5")
    assert re.findall(r"stopped by SIGTERM after step (\d+)", ended.out) == ["5"], ended.out + ended.err
    assert f"torchrun --nproc-per-node=2 -m fmexp {DRAWN[0]}" in ended.out
    assert LOST not in ended.out + ended.err
    state = checkpoint.load(tmp_path / "run")
    assert state is not None
    assert state["step"] == 5
    ended = fmexp(*STRUCK, where, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert "going on from the checkpoint at step 5" in ended.out
    assert_same(tmp_path / "run", undisturbed())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_words(
    undisturbed: Callable[[], Path], tmp_path: Path, rank: int
) -> None:
    where = f"hydra.run.dir={tmp_path / 'run'}"
    ended = fmexp(*STRUCK, where, cwd=tmp_path, STRIKES=f"KILL {rank} 8")
    assert ended.status == 1
    said = ended.out if rank else ended.err
    assert said.count(LOST) == 1, ended.out + ended.err
    assert "go on with\n  torchrun --nproc-per-node=2 -m fmexp" in said
    assert "gloo" not in ended.out + ended.err
    assert not (tmp_path / "run" / "result.json").exists()
    ended = fmexp(*STRUCK, where, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert "going on from the checkpoint at step 6" in ended.out
    assert_same(tmp_path / "run", undisturbed())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("most", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.nightly)])
def test_random_kills(undisturbed: Callable[[], Path], tmp_path: Path, most: int) -> None:
    """Of a random process in a random batch; a run that comes to its end is compared, and the next begun."""
    seed = int(os.environ.get("RELIABILITY_SEED") or random.SystemRandom().randrange(2**32))
    print(f"RELIABILITY_SEED={seed}")
    chosen = random.Random(seed)
    kills, runs = 0, 1
    while kills < most:
        where = f"hydra.run.dir={tmp_path / f'run{runs}'}"
        strikes = f"KILL {chosen.randrange(2)} {chosen.randint(1, BATCHES - 2)}"
        ended = fmexp(*STRUCK, where, cwd=tmp_path, STRIKES=strikes)
        if ended.status:
            kills += 1
            assert LOST in ended.out + ended.err
        else:
            assert_same(tmp_path / f"run{runs}", undisturbed())
            runs += 1
    ended = fmexp(*STRUCK, f"hydra.run.dir={tmp_path / f'run{runs}'}", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert_same(tmp_path / f"run{runs}", undisturbed())
    print(f"{kills} kills survived by {runs} runs")


def test_another_number_of_processes_goes_on_with_a_warning(tmp_path: Path) -> None:
    where = f"hydra.run.dir={tmp_path / 'run'}"
    fmexp(*STRUCK, where, cwd=tmp_path, STRIKES="INT 1 5")
    ended = fmexp(*STRUCK, where, cwd=tmp_path, processes=1)
    assert ended.status == 0, ended.err
    assert "the last bits may differ: processes: 2, now 1" in " ".join(ended.out.split())
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == BATCHES


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    cases = {
        ("--multirun", "seed=1,2"): "--multirun under torchrun would start the sweep in each process",
        ("optimizer.lrr=1",): "There is no key optimizer.lrr",
        (*DRAWN, "train.batch_size=1", "hydra.run.dir=run"): "fewer images than the 2 processes that divide it",
        (*DRAWN, *OWN, "dataset.train_size=67"): "of which with train.sync_batchnorm=false one of 2 processes has one",
        (*DRAWN, "model=mlp", "model.hidden=[0]", "hydra.run.dir=run"): "model.hidden",
    }
    for words, message in cases.items():
        ended = fmexp(*words, cwd=tmp_path)
        assert ended.status == 1
        assert ended.err.count(message) == 1, ended.err
        assert "fmexp/" not in ended.err.replace("/fmexp/tests", ""), ended.err
        assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("program", ["fmexp.evaluate", "fmexp.predict"])
def test_what_one_process_does_is_refused_by_one_line(program: str, tmp_path: Path) -> None:
    ended = torchrun("-m", program, "run", "picture.png", cwd=tmp_path)
    assert ended.status == 1
    assert ended.out == ""
    said = f"{program} is not divided among processes: start it without torchrun.\n"
    assert ended.err.startswith(said), ended.err
    assert ended.err.count(said) == 1
    assert [*tmp_path.iterdir()] == []


def test_help_and_version_are_printed_once(tmp_path: Path) -> None:
    ended = fmexp("--version", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert re.fullmatch(r"fmexp [\d.]+ \(hydra-core .*\)\n", ended.out)


def test_what_another_process_cannot_do_the_first_one_says(tmp_path: Path) -> None:
    """An image that is in the second process's part of the second batch."""
    loaded = [*DRAWN, "dataset._target_=distributed_parts.loaded", "train.num_workers=0", "+dataset.broken=19"]
    ended = fmexp(*loaded, "model=mlp", "hydra.run.dir=run", cwd=tmp_path)
    assert ended.status == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"] == "Process 1 of 2: dataset: training image 19 cannot be read: the disk has a scratch"
    assert ended.err.count(result["error"]) == 1, ended.err
    assert "Traceback" not in ended.err.partition("torch/distributed")[0]


def test_a_run_that_diverges_ends_in_all(tmp_path: Path) -> None:
    ended = fmexp(
        *DRAWN, "model=mlp", "optimizer.lr=1e30", "hydra.run.dir=run", "train.checkpoint_every=1", cwd=tmp_path
    )
    assert LOST not in ended.out + ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("diverged", 2)


def test_a_run_that_pauses_has_the_bits_of_one_that_does_not(tmp_path: Path) -> None:
    """Within an epoch, there once more, and at its end; each process evaluates a part of 1040 images."""
    words = ["model=mlp", "model.dropout=0.1", "train.ema=0.9", "train.epochs=2", "dataset.test_size=1040"]
    for name, pauses in (("alone", ()), ("paused", (4, 4, 9)), ("again", (4, 9))):
        ended = execute_all({name: words}, tmp_path, pauses=pauses)
        assert ended.status == 0, ended.err
    (tmp_path / "paused" / "rungs.json").rename(tmp_path / "rungs.json")
    assert_same(tmp_path / "paused", tmp_path / "alone")
    rungs = json.loads((tmp_path / "rungs.json").read_text())
    assert rungs == json.loads((tmp_path / "again" / "rungs.json").read_text())
    recorded = {step: value for step, tag, value in left(tmp_path / "paused")["events"] if tag == "test/accuracy"}
    assert float(recorded[9]) == pytest.approx(rungs["9"]), "an epoch's end, where the run evaluates, too"
    first, second = (json.loads((tmp_path / f"again.{rank}.json").read_text()) for rank in (0, 1))
    objective = json.loads((tmp_path / "again" / "result.json").read_text())["objective"]
    assert first == second == [*rungs.values(), objective]
