"""Gets dataset files onto the disk, each checked against its checksum, and reads the IDX format.

`fetch` is the only place of the project that uses the network. Readers check again what they read,
so that a file damaged after its download is reported instead of trained on.

Why not a library: pooch, which was tried, would replace `_save` and `_chunks`, 45 lines, and bring seven packages;
it does not sync what it renames, nor stop at a file that is too long. torchvision's download writes to the final name
at once and has no time-out.
"""

import gzip
import hashlib
import http.client
import logging
import math
import os
import struct
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from fmexp.errors import DataError
from fmexp.rundir.atomic import sync

log = logging.getLogger(__name__)

TIMEOUT_S = 30
CHUNK_BYTES = 1 << 16
MAX_BYTES = 2**30  # of a file whose size is not known
MAX_DIMENSIONS = 8  # images need 3; numpy refuses more than 64, the format's header could claim 255


@dataclass(frozen=True)
class Remote:
    """A file to download: its name, the same in the folder and at the mirrors, its SHA-256 in hex, and its size.

    No more than `size` bytes are read.
    """

    name: str
    sha256: str
    size: int = MAX_BYTES


class _MirrorFailed(Exception):
    """Why one mirror did not give the file; the next one is tried."""


def fetch(files: Sequence[Remote], folder: Path, mirrors: Sequence[str], *, download: bool, hint: str) -> None:
    """Make sure that every file is in `folder`, packed (.gz) or unpacked, downloading what is missing.

    A folder that has all files is not written to. Several processes may call this at once: one downloads.
    `hint` is a sentence with ways out for the user, put at the end of every error.

    Raises DataError when files are missing and `download` is False, when no mirror gives a file, and when
    the folder cannot be read or written.
    """
    try:
        missing = _missing(files, folder)
        if not missing:
            return
        names = ", ".join(file.name for file in missing)
        if not download:
            raise DataError(f"{folder} lacks {names}, and downloading is off. {hint}")
        folder.mkdir(parents=True, exist_ok=True)
        log.info("downloading %s to %s (waits while another process does so)", names, folder)
        with FileLock(folder / ".lock"):
            # Look again: another process may have downloaded them while this one waited.
            for file in _missing(files, folder):
                _download(file, folder, mirrors, hint)
    except OSError as error:
        raise DataError(f"The data folder {folder} cannot be used: {error}. {hint}") from error


def open_checked(folder: Path, file: Remote) -> bytes:
    """Return the unpacked content of a file in `folder`; a file in its original form is checked against its checksum.

    An unpacked .gz is preferred to the .gz itself, and has no checksum to check.

    Raises DataError when the file cannot be read, has another checksum, or does not unpack.
    """
    try:
        path = _standing(folder, file)
        limit, length = file.size if path.name == file.name else MAX_BYTES, path.stat().st_size
        if length > limit:
            raise _corrupt(path, f"at most {limit:,} bytes", f"{length:,} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{file.name} in {folder} cannot be read: {error}") from error
    if path.name != file.name:
        return content
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise _corrupt(path, f"sha256 {file.sha256}", f"sha256 {found}")
    if not file.name.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _corrupt(path, "a whole gzip file", str(error)) from error


def read_idx(folder: Path, file: Remote) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes, writable, in the shape its header gives.

    Raises DataError as `open_checked` does, and when the header or the length is not that of such a file.
    """
    content = open_checked(folder, file)
    path = _standing(folder, file)
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise _corrupt(path, "00 00 08 and a number of dimensions first", content[:4].hex(" ") or "nothing")
    dimensions = content[3]
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _corrupt(path, f"1 to {MAX_DIMENSIONS} dimensions", str(dimensions))
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise _corrupt(path, f"a header of {header} bytes", f"{len(content)} bytes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    # Compared before anything is allocated: a damaged header may claim any size.
    length = header + math.prod(shape)
    if len(content) != length or 0 in shape:
        raise _corrupt(path, f"dimensions of 1 or more, and {length} bytes for {shape}", f"{len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _standing(folder: Path, file: Remote) -> Path:
    """Return the path of the unpacked file if it exists, else of the file itself, whether it exists or not."""
    unpacked = folder / file.name.removesuffix(".gz")
    return unpacked if unpacked.is_file() else folder / file.name


def _missing(files: Sequence[Remote], folder: Path) -> list[Remote]:
    return [file for file in files if not _standing(folder, file).is_file()]


def _corrupt(path: Path, expected: str, found: str) -> DataError:
    return DataError(f"{path} is corrupt: expected {expected}, found {found}. Delete it and run again to download it.")


def _download(file: Remote, folder: Path, mirrors: Sequence[str], hint: str) -> None:
    """Put the file into `folder` from the first mirror that gives it; to be called with the lock held."""
    # One fixed name, safe under the lock: what a killed process left is replaced, and does not pile up.
    temporary = folder / f".{file.name}.part"
    reasons = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{urllib.parse.quote(file.name)}"
        try:
            temporary.unlink(missing_ok=True)
            _save(url, file, temporary)
            os.replace(temporary, folder / file.name)
            sync(folder)  # so that the rename outlasts a power cut
            return
        except _MirrorFailed as error:
            log.warning("%s failed: %s", url, error)
            reasons.append(f"{url}: {error}")
        finally:
            temporary.unlink(missing_ok=True)
    tried = "\n  ".join(reasons or ["no mirrors are given"])
    raise DataError(f"{file.name} could not be downloaded to {folder}:\n  {tried}\n{hint}")


def _save(url: str, file: Remote, path: Path) -> None:
    """Write what `url` gives to the new file `path`, down to the disk, if its checksum is right."""
    digest = hashlib.sha256()
    with open(path, "xb") as out, closing(_chunks(url, file)) as chunks:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
        if (found := digest.hexdigest()) != file.sha256:
            raise _MirrorFailed(f"wrong checksum: expected sha256 {file.sha256}, found sha256 {found}")
        out.flush()
        os.fsync(out.fileno())


def _chunks(url: str, file: Remote) -> Generator[bytes, None, None]:
    """Yield the bytes at `url`, with a progress bar, and no more than the file has.

    A generator, so that only errors of the network become _MirrorFailed: those of the disk, raised while
    the caller writes, are OSError too but no reason to try another mirror.
    """
    got = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            length = response.headers["Content-Length"]
            total = None if length is None else int(length)
            with tqdm(total=total, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(CHUNK_BYTES):
                    got += len(chunk)
                    if got > file.size:
                        raise _MirrorFailed(f"too long: expected {file.size:,} bytes")
                    yield chunk
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL, or no length
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise _MirrorFailed(str(error) or type(error).__name__) from error
    # http.client takes an early end for the end of the file.
    if total is not None and got != total:
        raise _MirrorFailed(f"truncated: expected {total} bytes, found {got}")
