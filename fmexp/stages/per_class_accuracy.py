"""The accuracy of each class, from the test split."""

import logging

from fmexp.run import Run

log = logging.getLogger(__name__)


def per_class_accuracy(run: Run, *, tag: str) -> None:
    """Write a scalar a class as <tag>/<class>, and the table to the log; a class without test images has none."""
    accuracies = run.evaluation.per_class_accuracy.tolist()
    width = max(map(len, run.dataset.classes))
    lines = []
    for name, accuracy in zip(run.dataset.classes, accuracies, strict=True):
        if accuracy == accuracy:  # not NaN
            run.writer.add_scalar(f"{tag}/{name}", accuracy, run.step)
            lines.append(f"  {name:<{width}} {accuracy:7.1%}")
    log.info("accuracy of each class on the test split\n%s", "\n".join(lines))
