"""Save and restore a run such that it continues bit for bit, however and whenever it was stopped.

A checkpoint is a file of torch.save with its SHA-256 in the archive's comment. The last two are kept:
checkpoint.pt and checkpoint.previous.pt. One that cannot be read is set aside as checkpoint.damaged.pt.
"""

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from fmexp.errors import FmexpError
from fmexp.rundir import atomic
from fmexp.rundir.layout import CHECKPOINT, DAMAGED, PREVIOUS

log = logging.getLogger(__name__)

_DIGITS = 64


class CheckpointError(FmexpError):
    """Checkpoints that exist and cannot be read, or a state that no checkpoint can hold."""


def save(folder: Path, state: dict[str, Any], *, read_back: bool = False) -> None:
    """Write a checkpoint; the one before it becomes the previous one. At every moment one of them is whole.

    Args:
        read_back: first make sure that it could be read again; once a run is enough.

    Raises:
        CheckpointError: the state holds what a checkpoint cannot keep.
    """
    try:
        sealed = _sealed(state)
        if read_back:
            _unsealed(sealed)
    except Exception as error:  # whatever pickle and torch raise
        raise CheckpointError(
            f"The state of this run cannot be kept in a checkpoint: {error}\nA model's or optimizer's state_dict may "
            "hold tensors, numbers, strings, lists and dicts; other classes need torch.serialization.add_safe_globals."
        ) from error
    with atomic.atomic_open(folder / CHECKPOINT, keep=folder / PREVIOUS) as file:
        file.write(sealed)


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint, to be read or not."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS))


def can_keep(part: Any) -> bool:
    """Whether a checkpoint can hold what the `state_dict` of an object gives."""
    try:
        _unsealed(_sealed(part.state_dict()))
    except Exception:  # whatever it, pickle and torch raise
        return False
    return True


def load(folder: Path) -> dict[str, Any] | None:
    """The latest checkpoint that can be read, on the CPU, or None where there is none.

    Where that is the previous one, the damaged one is set aside, so that it will not take the good one's place.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    problems = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        try:
            state = _unsealed(path.read_bytes())
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever a damaged file makes torch.load raise
            problems.append(f"{path}: {error}")
            continue
        for problem in problems:
            os.replace(folder / CHECKPOINT, folder / DAMAGED)
            log.warning("a checkpoint cannot be read (%s); going on from the one before it, %s", problem, path.name)
        return state
    if problems:
        raise CheckpointError(
            "no checkpoint of this run can be read:\n  " + "\n  ".join(problems) + "\n"
            f"Nothing was deleted. To start over, move {folder} away or name another folder."
        )
    return None


def _sealed(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    # A zip archive ends with the length of its comment, here 0, and the comment.
    return content[:-2] + _DIGITS.to_bytes(2, "little") + hashlib.sha256(content).hexdigest().encode()


def _unsealed(sealed: bytes) -> dict[str, Any]:
    content = sealed[: -_DIGITS - 2] + bytes(2)
    if hashlib.sha256(content).hexdigest().encode() != sealed[-_DIGITS:]:
        raise ValueError("its checksum is wrong, so it is damaged or cut short")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
