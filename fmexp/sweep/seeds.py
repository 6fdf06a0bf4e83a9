"""Runs that differ in their seed alone, together: their number, and what that says of the objective."""

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

from fmexp.config import maximised
from fmexp.tables import number


def statistics_table(
    keys: Sequence[str], groups: Sequence[tuple[Sequence[str], Sequence[float]]], objective: str, digits: int | None = 4
) -> list[list[str]]:
    """Rows of text, the first the heads: n, mean, spread (sample standard deviation) and 95 % interval, best first.

    Args:
        groups: the values of the keys, and the objectives of the runs that have these. Without two in any, no rows.
        digits: behind the point; None: all.
    """
    if all(len(values) == 1 for _, values in groups):
        return []
    rows = [[*keys, "n", f"mean {objective}", "spread", "95 % interval"]]
    for shown, values in sorted(groups, key=lambda group: statistics.mean(group[1]), reverse=maximised(objective)):
        rows.append([*shown, str(len(values)), *_statistics(values, digits)])
    return rows


def _statistics(values: Sequence[float], digits: int | None) -> list[str]:
    """Mean, spread and interval; of one value the mean alone."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return [number(mean, digits), "", ""]
    spread = statistics.stdev(values)
    half = student_t(len(values) - 1) * spread / math.sqrt(len(values))
    interval = f"{number(mean - half, digits)} to {number(mean + half, digits)}"
    return [number(mean, digits), number(spread, digits), interval]


@lru_cache
def student_t(freedom: int) -> float:
    """What |t| of so many degrees of freedom stays below with 95 % probability: 12.706 of 1, 2.776 of 4.

    By bisection, for of whole degrees the distribution is a finite sum: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """

    def probability(angle: float) -> float:
        term, total = math.cos(angle) ** (freedom % 2), 0.0
        for power in range(freedom % 2, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if freedom % 2 else total

    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(middle)
