"""What YAML names as a dataset: the files as they are, and errors that name the file and the cure."""

import gzip
import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms
from tools import write_cifar10, write_idx, write_idx_splits
from torchvision.datasets import CIFAR10

from fmexp import datasets
from fmexp.datasets import Dataset, catalog
from fmexp.errors import DataError

GARMENTS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle Boot"]

DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]

SYLLABLES = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]

CIFAR_CLASSES = ["Airplane", "Automobile", "Bird", "Cat", "Deer", "Dog", "Frog", "Horse", "Ship", "Truck"]


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with its size and the time of its last change in nanoseconds."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (root, *root.rglob("*"))}


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    """Take the right to write from all folders, and fail if something is changed (the superuser may write anyway)."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    before = listing(root)
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert listing(root) == before


def test_the_real_files_are_read_as_they_are(fashion_mnist_root: str) -> None:
    dataset = datasets.fashion_mnist(fashion_mnist_root, download=False)
    for name, split, count in (("train", dataset.train, 60_000), ("t10k", dataset.test, 10_000)):
        raw = Path(fashion_mnist_root) / "FashionMNIST" / "raw"
        pixels = gzip.decompress((raw / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((raw / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        assert split.images.shape == (count, 1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.images.numpy().tobytes() == pixels
        assert split.labels.dtype == torch.int64
        assert bytes(split.labels.tolist()) == labels
        assert split.labels.bincount().tolist() == [count // 10] * 10
    assert list(dataset.classes) == GARMENTS
    assert dataset.input_shape == (1, 28, 28)
    assert (dataset.mean, dataset.std) == ((0.5,), (0.5,))


# What YAML can name


@pytest.mark.parametrize(
    ("load", "name", "classes"),
    [
        (datasets.fashion_mnist, "FashionMNIST", GARMENTS),
        (datasets.mnist, "MNIST", DIGITS),
        (datasets.kmnist, "KMNIST", SYLLABLES),
    ],
)
def test_idx_datasets_are_read_and_nothing_is_written(
    load: Callable[..., Dataset], name: str, classes: list[str], tmp_path: Path
) -> None:
    arrays = write_idx_splits(tmp_path, name)
    with read_only(tmp_path):
        dataset = load(str(tmp_path))  # downloading allowed, and not needed
    for part, split, count in (("train", dataset.train, 24), ("t10k", dataset.test, 12)):
        assert split.images.shape == (count, 1, 28, 28)
        assert np.array_equal(split.images[:, 0].numpy(), arrays[f"{part}-images-idx3-ubyte"])
        assert split.labels.dtype == torch.int64
        assert np.array_equal(split.labels.numpy(), arrays[f"{part}-labels-idx1-ubyte"])
    assert list(dataset.classes) == classes
    assert dataset.description == name
    datasets.check(dataset)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_from_its_folder_and_from_its_archive(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = write_cifar10(tmp_path, monkeypatch)
    if packed:
        pack_cifar10(tmp_path, monkeypatch)
        dataset = datasets.cifar10(str(tmp_path), download=False)
    else:
        with read_only(tmp_path):
            dataset = datasets.cifar10(str(tmp_path), download=False)
    assert dataset.train.images.shape == (20, 3, 32, 32)
    assert dataset.test.images.shape == (8, 3, 32, 32)
    assert np.array_equal(torch.cat([dataset.train.images, dataset.test.images]).numpy(), images)
    assert torch.cat([dataset.train.labels, dataset.test.labels]).tolist() == labels
    assert dataset.train.labels.dtype == torch.int64
    assert list(dataset.classes) == CIFAR_CLASSES
    assert dataset.input_shape == (3, 32, 32)
    datasets.check(dataset)


def pack_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the unpacked files into the archive that one downloads, and let torchvision expect this archive."""
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / CIFAR10.base_folder, CIFAR10.base_folder)
    shutil.rmtree(root / CIFAR10.base_folder)
    monkeypatch.setattr(catalog, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return archive


@pytest.mark.parametrize("name", ["FashionMNIST", "MNIST", "KMNIST"])
def test_the_files_are_named_as_torchvisions(name: str) -> None:
    assert list(catalog._IDX_FILES) == [file for file, _ in getattr(torchvision.datasets, name).resources]


def test_synthetic_data_have_the_sizes_asked_for_and_share_no_image() -> None:
    dataset = datasets.synthetic(train_size=30, test_size=20, image_size=16, seed=3)
    assert dataset.train.images.shape == (30, 1, 16, 16)
    assert dataset.test.images.shape == (20, 1, 16, 16)
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    assert len(torch.cat([dataset.train.images, dataset.test.images]).unique(dim=0)) == 50
    assert list(dataset.classes) == GARMENTS
    again, other = datasets.synthetic(30, 20, 16, 3), datasets.synthetic(30, 20, 16, 4)
    assert torch.equal(again.test.images, dataset.test.images)
    assert len(torch.cat([dataset.train.images, dataset.test.images, other.train.images]).unique(dim=0)) == 80
    assert "no photographs" in dataset.description


# Errors
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "array", "named"),
    [
        (LABELS, np.zeros(23, np.uint8), [IMAGES, LABELS, "[24, 28, 28]", "[23]", "Delete both"]),
        (IMAGES, np.zeros((24, 28), np.uint8), [IMAGES, LABELS, "[24, 28]", "[N, height, width]", "Delete both"]),
        (LABELS, np.zeros((24, 1), np.uint8), [IMAGES, LABELS, "[24, 1]", "Delete both"]),
        (LABELS, np.full(24, 10, np.uint8), [LABELS, "label 10", "0 to 9", "Delete the file"]),
        ("t10k-labels-idx1-ubyte", np.full(12, 255, np.uint8), ["t10k-labels", "label 255", "Delete the file"]),
    ],
)
def test_files_that_do_not_fit_together_are_named_with_the_cure(
    file: str, array: np.ndarray[Any, np.dtype[np.uint8]], named: list[str], tmp_path: Path
) -> None:
    write_idx_splits(tmp_path, "MNIST")
    write_idx(tmp_path / "MNIST" / "raw" / file, array)
    with pytest.raises(DataError) as caught:
        datasets.mnist(str(tmp_path), download=False)
    for words in (str(tmp_path / "MNIST" / "raw"), "run again", *named):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("load", "folder", "names"),
    [
        (datasets.fashion_mnist, "FashionMNIST/raw", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
        (datasets.mnist, "MNIST/raw", ["train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"]),
        (datasets.kmnist, "KMNIST/raw", ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"]),
        (datasets.cifar10, ".", ["cifar-10-python.tar.gz"]),
    ],
)
def test_missing_data_are_named_with_the_way_out(
    load: Callable[..., Dataset], folder: str, names: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "nothing"
    with pytest.raises(DataError) as caught:
        load(str(root), download=False)
    for words in (str(root / folder), *names, "downloading is off", "dataset=synthetic", "FMEXP_DATA"):
        assert words in str(caught.value)
    assert not root.exists()


def test_only_the_missing_file_is_named(tmp_path: Path) -> None:
    write_idx_splits(tmp_path, "MNIST")
    (tmp_path / "MNIST" / "raw" / LABELS).unlink()
    with pytest.raises(DataError, match=LABELS) as caught:
        datasets.mnist(str(tmp_path), download=False)
    assert IMAGES not in str(caught.value)


def test_a_damaged_cifar10_folder_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    with (tmp_path / CIFAR10.base_folder / "data_batch_2").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="Delete this folder and run again") as caught:
        datasets.cifar10(str(tmp_path), download=False)
    assert str(tmp_path / CIFAR10.base_folder) in str(caught.value)


def test_a_damaged_cifar10_archive_is_named_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    archive = pack_cifar10(tmp_path, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(DataError, match="sha256") as caught:
        datasets.cifar10(str(tmp_path), download=False)
    assert str(archive) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
