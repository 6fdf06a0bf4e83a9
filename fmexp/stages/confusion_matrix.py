"""Which class is taken for which, on the test split."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from fmexp.run import Run
from fmexp.stages.figures import CARD, POINT, SMALL, add_figure, percent, short

NUMBERED = 40  # classes up to which a cell has room for a number, and each class for its name


def confusion_matrix(run: Run, *, tag: str) -> None:
    """Draw the share in per cent of each class's test images (row) that was taken for each class (column)."""
    counts, names = run.evaluation.confusion, run.dataset.classes
    totals, right = counts.sum(1), int(counts.diagonal().sum())
    shares = counts / totals.clamp(min=1)[:, None]
    grown = min(max(len(names) / 12, 1), 2)  # the more classes the larger, but no larger than a screen
    figure = Figure(figsize=(grown * CARD[0] / 100, grown * CARD[1] / 100), layout="tight")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    size = POINT * SMALL * grown
    total = int(totals.sum())
    axes.set_title(f"accuracy {percent(right, total, 1)}%, {total:,} test images", fontsize=size)
    axes.set_xlabel("predicted (% of the actual class)", fontsize=size)
    axes.set_ylabel("actual", fontsize=size)
    bar = figure.colorbar(image, ticks=[0, 0.5, 1], format=PercentFormatter(1), pad=0.02, fraction=0.04)
    bar.ax.tick_params(labelsize=size)
    _number(axes, names, counts, shares, POINT * min(SMALL, 0.7 * grown * CARD[1] / len(names)))
    add_figure(run, tag, figure)


def _number(axes: Axes, names: Sequence[str], counts: Tensor, shares: Tensor, size: float) -> None:
    """Write the names at the axes and the shares into the cells, in type of `size` points."""
    places = range(0, len(names), math.ceil(len(names) / NUMBERED))
    labels = [short(names[place], 16) for place in places]
    size = max(size, POINT * 10)
    axes.set_yticks(places, labels, fontsize=size)
    axes.set_xticks(places, labels, fontsize=size)
    if sum(map(len, labels)) > 40:  # beside each other they would be wider than the card
        axes.tick_params(axis="x", rotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    if len(names) <= NUMBERED:
        totals = counts.sum(1)
        for row, column in counts.nonzero().tolist():
            text = percent(int(counts[row, column]), int(totals[row]))
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
