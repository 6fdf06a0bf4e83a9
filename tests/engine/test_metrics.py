"""Every metric against scikit-learn's, to 1e-12, and against a few images by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve
from sklearn.preprocessing import label_binarize
from tools import KEEP, KEPT, small

from fmexp import execute
from fmexp.config import maximised
from fmexp.config.objective import MORE_IS_BETTER
from fmexp.engine import metrics
from fmexp.engine.evaluation import Evaluation


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """What a short run says of 300 test images: some classes well, some badly."""
    sizes = ("dataset.train_size=240", "dataset.test_size=300", "train.epochs=3", "optimizer.lr=0.02")
    folder = tmp_path_factory.mktemp("real") / "run"
    execute(small(*sizes, "logging=light", KEEP), folder)
    return KEPT[str(folder)][0]


def drawn(
    images: int, classes: int, *, among: int | None = None, digits: int | None = None, seed: int = 0
) -> Evaluation:
    """Probabilities that are right more often than not, of labels `among` the first so many classes."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(among or classes, (images,), generator=draw)
    logits = 2 * torch.randn(images, classes, generator=draw)
    logits[range(images), labels] += 2
    probabilities = logits.softmax(1)
    return Evaluation(probabilities if digits is None else probabilities.round(decimals=digits), labels, 0.0)


