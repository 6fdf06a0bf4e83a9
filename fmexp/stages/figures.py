"""What stages have in common: the size and words of figures, drawn without pyplot's global state, and their tags."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fmexp.engine.evaluation import Evaluation
from fmexp.run import Run

# Pixels. TensorBoard's cards are 350 wide in IMAGES and 215 high in TIME SERIES, and show a larger picture by leaving
# out pixels: twice that size loses every other one, which type of SMALL and more survives.
CARD = 700, 430
SMALL = 18
TAGS = 100  # of one stage: TensorBoard draws each, and no one looks at more
POINT = 72 / 100  # of a pixel at matplotlib's 100 dots an inch


def add_figure(run: Run, tag: str, figure: Figure) -> None:
    """Draw a figure and write it as an image at the run's step."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    run.writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], run.step, dataformats="HWC")


def commonest(evaluation: Evaluation) -> list[int]:
    """The classes that have a tag of their own: all, or the TAGS with the most test images, the first ones where equal.

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
