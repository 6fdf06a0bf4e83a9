"""A complete run that is given more epochs becomes the run of that length, to the bit, or is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reliability_tools import BARE, NO_STAGES, RICH, Driver, assert_same, left

from fmexp import compose, execute
from fmexp.engine import backend
from fmexp.errors import ConfigError
from fmexp.rundir import layout

KEPT = "train.keep_checkpoint=true"
VALIDATED = ("train.validation=0.3", "objective=val/loss")
LENGTHS = {
    "stages": (*RICH, "train.log_every=7"),  # which divides no number of batches: the end has a point of its own
    "warmup": (*BARE, "schedule.warmup_epochs=0.5", "optimizer=adam"),
    "milestones": (*BARE, "schedule=step", "schedule.milestones=[1,2]"),
    "plateau": (*BARE, "schedule=plateau", "schedule.patience=0", "optimizer.lr=0.3"),
    "best": (*BARE, *VALIDATED, "optimizer.lr=0.3", "train.ema=0.9", "train.accumulate=3"),
    "patience": (*BARE, *VALIDATED, "train.patience=1", "train.min_delta=10"),  # at its end after two epochs
    "augmented": (
        *NO_STAGES,
        "model=lenet",
        "augment=mixup",
        "dataset._target_=reliability_parts.augmented",
        "train.num_workers=0",
    ),
}


@pytest.mark.parametrize("option", LENGTHS)
def test_it_equals_a_run_of_that_length(
    option: str, driver: Driver, truth: Callable[..., Path], tmp_path: Path
) -> None:
    args = (*LENGTHS[option], KEPT)
    folder = tmp_path / "run"
    for epochs in (1, 2, 4):
        assert driver.run(*args, f"train.epochs={epochs}", f"hydra.run.dir={folder}").code == 0
        assert_same(folder, truth(*args, f"train.epochs={epochs}"))
    before = left(folder)
    again = driver.run(*args, "train.epochs=4", f"hydra.run.dir={folder}")
    assert again.code == 0
    assert "complete already" in again.output
    assert left(folder) == before
    assert before["result"]["epochs"] == (2 if option == "patience" else 4)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(BARE, marks=pytest.mark.slow, id="bare"), pytest.param(RICH, marks=pytest.mark.nightly, id="rich")],
)
def test_killed_at_each_moment_of_its_beginning(
    kind: tuple[str, ...], driver: Driver, truth: Callable[..., Path], tmp_path: Path
) -> None:
    """From the first file that is touched to the first batch: the folder is the short run's, or the long one's."""
    args, longer = (*kind, KEPT), (*kind, KEPT, "train.epochs=3")
    short, trace = truth(*args), tmp_path / "trace.txt"
    shutil.copytree(short, tmp_path / "watched")
    assert driver.run(*longer, f"hydra.run.dir={tmp_path / 'watched'}", trace=trace).code == 0
    labels = [line.split("\t")[1] for line in trace.read_text().splitlines()]
    # The first of each kind: a copy of the event files has hundreds of parts, and building the run executes layers.
    moments = {re.sub(r"tfevents\S*", "", label): nth + 1 for nth, label in reversed([*enumerate(labels)])
               if "batch trained" in labels[nth:] and not label.startswith(("forward", "batch"))}  # fmt: skip
    assert {"remove result.json", "rename .events.out. to events.out. done", "remove events.out."} <= moments.keys()
    assert "rename .checkpoint.pt.part to checkpoint.pt done" in moments
    for moment, nth in moments.items():
        folder = tmp_path / f"run{nth}"
        shutil.copytree(short, folder)
        ended = driver.run(*longer, f"hydra.run.dir={folder}", plan=[{"nth": nth, "do": "KILL"}])
        assert ended.code == -9, (moment, ended.output)
        assert driver.run(*longer, f"hydra.run.dir={folder}").code == 0, moment
        assert_same(folder, truth(*longer))


def test_killed_while_it_is_trained_further(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    args, folder = (*BARE, *VALIDATED, KEPT), tmp_path / "run"
    assert driver.run(*args, "train.epochs=1", f"hydra.run.dir={folder}").code == 0
    for _ in range(3):
        plan = [{"steps": 4, "match": "batch half trained", "do": "KILL"}]
        assert driver.run(*args, "train.epochs=3", f"hydra.run.dir={folder}", plan=plan).code == -9
        assert json.loads((folder / ".hydra" / "lineage.json").read_text())
    assert driver.run(*args, "train.epochs=3", f"hydra.run.dir={folder}").code == 0
    assert_same(folder, truth(*args, "train.epochs=3"))


def test_a_stopped_run_may_have_more_epochs_too(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    args, folder = (*BARE, KEPT), tmp_path / "run"
    plan = [{"steps": 21, "match": "batch trained", "do": "KILL"}]
    assert driver.run(*args, f"hydra.run.dir={folder}", plan=plan).code == -9
    assert driver.run(*args, "train.epochs=3", f"hydra.run.dir={folder}").code == 0
    assert_same(folder, truth(*args, "train.epochs=3"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("schedule=cosine",), "the learning rate of schedule=cosine follows the length"),
        (("schedule=step", "schedule.milestones=[0.5]"), "schedule=step follows the length of the run"),
        (("train.max_steps=20",), "train.max_steps=20 has ended it within an epoch"),
        (("train.keep_checkpoint=false",), "complete after 2 epochs, and has kept no checkpoint to go on from"),
    ],
)
def test_what_cannot_go_on_is_refused_and_left_as_it_is(
    words: tuple[str, ...], said: str, driver: Driver, tmp_path: Path
) -> None:
    args, folder = (*BARE, KEPT, *words), tmp_path / "run"
    assert driver.run(*args, f"hydra.run.dir={folder}").code == 0
    before = left(folder)
    refused = driver.run(*args, "train.epochs=3", f"hydra.run.dir={folder}", cli=True)
    assert refused.code == 1
    for word in (said, str(folder), f"weights={folder}", "from the start"):
        assert word in refused.output
    assert "Traceback" not in refused.output
    assert left(folder) == before
    fewer = driver.run(*args, "train.epochs=1", f"hydra.run.dir={folder}", cli=True)
    assert "train.epochs: 2, now 1" in fewer.output


def test_without_its_event_files_it_goes_on_and_says_so(
    driver: Driver, truth: Callable[..., Path], tmp_path: Path
) -> None:
    args, folder = (*BARE, KEPT), tmp_path / "run"
    shutil.copytree(truth(*args), folder)
    for path in folder.glob("*tfevents*"):
        path.unlink()
    longer = driver.run(*args, "train.epochs=3", f"hydra.run.dir={folder}")
    assert longer.code == 0, longer.output
    assert "TensorBoard will miss its points" in longer.output
    mine, its = left(folder), left(truth(*args, "train.epochs=3"))
    assert mine["events"] == [event for event in its["events"] if event in mine["events"]]
    assert {part: mine[part] for part in ("result", "model")} == {part: its[part] for part in ("result", "model")}


@pytest.fixture
def begun(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of BARE that was to have more epochs, killed at their first batch."""
    folder = tmp_path / "run"
    shutil.copytree(truth(*BARE, KEPT), folder)
    plan = [{"nth": 1, "match": "batch trained", "do": "KILL"}]
    assert driver.run(*BARE, KEPT, "train.epochs=3", f"hydra.run.dir={folder}", plan=plan).code == -9
    return folder


