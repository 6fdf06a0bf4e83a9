"""Which class is taken for which."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from fmexp.engine.evaluation import Evaluation
from fmexp.run import Run
from fmexp.stages.figures import CARD, POINT, SMALL, add_figure, percent, short

NUMBERED = 40  # classes up to which a cell has room for a number, and each class for its name
DRAWN = 100  # classes up to which a cell can be seen
PAIRS = 20  # that are named in place of the cells


def confusion_matrix(run: Run, *, tag: str) -> None:
    """Draw the share in per cent of each class's evaluated images (row) that was taken for each class (column).

    With more than 100 classes, draw the pairs of classes that are confused most often, the first ones where equal.
    """
    names = run.dataset.classes
    grown = min(max(len(names) / 12, 1), 2)  # the more classes the larger, but no larger than a screen
    figure = Figure(figsize=(grown * CARD[0] / 100, grown * CARD[1] / 100), layout="tight")
    size = POINT * SMALL * grown
    right, total = (_matrix if len(names) <= DRAWN else _pairs)(figure, run.evaluation, names, size)
    title = f"accuracy {percent(right, total, 1)}%, {total:,} {run.split_name} images"
    figure.axes[0].set_title(title, fontsize=size)
    add_figure(run, tag, figure)


def _matrix(figure: Figure, evaluation: Evaluation, names: Sequence[str], size: float) -> tuple[int, int]:
    """Draw the cells; return how many images are right, and how many there are."""
    axes, counts = figure.add_subplot(), evaluation.confusion
    totals = counts.sum(1)
    shares = counts / totals.clamp(min=1)[:, None]
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xlabel("predicted (% of the actual class)", fontsize=size)
    axes.set_ylabel("actual", fontsize=size)
    bar = figure.colorbar(image, ticks=[0, 0.5, 1], format=PercentFormatter(1), pad=0.02, fraction=0.04)
    bar.ax.tick_params(labelsize=size)
    room = 0.7 * figure.get_size_inches()[1] * 100 / len(names)  # of a row, in pixels
    _number(axes, names, counts, shares, min(POINT * SMALL, POINT * room))
    return int(counts.diagonal().sum()), int(totals.sum())


def _pairs(figure: Figure, evaluation: Evaluation, names: Sequence[str], size: float) -> tuple[int, int]:
    """The same for the pairs of classes."""
    axes, wrong = figure.add_subplot(), evaluation.guesses != evaluation.labels
    pairs = evaluation.labels[wrong] * len(names) + evaluation.guesses[wrong]
    found, counts = pairs.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:PAIRS]
    labels = []
    for place, (pair, count) in enumerate(zip(found[order].tolist(), counts[order].tolist(), strict=True)):
        actual, guess = divmod(pair, len(names))
        share = percent(count, int(evaluation.images_per_class[actual]))
        labels.append(f"{short(names[actual], 16)} \N{RIGHTWARDS ARROW} {short(names[guess], 16)}")
        axes.text(count, place, f" {count} ({share}%)", va="center", fontsize=size * 0.7)
    axes.barh(range(len(labels)), counts[order].tolist())
    axes.set_yticks(range(len(labels)), labels, fontsize=size * 0.7)
    axes.set(xticks=[], xmargin=0.2, ylim=(PAIRS - 0.5, -0.5))
    axes.set_xlabel("images, and % of the actual class", fontsize=size)
    axes.set_ylabel("actual \N{RIGHTWARDS ARROW} predicted", fontsize=size)
    return int((~wrong).sum()), len(wrong)


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
