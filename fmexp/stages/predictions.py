"""The current batch's first images with what the model says of them."""

import math
from functools import lru_cache

import torch
from matplotlib.figure import Figure

from fmexp.run import Run
from fmexp.stages.figures import CARD, POINT, SMALL, add_figure, short

COLUMNS = 4


def predictions(run: Run, *, tag: str, images: int) -> None:
    """Draw images with the predicted class, its probability and the label, green where they agree and red where not.

    The images are in rows of four, light and dark as image_grid shows them.
    """
    pixels, labels = (part[:images] for part in run.batch)
    labels = labels.argmax(1) if labels.ndim == 2 else labels  # of a mixture the class that has most of it
    with torch.no_grad():
        probabilities = run.model(pixels).softmax(1)
    shown = run.dataset.displayable(pixels).permute(0, 2, 3, 1).squeeze(-1).numpy()
    figure = _blank(len(shown), shown.shape[1:])
    chances, guesses = (part.tolist() for part in probabilities.max(1))
    for axes, image, chance, guess, label in zip(figure.axes, shown, chances, guesses, labels.tolist(), strict=True):
        words = [short(run.dataset.classes[index], 11) for index in (guess, label)]  # as wide as an image
        if axes.images:  # a new one takes longer
            axes.images[0].set_data(image)
        else:
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(
            f"{words[0]}\n{chance:.1%}\nlabel: {words[1]}",
            color="green" if guess == label else "red",
            fontsize=POINT * SMALL,
            y=1,  # else matplotlib searches a place for it
        )
    add_figure(run, tag, figure)


@lru_cache(maxsize=1)
def _blank(count: int, shape: tuple[int, ...]) -> Figure:
    """A figure for images of that shape, kept because making one takes longer than drawing it."""
    rows, width = math.ceil(count / COLUMNS), CARD[0] / COLUMNS  # in pixels, as all that follows
    side = width - 20
    height = side + 75  # for the three lines of a title
    figure = Figure(figsize=(CARD[0] / 100, rows * height / 100))
    for place in range(count):
        row, column = divmod(place, COLUMNS)
        left, bottom = (column * width + 10) / CARD[0], 1 - ((row + 1) * height - 5) / (rows * height)
        axes = figure.add_axes((left, bottom, side / CARD[0], side / (rows * height)))
        axes.set(xticks=[], yticks=[])
    return figure
