"""A precision-recall curve a class, from the test split."""

from fmexp.run import Run


def pr_curves(run: Run, *, tag: str, num_thresholds: int, weights: float | None) -> None:
    """Write a curve a class from its true labels and its softmax probabilities; "{class}" in the tag is its name."""
    evaluation = run.evaluation
    for index, name in enumerate(run.dataset.classes):
        run.writer.add_pr_curve(
            tag.replace("{class}", name),
            evaluation.labels == index,
            evaluation.probabilities[:, index],
            run.step,
            num_thresholds=num_thresholds,
            weights=weights,
        )
