"""What stages have in common: the size and words of figures, drawn without pyplot's global state, and their tags."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fmexp.engine.evaluation import Evaluation
from fmexp.run import Run

# Pixels. TensorBoard's cards are 350 wide in IMAGES and 215 high in TIME SERIES, and show a larger picture by leaving
# out pixels: twice that size loses every other one, which type of SMALL and more survives.
CARD = 700, 430
SMALL = 18
TAGS = 100  # of one stage: TensorBoard draws each, and no one looks at more
POINT = 72 / 100  # of a pixel at matplotlib's 100 dots an inch
COLUMNS = 4  # of images with words above them


def add_figure(run: Run, tag: str, figure: Figure) -> None:
    """Draw a figure and write it as an image at the run's step."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    run.writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], run.step, dataformats="HWC")


def judged(pixels: Tensor, chances: Sequence[float], guesses: Sequence[str], labels: Sequence[str]) -> Figure:
    """Draw images, float32 [N, C, H, W] in [0, 1], in rows of four.

    Above each are the predicted class, its probability and the label, green where they agree and red where not.
    """
    shown = pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()
    figure = _blank(len(shown), shown.shape[1:])
    for axes, image, chance, guess, label in zip(figure.axes, shown, chances, guesses, labels, strict=True):
        if axes.images:  # a new one takes longer
            axes.images[0].set_data(image)
        else:
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(
            f"{short(guess, 11)}\n{chance:.1%}\nlabel: {short(label, 11)}",  # as wide as an image
            color="green" if guess == label else "red",
            fontsize=POINT * SMALL,
            y=1,  # else matplotlib searches a place for it
        )
    return figure


@lru_cache(maxsize=2)  # predictions' and mistakes'
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


def commonest(evaluation: Evaluation) -> list[int]:
    """The classes that have a tag of their own: all, or the TAGS with the most images, the first ones where equal.

    So they are the same at every step and in every member of a sweep.
    """
    return sorted(evaluation.images_per_class.argsort(descending=True, stable=True)[:TAGS].tolist())


def short(name: str, limit: int) -> str:
    """A name in at most `limit` letters, cut in its middle, for names that are alike often differ at one end."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-((limit - 1) // 2) :]}"


def percent(part: int, whole: int, digits: int = 0) -> str:
    """A share in per cent, rounded, that says 0 or 100 only where none or all are meant: "<1", "12", ">99"."""
    step = 10**-digits
    value = 100 * part / whole
    if 0 < value < step:
        return f"<{step:.{digits}f}"
    if 100 - step < value < 100:
        return f">{100 - step:.{digits}f}"
    return f"{value:.{digits}f}"
