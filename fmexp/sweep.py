"""What stands around a sweep's members: which there are, what came of each, and all of them in a table and a picture.

`python -m fmexp.sweep <folder>` prints the table of any sweep, finished or not. What a member is stands in its folder
alone. One that is complete or diverged is done; the same command goes on with one that failed or was interrupted.
"""

import argparse
import csv
import io
import logging
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fmexp import config, disk, folder, results
from fmexp.errors import first_line
from fmexp.overrides import quote, split, varied_keys

log = logging.getLogger(__name__)

SHOWN = 100  # how many members the console's table has at most
SHORTEST_FOLDER = 12  # letters of a folder's name, where a terminal is narrow
# What remains longest in a narrow terminal, after the objective; other metrics go first.
FIRST_METRICS = {"test/accuracy": 0, "test/loss": 1, "train/loss": 2, "test/accuracy/best": 3}
STATUSES = ("complete", "diverged", "failed", "running", "interrupted", "not begun")
WRITTEN = ("sweep.csv", "replicates.csv", "sweep.png", "sweep.svg")


@dataclass(frozen=True)
class Member(results.Result):
    """A member of a sweep as its folder has it.

    Attributes:
        overrides: what made it this member, such as {"optimizer.lr": "0.1"}.
    """

    overrides: dict[str, str]


def read(root: str | Path) -> list[Member]:
    """The members of a sweep, or the runs of any folder, in the order of their numbers; damaged ones are left out."""
    members: list[Member] = []
    for path in sorted(_folders(Path(root)), key=number):
        try:
            if not members:
                _ = folder.read_config(path)["objective"]  # the first member's configuration speaks for all
            members.append(_read_member(path))
        except Exception as error:  # whatever a damaged file makes a reader raise
            log.warning("%s is left out, for it cannot be read: %s", path.absolute(), first_line(error))
    return members


def start(overrides: Sequence[str], root: str | Path) -> list[Member]:
    """Execute a sweep in a process of its own, or go on with the one in `root`, and return its members.

    Args:
        overrides: as on the command line after --multirun, such as ["optimizer.lr=0.1,0.01", "hydra/launcher=joblib"].
    """
    command = [sys.executable, "-m", "fmexp", "--multirun", *overrides, f"hydra.sweep.dir={quote(str(Path(root)))}"]
    subprocess.run(command, check=False)
    return read(root)


def is_complete(root: Path) -> bool:
    """Whether no member needs more work."""
    return all(member.status in ("complete", "diverged") for member in read(root))


def by_digest(root: Path) -> dict[str, list[Path]]:
    """The member folders that a sweep's folder holds, by their configuration's digest."""
    found = defaultdict(list)
    for path in sorted(_folders(root), key=number):
        try:
            found[folder.digest(path)].append(path)
        except Exception as error:  # whatever a damaged file makes a YAML reader raise
            log.warning("%s: its configuration cannot be read, so it is left alone: %s", path, error)
    return found


def free_folder(root: Path, number: int, overrides: Sequence[str], varied: Sequence[str], taken: set[Path]) -> Path:
    """A folder for a new member: its number and a slug of the varied overrides, which no other member has.

    The slug has letters that every file system takes, and at most 100 of them. A folder whose run was killed before
    it had written its configuration is free again.
    """
    words = (f"{key.split('.')[-1]}-{value}" for key, value in split(overrides).items() if key in varied)
    slug = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-.") for word in words)
    base = f"{number}_{slug}"[:100].rstrip("_-.")
    names = (base if attempt == 1 else f"{base}_{attempt}" for attempt in range(1, sys.maxsize))
    return next(path for path in (root / name for name in names) if path not in taken and _is_free(path))


def begin(root: Path, trees: dict[Path, dict[str, Any]]) -> None:
    """Choose HPARAMS' columns for all members, those of earlier commands too, once, at the sweep's root."""
    from tensorboard.plugins.hparams import summary_v2 as hp
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    others = []
    for path in (path for path in _folders(root) if path not in trees):
        with suppress(Exception):  # whatever a damaged file makes a YAML reader raise
            others.append(folder.read_config(path))
    rows = [config.hparams(tree) for tree in (*trees.values(), *others)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: {str(row[name]) for row in rows if name in row} for name in names}
    always = ("dataset", "model", "optimizer", "seed")
    shown = [name for name in names if name in always or len(values[name]) > 1 or any(name not in row for row in rows)]
    first = next(iter(trees.values()))
    tags = (
        first["objective"],
        "test/accuracy",
        "test/accuracy/best",
        "test/loss",
        first["train"]["tag"],
        "wall_seconds",
    )
    metrics = [hp.Metric(tag) for tag in dict.fromkeys(tags)]
    summary = hp.hparams_config_pb([hp.HParam(name) for name in shown], metrics)
    plugin_data = summary.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(plugin_data.content)
    for column in columns.experiment.hparam_infos:  # TensorBoard shows five at first, those that differ before others
        column.differs = len(values[column.name]) > 1
    plugin_data.content = columns.SerializeToString()
    _write_events(root, [summary])


