"""Files that are either whole or not there: written beside their place, synced, and renamed into it."""

import errno
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_open(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open `path` for writing such that it changes at the end, at once, or (after an exception) not at all.

    The content is on the disk, and so is its name, when the block has ended. The old file at `path` is kept as `keep`.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    sync(path.parent)


def remove_leftovers(folder: Path, age_s: float = -math.inf) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Args:
        age_s: leave alone what is younger, for another process may be writing it.
    """
    for path in folder.glob(".*.????????.part"):  # eight characters of mkstemp
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= age_s:
                path.unlink()


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a whole file, as `atomic_open` does."""
    with atomic_open(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def disk_full(error: BaseException | None) -> OSError | None:
    """The error of a full disk that an exception is, or comes from: torch.save and Hydra put it into another."""
    seen: list[BaseException] = []  # an exception may come from itself
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
