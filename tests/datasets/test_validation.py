"""The validation split: which images are held out, of which kinds of data, and that nothing else sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tools import small

from fmexp import compose, datasets
from fmexp.build import build
from fmexp.datasets import Dataset, Split, with_validation
from fmexp.errors import ConfigError


class Squares(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """A map-style split: image `index` has its index in its first pixel."""

    def __init__(self, labels: list[int], known: bool = True) -> None:
        self.labels = labels
        if known:
            self.targets = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), index, dtype=torch.uint8), self.labels[index]


LABELS = [0] * 40 + [1] * 20 + [2] * 10
IMAGES = torch.arange(70, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()


def dataset(kind: str) -> Dataset:
    if kind == "memory":
        train = Split(IMAGES, torch.tensor(LABELS))
    elif kind == "mapped":
        train = Split(IMAGES, torch.tensor(LABELS), mapped=True)
    else:
        train = Squares(LABELS, known=kind == "map-style")
    return Dataset(train, Squares(LABELS), ["a", "b", "c"])


def numbers(made: Dataset, name: str) -> tuple[list[int], list[int]]:
    """The images, by the number in their pixels, and the labels of a split."""
    split = made.splits[name]
    images, labels = made.take(split, torch.arange(datasets.length(split)), raw=True)
    return images[:, 0, 0, 0].tolist(), labels.tolist()


@pytest.mark.parametrize("kind", ["memory", "mapped", "map-style", "labels unknown"])
def test_a_share_of_each_class_is_held_out(kind: str) -> None:
    made = with_validation(dataset(kind), 0.2)
    (stay, of_stay), (held, of_held) = numbers(made, "train"), numbers(made, "val")
    assert sorted(stay + held) == list(range(70))
    assert [LABELS[i] for i in held] == of_held
    assert [LABELS[i] for i in stay] == of_stay
    if kind == "labels unknown":
        assert len(held) == 14
    else:
        assert [of_held.count(label) for label in range(3)] == [8, 4, 2]
        assert held == numbers(with_validation(dataset("memory"), 0.2), "val")[0]
        labels = datasets.labels(made.train)
        assert labels is not None
        assert labels.tolist() == of_stay


def test_a_mapped_split_is_not_copied() -> None:
    made = with_validation(dataset("mapped"), 0.2)
    assert isinstance(made.train, Split)
    assert isinstance(made.val, Split)
    assert made.train.images.data_ptr() == made.val.images.data_ptr() == IMAGES.data_ptr()


def test_a_split_of_its_own_is_taken_and_with_0_there_is_none() -> None:
    own = Squares([0, 1, 2])
    whole = dataset("memory")
    with_own = Dataset(whole.train, whole.test, whole.classes, val=own)
    assert with_validation(with_own, 0.5).val is own
    assert with_validation(with_own, 0.5).train is whole.train
    assert with_validation(with_own, 0).val is None
    assert with_validation(whole, 0).splits.keys() == {"train", "test"}


def test_a_class_of_one_image_is_trained_on() -> None:
    one = Dataset(Split(IMAGES[:11], torch.tensor([0] * 10 + [1])), Squares([0, 1]), ["a", "b"])
    made = with_validation(one, 0.5)
    assert 10 in numbers(made, "train")[0]
    assert numbers(made, "val")[1] == [0] * 5
    ones = Dataset(Split(IMAGES[:2], torch.tensor([0, 1])), Squares([0, 1]), ["a", "b"])
    with pytest.raises(ConfigError, match=r"train.validation=0.5 holds out no image"):
        with_validation(ones, 0.5)


def test_neither_the_seed_of_the_run_nor_its_model_decides() -> None:
    runs = [build(small("train.validation=0.25", f"seed={seed}")) for seed in (0, 1)]
    first, second = (run.dataset.val for run in runs)
    assert isinstance(first, Split)
    assert isinstance(second, Split)
    assert torch.equal(first.images, second.images)
    assert len(first) + datasets.length(runs[0].dataset.train) == 64


def test_pictures_of_a_folder_val(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for label, name in enumerate("ab"):
            for number in range(count):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 100 * label + number, np.uint8)).save(path)
    folder = ["device=cpu", "model=mlp", "dataset=image_folder", f"dataset.root={tmp_path}", "dataset.channels=1",
              f"dataset.cache_dir={tmp_path}/cache"]  # fmt: skip
    for cache in ("none", "memory", "disk"):
        common = [*folder, f"dataset.cache={cache}"]
        made = build(compose([*common, "train.validation=0.1"])).dataset
        assert numbers(made, "val") == ([0, 1, 2, 100, 101, 102], [0, 0, 0, 1, 1, 1])
        assert datasets.length(made.train) == 12
        assert numbers(made, "test")[0] == [0, 1, 100, 101]
        assert build(compose([*common, "train.validation=0", "objective=test/accuracy"])).dataset.val is None
