"""What a person reads of a sweep: its table, CSV files, picture and HPARAMS' columns."""

import io
import logging
import math
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmexp import config
from fmexp.config.overrides import varied_keys
from fmexp.errors import printable
from fmexp.rundir import atomic, bounded, layout
from fmexp.sweep.members import (
    Member,
    group_by_keys,
    last_rung,
    member_folders,
    objective_of,
    override_words,
    ranked,
    read,
    rung_tag,
)
from fmexp.sweep.seeds import statistics_table
from fmexp.tables import aligned, csv_text, number

log = logging.getLogger(__name__)

SHOWN = 100  # how many members the console's table has at most
SHOWN_NOTE = 40  # letters of a note in the console's table
SHORTEST_FOLDER = 12  # letters of a folder's name, where a terminal is narrow
# What remains longest in a narrow terminal, after the objective; other metrics go first.
FIRST_METRICS = {"test/accuracy": 0, "test/loss": 1, "train/loss": 2}
STATUSES = ("complete", "pruned", "paused", "diverged", "failed", "running", "interrupted", "not begun")
SUFFIX = ".sweep"  # of the event files that a sweep writes itself
WRITTEN = ("sweep.csv", "replicates.csv", "sweep.png", "sweep.svg")


def begin(root: Path, trees: dict[Path, dict[str, Any]], more: Sequence[str] = ()) -> None:
    """Choose HPARAMS' columns for all members, those of earlier commands too, once, at the sweep's root.

    Args:
        more: names of metrics beside the usual ones.
    """
    from tensorboard.plugins.hparams import summary_v2 as hp
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    others = []
    for path in (path for path in member_folders(root) if path not in trees):
        with suppress(Exception):  # whatever a damaged file makes a YAML reader raise
            others.append(config.hparams(layout.read_config(path)))
    rows = [*(config.hparams(tree) for tree in trees.values()), *others]
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: {str(row[name]) for row in rows if name in row} for name in names}
    always = ("dataset", "model", "loss", "optimizer", "schedule", "seed")
    shown = [name for name in names if name in always or len(values[name]) > 1 or any(name not in row for row in rows)]
    first = next(iter(trees.values()))
    tags = (
        first["objective"],
        f"{'val' if first['train']['validation'] else 'test'}/accuracy/best",
        "test/accuracy",
        "test/loss",
        first["train"]["tag"],
        "wall_seconds",
        *more,
    )
    metrics = [hp.Metric(tag) for tag in dict.fromkeys(tags)]
    summary = hp.hparams_config_pb([hp.HParam(name) for name in shown], metrics)
    plugin_data = summary.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(plugin_data.content)
    for column in columns.experiment.hparam_infos:  # TensorBoard shows five at first, those that differ before others
        column.differs = len(values[column.name]) > 1
    plugin_data.content = columns.SerializeToString()
    _write_events(root.resolve(), [summary])  # the sweep's folder itself may be named by a link


def table(
    root: Path, members: Sequence[Member], digits: int | None = 4, objective: str | None = None
) -> list[list[str]]:
    """Rows of text, the first the heads: varied keys, tags and note, metrics, rungs, status, seconds, folder.

    Numbers and notes are in full without `digits`. There are no columns of tags and notes where no member has any, and
    those of the last rung, its step and what the objective was there, are for halving sweeps. The
    members are ranked by the objective of those in `root`, or as that says.
    """
    varied = varied_keys(override_words(members))
    words = {member.folder: _words(member, SHOWN_NOTE if digits else None) for member in members}
    said = [name for name in ("tags", "note") if any(found[name] for found in words.values())]
    objective = objective or objective_of(root)
    metrics = list(dict.fromkeys(name for member in members for name in member.metrics if name != "seconds"))
    metrics = [name for name in metrics if config.is_shown(name, objective)]
    halving = ["rung", rung_tag(objective)] if any(member.rungs for member in members) else []
    rows = [[*varied, *said, *metrics, *halving, "status", "seconds", "folder"]]
    for member in ranked(members, objective):
        values = [number(member.metrics[name], digits) if name in member.metrics else "" for name in metrics]
        keys = [*(member.overrides.get(key, "") for key in varied), *(words[member.folder][name] for name in said)]
        seconds = number(member.seconds, digits and 1)
        if halving:
            step, value = last_rung(member) or ("", math.nan)
            values += [str(step), number(value, digits) if step else ""]
        rows.append([*keys, *values, member.status, seconds, member.name])
    return rows


