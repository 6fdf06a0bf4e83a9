"""Stop sweeps at random moments for a while, and compare all that they leave with runs that nobody disturbed.

    python benchmarks/soak.py [--minutes 20] [--seed 0] [--members lenet lstm ...]

Each round is one sweep by joblib in a new folder, started again and again until it ends with status 0. Meanwhile
processes get SIGKILL, SIGTERM and SIGINT, checkpoints come to harm, and second sweeps enter the folder. A seed draws the
same disturbances, but not the same moments. Prints a line a round; exit status 1 after a difference or a hang, whose
folder is kept. Linux only, for processes are found in /proc.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "reliability"))

from reliability_tools import SMALL, default_signals, environment, left  # noqa: E402

from fmexp.rundir import checkpoint, layout, results  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANG_S = 60  # without a change in the sweep's folder
SPAN_S = 12  # within which the moment of a signal is drawn
STARTS = 12  # of one sweep that are disturbed; those after them are not


class LSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, _, width = input_shape
        self.lstm = nn.LSTM(channels * width, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.transpose(1, 2).flatten(2))  # [B, C, H, W] -> [B, H, C * W]
        logits: Tensor = self.head(states[:, -1])
        return logits


def kind(model: str, optimizer: str, logging: str, /, **more: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a member: what it chooses of the groups, and `more` values."""
    chosen = {"model": model, "optimizer": optimizer, "logging": logging}
    return {"defaults": [{f"override /{group}": option} for group, option in chosen.items()], **more}


# 2 epochs of 400 batches, a checkpoint every three: some 2 s.
WORDS = (*SMALL, "dataset.train_size=1600", "train.log_every=20", "train.compile=false")
MAP_STYLE = {"_target_": "reliability_parts.augmented"}
KINDS = {
    "lenet": kind("lenet", "adam", "tensorboard", stage={"projector": {"images": 6}, "predictions": {"when": "epoch"}}),
    "dropout": kind("mlp", "sgd", "light", model={"hidden": [32], "dropout": 0.3}, optimizer={"momentum": 0.9}),
    "resnet18": kind("resnet18", "sgd", "light", train={"max_steps": 18}),
    "lstm": kind("lenet", "adam", "light", model={"_target_": "soak.LSTM"}),
    "batchnorm-loaded": kind("lenet", "sgd", "light", model={"_target_": "reliability_parts.Noisy"}, dataset=MAP_STYLE,
                             optimizer={"momentum": 0.9}, train={"num_workers": 2}),
    "lstm-loaded": kind("lenet", "adam", "light", model={"_target_": "soak.LSTM"}, dataset=MAP_STYLE,
                        train={"num_workers": 2}),
    "map-style": kind("mlp", "adam", "light", model={"hidden": [32]}, dataset=MAP_STYLE, train={"num_workers": 0}),
}  # fmt: skip


@dataclass(frozen=True)
class Process:
    """A process as /proc has it."""

    pid: int
    group: int
    session: int
    command: str


