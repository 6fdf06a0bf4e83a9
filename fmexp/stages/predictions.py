"""The current batch's first images with what the model says of them."""

import torch
from matplotlib.figure import Figure

from fmexp.figures import add_figure
from fmexp.run import Run


def predictions(run: Run, *, tag: str, images: int) -> None:
    """Draw images with "<predicted class>, <probability>%" and the label, green where they agree and red where not."""
    pixels, labels = (part[:images] for part in run.batch)
    with torch.no_grad():
        probabilities = run.model(pixels).softmax(1)
    shown = run.dataset.displayable(pixels).permute(0, 2, 3, 1)
    figure = Figure(figsize=(3 * len(shown), 3), layout="tight")
    for i, (image, chances, label) in enumerate(zip(shown, probabilities.tolist(), labels.tolist(), strict=True)):
        axes = figure.add_subplot(1, len(shown), i + 1, xticks=[], yticks=[])
        axes.imshow(image.squeeze(-1).numpy(), cmap="Greys", vmin=0, vmax=1)
        guess = max(range(len(chances)), key=chances.__getitem__)
        names = run.dataset.classes
        axes.set_title(
            f"{names[guess]}, {chances[guess]:.1%}\n(label: {names[label]})", color="green" if guess == label else "red"
        )
    add_figure(run, tag, figure)
