"""A dataset of one's own: images striped either along or across, in noise."""

import torch

from fmexp.datasets import Dataset, Split

CLASSES = ("along", "across")


def stripes(*, count: int, width: int, seed: int = 0) -> Dataset:
    """Make `count` training images, and half as many to test, uint8 [1, 12, 20], with stripes `width` pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    return Dataset(
        _split(count, width, generator), _split(count // 2, width, generator), CLASSES, description=f"{count} stripes"
    )


def _split(count: int, width: int, generator: torch.Generator) -> Split:
    labels = torch.arange(count) % 2
    rows, columns = (torch.arange(side) // width % 2 * 200 for side in (12, 20))
    patterns = torch.stack([rows[:, None].expand(12, 20), columns.expand(12, 20)])
    noise = torch.randint(0, 50, (count, 12, 20), generator=generator)
    return Split((patterns[labels] + noise).to(torch.uint8)[:, None], labels)
