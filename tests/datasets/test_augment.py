"""Augmentations: what torchvision does for the same draws, draws for each image and step, and runs that repeat them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tools import SMALL, assert_same_weights, interrupt
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fmexp import compose, datasets, execute
from fmexp.build import build
from fmexp.datasets import augment
from fmexp.errors import ConfigError
from fmexp.run import Run

SIZES = [(32, 3, 32, 32), (9, 1, 28, 24), (1, 3, 7, 10)]
ERASE = {"p": 0.7, "scale": (0.02, 0.33), "ratio": (0.3, 3.3)}
CHAIN = ("augment=chain", "augment.order=[crop_flip,mixup,random_erasing]", "augment.steps.mixup.alpha=1")


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = Generator().manual_seed(1)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=made)
    floats = torch.randn(shape, generator=made)
    return (images if dtype == torch.uint8 else floats), torch.randint(10, shape[:1], generator=made)


def draws(step: int = 3) -> Generator:
    return augment.generator(0, step)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("padding", [0, 3])
def test_crop_flip_is_torchvisions(shape: tuple[int, ...], padding: int, dtype: torch.dtype) -> None:
    images, labels = batch(shape, dtype)
    seen, same = augment.crop_flip(images, labels, draws(), padding=padding, flip=0.5)
    tops, lefts, flips = (part.tolist() for part in augment._crops(shape[0], padding, 0.5, draws()))
    for image, top, left, flip, ours in zip(images, tops, lefts, flips, seen, strict=True):
        theirs = F.crop(F.pad(image, [padding]), top, left, *shape[2:])
        assert torch.equal(ours, F.horizontal_flip(theirs) if flip else theirs)
    assert same is labels
    if shape[0] > 9 and padding:
        assert {*tops} == {*lefts} == {*range(7)}
        assert {*flips} == {True, False}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SIZES)
def test_random_erasing_is_torchvisions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images, labels = batch(shape, dtype)
    seen, same = augment.random_erasing(images, labels, draws(), **ERASE)
    boxes = [part.tolist() for part in augment._boxes(shape[0], shape[2:], *ERASE.values(), draws())]
    for image, top, left, height, width, ours in zip(images, *boxes, seen, strict=True):
        assert torch.equal(ours, F.erase(image, top, left, height, width, torch.zeros(1, dtype=dtype)))
    assert same is labels


def test_what_is_erased_has_the_area_and_ratio_asked_for() -> None:
    count, size = 4000, (40, 60)
    top, left, height, width = augment._boxes(count, size, **ERASE, generator=draws())
    inside = (top >= 0) & (left >= 0) & (top + height <= 40) & (left + width <= 60)
    assert inside.all()
    erased = height > 0
    assert float(erased.double().mean()) == pytest.approx(0.7, abs=0.03)
    area, ratio = (height * width)[erased] / 2400, (height / width)[erased]
    for values, low, high in ((area, 0.018, 0.345), (ratio, 0.25, 4)):
        assert float(values.min()) > low
        assert float(values.max()) < high
    assert float(area.mean()) == pytest.approx(0.175, abs=0.02)
    assert float(ratio.log().mean()) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SIZES)
def test_mixup_and_cutmix_are_torchvisions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images, labels = batch(shape, dtype)
    share = augment._share(1.0, draws())
    for ours, name, parameters in (
        (augment.mixup, "MixUp", {"lam": share}),
        (augment.cutmix, "CutMix", None),
    ):
        if parameters is None:
            top, bottom, left, right = augment._cut(shape[2:], 1.0, draws())
            share = 1 - (bottom - top) * (right - left) / (shape[2] * shape[3])
            parameters = {"box": (left, top, right, bottom), "lam_adjusted": share}
        theirs = getattr(v2, name)(num_classes=10)
        theirs.make_params = lambda inputs, found=parameters: found
        expected, targets = theirs(images.float(), labels)
        seen, probabilities = ours(images, labels, draws(), alpha=1.0, num_classes=10)
        assert torch.equal(seen.float(), expected)
        assert seen.dtype == (torch.float32 if name == "MixUp" else dtype)
        assert torch.equal(probabilities, targets)
        again, twice = ours(images, probabilities, draws(), alpha=1.0, num_classes=10)
        assert torch.equal(again, seen)  # labels that are probabilities already are mixed as well
        assert torch.equal(twice, probabilities.roll(1, 0) * (1 - share) + probabilities * share)


@pytest.mark.parametrize("shape", [*SIZES, (24, 3, 40, 23)])
def test_trivial_augment_is_torchvisions(shape: tuple[int, ...]) -> None:
    theirs, seen = v2.TrivialAugmentWide(), set()
    assert list(augment._STRENGTHS) == list(theirs._AUGMENTATION_SPACE)
    for name, (strengths, signed) in theirs._AUGMENTATION_SPACE.items():
        assert signed == (name in augment._SIGNED)
        if (all_31 := strengths(31, *shape[2:])) is not None:
            assert augment._STRENGTHS[name] == pytest.approx((all_31[0].item(), all_31[-1].item()))
    images, labels = batch(shape, torch.uint8)
    images[::2] = images[::2] // 4 + 90  # low in contrast
    for step in range(12):
        names, strengths = augment._trivial(len(images), draws(step))
        ours, same = augment.trivial_augment(images, labels, draws(step))
        for image, name, strength, changed in zip(images, names, strengths, ours, strict=True):
            how = {"interpolation": InterpolationMode.NEAREST, "fill": {Tensor: None}}
            expected = theirs._apply_image_or_video_transform(image, name, strength, **how)
            assert torch.equal(changed, expected), (name, strength)
        assert same is labels
        seen.update(names)
    assert len(images) == 1 or seen == set(augment._STRENGTHS)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), *(torch.zeros(2, *s, dtype=torch.uint8) for s in ((4, 8, 8), (1, 2, 8)))]
)
def test_trivial_augment_refuses_what_it_cannot_change(images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"trivial_augment needs images torch\.uint8 \[B, 1 or 3, H, W\]"):
        augment.trivial_augment(images, torch.zeros(2), draws())


def test_shares_are_of_the_beta_distribution() -> None:
    shares = np.array([augment._share(0.2, augment.generator(0, step)) for step in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * 1.4), abs=0.01)  # 1 / (4 (2 alpha + 1))


FUNCTIONS: dict[str, augment.Augment] = {
    "crop_flip": partial(augment.crop_flip, padding=4, flip=0.5),
    "trivial_augment": augment.trivial_augment,
    "random_erasing": partial(augment.random_erasing, **ERASE),
    "mixup": partial(augment.mixup, alpha=1.0, num_classes=10),
    "cutmix": partial(augment.cutmix, alpha=1.0, num_classes=10),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_draw_is_of_seed_and_step_and_changes_nothing_else(name: str) -> None:
    images, labels = batch(SIZES[0], torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    one, again, other, another_seed = (
        FUNCTIONS[name](images, labels, augment.generator(*of))[0] for of in ((0, 3), (0, 3), (0, 4), (1, 3))
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, another_seed)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chain_is_in_the_order_asked_for() -> None:
    images, labels = batch(SIZES[0], torch.uint8)
    for order in (["crop_flip", "mixup"], ["mixup", "crop_flip"], []):
        seen, numbers = augment.chain(images, labels, draws(), order=order, steps=FUNCTIONS)
        expected, targets, generator = images, labels, draws()
        for name in order:
            expected, targets = FUNCTIONS[name](expected, targets, generator)
        assert torch.equal(seen, expected)
        assert torch.equal(numbers, targets)


# Runs

QUIET = ("logging=light", "model=mlp", "model.hidden=[16]")


class Bytes(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A split of bytes, given out one image at a time."""

    def __init__(self, split: datasets.Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.split.images[index], int(self.split.labels[index])


def one_at_a_time(**arguments: int) -> datasets.Dataset:
    data = datasets.synthetic(**arguments)
    return datasets.Dataset(Bytes(data.train), Bytes(data.test), data.classes)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Execute a run in a folder of this name."""

    def execute_as(name: str, *words: str) -> Path:
        execute(compose([*SMALL, *QUIET, *words]), tmp_path / name)
        return tmp_path / name

    return execute_as


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("words", [CHAIN, ("augment=chain", "augment.order=[trivial_augment,cutmix]")])
def test_workers_change_no_bit(run: Callable[..., Path], words: tuple[str, ...]) -> None:
    truth = run("memory", *words)
    for workers in (0, 1, 2, 4):
        mapped = ("dataset._target_=test_augment.one_at_a_time", f"train.num_workers={workers}")
        assert_same_weights(run(f"{workers}", *words, *mapped), truth)
    with pytest.raises(AssertionError):
        assert_same_weights(run("plain"), truth)


def test_keeping_pictures_changes_no_bit(run: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    data = ("dataset=image_folder", f"dataset.root={tmp_path / 'photos'}", f"dataset.cache_dir={tmp_path / 'cache'}")
    runs = []
    for cache in ("memory", "disk", "none"):
        cfg = compose([*data, *QUIET, *CHAIN, "device=cpu", "train.epochs=2", f"dataset.cache={cache}"])
        execute(cfg, tmp_path / cache)
        runs.append(tmp_path / cache)
    assert_same_weights(runs[1], runs[0])
    assert_same_weights(runs[2], runs[0])


@pytest.mark.parametrize("stop", [7, 16])
def test_a_stopped_run_recreates_its_augmented_batch(run: Callable[..., Path], tmp_path: Path, stop: int) -> None:
    words = (*CHAIN, "train.checkpoint_every=1", "+stage.keep={_target_:test_augment.keep,when:end}")
    truth = run("whole", *words)
    interrupt(compose([*SMALL, *QUIET, *words]), tmp_path / "parts", stop)
    assert_same_weights(run("parts", *words), truth)  # at 16 nothing is trained, and the batch is made again
    (images, labels), (again, numbers) = SEEN[str(truth)], SEEN[str(tmp_path / "parts")]
    assert torch.equal(images, again)
    assert torch.equal(labels, numbers)
    assert (labels.shape, images.dtype) == ((4, 10), torch.float32)


SEEN: dict[str, tuple[Tensor, Tensor]] = {}


def keep(run: Run) -> None:
    """A stage: keep the current batch."""
    SEEN[str(run.output_dir)] = run.batch


def test_none_costs_no_call() -> None:
    run = build(compose([*SMALL, *QUIET]))
    assert run.augment is None
    images, _ = run.dataset.take(run.dataset.train, torch.arange(3), raw=True)
    assert torch.equal(run.augmented(images, torch.arange(3), 0)[0], run.dataset.normalise(images))
