"""Sweeps that several tests look at, each executed once."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from program import Finished

from fmexp.sweep.__main__ import main as sweep_main

pytest.register_assert_rewrite("sweep_tools")

from sweep_tools import GRID, SMALL, THREADS, Gate, Sweep  # noqa: E402


@pytest.fixture(autouse=True)
def no_sweep_is_left() -> Iterator[None]:
    """After a test that failed, end what it had started."""
    yield
    while Sweep.started:
        Sweep.started.pop().kill()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Call what `python -m fmexp.sweep` executes, in this process."""

    def call(*words: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
        status, said = 0, ""
        try:
            sweep_main()
        except SystemExit as left:
            status, said = (left.code, "") if isinstance(left.code, int) else (1, str(left.code))
        out, err = capsys.readouterr()
        return Finished(status, out, err + said)

    return call


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
