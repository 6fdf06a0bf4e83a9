"""The members of a sweep as their folders have them: which there are, and what came of each."""

import logging
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fmexp.config import hparams, maximised
from fmexp.config.overrides import quote, split, varied_keys
from fmexp.errors import FmexpError, first_line, printable
from fmexp.rundir import bounded, layout, results

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member(results.Result):
    """A member of a sweep as its folder has it.

    Attributes:
        overrides: what made it this member, such as {"optimizer.lr": "0.1"}.
    """

    overrides: dict[str, str]


M = TypeVar("M", bound=Member)


def read(root: str | Path) -> list[Member]:
    """The members of a sweep, or the runs of any folder, in the order of their numbers; damaged ones are left out."""
    members: list[Member] = []
    for path in sorted(member_folders(Path(root)), key=folder_number):
        try:
            if not members:
                check_tree(layout.read_config(path))  # which speaks for all
            members.append(read_member(path))
        except Exception as error:  # whatever a damaged file makes a reader raise
            warn_left_out(path, error)
    return members


def check_tree(tree: dict[str, Any]) -> None:
    """Raise FmexpError where a configuration is of no run of fmexp's: other programs have .hydra/, too."""
    try:
        names = tree["objective"], tree["train"]["tag"]
        known = all(isinstance(name, str) for name in names) and hparams(tree)
    except (AttributeError, KeyError, TypeError):
        known = {}
    if not known:
        raise FmexpError("its configuration is not that of a run of fmexp")


def warn_left_out(path: Path, error: Exception) -> None:
    """Say that the folder of a run is not among what was read."""
    name = printable(str(path.absolute()))
    log.warning("%s is left out, for it cannot be read: %s", name, first_line(error))


def start(overrides: Sequence[str], root: str | Path) -> list[Member]:
    """Execute a sweep in a process of its own, or continue the one in `root`, and return its members.

    Args:
        overrides: as on the command line after --multirun, such as ["optimizer.lr=0.1,0.01", "hydra/launcher=joblib"].
    """
    command = [sys.executable, "-m", "fmexp", "--multirun", *overrides, f"hydra.sweep.dir={quote(str(Path(root)))}"]
    subprocess.run(command, check=False)
    return read(root)


def by_digest(root: Path) -> dict[str, list[Path]]:
    """The member folders that a sweep's folder holds, by their configuration's digest."""
    found = defaultdict(list)
    for path in sorted(member_folders(root), key=folder_number):
        try:
            if results.status(path) not in ("complete", "diverged"):  # else nothing is written there
                layout.check_files(path)
            found[layout.digest(path)].append(path)
        except Exception as error:  # whatever a damaged file makes a YAML reader raise
            name = printable(str(path))
            log.warning("%s: it cannot be gone on with, and is left alone: %s", name, first_line(error))
    return found


def free_folder(
    root: Path, number: int, overrides: Sequence[str], varied: Sequence[str], taken: set[Path], digest: str
) -> Path:
    """A folder for a new member: its number and a slug of the varied overrides, which no other member has.

    The slug has letters that every file system takes, and at most 100 of them. A folder whose run was killed before
    it had written its configuration is free again; one where a second sweep has begun this very member is its folder.
    """
    words = (f"{key.split('.')[-1]}-{value}" for key, value in split(overrides).items() if key in varied)
    slug = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-.") for word in words)
    base = f"{number}_{slug}"[:100].rstrip("_-.")
    names = (base if attempt == 1 else f"{base}_{attempt}" for attempt in range(1, sys.maxsize))
    return next(path for path in (root / name for name in names) if path not in taken and _is_free(path, digest))


def objective_of(root: Path) -> str:
    """The name of the metric that a sweep compares."""
    for path in member_folders(root):
        with suppress(Exception):  # whatever a damaged file makes a YAML reader raise
            return str(layout.read_config(path)["objective"])
    return "val/accuracy"


def ranked(members: Sequence[M], objective: str) -> list[M]:
    """The members, best first, those without an objective at the end: of a halving sweep by how far they came, and by
    what they were compared by there."""
    sign = -1 if maximised(objective) else 1

    def place(member: M) -> tuple[int, int, float]:
        if not math.isnan(member.objective):
            return 0, 0, sign * member.objective
        step, value = last_rung(member) or (0, math.nan)
        return 1, -step, math.inf if math.isnan(value) else sign * value

    return sorted(members, key=place)


def last_rung(member: results.Result) -> tuple[int, float] | None:
    """The step of the last rung that a halving sweep's member came to, and its objective there."""
    return next(reversed(member.rungs.items()), None)


def rung_tag(objective: str) -> str:
    """The name of what members are compared by before their end."""
    return f"rung/{objective.partition('/')[2] or objective}"


def group_by_keys(members: Sequence[Member]) -> tuple[list[str], dict[tuple[str, ...], list[Member]]]:
    """The varied keys without the seed, and the members with an objective by their values of these."""
    varied = [key for key in varied_keys(override_words(members)) if key != "seed"]
    groups = defaultdict(list)
    for member in members:
        if not math.isnan(member.objective):
            groups[tuple(member.overrides.get(key, "") for key in varied)].append(member)
    return varied, dict(groups)


def override_words(members: Iterable[Member]) -> list[list[str]]:
    """The overrides of each member as words, key=value, but for tags and note, in which equal members may differ."""
    return [
        [f"{key}={value}" for key, value in member.overrides.items() if key not in ("tags", "note")]
        for member in members
    ]


def member_folders(root: Path) -> list[Path]:
    """The folders in a sweep's folder that hold a run, in no order."""
    return [path for path in root.glob("*") if layout.holds_run(path)]


def folder_number(path: Path) -> tuple[int, str]:
    """What the folders of members are sorted by: their number, and their name."""
    head = path.name.split("_")[0]
    return int(head) if head.isdecimal() else -1, path.name


def _is_free(path: Path, digest: str) -> bool:
    if not os.path.lexists(path):
        return True
    left = {layout.LOCK, layout.OWNER, "fmexp.log", ".hydra"}
    with suppress(Exception):  # whatever a damaged file makes a reader raise
        layout.check_files(path)
        # In this order, for a second sweep's run writes its configuration before all else.
        if {entry.name for entry in path.iterdir()} <= left and not layout.holds_run(path):
            return True
        return layout.digest(path) == digest
    return False


def read_member(path: Path) -> Member:
    """The run of a folder with its overrides; raises whatever a damaged file makes a reader raise."""
    result = results.read(path)
    try:
        words = bounded.read_yaml(path / ".hydra" / "overrides.yaml")
    except FileNotFoundError:
        words = []  # fmexp.execute writes none
    if not isinstance(words, list):
        raise FmexpError(f"{path / '.hydra' / 'overrides.yaml'} is no list.")
    return Member(**vars(result), overrides=split([printable(str(word)) for word in words]))
