"""Words of the command line: quoted for Hydra, taken apart, and the command that goes on with a run or a sweep."""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fmexp import process


def quote(value: str) -> str:
    """A value as Hydra's override grammar takes it."""
    if re.fullmatch(r"[\w./:+-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{escaped}'"


def split(overrides: Sequence[str]) -> dict[str, str]:
    """["optimizer.lr=0.1"] -> {"optimizer.lr": "0.1"}."""
    pairs = (word.partition("=") for word in overrides)
    return {key.lstrip("+~"): value.strip("'\"") for key, _, value in pairs}


def varied_keys(overrides: Iterable[Sequence[str]]) -> list[str]:
    """The overridden keys whose values are not the same in all members, in the order of the command line."""
    values: dict[str, set[str]] = {}
    count = 0
    for count, member in enumerate(overrides, 1):  # noqa: B007
        for key, value in split(member).items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1] if count > 1 else list(values)


def resume_command(key: str, folder: Path) -> str:
    """What to type to go on in a folder: the words of this process's command line, and key=folder.

    Args:
        key: hydra.run.dir for a run, hydra.sweep.dir for a sweep.
    """
    words = [word for word in sys.argv[1:] if not word.startswith((f"{key}=", "resume="))]  # resume=false would refuse
    program = ["fmexp"] if Path(sys.argv[0]).name == "fmexp" else ["python", "-m", "fmexp"]
    if process.world_size() > 1:
        nodes, each = (os.environ.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        program = ["torchrun", *[f"--nnodes={nodes}"] * (nodes != "1"), f"--nproc-per-node={each}", "-m", "fmexp"]
    return shlex.join([*program, *words, f"{key}={quote(str(folder))}"])
