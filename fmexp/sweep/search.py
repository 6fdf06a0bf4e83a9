"""A search: Optuna chooses a sweep's members, each by what came of those before it.

The choices are in optuna.db in the sweep's folder, their results in the members' folders. So the same
command goes on with a search that was stopped, up to n_trials in all, and finished trials are not executed again.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals

from fmexp import config
from fmexp.config import maximised
from fmexp.config.hydra_versions import instantiate
from fmexp.errors import CodeError, ConfigError, FmexpError
from fmexp.rundir import layout, results, rungs
from fmexp.sweep.grid import Parsing, choices
from fmexp.sweep.job import Job
from fmexp.sweep.launcher import outcome
from fmexp.sweep.members import read, rung_tag
from fmexp.sweep.pausing import check_comparable, lengths, prune

log = logging.getLogger(__name__)

STORAGE = "optuna.db"


class Search(Parsing):
    """Executes `n_trials` members that Optuna chooses, from choices (a,b), range and interval of Hydra's grammar.

    A member that failed stays open: the same command executes it again. One that diverged is Optuna's to avoid. With a
    pruner each pauses at the end of each epoch, where Optuna compares it with those before it, and may end it.
    """

    def sweep(self, arguments: list[str]) -> float:
        """Execute what is left of the search, and return the best objective, NaN where all trials diverged.

        Raises:
            LockedError: another search is running in the folder.
        """
        try:
            import optuna
        except ImportError:
            raise ConfigError("hydra/sweeper=optuna needs optuna: pip install optuna") from None
        configure_log(self.cfg.hydra.hydra_logging, self.cfg.hydra.verbose)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        words = {override.get_key_element(): override for override in self.parse(arguments)}
        space = {key: _distribution(word) for key, word in words.items() if word.is_sweep_override()}
        fixed = [f"{key}={word.get_value_element_as_str()}" for key, word in words.items() if key not in space]
        if not space:
            raise ConfigError('hydra/sweeper=optuna has nothing to search, such as "optimizer.lr=interval(0.001,0.1)".')
        root = Path(str(self.cfg.hydra.sweep.dir)).absolute()
        setup_globals()
        # Mistakes are refused before a file is made.
        jobs = self.launcher.plan(root, [[*fixed, *words] for words in _samples(space)], 0)
        pruner = self._pruner(jobs)
        self.left_out = config.left_out(jobs[0].tree)
        self._check_owner(root)
        self._ask(optuna.create_study(), 0, space)
        if self.cfg.sweep.dry_run and not (root / STORAGE).exists():
            _say_and_leave(0, 0, self.options.n_trials)
        with nullcontext() if self.cfg.sweep.dry_run else layout.lock(root), _storage_in_words(root / STORAGE):
            self.study: Any = optuna.create_study(
                study_name="fmexp",
                storage=f"sqlite:///{root / STORAGE}",
                direction="maximize" if maximised(self.cfg.objective) else "minimize",
                pruner=pruner,
                load_if_exists=True,
            )
            return self._search(root, fixed, space)

    def _search(self, root: Path, fixed: list[str], space: dict[str, Any]) -> float:
        """What `sweep` does, once the study is open."""
        from optuna.trial import TrialState

        total = self.options.n_trials
        # Without all of its parameters a trial was being chosen when the process was killed.
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.params.keys() == space.keys()]
        unfinished = [trial for trial in begun if trial.state == TrialState.RUNNING]
        if self.cfg.sweep.dry_run:
            _say_and_leave(len(begun) - len(unfinished), len(unfinished), total)
        _check_same_search(self.study, [word for word in fixed if _key(word) not in self.left_out])
        log.info("search in %s: %d of %d trials done", root / STORAGE, len(begun) - len(unfinished), total)
        self.launcher.varied = list(space)
        ended = [member.folder for member in read(root) if member.status in ("complete", "diverged", "pruned")]
        with self.launcher.reporting(total) as progress:
            progress.plan(ended, ())
            failures = self._run(self._batches(unfinished, len(begun), space), fixed, space, root)
        if failures:
            raise FmexpError(f"{failures} trials failed; the same command executes them again.")
        if not self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            log.warning("all of %d trials diverged, so none is the best", total)
            return math.nan
        best: Any = self.study.best_trial
        with_ = ", ".join(f"{key}={_shown(value)}" for key, value in best.params.items())
        log.info("best of %d trials: %.4f with %s", total, best.value, with_)
        return float(best.value)

    def _check_owner(self, root: Path) -> None:
        """Raise ConfigError where a sampler would unpickle, and so execute, what somebody else has written."""
        file, sampler = root / STORAGE, str(self.options.sampler._target_)
        if (sampler.startswith("optuna.samplers.") and "CmaEs" not in sampler) or not file.exists():
            return
        if foreign := [path for path in (file, root) if path.stat().st_uid != os.geteuid()]:
            raise ConfigError(
                f"{foreign[0]} belongs to another user, and {sampler} may execute what it holds, for its state is "
                "pickled. Search in a folder of your own with hydra.sweep.dir=<folder>."
            )

    def _pruner(self, jobs: Sequence[Job]) -> Any:
        """What ends trials.

        Raises:
            ConfigError: it is none, or its decisions would be chance, or members cannot be compared before their end.
            CodeError: it cannot be made.
        """
        from optuna.pruners import BasePruner, NopPruner

        name = f"hydra.sweeper.pruner._target_={self.options.pruner._target_}"
        with _own_code(f"{name} cannot be made"):
            made = instantiate(self.options.pruner)
        if not isinstance(made, BasePruner):
            raise ConfigError(f"{name} is no pruner of Optuna's, such as optuna.pruners.MedianPruner.")
        if isinstance(made, NopPruner):
            return made
        # These note what they have decided before the trial has ended, and decide otherwise after a kill in between.
        if any(kind in str(self.options.pruner) for kind in ("SuccessiveHalvingPruner", "HyperbandPruner")):
            raise ConfigError(
                f"{name}: successive halving, which decides alike after any stop, is hydra/sweeper=halving."
            )
        if self._at_once > 1:
            raise ConfigError(
                f"{name} compares a trial with those before it, and {self._at_once} would be trained at once: what "
                "each is compared with would be chance. Add hydra.sweeper.n_jobs=1, or take hydra/sweeper=halving."
            )
        check_comparable(jobs, "hydra.sweeper.pruner")
        self.launcher.metrics = (rung_tag(str(jobs[0].tree["objective"])),)
        return made

    def _run(self, batches: Iterator[list[Any]], fixed: Sequence[str], space: dict[str, Any], root: Path) -> int:
        """Execute batches of trials and tell Optuna what came of them; returns how many failed."""
        from optuna.pruners import NopPruner
        from optuna.trial import TrialState

        failures = 0
        for batch in batches:
            overrides = [[*fixed, *(f"{key}={_shown(trial.params[key])}" for key in space)] for trial in batch]
            if isinstance(self.study.pruner, NopPruner):
                members = self.launcher.launch(overrides, batch[0].number)
            else:  # a trial's id has no public name, and one that was begun can report by that alone
                ((trial, words),) = zip(batch, overrides, strict=True)
                members = [self._by_epochs(root, trial.number, trial._trial_id, words)]
            for trial, member in zip(batch, members, strict=True):
                if member.status != JobStatus.COMPLETED:
                    failures += 1
                elif math.isnan(member.return_value):
                    self.study.tell(trial.number, state=TrialState.PRUNED)
                else:
                    self.study.tell(trial.number, member.return_value)
            if failures and self.cfg.sweep.fail_fast:
                break
        return failures

    def _by_epochs(self, root: Path, number: int, trial_id: int, overrides: list[str]) -> JobReturn:
        """Execute a trial from epoch to epoch, as far as the pruner lets it go on; NaN where it does not."""
        from optuna.trial import Trial

        (job,) = self.launcher.plan(root, [overrides], number)
        ends = range(0)
        with suppress(FmexpError):  # it cannot be built, which its own log then says
            ((each, total),) = lengths([job])
            ends = range(each, total, each)
        trial = Trial(self.study, trial_id)
        reported = trial.storage.get_trial(trial_id).intermediate_values
        for epoch, step in enumerate(ends, 1):
            if step not in rungs.read(job.folder):
                self.launcher.execute(root, [replace(job, pause_at=step)])
            if (value := rungs.read(job.folder).get(step)) is None:
                if (status := results.status(job.folder)) == "paused":  # a checkpoint of another command was further
                    continue
                if status == "diverged" and epoch not in reported:
                    trial.report(math.nan, epoch)  # or Optuna would rank it by its last good value
                break
            if epoch not in reported:
                trial.report(value, epoch)
            with _own_code("hydra.sweeper.pruner cannot decide"):
                pruned = epoch >= max(reported, default=0) and trial.should_prune()
            if pruned:
                prune(job, step)
                self.launcher.progress.pruned(job.folder)
                self.launcher.progress.say(f"{job.folder.name}: pruned after epoch {epoch}")
                break
        else:
            self.launcher.execute(root, [job])
        return outcome(job)

    def _batches(self, unfinished: list[Any], count: int, space: dict[str, Any]) -> Iterator[list[Any]]:
        """Trials to execute together: first those that were begun, then new ones until there are n_trials in all."""
        for start in range(0, len(unfinished), self._at_once):
            yield unfinished[start : start + self._at_once]
        for start in range(count, self.options.n_trials, self._at_once):
            end = min(start + self._at_once, self.options.n_trials)
            yield [self._ask(self.study, number, space) for number in range(start, end)]

    @property
    def _at_once(self) -> int:
        """How many trials are chosen together."""
        return int(self.options.n_jobs or self.launcher.at_once)

    def _ask(self, study: Any, number: int, space: dict[str, Any]) -> Any:
        """Let the sampler choose a trial of a study.

        Raises:
            CodeError: whatever goes wrong in the code that the configuration names.
        """
        with _own_code(f"hydra.sweeper.sampler._target_={self.options.sampler._target_} cannot choose trial {number}"):
            study.sampler = instantiate(self.options.sampler, seed=(self.options.seed + number) % 2**32)
            return study.ask(fixed_distributions=space)


@contextmanager
def _own_code(problem: str) -> Iterator[None]:
    """Raise CodeError for whatever goes wrong within the block in code that the configuration names."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError):
        raise
    except Exception as error:
        raise CodeError(f"{problem}: {str(error).strip() or type(error).__name__}") from error


