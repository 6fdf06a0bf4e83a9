"""The datasets that YAML can name: each is a function that returns a `Dataset`."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fmexp.datasets.dataset import Dataset, Split
from fmexp.datasets.download import Remote, fetch, open_checked, read_idx
from fmexp.errors import DataError

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle Boot",
)  # fmt: skip
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # of the archive
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
        archive = Remote(CIFAR10.filename, CIFAR10_SHA256, 170_498_071)
        fetch([archive], folder, mirrors, download=download, hint=HINT)
        open_checked(folder, archive)
        try:
            with tempfile.TemporaryDirectory(dir=folder) as unpacked:
                extract_archive(str(folder / archive.name), unpacked)
                with suppress(OSError):  # another process may be first
                    os.rename(Path(unpacked) / CIFAR10.base_folder, folder / CIFAR10.base_folder)
        except OSError as error:
            raise DataError(f"{folder / archive.name} cannot be unpacked: {error}. {HINT}") from error
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


# torchvision has the same names (a test compares them), but importing it takes longer than reading the files.
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_IDX_SHA256 = {  # and bytes
    "FashionMNIST": (
        ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
        ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
        ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
        ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
    ),
    "MNIST": (
        ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9_912_422),
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28_881),
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1_648_877),
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4_542),
    ),
    "KMNIST": (
        ("51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4", 18_165_135),
        ("e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17", 29_497),
        ("edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5", 3_041_136),
        ("20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c", 5_120),
    ),
}


def _idx(name: str, classes: Sequence[str], root: str, download: bool, mirrors: Sequence[str]) -> Dataset:
    folder = Path(root).absolute() / name / "raw"  # where torchvision keeps them; absolute, for errors name it
    remotes = [Remote(file, *known) for file, known in zip(_IDX_FILES, _IDX_SHA256[name], strict=True)]
    fetch(remotes, folder, mirrors, download=download, hint=HINT)
    splits = []
    for image_file, label_file in (remotes[:2], remotes[2:]):
        images, labels = (torch.from_numpy(read_idx(folder, file)) for file in (image_file, label_file))
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
