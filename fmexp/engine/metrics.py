"""Metrics of a classifier, from its softmax probabilities float32 [N, K] of a split and the true labels int64 [N].

They are scikit-learn's, computed in float64 and with NumPy, whose last bits are the same for any number of threads.
"macro" is the plain mean over classes. A class without images is left out of a mean where it has no value, and a metric
that no class has a value of is left out altogether: of one image there is no AUROC.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

TOP = 5  # among so many most probable classes the true one is looked for, where there are more of them
BINS = 15

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


def compute(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics that are finite, by name; which way is better is in `fmexp.config.objective`.

    accuracy            share of images whose most probable class is the true one
    f1                  macro F1, over the classes that are among the labels or the predictions
    balanced_accuracy   macro recall, over the classes that have images
    top5                share of images whose true class is among the five most probable ones; from 6 classes on
    auroc               macro area under the ROC curve, each class against the rest, over those that have images
    average_precision   macro average precision, each class against the rest, over those that have images
    ece                 expected calibration error: see `reliability`
    log_loss            mean of -log(probability of the true class), this taken for no less than float64's epsilon

    A probability that is not a number leaves all but the first three out.
    """
    chances, truth = probabilities.numpy(), labels.numpy()
    classes = per_class(probabilities, labels)
    values = {
        "accuracy": float((chances.argmax(1) == truth).mean()),
        "f1": _mean(classes["f1"]),
        "balanced_accuracy": _mean(classes["recall"]),
    }
    if np.isfinite(chances).all():
        curves = np.array([_areas(chances[:, index], truth == index) for index in np.unique(truth)])
        if chances.shape[1] > TOP:
            values["top5"] = _top(chances, truth, TOP)
        values["auroc"], values["average_precision"] = _mean(curves[:, 0]), _mean(curves[:, 1])
        values["ece"] = expected_calibration_error(probabilities, labels)
        values["log_loss"] = _log_loss(chances, truth)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def per_class(probabilities: Tensor, labels: Tensor) -> dict[str, Numbers]:
    """Precision, recall and F1 of each class, float64 [K].

    NaN where there is none: precision of a class never predicted, recall of one without images, F1 of one that is both.
    """
    guesses, truth, count = probabilities.numpy().argmax(1), labels.numpy(), probabilities.shape[1]
    right, predicted, actual = (np.bincount(of, minlength=count) for of in (truth[guesses == truth], guesses, truth))
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        return {"precision": right / predicted, "recall": right / actual, "f1": 2 * right / (predicted + actual)}


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[Counts, Numbers, Numbers]:
    """How far a model may be believed: Guo et al. 2017, "On Calibration of Modern Neural Networks".

    Images are put into 15 equally wide bins by the probability of the class that is predicted; a bin has its upper end.

    Returns:
        each bin's number of images int64 [15], mean probability and accuracy float64 [15], NaN where it has no images.
    """
    chances = probabilities.numpy()
    top = chances.max(1).astype(np.float64)
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], top)
    images = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, top, BINS) / images
        return images, confidence, np.bincount(bins, chances.argmax(1) == labels.numpy(), BINS) / images


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The mean over images of how far the accuracy of their bin is from its mean probability: see `reliability`."""
    images, confidence, accuracy = reliability(probabilities, labels)
    return float(np.nansum(images * np.abs(accuracy - confidence)) / images.sum())


def by_threshold(chances: NDArray[Any], positive: NDArray[np.bool_]) -> tuple[NDArray[Any], Counts, Counts]:
    """One class against the rest, at every distinct probability as a threshold, from high to low.

    Args:
        chances: the probability of the class, [N], for each image.
        positive: whether the image is of the class, [N].

    Returns:
        thresholds [T]; how many images at or above each are of the class, and how many are there at all, int64 [T].
    """
    order = np.argsort(chances)[::-1]
    ordered = chances[order]
    # A threshold takes all images of one probability together, so that their order does not matter.
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    return ordered[last], np.cumsum(positive[order], dtype=np.int64)[last], last + 1


def _areas(chances: NDArray[np.float32], positive: NDArray[np.bool_]) -> tuple[float, float]:
    """The area under one class's ROC curve, by trapezoids, NaN where all images are of the class; and its average
    precision: the mean of the precision at each threshold, weighted by the recall that it adds."""
    _, found, taken = by_threshold(chances, positive)
    wrong, added = taken - found, np.diff(found, prepend=0)
    twice = int((np.diff(wrong, prepend=0) * (2 * found - added)).sum())  # exact: whole numbers
    everything = 2 * int(found[-1]) * int(wrong[-1])
    return twice / everything if everything else math.nan, float((added * (found / taken)).sum() / found[-1])


def _top(chances: NDArray[np.float32], truth: Counts, count: int) -> float:
    """The share of images whose class is among the most probable ones, the first ones where equal, as in argmax."""
    own = chances[np.arange(len(truth)), truth][:, None]
    before = (chances > own) | ((chances == own) & (np.arange(chances.shape[1]) < truth[:, None]))
    return float((before.sum(1) < count).mean())


def _log_loss(chances: NDArray[np.float32], truth: Counts) -> float:
    own = chances[np.arange(len(truth)), truth].astype(np.float64)
    return float(-np.log(np.maximum(own, np.finfo(np.float64).eps)).mean())


def _mean(values: Numbers) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
