"""A run's folder: who may write in it, which run it holds, and what came of that run."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
from omegaconf import DictConfig, ListConfig, OmegaConf

from fmexp import config
from fmexp.errors import ConfigError, FmexpError, printable
from fmexp.rundir import atomic, bounded

RESULT, CONFIG, WEIGHTS = "result.json", ".hydra/config.yaml", "model.pt"
LINEAGE, PATCH = ".hydra/lineage.json", ".hydra/uncommitted.patch"
LOCK, OWNER = ".lock", ".lock.owner"
TRACE = "trace.json.gz"
RUNGS = "rungs.json"
CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"  # of checkpoint.py
FILES = (
    RESULT, CONFIG, LINEAGE, PATCH, LOCK, OWNER, TRACE, RUNGS, "fmexp.log", WEIGHTS, CHECKPOINT, PREVIOUS,
)  # fmt: skip


class LockedError(ConfigError):
    """Another process is running in the folder."""


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Make the folder and hold it for this process; the system lets go of it when the process ends, however it ends.

    Args:
        wait: while another process holds it, wait.

    Raises:
        LockedError: another process holds it.
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK, timeout=0.5)  # is_held takes it for a moment
        lock.acquire(timeout=-1 if wait else None)
    except filelock.Timeout:
        raise LockedError(
            f"{folder}: {owner(folder)} is running in this folder. Wait for it, or name another folder."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to ({error.strerror}). Name another with hydra.run.dir=<folder>."
        ) from error
    try:
        with suppress(OSError):  # it is no more than a help for who comes second
            (folder / OWNER).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink()
        lock.release()


def holds_run(folder: Path) -> bool:
    """Whether a run has written its configuration there; not where one may not look."""
    return os.path.isfile(folder / CONFIG)


def check_no_run(root: Path) -> None:
    """Raise ConfigError where a folder that many runs are to lie in is the folder of a run itself."""
    if found := [name for name in (RESULT, Path(CONFIG).parent.name) if (root / name).exists()]:
        raise ConfigError(
            f"{root} is the folder of a run (it holds {found[0]}), and no place for a sweep. "
            "Name another with hydra.sweep.dir=<folder>."
        )


def check_files(folder: Path) -> None:
    """Raise FmexpError where a link, a pipe or a folder is in the place of one of a run's files."""
    for name in FILES:
        bounded.check_regular(folder / name)


def check_identity(folder: Path, tree: dict[str, Any], *, resume: bool) -> None:
    """Raise ConfigError where the folder holds another run than the resolved configuration `tree`, and FmexpError as
    `check_files` does."""
    check_files(folder)
    if not holds_run(folder):
        return
    if not resume:
        raise ConfigError(f"resume=false: {folder} holds a run already. Name another folder, or move this one away.")
    try:
        held = read_config(folder)
    except Exception as error:  # whatever a damaged file makes a YAML reader raise
        raise ConfigError(
            f"{folder / CONFIG} cannot be read, so that it is not known which run the folder holds: {error}\n"
            "Name another folder; or, if it is this run, remove that file to go on."
        ) from error
    check_same(folder, held, tree)


def check_same(folder: Path, held: dict[Any, Any], tree: dict[str, Any]) -> None:
    """Raise ConfigError where two resolved configurations, the folder's and another, are not of the same run, nor of
    that run with more epochs."""
    different = config.difference(held, tree)
    if different and not config.is_longer(held, tree):
        raise ConfigError(
            f"{folder} holds a run of another configuration, which differs in\n  "
            + "\n  ".join(different)
            + "\nName another folder, or use the old values to go on with that run."
        )


def superfluous_checkpoints(folder: Path, status: str, tree: dict[str, Any]) -> list[Path]:
    """The checkpoints in the folder of a run of this status that are not wanted any more, for it has ended: all but,
    with train.keep_checkpoint, the last one of a run that is complete, from which more epochs can go on, or was."""
    if status not in ("complete", "diverged"):
        return []
    keep = (status == "complete" or (folder / WEIGHTS).exists()) and tree["train"]["keep_checkpoint"]
    names = (DAMAGED, PREVIOUS) if keep else (DAMAGED, PREVIOUS, CHECKPOINT)
    return [folder / name for name in names if (folder / name).exists()]


