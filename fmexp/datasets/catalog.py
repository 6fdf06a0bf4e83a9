"""The datasets that YAML can name: each is a function that returns a `Dataset`."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fmexp.datasets.dataset import Dataset, Split
from fmexp.datasets.download import Remote, fetch, open_checked, read_idx
from fmexp.errors import DataError

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle Boot",
)  # fmt: skip
HINT = "dataset=synthetic needs no files and no network; dataset.root=<folder> or FMEXP_DATA names another folder"


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
        archive = Remote(CIFAR10.filename, CIFAR10.tgz_md5)
        fetch([archive], folder, mirrors, download=download, hint=HINT)
        open_checked(folder, archive)
        with tempfile.TemporaryDirectory(dir=folder) as unpacked, suppress(OSError):  # another process may be first
            extract_archive(str(folder / archive.name), unpacked)
            os.rename(Path(unpacked) / CIFAR10.base_folder, folder / CIFAR10.base_folder)
    try:
        splits = [CIFAR10(root, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(
            f"{folder / CIFAR10.base_folder}: {error}. Delete this folder and run again to unpack it again."
        ) from error
    train, test = (
        Split(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
        for split in splits
    )
    return Dataset(train, test, [name.capitalize() for name in splits[0].classes], description="CIFAR-10")


def synthetic(train_size: int = 12_000, test_size: int = 2_000, image_size: int = 28, seed: int = 0) -> Dataset:
    """Ten garments drawn by `fmexp.datasets.garments`, uint8 [1, image_size, image_size]; the splits share no image."""
    from fmexp.datasets.garments import draw

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
    remotes = [Remote(*known) for known in zip(_IDX_FILES, _IDX_MD5[name], strict=True)]
    fetch(remotes, folder, mirrors, download=download, hint=HINT)
    arrays = [torch.from_numpy(read_idx(folder, remote)) for remote in remotes]
    splits = []
    for (images, image_file), (labels, label_file) in _pairs(list(zip(arrays, remotes, strict=True))):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            raise DataError(
                f"{folder}: {image_file.name} has shape {list(images.shape)} and "
                f"{label_file.name} {list(labels.shape)}; expected [N, height, width] and [N]. "
                "Delete both and run again to download them."
            )
        if int(labels.max()) >= len(classes):
            raise DataError(
                f"{folder / label_file.name}: label {int(labels.max())} is out of range 0 to {len(classes) - 1}. "
                "Delete the file and run again to download it."
            )
        splits.append(Split(images[:, None], labels.long()))
    return Dataset(splits[0], splits[1], classes, description=name)


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
