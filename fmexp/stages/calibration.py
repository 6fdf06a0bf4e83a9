"""Whether a probability means what it says: of images at 80 %, are 80 % right?"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fmexp.engine import metrics
from fmexp.run import Run
from fmexp.stages.figures import CARD, POINT, SMALL, add_figure


def calibration(run: Run, *, tag: str) -> None:
    """Draw a reliability diagram: the accuracy of the images in each of 15 bins of the predicted class's probability.

    The gap is the distance to the bin's mean probability; below is the share of images in each bin. The title has the
    expected calibration error, the mean gap of all images: `fmexp.engine.metrics.reliability` has the source.
    """
    seen = run.evaluation
    images, confidence, accuracy = metrics.reliability(seen.probabilities, seen.labels)
    error = metrics.expected_calibration_error(seen.probabilities, seen.labels)
    figure = Figure(figsize=(CARD[0] / 100, CARD[1] / 100), layout="tight")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    left, filled = np.linspace(0, 1, metrics.BINS + 1)[:-1], images > 0
    bars: dict[str, Any] = {"width": 1 / metrics.BINS, "align": "edge"}
    above.bar(left[filled], accuracy[filled], edgecolor="white", label="accuracy", **bars)
    gap = {"bottom": accuracy[filled], "fill": False, "edgecolor": "red", "hatch": "///", "label": "gap"}
    above.bar(left[filled], (confidence - accuracy)[filled], **gap, **bars)
    above.plot((0, 1), (0, 1), color="gray", linestyle="dashed")
    below.bar(left, images / images.sum(), edgecolor="white", color="gray", **bars)
    above.set_title(f"ECE {error:.3f}, {len(seen.labels):,} {run.split_name} images", fontsize=POINT * SMALL)
    above.legend(fontsize=POINT * SMALL, loc="upper left")
    above.set(xlim=(0, 1), ylim=(0, 1))
    below.set_xlabel("probability of the predicted class", fontsize=POINT * SMALL)
    below.set_ylabel("images", fontsize=POINT * SMALL)
    for axes in (above, below):
        axes.tick_params(labelsize=POINT * SMALL)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    add_figure(run, tag, figure)
