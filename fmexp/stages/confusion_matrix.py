"""Which class is taken for which, on the test split."""

from matplotlib.figure import Figure

from fmexp.figures import add_figure
from fmexp.run import Run


def confusion_matrix(run: Run, *, tag: str) -> None:
    """Draw how many images of each class (row) were taken for each class (column), coloured by the share of the row."""
    counts = run.evaluation.confusion
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    names = run.dataset.classes
    side = 2 + 0.6 * len(names)
    figure = Figure(figsize=(side, side), layout="tight")
    axes = figure.add_subplot(xlabel="predicted", ylabel="actual")
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row in range(len(names)):
        for column in range(len(names)):
            if count := int(counts[row, column]):
                share = float(shares[row, column])
                axes.text(column, row, f"{count}\n{share:.0%}", ha="center", va="center", fontsize=7,
                          color="white" if share > 0.5 else "black")  # fmt: skip
    add_figure(run, tag, figure)
