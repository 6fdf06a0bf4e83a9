"""What stands around a sweep's members: which there are, what came of each, and all of them in a table and a picture.

`python -m fmexp.sweep <folder>` prints the table of any sweep, finished or not. What a member is stands in its folder
alone. One that is complete or diverged is done; the same command goes on with one that failed or was interrupted.
"""

import csv
import io
import logging
import math
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fmexp import config, disk, folder, results

log = logging.getLogger(__name__)

SHOWN = 100  # how many members the console's table has at most


@dataclass(frozen=True)
class Member(results.Result):
    """A member of a sweep as its folder has it.

    Attributes:
        overrides: what made it this member, such as {"optimizer.lr": "0.1"}.
    """

    overrides: dict[str, str]


def read(root: str | Path) -> list[Member]:
    """The members of a sweep, in the order of their numbers."""
    root = Path(root)
    members = [_read_member(path) for path in _folders(root)]
    return sorted(members, key=lambda member: _number(member.folder))


def start(overrides: Sequence[str], root: str | Path) -> list[Member]:
    """Execute a sweep in a process of its own, or go on with the one in `root`, and return its members.

    Args:
        overrides: as on the command line after --multirun, such as ["optimizer.lr=0.1,0.01", "hydra/launcher=joblib"].
    """
    from fmexp.cli import quoted

    command = [sys.executable, "-m", "fmexp", "--multirun", *overrides, f"hydra.sweep.dir={quoted(str(Path(root)))}"]
    subprocess.run(command, check=False)
    return read(root)


def by_digest(root: Path) -> dict[str, list[Path]]:
    """The member folders that a sweep's folder holds, by their configuration's digest."""
    found = defaultdict(list)
    for path in sorted(_folders(root), key=_number):
        try:
            found[folder.digest(path)].append(path)
        except Exception as error:  # whatever a damaged file makes a YAML reader raise
            log.warning("%s: its configuration cannot be read, so it is left alone: %s", path, error)
    return found


def varied_keys(overrides: Iterable[Sequence[str]]) -> list[str]:
    """The overridden keys whose values are not the same in all members, in the order of the command line."""
    values: dict[str, set[str]] = {}
    count = 0
    for count, member in enumerate(overrides, 1):  # noqa: B007
        for key, value in split(member).items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1] if count > 1 else list(values)


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


class Progress:
    """One line for a sweep: how many members are done, failed and running, and the best so far."""

    def __init__(self, members: Sequence[Path], todo: set[Path], objective: str) -> None:
        self.total, self.objective, self.last = len(members), objective, ""
        self.ended_members = [_read_member(path) for path in members if path not in todo]
        self.left, self.running = set(todo), set[Path]()

    def started(self, path: Path) -> None:
        self.running.add(path)
        self.say()

    def ended(self, path: Path) -> None:
        self.running.discard(path)
        self._read(path)
        self.say()

    def show(self) -> None:
        """Say what the folders of members have that other machines execute."""
        states = {path: results.status(path) for path in self.left if folder.holds_run(path)}
        self.running = {path for path, state in states.items() if state == "running"}
        for path, state in states.items():
            if state in ("complete", "diverged"):
                self._read(path)
        self.say()

    def _read(self, path: Path) -> None:
        if folder.holds_run(path):
            self.left.discard(path)
            self.ended_members.append(_read_member(path))

    def say(self) -> None:
        members = self.ended_members
        done = sum(member.status in ("complete", "diverged") for member in members)
        failed = sum(member.status == "failed" for member in members)
        line = f"sweep: {done} of {self.total} members done, {failed} failed, {len(self.running)} running"
        best = [member for member in ranked(members, self.objective) if not math.isnan(member.objective)]
        if best:
            line += f"; best {best[0].objective:.4f} ({best[0].folder.name})"
        if line != self.last:
            log.info(line)
            self.last = line


def objective_of(root: Path) -> str:
    """The name of the metric that a sweep compares."""
    for path in _folders(root):
        return str(OmegaConf.load(path / folder.CONFIG).objective)
    return "test/accuracy"


def maximised(objective: str) -> bool:
    """Whether more of a metric is better: of all that can be an objective, only the accuracy is not a loss."""
    return objective == "test/accuracy"


def ranked(members: Sequence[Member], objective: str) -> list[Member]:
    """The members, best first, those without an objective at the end."""
    sign = -1 if maximised(objective) else 1
    return sorted(members, key=lambda m: (1, 0.0) if math.isnan(m.objective) else (0, sign * m.objective))


def table(root: Path, members: Sequence[Member]) -> list[list[str]]:
    """Rows of text, the first the heads: varied keys, metrics, status, seconds, folder."""
    varied = varied_keys([[f"{k}={v}" for k, v in member.overrides.items()] for member in members])
    metrics = list(dict.fromkeys(name for member in members for name in member.metrics if name != "seconds"))
    rows = [[*varied, *metrics, "status", "seconds", "folder"]]
    for member in ranked(members, objective_of(root)):
        values = [f"{member.metrics[name]:.4f}" if name in member.metrics else "" for name in metrics]
        keys = [member.overrides.get(key, "") for key in varied]
        rows.append([*keys, *values, member.status, f"{member.seconds:.1f}", member.folder.name])
    return rows


