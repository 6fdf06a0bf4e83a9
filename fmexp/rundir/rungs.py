"""What a halving sweep compares: the objective at each step where a run has paused, in rungs.json of its folder.

It is no part of the run, which trains as if it had not paused: so it is in no checkpoint and in no event file.
"""

import json
import math
from pathlib import Path

from fmexp.errors import FmexpError
from fmexp.rundir import atomic, bounded
from fmexp.rundir.layout import RUNGS


def read(folder: Path) -> dict[int, float]:
    """step -> objective, NaN where it was not finite, in the order of the steps; empty where there is no such file, or
    one that no run has written."""
    try:
        found = bounded.read_json(folder / RUNGS)
        return {int(step): math.nan if found[step] is None else float(found[step]) for step in sorted(found, key=int)}
    except (FileNotFoundError, FmexpError, TypeError, ValueError, OverflowError):
        return {}


def value_at(folder: Path, step: int) -> float | None:
    """The objective of a run that has paused at a step, or first behind it; None: it has not come so far."""
    return next((value for at, value in read(folder).items() if at >= step), None)


def write(folder: Path, step: int, value: float) -> None:
    """Keep the objective at a step, beside those of other steps."""
    found = dict(sorted({**read(folder), step: value}.items()))
    content = {str(at): value if math.isfinite(value) else None for at, value in found.items()}
    atomic.atomic_write(folder / RUNGS, json.dumps(content) + "\n")
