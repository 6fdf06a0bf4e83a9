"""The validation split: what epochs are compared by, so that the test split is looked at once, at the end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fmexp.datasets.dataset import Dataset, MapStyle, Split, hold_out, labels, length
from fmexp.errors import ConfigError

SEED = 0  # not the run's: runs of all seeds are compared on the same images


class Relabelled(torch.utils.data.Dataset[Any]):
    """A map-style split whose labels are counted otherwise."""

    def __init__(self, split: MapStyle, numbers: Sequence[int]) -> None:
        self.split, self.numbers = split, numbers

    def __len__(self) -> int:
        return length(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.split[index]
        return image, self.numbers[int(label)]


def relabelled(split: Split | MapStyle, numbers: Sequence[int]) -> Split | MapStyle:
    """The split with label i as numbers[i]."""
    if isinstance(split, Split):
        return replace(split, labels=torch.tensor(numbers)[split.labels])
    return Relabelled(split, numbers)


class Part(torch.utils.data.Subset[Any]):
    """Some images of a map-style split, with their labels where it has these."""

    @property
    def targets(self) -> Any:
        known = labels(self.dataset)
        return None if known is None else known[torch.as_tensor(self.indices)]


def with_validation(dataset: Dataset, share: float) -> Dataset:
    """The dataset with a validation split: its own, or else `share` of each class of the training images.

    Of a map-style split without `targets` it is `share` of all images. A class of one image stays as it is. With a
    share of 0 there is no validation split, though the dataset may have one.

    Raises:
        ConfigError: there is nothing to hold out.
    """
    if bool(share) == (dataset.val is not None):  # there is what is wanted
        return dataset
    if not share:
        return replace(dataset, val=None)
    for whole, its_share, divided in _latest:
        if whole is dataset and its_share == share:
            return divided
    train, known = dataset.train, labels(dataset.train)
    count = length(train)
    of = [0] * count if known is None else known.tolist()
    stay, held = hold_out([str(index) for index in range(count)], of, share, SEED)
    if not held:
        raise ConfigError(
            f"train.validation={share:g} holds out no image: no class of the training split has two. "
            "Take train.validation=0, or more images."
        )
    divided = replace(dataset, train=_part(train, stay), val=_part(train, held))
    _latest[:] = [(dataset, share, divided)]
    return divided


_latest: list[tuple[Dataset, float, Dataset]] = []  # for the next member of a sweep


def _part(split: Split | MapStyle, indices: list[int]) -> Split | MapStyle:
    if not isinstance(split, Split):
        return Part(split, indices)
    rows = torch.tensor(indices)
    if split.mapped:  # not copied: it may be larger than the memory
        return replace(split, labels=split.labels[rows], rows=rows if split.rows is None else split.rows[rows])
    return Split(split.images[rows], split.labels[rows])
