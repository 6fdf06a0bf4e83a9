"""A precision-recall curve a class."""

from fmexp.run import Run
from fmexp.stages.figures import commonest


def pr_curves(run: Run, *, tag: str, num_thresholds: int, weights: float | None) -> None:
    """Write a curve a class from its true labels and its softmax probabilities; "{class}" in the tag is its name.

    With more than 100 classes: of those with the most images.
    """
    evaluation = run.evaluation
    for index in commonest(evaluation):
        run.writer.add_pr_curve(
            tag.replace("{class}", run.dataset.classes[index]),
            evaluation.labels == index,
            evaluation.probabilities[:, index],
            run.step,
            num_thresholds=num_thresholds,
            weights=weights,
        )
