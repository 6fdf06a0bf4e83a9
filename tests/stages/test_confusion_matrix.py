"""confusion_matrix and per_class_accuracy: against counting by NumPy."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from stages_tools import Bytes, Drawn, Seen, numpy_confusion, picture
from tools import scalars

import fmexp.stages.figures
from fmexp import datasets
from fmexp.engine.evaluation import Evaluation
from fmexp.run import Run
from fmexp.stages import confusion_matrix, per_class_accuracy, pr_curves


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
        split_name="test",
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


# Many classes


def many_classes(classes: int, patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run of 300 test images of every third class, of which the first 30 are taken for class 1, 20 for class 2."""
    labels = torch.arange(300) * 3 % classes
    guesses = labels.clone()
    guesses[:30], labels[:30], guesses[30:50], labels[30:50] = 1, 3, 2, 6
    seen = Evaluation(F.one_hot(guesses, classes).float(), labels, 0.0)
    patch.setattr(Evaluation, "confusion", property(lambda _: pytest.fail("K x K numbers are asked for")))
    writer = SimpleNamespace(
        pictures=[], points={}, curves=[], add_pr_curve=lambda tag, *_, **__: writer.curves.append(tag),
        add_image=lambda tag, image, step, dataformats: writer.pictures.append(image),
        add_scalar=lambda tag, value, step: writer.points.update({tag: value}),
    )  # fmt: skip
    names = [f"class {index}" for index in range(classes)]
    return SimpleNamespace(
        evaluation=seen, dataset=SimpleNamespace(classes=names), step=7, writer=writer, split_name="test"
    )


@pytest.mark.parametrize("classes", [901, 10_000])
def test_of_many_classes_the_most_confused_pairs_are_drawn(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, figures = many_classes(classes, monkeypatch), list[Figure]()
    monkeypatch.setattr(confusion_matrix, "add_figure", lambda run, tag, figure: figures.append(figure))
    confusion_matrix.confusion_matrix(run, tag="any")  # type: ignore[arg-type]
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["class 3 → class 1", "class 6 → class 2"]
    assert [text.get_text() for text in axes.texts] == [" 30 (100%)", " 20 (100%)"]
    assert axes.get_title() == "accuracy 83.3%, 300 test images"
    fmexp.stages.figures.add_figure(run, "any", figures[0])  # type: ignore[arg-type]
    assert run.writer.pictures[0].shape == (860, 1400, 3)


def test_no_more_classes_have_tags_than_anyone_looks_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = many_classes(10_000, monkeypatch)
    caplog.set_level("INFO")
    per_class_accuracy.per_class_accuracy(run, tag="within")  # type: ignore[arg-type]
    pr_curves.pr_curves(run, tag="{class}", num_thresholds=5, weights=None)  # type: ignore[arg-type]
    common = [3, 6, *range(150, 150 + 3 * 98, 3)]  # with 30, 20 and 1 images each
    assert run.writer.curves == [f"class {index}" for index in common]
    assert run.writer.points == {f"within/class {index}": float(index > 6) for index in common}
    assert "accuracy of each class of the 100 with most images, of 10,000, on the test split\n  class 3 " in caplog.text
    assert len(caplog.text.splitlines()) == 101