def discard_checkpoints(folder: Path, status: str, tree: dict[str, Any]) -> None:
    """Remove the superfluous ones."""
    for path in superfluous_checkpoints(folder, status, tree):
        path.unlink(missing_ok=True)


def write_config(folder: Path, tree: dict[str, Any], others: Mapping[str, DictConfig | ListConfig]) -> str:
    """Write .hydra/config.yaml, as resolved, which makes the folder that run's; and what Hydra keeps beside it.

    Returns:
        the content of config.yaml.
    """
    (folder / CONFIG).parent.mkdir(exist_ok=True)
    for name, node in others.items():
        atomic.atomic_write(folder / ".hydra" / name, OmegaConf.to_yaml(node))
    content = OmegaConf.to_yaml(OmegaConf.create(tree))
    atomic.atomic_write(folder / CONFIG, content)
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run that the folder holds.

    Raises:
        FileNotFoundError, FmexpError: it cannot be read.
    """
    held = bounded.read_yaml(folder / CONFIG)
    if not isinstance(held, dict):
        raise FmexpError(f"{folder / CONFIG} is no mapping.")
    return {str(key): value for key, value in held.items()}


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of result.json, or None where no run has ended with it: there is none, or it is damaged."""
    try:
        result = bounded.read_json(folder / RESULT)
    except (FileNotFoundError, FmexpError):
        return None
    return result if isinstance(result, dict) else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, whole."""
    atomic.atomic_write(folder / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")


def write_failure(
    folder: Path, tree: dict[str, Any], overrides: Sequence[str], error: str, details: str = "", killed: bool = False
) -> None:
    """Note in a sweep member's folder that it failed before, or without, a word of its own.

    A folder that another process is running in, or that holds another run, or one that is complete, is left as it is.

    Args:
        killed: whether its process ended without a word: another one may do better.

    Raises:
        FmexpError: as `check_files`.
    """
    check_files(folder)
    if is_locked(folder) or (holds_run(folder) and digest(folder) != config.digest(tree)):
        return
    known = read_result(folder) or {}
    if known.get("status") in ("complete", "diverged"):  # its process, or that of another sweep, was quicker
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not holds_run(folder):
        write_config(folder, tree, {"overrides.yaml": OmegaConf.create(list(overrides))})
    with (folder / "fmexp.log").open("a") as file:
        file.write(f"{details or error}\n")
    ended = {"status": "failed", "objective": None, **_words(tree), "error": error, "killed": killed}
    write_result(folder, {**known, **ended})


def write_pruned(folder: Path, tree: dict[str, Any], step: int) -> None:
    """Note in the folder of a halving sweep's member that it does not go on from a step."""
    known = read_result(folder) or {}
    about = {"metrics": {}, "steps": step, "config_digest": digest(folder), **_words(tree)}
    write_result(folder, {**about, **known, "status": "pruned", "objective": None})


def _words(tree: dict[str, Any]) -> dict[str, Any]:
    """What a run is found by."""
    return {key: tree[key] for key in ("tags", "note") if key in tree}


def digest(folder: Path) -> str:
    """The digest of the configuration whose run the folder holds."""
    known = (read_result(folder) or {}).get("config_digest")
    return known or config.digest(read_config(folder))


def owner(folder: Path) -> str:
    """Who holds the folder, in words."""
    with suppress(OSError, FmexpError, KeyError, TypeError):
        said = bounded.read_json(folder / OWNER)
        return printable(f"process {said['pid']} on {said['host']}")
    return "another process"


def is_locked(folder: Path) -> bool:
    """Whether a process is running in the folder, which may be one where nothing can be written."""
    try:
        with bounded.open_regular(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # filelock's own is exclusive, of the same kind
    except BlockingIOError:
        return True
    except (OSError, FmexpError):
        return False
    return False
