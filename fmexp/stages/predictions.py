"""The current batch's first images with what the model says of them."""

from functools import lru_cache

import torch
from matplotlib.figure import Figure

from fmexp.figures import add_figure
from fmexp.run import Run


def predictions(run: Run, *, tag: str, images: int) -> None:
    """Draw images with "<predicted class>, <probability>%" and the label, green where they agree and red where not."""
    pixels, labels = (part[:images] for part in run.batch)
    with torch.no_grad():
        probabilities = run.model(pixels).softmax(1)
    shown = run.dataset.displayable(pixels).permute(0, 2, 3, 1).squeeze(-1).numpy()
    figure = _blank(len(shown), shown.shape[1:])
    names = run.dataset.classes
    for axes, image, chances, label in zip(figure.axes, shown, probabilities.tolist(), labels.tolist(), strict=True):
        guess = max(range(len(chances)), key=chances.__getitem__)
        if axes.images:  # a new one takes longer
            axes.images[0].set_data(image)
        else:
            axes.imshow(image, cmap="Greys", vmin=0, vmax=1)
        axes.set_title(
            f"{names[guess]}, {chances[guess]:.1%}\n(label: {names[label]})",
            color="green" if guess == label else "red",
            y=1,  # else matplotlib searches a place for it
        )
    add_figure(run, tag, figure)


@lru_cache(maxsize=1)
def _blank(count: int, shape: tuple[int, ...]) -> Figure:
    """A figure of 3x3 inches an image of that shape, kept because making one takes longer than drawing it."""
    figure = Figure(figsize=(3 * count, 3))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.03, top=0.82)
    for place in range(count):
        figure.add_subplot(1, count, place + 1, xticks=[], yticks=[])
    return figure
