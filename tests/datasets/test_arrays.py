"""Arrays of NumPy's: their names, layouts and types, what is held out, and what is refused in words."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fmexp.datasets.arrays import arrays
from fmexp.errors import DataError

RNG = np.random.default_rng(0)
LABELS = np.arange(20) % 4
GREY, COLOUR = RNG.integers(0, 256, (20, 6, 5), np.uint8), RNG.integers(0, 256, (20, 3, 6, 5), np.uint8)


def of(images: Any = GREY, labels: Any = LABELS) -> dict[str, NDArray[Any]]:
    return {"train_images": images, "train_labels": labels, "test_images": images[:8], "test_labels": labels[:8]}


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    """Write an .npz of some arrays, and return its path."""

    def written(parts: dict[str, NDArray[Any]]) -> str:
        np.savez(tmp_path / "arrays.npz", allow_pickle=True, **parts)
        return str(tmp_path / "arrays.npz")

    return written


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("images", "labels", "test_images", "test_labels"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_are_found_by_their_names(
    tmp_path: Path, npz: Callable[..., str], names: tuple[str, ...], kind: str
) -> None:
    parts = dict(zip(names, of().values(), strict=True))
    for name, array in parts.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = arrays(npz({**parts, "others": np.array([1, "a", None])}) if kind == "npz" else str(tmp_path))
    assert torch.equal(data.train.images, torch.from_numpy(GREY[:, None]))
    assert torch.equal(data.train.labels, torch.from_numpy(LABELS))
    assert torch.equal(data.test.images, torch.from_numpy(GREY[:8, None]))
    assert (data.classes, data.mean, data.description[:9]) == (["0", "1", "2", "3"], (0.5,), "arrays in")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (GREY[:, :, :, None], GREY[:, None]),
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        (np.asfortranarray(GREY), GREY[:, None]),
        (GREY.astype(np.int64), GREY[:, None]),
        (GREY.astype(">f8"), GREY[:, None]),
        *((GREY.astype(kind) / kind(255), GREY[:, None]) for kind in (np.float16, np.float32, np.float64)),
        (GREY * np.float32(1 / 255), GREY[:, None]),
        (GREY > 99, (GREY[:, None] > 99) * np.uint8(255)),
    ],
)
def test_images_of_any_layout_and_type_that_are_bytes(
    npz: Callable[..., str], images: NDArray[Any], expected: NDArray[np.uint8]
) -> None:
    data = arrays(npz(of(images)))
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous()
    assert np.array_equal(data.train.images, expected)
    assert np.array_equal(data.test.images, expected[:8])


def test_a_dark_test_split_is_multiplied_as_the_training_split_is(npz: Callable[..., str]) -> None:
    parts = of(GREY.astype(np.float32)) | {"test_images": np.ones((8, 6, 5), np.float32)}
    assert arrays(npz(parts)).test.images.unique().tolist() == [1]


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.astype(np.uint8), LABELS.astype(">i4")])
def test_labels_of_any_whole_number(npz: Callable[..., str], labels: NDArray[Any]) -> None:
    data = arrays(npz(of(labels=labels)), classes=["a", "b", "c", "d"])
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == LABELS.tolist()
    assert data.classes == ["a", "b", "c", "d"]


def test_without_a_test_split_a_share_of_each_class_is_held_out(npz: Callable[..., str]) -> None:
    data = arrays(npz({"images": GREY, "labels": LABELS}), test_share=0.4, split_seed=3)
    assert (torch.bincount(data.train.labels).tolist(), torch.bincount(data.test.labels).tolist()) == ([3] * 4, [2] * 4)
    images, labels = (
        torch.cat([getattr(split, name) for split in (data.train, data.test)]) for name in ("images", "labels")
    )
    order = [GREY.tolist().index(image) for image in images[:, 0].tolist()]
    assert sorted(order) == list(range(20))
    assert labels.tolist() == LABELS[order].tolist()
    assert data.description.endswith("; the test split is 0.4 of each class")


def test_a_class_without_images_needs_a_name(npz: Callable[..., str]) -> None:
    path = npz(of(labels=LABELS + 1))
    with pytest.raises(
        DataError, match=r"no training image has label 0, and the largest is 4\. .* dataset\.classes=\["
    ):
        arrays(path)
    assert arrays(path, classes=["none", "a", "b", "c", "d"]).train.labels.min() == 1


def without(*names: str) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in of().items() if name not in names}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pictures": GREY}, "arrays.npz has none of train_images, x_train, images: the training images are missing."),
        (without("train_labels"), "arrays.npz has train_images and no train_labels."),
        (without("test_images"), "arrays.npz has test_labels and no test_images."),
        (
            of(GREY[:, 0]),
            "arrays.npz: train_images are uint8 [20, 5] where [N, H, W], [N, H, W, C] or [N, C, H, W], with",
        ),
        (of(GREY[:, :5, None].repeat(5, 2)), "train_images are uint8 [20, 5, 5, 5] where"),
        (
            of(GREY.astype(np.float32) / 100),
            "train_images are float32 [20, 1, 6, 5] from 0 to 2.55 where bytes are needed",
        ),
        (of(GREY - 1.0), "train_images are float64 [20, 1, 6, 5] from -1 to 254 where"),
        (of(GREY + np.uint16(1)), "train_images are uint16 [20, 1, 6, 5] from 1 to 256 where"),
        (of(np.where(GREY > 9, GREY, np.nan)), "train_images are float64 [20, 1, 6, 5] from nan to nan where"),
        (of(np.full(GREY.shape, 1.7e308)), "train_images are float64 [20, 1, 6, 5] from 1.7e+308 to 1.7e+308 where"),
        (of(GREY.astype(str)), "train_images are <U3 [20, 1, 6, 5] where bytes are needed"),
        (of(GREY[:0], LABELS[:0]), "arrays.npz: train_images is empty, with shape [0, 6, 5]."),
        (of(labels=LABELS[:19]), "arrays.npz: train_images are 20, train_labels are 19; each image needs one."),
        (of(labels=LABELS - 1), "train_labels are int64 [20] from -1 where whole numbers from 0 on, [N] or [N, 1],"),
        (of(labels=LABELS / 1), "train_labels are float64 [20] from 0.0 where"),
        (of(labels=np.eye(4, dtype=int)[LABELS]), "train_labels are int64 [20, 4] from 0 where"),
        (
            of(labels=LABELS.astype(object)),
            "arrays.npz: train_labels cannot be read: it holds Python objects, which are not loaded, or is",
        ),
    ],
)
def test_arrays_that_are_no_dataset(npz: Callable[..., str], parts: dict[str, NDArray[Any]], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        arrays(npz(parts))


def test_files_that_cannot_be_read(tmp_path: Path, npz: Callable[..., str]) -> None:
    path = Path(npz(of()))
    content = path.read_bytes()
    for damaged, message in (
        (content[:2000], "arrays.npz: train_images cannot be read: File is not a zip file"),
        (
            content[:100] + bytes([content[100] ^ 1]) + content[101:],
            "arrays.npz: train_images cannot be read: Bad CRC-32",
        ),
        (b"no array", "arrays.npz: train_images cannot be read: it holds Python objects, which are not loaded, or is"),
        (b"", "arrays.npz: train_images cannot be read: No data left in file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(message)):
            arrays(str(path))
    np.save(tmp_path / "one.npy", GREY)
    with pytest.raises(
        DataError, match=r"one\.npy: train_images cannot be read: the file is one array; several are in"
    ):
        arrays(str(tmp_path / "one.npy"))
    with pytest.raises(DataError, match=r"nowhere\.npz is not there\. dataset\.root=<path> names"):
        arrays(str(tmp_path / "nowhere.npz"))
