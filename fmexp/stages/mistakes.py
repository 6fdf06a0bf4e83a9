"""The evaluated images that the model is surest of and wrong about: wrong labels in the data are often among them."""

from matplotlib.figure import Figure

from fmexp.run import Run
from fmexp.stages.figures import CARD, POINT, SMALL, add_figure, judged


def mistakes(run: Run, *, tag: str, images: int) -> None:
    """Draw the wrong images of the highest probability, the surest first, the first ones where equal.

    Each has the predicted class, its probability and the label, in rows of four.
    """
    seen = run.evaluation
    wrong = (seen.guesses != seen.labels).nonzero().flatten()
    if not len(wrong):
        add_figure(run, tag, _none(len(seen.labels), run.split_name))
        return
    chances = seen.probabilities[wrong, seen.guesses[wrong]]
    order = chances.argsort(descending=True, stable=True)[:images]
    shown = wrong[order]
    pixels, _ = run.dataset.take(run.dataset.splits[run.split], shown)
    names = ([run.dataset.classes[index] for index in which[shown].tolist()] for which in (seen.guesses, seen.labels))
    add_figure(run, tag, judged(run.dataset.displayable(pixels), chances[order].tolist(), *names))


def _none(images: int, split: str) -> Figure:
    figure = Figure(figsize=(CARD[0] / 100, CARD[1] / 100))
    figure.text(0.5, 0.5, f"no mistake in {images:,} {split} images", ha="center", va="center", fontsize=POINT * SMALL)
    return figure