def objective_of(root: Path) -> str:
    """The name of the metric that a sweep compares."""
    for path in _folders(root):
        with suppress(Exception):  # whatever a damaged file makes a YAML reader raise
            return str(folder.read_config(path)["objective"])
    return "test/accuracy"


def maximised(objective: str) -> bool:
    """Whether more of a metric is better: of all that can be an objective, only the accuracy is not a loss."""
    return objective == "test/accuracy"


def ranked(members: Sequence[Member], objective: str) -> list[Member]:
    """The members, best first, those without an objective at the end."""
    sign = -1 if maximised(objective) else 1
    return sorted(members, key=lambda m: (1, 0.0) if math.isnan(m.objective) else (0, sign * m.objective))


def table(root: Path, members: Sequence[Member], digits: int | None = 4) -> list[list[str]]:
    """Rows of text, the first the heads: varied keys, metrics, status, seconds, folder.

    Numbers are in full without `digits`.
    """
    varied = varied_keys(_words(members))
    metrics = list(dict.fromkeys(name for member in members for name in member.metrics if name != "seconds"))
    rows = [[*varied, *metrics, "status", "seconds", "folder"]]
    for member in ranked(members, objective_of(root)):
        values = [_shown(member.metrics[name], digits) if name in member.metrics else "" for name in metrics]
        keys = [member.overrides.get(key, "") for key in varied]
        seconds = _shown(member.seconds, digits and 1)
        rows.append([*keys, *values, member.status, seconds, member.folder.name])
    return rows


def combinations(members: Sequence[Member]) -> tuple[list[str], dict[tuple[str, ...], list[Member]]]:
    """The varied keys without the seed, and the members with an objective by their values of these."""
    varied = [key for key in varied_keys(_words(members)) if key != "seed"]
    groups = defaultdict(list)
    for member in members:
        if not math.isnan(member.objective):
            groups[tuple(member.overrides.get(key, "") for key in varied)].append(member)
    return varied, dict(groups)


def replicates(root: Path, members: Sequence[Member], digits: int | None = 4) -> list[list[str]]:
    """Members that differ in their seed alone, together: n, mean and spread (standard deviation) of the objective.

    Without heads, too, where no two do. Numbers are in full without `digits`.
    """
    varied, groups = combinations(members)
    if all(len(group) == 1 for group in groups.values()):
        return []
    name = objective_of(root)
    rows = [[*varied, "n", f"mean {name}", "spread"]]
    found = {keys: [member.objective for member in group] for keys, group in groups.items()}
    best_first = sorted(found.items(), key=lambda item: statistics.mean(item[1]), reverse=maximised(name))
    for keys, values in best_first:
        spread = _shown(statistics.stdev(values), digits) if len(values) > 1 else ""
        rows.append([*keys, str(len(values)), _shown(statistics.mean(values), digits), spread])
    return rows


def fitted(rows: list[list[str]], width: int, objective: str) -> tuple[list[list[str]], list[str]]:
    """A table of `table` that is at most `width` letters wide, where that can be had, and the columns that it lost.

    First the folder's name is shortened, which begins with its number; then keys go that are the same in all rows, as
    in those of one member, and then metrics, but not the objective.
    """
    rows = [list(row) for row in rows]
    shortest = min(max(len(row[-1]) for row in rows), SHORTEST_FOLDER)
    at = {name: place for place, name in enumerate(rows[0][:-3])}
    metrics = [name for name in at if "/" in name and name != objective]
    metrics.sort(key=lambda name: (name not in FIRST_METRICS, FIRST_METRICS.get(name, 0)), reverse=True)
    same = [name for name, place in at.items() if "/" not in name and len({row[place] for row in rows[1:]}) == 1]
    lost: list[str] = []
    for name in [*same, *metrics]:
        if _width(rows) - max(len(row[-1]) for row in rows) + shortest <= width:
            break
        place = rows[0].index(name)
        rows = [row[:place] + row[place + 1 :] for row in rows]
        lost.append(name)
    room = max(shortest, width - (_width(rows) - max(len(row[-1]) for row in rows)))
    return [[*row[:-1], row[-1] if len(row[-1]) <= room else f"{row[-1][: room - 1]}…"] for row in rows], lost


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def conclude(root: Path, not_begun: int = 0) -> str:
    """Write the tables, the pictures and the run `summary`, and return the table with what to say below it.

    Args:
        not_begun: how many members the command has beside those that have a folder.
    """
    members = read(root)
    if not members:
        return f"{root}: no members" + (f", {not_begun} not begun" if not_begun else "")
    from fmexp import sweep_figure

    groups = replicates(root, members)
    disk.write(root / "sweep.csv", _csv(table(root, members, digits=None)))
    if groups:
        disk.write(root / "replicates.csv", _csv(replicates(root, members, digits=None)))
    picture, drawing = sweep_figure.render(root, members)
    disk.write(root / "sweep.png", picture)
    disk.write(root / "sweep.svg", drawing)
    rows = table(root, members)
    _write_summary(root, rows, picture)
    counts = Counter(member.status for member in members) + Counter({"not begun": not_begun})
    failures = [
        f"failed: {member.folder.name}: {(member.error.splitlines() or [''])[0]} (more in its fmexp.log)"
        for member in members
        if member.status == "failed"
    ]
    said = ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name])
    files = ", ".join(name for name in WRITTEN if (root / name).is_file())
    return "\n".join(
        [*_printed(root, rows, groups), "", *failures, f"{sum(counts.values())} members: {said}",
         f"written to {root} ({files})"]
    )  # fmt: skip


