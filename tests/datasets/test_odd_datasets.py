"""Dataset folders that came to harm, drawn by Hypothesis: each is read rightly or refused by name."""

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tools import write_idx

from fmexp import datasets
from fmexp.datasets import Dataset, Split
from fmexp.datasets.arrays import arrays
from fmexp.datasets.image_folder import image_folder
from fmexp.errors import FmexpError

IMAGES = np.random.default_rng(0).integers(0, 256, (18, 1, 28, 28), np.uint8)
LABELS = np.arange(18) % 3
BUILD: dict[str, Callable[[Path], Dataset]] = {
    "npy": lambda root: arrays(str(root)),
    "npz": lambda root: arrays(str(root / "own.npz")),
    "pictures": lambda root: image_folder(str(root), channels=1, cache="memory"),
    "idx": lambda root: datasets.fashion_mnist(str(root), download=False),
}


def npy(array: NDArray[Any], **header: Any) -> bytes:
    """A .npy file, whose header may say something else than what it holds."""
    out = io.BytesIO()
    if header:
        about = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(out, {**about, **header})
        out.write(array.tobytes())
    else:
        np.save(out, array)
    return out.getvalue()


def png(array: NDArray[Any], mode: str | None = None) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, "PNG" if mode != "CMYK" else "JPEG")
    return out.getvalue()


def huge_png(content: bytes) -> bytes:
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


ARRAY: dict[str, Callable[[NDArray[Any]], bytes]] = {
    "floats": lambda a: npy(a / 255),
    "complex": lambda a: npy(a.astype(complex)),
    "pickled": lambda a: npy(a.astype(object)),
    "text": lambda a: npy(a.astype(str)),
    "structured": lambda a: npy(a.view([("x", a.dtype)])),
    "infinite": lambda a: npy(np.full(a.shape, np.inf)),
    "enormous": lambda a: npy(np.full(a.shape, 1.7e308)),
    "one less": lambda a: npy(a[:-1]),
    "flat": lambda a: npy(a.reshape(-1)),
    "a scalar": lambda a: npy(np.array(1)),
    "without rows": lambda a: npy(a[..., :0]),
    "channels last": lambda a: npy(np.moveaxis(a, 1, -1) if a.ndim > 1 else a[:, None]),
    **{
        f"declared {shape}": lambda a, shape=shape: npy(a, shape=shape)  # type: ignore[misc]
        for shape in ((2**40, 28), (2**32, 2**32), (2**62, 4, 4), (-1, 28, 28), (2**70,), (19, 1, 28, 28))
    },
    "of an odd header": lambda a: npy(a).replace(b"'descr'", b"'descr(", 1),
    "an archive": lambda a: packed({"a.npy": npy(a)}),
}  # fmt: skip
PICTURE: dict[str, Callable[[NDArray[Any]], bytes]] = {
    "larger": lambda a: png(a.repeat(2, 0)),
    "16 bits": lambda a: png(a.astype(np.uint16) * 257),
    "declared huge": lambda a: huge_png(png(a)),
    **{mode: lambda a, mode=mode: png(a, mode) for mode in ("CMYK", "P", "RGBA", "1")},  # type: ignore[misc]
}
IDX: dict[str, Callable[[bytes], bytes]] = {
    "of floats": lambda c: c[:2] + b"\r" + c[3:],
    "of many dimensions": lambda c: c[:3] + b"\xff" + c[4:],
    "declared huge": lambda c: c[:4] + b"\xff" * 4 + c[8:],
}
CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda c: c[: len(c) * 2 // 3],
    "cut to a header": lambda c: c[:20],
    "empty": lambda c: b"",
    "garbage": lambda c: np.random.default_rng(len(c)).bytes(len(c)),
    "garbage after its first bytes": lambda c: c[:8] + np.random.default_rng(1).bytes(200),
    "closed twice": lambda c: c + c,
}
PATH: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a named pipe": lambda path: os.mkfifo(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to its folder": lambda path: path.symlink_to("."),
    "not UTF-8": lambda path: path.with_name(f"caf\udce9{path.suffix}").write_bytes(b"no data"),
}


