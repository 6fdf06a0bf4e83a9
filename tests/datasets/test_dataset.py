"""Dataset: the very pixels of torchvision's transforms, and what cannot be trained on."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import program
import pytest
import torch
import torchvision.datasets
import torchvision.transforms
from PIL import Image
from torch import Tensor

from fmexp import datasets
from fmexp.datasets import Dataset, Split
from fmexp.datasets.dataset import hold_out
from fmexp.errors import ConfigError, DataError


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


# The pixels


def test_every_image_of_the_real_test_split_is_normalised_as_torchvision_does(fashion_mnist_root: str) -> None:
    dataset = datasets.fashion_mnist(fashion_mnist_root, download=False)
    images = dataset.test.images
    assert len(images) == 10_000
    assert_same_bits(dataset.normalise(images), by_torchvision(images, [0.5], [0.5]))


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


# What cannot be trained on

IMAGES, LABELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
GOOD = Split(IMAGES, LABELS)


class Items(torch.utils.data.Dataset[Any]):
    """Items, whatever they are."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


ITEM = torch.zeros(3, 8, 8), 0
WRONG = {
    "images are an array": ({"train": Split(IMAGES.numpy(), LABELS)}, r"train split has images .* numpy.ndarray uint8"),
    "labels are an array": ({"test": Split(IMAGES, LABELS.numpy())}, r"test split has labels .* numpy.ndarray int64"),
    "labels are a list": ({"train": Split(IMAGES, [0, 1, 0, 1])}, r"labels that are list"),
    "images are floats": ({"train": Split(IMAGES.float(), LABELS)}, r"torch.float32 .* torch.uint8 .* map-style"),
    "images are whole numbers": ({"train": Split(IMAGES.long(), LABELS)}, r"torch.int64 .* torch.uint8"),
    "labels are floats": ({"train": Split(IMAGES, LABELS.float())}, r"torch.float32 .* torch.int64"),
    "labels are bytes": ({"train": Split(IMAGES, LABELS.byte())}, r"torch.uint8 .* torch.int64"),
    "labels are int32": ({"train": Split(IMAGES, LABELS.int())}, r"torch.int32 .* torch.int64"),
    "no channels": ({"train": Split(IMAGES[:, 0], LABELS)}, r"\[4, 8, 8\].* \[N, C, H, W\]"),
    "one-hot labels": ({"train": Split(IMAGES, torch.eye(4).long())}, r"\[4, 4\].* \[N\]"),
    "a label too high": ({"train": Split(IMAGES, LABELS + 1)}, r"train split has label 2; with 2 classes .* 0 to 1"),
    "a label below 0": ({"test": Split(IMAGES, LABELS - 1)}, r"test split has label -1"),
    "fewer labels": ({"train": Split(IMAGES, LABELS[:3])}, r"4 images and 3 labels"),
    "fewer images": ({"test": Split(IMAGES[:3], LABELS)}, r"3 images and 4 labels"),
    "no pixels": ({"train": Split(IMAGES[..., :0], LABELS)}, r"\[3, 8, 0\], without a pixel"),
    "train is empty": ({"train": Split(IMAGES[:0], LABELS[:0])}, r"the train split is empty"),
    "test is empty": ({"test": Split(IMAGES[:0], LABELS[:0])}, r"the test split is empty"),
    "test has another size": ({"test": Split(IMAGES[..., :4], LABELS)}, r"test .* \[3, 8, 4\], those .* \[3, 8, 8\]"),
    "test has other channels": ({"test": Split(IMAGES[:, :1], LABELS)}, r"test .* \[1, 8, 8\], those .* \[3, 8, 8\]"),
    "a split is a pair": ({"train": None}, r"train split is NoneType where a Split"),
    "a split is a stream": ({"train": Stream()}, r"Stream where .* map-style"),
    "a split without items": ({"train": Items()}, r"the train split is empty"),
    "one class": ({"classes": ["a"]}, r"1 class is too few"),
    "a class not UTF-8": ({"classes": ["a", "caf\udce9"]}, r"'caf\\udce9', which is not UTF-8\. Rename it\."),
    "a class twice": ({"classes": ["a", "b", "a"]}, r"'a' more than once"),
    "a class without a name": ({"classes": ["a", 1]}, r"classes has 1, int"),
    "classes are a text": ({"classes": "ab"}, r"classes is str"),
    "classes are a number": ({"classes": 2}, r"classes is int"),
    "mean of two": ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\) has 2 numbers; .* 3 channels: give 1 or 3"),
    "mean is a number": ({"mean": 0.5}, r"mean=0.5 must be a tuple"),
    "mean is a text": ({"mean": ("0.5",)}, r"must be a tuple of numbers"),
    "mean is NaN": ({"mean": (math.nan,)}, r"must be finite"),
    "std is zero": ({"std": (0.5, 0, 0.5)}, r"std=\(0.5, 0, 0.5\) must be finite and above 0"),
    "an item is no pair": ({"train": Items(ITEM[0])}, r"training image 0: the item is torch.Tensor"),
    "an item is an array": ({"train": Items((ITEM[0].numpy(), 0))}, r"training image 0: it is numpy.ndarray float32"),
    "an item is a picture": ({"test": Items((Image.new("L", (8, 8)), 0))}, r"test image 0: it is PIL.Image.Image"),
    "an item is float64": ({"train": Items((ITEM[0].double(), 0))}, r"torch.float64 .* torch.uint8, or torch.float32"),
    "an item has no channels": ({"train": Items((ITEM[0][0], 0))}, r"\[C, H, W\]"),
    "an item has another size": ({"test": Items((ITEM[0][:1], 0))}, r"test image 0 has shape \[1, 8, 8\].*\[3, 8, 8\]"),
    "an item's label is too high": ({"train": Items((ITEM[0], 2))}, r"its label is 2; with 2 classes"),
    "an item's label is below 0": ({"train": Items((ITEM[0], torch.tensor(-1)))}, r"its label is -1"),
    "an item's label is a float": ({"train": Items((ITEM[0], 1.0))}, r"its label is 1.0, float"),
    "an item's label is a text": ({"train": Items((ITEM[0], "cat"))}, r"its label is 'cat', str"),
    "an item cannot be read": ({"train": Items(OSError("no picture: a.png"))}, r"training image 0 cannot be read: no"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_dataset_that_cannot_be_trained_on_is_refused(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises((ConfigError, DataError), match=message):
        datasets.check(Dataset(**{"train": GOOD, "test": GOOD, "classes": ["a", "b"], **arguments}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "label", [1, True, np.int64(1), np.uint8(1), torch.tensor(1), torch.tensor(1, dtype=torch.int32)]
)
def test_whole_numbers_of_all_kinds_are_labels(label: Any) -> None:
    items = Items(ITEM, (ITEM[0], label))
    dataset = Dataset(items, GOOD, ["a", "b"])
    datasets.check(dataset)
    labels = dataset.take(items, torch.tensor([1, 0]))[1]
    assert (labels.tolist(), labels.dtype) == ([1, 0], torch.int64)


def test_bytes_are_normalised_and_do_not_mix_with_what_is_normalised_already() -> None:
    items = Items((IMAGES[0], 0), (IMAGES[1], 1), ITEM)
    dataset = Dataset(items, GOOD, ["a", "b"], mean=(0.4,), std=(0.3,))
    datasets.check(dataset)
    assert torch.equal(dataset.take(items, torch.tensor([0, 1]))[0], dataset.normalise(IMAGES[:2]))
    with pytest.raises(DataError, match="some images are uint8 and others float32"):
        dataset.take(items, torch.tensor([0, 2]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_item_that_is_wrong_is_named_when_it_is_loaded(num_workers: int) -> None:
    items = Items(ITEM, ITEM, (ITEM[0][:, 1:], 0))
    dataset = Dataset(items, GOOD, ["a", "b"])
    datasets.check(dataset)
    cpu = torch.device("cpu")
    workers = datasets.Workers(dataset, num_workers, cpu)
    batches = datasets.batches(dataset, items, torch.arange(3), 2, device=cpu, workers=workers)
    with workers, pytest.raises(DataError, match=r"training image 2 has shape \[3, 7, 8\]") as caught:
        list(batches)
    assert "Traceback" not in str(caught.value)


def broken() -> Dataset:
    return Dataset(Split(IMAGES, LABELS + 1), GOOD, ["a", "b"])


def buggy() -> Dataset:
    return Dataset(Items(IndexError("of the author's own")), GOOD, ["a", "b"])


@pytest.mark.parametrize(("name", "message"), [("broken", "has label 2"), ("buggy", "of the author's own")])
def test_the_program_says_so_before_it_makes_a_folder(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "own.yaml").write_text(f"_target_: test_dataset.{name}\n")
    done = program.call("--config-dir", str(tmp_path), "dataset=own", "device=cpu", "hydra.run.dir=run", cwd=tmp_path)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


# What is held out


@pytest.mark.parametrize(("share", "held"), [(0.2, [2, 1, 1, 0]), (0.01, [1, 1, 1, 0]), (0.99, [9, 2, 1, 0])])
def test_a_share_of_each_class_is_held_out(share: float, held: list[int]) -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] * 2 + [3])[
        torch.randperm(16, generator=torch.Generator().manual_seed(0))
    ]
    names = [f"{number}.png" for number in range(16)]
    stay, out = hold_out(names, labels.tolist(), share, 0)
    assert sorted(stay + out) == list(range(16))
    assert (stay, out) == (sorted(stay), sorted(out))
    assert torch.bincount(labels[out], minlength=4).tolist() == held


def test_what_is_held_out_depends_on_the_seed_and_hardly_on_other_images() -> None:
    names, labels = [str(number) for number in range(1000)], [number % 2 for number in range(1000)]
    _, out = hold_out(names, labels, 0.2, 0)
    assert len(set(out) & set(hold_out(names, labels, 0.2, 1)[1])) < 80  # 40 by chance
    _, with_more = hold_out([*names, "more", "and more"], [*labels, 0, 1], 0.2, 0)
    assert len(set(out) ^ set(with_more)) <= 4
