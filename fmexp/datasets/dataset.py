"""A dataset: two splits, the names of the classes, the normalisation; and how a configuration's is built."""

import hashlib
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from numbers import Real
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fmexp import rng
from fmexp.config.hydra_versions import instantiate
from fmexp.config.identity import OWN
from fmexp.errors import ConfigError, DataError, is_utf8


@dataclass(frozen=True)
class Split:
    """Images and labels in memory: uint8 [N, C, H, W] and int64 [N].

    Attributes:
        mapped: the images are in a file that is mapped into memory. They stay there, and only batches go to a GPU.
        rows: which of `images` are the split's, int64 [N], where it is a part of such a file; None: all of them.
    """

    images: Tensor
    labels: Tensor
    mapped: bool = field(default=False, kw_only=True)
    rows: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return self if self.mapped else Split(self.images.to(device), self.labels.to(device))


MapStyle = torch.utils.data.Dataset[Any]
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}  # in words
MOST_NUMBERS = 2**28  # of an image, in a file that says how large they are


@dataclass(frozen=True)
class Fit:
    """How a picture of any size becomes one of the images.

    Attributes:
        crop: cut out the middle, after the shortest side was brought to the size of the images; else the whole picture
            is squeezed into that.
        resize: the pixels of the shortest side before the middle is cut out; None: as many as the images have.
    """

    crop: bool = False
    resize: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Its splits, the names of the classes, and the normalisation (bytes / 255 - mean) / std for each channel.

    A map-style split yields bytes, or float32 that is normalised already; mean and std then serve to show them.

    Attributes:
        val: what epochs are compared by, where there is one (train.validation).
        fit: how pictures that are predicted after a run are brought to the size of the images.
    """

    train: Split | MapStyle
    test: Split | MapStyle
    classes: Sequence[str]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    description: str = ""
    val: Split | MapStyle | None = None
    fit: Fit = field(default=Fit(), kw_only=True)

    @property
    def splits(self) -> dict[str, Split | MapStyle]:
        """The splits that there are, by name: train, perhaps val, test."""
        every = {name: getattr(self, name) for name in SPLIT_NAMES}
        return {name: split for name, split in every.items() if split is not None}

    @cached_property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the first training image."""
        if isinstance(self.train, Split):
            image = self.train.images[0]
        else:
            with rng.fork(0):  # looking at an augmented image draws random numbers
                image = self.train[0][0]
        channels, height, width = image.shape
        return channels, height, width

    @property
    def facts(self) -> dict[str, Any]:
        """All that is needed to give a model that was trained on it other images, for result.json."""
        numbers = {name: [float(value) for value in getattr(self, name)] for name in ("mean", "std")}
        shape = [int(side) for side in self.input_shape]
        return {"classes": [*self.classes], "input_shape": shape, **numbers, "fit": asdict(self.fit)}

    def to(self, device: torch.device) -> "Dataset":
        """The same dataset with the splits that are in memory on `device`."""
        moved = {name: split.to(device) for name, split in self.splits.items() if isinstance(split, Split)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, as `normalise` does."""
        return normalise(images, self.mean, self.std)

    def displayable(self, images: Tensor) -> Tensor:
        """Normalised [B, C, H, W] -> float32 in [0, 1] on the CPU: the bytes that were normalised, divided by 255."""
        images = images.detach().to("cpu", torch.float32)
        mean, std = (_per_channel(tuple(values), images.device) for values in (self.mean, self.std))
        pixels = images * std + mean
        return pixels.clamp(0, 1).mul(255).round().div(255)  # rounded, for TensorBoard cuts off: 0.9999 becomes 0

    def sample(self, count: int, *, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Random training images and their labels, as `take` gives them; drawn from the global random state."""
        chosen = torch.randperm(length(self.train))[:count]
        return self.take(self.train, chosen, raw=raw)

    def take(self, split: Split | MapStyle, indices: Tensor, *, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The images float32 [B, C, H, W], normalised, and labels int64 [B] at `indices`; `raw`: not normalised."""
        if isinstance(split, Split):
            indices = indices.to(split.labels.device)
            rows = indices if split.rows is None else split.rows[indices]
            images, labels = split.images.index_select(0, rows), split.labels.index_select(0, indices)
        else:
            images, labels = stack(self.samples_at(split, indices.tolist()))
        return images if raw else self.ready(images), labels

    def ready(self, images: Tensor) -> Tensor:
        """Images as a split has them, normalised where they are bytes."""
        return self.normalise(images) if images.dtype == torch.uint8 else images

    def samples_at(self, split: MapStyle, indices: list[int]) -> list[tuple[Tensor, int]]:
        """What `sample_at` gives for each index, asked for together where the split has torch's `__getitems__`."""
        if not hasattr(split, "__getitems__"):
            return [self.sample_at(split, index) for index in indices]
        try:
            samples = split.__getitems__(indices)
        except OSError:
            for index in indices:
                self.sample_at(split, index)  # names the one that cannot be read
            raise
        if len(samples) != len(indices):
            raise DataError(f"dataset: __getitems__ of {_kind(split)} gave {len(samples)} of {len(indices)} images.")
        return [self._checked(split, *pair) for pair in zip(indices, samples, strict=True)]

    def sample_at(self, split: MapStyle, index: int) -> tuple[Tensor, int]:
        """The image, uint8 or float32 [C, H, W], and the label at `index` of a map-style split.

        Raises:
            DataError: it cannot be read, or nothing can be trained on it.
        """
        try:
            sample = split[index]
        except OSError as error:
            raise DataError(f"dataset: {self._name(split)} image {index} cannot be read: {error}") from error
        return self._checked(split, index, sample)

    def _name(self, split: MapStyle) -> str:
        return next((SPLIT_NAMES[name] for name, part in self.splits.items() if part is split), "test")

    def _checked(self, split: MapStyle, index: int, sample: Any) -> tuple[Tensor, int]:
        if problem := _wrong_sample(sample, len(self.classes)):
            raise DataError(f"dataset: {self._name(split)} image {index}: {problem}")
        image, label = sample
        if tuple(image.shape) != self.input_shape:
            raise DataError(
                f"dataset: {self._name(split)} image {index} has shape {list(image.shape)}, the first training "
                f"image {list(self.input_shape)}. All need the same: resize or crop them."
            )
        return image, int(label)


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


def labels(split: Split | MapStyle) -> Tensor | None:
    """All labels of a split, int64 [N]: of a map-style one those in its `targets`, or None where it has none."""
    if isinstance(split, Split):
        return split.labels
    targets = getattr(split, "targets", None)
    return None if targets is None else torch.as_tensor(targets)


def length(split: Split | MapStyle) -> int:
    """How many images a split has."""
    return len(split)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__


def load(cfg: DictConfig) -> Dataset:
    """The dataset that a configuration names. The latest one is kept, for the next member of a sweep."""
    arguments: dict[Any, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    arguments.pop(OWN, None)
    node = json.dumps(arguments, sort_keys=True)
    if node not in _latest:
        rng.seed_all(0)  # what the data is does not depend on the run's seed, unless its YAML says so
        dataset = instantiate(arguments)
        _latest.clear()
        _latest[node] = dataset
    return _latest[node]


_latest: dict[str, Dataset] = {}


def stack(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """One batch, uint8 or float32 [B, C, H, W] and int64 [B], of what `Dataset.sample_at` gives."""
    if len({image.dtype for image, _ in samples}) > 1:
        raise DataError("dataset: some images are uint8 and others float32. All of a split need the same.")
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise DataError for what is there and no file: a named pipe that is opened blocks for ever."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise DataError(f"{path} is a folder, a named pipe or a device where a file is needed.")


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


def blank(facts: dict[str, Any]) -> Dataset:
    """A dataset with the `facts` of another one, and one black image in each split.

    Raises:
        ConfigError, KeyError, TypeError, ValueError: these are no facts of a dataset.
    """
    shape = [operator.index(side) for side in facts["input_shape"]]
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > MOST_NUMBERS:
        raise ValueError(f"input_shape is {shape}")
    crop, resize = (facts["fit"][name] for name in ("crop", "resize"))
    if not isinstance(crop, bool) or not (resize is None or operator.index(resize) >= max(shape[1:])):
        raise ValueError(f"fit is {facts['fit']}")
    split = Split(torch.zeros(1, *shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    mean, std = (tuple(facts[name]) for name in ("mean", "std"))
    dataset = Dataset(split, split, facts["classes"], mean, std, fit=Fit(crop, resize))
    check(dataset)
    return dataset


def check(dataset: Dataset) -> None:
    """Raise ConfigError or DataError for a dataset that cannot be trained on.

    All of a split in memory is looked at, and the first image of a map-style one; the others are when they are loaded.
    """
    classes = dataset.classes
    if problem := _wrong_classes(classes):
        raise ConfigError(f"dataset: {problem}")
    for name, split in {"train": dataset.train, "test": dataset.test, **dataset.splits}.items():
        if problem := _wrong_split(split, len(classes)):
            raise ConfigError(f"dataset: the {name} split {problem}")
        if not isinstance(split, Split):
            with rng.fork(0):
                dataset.sample_at(split, 0)
        elif tuple(split.images.shape[1:]) != dataset.input_shape:
            raise ConfigError(
                f"dataset: the {name} split's images have shape {list(split.images.shape[1:])}, those of the train "
                f"split {list(dataset.input_shape)}. All need the same."
            )
    for name, values in (("mean", dataset.mean), ("std", dataset.std)):
        if problem := _wrong_normalisation(values, dataset.input_shape[0], positive=name == "std"):
            raise ConfigError(f"dataset: {name}={values} {problem}")


def _wrong_classes(classes: Any) -> str | None:
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        return f"classes is {_kind(classes)} where a list of names is needed."
    if len(classes) < 2:
        return f"{len(classes)} class is too few; a classifier needs two."
    for name in classes:
        if not isinstance(name, str):
            return f"classes has {name!r}, {_kind(name)}, where each is a name, a str."
        if not is_utf8(name):
            return f"classes has {name!r}, which is not UTF-8. Rename it."
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        return f"classes has {twice[0]!r} more than once; each class needs a name of its own."
    return None


def _wrong_split(split: Any, classes: int) -> str | None:
    if not isinstance(split, Split):
        if not hasattr(split, "__getitem__") or not hasattr(split, "__len__"):
            return f"is {_kind(split)} where a Split, or a map-style dataset with __getitem__ and __len__, is needed."
        return None if len(split) else "is empty."
    images, labels = split.images, split.labels
    for name, given, dtype, shape in (
        ("images", images, torch.uint8, "[N, C, H, W]"),
        ("labels", labels, torch.int64, "[N]"),
    ):
        if not isinstance(given, Tensor) or given.dtype != dtype or given.ndim != shape.count(",") + 1:
            hint = " A map-style dataset may give images that are normalised already." if name == "images" else ""
            return f"has {name} that are {_kind(given)} where a tensor {dtype} {shape} is needed.{hint}"
    if len(images if split.rows is None else split.rows) != len(labels):
        return f"has {len(images)} images and {len(labels)} labels; each image needs one."
    if not len(labels):
        return "is empty."
    if 0 in images.shape:
        return f"has images of shape {list(images.shape[1:])}, without a pixel."
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        return f"has label {least if least < 0 else most}; with {classes} classes they are 0 to {classes - 1}."
    return None


def _wrong_sample(sample: Any, classes: int) -> str | None:
    """What is wrong with an item of a map-style split, but for its shape's being another than others'."""
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        return f"the item is {_kind(sample)} where (image, label) is needed."
    image, label = sample
    types = (torch.uint8, torch.float32)
    if not isinstance(image, Tensor) or image.dtype not in types or image.ndim != 3 or not image.numel():
        return f"it is {_kind(image)} where a tensor torch.uint8, or torch.float32 and normalised, [C, H, W] is needed."
    try:
        number = operator.index(label)  # of Python's, NumPy's and torch's whole numbers
    except TypeError:
        return f"its label is {label!r}, {_kind(label)}, where a whole number is needed."
    if not 0 <= number < classes:
        return f"its label is {number}; with {classes} classes they are 0 to {classes - 1}."
    return None


def _wrong_normalisation(values: Any, channels: int, *, positive: bool) -> str | None:
    if not isinstance(values, Sequence) or not all(isinstance(value, Real) for value in values):
        return "must be a tuple of numbers, one for each channel."
    if len(values) not in (1, channels):
        return f"has {len(values)} numbers; the images have {channels} channels: give 1 or {channels}."
    if not all(map(math.isfinite, values)) or (positive and min(values) <= 0):
        return f"must be finite{' and above 0' if positive else ''}."
    return None


def _kind(value: Any) -> str:
    """A value's type, with dtype and shape where it has them."""
    about = [str(getattr(value, name)) for name in ("dtype", "shape") if hasattr(value, name)]
    return " ".join((f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins."), *about))