def packed(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def parts(kind: str, root: Path) -> dict[str, tuple[bytes, Any]]:
    """The files of a small dataset, each with what the harm of its own format begins from."""
    if kind == "pictures":
        names = [f"{'train' if n < 12 else 'test'}/{label}/{n}.png" for n, label in enumerate(LABELS)]
        return {name: (png(image[0]), image[0]) for name, image in zip(names, IMAGES, strict=True)}
    arrays = {"train_images": IMAGES[:12], "train_labels": LABELS[:12]}
    arrays |= {"test_images": IMAGES[12:], "test_labels": LABELS[12:]}
    if kind != "idx":
        return {f"{name}.npy": (npy(array), array) for name, array in arrays.items()}
    files = {}
    for (split, what), array in ((name.split("_"), array) for name, array in arrays.items()):
        dimensions = "idx3" if what == "images" else "idx1"
        path = root / "FashionMNIST" / "raw" / f"{split.replace('test', 't10k')}-{what}-{dimensions}-ubyte"
        write_idx(path, (array[:, 0] if what == "images" else array).astype(np.uint8))
        files[str(path.relative_to(root))] = (path.read_bytes(), path.read_bytes())
    return files


def harm(draw: Callable[[Any], Any], kind: str, root: Path) -> dict[str, str]:
    """Write a dataset below `root` with one or two of its files harmed; returns how each of these was."""
    files, harmed = parts(kind, root), {}
    own: dict[str, Any] = {"pictures": PICTURE, "idx": IDX}.get(kind, ARRAY)

    def changed(name: str, content: bytes, array: Any, hows: list[str]) -> Any:
        how = harmed[name] = draw(st.sampled_from(hows))
        return PATH[how] if how in PATH else CONTENT[how](content) if how in CONTENT else own[how](array)

    made: dict[str, Any] = {name: content for name, (content, _) in files.items()}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        made[name] = changed(name, *files[name], [*own, *CONTENT, *(PATH if kind != "npz" else ("gone",))])
    if kind == "npz":
        made = {"own.npz": packed({name: content for name, content in made.items() if isinstance(content, bytes)})}
        if draw(st.booleans()):
            made["own.npz"] = changed("own.npz", made["own.npz"], None, [*CONTENT, *PATH])
    for name, content in made.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return harmed


def snapshot(root: Path) -> dict[Path, Any]:
    """Every path below a folder: its kind, size and time, and what a file holds."""
    found = {}
    for path in root.rglob("*"):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[path] = (about.st_mode, about.st_size, about.st_mtime_ns, content)
    return found


def assert_right(dataset: Dataset) -> None:
    """Check that each image has its own label; what a format's harm made of an image is another one."""
    known = {image.tobytes(): label for image, label in zip(IMAGES, LABELS.tolist(), strict=True)}
    for split in (dataset.train, dataset.test):
        assert isinstance(split, Split)
        found = [
            (known.get(image.numpy().tobytes()), label.item())
            for image, label in zip(split.images, split.labels, strict=True)
        ]
        assert all(expected in (None, label) for expected, label in found)
        assert any(expected is not None for expected, _ in found)


@pytest.mark.timeout(120, method="thread")  # for what waits in a thread no signal ends
@settings(max_examples=100)
@given(st.data())
def test_a_harmed_folder_is_read_rightly_or_refused_by_name(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(BUILD)))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        harmed = harm(data.draw, kind, root)
        before = snapshot(root)
        said = ""
        try:
            dataset = BUILD[kind](root)
            datasets.check(dataset)
            assert_right(dataset)
        except FmexpError as error:
            said = str(error)
        # Where the first picture is another size it is the others that are refused.
        assert not said or any(Path(name).stem in said for name in harmed) or (kind == "pictures" and folder in said)
        assert snapshot(root) == before
