"""The run that the tests of single stages read."""

import pytest
from matplotlib.figure import Figure
from stages_tools import Drawn, Seen
from tools import KEEP, KEPT, read_events, small

import fmexp.stages.figures
from fmexp import datasets, execute
from fmexp.run import Run
from fmexp.stages import confusion_matrix, mistakes, predictions


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """120 steps with a running loss every 30, which is enough for probabilities of all sizes."""
    folder = tmp_path_factory.mktemp("seen") / "run"
    figures: dict[tuple[str, int], list[Drawn]] = {}

    def add_figure(run: Run, tag: str, figure: Figure) -> None:
        figures[tag, run.step] = Drawn.of(figure)
        fmexp.stages.figures.add_figure(run, tag, figure)

    with pytest.MonkeyPatch.context() as patch:
        for module in (confusion_matrix, mistakes, predictions):
            patch.setattr(module, "add_figure", add_figure)
        cfg = small(
            "dataset.train_size=120", "dataset.test_size=60", "train.epochs=4", "train.log_every=30",
            "optimizer.lr=0.02", "stage.calibration.enabled=true", "stage.mistakes.enabled=true",
            KEEP,
        )  # fmt: skip
        execute(cfg, folder)
    return Seen(folder, read_events(folder), KEPT[str(folder)][0], datasets.synthetic(120, 60, 28, 0), figures)