def calibration_error(chances: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """From scikit-learn's bins, and how many images are in each by counting."""
    top, right = chances.max(1), (chances.argmax(1) == labels).astype(int)
    accuracy, confidence = calibration_curve(right, top, n_bins=15, pos_label=1)
    counts = [sum(low / 15 < one <= (low + 1) / 15 for one in top.tolist()) for low in range(15)]
    filled = [count for count in counts if count]
    return sum(n * abs(a - c) for n, a, c in zip(filled, accuracy, confidence, strict=True)) / len(labels)


def by_scikit_learn(evaluation: Evaluation) -> dict[str, float]:
    """What scikit-learn says of classes that have images, one class against the rest where it refuses to do all."""
    chances, labels = evaluation.probabilities.double().numpy(), evaluation.labels.numpy()
    guesses, present, count = chances.argmax(1), np.unique(labels), chances.shape[1]
    found = {
        "accuracy": sklearn.accuracy_score(labels, guesses),
        "f1": sklearn.f1_score(labels, guesses, average="macro"),
        "balanced_accuracy": sklearn.recall_score(labels, guesses, labels=present, average="macro"),
        "average_precision": np.mean([sklearn.average_precision_score(labels == k, chances[:, k]) for k in present]),
        "ece": calibration_error(chances, labels),
    }
    if len(present) > 1:
        found["auroc"] = np.mean([sklearn.roc_auc_score(labels == k, chances[:, k]) for k in present])
    if count > 5:  # its order of equal ones is the other way round
        turned, backwards = count - 1 - labels, chances[:, ::-1]
        found["top5"] = sklearn.top_k_accuracy_score(turned, backwards, k=5, labels=range(count))
    with warnings.catch_warnings():
        # Float32's probabilities add up to one to seven digits, and rounded ones less.
        warnings.filterwarnings("ignore", "The y_pro?b?.* values do not sum to one", UserWarning)
        found["log_loss"] = sklearn.log_loss(labels, chances, labels=range(count))
    return {name: float(value) for name, value in found.items()}


def assert_as_scikit_learn(evaluation: Evaluation) -> None:
    ours = evaluation.metrics
    assert ours == pytest.approx(by_scikit_learn(evaluation), rel=0, abs=1e-12)
    labels, guesses = evaluation.labels.numpy(), evaluation.probabilities.numpy().argmax(1)
    every = range(evaluation.probabilities.shape[1])
    theirs = sklearn.precision_recall_fscore_support(labels, guesses, labels=every, zero_division=np.nan)[:3]
    per_class = metrics.per_class(evaluation.probabilities, evaluation.labels)
    assert list(per_class) == ["precision", "recall", "f1"]
    for name, expected in zip(per_class, theirs, strict=True):
        np.testing.assert_allclose(per_class[name], expected, rtol=0, atol=1e-12, err_msg=name)
        assert per_class[name].dtype == np.float64


def test_a_real_run(real: Evaluation) -> None:
    assert_as_scikit_learn(real)
    assert 0.4 < real.metrics["accuracy"] < 0.95
    # All classes at once, as scikit-learn would be asked, where it takes that.
    chances, labels = real.probabilities.double().numpy(), real.labels.numpy()
    area = sklearn.roc_auc_score(labels, chances, multi_class="ovr", average="macro")
    precision = sklearn.average_precision_score(label_binarize(labels, classes=range(10)), chances, average="macro")
    balanced = sklearn.balanced_accuracy_score(labels, chances.argmax(1))
    assert real.metrics["auroc"] == pytest.approx(area, rel=0, abs=1e-12)
    assert real.metrics["average_precision"] == pytest.approx(precision, rel=0, abs=1e-12)
    assert real.metrics["balanced_accuracy"] == pytest.approx(balanced, rel=0, abs=1e-12)
    assert real.metrics["accuracy"] == real.accuracy
    assert real.metrics["log_loss"] == pytest.approx(real.loss, rel=1e-6)  # that is taken from the logits


@pytest.mark.parametrize("digits", [1, 2])
def test_many_equal_probabilities(real: Evaluation, digits: int) -> None:
    tied = Evaluation(real.probabilities.round(decimals=digits), real.labels, 0.0)
    assert all(len(column.unique()) <= 10**digits + 1 for column in tied.probabilities.T)
    assert_as_scikit_learn(tied)
    assert tied.metrics["auroc"] != real.metrics["auroc"]


def test_four_images_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    labels = torch.tensor([0, 1, 1, 2])
    per_class = metrics.per_class(probabilities, labels)
    assert {name: values.tolist() for name, values in per_class.items()} == {
        "precision": [1 / 2, 1, 1], "recall": [1, 1 / 2, 1], "f1": [2 / 3, 2 / 3, 1],
    }  # fmt: skip
    assert metrics.compute(probabilities, labels) == pytest.approx(
        {
            "accuracy": 3 / 4,
            "f1": (2 / 3 + 2 / 3 + 1) / 3,
            "balanced_accuracy": (1 + 1 / 2 + 1) / 3,
            # Class 0 is above two of three and equals one; class 1 wins 3 of 4 pairs and equals in one.
            "auroc": ((2 + 1 / 2) / 3 + (3 + 1 / 2) / 4 + 1) / 3,
            # Class 0 is one of the two at 0.5; class 1 is the first, and two of the first three.
            "average_precision": (1 / 2 + (1 / 2 + 1 / 2 * 2 / 3) + 1) / 3,
            # Three images at 0.5 are right in two of three cases, one at 0.75 is right.
            "ece": 3 / 4 * (2 / 3 - 1 / 2) + 1 / 4 * (1 - 3 / 4),
            "log_loss": -(2 * math.log(0.5) + math.log(0.25) + math.log(0.75)) / 4,
        },
        rel=1e-15,
    )
    images, confidence, accuracy = metrics.reliability(probabilities, labels)
    assert images.tolist() == [0] * 7 + [3, 0, 0, 0, 1, 0, 0, 0]
    assert (confidence[[7, 11]].tolist(), accuracy[[7, 11]].tolist()) == ([0.5, 0.75], [2 / 3, 1])
    assert np.isnan(confidence).sum() == np.isnan(accuracy).sum() == 13
    assert_as_scikit_learn(Evaluation(probabilities, labels, 0.0))


def test_a_bin_has_its_upper_end() -> None:
    top = torch.tensor([1 / 2, 1.0, 0.6, 0.6000001, 0.05], dtype=torch.float64)
    images, _, _ = metrics.reliability(torch.stack([top, -top], 1), torch.zeros(5, dtype=torch.int64))
    assert images.nonzero()[0].tolist() == [0, 7, 8, 9, 14]


@pytest.mark.parametrize(("among", "predicted"), [(7, True), (7, False), (1, True)])
def test_classes_without_images(among: int, predicted: bool) -> None:
    evaluation = drawn(200, 10, among=among)
    if not predicted:
        evaluation.probabilities[:, among:] = 0
    assert (int(evaluation.guesses.max()) >= among) == predicted
    assert_as_scikit_learn(evaluation)
    assert ("auroc" in evaluation.metrics) == (among > 1)
    per_class = metrics.per_class(evaluation.probabilities, evaluation.labels)
    assert np.isnan(per_class["recall"][among:]).all()
    assert np.isnan(per_class["f1"][among:]).all() != predicted


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("classes", [3, 6])
def test_one_image(label: int, classes: int) -> None:
    evaluation = Evaluation(torch.tensor([[0.2, 0.7, 0.1, *[0.0] * (classes - 3)]]), torch.tensor([label]), 0.0)
    assert_as_scikit_learn(evaluation)
    assert set(evaluation.metrics) == set(MORE_IS_BETTER) - {"loss", "auroc"} - ({"top5"} if classes < 6 else set())
    assert evaluation.metrics["ece"] == pytest.approx(abs((label == 1) - float(torch.tensor(0.7))))


@pytest.mark.parametrize("classes", [2, 5, 6, 100])
def test_few_and_many_classes(classes: int) -> None:
    assert_as_scikit_learn(drawn(500, classes))
    assert ("top5" in drawn(500, classes).metrics) == (classes > 5)


@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 12), st.integers(1, 3) | st.none(), st.integers(0, 99))
def test_any_images(images: int, classes: int, among: int, digits: int | None, seed: int) -> None:
    assert_as_scikit_learn(drawn(images, classes, among=min(among, classes), digits=digits, seed=seed))


