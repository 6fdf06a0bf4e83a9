"""Pictures in folders: torchvision's pixels and order, the same bits wherever they are kept, and what is refused."""

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tools import assert_same_weights
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fmexp import compose, config, datasets, execute
from fmexp.datasets import Dataset, Split, image_folder
from fmexp.errors import ConfigError, DataError

CPU, META = torch.device("cpu"), torch.device("meta")
CACHES = ("memory", "disk", "none")
Keep = Callable[..., Dataset]


def pixels(seed: int, height: int = 20, width: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, array: NDArray[Any], **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 + 6 pictures of 24x20 pixels of two classes, written in all formats."""
    root = tmp_path / "photos"
    for split, count in (("train", 12), ("test", 6)):
        for number in range(count):
            suffix = (".png", ".JPG", ".jpeg", ".webp", ".bmp", ".Png")[number % 6]
            write(root / split / ("cat", "dog")[number // 2 % 2] / f"{number}{suffix}", pixels(number + ord(split[1])))
    return root


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    """The dataset of a folder, with a cache of the test's own."""
    return lambda root, **keys: image_folder.image_folder(str(root), cache_dir=str(tmp_path / "cache"), **keys)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of each picture that is decoded."""
    indices: list[int] = []
    decode = image_folder.Pictures.pixels

    def counted(self: image_folder.Pictures, index: int) -> NDArray[np.uint8]:
        indices.append(index)
        return decode(self, index)

    monkeypatch.setattr(image_folder.Pictures, "pixels", counted)
    return indices


def everything(data: Dataset, name: str, **how: Any) -> tuple[Tensor, Tensor]:
    split = getattr(data, name)
    indices = torch.arange(datasets.length(split))
    images, labels = zip(*datasets.batches(data, split, indices, 4, device=CPU, **how), strict=True)
    return torch.cat(images), torch.cat(labels)


# The pixels


@pytest.mark.parametrize(
    ("keys", "transform"),
    [
        ({}, []),
        ({"channels": 1}, [transforms.Grayscale()]),
        ({"image_size": 16}, [transforms.Resize(16), transforms.CenterCrop(16)]),
        ({"image_size": 17, "resize": 33}, [transforms.Resize(33), transforms.CenterCrop(17)]),
        ({"image_size": 9, "crop": False}, [transforms.Resize((9, 9))]),
    ],
)
def test_pictures_are_those_of_torchvision_in_its_order(
    photos: Path, keep: Keep, keys: dict[str, Any], transform: list[Any]
) -> None:
    write(photos / "train" / "cat" / "inner" / "0.png", pixels(7))
    for split in ("train", "test"):
        shutil.copytree(photos / split / "dog", photos / split / "cat and dog")  # sorts between cat and cat/inner
    mean, std = ([0.5], [0.25]) if "channels" in keys else ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    how = [*transform, transforms.ToTensor(), transforms.Normalize(mean, std)]
    data = keep(photos, cache="memory", mean=mean, std=std, **keys)
    assert data.classes == ["cat", "cat and dog", "dog"]
    for name in ("train", "test"):
        images, labels = everything(data, name)
        theirs = ImageFolder(str(photos / name), transforms.Compose(how))
        assert labels.tolist() == theirs.targets
        assert torch.equal(images, torch.stack([image for image, _ in theirs]))


def upright(folder: Path) -> NDArray[np.uint8]:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees to the right
    write(folder / "x.png", np.rot90(pixels(1)), exif=exif)
    return pixels(1)


def deep(folder: Path) -> NDArray[np.uint8]:
    array = np.arange(480, dtype=np.uint16).reshape(20, 24) * 130
    write(folder / "x.png", array)
    return np.repeat((array // 256).astype(np.uint8)[:, :, None], 3, 2)


def inks(folder: Path) -> NDArray[np.uint8]:
    Image.new("CMYK", (24, 20), (0, 255, 0, 0)).save(folder / "x.jpg", quality=100)
    return np.full((20, 24, 3), (255, 0, 255), np.uint8)


def palette(folder: Path) -> NDArray[np.uint8]:
    Image.fromarray(pixels(2)).quantize(16).save(folder / "x.png")
    return np.asarray(Image.fromarray(pixels(2)).quantize(16).convert("RGB"))


def transparent(folder: Path) -> NDArray[np.uint8]:
    array = np.dstack([pixels(3), np.repeat(np.uint8([[0], [255]]), [10, 10], 0).repeat(24, 1)])
    write(folder / "x.webp", array, lossless=True, exact=True)
    return np.where(array[:, :, 3:] == 0, np.uint8(255), array[:, :, :3])


def transparent_palette(folder: Path) -> NDArray[np.uint8]:
    image = Image.new("P", (24, 20), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 12, 20))
    image.save(folder / "x.png", transparency=0)
    return np.repeat(np.uint8([[[255, 255, 255], [10, 20, 30]]]), 12, 1).repeat(20, 0)


def animated(folder: Path) -> NDArray[np.uint8]:
    frames = [Image.fromarray(pixels(seed)) for seed in (4, 5)]
    frames[0].save(folder / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    return pixels(4)


def black_and_white(folder: Path) -> NDArray[np.uint8]:
    array = pixels(6)[:, :, 0] > 99
    write(folder / "x.bmp", array)
    return np.repeat(array.astype(np.uint8)[:, :, None] * 255, 3, 2)


@pytest.mark.parametrize(
    "make", [upright, deep, inks, palette, transparent, transparent_palette, animated, black_and_white]
)
def test_a_picture_of_any_kind_is_what_a_viewer_shows(
    photos: Path, keep: Keep, make: Callable[[Path], NDArray[np.uint8]]
) -> None:
    shutil.rmtree(photos / "train" / "dog")
    (photos / "train" / "dog").mkdir()
    expected = make(photos / "train" / "dog")
    colour = keep(photos, cache="memory").train.images[-1]
    assert torch.equal(colour, torch.from_numpy(expected.copy()).permute(2, 0, 1))
    grey = keep(photos, cache="memory", channels=1).train.images[-1]
    assert np.array_equal(grey[0], np.asarray(Image.fromarray(expected).convert("L")))


# Where they are kept


@pytest.mark.parametrize(("cache", "num_workers"), [("disk", 0), ("none", 0), ("none", 1), ("none", 2)])
def test_the_bits_do_not_depend_on_where_pictures_are_kept_or_on_workers(
    photos: Path, keep: Keep, cache: str, num_workers: int
) -> None:
    keys = {"image_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    data, expected = keep(photos, cache=cache, **keys), keep(photos, cache="memory", **keys)
    assert isinstance(data.train, Split) == (cache != "none")
    for name in ("train", "test"):
        with datasets.Workers(data, num_workers, CPU) as workers:
            found = everything(data, name, workers=workers)
        for ours, theirs in zip(found, everything(expected, name), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("memory", "kept"), [(4 * 18 * 1440, "memory"), (4 * 18 * 1440 - 1, "disk")])
def test_a_quarter_of_the_memory_is_taken_and_no_more(
    photos: Path, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, kept: str
) -> None:
    monkeypatch.setattr(image_folder, "available_memory", lambda: memory)
    data = keep(photos)
    assert data.train.mapped == (kept == "disk")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == (kept == "disk")


def test_the_file_is_used_until_a_picture_changes(photos: Path, keep: Keep, tmp_path: Path, decoded: list[int]) -> None:
    def files() -> set[Path]:
        return set((tmp_path / "cache").glob("*.npy"))

    keep(photos, cache="disk")
    (first,) = files()
    keep(photos, cache="disk")
    assert sorted(decoded) == list(range(18))
    keep(photos, cache="disk", image_size=16)
    (other,) = files() - {first}

    changed = photos / "train" / "cat" / "0.png"
    time = changed.stat().st_mtime_ns
    write(changed, pixels(77))
    os.utime(changed, ns=(time, time + 1))
    (tmp_path / "cache" / f".{first.name}.abcdefgh.part").write_bytes(b"left by a process that was killed")
    data = keep(photos, cache="disk")
    assert torch.equal(data.train.images[0], torch.from_numpy(pixels(77)).permute(2, 0, 1))
    assert len(decoded) == 3 * 18
    assert other in files()
    assert first not in files()
    assert len(list((tmp_path / "cache").iterdir())) == 3, "two files and the lock"


def test_a_file_that_was_cut_is_made_again(photos: Path, keep: Keep, tmp_path: Path, decoded: list[int]) -> None:
    expected = everything(keep(photos, cache="disk"), "train")[0]
    (file,) = (tmp_path / "cache").glob("*.npy")
    os.truncate(file, file.stat().st_size - 1)
    assert torch.equal(everything(keep(photos, cache="disk"), "train")[0], expected)
    assert len(decoded) == 2 * 18


def test_of_two_that_need_the_file_one_decodes(photos: Path, keep: Keep, decoded: list[int]) -> None:
    made: list[Dataset] = []
    both = [threading.Thread(target=lambda: made.append(keep(photos, cache="disk"))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(decoded) == list(range(18))
    assert torch.equal(made[0].train.images, made[1].train.images)


@pytest.mark.parametrize("problem", ["full", "no folder"])
def test_without_room_for_the_file_pictures_are_decoded_each_time(
    photos: Path, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    problem: str,
) -> None:  # fmt: skip
    if problem == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=18 * 1440 - 1)
        monkeypatch.setattr(image_folder.shutil, "disk_usage", lambda folder: usage)
    else:
        (tmp_path / "cache").write_text("not a folder")
    data = keep(photos, cache="disk")
    assert isinstance(data.train, image_folder.Pictures)
    assert "cache cannot keep the pictures" in caplog.text
    assert not list(tmp_path.glob("cache/*.npy"))
    assert torch.equal(everything(data, "test")[0], everything(keep(photos, cache="memory"), "test")[0])


def test_a_file_stays_where_it_is_and_its_batches_go_to_the_device(photos: Path, keep: Keep) -> None:
    data = keep(photos, cache="disk").to(META)
    assert data.train.images.device == CPU
    batches = list(datasets.batches(data, data.train, torch.arange(12), 5, device=META))
    assert [(images.device, images.shape, len(labels)) for images, labels in batches] == [
        (META, (count, 3, 20, 24), count) for count in (5, 5, 2)
    ]


@pytest.mark.parametrize("source", ["drawn", "real"])
def test_a_run_on_pictures_has_the_bits_of_the_run_on_their_arrays(
    tmp_path: Path, source: str, request: pytest.FixtureRequest
) -> None:
    if source == "real":
        data = datasets.fashion_mnist(request.getfixturevalue("fashion_mnist_root"), download=False)
    else:
        data = datasets.synthetic(300, 100)
    arrays = {}
    for name, split, count in (("train", data.train, 300), ("test", data.test, 100)):
        order = split.labels[:count].sort(stable=True).indices
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = split.images[order].numpy(), split.labels[order].numpy()
        for number, (image, label) in enumerate(zip(arrays[f"{name}_images"], arrays[f"{name}_labels"], strict=True)):
            write(tmp_path / "pictures" / name / str(label) / f"{number:04}.png", image[0])
    np.savez(tmp_path / "arrays.npz", **arrays)

    def run(name: str, *words: str) -> float:
        common = ("logging=light", "device=cpu", "train.batch_size=16", "train.epochs=2")
        return execute(compose([*words, *common]), tmp_path / name)

    expected = run("arrays", "dataset=arrays", f"dataset.root={tmp_path}/arrays.npz")
    for name, *words in (
        ("memory", "dataset.cache=memory"),
        ("disk", "dataset.cache=disk"),
        ("none", "dataset.cache=none", "train.num_workers=0"),
        ("workers", "dataset.cache=none", "train.num_workers=2"),
    ):
        own = ("dataset=image_folder", f"dataset.root={tmp_path}/pictures", f"dataset.cache_dir={tmp_path}/cache")
        assert run(name, *own, "dataset.channels=1", *words) == expected
        assert_same_weights(tmp_path / name, tmp_path / "arrays")


@pytest.mark.parametrize("option", ["image_folder", "arrays"])
def test_another_path_is_another_run_and_another_cache_is_not(option: str) -> None:
    def tree(*words: str) -> dict[str, Any]:
        return config.resolved(compose([f"dataset={option}", *words]))

    first, other = tree("dataset.root=one"), tree("dataset.root=two")
    assert config.difference(first, other) == ["dataset.root: one, now two"]
    assert config.digest(first) != config.digest(other)
    if option == "image_folder":
        assert config.digest(tree("dataset.root=one", "dataset.cache=disk", "dataset.cache_dir=c")) == config.digest(
            first
        )


# Which pictures there are


def test_classes_have_the_numbers_of_the_training_split(photos: Path, keep: Keep) -> None:
    shutil.rmtree(photos / "test" / "cat")
    data = keep(photos, cache="memory")
    assert data.classes == ["cat", "dog"]
    assert data.test.labels.unique().tolist() == [1]


def test_a_validation_split_is_the_test_split_where_there_is_none(photos: Path, keep: Keep) -> None:
    shutil.copytree(photos / "test", photos / "val")
    (photos / "val" / "dog" / "2.jpeg").unlink()
    both = keep(photos, cache="memory")
    assert (len(both.test), len(both.val or ())) == (6, 5)
    shutil.rmtree(photos / "test")
    data = keep(photos, cache="memory")
    assert (len(data.train), len(data.test)) == (12, 5)
    assert data.description == f"pictures in {photos}; the test split is {photos}/val"


@pytest.mark.parametrize("top", ["train", "."])
def test_without_a_test_split_a_share_of_each_class_is_held_out(photos: Path, keep: Keep, top: str) -> None:
    for name in ("cat", "dog"):
        write(photos / "train" / name / "seventh.png", pixels(1))
    shutil.rmtree(photos / "test")
    if top == ".":
        for name in ("cat", "dog"):
            (photos / "train" / name).rename(photos / name)
        (photos / "train").rmdir()
    data = keep(photos, cache="none", test_share=0.3)
    assert np.bincount(data.train.labels).tolist() == [5, 5]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    assert not set(data.train.files) & set(data.test.files)
    assert data.description == f"pictures in {photos}; the test split is 0.3 of each class"
    splits = {seed: set(keep(photos, cache="none", test_share=0.3, split_seed=seed).test.files) for seed in range(5)}
    assert splits[0] == set(data.test.files)
    assert len({frozenset(files) for files in splits.values()}) > 1


def test_what_is_hidden_or_no_picture_is_left_out_and_links_are_followed(
    photos: Path, keep: Keep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cat, elsewhere = photos / "train" / "cat", tmp_path / "elsewhere"
    for name in (".DS_Store", "._0.jpg", "Thumbs.db", "notes.txt", "cat.gif", "0.jpg.part"):
        (cat / name).write_bytes(b"no picture")
    write(cat / ".ipynb_checkpoints" / "0.png", pixels(1))
    write(photos / "train" / ".hidden" / "0.png", pixels(1))
    write(elsewhere / "more.png", pixels(2))
    (cat / "linked.png").symlink_to(elsewhere / "more.png")
    (cat / "inner").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    (photos / "train" / "itself").symlink_to("itself")
    data = keep(photos, cache="none")
    assert len(data.train) == 12 + 2
    assert {b"train/cat/linked.png", b"train/cat/inner/more.png"} < set(data.train.files)
    assert f"{photos}/train: 3 files are no pictures and left out, such as {cat}/0.jpg.part" in caplog.text


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes no name that is not UTF-8")
def test_whatever_the_system_calls_files(photos: Path, keep: Keep) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    write(photos / "train" / "cat" / name, pixels(5))
    assert len(keep(photos, cache="disk").train) == 13
    (photos / "train" / "cat" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"caf\\udce9 é.png is empty"):
        keep(photos, cache="none")


# What is refused


def move(old: str, new: str) -> Callable[[Path], object]:
    return lambda root: (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "photos is no folder. dataset.root=<folder> names that of the pictures."),
        (move("train", "Training"), "photos/Training: the folders of the splits are train, test and val. Rename it."),
        (move("train", ".train"), "photos has test and no train: the training split is missing."),
        (move("train/dog", "train/cat/dog"), "photos/train has 1 folders of pictures: ['cat']. Each class"),
        (lambda root: (root / "train" / "emu").mkdir(), "train/emu has no picture (.jpg, .jpeg, .png, .webp, .bmp)."),
        (lambda root: (root / "test" / "emu").mkdir(), "test/emu is of no class: the training split has no emu."),
    ],
)
def test_folders_that_are_no_dataset(photos: Path, keep: Keep, change: Callable[[Path], object], message: str) -> None:
    change(photos)
    with pytest.raises(DataError) as refused:
        keep(photos)
    assert message.format(root=photos) in str(refused.value)
    assert str(photos) in str(refused.value)


@pytest.mark.parametrize("keys", [{"resize": 20}, {"image_size": 20, "resize": 16}, {"image_size": 16, "resize": 20}])
def test_sizes_that_do_not_go_together(photos: Path, keep: Keep, keys: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"dataset.resize=\d+ is the shortest side .* which is (None|20|16)"):
        keep(photos, crop="image_size" not in keys or keys["image_size"] == 20, **keys)


@pytest.mark.parametrize("cache", CACHES)
def test_all_broken_pictures_are_named_before_training(
    photos: Path, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    cat, dog = photos / "train" / "cat", photos / "test" / "dog"
    whole = (cat / "0.png").read_bytes()
    (cat / "cut.png").write_bytes(whole[: len(whole) // 2])
    (cat / "text.jpg").write_bytes(b"no picture")
    (dog / "empty.png").touch()
    (dog / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(dog / "pipe.png")
    write(dog / "small.bmp", pixels(1, 10, 11))
    write(dog / "large.png", pixels(1, 200, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    expected = [
        f"{cat}/text.jpg is no picture (JPEG, PNG, WEBP, BMP, GIF)",
        f"{dog}/empty.png is empty",
        f"{dog}/gone.png is a link to {tmp_path}/nowhere.png, which is not there",
        f"{dog}/large.png Image size (60000 pixels) exceeds limit of 40000 pixels, could be decompression bomb DOS "
        "attack.",
        f"{dog}/pipe.png is a folder, a named pipe or a device where a file is needed.",
        f"{dog}/small.bmp is 11x10 where the first is 24x20; dataset.image_size=<pixels> makes all alike",
    ]
    with pytest.raises(DataError) as refused:
        keep(photos, cache=cache)
    first, *named = str(refused.value).splitlines()
    assert [line for line in named if "cut.png" not in line] == [f"  {line}" for line in expected]
    assert len(named) == 6 + (cache != "none")
    assert first == f"{len(named)} of 25 pictures cannot be used:"
    assert not list(tmp_path.glob("cache/*.npy"))


def test_a_picture_whose_header_alone_is_right_is_named_at_its_first_use(photos: Path, keep: Keep) -> None:
    cut = photos / "test" / "dog" / "cut.png"
    cut.write_bytes((photos / "train" / "cat" / "0.png").read_bytes()[:1000])
    data = keep(photos, cache="none")
    with pytest.raises(DataError, match=f"^{cut} image file is truncated"):
        everything(data, "test")


def test_a_message_names_ten_pictures_and_counts_the_others(photos: Path, keep: Keep) -> None:
    for path in (photos / "train").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError) as refused:
        keep(photos)
    lines = str(refused.value).splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("12 of 18 pictures cannot be used:", 12, "  and 2 more")
