"""One picture: its file opened, whatever that holds, and its pixels as a model is given them; and the pictures of a
folder."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fmexp.datasets.dataset import Fit, check_file
from fmexp.errors import DataError, first_line
from fmexp.process import available_cores

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # a suffix may be wrong; GIF, for pages have given it other names
AT_ONCE = 256  # pictures that wait in memory between those who decode them and the one who takes them

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open the file of a picture.

    Raises:
        DataError: it cannot be read, now or within the block, or is no picture; the message names it.
    """
    check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except Exception as error:  # of many kinds: SyntaxError, struct.error, IndexError, for bytes that are damaged
        raise DataError(f"{path} {_reason(path, error)}") from error


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its camera was held."""
    return ImageOps.exif_transpose(picture)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width of the picture as its camera was held, from its header."""
    width, height = picture.size
    exif = Image.Image.getexif(picture)  # PNG's own decodes the picture
    return (width, height) if exif.get(ExifTags.Base.Orientation, 1) > 4 else (height, width)


def pixels(picture: Image.Image, channels: int, size: tuple[int, int] | None, fit: Fit) -> NDArray[np.uint8]:
    """The bytes [C, H, W] of a picture: grey (one channel) or RGB, white where it was transparent.

    Args:
        size: the height and width that it is brought to as `fit` says; None: it keeps its own.
    """
    if picture.mode.startswith("I"):  # 16 bits, of which PIL's own conversion makes white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None:
        picture = _fitted(picture, size, fit)
    array = np.asarray(picture).reshape(picture.height, picture.width, channels)
    return np.array(array.transpose(2, 0, 1), order="C")


def _fitted(picture: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Resized and cropped, to the very pixels of torchvision's Resize and CenterCrop."""
    height, width = size
    if fit.crop:
        shortest = fit.resize or max(size)
        width, height = (shortest * side // min(picture.size) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((picture.width - size[1]) / 2), round((picture.height - size[0]) / 2)
    return picture.crop((left, top, left + size[1], top + size[0]))


def attempt(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result | DataError]:
    """`function` of every item, or the DataError that it raises, in order, by a thread for each core: PIL lets others
    work while it decodes."""

    def one(item: Item) -> Result | DataError:
        try:
            return function(item)
        except DataError as error:
            return error

    rest = iter(items)
    with ThreadPoolExecutor(available_cores()) as threads:
        while some := list(islice(rest, AT_ONCE)):
            yield from threads.map(one, some)


def walk(folder: str | os.PathLike[str], refuse: Callable[[OSError], None]) -> Iterator[tuple[str, str]]:
    """The folder and the name of every file in or below a folder, pictures or not, in no order; links are followed.

    Hidden ones, and what other systems keep beside pictures, are left out.

    Args:
        refuse: called with the error of a folder that cannot be read.
    """
    seen = set[str]()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # by a link
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith(".") and file.casefold() not in ("thumbs.db", "desktop.ini"):
                yield place, file


def _reason(path: Path, error: Exception) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    if isinstance(error, UnidentifiedImageError):
        return f"is no picture ({', '.join(FORMATS)})" if path.stat().st_size else "is empty"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