def replicates(root: Path, members: Sequence[Member], digits: int | None = 4) -> list[list[str]]:
    """Members that differ in their seed alone, together, as `statistics_table` has them; numbers in full without
    `digits`."""
    varied, groups = group_by_keys(members)
    shown = [(keys, [member.objective for member in group]) for keys, group in groups.items()]
    return statistics_table(varied, shown, objective_of(root), digits)


def fitted(
    rows: list[list[str]], width: int, objective: str, keys_too: bool = False
) -> tuple[list[list[str]], list[str]]:
    """A table of `table` that is at most `width` letters wide, where that can be had, and the columns that it lost.

    First the folder's name is shortened, which begins with its number; then keys go that are the same in all rows, as
    in those of one member, and then metrics, but not the objective; with `keys_too` all other keys, the last first.
    """
    rows = [list(row) for row in rows]
    shortest = min(max(len(row[-1]) for row in rows), SHORTEST_FOLDER)
    at = {name: place for place, name in enumerate(rows[0][:-3])}
    metrics = [name for name in at if "/" in name and name != objective]
    metrics.sort(key=lambda name: (name not in FIRST_METRICS, FIRST_METRICS.get(name, 0)), reverse=True)
    same = [name for name, place in at.items() if "/" not in name and len({row[place] for row in rows[1:]}) == 1]
    lost: list[str] = []
    others = [name for name in reversed(at) if "/" not in name and name not in same] if keys_too else []
    for name in [*same, *metrics, *others]:
        if _width(rows) - max(len(row[-1]) for row in rows) + shortest <= width:
            break
        place = rows[0].index(name)
        rows = [row[:place] + row[place + 1 :] for row in rows]
        lost.append(name)
    room = max(shortest, width - (_width(rows) - max(len(row[-1]) for row in rows)))
    return [[*row[:-1], row[-1] if len(row[-1]) <= room else f"{row[-1][: room - 1]}…"] for row in rows], lost


def conclude(root: Path, not_begun: int = 0) -> str:
    """Write the tables, the pictures and the run `summary`, and return the table with what to say below it.

    Args:
        not_begun: how many members the command has beside those that have a folder.
    """
    members = read(root)
    if not members:
        return f"{root}: no members" + (f", {not_begun} not begun" if not_begun else "")
    from fmexp.sweep import figure

    objective = objective_of(root)
    rows, groups = table(root, members, objective=objective), replicates(root, members)
    picture, drawing = figure.render(root, members)
    try:
        atomic.atomic_write(root / "sweep.csv", csv_text(table(root, members, None, objective)))
        if groups:
            atomic.atomic_write(root / "replicates.csv", csv_text(replicates(root, members, digits=None)))
        atomic.atomic_write(root / "sweep.png", picture)
        atomic.atomic_write(root / "sweep.svg", drawing)
        _write_summary(root, rows, picture)
        files = ", ".join(name for name in WRITTEN if (root / name).is_file())
        written = f"written to {root} ({files})"
    except OSError as error:
        if atomic.disk_full(error):
            raise
        written = f"not written to {root}: {error.strerror}"  # somebody else's folder
    halved = [
        "pruned: ended early, by the objective there, and not ranked with what is complete; a plain sweep over this "
        "folder lets them go on, or, with hydra/sweeper=halving, hydra.sweeper.resume_pruned=true"
    ] * any(member.status == "pruned" for member in members)
    counts = Counter(member.status for member in members) + Counter({"not begun": not_begun})
    failures = [
        f"failed: {member.name}: {(member.error.splitlines() or [''])[0]} (more in its fmexp.log)"
        for member in members
        if member.status == "failed"
    ]
    by_test = [
        f"{objective} chose the best by the test split, so that it is too good there. Choose by objective=val/accuracy "
        "with train.validation=0.1."
    ] * (objective.startswith("test/") and len(members) > 1)
    said = ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name])
    return "\n".join(
        [*printed(rows, groups, objective), "", *failures, *halved, *by_test, f"{sum(counts.values())} members: {said}",
         printable(written)]
    )  # fmt: skip


