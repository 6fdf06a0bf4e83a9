"""Datasets: the very pixels of torchvision's transforms, batches that depend on nothing hidden, errors that help."""

import gzip
import hashlib
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms
from PIL import Image
from tools import assert_same_weights, small, write_cifar10, write_idx, write_idx_splits
from torch import Tensor
from torchvision.datasets import CIFAR10

from fmexp import datasets, execute
from fmexp.datasets import Dataset, Split, catalog
from fmexp.errors import ConfigError, DataError

CPU = torch.device("cpu")
GARMENTS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle Boot"]
DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
SYLLABLES = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
CIFAR_CLASSES = ["Airplane", "Automobile", "Bird", "Cat", "Deer", "Dog", "Frog", "Horse", "Ship", "Truck"]


def in_memory(images: Tensor, **normalisation: Any) -> Dataset:
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    return Dataset(split, split, ["one", "other"], **normalisation)


def by_torchvision(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What torchvision makes of each image, from a PIL image on."""
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    return torch.stack([transform(Image.fromarray(one.permute(1, 2, 0).squeeze(-1).numpy())) for one in images])


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Fail if the block draws from, or seeds, a global generator."""
    before = torch.get_rng_state(), repr(np.random.get_state(legacy=False)), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (repr(np.random.get_state(legacy=False)), random.getstate()) == before[1:]


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


# The pixels


def test_every_image_of_the_real_test_split_is_normalised_as_torchvision_does(fashion_mnist_root: str) -> None:
    dataset = datasets.fashion_mnist(fashion_mnist_root, download=False)
    images = dataset.test.images
    assert len(images) == 10_000
    assert_same_bits(dataset.normalise(images), by_torchvision(images, [0.5], [0.5]))


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


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,), (0.5,)),
        ((0.1307,), (0.3081,)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4)),
    ],
)
def test_random_bytes_are_normalised_as_torchvision_does(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (64, len(mean), 17, 23), dtype=torch.uint8, generator=generator)
    assert images.unique().tolist() == list(range(256))
    dataset, before = in_memory(images, mean=mean, std=std), images.clone()
    normalised = dataset.normalise(images)
    assert_same_bits(normalised, by_torchvision(images, mean, std))
    assert torch.equal(images, before)
    # And back, to the very byte, as TensorBoard's writer cuts them off.
    shown = dataset.displayable(normalised)
    assert_same_bits(shown, images.float() / 255)
    assert np.array_equal((shown.numpy() * np.float32(255)).astype(np.uint8), images.numpy())


def test_what_is_displayed_stays_in_range() -> None:
    dataset = in_memory(torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    noisy = torch.tensor([-7.0, -1.0, 1.0, 7.0]).reshape(1, 1, 2, 2)
    assert dataset.displayable(noisy).flatten().tolist() == [0, 0, 1, 1]


def test_batches_in_memory_hold_the_chosen_images_in_their_order() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
    split = Split(images, torch.arange(10))
    dataset = Dataset(split, split, DIGITS)
    indices = torch.tensor([7, 2, 9, 0, 4])
    with untouched_random_state():
        found = list(datasets.batches(dataset, split, indices, 2, device=CPU))
    assert [labels.tolist() for _, labels in found] == [[7, 2], [9, 0], [4]]
    for pixels, labels in found:
        assert torch.equal(pixels, dataset.normalise(images[labels]))


# The order


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_order_is_a_permutation(count: int) -> None:
    order = datasets.order(3, 4, count)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(count))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    with untouched_random_state():
        first = datasets.order(3, 4, 1000)
    torch.manual_seed(2)
    datasets.order(9, 9, 10)
    assert torch.equal(datasets.order(3, 4, 1000), first)
    for seed, epoch in ((3, 5), (4, 4), (4, 3)):
        same = int((datasets.order(seed, epoch, 1000) == first).sum())
        assert same < 20  # 1 by chance


# Data that does not fit in memory