def _printed(root: Path, rows: list[list[str]], groups: list[list[str]]) -> list[str]:
    """The tables as the console has them: in a terminal not wider than that."""
    shown, lines = rows[: SHOWN + 1], []
    if sys.stdout.isatty():
        shown, lost = fitted(shown, shutil.get_terminal_size().columns, objective_of(root))
        lines = [f"not shown: {', '.join(lost)} (all in sweep.csv)"] if lost else []
    if len(rows) > SHOWN + 1:
        lines.append(f"... and {len(rows) - SHOWN - 1} more in sweep.csv")
    return [aligned(shown), *lines, *(["", aligned(groups)] if groups else [])]


def _write_summary(root: Path, rows: list[list[str]], picture: bytes) -> None:
    """Write the run `summary`: the picture and the table, for TensorBoard."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text import metadata as text

    heads = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    markdown = "\n".join([heads, *("| " + " | ".join(row) + " |" for row in rows[1:])])
    image = Summary.Image(encoded_image_string=picture, height=0, width=0, colorspace=4)
    words = Summary(value=[Summary.Value(tag="table", metadata=text.create_summary_metadata("table", ""))])
    words.value[0].tensor.dtype = 7  # a string
    words.value[0].tensor.string_val.append(markdown.encode())
    _write_events(root / "summary", [Summary(value=[Summary.Value(tag="sweep", image=image)]), words])


def _csv(rows: Sequence[Sequence[str]]) -> str:
    content = io.StringIO()
    csv.writer(content).writerows(rows)
    return content.getvalue()


def _shown(value: float, digits: int | None) -> str:
    """A number with `digits` behind the point, or with all that it has."""
    return repr(value) if digits is None else f"{value:.{digits}f}"


def _width(rows: Sequence[Sequence[str]]) -> int:
    return max(map(len, aligned(rows).splitlines()))


def _words(members: Iterable[Member]) -> list[list[str]]:
    return [[f"{key}={value}" for key, value in member.overrides.items()] for member in members]


def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob("*") if folder.holds_run(path)]


def number(path: Path) -> tuple[int, str]:
    """What the folders of members are sorted by: their number, and their name."""
    head = path.name.split("_")[0]
    return int(head) if head.isdigit() else -1, path.name


def _is_free(path: Path) -> bool:
    if not path.exists():
        return True
    left = {folder.LOCK, folder.OWNER, "fmexp.log", ".hydra"}
    return not folder.holds_run(path) and {entry.name for entry in path.iterdir()} <= left


def _read_member(path: Path) -> Member:
    result = results.read(path)
    file = path / ".hydra" / "overrides.yaml"
    words = list(OmegaConf.load(file)) if file.is_file() else []  # fmexp.execute writes none
    return Member(**vars(result), overrides=split([str(word) for word in words]))


def _write_events(path: Path, summaries: Sequence[Any]) -> None:
    """Write the only event file of a folder, in place of the one before."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    path.mkdir(exist_ok=True)
    old = list(path.glob("events.out.tfevents.*"))
    writer = EventFileWriter(str(path), filename_suffix=".sweep")
    for summary in summaries:
        writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))
    writer.close()
    for file in old:
        if file.exists() and len(list(path.glob("events.out.tfevents.*"))) > 1:
            file.unlink()


def main() -> None:
    """Print the table of a sweep: python -m fmexp.sweep <folder>."""
    parser = argparse.ArgumentParser(
        prog="python -m fmexp.sweep",
        description="Print the table of a sweep that runs, was stopped or is done, best member first. It is written "
        "to the sweep's folder, too, with a picture (sweep.csv, sweep.png), and for TensorBoard (summary/).",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="what the runs lie side by side in: multirun/<date>/<time> of a sweep, or any other folder of runs",
    )
    root = parser.parse_args().folder.absolute()
    if not root.is_dir():
        parser.error(f"{root} is no folder")
    if not _folders(root):
        deeper = sorted({str(path.parents[2]) for path in root.glob(f"*/*/**/{folder.CONFIG}")})
        hint = f" There are runs in {', '.join(deeper[:3])}." if deeper else ""
        sys.exit(f"No folder in {root} holds a run.{hint}")
    try:
        print(conclude(root))
    except OSError as error:
        sys.exit(f"The table cannot be written: {error}")


if __name__ == "__main__":
    main()
