"""A run and a sweep, and TensorBoard on them, for the tests that ask it over HTTP or look at it in a browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from program import TensorBoard

from fmexp import compose, datasets, execute, sweep

TUTORIAL = (
    "experiment=tutorial",
    "dataset=synthetic",
    "dataset.train_size=400",
    "dataset.test_size=200",
    "train.log_every=25",
    "stage.calibration.enabled=true",
    "stage.mistakes.enabled=true",
    "device=cpu",
)
SWEEP = ("dataset=synthetic", "dataset.train_size=200", "dataset.test_size=100", "train.log_every=10", "logging=light")


@pytest.fixture(scope="session")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `tutorial` and the sweep `sweep` of four members."""
    root = tmp_path_factory.mktemp("logdir")
    execute(compose(TUTORIAL), root / "tutorial")
    sweep.start([*SWEEP, "optimizer.lr=0.01,0.001", "optimizer=sgd,adam"], root / "sweep")
    return root


@pytest.fixture(scope="session")
def tutorial_data() -> datasets.Dataset:
    return datasets.load(compose(TUTORIAL).dataset)


@pytest.fixture(scope="session")
def members(logdir: Path) -> list[sweep.Member]:
    return sweep.read(logdir / "sweep")


@pytest.fixture(scope="session", params=["fast", "slow"])
def server(request: pytest.FixtureRequest, logdir: Path, members: list[sweep.Member]) -> Iterator[TensorBoard]:
    """TensorBoard with its fast loader and, again, with its slow one."""
    with TensorBoard(logdir, fast=request.param == "fast") as running:
        running.wait("tutorial", *(f"sweep/{member.folder.name}" for member in members))
        yield running


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorBoard]:
    """TensorBoard on a run with the stages that are off by default."""
    root = tmp_path_factory.mktemp("learnt")
    on = ("stage.learning.enabled=true", "stage.learning.histograms=true", "stage.profile.enabled=true")
    execute(compose([*SWEEP, *on, "device=cpu", "train.epochs=2"]), root / "learnt")
    with TensorBoard(root, fast=True) as running:
        running.wait("learnt")
        yield running


@pytest.fixture(scope="session")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorBoard]:
    """TensorBoard on two single runs with the default tags."""
    root = tmp_path_factory.mktemp("singles")
    for name, model in (("first", "lenet"), ("second", "mlp")):
        execute(compose([*SWEEP[:-1], "device=cpu", f"model={model}", "train.epochs=2"]), root / name)
    with TensorBoard(root, fast=True) as running:
        running.wait("first", "second")
        yield running