def living(sessions: set[int]) -> list[Process]:
    """The processes of some sessions; a sweep and all that it starts share one, whose number is the sweep's pid."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, _, group, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(Process(int(folder.name), int(group), int(session), command))
    return sorted(found, key=lambda process: process.pid)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def targets(sweep: int) -> dict[str, list[list[int]]]:
    """What of a sweep can be sent a signal: kind -> the processes that get it together, one list for each choice."""
    mine = living({sweep})
    workers = [process for process in mine if "loky.backend.popen" in process.command]  # they lead groups of their own
    found = {
        "sweep": [[sweep]],
        "worker": [[process.pid] for process in workers if process.group in (process.pid, sweep)],
        "loader": [[process.pid] for process in workers if process.group not in (process.pid, sweep)],
        "group": [[process.pid for process in mine if process.group == sweep]],
        "all": [[process.pid for process in mine]],
    }
    return {name: choices for name, choices in found.items() if choices and choices[0]}


def state_of(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but the locks: what changes while a sweep gets on."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(OSError):  # it has just been removed
                stat = os.stat(os.path.join(folder, name))
                if not name.startswith(layout.LOCK):
                    found[os.path.join(folder, name)] = stat.st_size, stat.st_mtime_ns
    return found


class Round:
    """One sweep: its folder, and every start of its command."""

    def __init__(self, soak: "Soak", root: Path) -> None:
        self.soak, self.root, self.draw, self.counts = soak, root, soak.draw, soak.counts
        self.started: list[subprocess.Popen[bytes]] = []
        self.told: Counter[str] = Counter()  # signals by name and target
        self.signalled: set[int] = set()  # the sweeps that were sent one
        self.complete: dict[Path, int] = {}  # when each complete member's result was written

    def start(self) -> subprocess.Popen[bytes]:
        self.counts["starts"] += 1
        self.started.append(self.soak.start("--multirun", f"experiment={','.join(self.soak.members)}", "hydra/launcher=joblib",
                                            "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={self.root}",
                                            output=self.output(len(self.started))))  # fmt: skip
        return self.started[-1]

    def output(self, number: int) -> Path:
        return self.root.with_name(f"{self.root.name}.{number}.txt")

    def differs(self, what: str) -> None:
        self.counts["differences"] += 1
        self.soak.keep = True
        print(f"DIFFERENCE in {self.root}: {what}", flush=True)

    def run(self) -> None:
        """Start the command until it ends with status 0, and compare."""
        differences = self.counts["differences"]
        while not self.attend(disturbed=len(self.started) < STARTS and self.soak.time_is_left()):
            if self.counts["differences"] > differences:
                return
            self.damage()
        self.wait_for_ends()
        self.compare()

    def attend(self, *, disturbed: bool) -> bool:
        """One start, or two that race, to their ends; whether one of them says that all is complete."""
        draw, sweeps = self.draw, [self.start()]
        second = draw.uniform(0, SPAN_S) if disturbed and draw.random() < 0.25 else None
        moments = sorted(draw.uniform(0, SPAN_S) for _ in range(draw.choice((0, 1, 1, 1, 2, 3)))) if disturbed else []
        from_start = draw.random() < 0.3  # else from when it begins to write
        origin = began = changed = time.monotonic()
        before = state_of(self.root)
        while any([sweep.poll() is None for sweep in sweeps]):
            time.sleep(0.02)
            now = time.monotonic()
            if (state := state_of(self.root)) != before:
                origin = now if origin == began and not from_start else origin
                before, changed = state, now
            begun = from_start or origin > began
            if second is not None and begun and now > origin + second:
                sweeps.append(self.start())
                self.counts["races"] += 1
                second = None
            if moments and begun and now > origin + moments[0]:
                moments.pop(0)
                self.disturb(draw.choice(sweeps))
            if now > changed + HANG_S:
                self.hang()
        self.check_complete()
        for sweep in sweeps:
            if sweep.returncode and sweep.pid not in self.signalled:
                text = self.output(self.started.index(sweep)).read_text(errors="replace")
                self.differs(f"status {sweep.returncode} of a sweep that was sent no signal:\n{text[-3000:]}")
        if draw.random() < 0.5:  # else what the ended one left behind meets the next one
            self.wait_for_ends()
        return any(sweep.returncode == 0 for sweep in sweeps)

    def disturb(self, sweep: subprocess.Popen[bytes]) -> None:
        if sweep.poll() is not None:
            return
        found, number = targets(sweep.pid), self.draw.choice(SIGNALS)
        name = self.draw.choice(sorted(found))
        send(self.draw.choice(found[name]), number)
        self.signalled.add(sweep.pid)
        self.counts["signals"] += 1
        self.told[f"{number.name[3:]} {name}"] += 1

    def wait_for_ends(self) -> None:
        """Wait for all processes of this round, workers and loading workers too."""
        before, changed = state_of(self.root), time.monotonic()
        while living({sweep.pid for sweep in self.started}):
            time.sleep(0.1)
            if (state := state_of(self.root)) != before:
                before, changed = state, time.monotonic()
            if time.monotonic() > changed + HANG_S:
                self.hang()

    def hang(self) -> None:
        """Say where each process stands, and end it."""
        self.counts["hangs"] += 1
        self.soak.keep = True
        processes = living({sweep.pid for sweep in self.started})
        print(f"HANG in {self.root}, after {dict(self.told)}", flush=True)
        for process in processes:
            tasks = list(Path(f"/proc/{process.pid}/task").glob("*"))
            places = {where.read_text() for task in tasks if (where := task / "wchan").exists()}
            print(f"  {process.pid} (group {process.group}) {process.command}: {', '.join(sorted(places))}")
        send([process.pid for process in processes], signal.SIGABRT)  # faulthandler prints Python's stacks
        time.sleep(2)
        send([process.pid for process in living({sweep.pid for sweep in self.started})], signal.SIGKILL)
        self.signalled |= {sweep.pid for sweep in self.started}
        for number in range(len(self.started)):
            _, mark, stacks = self.output(number).read_text(errors="replace").partition("Fatal Python error: Aborted")
            print(f"{self.output(number)}: {mark}{stacks}" if mark else "", flush=True)

    def damage(self) -> None:
        """Harm a member's newest checkpoint where there is one before it, or remove a temporary file."""
        folders = sorted(path.parent for path in self.root.glob(f"*/{layout.LOCK}"))
        if not folders or self.draw.random() < 0.5:
            return
        folder = self.draw.choice(folders)
        with suppress(filelock.Timeout, FileNotFoundError), filelock.FileLock(folder / layout.LOCK, timeout=0):
            for path in folder.glob(".*.part"):
                path.unlink()
                self.counts["removed"] += 1
            if (folder / checkpoint.PREVIOUS).exists():
                content = bytearray((folder / checkpoint.LATEST).read_bytes())
                place = self.draw.randrange(len(content))
                if self.draw.random() < 0.5:
                    del content[place:]
                else:
                    content[place] ^= 1 << self.draw.randrange(8)
                (folder / checkpoint.LATEST).write_bytes(content)
                self.counts["damaged"] += 1

    def check_complete(self) -> None:
        """What is complete stays so, and is not trained again."""
        for path, when in self.complete.items():
            if not (path / layout.RESULT).exists() or (path / layout.RESULT).stat().st_mtime_ns != when:
                self.differs(f"{path.name} was complete, and its result.json is another now")
        for path in (file.parent for file in self.root.glob(f"*/{layout.RESULT}")):
            if results.status(path) == "complete":
                self.complete[path] = (path / layout.RESULT).stat().st_mtime_ns

    def compare(self) -> None:
        """Compare each member with its undisturbed run, and look for what should be gone."""
        folders = sorted(path.parent.parent for path in self.root.glob(f"*/{layout.CONFIG}"))
        names = {folder: folder.name.partition("_experiment-")[2] for folder in folders}
        if sorted(names.values()) != sorted(self.soak.members):
            self.differs(f"its members are {sorted(names.values())}")
        for folder, name in names.items():
            self.counts["members"] += 1
            try:
                mine, its = left(folder), self.soak.truth[name]
            except Exception as error:  # whatever a damaged file makes a reader raise
                self.differs(f"{folder.name} cannot be read: {error!r}")
                continue
            for part in its:
                if mine[part] != its[part]:
                    self.differs(f"{part} of {folder.name} is\n  {mine[part]}\n  and not\n  {its[part]}")
            if layout.is_locked(folder):
                self.differs(f"{folder.name} is locked")
        if leftovers := [str(path) for path in self.root.rglob("*.part")]:
            self.differs(f"temporary files are left: {leftovers}")
        with (self.root / "sweep.csv").open(newline="") as file:
            statuses = [row["status"] for row in csv.DictReader(file)]
        if statuses != ["complete"] * len(self.soak.members):
            self.differs(f"sweep.csv says {statuses}")