@contextmanager
def _storage_in_words(file: Path) -> Iterator[None]:
    """Raise FmexpError for what SQLite finds wrong within the block."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        reason = error.__cause__ or error
        raise FmexpError(
            f"{file} cannot be used: {getattr(reason, 'orig', reason)}. Make space if the disk is full, and go "
            "on with the same command; else name another folder with hydra.sweep.dir=<folder>."
        ) from error


def _say_and_leave(done: int, unfinished: int, total: int) -> None:
    """What a dry run is for."""
    left = max(0, total - done - unfinished)
    print(f"{total} trials: {done} done, {unfinished} to resume, {left} to choose and train. Nothing was written.")
    raise SystemExit(0)


def _distribution(word: Override) -> Any:
    """What Optuna knows a sweep of Hydra's grammar as."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = word.value()
    if not isinstance(value, IntervalSweep):  # choices, and the numbers of a range
        return CategoricalDistribution(choices(word))
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    kind: Any = IntDistribution if whole else FloatDistribution
    try:
        return kind(value.start, value.end, log="log" in value.tags)
    except ValueError as error:
        raise ConfigError(f"{word.input_line} cannot be searched: {error}") from error


def _samples(space: dict[str, Any]) -> list[list[str]]:
    """Overrides that between them have each choice of each key, and of an interval its ends and a point within."""
    values = [
        getattr(d, "choices", None) or (d.low, type(d.low)(d.low + 0.382 * (d.high - d.low)), d.high)
        for d in space.values()
    ]
    return [
        [f"{key}={_shown(found[min(number, len(found) - 1)])}" for key, found in zip(space, values, strict=True)]
        for number in range(max(map(len, values)))
    ]


def _shown(value: Any) -> str:
    """A value as the member gets it: six digits of a number are enough to search with, and can be read."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _check_same_search(study: Any, fixed: Sequence[str]) -> None:
    """Raise ConfigError where the search was begun with other fixed settings, and could not be compared."""
    ours = sorted(fixed)
    before = json.loads(study.user_attrs.get("fixed", "null"))
    if before is not None and before != ours:
        raise ConfigError(
            f"The search in this folder was begun with {before}, and not with {ours}. "
            "Name another folder with hydra.sweep.dir=<folder>, or use the old values to go on with it."
        )
    study.set_user_attr("fixed", json.dumps(ours))
