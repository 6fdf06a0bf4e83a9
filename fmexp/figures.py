"""Matplotlib figures for TensorBoard, drawn without pyplot and its global state."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fmexp.run import Run


def add_figure(run: Run, tag: str, figure: Figure) -> None:
    """Draw a figure and write it as an image at the run's step."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    run.writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], run.step, dataformats="HWC")
