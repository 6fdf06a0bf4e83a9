"""A run that was killed and resumed equals, to the bit, the one that was not."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import reliability_parts
import torch
from reliability_tools import BARE, NO_STAGES, RICH, Driver, assert_same, left

from fmexp import rng

MODELS = {
    "lenet": ("model=lenet",),
    "mlp": ("model=mlp", "model.hidden=[32]", "model.dropout=0.2"),
    "noisy": ("model=lenet", "model._target_=reliability_parts.Noisy"),
}
OPTIMIZERS = {"sgd": ("optimizer=sgd", "optimizer.momentum=0.9"), "adam": ("optimizer=adam",)}
CHAIN = ("augment=chain", "augment.order=[crop_flip,mixup,random_erasing]")
DATA = {
    "memory": (),
    "workers": (*CHAIN, "dataset._target_=reliability_parts.augmented", "train.num_workers=2", "train.epochs=1"),
    "mixed": CHAIN,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_killed_between_checkpoints(
    driver: Driver, truth: Callable[..., Path], tmp_path: Path, model: str, optimizer: str, data: str
) -> None:
    args = (*NO_STAGES, *MODELS[model], *OPTIMIZERS[optimizer], *DATA[data])
    assert_killed_twice_is_the_same(driver, truth, tmp_path / "run", args)


def test_a_scheduler_inside_an_optimizer(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    scheduled = ("optimizer=custom", "optimizer._target_=reliability_parts.Scheduled", "optimizer.lr=0.01")
    assert_killed_twice_is_the_same(driver, truth, tmp_path / "run", (*BARE, *scheduled))


def test_frozen_layers_and_groups_of_parameters(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    groups = ("optimizer=adamw", "optimizer.no_decay=[norm,bias]", "optimizer.layer_decay=0.5")
    args = (*NO_STAGES, *MODELS["noisy"], *groups, "train.freeze=[body.0,body.1]")
    assert_killed_twice_is_the_same(driver, truth, tmp_path / "run", args)


LEARNING = ("stage.learning.enabled=true", "stage.learning.histograms=true", "stage.profile.enabled=true",
            "stage.profile.steps=1")  # fmt: skip


@pytest.mark.parametrize("when", ["log", "end"])
def test_the_last_update_and_a_trace(driver: Driver, truth: Callable[..., Path], tmp_path: Path, when: str) -> None:
    """Points at 4, 8, 12, of the updates at 3, 6, 9, which were made before the checkpoints that they follow; or of
    the last one, made by another process. Killed while the trace is written, too."""
    folder = tmp_path / "run"
    args = (
        *NO_STAGES,
        *MODELS["noisy"],
        *LEARNING,
        "train.accumulate=3",
        "optimizer=adamw",
        f"stage.learning.when={when}",
    )
    points = (
        {"match": "within .trace.json.gz.part"},
        {"match": r"rename .trace.json.gz.part$"},
        {"steps": 3, "match": "batch half trained"},
        {"steps": 6, "match": "batch trained"},
        {"match": "open .model.pt.part"},
    )
    for point in points:
        assert driver.run(*args, f"hydra.run.dir={folder}", plan=[{"do": "KILL", **point}]).code == -9, point
    ended = driver.run(*args, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    tags = {tag for _, tag, _ in left(folder)["events"]}
    assert {"weights_update_ratio/body.0", "weights_grad_histogram/body.5.weight", "profile/text_summary"} <= tags
    assert_same(folder, truth(*args), but="profile/text_summary")  # which has times
    json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))


def assert_killed_twice_is_the_same(
    driver: Driver, truth: Callable[..., Path], folder: Path, args: tuple[str, ...]
) -> None:
    for steps in (5, 6):  # after the batches 5 and 9, for it goes on from 3
        plan = [{"steps": steps, "match": "batch trained", "do": "KILL"}]
        assert driver.run(*args, f"hydra.run.dir={folder}", plan=plan).code == -9
    ended = driver.run(*args, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    assert "going on from the checkpoint at step 6" in ended.output
    assert_same(folder, truth(*args))


def test_everything_that_is_written(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = (*RICH, *CHAIN, "stage.image_grid.augmented=true")
    for steps in (1, 5, 7, 12, 13):
        plan = [{"steps": steps, "match": "batch trained", "do": "KILL"}]
        ended = driver.run(*args, f"hydra.run.dir={folder}", plan=plan)
        assert ended.code == -9
        assert "Embedding dir exists" not in ended.output  # SummaryWriter's word for one that is there twice
    plan = [{"match": "open .model.pt.part", "do": "KILL"}]  # so that the last process trains no batch
    assert driver.run(*args, f"hydra.run.dir={folder}", plan=plan).code == -9
    ended = driver.run(*args, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    assert_same(folder, truth(*args))


def test_looking_at_the_size_of_the_images_draws_nothing() -> None:
    dataset = reliability_parts.augmented(train_size=8, test_size=8)
    before = rng.get_state()
    assert dataset.input_shape == (1, 28, 28)
    after = rng.get_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"]["state"]["key"], after["numpy"]["state"]["key"])
    assert before["numpy"]["state"]["pos"] == after["numpy"]["state"]["pos"]


@pytest.mark.slow
def test_compiled(driver: Driver, tmp_path: Path) -> None:
    """A compiled step, with a last batch of another size, which it may be compiled for again."""
    args, folder = (*NO_STAGES, *MODELS["mlp"], "train.compile=true", "dataset.train_size=66"), tmp_path / "run"
    for steps in (5, 16):
        plan = [{"steps": steps, "match": "batch trained", "do": "KILL"}]
        assert driver.run(*args, f"hydra.run.dir={folder}", plan=plan, layers=False).code == -9
    for folder in (tmp_path / "truth", tmp_path / "run"):
        ended = driver.run(*args, f"hydra.run.dir={folder}")
        assert ended.code == 0, ended.output
        assert left(folder)["result"]["backend"]["compiled"], ended.output
    assert_same(folder, tmp_path / "truth")