class Noisy(torch.utils.data.Dataset[Any]):
    """Images of their own index with fresh noise from every generator that augmentations use."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(1, 3, 4) + float(np.random.normal()) + random.gauss(0, 1)
        return index + noise, index % 10


def noisy_batches(num_workers: int, *, start: int = 0, seed: tuple[int, int] = (5, 1)) -> list[tuple[Tensor, Tensor]]:
    split = Noisy()
    dataset = Dataset(split, split, DIGITS)
    indices = datasets.order(*seed, len(split))[start:]
    with untouched_random_state():
        return list(datasets.batches(dataset, split, indices, 4, device=CPU, num_workers=num_workers, seed=seed))


@pytest.fixture(scope="module")
def noisy() -> list[tuple[Tensor, Tensor]]:
    return noisy_batches(0)


def assert_equal_batches(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for (images, labels), (others, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_a_map_style_split_is_loaded_in_order_and_augmented(noisy: list[tuple[Tensor, Tensor]]) -> None:
    assert [tuple(images.shape) for images, _ in noisy] == [(4, 1, 3, 4)] * 5 + [(1, 1, 3, 4)]
    assert {(images.dtype, labels.dtype) for images, labels in noisy} == {(torch.float32, torch.int64)}
    order = datasets.order(5, 1, 21)
    assert torch.cat([labels for _, labels in noisy]).tolist() == (order % 10).tolist()
    noise = torch.cat([images for images, _ in noisy]) - order.float()[:, None, None, None]
    assert len(noise.flatten().unique()) > 200  # of 252: no sample's noise is another's


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("begun", [0, 3])
def test_map_style_batches_do_not_depend_on_workers_or_on_where_one_begins(
    noisy: list[tuple[Tensor, Tensor]], num_workers: int, begun: int
) -> None:
    torch.manual_seed(num_workers)
    random.seed(num_workers)
    np.random.seed(num_workers)
    assert_equal_batches(noisy_batches(num_workers, start=4 * begun), noisy[begun:])


@pytest.mark.parametrize("seed", [(5, 2), (6, 1)])
def test_augmentation_changes_with_seed_and_epoch(noisy: list[tuple[Tensor, Tensor]], seed: tuple[int, int]) -> None:
    def noise_by_index(batches: list[tuple[Tensor, Tensor]], seed: tuple[int, int]) -> dict[int, list[float]]:
        images, order = torch.cat([images for images, _ in batches]), datasets.order(*seed, 21)
        return {int(index): (image - index).flatten().tolist() for image, index in zip(images, order, strict=True)}

    before, now = noise_by_index(noisy, (5, 1)), noise_by_index(noisy_batches(0, seed=seed), seed)
    assert all(before[index] != now[index] for index in range(21))


class Loaded(torch.utils.data.Dataset[Any]):
    """A split of bytes, given out one normalised image at a time."""

    def __init__(self, dataset: Dataset, split: Split) -> None:
        self.dataset, self.split = dataset, split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset.normalise(self.split.images[index][None])[0], int(self.split.labels[index])


def loaded(train_size: int, test_size: int, image_size: int, seed: int) -> Dataset:
    """The drawn garments as map-style splits."""
    data = datasets.synthetic(train_size, test_size, image_size, seed)
    return Dataset(Loaded(data, data.train), Loaded(data, data.test), data.classes)


def test_a_run_on_map_style_data_equals_the_run_in_memory(tmp_path: Path) -> None:
    fast = ("logging=light", "stage.image_grid.enabled=true", "train.epochs=2", "train.max_steps=20")
    own = "dataset._target_=test_datasets.loaded"
    runs = {"memory": [], "0": [own, "train.num_workers=0"], "2": [own, "train.num_workers=2"]}
    accuracy = {name: execute(small(*fast, *more), tmp_path / name) for name, more in runs.items()}
    for name in ("0", "2"):
        assert accuracy[name] == accuracy["memory"]
        assert_same_weights(tmp_path / name, tmp_path / "memory")


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
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    return archive


@pytest.mark.parametrize("name", ["FashionMNIST", "MNIST", "KMNIST"])
def test_the_files_and_their_checksums_are_torchvisions(name: str) -> None:
    known = list(zip(catalog._IDX_FILES, catalog._IDX_MD5[name], strict=True))
    assert known == getattr(torchvision.datasets, name).resources


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
    with pytest.raises(DataError, match="md5") as caught:
        datasets.cifar10(str(tmp_path), download=False)
    assert str(archive) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    ("train", "test", "classes", "message"),
    [(0, 5, 2, "the train split is empty"), (5, 0, 2, "the test split is empty"), (5, 5, 1, "1 class is too few")],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(train: int, test: int, classes: int, message: str) -> None:
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    parts = [in_memory(images[:count]).train for count in (train, test)]
    with pytest.raises(ConfigError, match=message):
        datasets.check(Dataset(parts[0], parts[1], DIGITS[:classes]))
