"""How a sweep gets on: a line for each member that ends, and on a terminal one bar with the time left and the best."""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fmexp import config
from fmexp.config import maximised
from fmexp.errors import FmexpError, printable
from fmexp.rundir import bounded, layout, results, rungs

log = logging.getLogger(__name__)

ENDED = ("complete", "diverged", "failed", "paused", "pruned")
DETAILS = 12  # last lines of the log of a member that failed
EVERY_S = 60  # seconds between two lines on the whole sweep, where there is no bar
NAME = 50  # letters of a folder's name that lines are aligned to
QUIET = "TQDM_DISABLE"  # tqdm's own variable, for no bars


class Progress:
    """What has come of a sweep's members so far; within the block it may show a bar.

    Args:
        total: how many members the whole command has.
        objective: the metric that is compared.

    Attributes:
        not_begun: how many of all members have no run in their folder.
    """

    def __init__(self, total: int, objective: str) -> None:
        self.total, self.objective = total, objective
        self.members: dict[Path, str] = {}  # of those that have ended the status; of the others ""
        self.running: set[Path] = set()
        self.rungs: dict[Path, dict[int, float]] = {}  # where members had paused before they were to go on
        self.best: results.Result | None = None
        self.began = self.spoke = time.monotonic()
        self.before = 0  # members that had ended before this command
        self.trained: dict[Path, int] = {}  # batches of each member that has paused or ended
        self.planned: int | None = None  # batches of the whole command, where the time left is estimated by these
        self._lock = threading.RLock()
        self._bar: Any = None
        self._left = threading.Event()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._left.set()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            os.environ.pop(QUIET, None)

    @property
    def ended_members(self) -> int:
        return sum(map(bool, self.members.values()))

    @property
    def amount(self) -> tuple[int, int]:
        """How much is done, and of how much: members, or batches."""
        if self.planned is None:
            return self.ended_members, self.total
        done = sum(self.trained.values())
        return done, max(done, self.planned)

    def by_batches(self, planned: int, trained: dict[Path, int]) -> None:
        """Estimate the time left by batches, for members that pause: so many in all, and those of earlier commands."""
        self.planned, self.trained = planned, dict(trained)
        self.before = sum(trained.values())

    @property
    def not_begun(self) -> int:
        return max(0, self.total - sum(map(layout.holds_run, self.members)))

    @property
    def complete(self) -> bool:
        """Whether no member needs more work."""
        return not self.not_begun and set(self.members.values()) <= {"complete", "diverged", "pruned"}

    def plan(self, members: Iterable[Path], todo: Iterable[Path]) -> None:
        """Take up more members, of which those in `todo` are still to be executed, and show the bar."""
        todo = set(todo)
        for path in members:
            if path not in todo and path not in self.members:
                self.before += self.planned is None
                self._note(results.read(path))
            elif path in todo:
                self.members[path] = ""
                self.rungs[path] = rungs.read(path)
        if self._bar is None and todo and sys.stderr.isatty() and not os.environ.get(QUIET):
            shape = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
            desc, whole = "sweep" if self.planned is None else "batches of the sweep", self.amount[1]
            self._bar = tqdm(total=whole, initial=self.before, desc=desc, bar_format=shape, smoothing=0,
                             leave=False, dynamic_ncols=True, disable=False)  # fmt: skip
            os.environ[QUIET] = "1"  # for the members' own bars, here and in other processes
            threading.Thread(target=self._refresh, daemon=True).start()
            self._show()

    def started(self, path: Path) -> None:
        if layout.is_locked(path):
            self.say(f"{path.name}: waiting for {layout.owner(path)}, which is running in this folder")
        with self._lock:
            self.running.add(path)

    def ended(self, path: Path) -> None:
        """Say what came of a member, which its folder has."""
        with self._lock:
            self.running.discard(path)
            if not layout.holds_run(path):
                return
            try:
                result = results.read(path)
            except FmexpError as error:
                return self.say(str(error), logging.ERROR)
            self._note(result)
            self.say(self._line(result), logging.ERROR if result.status == "failed" else logging.INFO)
            self._show()

    def look(self) -> None:
        """Say what has come of members that other machines execute."""
        states = {path: results.status(path) for path, known in self.members.items() if not known}
        with self._lock:
            self.running = {path for path, state in states.items() if state == "running"}
        for path, state in states.items():
            on = state == "paused" and rungs.read(path) != self.rungs.get(path, {})
            if on or state in ("complete", "diverged"):  # one that failed may be from before its job began
                self.ended(path)

    def say(self, words: str, level: int = logging.INFO) -> None:
        """Log a line, above the bar."""
        above: AbstractContextManager[Any] = tqdm.external_write_mode() if self._bar is not None else nullcontext()
        with self._lock, above:
            log.log(level, printable(words))

    def pruned(self, path: Path) -> None:
        """Take up that a member does not go on."""
        with self._lock:
            self._note(results.read(path))

    def _note(self, result: results.Result) -> None:
        self.trained[result.folder] = max(result.steps, self.trained.get(result.folder, 0))
        self.members[result.folder] = result.status if result.status in ENDED else ""
        if math.isnan(result.objective):
            return
        sign = 1 if maximised(self.objective) else -1
        if self.best is None or sign * result.objective > sign * self.best.objective:
            self.best = result

    def _line(self, result: results.Result) -> str:
        """What is said of a member that has ended."""
        width = min(NAME, max(len(path.name) for path in self.members))
        count = f"[{self.ended_members:{len(str(self.total))}}/{self.total}]"
        if result.status not in ENDED:
            count = " " * len(count)
        line = f"{count} {result.folder.name:{width}}  "
        if result.status == "failed":
            details = bounded.last_lines(result.folder / "fmexp.log", DETAILS)
            error = (result.error.splitlines() or [""])[0]
            details = [] if details == [error] else details
            return "\n".join([f"{line}failed: {error}", *(f"    {detail}" for detail in details)])
        if result.status == "paused" and result.rungs == self.rungs.get(result.folder):
            return f"{line}stopped before it went on from step {result.steps}"
        if result.status == "paused" and result.rungs:
            step, value = list(result.rungs.items())[-1]
            line += f"step {step}: {config.rung_metric(layout.read_config(result.folder))} {value:.4f}"
        else:
            line += f"{self.objective} {result.objective:.4f}" if result.status == "complete" else result.status
        if result.status in ("complete", "diverged", "paused"):
            line += f"  {result.seconds:.1f} s"
        if result.failures:
            line += f"  stages that failed: {', '.join(result.failures)}"
        return line + ("  best so far" if result is self.best else "")

    def _show(self) -> None:
        """Put the bar where the sweep is, or now and then say so in a line."""
        failed = sum(status == "failed" for status in self.members.values())
        words = [f"{failed} failed"] if failed else []
        if self.best is not None:
            words.append(f"best {self.best.objective:.4f} ({self.best.name[:24]})")
        done, whole = self.amount
        if self._bar is not None:
            self._bar.n, self._bar.total = done, whole
            self._bar.set_postfix_str(", ".join(words))
            return
        now = time.monotonic()
        if self.spoke + EVERY_S <= now and 0 < done < whole:
            self.spoke = now
            time_left = tqdm.format_interval((now - self.began) / max(1, done - self.before) * (whole - done))
            count = f"{done:,} of {whole:,} " + ("members" if self.planned is None else "batches")
            self.say(", ".join([f"sweep: {count}, {time_left} left", *words]))

    def _refresh(self) -> None:
        """Let the bar's time go on while members take long."""
        while not self._left.wait(1):
            bar = self._bar
            if bar is not None:
                bar.refresh()
