"""What a sweep's picture shows: combinations of values with their replicates, the keys that vary, learning curves."""

import io
import math
import statistics
import struct
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fmexp.config import maximised
from fmexp.rundir import bounded, layout
from fmexp.sweep.members import Member, group_by_keys, last_rung

MOST_POINTS = 200  # of a learning curve
LARGEST_SCALAR = 4096  # bytes of an event; what is larger is a picture or a graph


@dataclass(frozen=True)
class Combination:
    """The members that differ in their seed alone.

    Attributes:
        values: key -> value, as typed, for each key that varies.
    """

    values: dict[str, str]
    members: list[Member]

    @cached_property
    def mean(self) -> float:
        return statistics.mean(member.objective for member in self.members)

    @cached_property
    def spread(self) -> float:
        """The standard deviation over the seeds; NaN of one."""
        return statistics.stdev(m.objective for m in self.members) if len(self.members) > 1 else math.nan

    @cached_property
    def said(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.spread:.4f}" if len(self.members) > 1 else "")


class Key:
    """A key that varies: its values in order, whether they are numbers, and whether its axis is logarithmic."""

    def __init__(self, name: str, values: Sequence[str], log: bool | None = None) -> None:
        self.name = name
        self.names = list(dict.fromkeys(values))
        numbers = [_number(value) for value in self.names]
        self.numeric = all(map(math.isfinite, numbers))
        if self.numeric:
            self.names.sort(key=_number)
            numbers.sort()
        self.places = dict(zip(self.names, numbers if self.numeric else range(len(numbers)), strict=True))
        self.log = self.numeric and min(numbers) > 0 and (spread_by_factors(numbers) if log is None else log)


@dataclass(frozen=True)
class Picture:
    """What is drawn of a sweep: its combinations with an objective, and the keys that vary, the main one first.

    Attributes:
        pruned: of a halving sweep the members that did not go on, with what they were compared by last as objective.
        importance: of a search: key -> its share in what makes a trial good; empty where that is not known.
    """

    members: list[Member]
    objective: str
    tag: str
    combinations: list[Combination]
    pruned: list[Combination]
    keys: list[Key]
    search: bool
    importance: dict[str, float]

    @cached_property
    def best(self) -> Combination:
        return (max if maximised(self.objective) else min)(self.combinations, key=lambda one: one.mean)

    @cached_property
    def seeds(self) -> int:
        return max(len(one.members) for one in self.combinations)


def read(root: Path, members: Sequence[Member]) -> Picture:
    """What a sweep's picture shows."""
    keys_of_all, groups = group_by_keys(members)
    varied = list(map(plain, keys_of_all))

    def combined(values: Iterable[str], group: list[Member]) -> Combination:
        return Combination(dict(zip(varied, map(plain, values), strict=True)), group)

    combinations = [combined(values, group) for values, group in groups.items()]
    pruned = [
        combined((member.overrides.get(key, "") for key in keys_of_all), [replace(member, objective=rung[1])])
        for member in members
        if member.status == "pruned" and (rung := last_rung(member)) and math.isfinite(rung[1])
    ]
    search = (root / "optuna.db").is_file()
    importance, log = _study(root) if search else ({}, {})
    every = [*combinations, *pruned]
    keys = [Key(name, [one.values[name] for one in every], log.get(name)) for name in varied if combinations]
    keys.sort(key=lambda key: -len(key.names))  # stable: of equal ones as typed
    main = next((key for key in keys if key.numeric), None)
    if main is None and keys:
        main = next(key for key in keys if key.name == varied[0])
    rest = [key for key in keys if key is not main]
    if search:
        rest.sort(key=lambda key: -importance.get(key.name, 0.0))
    first = layout.read_config(members[0].folder)
    ordered = [main, *rest] if main else []
    return Picture(
        list(members),
        plain(first["objective"]),
        str(first["train"]["tag"]),
        combinations,
        pruned,
        ordered,
        search,
        importance,
    )


def plain(text: object) -> str:
    """A text that Matplotlib takes for no formula."""
    return str(text).replace("$", r"\$")


def spread_by_factors(values: Sequence[float]) -> bool:
    """Whether values, all above 0, lie evenly on a logarithmic axis rather than on a linear one.

    0.1, 0.03, 0.01 and 16, 32, 64 do; 1, 2, 3 and numbers drawn from an interval do not.
    """
    found = np.sort(np.asarray(values, dtype=float))
    if len(found) < 3:
        return bool(found[-1] >= 10 * found[0])

    def unevenness(scaled: Any) -> float:
        return abs(float(np.median(scaled) - (scaled[0] + scaled[-1]) / 2)) / float(scaled[-1] - scaled[0])

    return bool(found[-1] >= 4 * found[0]) and unevenness(np.log(found)) < unevenness(found)


def curve(one: Combination, tag: str) -> tuple[Any, Any, Any]:
    """Steps, and the mean and the standard deviation of a scalar over a combination's members, at most MOST_POINTS."""
    points = [dict(_scalars(member.folder, tag)) for member in one.members]
    steps = sorted(set.intersection(*map(set, points)))
    steps = steps[:: math.ceil(len(steps) / MOST_POINTS) or 1]
    values = np.array([[of_member[step] for step in steps] for of_member in points])
    spread = values.std(axis=0, ddof=1) if len(points) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(axis=0), spread


def _scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    """The points of one scalar.

    Not by TensorBoard's reader: over members with pictures that takes 0.1 s each, for it reads the pictures as well.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    found = []
    for file in bounded.event_files(path):
        with suppress(Exception), file.open("rb") as records:  # whatever a damaged file makes protobuf raise
            while len(head := records.read(12)) == 12:  # TFRecord: the length and its checksum, the content and its own
                (length,) = struct.unpack("<Q", head[:8])
                if length > LARGEST_SCALAR:
                    records.seek(length + 4, io.SEEK_CUR)
                    continue
                content = records.read(length + 4)
                if len(content) < length + 4:
                    break
                event = Event.FromString(content[:-4])
                found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return found


def _study(root: Path) -> tuple[dict[str, float], dict[str, bool]]:
    """Of a search each key's importance, and whether it is searched on a logarithmic scale; empty without Optuna."""
    importance: dict[str, float] = {}
    log: dict[str, bool] = {}
    with suppress(Exception), warnings.catch_warnings():  # the picture is worth having without these
        warnings.simplefilter("ignore")  # the evaluator is new
        import optuna

        bounded.check_regular(root / "optuna.db")
        storage = f"sqlite:///file:{quote(str(root / 'optuna.db'))}?mode=ro&uri=true"  # else it is written to
        study = optuna.load_study(study_name="fmexp", storage=storage)
        trials = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        for trial in trials:
            log |= {name.lstrip("+~"): how.log for name, how in trial.distributions.items() if hasattr(how, "log")}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        if len(trials) >= 10:  # of fewer it says nothing
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
            importance = {name.lstrip("+~"): float(value) for name, value in found.items()}
    return importance, log


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.inf
