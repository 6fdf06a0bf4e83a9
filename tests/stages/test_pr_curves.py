"""pr_curves: from the truth and the probabilities."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from stages_tools import Seen, only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tools import KEEP, KEPT
from torch import Tensor

from fmexp import datasets

# pr_curves


def pr_curve(events: EventAccumulator, tag: str) -> tuple[int, NDArray[np.float32]]:
    """The step of a curve, and its float32 [6, thresholds]: TP, FP, TN, FN, precision, recall."""
    (event,) = events.Tensors(tag)
    assert events.SummaryMetadata(tag).plugin_data.plugin_name == "pr_curves"
    return event.step, make_ndarray(event.tensor_proto)


def counts(probabilities: Tensor, truth: Tensor, thresholds: int) -> NDArray[np.float64]:
    """TP, FP, TN, FN [4, thresholds] by counting; positive is a probability of at least i / (thresholds - 1)."""
    scaled, actual = probabilities.numpy() * np.float32(thresholds - 1), truth.numpy()
    rows = []
    for i in range(thresholds):
        positive = scaled >= i
        rows.append([(positive & actual).sum(), (positive & ~actual).sum(), (~positive & ~actual).sum(),
                     (~positive & actual).sum()])  # fmt: skip
    return np.array(rows, np.float64).T


@pytest.mark.parametrize("index", range(10))
def test_pr_curves_follow_from_the_truth_and_the_probabilities(seen: Seen, index: int) -> None:
    step, curve = pr_curve(seen.events, datasets.GARMENTS[index])
    assert step == 120
    assert curve.shape == (6, 127)
    probabilities, truth = seen.evaluation.probabilities[:, index], seen.dataset.test.labels == index
    expected = counts(probabilities, truth, 127)
    assert np.array_equal(curve[:4], expected)
    found, false, _, missed = expected
    np.testing.assert_allclose(curve[4], found / np.maximum(found + false, 1), rtol=1e-6)
    np.testing.assert_allclose(curve[5], found / (found + missed), rtol=1e-6)
    # The exact curve has a point at every probability; TensorBoard's 127 lie on it.
    thresholds, precision, recall = seen.evaluation.precision_recall(index)
    for i in range(127):
        above = np.flatnonzero(thresholds.float().numpy() * np.float32(126) >= i)
        point = (float(precision[above[-1]]), float(recall[above[-1]])) if len(above) else (0, 0)
        assert (curve[4, i], curve[5, i]) == pytest.approx(point)


def test_pr_curves_are_drawn_of_the_truth_and_not_of_the_guesses(seen: Seen) -> None:
    guesses = seen.evaluation.probabilities.argmax(1)
    curves = [pr_curve(seen.events, name)[1] for name in datasets.GARMENTS]
    assert [curve[0, 0] for curve in curves] == [6] * 10  # all positives, of 60 balanced images
    assert guesses.bincount(minlength=10).tolist() != [6] * 10


def test_pr_curves_take_thresholds_weights_and_a_tag(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    folder, events = run_small(
        *only("pr_curves"), "stage.pr_curves.num_thresholds=11", "stage.pr_curves.weights=2.5",
        "stage.pr_curves.tag='curves/{class}'", KEEP,
    )  # fmt: skip
    labels = datasets.synthetic(64, 40, 28, 0).test.labels
    for index, name in enumerate(datasets.GARMENTS):
        _, curve = pr_curve(events, f"curves/{name}")
        assert curve.shape == (6, 11)
        expected = counts(KEPT[str(folder)][0].probabilities[:, index], labels == index, 11)
        assert np.array_equal(curve[:4], 2.5 * expected)
