"""What the tests share: fixtures for short runs and for the real data."""

import os
from collections.abc import Callable
from pathlib import Path

# The tests are many short runs, as many at once as there are cores: one thread each, here and in all that they start.
# It has to be said before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tools import read_events, small

from fmexp import execute

# The same cases each time, and none is red because the machine is busy.
settings.register_profile("fmexp", derandomize=True, deadline=None)
settings.load_profile("fmexp")


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
