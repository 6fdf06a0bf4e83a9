"""How the members of a sweep are executed: one after another, side by side on this machine, or by Slurm.

Hydra's sweepers (the grid, Optuna) hand the members over as lists of overrides. Each is composed once, found in the
sweep's folder by its configuration, and then skipped, resumed or trained; what came of it is read from its folder.
"""

import importlib
import logging
import math
import os
import sys
import types
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from fmexp import config, disk, folder, parallel, results, slurm, sweep
from fmexp.errors import ConfigError, FmexpError
from fmexp.members import Composer, Member, ended_by_signals, execute
from fmexp.progress import Progress
from fmexp.search import Search

log = logging.getLogger(__name__)

LAUNCHED: dict[Path, Progress] = {}  # the folders of the sweeps of this process, whose tables are still to be shown


class Grid(Sweeper):
    """Every combination of the values, as Hydra's own sweeper has it, but for two things: members are composed once
    only, by the launcher, before the first of them begins; and a dry run writes nothing.

    Args:
        max_batch_size: how many members are handed over to the launcher together; None: all.
        params: sweeps of a recipe, such as {"optimizer.lr": "0.1,0.01"}; the command line has precedence.
    """

    def __init__(self, max_batch_size: int | None = None, params: DictConfig | None = None) -> None:
        self.max_batch_size = max_batch_size
        self.params = [f"{key!s}={value}" for key, value in (params or {}).items()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.objective = hydra_context.config_loader, config.objective
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides([*self.params, *arguments])
        batches = list(BasicSweeper.split_arguments(parsed, self.max_batch_size))
        returned: list[Sequence[JobReturn]] = []
        with Progress(sum(map(len, batches)), self.objective) as self.launcher.progress:
            for batch in batches:
                returned.append(self.launcher.launch(batch, sum(map(len, returned))))
        members = [member for batch in returned for member in batch]
        if without := sum(member.status != JobStatus.COMPLETED for member in members):
            raise FmexpError(f"{without} of {len(members)} members have no result; the same command goes on with them.")
        return returned


class Launcher(HydraLauncher):
    """Executes members in this process, in others, or through Slurm.

    Args:
        n_jobs: in how many processes, each with one member at a time; -1: as many as there are cores; 1: in this one.
        slurm: arguments of submitit's AutoExecutor (timeout_min, slurm_partition and so on), or None.
    """

    def __init__(self, n_jobs: int = 1, slurm: DictConfig | None = None) -> None:
        self.n_jobs, self.slurm = n_jobs, slurm
        self.varied: list[str] | None = None  # the keys that name a member's folder; None: those that vary
        self.progress: Progress | None = None  # of the sweeper, which may launch several times; None: of one launch
        self.trees: dict[Path, dict[str, Any]] = {}  # the configurations of all members so far

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    @property
    def at_once(self) -> int:
        """How many members are executed at the same time."""
        if self.slurm is not None:
            return int(self.slurm.get("slurm_array_parallelism", 1))
        return self.n_jobs if self.n_jobs > 0 else len(os.sched_getaffinity(0))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        root = Path(str(self.config.hydra.sweep.dir)).absolute()
        members = self.plan(root, job_overrides, initial_job_idx)
        if self.config.sweep.dry_run:
            print(_plan_table(members))
            raise SystemExit(0)
        todo = [member for member in members if member.action != "skip"]
        jobs = min(self.at_once, len(todo))
        if self.slurm is not None:
            _need("submitit", "slurm")
        elif jobs > 1:
            _need("joblib", "joblib")
        root.mkdir(parents=True, exist_ok=True)
        disk.write(root / "multirun.yaml", OmegaConf.to_yaml(self.config))
        self.trees |= {member.folder: member.tree for member in members}
        sweep.begin(root, self.trees)
        if self.varied is None:  # a search says itself what it does
            log.info("sweep of %d members (%s) in %s", len(members), _counts(members), root)
        own = Progress(len(members), self.config.objective)
        with nullcontext(self.progress) if self.progress else own as progress:
            LAUNCHED[root] = progress
            progress.plan([member.folder for member in members], [member.folder for member in todo])
            self._run(root, todo, jobs, progress)
        return [_outcome(member) for member in members]

    def _run(self, root: Path, members: list[Member], jobs: int, progress: Progress) -> None:
        fail_fast = bool(self.config.sweep.fail_fast)
        if self.slurm is not None:
            slurm.run(root, members, self.slurm, progress, self.hydra_context, fail_fast=fail_fast)
        elif jobs > 1:
            parallel.run(members, jobs, progress, self.hydra_context, fail_fast=fail_fast)
        else:
            self._one_after_another(members, progress, fail_fast=fail_fast)

    def plan(self, root: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Member]:
        """Compose and check members, and find what is to be done for each; nothing is written."""
        found = sweep.by_digest(root)
        varied = self.varied or sweep.varied_keys(job_overrides)
        composer = Composer(self.hydra_context.config_loader, self.config)
        members: list[Member] = []
        taken: set[Path] = set()
        for number, overrides in enumerate(job_overrides, first):
            cfg = composer.compose(list(overrides))
            job = OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])
            config.check(job)
            tree = config.resolved(job)
            mine = [path for path in found.get(config.digest(tree), []) if path not in taken]
            path = mine[0] if mine else sweep.free_folder(root, number, overrides, varied, taken)
            taken.add(path)
            finished = mine and results.status(path) in ("complete", "diverged")
            action = "skip" if finished else "resume" if mine else "train"
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = number
                cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = str(root), path.name
            members.append(Member(number, list(overrides), cfg, tree, path, action))
        return members

    def _one_after_another(self, members: list[Member], progress: Progress, *, fail_fast: bool) -> None:
        with ended_by_signals():
            for member in members:
                progress.started(member.folder)
                try:
                    execute(member.cfg, self.hydra_context)
                finally:
                    configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
                    progress.ended(member.folder)
                if fail_fast and results.status(member.folder) == "failed":
                    break


