"""Dataset: the very pixels of torchvision's transforms, and what cannot be trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms
from PIL import Image
from torch import Tensor

from fmexp import datasets
from fmexp.datasets import Dataset, Split
from fmexp.errors import ConfigError

DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


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


@pytest.mark.parametrize(
    ("train", "test", "classes", "message"),
    [(0, 5, 2, "the train split is empty"), (5, 0, 2, "the test split is empty"), (5, 5, 1, "1 class is too few")],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(train: int, test: int, classes: int, message: str) -> None:
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    parts = [in_memory(images[:count]).train for count in (train, test)]
    with pytest.raises(ConfigError, match=message):
        datasets.check(Dataset(parts[0], parts[1], DIGITS[:classes]))
