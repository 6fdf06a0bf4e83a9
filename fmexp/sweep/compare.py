"""Runs of any folders side by side: ranked by one metric, the keys in which they differ, intervals over seeds."""

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fmexp import config
from fmexp.config.overrides import quote
from fmexp.errors import FmexpError, did_you_mean, printable, similar
from fmexp.rundir import bounded, layout
from fmexp.sweep.members import Member, check_tree, folder_number, ranked, read_member, warn_left_out
from fmexp.sweep.seeds import statistics_table

MOST_FOLDERS = 100_000  # that are looked into below what one names; / would keep a reader busy for hours
TARGET = "._target_"  # model._target_ is shown as model, and its value without the modules
WORDS = ("tags", "note")  # which change nothing of a run


@dataclass(frozen=True)
class Entry(Member):
    """A run among others, from whatever sweep.

    Attributes:
        settings: its whole configuration, flat.
        identity: of the settings that decide what the run computes and writes, key -> value as JSON.
        label: the folder's name to be shown, with what tells it from those of other sweeps.
    """

    settings: dict[str, Any]
    identity: dict[str, str]
    label: str

    @property
    def name(self) -> str:
        return self.label


def find(roots: Sequence[Path]) -> list[Path]:
    """The folders of all runs at or below some folders, each once, in the order of their names.

    No link is followed further than to a run itself, and what is hidden is not looked into.

    Raises:
        FmexpError: there is none, or there is too much to look through.
    """
    found: dict[str, Path] = {}
    for root in map(Path.absolute, roots):
        if not root.is_dir():
            raise FmexpError(f"{root} is no folder.")
        for path in sorted(_below(root), key=lambda path: (path.parent, folder_number(path))):
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise FmexpError(f"No folder in {' or '.join(str(root.absolute()) for root in roots)} holds a run.")
    return list(found.values())


def read(paths: Sequence[Path]) -> list[Entry]:
    """The runs of some folders; those that are damaged, or of another program, are left out with a warning."""
    entries = []
    root = above(paths)
    for path in paths:
        try:
            tree = layout.read_config(path)
            check_tree(tree)
            identity = {key: json.dumps(value, sort_keys=True) for key, value in config.identity(tree).items()}
            label = printable(str(path.relative_to(root)))
            entries.append(Entry(**vars(read_member(path)), settings=config.flat(tree), identity=identity, label=label))
        except Exception as error:  # whatever a damaged file makes a reader raise
            warn_left_out(path, error)
    return entries


