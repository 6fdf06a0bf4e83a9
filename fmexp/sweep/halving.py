"""Successive halving: a sweep that stops the hopeless early (Jamieson and Talwalkar, 2016), by Hyperband's brackets.

All members begin with their final configuration and pause at the first rung. The best 1/eta of them go on from their
checkpoints to the next one, at eta times as many batches, and so on; the last ones train to their end. Each decision
waits for all members, and follows from what their folders keep (rungs.json). So it is the same for any number of
workers and after any stop, and a survivor has the bits of a run that was alone.
"""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import configure_log, setup_globals

from fmexp import config
from fmexp.config.overrides import varied_keys
from fmexp.errors import ConfigError, FmexpError
from fmexp.rundir import layout, results, rungs
from fmexp.sweep.further import lengthen, shorter
from fmexp.sweep.grid import Parsing, choices, expand
from fmexp.sweep.job import Job
from fmexp.sweep.launcher import action
from fmexp.sweep.members import rung_tag
from fmexp.sweep.pausing import check_comparable, lengths, prune
from fmexp.sweep.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ladder:
    """Who is compared when, which is known before anything is trained.

    Args:
        sizes: how many members each bracket begins with; bracket b has its first rung at rung b.
        steps: the batches after which each rung compares.
    """

    eta: int
    sizes: list[int]
    steps: list[int]

    def kept(self, bracket: int, rung: int) -> int:
        """How many of a bracket go on from a rung; at least one."""
        most: int = self.eta ** (rung - bracket + 1)
        return max(1, self.sizes[bracket] // most)

    def batches(self, total: int) -> int:
        """How many batches all members train together, where each has `total` and nobody fails."""
        ends = [*self.steps, total]
        climbs = [
            size * ends[b]
            + sum(self.kept(b, rung) * (ends[rung + 1] - ends[rung]) for rung in range(b, len(self.steps)))
            for b, size in enumerate(self.sizes)
        ]
        return sum(climbs)

    @cached_property
    def said(self) -> str:
        """The rungs in words."""
        counts = [
            sum(self.kept(b, rung) if b <= rung else size for b, size in enumerate(self.sizes))
            for rung in range(len(self.steps))
        ]
        return ", ".join(f"{count} from {step:,}" for count, step in zip(counts, self.steps, strict=True))


class Halving(Parsing):
    """Trains all members for a while, lets the best 1/`eta` go on from where they are, and so on to the end."""

    def sweep(self, arguments: list[str]) -> float:
        """Execute what is left of the sweep, and return the best objective, NaN where no member is complete."""
        configure_log(self.cfg.hydra.hydra_logging, self.cfg.hydra.verbose)
        setup_globals()
        words = _members(self.parse(arguments), self.options.n_trials, self.options.seed)
        self.launcher.varied = varied_keys(words)
        self.root = Path(str(self.cfg.hydra.sweep.dir)).absolute()
        jobs: list[Job] = self.launcher.plan(self.root, words, 0)
        check_comparable(jobs, "hydra/sweeper=halving")
        every = [total for _, total in lengths(jobs)]
        brackets, ladder = self._arranged(jobs, max(every))
        further = shorter(self.root, jobs)
        self.launcher.trees = {job.folder: job.tree for job in jobs}  # HPARAMS' columns are those of all
        self.launcher.metrics = (rung_tag(str(jobs[0].tree["objective"])),)
        with self.launcher.reporting(len(jobs)) as progress:
            if self.cfg.sweep.dry_run:
                known = {job.number: job for job in further}
                self.launcher.execute(self.root, [known.get(job.number, job) for job in jobs])  # says all, and leaves
            if further:
                self.launcher.execute(self.root, [])  # no Slurm, no space: that is said before a folder is changed
                log.info("%d members with fewer epochs go on", len(further))
                for job in further:
                    lengthen(job)
                jobs = self.launcher.plan(self.root, words, 0)
                brackets = [[jobs[job.number] for job in bracket] for bracket in brackets]
                self.launcher.trees = {job.folder: job.tree for job in jobs}
            self.totals = {job.folder: total for job, total in zip(jobs, every, strict=True)}
            log.info("halving of %d members in %s: %s go on, to the end at %s batches", len(jobs), self.root,
                     ladder.said, f"{max(every):,}")  # fmt: skip
            trained = {job.folder: _trained(job) for job in jobs}
            progress.by_batches(sum(every) if self.options.resume_pruned else ladder.batches(max(every)), trained)
            self._climb(brackets, ladder, progress)
        return self._concluded(jobs)

    def _arranged(self, jobs: list[Job], total: int) -> tuple[list[list[Job]], Ladder]:
        """The members of each bracket, and the rungs of members of `total` batches.

        Raises:
            ConfigError: there would be nothing to decide.
        """
        eta, count = self.options.eta, self.options.brackets
        first = self.options.min_steps
        if total < 2:
            raise ConfigError(
                "hydra/sweeper=halving compares members before their end, and they have one batch. Take more, with "
                "train.epochs or train.max_steps."
            )
        if first is not None and first >= total:
            raise ConfigError(
                f"hydra.sweeper.min_steps={first} must be below the {total:,} batches of a member, for nothing would "
                f"end early. Take fewer, such as {max(1, total // eta**2)}, or a longer run."
            )
        steps = rung_steps(total, eta, len(jobs), first)
        if count > len(steps) + 1 or count > len(jobs):
            most = min(len(steps) + 1, len(jobs))
            raise ConfigError(
                f"hydra.sweeper.brackets={count} must be at most {most}, for there are {len(jobs)} members and "
                f"{len(steps)} rungs (at {', '.join(map(str, steps))} of {total:,} batches)."
            )
        brackets = _brackets(jobs, count, eta)
        return brackets, Ladder(eta, [len(bracket) for bracket in brackets], steps)

    def _climb(self, brackets: list[list[Job]], ladder: Ladder, progress: Progress) -> None:
        """Train the members of each bracket from rung to rung, and those that are left to their end."""
        left, pruned = [list(bracket) for bracket in brackets], []
        for rung, step in enumerate(ladder.steps):
            compared = range(min(rung + 1, len(left)))
            self._train([job for bracket in compared for job in left[bracket]], step)
            metric = config.rung_metric(left[0][0].tree) if left[0] else ""
            others, further = [], 0
            for bracket in compared:
                chosen = _chosen(left[bracket], step, ladder.kept(bracket, rung))
                further += sum(_is_further(job, step) for job in chosen)
                others += [job for job in left[bracket] if job not in chosen]
                left[bracket] = chosen
            pruned += others
            if not self.options.resume_pruned:
                for job in others:
                    if step in rungs.read(job.folder):  # else it has failed on the way there
                        prune(job, step)
                    if layout.holds_run(job.folder):
                        progress.pruned(job.folder)
            on = [job for bracket in compared for job in left[bracket]]
            count = len(on) + len(others)
            later = f"; {further} of them are further, and compared later" if further else ""
            progress.say(f"after {step:,} batches {len(on)} of {count} members go on{_values(on, step, metric)}{later}")
        self._train([job for bracket in left for job in bracket], None)
        if self.options.resume_pruned:
            self._train(sorted(pruned, key=lambda job: job.number), None)

    def _train(self, jobs: Sequence[Job], step: int | None) -> None:
        """Let members train to a step, or to their end; those whose process was killed once more.

        Raises:
            FmexpError: a member was stopped, so that nothing can be decided yet.
        """
        for again in (False, True):
            todo = {job.folder for job in jobs if _is_open(job, step, again=again)}
            if again and not todo:
                break
            self.launcher.execute(
                self.root,
                [
                    replace(job, pause_at=step, action="train" if job.folder in todo else "skip")
                    for job in sorted(jobs, key=lambda job: job.number)
                ],
            )
            if self.cfg.sweep.fail_fast and any(results.status(job.folder) == "failed" for job in jobs):
                raise FmexpError("sweep.fail_fast=true: a member failed; the same command goes on.")
        if stopped := [job.folder.name for job in jobs if _is_open(job, step, again=True) and not _failed(job)]:
            raise FmexpError(f"{', '.join(stopped[:5])} was stopped; the same command goes on.")

    def _concluded(self, jobs: list[Job]) -> float:
        """Say what the sweep cost beside the whole grid, and what came of it."""
        found = {job.folder: results.read(job.folder) for job in jobs}
        # Some of these have ended early, by train.patience.
        ended = {job.folder for job in jobs if action(job.folder, job.tree) == "skip"}
        trained = sum(result.steps for result in found.values())
        whole = sum(found[path].steps if path in ended else total for path, total in self.totals.items())
        print(f"trained {trained:,} of the {whole:,} batches of all {len(jobs)} members ({trained / whole:.1%})")
        if failed := sum(result.status == "failed" for result in found.values()):
            raise FmexpError(f"{failed} of {len(jobs)} members have no result; the same command goes on with them.")
        better = max if config.maximised(str(jobs[0].tree["objective"])) else min
        return better((r.objective for r in found.values() if not math.isnan(r.objective)), default=math.nan)


def _is_open(job: Job, step: int | None, *, again: bool) -> bool:
    """Whether a member has to be trained to come to a step, or to its end.

    Args:
        again: no more where it has failed by itself; it would do so once more.
    """
    if step is not None and rungs.value_at(job.folder, step) is not None:
        return False
    if action(job.folder, job.tree) == "skip":
        return False
    return not (again and _failed(job) and not (layout.read_result(job.folder) or {}).get("killed"))


def _trained(job: Job) -> int:
    """How many batches a member is known to have trained on: to its last pause, or its end."""
    steps = (layout.read_result(job.folder) or {}).get("steps", 0)
    return max([steps if isinstance(steps, int) else 0, *rungs.read(job.folder)])


def _failed(job: Job) -> bool:
    return results.status(job.folder) == "failed"


def _is_further(job: Job, step: int) -> bool:
    """Whether a member has paused behind a step and not at it, where another command had other rungs or none."""
    found = rungs.read(job.folder)
    return step not in found and max(found, default=0) > step


def _chosen(jobs: Sequence[Job], step: int, count: int) -> list[Job]:
    """The members that go on from a step: so many of the best there, of equal ones the first; never one without a
    finite objective there.

    Those that are further go on until they can be compared at one step, and leave to the others their share of the
    places, at least one. A member that some other command has trained to its end, without a pause, is in nobody's way.
    """
    further = [job for job in jobs if _is_further(job, step)]
    places = max(1, count * (len(jobs) - len(further)) // max(1, len(jobs)))
    found = [(value, job) for job in jobs if (value := rungs.read(job.folder).get(step)) is not None]
    sign = -1 if jobs and config.maximised(config.rung_metric(jobs[0].tree)) else 1
    order = sorted((sign * value, job.number, job) for value, job in found if math.isfinite(value))
    return [*further, *(job for _, _, job in order[:places])]


def _values(jobs: Sequence[Job], step: int, metric: str) -> str:
    """The objective that was enough to go on from a step, in words."""
    values = [found[step] for job in jobs if step in (found := rungs.read(job.folder))]
    if not values:
        return ""
    return f", with {metric} from {min(values):.4f} to {max(values):.4f}"


def rung_steps(total: int, eta: int, members: int, first: int | None) -> list[int]:
    """The batches after which members are compared: from the first one upwards, each `eta` times the one before.

    Without a first one they are counted from the end, total/eta, total/eta^2 and so on, until fewer than `eta` members
    are left: so more members have the same rungs and earlier ones. Two at one step are one.
    """
    if first is None:
        count = max(1, int(math.log(members, eta) + 1e-9))
        return sorted({-(-total // eta**k) for k in range(1, count + 1)})
    steps = [first]
    while steps[-1] * eta < total:
        steps.append(steps[-1] * eta)
    return steps


def _brackets(jobs: Sequence[Job], count: int, eta: int) -> list[list[Job]]:
    """The members of each bracket, in Hyperband's proportions. Which one a member is in depends on its number alone."""
    sizes = [math.ceil(count * eta**s / (s + 1)) for s in reversed(range(count))]
    found: list[list[Job]] = [[] for _ in sizes]
    for number, job in enumerate(jobs, 1):
        lacks = [size * number / sum(sizes) - len(bracket) for size, bracket in zip(sizes, found, strict=True)]
        found[lacks.index(max(lacks))].append(job)
    return found


def _members(overrides: Sequence[Override], count: int | None, seed: int) -> list[list[str]]:
    """The overrides of each member: every combination, or so many draws.

    Raises:
        ConfigError: there is nothing to compare, or to draw from.
    """
    words = {override.get_key_element(): override for override in overrides}
    swept = {key: word for key, word in words.items() if word.is_sweep_override()}
    intervals = [word for word in swept.values() if isinstance(word.value(), IntervalSweep)]
    if count is None:
        if intervals:
            raise ConfigError(
                f"{intervals[0].input_line}: an interval is drawn from: say how often, such as "
                "hydra.sweeper.n_trials=27; or name values: a,b."
            )
        found = expand(overrides)
    elif not intervals:
        raise ConfigError(
            f"hydra.sweeper.n_trials={count} draws from intervals, and there is none, such as "
            '"optimizer.lr=tag(log, interval(1e-4, 1e-1))". For every combination of values leave it null.'
        )
    else:
        fixed = [f"{key}={word.get_value_element_as_str()}" for key, word in words.items() if key not in swept]
        drawn = [[f"{key}={_draw(word, key, n, seed)}" for key, word in swept.items()] for n in range(count)]
        found = [[*fixed, *member] for member in dict.fromkeys(map(tuple, drawn))]
    if len(found) < 2:
        raise ConfigError(
            "hydra/sweeper=halving compares members, and there is one: give it values, such as optimizer.lr=0.1,0.01."
        )
    return found


def _draw(word: Override, key: str, number: int, seed: int) -> str:
    """What a member gets of a key: by chance, from the sweep's seed, the member's number and the key alone.

    Raises:
        ConfigError: it is no interval.
    """
    share = random.Random(f"{seed}/{number}/{key}").random()
    value: Any = word.value()
    if not isinstance(value, IntervalSweep):
        found = choices(word)
        return found[int(share * len(found))]
    low, high = value.start, value.end
    whole, log_scale = isinstance(low, int) and isinstance(high, int), "log" in value.tags
    if low is None or high is None or not low < high or not math.isfinite(high - low) or (log_scale and low <= 0):
        ends = "from above 0 " * log_scale + "to a larger number"
        raise ConfigError(f"{word.input_line} cannot be drawn from: an interval is {ends}.")
    if whole:  # each number has the interval from it to the next one
        high += 1
    drawn = math.exp(math.log(low) + share * math.log(high / low)) if log_scale else low + share * (high - low)
    return str(min(int(drawn), high - 1)) if whole else f"{drawn:.6g}"
