"""Stop sweeps at random moments for a while, and compare all that they leave with runs that nobody disturbed.

    python benchmarks/soak.py [--minutes 20] [--seed 0] [--members lenet lstm ...]

Each round is one sweep by joblib in a new folder, started again and again until it ends with status 0. Meanwhile
processes get SIGKILL, SIGTERM and SIGINT, checkpoints come to harm, and second sweeps enter the folder. A round has a
line. Exit status 1 after a difference or a hang, whose folder is kept. Linux only, for processes are found in /proc.
"""

import argparse
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import filelock

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "reliability")]

from program import default_signals  # noqa: E402
from reliability_tools import SMALL, environment, left  # noqa: E402

from fmexp.rundir import layout, results  # noqa: E402

Sweep = subprocess.Popen[bytes]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANG_S = 60  # without a change in the sweep's folder
COUNTED = ("sweeps", "members compared", "differences", "hangs", "signals", "starts", "races", "checkpoints damaged",
           "temporary files removed")  # fmt: skip
STARTS = 12  # of one sweep that are disturbed; those after them are not


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
    "lstm": kind("lenet", "adam", "light", model={"_target_": "reliability_parts.LSTM"}),
    "batchnorm-loaded": kind("lenet", "sgd", "light", model={"_target_": "reliability_parts.Noisy"}, dataset=MAP_STYLE,
                             optimizer={"momentum": 0.9}, train={"num_workers": 2}),
    "lstm-loaded": kind("lenet", "adam", "light", model={"_target_": "reliability_parts.LSTM"}, dataset=MAP_STYLE,
                        train={"num_workers": 2}),
    "map-style": kind("mlp", "adam", "light", model={"hidden": [32]}, dataset=MAP_STYLE, train={"num_workers": 0}),
}  # fmt: skip


