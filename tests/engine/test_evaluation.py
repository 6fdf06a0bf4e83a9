"""The evaluation: figures that follow from probabilities and labels, against counting by hand and with plain NumPy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.util.tensor_util import make_ndarray
from tools import read_events, small
from torch import Tensor, nn
from torch.utils.tensorboard.summary import pr_curve

from fmexp import datasets, execute
from fmexp.datasets import Dataset, Split
from fmexp.engine.evaluation import BATCH, Evaluation, evaluate
from fmexp.models import LeNet

LABELS = torch.tensor([0, 1, 0, 2, 1])
PROBABILITIES = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7], [0.1, 0.7, 0.2]])
EXAMPLE = Evaluation(PROBABILITIES, LABELS, 0.5)


def drawn(count: int, classes: int, seed: int) -> Evaluation:
    """Random probabilities, many of them equal, and random labels that leave out the last class."""
    draw = np.random.default_rng(seed)
    raw = draw.integers(1, 6, (count, classes)).astype(np.float32)
    probabilities = torch.from_numpy(raw / raw.sum(1, keepdims=True))
    return Evaluation(probabilities, torch.from_numpy(draw.integers(0, classes - 1, count)), 0.0)


def by_counting(evaluation: Evaluation, index: int) -> list[tuple[float, float, float]]:
    """(threshold, precision, recall) of a class, for each of its probabilities from high to low."""
    chances, actual = evaluation.probabilities[:, index].tolist(), (evaluation.labels == index).tolist()
    points = []
    for threshold in sorted(set(chances), reverse=True):
        hits = [is_it for chance, is_it in zip(chances, actual, strict=True) if chance >= threshold]
        points.append((threshold, sum(hits) / len(hits), sum(hits) / sum(actual) if any(actual) else math.nan))
    return points


# Precision and recall


def test_precision_and_recall_of_the_worked_example() -> None:
    thresholds, precision, recall = EXAMPLE.precision_recall(0)
    assert thresholds.tolist() == pytest.approx([0.8, 0.3, 0.2, 0.1])
    assert precision.tolist() == [1, 1, pytest.approx(2 / 3), pytest.approx(2 / 5)]
    assert recall.tolist() == [1 / 2, 1, 1, 1]
    assert {tensor.dtype for tensor in (thresholds, precision, recall)} == {torch.float64}


@pytest.mark.parametrize("index", range(4))
def test_precision_and_recall_follow_from_counting(index: int) -> None:
    evaluation = drawn(200, 5, index)
    points = list(zip(*(tensor.tolist() for tensor in evaluation.precision_recall(index)), strict=True))
    assert points == [pytest.approx(point, abs=1e-12) for point in by_counting(evaluation, index)]
    assert len(points) < 200  # equal probabilities make one point
    assert points[-1][2] == 1


def test_a_class_without_images_has_a_precision_of_zero_and_no_recall() -> None:
    evaluation = drawn(50, 5, 0)
    _, precision, recall = evaluation.precision_recall(4)
    assert not precision.any()
    assert recall.isnan().all()


@pytest.mark.parametrize("index", range(4))
def test_tensorboards_curve_lies_on_precision_and_recall(index: int) -> None:
    evaluation = drawn(300, 5, 7)
    chances = evaluation.probabilities[:, index].numpy()
    summary = pr_curve("any", (evaluation.labels == index).numpy(), chances, num_thresholds=127)
    curve = make_ndarray(summary.value[0].tensor)
    thresholds, precision, recall = evaluation.precision_recall(index)
    scaled = thresholds.float().numpy() * np.float32(126)
    assert (curve[0, 0], curve[1, 0]) == ((evaluation.labels == index).sum(), (evaluation.labels != index).sum())
    reached = 0
    for i in range(127):
        last = int((scaled >= i).sum()) - 1  # the lowest of the exact thresholds that are not below i / 126
        if last < 0:
            assert not curve[:2, i].any()
            continue
        assert curve[4:, i].tolist() == [pytest.approx(float(precision[last])), pytest.approx(float(recall[last]))]
        reached += 1
    assert reached > 20


# Accuracy, confusion, accuracy of each class


def test_accuracy_and_confusion_of_the_worked_example() -> None:
    assert EXAMPLE.accuracy == 4 / 5
    assert EXAMPLE.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 1]]
    assert EXAMPLE.confusion.dtype == torch.int64
    assert EXAMPLE.per_class_accuracy.tolist() == [0.5, 1, 1]
    assert EXAMPLE.per_class_accuracy.dtype == torch.float64


def test_accuracy_and_confusion_follow_from_plain_numpy() -> None:
    evaluation = drawn(1000, 6, 3)
    guesses, labels = evaluation.probabilities.numpy().argmax(1), evaluation.labels.numpy()
    assert evaluation.accuracy == np.mean(guesses == labels)
    table: NDArray[np.int64] = np.zeros((6, 6), np.int64)
    np.add.at(table, (labels, guesses), 1)
    assert np.array_equal(evaluation.confusion.numpy(), table)
    for index in range(5):
        assert evaluation.per_class_accuracy[index] == np.mean(guesses[labels == index] == index)
    assert evaluation.per_class_accuracy[5].isnan()
    assert not evaluation.confusion[5].any()
    assert evaluation.confusion[:, 5].any()  # guessed, though there is none


# The pass over the split


class Remembers(nn.Module):
    """A linear model that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.given: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(images)
        return self.linear(images.flatten(1))  # type: ignore[no-any-return]