class Soak:
    """Rounds until the time is over, and what was counted in them."""

    def __init__(self, scratch: Path, members: list[str], seed: int, minutes: float) -> None:
        self.scratch, self.members, self.draw = scratch, members, random.Random(seed)
        self.until = time.monotonic() + 60 * minutes
        self.counts: Counter[str] = Counter()
        self.keep = False  # the folder, for somebody to look at
        self.truth: dict[str, dict[str, Any]] = {}
        for name, recipe in KINDS.items():
            path = scratch / "conf" / "experiment" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# @package _global_\n{json.dumps(recipe)}\n")

    def time_is_left(self) -> bool:
        return time.monotonic() < self.until

    def start(self, *words: str, output: Path) -> subprocess.Popen[bytes]:
        """Start fmexp in a session of its own."""
        environ = environment(PYTHONFAULTHANDLER="1", HYDRA_FULL_ERROR="0")
        environ["PYTHONPATH"] += f"{os.pathsep}{HERE}"
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "fmexp", "--config-dir", str(self.scratch / "conf"), *words, *WORDS],
                env=environ, cwd=self.scratch, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=default_signals,
            )  # fmt: skip

    def undisturbed(self) -> None:
        """Execute each kind of member once, by itself."""
        for name in self.members:
            folder, output = self.scratch / "truth" / name, self.scratch / f"{name}.txt"
            if self.start(f"experiment={name}", f"hydra.run.dir={folder}", output=output).wait():
                raise SystemExit(f"{name} fails undisturbed:\n{output.read_text()}")
            self.truth[name] = left(folder)

    def run(self) -> None:
        while self.time_is_left():
            began, before = time.monotonic(), self.counts.copy()
            self.counts["sweeps"] += 1
            sweep = Round(self, self.scratch / f"sweep{self.counts['sweeps']}")
            try:
                sweep.run()
            finally:
                send([process.pid for process in living({each.pid for each in sweep.started})], signal.SIGKILL)
            new = ", ".join(f"{count} {what}" for what, count in (self.counts - before).items() if what != "sweeps")
            told = ", ".join(f"{what} {count}" for what, count in sorted(sweep.told.items()))
            print(f"round {self.counts['sweeps']}: {new}; {told or 'no signal'}; {time.monotonic() - began:.0f} s",
                  flush=True)  # fmt: skip
            if not self.keep:
                shutil.rmtree(sweep.root)

    def summary(self) -> str:
        count = self.counts
        return (
            f"{count['sweeps']} sweeps, {count['members']} members compared, {count['differences']} differences, "
            f"{count['hangs']} hangs, {count['signals']} signals, {count['starts']} starts, {count['races']} races, "
            f"{count['damaged']} checkpoints damaged, {count['removed']} temporary files removed"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="how long; the last sweep is then left in peace")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--members", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds of members")
    chosen = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(scratch, chosen.members, chosen.seed, chosen.minutes)
    try:
        soak.undisturbed()
        soak.run()
    finally:
        if soak.keep:
            print(f"kept: {scratch}")
        else:
            shutil.rmtree(scratch)
        print(soak.summary())
    raise SystemExit(bool(soak.counts["differences"] or soak.counts["hangs"]))


if __name__ == "__main__":
    main()