def test_of_equal_probabilities_the_first_classes_are_the_most_probable() -> None:
    same = torch.full((8, 8), 1 / 8)
    values = metrics.compute(same, torch.arange(8))
    assert (values["accuracy"], values["top5"]) == (1 / 8, 5 / 8)


def test_a_probability_of_zero_is_a_large_loss_and_a_perfect_model_has_none() -> None:
    sure, labels = torch.eye(3), torch.arange(3)
    assert metrics.compute(sure, labels)["log_loss"] == 0
    wrong = metrics.compute(sure, labels.roll(1))
    assert wrong["log_loss"] == pytest.approx(-math.log(2.0**-52))
    assert (wrong["ece"], wrong["accuracy"], wrong["f1"]) == (1, 0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_leaves_out_what_would_be_none(value: float) -> None:
    evaluation = drawn(20, 6)
    evaluation.probabilities[3, 4] = value
    assert list(evaluation.metrics) == ["accuracy", "f1", "balanced_accuracy"]
    assert evaluation.metrics["accuracy"] == evaluation.accuracy


def test_which_way_is_better_is_known_of_all_metrics() -> None:
    good, labels = drawn(100, 8).probabilities, drawn(100, 8).labels
    better, worse = metrics.compute(good, labels), metrics.compute(good.roll(1, 0), labels)
    assert set(better) == set(MORE_IS_BETTER) - {"loss"}
    for name in better:
        assert (better[name] > worse[name]) == maximised(f"test/{name}") == maximised(f"val/{name}/best"), name
    assert [maximised(name) for name in ("train/accuracy", "test/loss", "val/loss", "train/loss")] == [True] + [
        False
    ] * 3
    # train.tag may have any name, and is a loss.
    assert not any(map(maximised, ("training loss", "accuracy", "my/accuracy", "train/tag/accuracy", "test/late", "")))
