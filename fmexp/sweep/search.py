"""A search: Optuna chooses a sweep's members, each by what came of those before it.

The choices are in optuna.db in the sweep's folder, their results in the members' folders. So the same
command goes on with a search that was stopped, up to n_trials in all, and finished trials are not executed again.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus, configure_log, setup_globals
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from fmexp import config
from fmexp.config.hydra_versions import instantiate
from fmexp.errors import ConfigError, FmexpError
from fmexp.sweep.members import maximised, read

log = logging.getLogger(__name__)

STORAGE = "optuna.db"


class Search(Sweeper):
    """Executes `n_trials` members that Optuna chooses.

    A member that failed stays open: the same command executes it again. One that diverged is Optuna's to avoid.

    Args:
        n_jobs: how many are chosen, and executed, together; None: as many as the launcher runs at once.
        seed: of the choices. Trial n follows from the seed and from the trials before it, stopped or not.
        sampler: any of Optuna's that takes a seed, with its other arguments.
        params: what to search, such as {"optimizer.lr": "tag(log, interval(1e-4, 1e-1))"}; the command line has
            precedence. Choices (a,b), range and interval of Hydra's grammar can be searched.
    """

    def __init__(
        self, n_trials: int, n_jobs: int | None, seed: int, sampler: DictConfig, params: DictConfig | None
    ) -> None:
        self.n_trials, self.n_jobs, self.seed, self.sampler = n_trials, n_jobs, seed, sampler
        self.params = [f"{key!s}={value}" for key, value in (params or {}).items()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.cfg = hydra_context.config_loader, config
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> float:
        """Execute what is left of the search, and return the best objective."""
        try:
            import optuna
        except ImportError:
            raise ConfigError("hydra/sweeper=optuna needs optuna: pip install optuna") from None
        configure_log(self.cfg.hydra.hydra_logging, self.cfg.hydra.verbose)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides([*self.params, *arguments])
        words = {override.get_key_element(): override for override in parsed}
        space = {key: _distribution(word) for key, word in words.items() if word.is_sweep_override()}
        fixed = [f"{key}={word.get_value_element_as_str()}" for key, word in words.items() if key not in space]
        if not space:
            raise ConfigError('hydra/sweeper=optuna has nothing to search, such as "optimizer.lr=interval(0.001,0.1)".')
        root = Path(str(self.cfg.hydra.sweep.dir)).absolute()
        setup_globals()
        self.launcher.plan(root, [[*fixed, *_first(space)]], 0)  # refuses mistakes before a file is made
        if self.cfg.sweep.dry_run and not (root / STORAGE).exists():
            _say_and_leave(0, 0, self.n_trials)
        root.mkdir(parents=True, exist_ok=True)
        self.study: Any = optuna.create_study(
            study_name="fmexp",
            storage=f"sqlite:///{root / STORAGE}",
            direction="maximize" if maximised(self.cfg.objective) else "minimize",
            load_if_exists=True,
        )
        # Without all of its parameters a trial was being chosen when the process was killed.
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.params.keys() == space.keys()]
        unfinished = [trial for trial in begun if trial.state == optuna.trial.TrialState.RUNNING]
        if self.cfg.sweep.dry_run:
            _say_and_leave(len(begun) - len(unfinished), len(unfinished), self.n_trials)
        _check_same_search(self.study, fixed)
        log.info("search in %s: %d of %d trials done", root / STORAGE, len(begun) - len(unfinished), self.n_trials)
        self.launcher.varied = list(space)
        ended = [member.folder for member in read(root) if member.status in ("complete", "diverged")]
        with self.launcher.reporting(self.n_trials) as progress:
            progress.plan(ended, ())
            failures = self._run(self._batches(unfinished, len(begun), space), fixed, space)
        if failures:
            raise FmexpError(f"{failures} trials failed; the same command executes them again.")
        best: Any = self.study.best_trial
        with_ = ", ".join(f"{key}={_shown(value)}" for key, value in best.params.items())
        log.info("best of %d trials: %.4f with %s", self.n_trials, best.value, with_)
        return float(best.value)

    def _run(self, batches: Iterator[list[Any]], fixed: Sequence[str], space: dict[str, Any]) -> int:
        """Execute batches of trials and tell Optuna what came of them; returns how many failed."""
        from optuna.trial import TrialState

        failures = 0
        for batch in batches:
            overrides = [[*fixed, *(f"{key}={_shown(trial.params[key])}" for key in space)] for trial in batch]
            for trial, member in zip(batch, self.launcher.launch(overrides, batch[0].number), strict=True):
                if member.status != JobStatus.COMPLETED:
                    failures += 1
                elif math.isnan(member.return_value):
                    self.study.tell(trial.number, state=TrialState.PRUNED)
                else:
                    self.study.tell(trial.number, member.return_value)
            if failures and self.cfg.sweep.fail_fast:
                break
        return failures

    def _batches(self, unfinished: list[Any], count: int, space: dict[str, Any]) -> Iterator[list[Any]]:
        """Trials to execute together: first those that were begun, then new ones until there are n_trials in all."""
        at_once = self.n_jobs or self.launcher.at_once
        for start in range(0, len(unfinished), at_once):
            yield unfinished[start : start + at_once]
        while count < self.n_trials:
            batch = []
            for number in range(count, min(count + at_once, self.n_trials)):
                self.study.sampler = instantiate(self.sampler, seed=self.seed + number)
                batch.append(self.study.ask(fixed_distributions=space))
            count += len(batch)
            yield batch


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
        return CategoricalDistribution(list(word.sweep_string_iterator()))
    low, high = value.start, value.end
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log="log" in value.tags)
    assert low is not None
    assert high is not None
    return FloatDistribution(low, high, log="log" in value.tags)


def _first(space: dict[str, Any]) -> list[str]:
    """Overrides with a value of each key that is searched."""
    return [f"{key}={_shown(d.choices[0] if hasattr(d, 'choices') else d.low)}" for key, d in space.items()]


def _shown(value: Any) -> str:
    """A value as the member gets it: six digits of a number are enough to search with, and can be read."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _check_same_search(study: Any, fixed: Sequence[str]) -> None:
    """Raise ConfigError where the search was begun with other fixed settings, and could not be compared."""
    ours = sorted(word for word in fixed if word.partition("=")[0].lstrip("+~") not in config.NOT_IN_DIGEST)
    before = json.loads(study.user_attrs.get("fixed", "null"))
    if before is not None and before != ours:
        raise ConfigError(
            f"The search in this folder was begun with {before}, and not with {ours}. "
            "Name another folder with hydra.sweep.dir=<folder>, or use the old values to go on with it."
        )
    study.set_user_attr("fixed", json.dumps(ours))
