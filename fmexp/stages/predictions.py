"""The current batch's first images with what the model says of them."""

import torch

from fmexp.run import Run
from fmexp.stages.figures import add_figure, judged


def predictions(run: Run, *, tag: str, images: int) -> None:
    """Draw images with the predicted class, its probability and the label, green where they agree and red where not.

    The images are in rows of four, light and dark as image_grid shows them.
    """
    pixels, labels = (part[:images] for part in run.batch)
    labels = labels.argmax(1) if labels.ndim == 2 else labels  # of a mixture the class that has most of it
    with torch.no_grad():
        chances, guesses = run.model(pixels).softmax(1).max(1)
    names = ([run.dataset.classes[index] for index in which.tolist()] for which in (guesses, labels))
    add_figure(run, tag, judged(run.dataset.displayable(pixels), chances.tolist(), *names))
