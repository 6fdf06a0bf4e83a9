"""How the members of a sweep are executed: one after another, side by side on this machine, or by Slurm.

Hydra's sweepers (the grid, Optuna) hand the members over as lists of overrides. Each is composed once, found in the
sweep's folder by its configuration, and then skipped, resumed or trained; what came of it is read from its folder.
"""

import logging
import shlex
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
from fmexp.config.plugin_options import checked
from fmexp.errors import FmexpError, printable
from fmexp.process import available_cores
from fmexp.rundir import atomic, layout, results
from fmexp.rundir.atomic import disk_full
from fmexp.sweep import processes, slurm
from fmexp.sweep.job import Composer, Job, ended_by_signals, run
from fmexp.sweep.members import by_digest, free_folder
from fmexp.sweep.progress import Progress
from fmexp.sweep.report import begin, conclude
from fmexp.tables import aligned

log = logging.getLogger(__name__)


class Launcher(HydraLauncher):
    """Executes members in this process, in others, or through Slurm."""

    def __init__(self, **options: Any) -> None:
        """Take what Hydra gives; `setup` has it, too, with its types."""
        self.varied: list[str] | None = None  # the keys that name a member's folder; None: those that vary
        self.progress: Progress | None = None  # within `reporting`
        self.root: Path | None = None  # the sweep's folder, once it is made
        self.trees: dict[Path, dict[str, Any]] = {}  # the configurations of all members so far
        self.metrics: tuple[str, ...] = ()  # that HPARAMS has, beside the usual ones

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        options = checked("launcher", config.hydra)
        self.slurm: DictConfig | None = options.get("slurm")
        # How many members are executed at the same time; Slurm itself may be told 0.
        at_once = options.n_jobs if self.slurm is None else max(1, self.slurm.get("slurm_array_parallelism", 1))
        self.processes: int = options.get("processes", 1)  # of each member, on this machine
        self.at_once: int = max(1, available_cores() // self.processes) if at_once == -1 else at_once

    @contextmanager
    def reporting(self, total: int) -> Iterator[Progress]:
        """Show how the launches within the block get on, and at its end the sweep's table, if it was begun.

        Args:
            total: how many members there are in all.
        """
        try:
            with Progress(total, self.config.objective) as self.progress:
                try:
                    yield self.progress
                finally:
                    if self.root is not None:
                        self._conclude(self.root, self.progress)
        except Exception as error:
            if not (full := disk_full(error)):
                raise
            command = resume_command("hydra.sweep.dir", self.root or Path(str(self.config.hydra.sweep.dir)).absolute())
            raise FmexpError(
                f"The disk is full ({full}). What the sweep has is safe; make space, then go on with\n  {command}"
            ) from error
        finally:
            self.progress = None

    def _conclude(self, root: Path, progress: Progress) -> None:
        print(conclude(root, progress.not_begun))
        if progress.complete:
            print(f"compare them with\n  tensorboard --logdir {shlex.quote(str(root))}")
        else:
            print(f"go on with\n  {resume_command('hydra.sweep.dir', root)}")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if self.progress is None:  # of a sweeper that is not fmexp's
            with self.reporting(len(job_overrides)):
                return self.launch(job_overrides, initial_job_idx)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        root = Path(str(self.config.hydra.sweep.dir)).absolute()
        jobs = self.plan(root, job_overrides, initial_job_idx)
        self.execute(root, jobs)
        return [outcome(job) for job in jobs]

    def execute(self, root: Path, jobs: Sequence[Job]) -> None:
        """Execute planned members, within `reporting`; those to skip are counted alone."""
        if self.progress is None:
            raise RuntimeError("execute is for the block of `reporting`")
        if self.config.sweep.dry_run:
            print(_plan_table(jobs))
            raise SystemExit(0)
        todo = [job for job in jobs if job.action != "skip"]
        workers = min(self.at_once, len(todo))
        executor = None if self.slurm is None else slurm.executor(root, self.slurm)
        if self.root is None and self.processes > 1 and (count := workers * self.processes) > available_cores():
            log.warning("%d processes at the same time share %d cores", count, available_cores())
        root.mkdir(parents=True, exist_ok=True)
        atomic.remove_leftovers(root, age_s=3600)  # a second sweep may be writing here
        atomic.atomic_write(root / "multirun.yaml", OmegaConf.to_yaml(self.config))
        self.root = root
        self.trees |= {job.folder: job.tree for job in jobs}
        begin(root, self.trees, self.metrics)
        if self.varied is None:  # a search says itself what it does
            log.info("sweep of %d members (%s) in %s", len(jobs), _counts(jobs), root)
        self.progress.plan([job.folder for job in jobs], [job.folder for job in todo])
        fail_fast = bool(self.config.sweep.fail_fast)
        if executor is not None:
            slurm.run(root, todo, executor, self.progress, fail_fast=fail_fast)
        elif max(workers, self.processes) > 1:
            processes.run(todo, workers, self.progress, processes=self.processes, fail_fast=fail_fast)
        else:
            self._one_after_another(todo, self.progress, fail_fast=fail_fast)

    def plan(self, root: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Compose and check members, and find what is to be done for each; nothing is written.

        Raises:
            ConfigError: a member cannot be run, or `root` is the folder of a run.
        """
        layout.check_no_run(root)
        found = by_digest(root)
        varied = self.varied or varied_keys(job_overrides)
        composer = Composer(self.hydra_context.config_loader, self.config)
        command = resume_command("hydra.sweep.dir", root)
        jobs: list[Job] = []
        taken: set[Path] = set()
        for number, overrides in enumerate(job_overrides, first):
            cfg = composer.compose(list(overrides))
            run_cfg = config.without_hydra(cfg)
            config.check(run_cfg)
            tree = config.resolved(run_cfg)
            digest = config.digest(tree)
            known = next((path for path in found.get(digest, ()) if path not in taken), None)
            path = known or free_folder(root, number, overrides, varied, taken, digest)
            taken.add(path)
            todo = action(path, tree)
            with open_dict(cfg):
                cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
                cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = str(root), path.name
                cfg.hydra.runtime.output_dir = str(path)
            jobs.append(Job(number, list(overrides), cfg, run_cfg, tree, path, todo, command))
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


def _counts(jobs: Sequence[Job]) -> str:
    return ", ".join(f"{sum(job.action == word for job in jobs)} to {word}" for word in ("train", "resume", "skip"))


def _plan_table(members: Sequence[Job]) -> str:
    varied = varied_keys([member.overrides for member in members])
    rows = [["member", *varied, "action", "folder"]]
    for member in members:
        values, name = split(member.overrides), printable(member.folder.name)
        rows.append([str(member.number), *(values.get(key, "") for key in varied), member.action, name])
    return f"{aligned(rows)}\n\n{len(members)} members: {_counts(members)}. Nothing was written."


def action(path: Path, tree: dict[str, Any]) -> str:
    """What is to be done for the member of a folder."""
    if not layout.holds_run(path):
        return "train"
    status = results.status(path)
    if status not in ("complete", "diverged"):
        return "resume"
    # A process that was killed just before it had removed these: execute does.
    return "resume" if layout.superfluous_checkpoints(path, status, tree) else "skip"


def outcome(job: Job) -> JobReturn:
    """What came of a member, for the sweeper, from its folder."""
    done = JobReturn(overrides=job.overrides, working_dir=str(job.folder), status=JobStatus.COMPLETED)
    try:
        result = results.read(job.folder)
        if result.status in ("complete", "diverged", "pruned"):
            done.return_value = result.objective
            return done
        problem = result.error or "not executed"
    except FmexpError as error:
        problem = str(error)
    done.status = JobStatus.FAILED
    done.return_value = FmexpError(f"{job.folder.name}: {problem}")
    return done