def above(paths: Sequence[Path]) -> Path:
    """The folder that all runs lie in, which their labels begin at."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def choose(entries: Sequence[Entry], conditions: Sequence[str]) -> list[Entry]:
    """The runs that meet all conditions, such as optimizer.lr=0.01 or model=LeNet.

    Raises:
        FmexpError: no run has such a key, or none meets a condition.
    """
    left = list(entries)
    for condition in conditions:
        name, _, text = condition.partition("=")
        known = {heading(key): key for entry in entries for key in entry.settings}
        key = known.get(heading(name))
        if key is None:
            raise FmexpError(f"--where {condition}: no run has the key {name}.{_meant(name, known)}")
        met = [entry for entry in left if key in entry.settings and _equals(entry.settings[key], key, text)]
        if left and not met:
            there = sorted({_text(entry.settings[key]) for entry in left if key in entry.settings})
            said = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
            raise FmexpError(f"--where {condition}: of {len(left)} runs none has this; {name} is {said}.")
        left = met
    return left


def judged(entries: Sequence[Entry], objective: str | None) -> tuple[str, list[Entry]]:
    """What ranks the runs, `objective` or that of all of them, and the runs with it as their objective.

    A run that did not complete has none.

    Raises:
        FmexpError: the runs have different objectives, or none has written `objective`.
    """
    own = Counter(str(entry.settings["objective"]) for entry in entries)
    written = Counter(name for entry in entries for name in entry.metrics)
    if objective is None:
        if len(own) > 1:
            counts = ", ".join(f"{name} ({count} runs)" for name, count in own.most_common())
            first = max(own, key=lambda name: (written[name], own[name]))
            raise FmexpError(
                f"The runs have different objectives, so that none is the best: {counts}. Name a metric that ranks "
                f"them all, such as --objective {first}, or choose some with --where objective={first}."
            )
        return next(iter(own)), list(entries)
    if objective not in written and objective not in own:
        there = _meant(objective, written) or f" There are {', '.join(sorted(written)) or 'none'}."
        raise FmexpError(f"--objective {objective}: no run has written this metric.{there}")
    return objective, [
        entry if entry.settings["objective"] == objective else replace(entry, objective=_metric(entry, objective))
        for entry in entries
    ]


def differing(entries: Sequence[Entry]) -> list[str]:
    """The keys of the identity in which runs differ, in the order of the configuration.

    A key that comes with a choice, such as Adam's betas, counts only where runs of this choice differ in it.
    """
    keys = dict.fromkeys(key for entry in entries for key in entry.settings)
    parts = list(dict.fromkeys(key.split(".")[0] for key in keys))
    return [key for key in sorted(keys, key=lambda key: parts.index(key.split(".")[0])) if _differs(key, entries)]


def with_differences(entries: Sequence[Entry], keys: Sequence[str]) -> list[Entry]:
    """The runs with the values of these keys in place of their other overrides, as `table` shows them."""
    columns = {key: _shown(key, entries) for key in keys}
    changed = []
    for entry in entries:
        values = {heading(key): shown.get(entry.identity.get(key, ""), "") for key, shown in columns.items()}
        words = {key: entry.overrides[key] for key in WORDS if key in entry.overrides}
        changed.append(replace(entry, overrides=values | words))
    return changed


def replicates(
    entries: Sequence[Entry], objective: str, digits: int | None = 4
) -> tuple[list[list[str]], list[tuple[Entry, Entry]]]:
    """Runs that differ in their seed alone, together.

    Args:
        entries: as `with_differences` returns them.

    Returns:
        the `statistics_table`, and the pairs of runs that are the same, with their seed: such a pair is one run.
    """
    groups: dict[str, dict[str | None, Entry]] = {}
    twins = []
    for entry in entries:
        if not math.isnan(entry.objective):
            same = json.dumps([pair for pair in entry.identity.items() if pair[0] != "seed"])
            first = groups.setdefault(same, {}).setdefault(entry.identity.get("seed"), entry)
            if first is not entry:
                twins.append((first, entry))
    keys = [key for key in entries[0].overrides if key not in ("seed", *WORDS)]
    found = [list(group.values()) for group in groups.values()]
    shown = [([group[0].overrides[key] for key in keys], [entry.objective for entry in group]) for group in found]
    return statistics_table(keys, shown, objective, digits), twins


def best(entries: Sequence[Entry], objective: str, count: int) -> list[Entry]:
    """So many of the best runs, or as many as have an objective."""
    return [entry for entry in ranked(entries, objective) if not math.isnan(entry.objective)][:count]


def command(folder: Path) -> str | None:
    """What to type to make the run of a folder again, in a new one; None where Python has executed it."""
    try:
        words = [str(word) for word in bounded.read_yaml(folder / ".hydra" / "overrides.yaml")]
    except (FileNotFoundError, FmexpError, TypeError):
        return None
    if any(word.startswith("-") for word in words):  # no override, so that fmexp has not written it
        return None
    with suppress(Exception):  # a member that failed at once has no hydra.yaml, and a damaged one says nothing
        about = bounded.read_yaml(folder / ".hydra" / "hydra.yaml")["hydra"]
        words += [word for word in about["overrides"]["hydra"] if word.startswith("hydra.searchpath=")]
        words = [*_config_dir(about), *words]
    return printable(shlex.join(["python", "-m", "fmexp", *words]))


def sweep_command(root: Path) -> str | None:
    """What to type to go on with a sweep, as its last command was; None where its folder does not say that."""
    with suppress(Exception):  # whatever a file that is not there, or a damaged one, makes a reader raise
        about = bounded.read_yaml(root / "multirun.yaml")["hydra"]
        words = [str(word) for word in (*about["overrides"]["hydra"], *about["overrides"]["task"])]
        if not any(word.startswith("-") for word in words):
            words = [word for word in words if not word.startswith(("hydra.mode=", "hydra.sweep.dir=", "resume="))]
            words = [*_config_dir(about), *words, f"hydra.sweep.dir={quote(str(root))}"]
            return printable(shlex.join(["python", "-m", "fmexp", "-m", *words]))
    return None


def _config_dir(about: dict[str, Any]) -> list[str]:
    """The words with a folder of one's own YAML files, where there was one."""
    sources = about["runtime"]["config_sources"]
    own = [str(source["path"]) for source in sources if source["provider"] == "command-line"]
    return [word for path in own for word in ("--config-dir", path)]


