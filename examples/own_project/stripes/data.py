"""The dataset: images with stripes that run along or across, in noise."""

import torch

from fmexp.datasets import Dataset, Split

CLASSES = ("along", "across")
HEIGHT, WIDTH = 12, 20


def stripes(*, count: int, width: int, noise: int, seed: int) -> Dataset:
    """Draw `count` images to train on, and half as many to test, with stripes `width` pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    train, test = (_split(size, width, noise, generator) for size in (count, count // 2))
    return Dataset(train, test, CLASSES, description=f"{count} stripes")


def _split(count: int, width: int, noise: int, generator: torch.Generator) -> Split:
    """Images uint8 [N, 1, 12, 20] and their labels: stripes of 0 and 60, and up to `noise` on top of each pixel."""
    labels = torch.arange(count) % len(CLASSES)
    rows, columns = (torch.arange(side) // width % 2 * 60 for side in (HEIGHT, WIDTH))
    patterns = torch.stack([rows[:, None].expand(HEIGHT, WIDTH), columns.expand(HEIGHT, WIDTH)])
    drawn = torch.randint(0, noise + 1, (count, HEIGHT, WIDTH), generator=generator)
    return Split((patterns[labels] + drawn).to(torch.uint8)[:, None], labels)
