"""Odd dataset folders, drawn by hypothesis: what is built is right, or refused in words that name the file."""

import io
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tools import write_idx_splits

from fmexp import datasets
from fmexp.datasets import Split, arrays, image_folder
from fmexp.errors import FmexpError


def packed(array: Any, **how: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **how)
    return content.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, form)
    return content.getvalue()


SOUND = packed(np.arange(8 * 36).reshape(8, 6, 6).astype(np.uint8))
HUGE = SOUND.replace(b"(8, 6, 6), }" + b" " * 12, b"(8000000000000, 6, 6), }")
assert HUGE != SOUND
CONTENTS: dict[str, bytes] = {
    "empty": b"", "zeros": bytes(100), "bytes": bytes(range(256)), "text": b"not what it says",
    "zip": b"PK\x03\x04" + bytes(50), "array": SOUND, "huge": HUGE, "cut": SOUND[:150], "header": SOUND[:60],
    "no dict": SOUND.replace(b"{'descr'", b"['descr'"), "bad type": SOUND.replace(b"|u1", b"|z9"),
    "objects": packed(np.array([{}, []], dtype=object), allow_pickle=True),
    "floats": packed(np.full((8, 6, 6), np.nan)),
    "words": packed(np.array(["a", "b"])), "negative": packed(np.full(8, -1)), "large": packed(np.full(8, 2**62)),
    "scalar": packed(np.array(1)), "flat": packed(np.zeros((0, 6, 6), np.uint8)), "labels": packed(np.arange(8) % 2),
    "picture": picture(), "grey": picture("L"), "16 bit": picture("I;16"), "palette": picture("P"),
    "one bit": picture("1"),
    "CMYK": picture("CMYK", form="JPEG"), "other size": picture(size=(9, 8)), "GIF": picture("P", form="GIF"),
    "TIFF": picture(form="TIFF"), "cut picture": picture()[:50], "long name": b"\x89PNG\r\n\x1a\n" + b"\xff" * 60,
}  # fmt: skip
HOW = st.sampled_from(["nothing", "pipe", "folder", "nowhere", "loop", "link", *CONTENTS])


def harm(path: Path, how: str) -> None:
    """Replace a file of the folder that the test has made."""
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how in ("nowhere", "loop", "link"):
        path.symlink_to({"nowhere": "not there", "loop": path.name, "link": "/dev/null"}[how])
    elif how != "nothing":
        path.write_bytes(CONTENTS[how])


def in_arrays(root: Path) -> Callable[[], datasets.Dataset]:
    for name, content in (("images", SOUND), ("labels", packed(np.arange(8) % 2))):
        (root / f"{name}.npy").write_bytes(content)
    return lambda: arrays.arrays(str(root))


def in_npz(root: Path) -> Callable[[], datasets.Dataset]:
    np.savez(root / "set.npz", images=np.zeros((8, 6, 6), np.uint8), labels=np.arange(8) % 2)
    return lambda: arrays.arrays(str(root / "set.npz"))


def in_pictures(cache: str) -> Callable[[Path], Callable[[], datasets.Dataset]]:
    def make(root: Path) -> Callable[[], datasets.Dataset]:
        for name in ("cats", "d\udcffgs"):
            (root / name).mkdir()
            for number in range(4):
                (root / name / f"{number}.png").write_bytes(picture())
        return lambda: image_folder.image_folder(str(root), cache=cache, cache_dir=str(root.parent / "cache"))

    return make


def in_idx(root: Path) -> Callable[[], datasets.Dataset]:
    write_idx_splits(root, "FashionMNIST")
    return lambda: datasets.fashion_mnist(str(root), download=False, mirrors=[])


KINDS: dict[str, Callable[[Path], Callable[[], datasets.Dataset]]] = {
    "arrays": in_arrays, "npz": in_npz, "idx": in_idx,
    **{f"pictures, cache={cache}": in_pictures(cache) for cache in ("memory", "disk", "none")},
}  # fmt: skip


@contextmanager
def no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(root: Path) -> dict[Path, object]:
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            for path in root.rglob("*") if path.name != ".lock"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_folder_is_a_dataset_or_refused_in_words(kind: str) -> None:
    built: list[NDArray[Any]] = []

    @settings(max_examples=30, phases=[Phase.generate])
    @given(st.dictionaries(st.integers(0, 7), HOW, min_size=1, max_size=3))
    def check(harms: dict[int, str]) -> None:
        with tempfile.TemporaryDirectory() as made, no_hang():
            root = Path(made) / "root"
            root.mkdir()
            build = KINDS[kind](root)
            files = sorted(path for path in root.rglob("*") if path.is_file())
            for number, how in harms.items():
                if number < len(files):
                    harm(files[number], how)
            before = content(root)
            try:
                dataset = build()
                datasets.check(dataset)
            except FmexpError as refused:
                said, dataset = str(refused), None
                assert str(root) in said or "dataset" in said
            assert content(root) == before
            if dataset is None:
                return
            images, labels = dataset.take(dataset.train, torch.arange(datasets.length(dataset.train)))
            assert len(images) == len(labels) == datasets.length(dataset.train)
            assert images.isfinite().all()
            built.append(images.numpy())
            if isinstance(dataset.train, Split):
                assert int(labels.max()) < len(dataset.classes)

    check()
    assert built, "none was right"
