"""Sweeps that several tests look at, each executed once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("sweep_tools")

from sweep_tools import GRID, SMALL, THREADS, Gate, Sweep  # noqa: E402


@pytest.fixture(autouse=True)
def no_sweep_is_left() -> Iterator[None]:
    """After a test that failed, end what it had started."""
    yield
    while Sweep.started:
        Sweep.started.pop().kill()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Four members, one after another: two optimizers with two learning rates."""
    return Sweep(tmp_path_factory.mktemp("grid") / "sweep", *SMALL, *THREADS, *GRID).end()


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The same four, side by side in two processes."""
    root = tmp_path_factory.mktemp("parallel") / "sweep"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    return Sweep(root, *SMALL, *THREADS, *GRID, *launcher, OMP_NUM_THREADS="8", CUDA_VISIBLE_DEVICES="7,9").end()
