"""How the members of a sweep are executed: one after another, side by side on this machine, or by Slurm.

Hydra's sweepers (the grid, Optuna) hand the members over as lists of overrides. Each is composed once, found in the
sweep's folder by its configuration, and then skipped, resumed or trained; what came of it is read from its folder.
"""

import importlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from fmexp import config
from fmexp.config.overrides import resume_command, split, varied_keys
from fmexp.errors import ConfigError, FmexpError
from fmexp.process import available_cores
from fmexp.rundir import atomic, layout, results
from fmexp.sweep import processes, slurm
from fmexp.sweep.job import Composer, Job, ended_by_signals, run
from fmexp.sweep.members import by_digest, free_folder, is_complete
from fmexp.sweep.progress import Progress
from fmexp.sweep.report import aligned, begin, conclude

log = logging.getLogger(__name__)


class Launcher(HydraLauncher):
    """Executes members in this process, in others, or through Slurm.

    Args:
        n_jobs: in how many processes, each with one member at a time; -1: as many as there are cores; 1: in this one.
        slurm: arguments of submitit's AutoExecutor (timeout_min, slurm_partition and so on), or None.
    """

    def __init__(self, n_jobs: int = 1, slurm: DictConfig | None = None) -> None:
        self.n_jobs, self.slurm = n_jobs, slurm
        self.varied: list[str] | None = None  # the keys that name a member's folder; None: those that vary
        self.progress: Progress | None = None  # within `reporting`
        self.root: Path | None = None  # the sweep's folder, once it is made
        self.trees: dict[Path, dict[str, Any]] = {}  # the configurations of all members so far

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    @property
    def at_once(self) -> int:
        """How many members are executed at the same time."""
        if self.slurm is not None:
            return int(self.slurm.get("slurm_array_parallelism", 1))
        return self.n_jobs if self.n_jobs > 0 else available_cores()

    @contextmanager
    def reporting(self, total: int) -> Iterator[Progress]:
        """Show how the launches within the block get on, and at its end the sweep's table, if it was begun.

        Args:
            total: how many members there are in all.
        """
        try:
            with Progress(total, self.config.objective) as self.progress:
                yield self.progress
        finally:
            if self.root is not None and self.progress is not None:
                print(conclude(self.root, self.progress.not_begun))
                if self.progress.not_begun or not is_complete(self.root):
                    print(f"go on with\n  {resume_command('hydra.sweep.dir', self.root)}")
                else:
                    print(f"compare them with\n  tensorboard --logdir {self.root}")
            self.progress = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if self.progress is None:  # of a sweeper that is not fmexp's
            with self.reporting(len(job_overrides)):
                return self.launch(job_overrides, initial_job_idx)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        root = Path(str(self.config.hydra.sweep.dir)).absolute()
        jobs = self.plan(root, job_overrides, initial_job_idx)
        if self.config.sweep.dry_run:
            print(_plan_table(jobs))
            raise SystemExit(0)
        todo = [job for job in jobs if job.action != "skip"]
        workers = min(self.at_once, len(todo))
        if self.slurm is not None:
            _need("submitit", "slurm")
        elif workers > 1:
            _need("joblib", "joblib")
        root.mkdir(parents=True, exist_ok=True)
        atomic.remove_leftovers(root, age_s=3600)  # a second sweep may be writing here
        atomic.atomic_write(root / "multirun.yaml", OmegaConf.to_yaml(self.config))
        self.root = root
        self.trees |= {job.folder: job.tree for job in jobs}
        begin(root, self.trees)
        if self.varied is None:  # a search says itself what it does
            log.info("sweep of %d members (%s) in %s", len(jobs), _counts(jobs), root)
        self.progress.plan([job.folder for job in jobs], [job.folder for job in todo])
        self._run(root, todo, workers, self.progress)
        return [_outcome(job) for job in jobs]

    def _run(self, root: Path, jobs: list[Job], workers: int, progress: Progress) -> None:
        fail_fast = bool(self.config.sweep.fail_fast)
        if self.slurm is not None:
            slurm.run(root, jobs, self.slurm, progress, fail_fast=fail_fast)
        elif workers > 1:
            processes.run(jobs, workers, progress, fail_fast=fail_fast)
        else:
            self._one_after_another(jobs, progress, fail_fast=fail_fast)

    def plan(self, root: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Compose and check members, and find what is to be done for each; nothing is written."""
        found = by_digest(root)
        varied = self.varied or varied_keys(job_overrides)
        composer = Composer(self.hydra_context.config_loader, self.config)
        command = resume_command("hydra.sweep.dir", root)
        jobs: list[Job] = []
        taken: set[Path] = set()
        for number, overrides in enumerate(job_overrides, first):
            cfg = composer.compose(list(overrides))
            run_cfg = OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])
            config.check(run_cfg)
            tree = config.resolved(run_cfg)
            mine = [path for path in found.get(config.digest(tree), []) if path not in taken]
            path = mine[0] if mine else free_folder(root, number, overrides, varied, taken)
            taken.add(path)
            finished = mine and results.status(path) in ("complete", "diverged")
            if finished and next(path.glob("checkpoint*.pt"), None):
                finished = False  # its process was killed before it had removed them: execute does
            action = "skip" if finished else "resume" if mine else "train"
            with open_dict(cfg):
                cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
                cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = str(root), path.name
                cfg.hydra.runtime.output_dir = str(path)
            jobs.append(Job(number, list(overrides), cfg, run_cfg, tree, path, action, command))
        return jobs

    def _one_after_another(self, jobs: list[Job], progress: Progress, *, fail_fast: bool) -> None:
        with ended_by_signals():
            for job in jobs:
                progress.started(job.folder)
                try:
                    run(job)
                finally:
                    configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
                    progress.ended(job.folder)
                if fail_fast and results.status(job.folder) == "failed":
                    break


def _need(package: str, launcher: str) -> None:
    """Raise ConfigError where a launcher's package is not installed."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"hydra/launcher={launcher} needs {package}: pip install {package}") from None


def _counts(jobs: list[Job]) -> str:
    return ", ".join(f"{sum(job.action == word for job in jobs)} to {word}" for word in ("train", "resume", "skip"))


def _plan_table(members: list[Job]) -> str:
    varied = varied_keys([member.overrides for member in members])
    rows = [["member", *varied, "action", "folder"]]
    for member in members:
        values = split(member.overrides)
        rows.append([str(member.number), *(values.get(key, "") for key in varied), member.action, member.folder.name])
    return f"{aligned(rows)}\n\n{len(members)} members: {_counts(members)}. Nothing was written."


def _outcome(job: Job) -> JobReturn:
    """What came of a member, for the sweeper, from its folder."""
    result = layout.read_result(job.folder) or {}
    done = JobReturn(overrides=job.overrides, working_dir=str(job.folder), status=JobStatus.COMPLETED)
    if result.get("status") in ("complete", "diverged"):
        done.return_value = math.nan if result["objective"] is None else result["objective"]
    else:
        done.status = JobStatus.FAILED
        done.return_value = FmexpError(f"{job.folder.name}: {result.get('error', 'not executed')}")
    return done
