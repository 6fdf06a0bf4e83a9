"""A dataset: two splits, the names of the classes, the normalisation; and how a configuration's is built."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fmexp import rng
from fmexp.config.hydra_versions import instantiate
from fmexp.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """Images and labels in memory: uint8 [N, C, H, W] and int64 [N].

    Attributes:
        mapped: the images are in a file that is mapped into memory. They stay there, and only batches go to a GPU.
    """

    images: Tensor
    labels: Tensor
    mapped: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return self if self.mapped else Split(self.images.to(device), self.labels.to(device))


MapStyle = torch.utils.data.Dataset[Any]


@dataclass(frozen=True)
class Dataset:
    """Two splits, the names of the classes, and the normalisation (bytes / 255 - mean) / std for each channel.

    A map-style split yields images that are normalised already; mean and std then serve to show them.
    """

    train: Split | MapStyle
    test: Split | MapStyle
    classes: Sequence[str]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    description: str = ""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        if isinstance(self.train, Split):
            image = self.train.images[0]
        else:
            with rng.fork(0):  # looking at an augmented image draws random numbers
                image = self.train[0][0]
        channels, height, width = image.shape
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        """The same dataset with the splits that are in memory on `device`."""
        train, test = (part.to(device) if isinstance(part, Split) else part for part in (self.train, self.test))
        return replace(self, train=train, test=test)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, as `normalise` does."""
        return normalise(images, self.mean, self.std)

    def displayable(self, images: Tensor) -> Tensor:
        """Normalised [B, C, H, W] -> float32 in [0, 1] on the CPU: the bytes that were normalised, divided by 255."""
        images = images.detach().to("cpu", torch.float32)
        mean, std = (_per_channel(tuple(values), images.device) for values in (self.mean, self.std))
        pixels = images * std + mean
        return pixels.clamp(0, 1).mul(255).round().div(255)  # rounded, for TensorBoard cuts off: 0.9999 becomes 0

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Random training images, normalised, and their labels; drawn from the global random state."""
        chosen = torch.randperm(length(self.train))[:count]
        return self.take(self.train, chosen)

    def take(self, split: Split | MapStyle, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised images float32 [B, C, H, W] and labels int64 [B] at `indices`."""
        if isinstance(split, Split):
            indices = indices.to(split.labels.device)
            return self.normalise(split.images.index_select(0, indices)), split.labels.index_select(0, indices)
        pairs = [split[index] for index in indices.tolist()]
        return torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, C, H, W] -> float32, the very bits of torchvision's ToTensor and Normalize."""
    scale, shift, width = (_per_channel(tuple(values), images.device) for values in ((255.0,), mean, std))
    return images.to(torch.float32).div_(scale).sub_(shift).div_(width)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor | float:
    """Values a channel, to broadcast over [B, C, H, W]; one number where they are equal, and it is as good."""
    if device.type != "cuda" and len(set(values)) == 1:
        return values[0]
    # CUDA multiplies by the reciprocal of a number, which has other bits, and cannot copy from the host in a graph.
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def length(split: Split | MapStyle) -> int:
    """How many images a split has."""
    return len(split)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__


def load(cfg: DictConfig) -> Dataset:
    """The dataset that a configuration names. The latest one is kept, for the next member of a sweep."""
    node = json.dumps(OmegaConf.to_container(cfg, resolve=True), sort_keys=True)
    if node not in _latest:
        rng.seed_all(0)  # what the data is does not depend on the run's seed, unless its YAML says so
        dataset = instantiate(cfg)
        _latest.clear()
        _latest[node] = dataset
    return _latest[node]


_latest: dict[str, Dataset] = {}


def check(dataset: Dataset) -> None:
    """Raise ConfigError for a dataset that cannot be trained on."""
    for name in ("train", "test"):
        if length(getattr(dataset, name)) == 0:
            raise ConfigError(f"dataset: the {name} split is empty.")
    if len(dataset.classes) < 2:
        raise ConfigError(f"dataset: {len(dataset.classes)} class is too few; a classifier needs two.")


def hold_out(names: Sequence[str], labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide images into those that stay and those that are held out, `share` of each class: the indices, in order.

    It depends on the seed and the names alone, so that images which come or go move few of the others. Of a class that
    has two images or more at least one is held out, and one stays.
    """
    drawn = {index: hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest() for index, name in enumerate(names)}
    groups: dict[int, list[int]] = {}
    for index in sorted(drawn, key=drawn.__getitem__):
        groups.setdefault(labels[index], []).append(index)
    held = {i for group in groups.values() for i in group[: min(len(group) - 1, max(1, round(share * len(group))))]}
    return [i for i in drawn if i not in held], sorted(held)
