"""The accuracy of each class."""

import logging

from fmexp.run import Run
from fmexp.stages.figures import commonest

log = logging.getLogger(__name__)


def per_class_accuracy(run: Run, *, tag: str) -> None:
    """Write a scalar a class as <tag>/<class>, and the table to the log; a class without images has none.

    With more than 100 classes: those with the most images.
    """
    accuracies, names = run.evaluation.per_class_accuracy, run.dataset.classes
    shown = commonest(run.evaluation)
    width = max(len(names[index]) for index in shown)
    lines = []
    for index in shown:
        accuracy = float(accuracies[index])
        if accuracy == accuracy:  # not NaN
            run.writer.add_scalar(f"{tag}/{names[index]}", accuracy, run.step)
            lines.append(f"  {names[index]:<{width}} {accuracy:7.1%}")
    of = f" of the {len(shown)} with most images, of {len(names):,}," if len(shown) < len(names) else ""
    log.info("accuracy of each class%s on the %s split\n%s", of, run.split_name, "\n".join(lines))