def printed(
    rows: list[list[str]], groups: list[list[str]], objective: str, file: str = "sweep.csv", keys_too: bool = False
) -> list[str]:
    """The tables as the console has them: in a terminal not wider than that, as `fitted`. All is in `file`."""
    shown, lines = rows[: SHOWN + 1], []
    if sys.stdout.isatty():
        shown, lost = fitted(shown, shutil.get_terminal_size().columns, objective, keys_too)
        lines = [f"not shown: {', '.join(lost)} (all in {file})"] if lost else []
    if len(rows) > SHOWN + 1:
        lines.append(f"... and {len(rows) - SHOWN - 1} more in {file}")
    return [aligned(shown), *lines, *(["", aligned(groups)] if groups else [])]


def write_rungs(folder: Path, tag: str, values: dict[int, float]) -> None:
    """Let TensorBoard show what a member was compared by, which has no other end; a run that goes on removes this."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    points = [(step, Summary(value=[Summary.Value(tag=tag, simple_value=value)])) for step, value in values.items()]
    _write_file(folder, points)


def _write_summary(root: Path, rows: list[list[str]], picture: bytes) -> None:
    """Write the run `summary`: the picture and the table, for TensorBoard."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text import metadata as text

    heads = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    cells = ([cell.replace("|", r"\|") for cell in row] for row in rows[1:])
    markdown = "\n".join([heads, *("| " + " | ".join(row) + " |" for row in cells)])
    image = Summary.Image(encoded_image_string=picture, height=0, width=0, colorspace=4)
    words = Summary(value=[Summary.Value(tag="table", metadata=text.create_summary_metadata("table", ""))])
    words.value[0].tensor.dtype = 7  # a string
    words.value[0].tensor.string_val.append(markdown.encode())
    _write_events(root / "summary", [Summary(value=[Summary.Value(tag="sweep", image=image)]), words])


def _words(member: Member, letters: int | None) -> dict[str, str]:
    """A member's tags and note, cut to `letters`; of one that has not ended what was typed."""
    tags = ",".join(member.tags) or member.overrides.get("tags", "").strip("[]")
    note = member.note or member.overrides.get("note", "")
    lines = {"tags": tags.replace("\n", " "), "note": note.replace("\n", " ")}
    return {
        name: line if letters is None or len(line) <= letters else f"{line[: letters - 1]}…"
        for name, line in lines.items()
    }


def _width(rows: Sequence[Sequence[str]]) -> int:
    return max(map(len, aligned(rows).splitlines()))


def _write_events(path: Path, summaries: Sequence[Any]) -> None:
    """Write an event file in place of the sweep's one before; those of others are left alone, and so is a run."""
    if layout.holds_run(path) or path.is_symlink() or path.is_file():  # a run of that name, or another's
        log.warning("%s is not the sweep's own, and is left alone", printable(str(path)))
        return
    path.mkdir(exist_ok=True)
    _write_file(path, [(0, summary) for summary in summaries])


def _write_file(path: Path, summaries: Sequence[tuple[int, Any]]) -> None:
    """Write an event file of the sweep's into a folder, with the step of each summary, in place of the one before."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    old = list(path.glob(f"events.out.tfevents.*{SUFFIX}"))
    now, content = time.time_ns(), io.BytesIO()
    events = [Event(file_version="brain.Event:2"), *(Event(step=step, summary=one) for step, one in summaries)]
    for event in events:
        event.wall_time = now / 1e9
        RecordWriter(content).write(event.SerializeToString())
    second = max(now // 10**9, bounded.next_second(file for file in bounded.event_files(path) if file not in old))
    name = f"events.out.tfevents.{second}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}{SUFFIX}"
    atomic.atomic_write(path / name, content.getvalue())  # SummaryWriter would write in a thread, and print its errors
    for file in old:
        file.unlink(missing_ok=True)