def frame(*folders: str | Path) -> Any:
    """A pandas DataFrame of all runs at or below some folders, a row for each.

    Its columns are the keys in which the runs differ, the metrics, status, steps, seconds and folder.

    Raises:
        FmexpError: pandas is not installed, or there is no run.
    """
    try:
        pandas: Any = import_module("pandas")  # no dependency, and so no import statement
    except ImportError:
        raise FmexpError("fmexp.sweep.frame needs pandas: pip install pandas") from None
    entries = read(find([Path(folder) for folder in folders]))
    keys = differing(entries)
    columns: dict[str, list[Any]] = {heading(key): [entry.settings.get(key) for entry in entries] for key in keys}
    for key in (key for key in keys if key.endswith(TARGET)):
        shown = _shown(key, entries)
        columns[heading(key)] = [shown.get(entry.identity.get(key, "")) for entry in entries]
    for name in dict.fromkeys(name for entry in entries for name in entry.metrics if name != "seconds"):
        columns[name] = [entry.metrics.get(name, math.nan) for entry in entries]
    for name in ("status", "steps", "seconds"):
        columns[name] = [getattr(entry, name) for entry in entries]
    return pandas.DataFrame({**columns, "folder": [str(entry.folder) for entry in entries]})


def heading(key: str) -> str:
    """A key as a column has it."""
    return key.removesuffix(TARGET)


def _below(root: Path) -> Iterator[Path]:
    todo, looked = [root], 0
    while todo:
        folder = todo.pop()
        if layout.holds_run(folder):
            yield folder
        elif folder == root or not (folder.is_symlink() or folder.name.startswith(".")):
            looked += 1
            if looked > MOST_FOLDERS:
                raise FmexpError(f"{root} has more than {MOST_FOLDERS:,} folders. Name one that is nearer to the runs.")
            with suppress(OSError), os.scandir(folder) as entries:
                todo += [folder / entry.name for entry in entries if entry.is_dir()]


def _metric(entry: Entry, name: str) -> float:
    return entry.metrics.get(name, math.nan) if entry.status == "complete" else math.nan


def _meant(name: str, known: Any) -> str:
    """Names like one that is not there, as a question."""
    same = sorted(other for other in known if name and other.split(".")[-1] == name)
    return did_you_mean(map(printable, same[:3] or similar(name, known)))


def _equals(value: Any, key: str, text: str) -> bool:
    """Whether a setting is what one has typed; a list, too, where that is in it."""
    if isinstance(value, str) and text in (value, value.rpartition(".")[2] if key.endswith(TARGET) else value):
        return True
    try:
        wanted = bounded.parse_yaml(text)
    except Exception:  # whatever a YAML reader raises: it is text
        return False
    values = [value, *(value if isinstance(value, list) else [])]
    return any(one == wanted and isinstance(one, bool) == isinstance(wanted, bool) for one in values)


def _differs(key: str, entries: Sequence[Entry]) -> bool:
    choice = key.rpartition(".")[0] + TARGET
    values: dict[str | None, set[str | None]] = {}
    for entry in entries:
        values.setdefault(entry.identity.get(choice), set()).add(entry.identity.get(key))
    there = set().union(*values.values()) - {None}
    return len(there) > 1 or any(len(found) > 1 for found in values.values())


def _shown(key: str, entries: Sequence[Entry]) -> dict[str, str]:
    """The values of a key as JSON, with what is shown of each: of targets the last word, where that is enough."""
    found = {entry.identity[key]: _text(entry.settings[key]) for entry in entries if key in entry.identity}
    short = {value: text.rpartition(".")[2] for value, text in found.items()}
    return short if key.endswith(TARGET) and len(set(short.values())) == len(found) else found


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))
