"""Where a run comes from: the git commit of its code and what was not committed, the command, the machine, the times.

`.hydra/lineage.json` keeps this of the run's first start, and `.hydra/uncommitted.patch` the changes of tracked files:
`git apply` makes the code again. The repository is that of the folder in which the command was typed; where there is no
git, or it does not answer in time, less is noted, and nothing fails.
"""

import functools
import glob
import hashlib
import json
import logging
import os
import selectors
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fmexp.errors import FmexpError, printable
from fmexp.rundir import atomic, bounded, layout

log = logging.getLogger(__name__)

LIMIT_S = 5  # for all that git is asked
MOST_PATCH = 10**6  # bytes of changes that are kept
MOST_STATUS, MOST_NAMES = 2**20, 100  # bytes of git's answer, and names of untracked files
LEFT_OUT = f"left out: more than {MOST_PATCH:,} bytes"
# Git may not write, ask, fetch or execute what a configuration names, but for filters (LFS), which a diff needs.
_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
_GIT = ("git", "--no-pager", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false")
_STATUS = ("status", "--porcelain=v2", "-z", "--untracked-files=normal", "--no-renames", "--ignore-submodules=dirty")
_DIFF = ("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--no-relative",
         "--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--ignore-submodules=dirty")  # fmt: skip
_slow: set[Path] = set()  # repositories in which git took too long


@dataclass(frozen=True)
class Code:
    """The state of a repository.

    Attributes:
        said: commit, dirty (whether tracked files were changed; None: git took too long), patch (its file, or why there
            is none), patch_sha256, untracked (names); None outside of a repository.
        patch: the changes of tracked files.
    """

    said: dict[str, Any] | None = None
    patch: bytes | None = None


def begin(folder: Path, command: str, *, resumed: bool, longer: bool = False) -> dict[str, Any]:
    """Note in a run's folder where the run comes from, or, where it goes on, whether its code is another one now.

    Args:
        longer: it goes on with more epochs, by another command.

    Returns:
        git, host, cwd, command and start of the first start; resumed_with: the same of those with other code or epochs.
    """
    code = _code(Path.cwd(), folder)
    now = {"git": code.said, "host": socket.gethostname(), "cwd": printable(os.getcwd()),
           "command": printable(command), "start": _now()}  # fmt: skip
    if resumed:
        about = _read(folder)
        later = about.get("resumed_with", [])
        before = (later or [about])[-1].get("git")
        differs = _differs(before, code.said)
        if about and not (differs or longer):
            return about
        if about and differs:
            log.warning("the code has changed since this run began or went on last: %s then, %s now; result.json "
                        "lists both", _short(before), _short(code.said))  # fmt: skip
        about = {**about, "resumed_with": [*later, now]}
    else:
        about = now
        if code.patch is not None:
            atomic.atomic_write(folder / layout.PATCH, code.patch)
        else:  # of a process that was killed before its first checkpoint
            (folder / layout.PATCH).unlink(missing_ok=True)
        if code.said and code.said["patch"] == LEFT_OUT:
            log.warning("more than %s bytes are changed and not committed: no patch is kept", f"{MOST_PATCH:,}")
    atomic.atomic_write(folder / layout.LINEAGE, json.dumps(about, indent=2) + "\n")
    return about


def ended(folder: Path) -> dict[str, Any]:
    """What `begin` has noted in a run's folder, and the time."""
    return {**_read(folder), "end": _now()}


def text(about: dict[str, Any]) -> str:
    """A lineage as Markdown, for TensorBoard."""
    return f"```json\n{json.dumps(about, indent=2)}\n```"


def _read(folder: Path) -> dict[str, Any]:
    """The content of lineage.json; nothing where there is none, or none that a run has written."""
    try:
        about = bounded.read_json(folder / layout.LINEAGE)
        for one in (about, *about.get("resumed_with", [])):
            if not isinstance(one.get("git"), dict | None):
                raise TypeError("git is no mapping")
        json.dumps(about, allow_nan=False)  # as it is to be written again
    except FileNotFoundError:
        return {}
    except (FmexpError, AttributeError, RecursionError, TypeError, ValueError) as error:
        log.warning("%s is damaged, and the beginning of this run not known: %s", folder / layout.LINEAGE, error)
        return {}
    return about  # type: ignore[no-any-return]


def _differs(old: dict[str, Any] | None, new: dict[str, Any] | None) -> bool:
    """Whether two states of the code, if both are known, are not the same."""
    if not old or not new:
        return False
    if old.get("commit") != new["commit"]:
        return True
    unknown = old.get("dirty") is None or new["dirty"] is None
    return not unknown and any(old.get(key) != new[key] for key in ("dirty", "patch_sha256"))


def _short(code: dict[str, Any] | None) -> str:
    said = code or {}
    return printable(f"commit {str(said.get('commit'))[:12]}") + " with uncommitted changes" * (
        said.get("dirty") is True
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _code(cwd: Path, folder: Path) -> Code:
    """The state of the repository that a process runs in, but for what lies in the run's own folder.

    Git is asked once for all members of a sweep that this process executes. `fmexp.execute` asks for each run, for a
    notebook lives for days.
    """
    sweep = folder.parent
    if (sweep / "multirun.yaml").is_file() and not cwd.is_relative_to(sweep):
        return _of_sweep(cwd, sweep)
    return _look(cwd, folder)


def _look(cwd: Path, own: Path) -> Code:
    """Ask git, leaving out the folder `own`."""
    here = Path(os.path.realpath(cwd))
    root = next((path for path in (here, *here.parents) if os.path.exists(path / ".git")), None)
    if root is None:
        return Code()
    said: dict[str, Any] = {"commit": None, "dirty": None, "patch": None, "patch_sha256": None, "untracked": []}
    until = time.monotonic() + LIMIT_S
    rest = ("--", ":/", *_left_out(root, here, Path(os.path.realpath(own))))
    try:
        if (head := _ask(root, "rev-parse", "--verify", "HEAD", most=100, until=until)) is None:
            return Code()
        said["commit"] = head.decode().strip()
        if root in _slow:
            raise TimeoutError
        if (status := _ask(root, *_STATUS, *rest, most=MOST_STATUS, until=until)) is None:
            return Code()
        entries = status[:MOST_STATUS].decode(errors="surrogateescape").split("\0")
        dirty = any(word.startswith(("1 ", "u ")) for word in entries)
        patch = _ask(root, *_DIFF, *rest, most=MOST_PATCH, until=until) if dirty else None
    except TimeoutError:
        _slow.add(root)
        log.warning("git takes more than %d s in %s: whether files were changed is not noted", LIMIT_S, root)
        return Code(said if said["commit"] else None)
    names = [printable(word[2:]).replace("\n", "\\n") for word in entries if word.startswith("? ")]
    more = [f"and {len(names) - MOST_NAMES:,} more"] if len(names) > MOST_NAMES else []
    kept = patch if patch is not None and len(patch) <= MOST_PATCH else None
    said |= {
        "dirty": dirty,
        "patch": None if patch is None else LEFT_OUT if kept is None else layout.PATCH,
        "patch_sha256": None if patch is None else hashlib.sha256(patch).hexdigest(),  # of its beginning, if left out
        "untracked": [*names[:MOST_NAMES], *more],
    }
    return Code(said, kept)


_of_sweep = functools.cache(_look)


def _left_out(root: Path, cwd: Path, own: Path) -> list[str]:
    """Pathspecs for a run's folder; where that holds the command's folder, and code perhaps, for a run's files."""
    if not own.is_relative_to(root):
        return []
    inside = own.relative_to(root)
    if not cwd.is_relative_to(own):
        return [f":(exclude,literal){inside}"]
    files = [f":(exclude,literal){inside / file}" for file in (".hydra", *layout.FILES)]
    return [*files, f":(exclude,glob){Path(glob.escape(str(inside))) / 'events.out.tfevents.*'}"]


def _ask(root: Path, *words: str, most: int, until: float) -> bytes | None:
    """What git prints, `most` + 1 bytes at most; None where there is no git, or it fails.

    Raises:
        TimeoutError: it has not ended at `until`.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or "CONFIG" in key}
    try:
        process = subprocess.Popen(
            [*_GIT, "-C", str(root), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=kept | _ENVIRONMENT, start_new_session=True,  # Ctrl-C is for the run alone
        )  # fmt: skip
    except OSError:
        return None
    assert process.stdout is not None
    content = b""
    with process, selectors.DefaultSelector() as selector:
        try:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(content) <= most:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                if not (part := os.read(process.stdout.fileno(), 2**16)):
                    return content if process.wait(max(0.1, until - time.monotonic())) == 0 else None
                content += part
            return content[: most + 1]
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            process.kill()
