"""Images and labels as NumPy keeps them: one .npz, or a folder of .npy files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmexp.datasets.dataset import Dataset, Split, check_file, hold_out
from fmexp.errors import DataError, first_line

# The names of images and labels: MedMNIST's, Keras's, and those of a set that is not divided.
TRAIN = (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels"))
TEST = (("test_images", "test_labels"), ("x_test", "y_test"), ("val_images", "val_labels"), ("x_val", "y_val"))


def arrays(
    root: str,
    classes: Sequence[str] | None = None,
    test_share: float = 0.2,
    split_seed: int = 0,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> Dataset:
    """The arrays of an .npz, or of the .npy files in a folder, that have the names in TRAIN and TEST.

    Images are [N, H, W], [N, H, W, C] or [N, C, H, W], where C is less than H and W: bytes, or numbers that are bytes,
    0 to 255 or divided by 255. Labels are whole numbers from 0 on, [N] or [N, 1].

    Raises:
        DataError: what cannot be read, or is no images and labels; the message names the file and the array.
    """
    path = Path(root).absolute()
    if not path.exists():
        raise DataError(f"{path} is not there. dataset.root=<path> names the .npz, or the folder of the .npy files.")
    if (found := _split(path, TRAIN)) is None:
        raise DataError(
            f"{path} has none of {', '.join(images for images, _ in TRAIN)}: the training images are missing."
        )
    train, scale = found
    count, there = int(train.labels.max()) + 1, train.labels.unique().tolist()
    if classes is None and len(there) < count:
        absent = next(label for label in range(count) if label not in there)
        raise DataError(
            f"{path}: no training image has label {absent}, and the largest is {count - 1}. Labels are numbers from "
            "0 on; dataset.classes=[...] with a name for each allows for a class without images."
        )
    about = f"arrays in {path}"
    if found := _split(path, TEST, scale):
        test, _ = found
    else:
        parts = hold_out([str(index) for index in range(len(train))], train.labels.tolist(), test_share, split_seed)
        train, test = (Split(train.images[part], train.labels[part]) for part in parts)
        about += f"; the test split is {test_share:g} of each class"
    return Dataset(train, test, classes or [str(label) for label in range(count)], tuple(mean), tuple(std), about)


def _split(path: Path, pairs: Sequence[tuple[str, str]], scale: int | None = None) -> tuple[Split, int] | None:
    """The first pair of arrays that is there, and what its images were multiplied by to be bytes."""
    for names in pairs:
        images, labels = (_read(path, name) for name in names)
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            here, lacking = names if labels is None else names[::-1]
            raise DataError(f"{path} has {here} and no {lacking}.")
        labels = _labels(labels, f"{path}: {names[1]}")
        images = _channels_first(images, f"{path}: {names[0]}")
        if len(images) != len(labels):
            raise DataError(
                f"{path}: {names[0]} are {len(images)}, {names[1]} are {len(labels)}; each image needs one."
            )
        scale = scale or (255 if images.dtype.kind in "bf" and images.max() <= 1 else 1)
        images = _bytes(images, scale, f"{path}: {names[0]}")
        return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)), scale
    return None


def _read(path: Path, name: str) -> NDArray[Any] | None:
    """An array of an .npz, or the file of its name in a folder; None where there is none. Nothing is unpickled."""
    file = path / f"{name}.npy" if path.is_dir() else path
    if file != path and not file.exists():
        return None
    check_file(file)
    try:
        with open(file, "rb") as content:  # NumPy leaves one that is damaged open
            array: Any = np.load(content, allow_pickle=False)
            if file == path:
                if not isinstance(array, np.lib.npyio.NpzFile):
                    raise ValueError("the file is one array; several are in an .npz, or in the folder dataset.root")
                array = array.get(name)
        if not isinstance(array, np.ndarray | None):
            raise ValueError("it is not in NumPy's format")
    except Exception as error:  # of many kinds: BadZipFile, TokenError, MemoryError, for damaged bytes
        objects = (
            "it holds Python objects, which are not loaded, or is not NumPy's. Write numbers by numpy.save or savez."
        )
        said = objects if "allow_pickle" in str(error) else first_line(error)
        raise DataError(f"{path}: {name} cannot be read: {said}") from error
    if array is not None and not array.size:
        raise DataError(f"{path}: {name} is empty, with shape {list(array.shape)}.")
    found: NDArray[Any] | None = array
    return found


def _labels(labels: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Whole numbers [N] or [N, 1] -> int64 [N]."""
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.dtype.kind not in "iu" or flat.min() < 0:
        least = f" from {labels.min()}" if labels.dtype.kind in "iuf" else ""
        raise DataError(f"{where} are {_kind(labels)}{least} where whole numbers from 0 on, [N] or [N, 1], are needed.")
    return flat.astype(np.int64)


def _channels_first(images: NDArray[Any], where: str) -> NDArray[Any]:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, C, H, W]; the channels are fewer than the rows and columns."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4 or images.shape[1] == images.shape[3]:
        needed = "[N, H, W], [N, H, W, C] or [N, C, H, W], with C less than H and W,"
        raise DataError(f"{where} are {_kind(images)} where {needed} is needed.")
    return images.transpose(0, 3, 1, 2) if images.shape[3] < images.shape[1] else images


def _bytes(images: NDArray[Any], scale: int, where: str) -> NDArray[np.uint8]:
    """Numbers times `scale` -> bytes, where that is what they are but for the rounding of their type."""
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "biuf":
        with np.errstate(over="ignore"):  # what becomes infinite is no byte
            values = images.astype(np.promote_types(images.dtype, np.float32)) * np.float32(scale)
        rounded = values.round()
        slack = scale * float(np.finfo(images.dtype).eps) if images.dtype.kind == "f" else 0
        if rounded.min() >= 0 and rounded.max() <= 255 and (abs(values - rounded) <= slack).all():  # not if one is NaN
            return rounded.astype(np.uint8)
    numbers = f" from {images.min():g} to {images.max():g}" if images.dtype.kind in "biuf" else ""
    raise DataError(
        f"{where} are {_kind(images)}{numbers} where bytes are needed, 0 to 255, or just these as floats, or just "
        "these divided by 255. Write them as uint8."
    )


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