def test_the_pass_sees_every_test_image_once_and_in_order() -> None:
    torch.manual_seed(0)
    count = 2 * BATCH + 7
    images = torch.randint(0, 256, (count, 1, 2, 2), dtype=torch.uint8)
    split, none = Split(images, torch.arange(count) % 3), Split(images[:1], torch.zeros(1, dtype=torch.int64))
    dataset, model = Dataset(none, split, ("a", "b", "c"), (0.4,), (0.3,)), Remembers()
    evaluation = evaluate(model, dataset, dataset.test, device=torch.device("cpu"))
    assert [len(batch) for batch in model.given] == [BATCH, BATCH, 7]
    assert torch.equal(torch.cat(model.given), dataset.normalise(images))
    assert torch.equal(evaluation.labels, split.labels)
    with torch.no_grad():
        logits = model.linear(dataset.normalise(images).flatten(1)).double()
    torch.testing.assert_close(evaluation.probabilities.double(), logits.softmax(1), rtol=0, atol=1e-6)
    expected = float(-logits.log_softmax(1)[range(count), split.labels].mean())
    assert evaluation.loss == pytest.approx(expected, rel=1e-6)
    assert evaluation.probabilities.requires_grad is False


class Counting(LeNet):
    """Counts the images that it is asked about in evaluation."""

    looked_at: list[int]

    def __init__(self, **known: Any) -> None:
        super().__init__(**known)
        Counting.looked_at = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            Counting.looked_at.append(len(x))
        return super().forward(x)


END = ("pr_curves", "per_class_accuracy", "confusion_matrix")


@pytest.mark.parametrize("enabled", [(), END[1:2], END])
def test_one_pass_serves_the_epoch_and_all_stages_at_the_end(enabled: tuple[str, ...], tmp_path: Path) -> None:
    others = [f"stage.{name}.enabled=false" for name in ("image_grid", "model_graph", "projector", "predictions")]
    ends = [f"stage.{name}.enabled={str(name in enabled).lower()}" for name in END]
    sizes = ["dataset.train_size=12", f"dataset.test_size={BATCH + 40}", "train.epochs=2"]
    execute(small("model._target_=test_evaluation.Counting", *sizes, *others, *ends), tmp_path)
    # Once an epoch, and no more, and the training images.
    assert [size for size in Counting.looked_at if size > 4] == [BATCH, 40, 12] * 2
    assert sum(size for size in Counting.looked_at if size <= 4) <= 8  # the look at the model's shapes


def test_the_evaluation_is_made_again_after_more_training(tmp_path: Path) -> None:
    others = [f"stage.{name}.enabled=false" for name in ("image_grid", "projector", "predictions", "confusion_matrix")]
    execute(small("stage.pr_curves.when=log", "optimizer.lr=0.1", *others), tmp_path)
    events = read_events(tmp_path)
    curves = [[make_ndarray(e.tensor_proto).tobytes() for e in events.Tensors(name)] for name in datasets.GARMENTS]
    at_each_step = list(zip(*curves, strict=True))
    assert len(at_each_step) == len(set(at_each_step)) == 4
