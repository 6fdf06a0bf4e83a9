"""calibration: what the reliability diagram shows, against counting image by image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from stages_tools import Bytes, Seen, catch, picture
from torch import Tensor

from fmexp.engine.evaluation import Evaluation
from fmexp.stages import calibration

Bars = dict[int, tuple[float, float]]  # number of a bin -> where its bar begins, and its height


def diagram(evaluation: Evaluation, patch: pytest.MonkeyPatch) -> tuple[Figure, Bytes]:
    """The figure that `calibration` draws of an evaluation, and its picture."""
    figures, pictures, writer = catch(calibration, patch)
    calibration.calibration(SimpleNamespace(evaluation=evaluation, step=7, writer=writer, split_name="test"), tag="any")  # type: ignore[arg-type]
    return figures[0], pictures[0]


def bars(axes: Axes) -> list[Bars]:
    """Each series of bars that stands in the axes."""
    series: list[Bars] = []
    for container in axes.containers:
        assert isinstance(container, BarContainer)
        for bar in container:
            assert bar.get_width() == pytest.approx(1 / 15)
            assert bar.get_x() * 15 == pytest.approx(round(bar.get_x() * 15))
        series.append({round(bar.get_x() * 15): (bar.get_y(), bar.get_height()) for bar in container})
    return series


def test_the_diagram_of_a_run(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, drawn = diagram(seen.evaluation, monkeypatch)
    (event,) = seen.events.Images("view/calibration")
    assert event.step == 120
    assert np.array_equal(picture(event.encoded_image_string), drawn)
    assert drawn.shape == (430, 700, 3)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for chances, label in zip(seen.evaluation.probabilities.tolist(), seen.dataset.test.labels.tolist(), strict=True):
        top = max(chances)
        place = next(place for place in range(15) if top <= (place + 1) / 15)
        bins.setdefault(place, []).append((top, chances.index(top) == label))
    assert len(bins) > 5
    means = {place: np.mean(found, 0).tolist() for place, found in bins.items()}
    accuracy, gap = bars(figure.axes[0])
    (share,) = bars(figure.axes[1])
    assert accuracy.keys() == gap.keys() == means.keys()
    for place, (confidence, right) in means.items():
        assert accuracy[place] == pytest.approx((0, right))
        assert gap[place] == pytest.approx((right, confidence - right))
    assert share == {place: pytest.approx((0, len(bins.get(place, ())) / 60)) for place in range(15)}
    error = sum(len(bins[place]) / 60 * abs(right - confidence) for place, (confidence, right) in means.items())
    assert figure.axes[0].get_title() == f"ECE {error:.3f}, 60 test images"


@pytest.mark.parametrize(
    ("chances", "labels", "title", "accuracy"),
    [
        ([[0.75, 0.25]] * 3 + [[0.25, 0.75]], [0, 0, 0, 0], "ECE 0.000, 4 test images", {11: 0.75}),
        ([[0.75, 0.25]], [1], "ECE 0.750, 1 test images", {11: 0.0}),
        ([[1.0, 0.0]] * 2000, [0] * 2000, "ECE 0.000, 2,000 test images", {14: 1.0}),
        ([[0.5, 0.5], [0.0, 1.0]], [1, 1], "ECE 0.250, 2 test images", {7: 0.0, 14: 1.0}),
    ],
)
def test_the_diagrams_of_few_images(
    chances: list[list[float]],
    labels: list[int],
    title: str,
    accuracy: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figure, _ = diagram(Evaluation(torch.tensor(chances), torch.tensor(labels), 0.0), monkeypatch)
    assert figure.axes[0].get_title() == title
    assert bars(figure.axes[0])[0] == {place: (0, height) for place, height in accuracy.items()}


def test_all_words_are_within_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: Tensor = torch.zeros(100_000, dtype=torch.int64)
    figure, sheet = diagram(Evaluation(torch.tensor([[0.7, 0.3]]).repeat(100_000, 1), labels, 0.0), monkeypatch)
    words = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    words += [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    boxes = [text.get_window_extent() for text in words if text.get_text() and text.get_visible()]
    assert len(boxes) > 10
    assert all(box.x0 >= 0 and box.x1 <= 700 and box.y0 >= 0 and box.y1 <= 430 for box in boxes)
    assert sheet.shape == (430, 700, 3)
