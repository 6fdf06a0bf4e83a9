"""Pictures in a folder for each class, as torchvision's ImageFolder takes them, decoded once where they can be kept.

Why not torchvision's: it numbers the classes of each split by itself, ignores how a camera was held (EXIF), turns
16-bit pictures white, shows whatever colour is behind what is transparent, and meets a broken picture in mid-run.
"""

import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fmexp.datasets.dataset import Dataset, Fit, Split, hold_out
from fmexp.datasets.pictures import SUFFIXES, attempt, opened, pixels, upright, upright_size, walk
from fmexp.errors import ConfigError, DataError, first_line
from fmexp.process import available_memory
from fmexp.rundir import atomic

log = logging.getLogger(__name__)

SPLITS = r"train(ing)?|test(ing)?|val(id(ation)?)?"  # a folder of such a name is no class
SHOWN = 10  # broken pictures that a message names


def image_folder(
    root: str,
    image_size: int | None = None,
    resize: int | None = None,
    crop: bool = True,
    channels: int = 3,
    test_share: float = 0.2,
    split_seed: int = 0,
    cache: str = "auto",
    cache_dir: str = "data/cache",
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> Dataset:
    """Pictures in root/train/<class>/, root/test/<class>/ and root/val/<class>/, or all of them in root/<class>/.

    Where there is one of test and val, it is the test split; where there are both, val is what train.validation uses.
    All are sorted by name, and so is what is in folders below a class. Links are followed. Where there is neither,
    `test_share` of each class is held out. Arguments are as in conf/dataset/image_folder.yaml.

    Raises:
        ConfigError: arguments that do not go together.
        DataError: folders that are no dataset; pictures that cannot be read, all of them in one message.
    """
    _check_arguments(image_size, resize, crop)
    folder = Path(root).absolute()
    train, test, val, classes, origin = _splits(folder, test_share, split_seed)
    files, labels = zip(*train, *test, *val, strict=True)
    everything = Pictures(
        folder, np.array([os.fsencode(file) for file in files]), np.array(labels, np.int64), image_size, resize, crop,
        channels,
    )  # fmt: skip
    images, mapped = _cached(everything, cache, Path(cache_dir).absolute(), f"{test_share} {split_seed}")

    def split(part: slice) -> Split | Pictures:
        if images is None:
            return replace(everything, files=everything.files[part], labels=everything.labels[part])
        return Split(images[part], torch.from_numpy(everything.labels[part]), mapped=mapped)

    about = f"pictures in {folder}; the test split is {origin}"
    ends = len(train), len(train) + len(test)
    own = split(slice(ends[1], None)) if val else None
    fit = Fit(crop and image_size is not None, resize)  # for pictures to come, which may be of any size
    return Dataset(split(slice(ends[0])), split(slice(*ends)), classes, tuple(mean), tuple(std), about, own, fit=fit)


def _check_arguments(image_size: int | None, resize: int | None, crop: bool) -> None:
    if resize is not None and (image_size is None or not crop or resize < image_size):
        raise ConfigError(
            f"dataset.resize={resize} is the shortest side before the middle is cut out: it needs dataset.crop=true "
            f"and a dataset.image_size that is no larger, which is {image_size}."
        )


@dataclass(frozen=True, eq=False)
class Pictures(torch.utils.data.Dataset[Any]):
    """A map-style split that decodes a picture whenever it is asked for: uint8 [C, H, W], and its label.

    Attributes:
        files: the paths below `root`, as bytes in an array: workers that look at a list of texts each copy it.
        labels: int64 [N].
    """

    root: Path
    files: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    side: int | None
    resize: int | None
    crop: bool
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def targets(self) -> NDArray[np.int64]:
        """The labels, under torchvision's name for them."""
        return self.labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.pixels(index)), int(self.labels[index])

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The picture at `index`, uint8 [C, H, W]."""
        with self._opened(index) as opened:
            picture = upright(opened)
            self._check_size((picture.height, picture.width))
            size = None if self.side is None else (self.side, self.side)
            return pixels(picture, self.channels, size, Fit(self.crop, self.resize))

    def check(self, index: int) -> None:
        """Raise DataError unless the picture's header can be read and its size is right."""
        with self._opened(index) as picture:
            self._check_size(upright_size(picture))

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) of all pictures; where none is given, that of the first one that can be read."""
        if self.side is not None:
            return self.side, self.side
        for index in range(len(self)):
            with suppress(DataError), self._opened(index) as picture:
                return upright_size(picture)
        return 0, 0

    def _check_size(self, size: tuple[int, int]) -> None:
        if self.side is None and size != self.size:
            found, first = (f"{width}x{height}" for height, width in (size, self.size))
            raise ValueError(f"is {found} where the first is {first}; dataset.image_size=<pixels> makes all alike")

    def _opened(self, index: int) -> AbstractContextManager[Image.Image]:
        return opened(self.root / os.fsdecode(self.files[index]))

    def each(self, function: Callable[[int], Any], name: str) -> Iterator[Any]:
        """`function` of every index, in order, with a progress bar.

        Raises DataError at the end if it did so for any, with all of them.
        """
        broken = []
        bar = tqdm(total=len(self), desc=name, unit=" pictures", disable=None, leave=False)
        with bar:
            for result in attempt(function, range(len(self))):
                bar.update()
                if isinstance(result, DataError):
                    broken.append(str(result))
                else:
                    yield result
        if broken:
            more = f"\n  and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
            raise DataError(
                f"{len(broken):,} of {len(self):,} pictures cannot be used:\n  " + "\n  ".join(broken[:SHOWN]) + more
            )


# Which pictures there are


def _splits(root: Path, share: float, seed: int) -> tuple[list[Any], list[Any], list[Any], list[str], str]:
    """The (path below root, label) of the pictures for training, test and validation (there may be none of these), the
    classes, and whence the test split."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder. dataset.root=<folder> names that of the pictures.")
    folders = _folders(root)
    for name in folders:
        if re.fullmatch(SPLITS, name.casefold()) and name not in ("train", "test", "val"):
            raise DataError(f"{root / name}: the folders of the splits are train, test and val. Rename it.")
    test = next((name for name in ("test", "val") if name in folders), None)
    if test and "train" not in folders:
        raise DataError(f"{root} has {test} and no train: the training split is missing.")
    top = root / "train" if "train" in folders else root
    classes = _folders(top)
    pictures = _pictures(root, top, classes)
    if len(classes) < 2:
        raise DataError(
            f"{top} has {len(classes)} folders of pictures: {classes}. Each class, of two or more, needs one."
        )
    if empty := sorted(set(range(len(classes))) - {label for _, label in pictures}):
        raise DataError(f"{top / classes[empty[0]]} has no picture ({', '.join(SUFFIXES)}). Remove it, or fill it.")
    if test:
        val = _pictures(root, root / "val", classes) if {"test", "val"} <= set(folders) else []
        return pictures, _pictures(root, root / test, classes), val, classes, str(root / test)
    stay, held = hold_out([file for file, _ in pictures], [label for _, label in pictures], share, seed)
    return [pictures[i] for i in stay], [pictures[i] for i in held], [], classes, f"{share:g} of each class"


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if os.path.isdir(entry) and not entry.name.startswith("."))