def test_its_checkpoint_is_damaged_before_the_next_one(begun: Path, driver: Driver, truth: Callable[..., Path]) -> None:
    (begun / "checkpoint.pt").write_bytes(b"damaged")
    assert driver.run(*BARE, KEPT, "train.epochs=3", f"hydra.run.dir={begun}").code == 0
    assert_same(begun, truth(*BARE, KEPT, "train.epochs=3"))


def test_the_weights_of_the_shorter_run_are_not_taken_for_its_own(begun: Path, driver: Driver, tmp_path: Path) -> None:
    refused = driver.run(*BARE, KEPT, f"weights={begun}", f"hydra.run.dir={tmp_path / 'next'}", cli=True)
    assert refused.code == 1
    assert f"weights={begun} has no trained weights: it was stopped." in refused.output
    assert "Traceback" not in refused.output


EXPLODES = (*NO_STAGES, KEPT, "model=lenet", "model._target_=reliability_parts.Explodes", "dataset.train_size=40")


def test_one_that_diverges_leaves_the_weights_and_the_last_checkpoint(driver: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert driver.run(*EXPLODES, "train.epochs=1", f"hydra.run.dir={folder}").code == 0  # of ten batches
    weights, longer = (folder / "model.pt").read_bytes(), (*EXPLODES, f"hydra.run.dir={folder}")
    for _ in range(2):
        diverged = driver.run(*longer, "train.epochs=2")
        assert json.loads((folder / "result.json").read_text())["status"] == "diverged"
        assert (folder / "model.pt").read_bytes() == weights
        kept = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert (kept["step"], kept["position"]) == (10, 0)
        assert f"weights={folder}/model.pt" in (folder / "fmexp.log").read_text()
    assert "is diverged already" in diverged.output
    begun = driver.run(*EXPLODES, "train.epochs=1", f"weights={folder}/model.pt", f"hydra.run.dir={tmp_path / 'next'}")
    assert "2 of the model's 3 keys fit" not in begun.output, begun.output
    assert "3 of the model's 3 keys fit" in begun.output, begun.output


def test_one_that_has_diverged_is_not_trained_further(driver: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert driver.run(*EXPLODES, "train.epochs=2", f"hydra.run.dir={folder}", cli=True).code == 3
    before = left(folder)
    refused = driver.run(*EXPLODES, "train.epochs=3", f"hydra.run.dir={folder}", cli=True)
    assert refused.code == 1
    assert f"{folder} holds a run of fewer epochs that has diverged, at step 11" in refused.output
    assert left(folder) == before


def test_a_rung_of_the_shorter_run_is_not_taken_without_a_look_at_the_schedule(tmp_path: Path) -> None:
    words = [*BARE, KEPT, "schedule=cosine"]
    execute(compose(words), tmp_path / "run", pause_at=5)
    with pytest.raises(ConfigError, match="schedule=cosine follows the length of the run"):
        execute(compose([*words, "train.epochs=3"]), tmp_path / "run", pause_at=5)


def test_a_longer_run_that_would_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*BARE, KEPT, "train.epochs=1"]
    monkeypatch.setattr(backend, "MANY_BATCHES", 20)
    execute(compose(words), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.compile=auto compiles the step of a run of so many batches"):
        execute(compose([*words, "train.epochs=2"]), tmp_path / "run")
    assert left(tmp_path / "run")["result"]["epochs"] == 1


def test_the_lineage_has_both_commands(tmp_path: Path) -> None:
    words, folder = [*BARE, KEPT, "train.epochs=1"], tmp_path / "run"
    execute(compose(words), folder, resume_command="the first")
    execute(compose([*words, "train.epochs=2"]), folder, resume_command="the second")
    execute(compose([*words, "train.epochs=3"]), folder, resume_command="the third")
    said = json.loads((folder / "result.json").read_text())["lineage"]
    assert [said["command"], *(later["command"] for later in said["resumed_with"])] == [
        "the first", "the second", "the third",
    ]  # fmt: skip


def test_a_checkpoint_that_another_process_may_need_is_not_discarded(tmp_path: Path) -> None:
    words, folder = [*BARE, "train.keep_checkpoint=true", "train.epochs=1"], tmp_path / "run"
    objective = execute(compose(words), folder)
    unkept = compose([*words[:-2], "train.keep_checkpoint=false", "train.epochs=1"])
    with layout.lock(folder):
        assert execute(unkept, folder) == objective
        assert (folder / "checkpoint.pt").is_file()
    assert execute(unkept, folder) == objective
    assert not (folder / "checkpoint.pt").exists()
