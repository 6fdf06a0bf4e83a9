"""What the tests share: short runs on small drawn data, and reading back what they wrote."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmexp import compose, execute

SMALL = ("dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "train.log_every=4", "device=cpu")


def small(*overrides: str) -> DictConfig:
    """A configuration of 16 batches on drawn data; every stage's failure ends the run."""
    cfg = compose([*SMALL, *overrides])
    for stage in cfg.stage.values():
        stage.required = True
    return cfg


def read_events(folder: Path) -> EventAccumulator:
    """All that a run wrote for TensorBoard, nothing sampled away."""
    everything = {"scalars": 0, "images": 0, "tensors": 0, "graph": True}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


@pytest.fixture
def run_small(tmp_path: Path) -> Callable[..., tuple[Path, EventAccumulator]]:
    """Execute a small run with some overrides; returns its folder and its events."""

    def run(*overrides: str, name: str = "run") -> tuple[Path, EventAccumulator]:
        execute(small(*overrides), tmp_path / name)
        return tmp_path / name, read_events(tmp_path / name)

    return run


@pytest.fixture(scope="session")
def fashion_mnist_root() -> str:
    """The folder of the real Fashion-MNIST."""
    root = os.environ.get("FMEXP_DATA", "")
    if not (Path(root) / "FashionMNIST" / "raw").is_dir():
        pytest.skip("needs the real Fashion-MNIST: set FMEXP_DATA to a folder with FashionMNIST/raw")
    return root


def scalars(accumulator: Any, tag: str) -> list[tuple[int, float]]:
    """The (step, value) of every point of a scalar."""
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]