def _need(package: str, launcher: str) -> None:
    """Raise ConfigError where a launcher's package is not installed."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"hydra/launcher={launcher} needs {package}: pip install {package}") from None


def _counts(members: list[Member]) -> str:
    return ", ".join(f"{sum(m.action == word for m in members)} to {word}" for word in ("train", "resume", "skip"))


def _plan_table(members: list[Member]) -> str:
    varied = sweep.varied_keys([member.overrides for member in members])
    rows = [["member", *varied, "action", "folder"]]
    for member in members:
        values = sweep.split(member.overrides)
        rows.append([str(member.number), *(values.get(key, "") for key in varied), member.action, member.folder.name])
    return f"{sweep.aligned(rows)}\n\n{len(members)} members: {_counts(members)}. Nothing was written."


def _outcome(member: Member) -> JobReturn:
    """What came of a member, for the sweeper, from its folder."""
    result = folder.read_result(member.folder) or {}
    done = JobReturn(overrides=member.overrides, working_dir=str(member.folder), status=JobStatus.COMPLETED)
    if result.get("status") in ("complete", "diverged"):
        done.return_value = math.nan if result["objective"] is None else result["objective"]
    else:
        done.status = JobStatus.FAILED
        done.return_value = FmexpError(f"{member.folder.name}: {result.get('error', 'not executed')}")
    return done


# Hydra 1.3 takes plugins from the package hydra_plugins alone, so this module goes by a name in it; 1.4 drops the rule.
# What hydra/launcher and hydra/sweeper can be is stored here and not in conf/, for Hydra would check YAML files against
# the plugins' own entries of the same names; storing after Plugins.instance() replaces these.
_OPTIONS: dict[str, dict[str, tuple[type, dict[str, Any]]]] = {
    "launcher": {
        "basic": (Launcher, {"n_jobs": 1}),
        "joblib": (Launcher, {"n_jobs": -1}),
        "slurm": (
            Launcher,
            {
                "slurm": {
                    "timeout_min": 60,  # of one job; a member that needs longer takes several
                    "cpus_per_task": 1,
                    "slurm_partition": None,
                    "slurm_array_parallelism": 256,
                    "slurm_signal_delay_s": 90,  # how long before the end of its time a job is told to save itself
                    "slurm_max_num_timeout": 100,  # how often a member may run out of time
                }
            },
        ),
    },
    "sweeper": {
        "basic": (Grid, {"max_batch_size": None, "params": {}}),
        "optuna": (
            Search,
            {
                "_recursive_": False,  # the sampler is made anew for each trial
                "n_trials": 20,
                "n_jobs": None,
                "seed": 0,
                "sampler": {"_target_": "optuna.samplers.TPESampler"},
                "params": {},
            },
        ),
    },
}
for _group, _options in _OPTIONS.items():
    for _name, (_plugin, _arguments) in _options.items():
        _plugin.__module__ = "hydra_plugins.fmexp"
        Plugins.instance().register(_plugin)
        _node = {"_target_": f"hydra_plugins.fmexp.{_plugin.__name__}", **_arguments}
        ConfigStore.instance().store(group=f"hydra/{_group}", name=_name, node=_node)
sys.modules.setdefault("hydra_plugins", types.ModuleType("hydra_plugins"))
sys.modules["hydra_plugins.fmexp"] = sys.modules[__name__]