def replicates(root: Path, members: Sequence[Member]) -> list[list[str]]:
    """Members that differ in their seed alone, together: n, mean and spread (standard deviation) of the objective."""
    varied = [
        key for key in varied_keys([[f"{k}={v}" for k, v in m.overrides.items()] for m in members]) if key != "seed"
    ]
    groups = defaultdict(list)
    for member in members:
        if "seed" in member.overrides and not math.isnan(member.objective):
            groups[tuple(member.overrides.get(key, "") for key in varied)].append(member.objective)
    if not any(len(values) > 1 for values in groups.values()):
        return []
    name = objective_of(root)
    rows = [[*varied, "n", f"mean {name}", "spread"]]
    best_first = sorted(groups.items(), key=lambda item: statistics.mean(item[1]), reverse=maximised(name))
    for keys, values in best_first:
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        rows.append([*keys, str(len(values)), f"{statistics.mean(values):.4f}", spread])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def conclude(root: Path) -> str:
    """Write sweep.csv, sweep.png and the run `summary`, and return the table with what to say below it."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text import metadata as text

    members = read(root)
    if not members:
        return f"{root}: no members"
    rows = table(root, members)
    content = io.StringIO()
    csv.writer(content).writerows(rows)
    disk.write(root / "sweep.csv", content.getvalue())
    picture = _picture(root, members)
    disk.write(root / "sweep.png", picture)
    lines = [aligned(rows[: SHOWN + 1])]
    if len(rows) > SHOWN + 1:
        lines.append(f"... and {len(rows) - SHOWN - 1} more in sweep.csv")
    if groups := replicates(root, members):
        lines += ["", aligned(groups)]
    written = "\n".join(lines)
    heads = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    markdown = "\n".join([heads, *("| " + " | ".join(row) + " |" for row in rows[1:])])
    image = Summary.Image(encoded_image_string=picture, height=0, width=0, colorspace=4)
    words = Summary(value=[Summary.Value(tag="table", metadata=text.create_summary_metadata("table", ""))])
    words.value[0].tensor.dtype = 7  # a string
    words.value[0].tensor.string_val.append(markdown.encode())
    _write_events(root / "summary", [Summary(value=[Summary.Value(tag="sweep", image=image)]), words])
    counts: dict[str, int] = defaultdict(int)
    for member in members:
        counts[member.status] += 1
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    failures = [
        f"failed: {member.folder.name}: {(member.error.splitlines() or [''])[0]} (more in its fmexp.log)"
        for member in members
        if member.status == "failed"
    ]
    return "\n".join(
        [written, "", *failures, f"{len(members)} members: {said}", f"written to {root} (sweep.csv, sweep.png)"]
    )


def _picture(root: Path, members: Sequence[Member]) -> bytes:
    """A PNG: the objective against each varied key, and the learning curves of all members."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    objective = objective_of(root)
    varied = varied_keys([[f"{k}={v}" for k, v in member.overrides.items()] for member in members])[:5]
    figure = Figure(figsize=(4.5 * (len(varied) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(varied) + 1, squeeze=False)[0]
    scored = [member for member in members if not math.isnan(member.objective)]
    for axis, key in zip(axes, varied, strict=False):
        _against(axis, [member.overrides.get(key, "") for member in scored], [member.objective for member in scored])
        axis.set_xlabel(key)
        axis.set_ylabel(objective)
    for member in ranked(scored, objective)[:20]:
        tag = str(OmegaConf.load(member.folder / folder.CONFIG).train.tag)
        points = member.scalars.get(tag, [])
        axes[-1].plot([step for step, _ in points], [loss for _, loss in points], label=member.folder.name[:30])
    axes[-1].set_xlabel("step")
    axes[-1].set_ylabel("running training loss")
    if scored:
        axes[-1].legend(fontsize=6)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _against(axis: Any, values: list[str], objectives: list[float]) -> None:
    """Plot objectives against values: on a scale where they are numbers, else side by side."""
    numbers = [_as_number(value)[0] for value in values]
    if values and all(map(math.isfinite, numbers)):
        axis.plot(numbers, objectives, "o", alpha=0.6)
        if min(numbers) > 0 and max(numbers) >= 20 * min(numbers):
            axis.set_xscale("log")
        return
    names = sorted(set(values), key=_as_number)
    axis.plot([names.index(value) for value in values], objectives, "o", alpha=0.6)
    shown = names[:: math.ceil(len(names) / 20) or 1]
    axis.set_xticks([names.index(name) for name in shown], [name[:20] for name in shown], rotation=30)


def _as_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob("*") if folder.holds_run(path)]


def _number(path: Path) -> tuple[int, str]:
    head = path.name.split("_")[0]
    return int(head) if head.isdigit() else -1, path.name


def _is_free(path: Path) -> bool:
    if not path.exists():
        return True
    left = {folder.LOCK, folder.OWNER, "fmexp.log", ".hydra"}
    return not folder.holds_run(path) and {entry.name for entry in path.iterdir()} <= left


def _read_member(path: Path) -> Member:
    result = results.read(path)
    overrides = OmegaConf.load(path / ".hydra" / "overrides.yaml")
    return Member(**vars(result), overrides=split([str(word) for word in overrides]))


def split(overrides: Sequence[str]) -> dict[str, str]:
    """["optimizer.lr=0.1"] -> {"optimizer.lr": "0.1"}."""
    pairs = (word.partition("=") for word in overrides)
    return {key.lstrip("+~"): value.strip("'\"") for key, _, value in pairs}


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
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m fmexp.sweep <folder of a sweep>, such as multirun/2026-01-31/12-00-00-000000")
    print(conclude(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
