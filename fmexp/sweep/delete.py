"""Deleting runs that came to nothing: only what a run has written, behind no link, and under the run's lock."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import PurePath

from fmexp.errors import ConfigError, FmexpError, first_line, printable
from fmexp.rundir import layout
from fmexp.sweep.compare import Entry

STATUSES = ("failed", "interrupted", "diverged", "pruned", "paused")  # never what is complete or running
PARTS = ("seed", "objective", "train", "dataset", "model", "optimizer")  # of every configuration of fmexp's

# What a run, its stages and its writer leave beside `layout.FILES`. The projector has <step>/<tag>/ with three files.
_FILES = re.compile(
    r"checkpoint\.damaged\.pt|events\.out\.tfevents\.[^/]+|projector_config\.pbtxt|\.hydra/(hydra|overrides)\.yaml"
    r"|\d{5,}/[^/]+/(tensors\.tsv|metadata\.tsv|sprite\.png)"
    r"|(\.hydra/)?\.[^/]+\.[a-z0-9_]{8}\.part"  # of a process that was killed
)
_FOLDERS = re.compile(r"\.hydra|\d{5,}|\d{5,}/[^/]+")
# What is left of a deletion that is killed is still a run, which begins at its start.
_LAST = (layout.RESULT, layout.CONFIG, str(PurePath(layout.CONFIG).parent), layout.OWNER, layout.LOCK)


def ask_and_delete(runs: Sequence[Entry], status: str, *, yes: bool) -> int:
    """Name the runs of a status and delete them, once a person has agreed; the exit status: 1 if one was left.

    Raises:
        FmexpError: nobody can be asked.
    """
    chosen = [run for run in runs if run.status == status]
    ready, left = [], 0
    for run in chosen:
        said = f"{status}: {printable(str(run.folder))}"
        try:
            _written(run)
            ready.append(run)
            print(said + (f": {run.error.splitlines()[0]}" if run.error else ""))
        except (FmexpError, OSError) as error:
            left += 1
            print(f"{said} is left alone: {first_line(error)}")
    if not ready:
        print(f"{len(chosen)} of {len(runs)} runs {status}: nothing was deleted")
        return int(left > 0)
    if not yes and not _agreed(f"Delete {len(ready)} of {len(runs)} runs? [y/N] "):
        print("nothing was deleted")
        return 0
    for run in ready:
        try:
            _delete(run)
        except (FmexpError, OSError) as error:
            left += 1
            print(f"{printable(str(run.folder))} is left: {first_line(error)}")
    print(f"{len(chosen) - left} deleted" + (f", {left} left" if left else ""))
    return int(left > 0)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise FmexpError("Nothing was deleted: there is no terminal to ask at. Add --yes to delete them.")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print()
        return False


def _delete(run: Entry) -> None:
    """Delete a run's folder.

    Raises:
        FmexpError, OSError: it is not what it was, another process is running in it, or it holds what is not its own.
    """
    _written(run)  # before the lock is taken, which writes in the folder
    with layout.lock(run.folder):
        if (layout.read_result(run.folder) or {}).get("status", "interrupted") != run.status:
            raise ConfigError(f"it is not {run.status} any more")
        entries = _written(run)
        top = os.open(run.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for path, is_folder in entries:
                _remove(top, path, is_folder)
        finally:
            os.close(top)
        os.rmdir(run.folder)


def _written(run: Entry) -> list[tuple[PurePath, bool]]:
    """What is in a run's folder, relative to it, and whether each is a folder, in the order of being removed.

    Raises:
        FmexpError: no run has written it, or not all of it.
    """
    if missing := [part for part in PARTS if not any(key.split(".")[0] == part for key in run.settings)]:
        raise FmexpError(f"its configuration has no {missing[0]}, so that it is no run of fmexp")
    if run.folder.is_symlink():
        raise FmexpError("it is a link")
    found: list[tuple[PurePath, bool]] = []
    todo = [PurePath()]
    while todo:
        folder = todo.pop()
        with os.scandir(run.folder / folder) as entries:
            for entry in entries:
                path = folder / entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if not (is_folder and _FOLDERS.fullmatch(str(path))) and not (
                    entry.is_file(follow_symlinks=False) and (str(path) in layout.FILES or _FILES.fullmatch(str(path)))
                ):
                    raise FmexpError(f"it holds {path}, which no run has written" + " (a link)" * entry.is_symlink())
                found.append((path, is_folder))
                todo += [path] * is_folder
    if not (run.folder / layout.CONFIG).is_file():
        raise FmexpError(f"its {layout.CONFIG} is gone")
    return sorted(found, key=_turn)


def _turn(entry: tuple[PurePath, bool]) -> tuple[int, bool, int]:
    """The order of removal: checkpoints first, a folder after what is in it, `_LAST` at the end."""
    path = entry[0]
    last = _LAST.index(str(path)) + 1 if str(path) in _LAST else 0
    return last, not path.name.startswith("checkpoint"), -len(path.parts)


def _remove(top: int, path: PurePath, is_folder: bool) -> None:
    """Remove a file, or an empty folder, at a path below an open folder, whatever became a link in the meantime."""
    with ExitStack() as opened:
        for part in path.parent.parts:
            top = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            opened.callback(os.close, top)
        (os.rmdir if is_folder else os.unlink)(path.name, dir_fd=top)