def living(sweeps: Iterable[int]) -> dict[int, tuple[int, str]]:
    """The processes of some sweeps: pid -> (group, command). They share a session, whose number is the sweep's pid.

    Without the trackers, which remove what killed processes leave of semaphores, and end by themselves.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, _, group, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if int(session) in sweeps and state != "Z" and "resource_tracker" not in command:
                found[int(folder.name)] = int(group), command
    return found


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def targets(sweep: int) -> dict[str, list[list[int]]]:
    """What of a sweep can be sent a signal: kind -> the processes that get it together, one list for each choice."""
    mine = {pid: group for pid, (group, _) in living([sweep]).items()}
    found = {
        "sweep": [[sweep]],
        "worker": [[pid] for pid, group in mine.items() if pid == group != sweep],  # each leads a group of its own
        "loader": [[pid] for pid, group in mine.items() if group not in (pid, sweep)],
        "group": [[pid for pid, group in mine.items() if group == sweep]],
        "all": [list(mine)],
    }
    return {name: choices for name, choices in found.items() if choices}


def state_of(root: Path) -> set[tuple[str, str, int, int]]:
    """Folder, name, size and time of every file but the locks: what changes while a sweep gets on."""
    found = set()
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(OSError):  # it has just been removed
                stat = os.stat(os.path.join(folder, name))
                if not name.startswith(layout.LOCK):
                    found.add((folder, name, stat.st_size, stat.st_mtime_ns))
    return found


class Round:
    """One sweep: its folder, and every start of its command."""

    def __init__(self, soak: "Soak", root: Path) -> None:
        self.soak, self.root, self.draw, self.counts = soak, root, soak.draw, soak.counts
        self.order = self.draw.sample(soak.members, len(soak.members))
        self.started: list[Sweep] = []
        self.told: Counter[str] = Counter()  # signals by name and target
        self.signalled: set[int] = set()  # the sweeps that were sent one
        self.complete: dict[Path, int] = {}  # when each complete member's result was written

    def start(self) -> Sweep:
        self.counts["starts"] += 1
        words = ("--multirun", f"experiment={','.join(self.order)}", "hydra/launcher=joblib",
                 "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={self.root}")  # fmt: skip
        self.started.append(self.soak.start(*words, output=self.output(len(self.started))))
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
        # What a kill in the last moment leaves, the same command removes; from the sweep's own folder after an hour.
        if left_over := [*self.root.rglob("*.part"), *self.root.glob("*/checkpoint*.pt")]:
            for path in left_over:
                os.utime(path, (0, 0))
            self.attend(disturbed=False)
        self.compare()

    def attend(self, *, disturbed: bool) -> bool:
        """One start, or two that race, to their ends; whether one of them says that all is complete."""
        draw, sweeps, known = self.draw, [self.start()], state_of(self.root)
        todo = [self.disturb] * draw.choice((1, 1, 1, 2, 3)) + [self.race] * (draw.random() < 0.25)
        plan = sorted((draw.uniform(0, self.soak.span), number) for number in range(len(todo))) if disturbed else []
        origin = time.monotonic() if draw.random() < 0.3 else math.inf  # else from the first new checkpoint
        for state in self.watch(lambda: all(sweep.poll() is not None for sweep in sweeps)):
            if origin == math.inf and any(name == layout.CHECKPOINT for _, name, *_ in state - known):
                origin = time.monotonic()
            while plan and time.monotonic() > origin + plan[0][0]:
                todo[plan.pop(0)[1]](sweeps)
        self.check_complete()
        for sweep in sweeps:
            if sweep.returncode and sweep.pid not in self.signalled:
                text = self.output(self.started.index(sweep)).read_text(errors="replace")
                self.differs(f"status {sweep.returncode} of a sweep that was sent no signal:\n{text[-3000:]}")
        if draw.random() < 0.5:  # else what the ended one left behind meets the next one
            self.wait_for_ends()
        return any(sweep.returncode == 0 for sweep in sweeps)

    def race(self, sweeps: list[Sweep]) -> None:
        self.counts["races"] += 1
        sweeps.append(self.start())

    def disturb(self, sweeps: list[Sweep]) -> None:
        sweep, number = self.draw.choice(sweeps), self.draw.choice(SIGNALS)
        if sweep.poll() is None and (found := targets(sweep.pid)):
            name = "loader" if "loader" in found and self.draw.random() < 0.4 else self.draw.choice(sorted(found))
            send(self.draw.choice(found[name]), number)
            self.signalled.add(sweep.pid)
            self.counts["signals"] += 1
            self.told[f"{number.name[3:]} {name}"] += 1

    def mine(self) -> dict[int, tuple[int, str]]:
        return living([sweep.pid for sweep in self.started])

    def watch(self, done: Callable[[], bool]) -> Iterator[set[tuple[str, str, int, int]]]:
        """The folder's state, again and again until something is done; what changes nothing there for long is ended."""
        before, changed = state_of(self.root), time.monotonic()
        while not done():
            time.sleep(0.02)
            if (state := state_of(self.root)) != before:
                before, changed = state, time.monotonic()
            elif time.monotonic() > changed + HANG_S:
                self.hang()
                changed = time.monotonic()
            yield state

    def wait_for_ends(self) -> None:
        """Wait for all processes of this round, workers and loading workers too."""
        for _ in self.watch(lambda: not self.mine()):
            pass

    def hang(self) -> None:
        """Say where each process stands, and end it."""
        self.counts["hangs"] += 1
        self.soak.keep = True
        processes = self.mine()
        print(f"HANG in {self.root}, after {dict(self.told)}")
        for pid, (group, command) in processes.items():
            places = set()
            with suppress(OSError):  # it has just ended
                places = {path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/wchan")}
            print(f"  {pid} (group {group}) {command}: {', '.join(sorted(places))}")
        send(processes, signal.SIGABRT)  # to which faulthandler answers with Python's stacks, and ends the process
        time.sleep(2)
        send(self.mine(), signal.SIGKILL)
        self.signalled |= {sweep.pid for sweep in self.started}
        for number in range(len(self.started)):
            _, mark, stacks = self.output(number).read_text(errors="replace").partition("Fatal Python error: Aborted")
            print(f"{self.output(number)}: {mark}{stacks}" if mark else "", flush=True)

    def damage(self) -> None:
        """Now and then harm a member's newest checkpoint where there is one before it, and remove temporary files."""
        held = [path.parent for name in (layout.PREVIOUS, ".*.part") for path in self.root.glob(f"*/{name}")]
        if not held or self.draw.random() < 0.3:
            return
        folder = self.draw.choice(sorted(set(held)))
        with suppress(filelock.Timeout, FileNotFoundError), filelock.FileLock(folder / layout.LOCK, timeout=0):
            for path in folder.glob(".*.part"):
                path.unlink()
                self.counts["temporary files removed"] += 1
            if (folder / layout.PREVIOUS).exists():
                content = bytearray((folder / layout.CHECKPOINT).read_bytes())
                place = self.draw.randrange(len(content))
                if self.draw.random() < 0.5:
                    del content[place:]
                else:
                    content[place] ^= 1 << self.draw.randrange(8)
                (folder / layout.CHECKPOINT).write_bytes(content)
                self.counts["checkpoints damaged"] += 1

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
            return
        for folder, name in names.items():
            self.counts["members compared"] += 1
            try:
                mine, its = left(folder), self.soak.truth[name]
            except Exception as error:  # whatever a damaged file makes a reader raise
                self.differs(f"{folder.name} cannot be read: {error!r}")
                continue
            for part in its:
                if mine[part] != its[part]:
                    lists = (list(one.items()) if isinstance(one, dict) else one for one in (mine[part], its[part]))
                    unlike = [pair for pair in zip_longest(*lists) if pair[0] != pair[1]]
                    self.differs(
                        f"{part} of {folder.name}, in {len(unlike)} places; the first, ours and its: {unlike[0]}"
                    )
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
        self.minutes, self.until = minutes, math.inf
        self.counts: Counter[str] = Counter()
        self.keep = False  # the folder, for somebody to look at
        self.truth: dict[str, dict[str, Any]] = {}
        self.span = 0.0  # within so many seconds of a start, or of its first checkpoint, signals are sent
        for name, recipe in KINDS.items():
            path = scratch / "conf" / "experiment" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# @package _global_\n{json.dumps(recipe)}\n")

    def time_is_left(self) -> bool:
        return time.monotonic() < self.until

    def start(self, *words: str, output: Path) -> Sweep:
        """Start fmexp in a session of its own."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "fmexp", "--config-dir", str(self.scratch / "conf"), *words, *WORDS],
                env=environment(PYTHONFAULTHANDLER="1"), cwd=self.scratch, start_new_session=True,
                preexec_fn=default_signals, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def undisturbed(self) -> None:
        """Execute each kind of member once, by itself."""
        for name in self.members:
            began, (folder, output) = time.monotonic(), (self.scratch / "truth" / name, self.scratch / f"{name}.txt")
            if self.start(f"experiment={name}", f"hydra.run.dir={folder}", output=output).wait():
                raise SystemExit(f"{name} fails undisturbed:\n{output.read_text()}")
            self.truth[name] = left(folder)
            self.span = max(self.span, time.monotonic() - began)

    def run(self) -> None:
        self.until = time.monotonic() + 60 * self.minutes
        while self.time_is_left():
            began, before = time.monotonic(), self.counts.copy()
            self.counts["sweeps"] += 1
            sweep = Round(self, self.scratch / f"sweep{self.counts['sweeps']}")
            try:
                sweep.run()
            finally:
                send(sweep.mine(), signal.SIGKILL)
            new = [f"{count} {what}" for what, count in (self.counts - before).items() if what != "sweeps"]
            told = [f"{count} {what}" for what, count in sorted(sweep.told.items())]
            seconds = time.monotonic() - began
            print(f"round {self.counts['sweeps']}: {', '.join(new)} ({', '.join(told)}); {seconds:.0f} s", flush=True)
            if not self.keep:
                shutil.rmtree(sweep.root)

    def summary(self) -> str:
        return ", ".join(f"{self.counts[what]} {what}" for what in COUNTED)


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