def _pictures(root: Path, split: Path, classes: list[str]) -> list[tuple[str, int]]:
    """The path below root and the label of each picture of a split, in the order of torchvision's ImageFolder."""
    found, others = [], []

    def refuse(error: OSError) -> None:
        raise error

    for name in _folders(split):
        if name not in classes:
            raise DataError(f"{split / name} is of no class: the training split has no {name}.")
        for folder, file in walk(split / name, refuse):
            if file.lower().endswith(SUFFIXES):
                found.append((classes.index(name), folder, file))
            else:
                others.append(os.path.join(folder, file))
    if others:
        log.info("%s: %d files are no pictures and left out, such as %s", split, len(others), min(others))
    return [(os.path.relpath(os.path.join(folder, file), root), label) for label, folder, file in sorted(found)]


# Where they are kept


def _cached(pictures: Pictures, cache: str, folder: Path, settings: str) -> tuple[Tensor | None, bool]:
    """All pictures, uint8 [N, C, H, W], and whether in a file; None where they are only checked."""
    shape = len(pictures), pictures.channels, *pictures.size
    if cache == "auto":
        cache = "memory" if prod(shape) <= available_memory() / 4 else "disk"
    if cache == "memory":
        images = torch.empty(shape, dtype=torch.uint8)
        for index, pixels in enumerate(pictures.each(pictures.pixels, "decoding")):
            images[index] = torch.from_numpy(pixels)
        return images, False
    if cache == "disk":
        try:
            return _on_disk(pictures, shape, folder, settings), True
        except OSError as error:
            log.warning("%s cannot keep the pictures (%s); they are decoded each time, as by dataset.cache=none",
                        folder, first_line(error))  # fmt: skip
    for _ in pictures.each(pictures.check, "checking"):
        pass
    return None, False


def _on_disk(pictures: Pictures, shape: tuple[int, ...], folder: Path, settings: str) -> Tensor:
    """The pictures in a file whose name says of which files, and how, it was made; one that is out of date is replaced.

    Raises:
        OSError: the folder cannot be used, or is full.
    """
    how = f"{pictures.root} {pictures.side} {pictures.resize} {pictures.crop} {pictures.channels} {settings}"
    listing = hashlib.sha256()
    for name in pictures.files:
        with suppress(OSError):  # a link to nowhere is named as a picture that cannot be read
            about = os.stat(pictures.root / os.fsdecode(name))
            listing.update(b"%b\0%d\0%d\0" % (name, about.st_size, about.st_mtime_ns))
    kind = hashlib.sha256(os.fsencode(how)).hexdigest()[:16]
    file = folder / f"{kind}-{listing.hexdigest()[:32]}.npy"
    if (images := _mapped(file)) is not None:
        return images
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if (images := _mapped(file)) is not None:  # another process has made it meanwhile
            return images
        atomic.remove_leftovers(folder)
        for old in folder.glob(f"{kind}-*.npy"):
            old.unlink()
        if (free := shutil.disk_usage(folder).free) < prod(shape):
            raise OSError(f"{prod(shape):,} bytes are needed, {free:,} are free")
        with atomic.atomic_open(file) as out:
            np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for pixels in pictures.each(pictures.pixels, f"decoding to {folder}"):
                out.write(pixels.data)
        images = _mapped(file)
    assert images is not None
    return images


def _mapped(file: Path) -> Tensor | None:
    """The array of a file, read when it is looked at; None where there is none, or it is cut."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing may be written to it, which nothing does
        return torch.from_numpy(array)
