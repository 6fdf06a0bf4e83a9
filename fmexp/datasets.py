"""The datasets that YAML can name, and how their batches are made.

A dataset function returns a `Dataset`. Its splits are held in memory as bytes (`Split`) and normalised a batch at a
time, or are any map-style torch Dataset of (float image, label), which then goes through a DataLoader.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from fmexp import files, randomness
from fmexp.errors import ConfigError, DataError
from fmexp.hydra_versions import instantiate
from fmexp.stop import held_back, patient

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle Boot",
)  # fmt: skip
BLOCK = 2**21  # bytes of images that are normalised at once, to stay in a cache
HINT = "dataset=synthetic needs no files and no network; dataset.root=<folder> or FMEXP_DATA names another folder"


@dataclass(frozen=True)
class Split:
    """Images and labels in memory: uint8 [N, C, H, W] and int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


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
            with randomness.forked(0):  # looking at an augmented image draws random numbers
                image = self.train[0][0]
        channels, height, width = image.shape
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        """The same dataset with the splits that are in memory on `device`."""
        train, test = (part.to(device) if isinstance(part, Split) else part for part in (self.train, self.test))
        return replace(self, train=train, test=test)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, the very bits of torchvision's ToTensor and Normalize."""
        scale, mean, std = (_per_channel(tuple(values), images.device) for values in ((255.0,), self.mean, self.std))
        return images.to(torch.float32).div_(scale).sub_(mean).div_(std)

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


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the training images in an epoch, int64 [count]: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(randomness.key(seed, "order", epoch)))


def batches(
    dataset: Dataset,
    split: Split | MapStyle,
    indices: Tensor,
    batch_size: int,
    *,
    device: torch.device,
    num_workers: int = 0,
    seed: tuple[int, int] = (0, 0),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [B, C, H, W], labels int64 [B]) on `device`, in the order of `indices`.

    Args:
        num_workers: processes that load a map-style split.
        seed: (seed, epoch). A map-style split's own randomness (augmentation) is seeded with these and the sample's
            index, so that it does not depend on the workers or on where in the epoch one begins.
    """
    if isinstance(split, Split):
        # Many small batches at a time, for calling a kernel takes longer than a small one does. Not where a batch would
        # begin within 64 bytes: a resumed run begins elsewhere, and kernels may round by how memory is aligned.
        size = 4 * batch_size * split.images[0].numel()
        together = max(1, BLOCK // size) if device.type == "cpu" and size % 64 == 0 else 1
        for block in indices.to(split.labels.device).split(together * batch_size):
            images, labels = dataset.take(split, block)
            for pair in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                yield pair[0].detach(), pair[1].detach()  # else autograd knows them as views of one, not to be changed
        return
    loader = DataLoader(
        _Seeded(split, *seed),
        batch_sampler=[chosen.tolist() for chosen in indices.split(batch_size)],
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that starting an epoch takes nothing from the global one
        pin_memory=device.type == "cuda",
        worker_init_fn=patient,
    )
    with held_back():
        started = iter(loader)
    for images, labels in started:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _Seeded(torch.utils.data.Dataset[Any]):
    def __init__(self, split: MapStyle, seed: int, epoch: int) -> None:
        self.split, self.seed, self.epoch = split, seed, epoch

    def __getitem__(self, index: int) -> Any:
        with randomness.forked(randomness.key(self.seed, "sample", self.epoch, index)):
            return self.split[index]


def fashion_mnist(root: str, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 images, uint8 [1, 28, 28]."""
    return _idx("FashionMNIST", GARMENTS, root, download, mirrors)


def mnist(root: str, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 handwritten digits, uint8 [1, 28, 28]."""
    return _idx("MNIST", [str(digit) for digit in range(10)], root, download, mirrors)


def kmnist(root: str, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """Kuzushiji-MNIST (Clanuwat et al., arXiv 1812.01718): 60,000 + 10,000 characters, uint8 [1, 28, 28]."""
    return _idx("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), root, download, mirrors)


def cifar10(root: str, download: bool = True, mirrors: Sequence[str] = ()) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs, uint8 [3, 32, 32]."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    folder = Path(root).absolute()  # so that an error says where it was looked for
    if not (folder / CIFAR10.base_folder).is_dir():
        archive = files.Remote(CIFAR10.filename, CIFAR10.tgz_md5)
        files.fetch([archive], folder, mirrors, download=download, hint=HINT)
        files.open_checked(folder, archive)
        with tempfile.TemporaryDirectory(dir=folder) as unpacked, suppress(OSError):  # another process may be first
            extract_archive(str(folder / archive.name), unpacked)
            os.rename(Path(unpacked) / CIFAR10.base_folder, folder / CIFAR10.base_folder)
    try:
        splits = [CIFAR10(root, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(
            f"{folder / CIFAR10.base_folder}: {error}. Delete this folder and run again to unpack it anew."
        ) from error
    train, test = (
        Split(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
        for split in splits
    )
    return Dataset(train, test, [name.capitalize() for name in splits[0].classes], description="CIFAR-10")


def synthetic(train_size: int = 12_000, test_size: int = 2_000, image_size: int = 28, seed: int = 0) -> Dataset:
    """Ten garments drawn by `fmexp.synthetic`, uint8 [1, image_size, image_size]; the splits share no image."""
    from fmexp.synthetic import draw

    train, test = (
        Split(*map(torch.from_numpy, draw(count, 2 * seed + part, image_size)))
        for part, count in enumerate((train_size, test_size))
    )
    return Dataset(train, test, GARMENTS, description="synthetic garments, drawn by fmexp: no photographs")


# torchvision has the same (a test compares them), but importing it takes longer than reading the files.
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_IDX_MD5 = {
    "FashionMNIST": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "MNIST": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "KMNIST": (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
}


def _idx(name: str, classes: Sequence[str], root: str, download: bool, mirrors: Sequence[str]) -> Dataset:
    folder = Path(root).absolute() / name / "raw"  # where torchvision keeps them; absolute, for errors name it
    remotes = [files.Remote(*known) for known in zip(_IDX_FILES, _IDX_MD5[name], strict=True)]
    files.fetch(remotes, folder, mirrors, download=download, hint=HINT)
    arrays = [torch.from_numpy(files.read_idx(folder, remote)) for remote in remotes]
    splits = []
    for (images, image_file), (labels, label_file) in _pairs(list(zip(arrays, remotes, strict=True))):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            raise DataError(
                f"{folder}: {image_file.name} has shape {list(images.shape)} and "
                f"{label_file.name} {list(labels.shape)}; expected [N, height, width] and [N]. "
                "Delete both and run again to download them anew."
            )
        if int(labels.max()) >= len(classes):
            raise DataError(
                f"{folder / label_file.name}: label {int(labels.max())} is out of range 0 to {len(classes) - 1}. "
                "Delete the file and run again to download it anew."
            )
        splits.append(Split(images[:, None], labels.long()))
    return Dataset(splits[0], splits[1], classes, description=name)


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def load(cfg: DictConfig) -> Dataset:
    """The dataset that a configuration names. The latest one is kept, for the next member of a sweep."""
    node = json.dumps(OmegaConf.to_container(cfg, resolve=True), sort_keys=True)
    if node not in _latest:
        randomness.seed_all(0)  # what the data is does not depend on the run's seed, unless its YAML says so
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
