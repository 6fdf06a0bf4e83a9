"""confusion_matrix and per_class_accuracy: against counting by NumPy."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from stages_tools import Bytes, Drawn, Seen, numpy_confusion, picture
from tools import scalars

import fmexp.stages.figures
from fmexp import datasets
from fmexp.run import Run
from fmexp.stages import confusion_matrix


def test_per_class_accuracy_is_in_scalars_and_in_the_log(seen: Seen) -> None:
    table = numpy_confusion(seen)
    log = (seen.folder / "fmexp.log").read_text()
    assert "accuracy of each class on the test split" in log
    for index, name in enumerate(datasets.GARMENTS):
        ((step, value),) = scalars(seen.events, f"within_class_accuracy/{name}")
        assert step == 120
        assert value == pytest.approx(table[index, index] / 6, abs=1e-7)
        assert f"\n  {name:<11} {table[index, index] / 6:7.1%}\n" in log
    assert table.trace() / 60 == pytest.approx(scalars(seen.events, "test/accuracy")[-1][1])


def test_confusion_matrix_shows_the_share_of_each_class(seen: Seen) -> None:
    table = numpy_confusion(seen)
    (event,) = seen.events.Images("view/confusion_matrix")
    assert event.step == 120
    assert picture(event.encoded_image_string).shape == (430, 700, 3)
    (drawn,) = seen.figures["view/confusion_matrix", 120]
    assert drawn.title == f"accuracy {table.trace() / 60:.1%}, 60 test images"
    assert drawn.texts == {
        (row, column): f"{100 * table[row, column] / 6:.0f}" for row, column in np.argwhere(table).tolist()
    }
    assert drawn.labels == ("predicted (% of the actual class)", "actual", list(datasets.GARMENTS))
    np.testing.assert_allclose(drawn.image, table / 6)


def matrix(counts: list[list[int]], names: Sequence[str], patch: pytest.MonkeyPatch) -> tuple[Figure, Bytes]:
    """The figure that `confusion_matrix` draws of these counts, and its picture."""
    found: list[tuple[Figure, Bytes]] = []

    def add_figure(run: Run, tag: str, figure: Figure) -> None:
        fmexp.stages.figures.add_figure(run, tag, figure)
        found.append((figure, pictures.pop()))

    pictures: list[Bytes] = []
    patch.setattr(confusion_matrix, "add_figure", add_figure)
    run = SimpleNamespace(
        evaluation=SimpleNamespace(confusion=torch.tensor(counts)), dataset=SimpleNamespace(classes=names), step=7,
        writer=SimpleNamespace(add_image=lambda tag, image, step, dataformats: pictures.append(image)),
    )  # fmt: skip
    confusion_matrix.confusion_matrix(run, tag="any")  # type: ignore[arg-type]
    return found[0]


def test_shares_say_0_or_100_only_where_none_or_all_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [[996, 4, 0], [3, 125, 872], [0, 0, 0]]
    figure, _ = matrix(counts, ["a", "b", "c"], monkeypatch)
    (drawn,) = Drawn.of(figure)
    assert drawn.texts == {(0, 0): ">99", (0, 1): "<1", (1, 0): "<1", (1, 1): "12", (1, 2): "87"}
    assert drawn.title == "accuracy 56.0%, 2,000 test images"
    assert matrix([[9999, 1], [0, 10000]], ["a", "b"], monkeypatch)[0].axes[0].get_title().startswith("accuracy >99.9%")
    assert Drawn.of(matrix([[5, 0], [0, 5]], ["a", "b"], monkeypatch)[0])[0].texts == {(0, 0): "100", (1, 1): "100"}
    colour_bar = figure.axes[1]
    assert [label.get_text() for label in colour_bar.get_yticklabels()] == ["0%", "50%", "100%"]


@pytest.mark.parametrize(
    ("classes", "size", "named", "numbered"),
    [(2, (430, 700), 2, True), (30, (860, 1400), 30, True), (100, (860, 1400), 34, False)],
)
def test_a_confusion_matrix_fits_a_screen_and_its_words_their_places(
    classes: int, size: tuple[int, int], named: int, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = (torch.eye(classes, dtype=torch.int64) * 95 + 1).tolist()
    names = [f"a rather long class name {index}" for index in range(classes)]
    figure, sheet = matrix(counts, names, monkeypatch)
    assert sheet.shape == (*size, 3)
    axes = figure.axes[0]
    assert len(axes.texts) == (classes**2 if numbered else 0)
    labels = axes.get_yticklabels()
    assert len({label.get_text() for label in labels}) == len(labels) == named  # cut, but not all to the same
    assert max(len(label.get_text()) for label in labels) == 16
    boxes = [label.get_window_extent() for label in (*labels, *axes.get_xticklabels(), axes.title, axes.xaxis.label)]
    assert all(box.x0 >= 0 and box.x1 <= size[1] and box.y0 >= 0 and box.y1 <= size[0] for box in boxes)
    edges = sorted((box.y0, box.y1) for box in boxes[:named])
    assert all(above[0] > below[1] - 3 for below, above in itertools.pairwise(edges))  # a letter's box has a margin
    widest = max((text.get_window_extent().width for text in axes.texts), default=0)
    assert widest < axes.get_window_extent().width / classes
