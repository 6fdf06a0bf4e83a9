"""How the members of a sweep are executed: one after another, side by side on this machine, or by Slurm.

Hydra's sweepers (the grid, Optuna) hand the members over as lists of overrides. Each is composed once, found in the
sweep's folder by its configuration, and then skipped, resumed or trained; what came of it is read from its folder.
"""

import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from fmexp import config, folder, sweep
from fmexp.errors import ConfigError, FmexpError
from fmexp.stop import Stop

log = logging.getLogger(__name__)

LAUNCHED: list[Path] = []  # the folders of the sweeps of this process, whose tables are still to be shown


@dataclass
class Member:
    """A member of the sweep at hand: its composed configuration, its folder, and what is to be done."""

    number: int
    overrides: list[str]
    cfg: DictConfig
    folder: Path
    action: str  # train, resume or skip


class Launcher(HydraLauncher):
    """Executes members in `n_jobs` processes (-1: as many as there are cores; 1: in this one), or through Slurm.

    Args:
        slurm: submitit's parameters for a job (timeout_min, slurm_partition and so on), or None.
    """

    def __init__(self, n_jobs: int = 1, slurm: DictConfig | None = None) -> None:
        self.n_jobs, self.slurm = n_jobs, slurm

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        root = Path(str(self.config.hydra.sweep.dir)).absolute()
        members = self._plan(root, job_overrides, initial_job_idx)
        if self.config.sweep.dry_run:
            print(_plan_table(members))
            raise SystemExit(0)
        root.mkdir(parents=True, exist_ok=True)
        sweep.begin(root, [config.resolved(_job(member.cfg)) for member in members])
        if root not in LAUNCHED:
            LAUNCHED.append(root)
        todo = [member for member in members if member.action != "skip"]
        counts = ", ".join(
            f"{sum(m.action == word for m in members)} to {word}" for word in ("train", "resume", "skip")
        )
        log.info("sweep of %d members (%s) in %s", len(members), counts, root)
        if self.slurm is not None:
            self._through_slurm(root, todo)
        elif (jobs := self._jobs()) > 1 and len(todo) > 1:
            self._in_parallel(root, todo, len(members), min(jobs, len(todo)))
        else:
            self._one_after_another(todo)
        return [_outcome(member) for member in members]

    def _plan(self, root: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Member]:
        found = sweep.by_digest(root)
        varied = sweep.varied_keys(job_overrides)
        members: list[Member] = []
        taken: set[Path] = set()
        for number, overrides in enumerate(job_overrides, first):
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            job = _job(cfg)
            config.check(job)
            mine = [path for path in found.get(config.digest(config.resolved(job)), []) if path not in taken]
            path = mine[0] if mine else sweep.free_folder(root, number, overrides, varied, taken)
            taken.add(path)
            status = sweep.status(path) if mine else ""
            action = "train" if not mine else "skip" if status in ("completed", "diverged") else "resume"
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = number
                cfg.hydra.sweep.subdir = path.name
            members.append(Member(number, list(overrides), cfg, path, action))
        return members

    def _one_after_another(self, members: list[Member]) -> None:
        for number, member in enumerate(members, 1):
            log.info("\nmember %d of %d: %s", number, len(members), member.folder.name)
            execute(member.cfg, self.hydra_context)
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            if self.config.sweep.fail_fast and sweep.status(member.folder) == "failed":
                break

    def _jobs(self) -> int:
        return self.n_jobs if self.n_jobs > 0 else len(os.sched_getaffinity(0))

    def _in_parallel(self, root: Path, members: list[Member], total: int, jobs: int) -> None:
        """Run members in `jobs` processes, each in an executor of its own: a process that dies costs its member alone."""
        try:
            from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor
        except ImportError:
            raise ConfigError('hydra/launcher=joblib needs joblib: pip install "fmexp[sweep]"') from None
        _prepare_data(members)
        waiting: queue.SimpleQueue[Member] = queue.SimpleQueue()
        for member in members:
            waiting.put(member)
        progress = sweep.Progress(root, total, total - len(members))
        executors: list[Any] = [None] * jobs
        halt = threading.Event()

        def work(slot: int) -> None:
            while not halt.is_set():
                try:
                    member = waiting.get_nowait()
                except queue.Empty:
                    break
                if executors[slot] is None:
                    executors[slot] = ProcessPoolExecutor(1, env=_environment(slot, jobs), initializer=_in_worker)
                progress.started(member.folder)
                try:
                    executors[slot].submit(execute, _quiet(member.cfg), self.hydra_context).result()
                except BrokenProcessPool:
                    executors[slot] = None
                    if not halt.is_set():
                        _fail(member, "its process was killed, or ran out of memory")
                except BaseException as error:  # SystemExit, when the member was told to stop
                    if not isinstance(error, SystemExit):
                        log.error("%s: %s", member.folder.name, error)
                progress.ended(member.folder)
                if self.config.sweep.fail_fast and sweep.status(member.folder) == "failed":
                    halt.set()

        with Stop() as stop:
            threads = [threading.Thread(target=work, args=(slot,)) for slot in range(jobs)]
            for thread in threads:
                thread.start()
            told = False
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.1)
                if stop.signal and not told:
                    told = True
                    halt.set()
                    _tell_to_stop(executors)
            for executor in filter(None, executors):
                executor.shutdown()
            if stop.signal:
                stop.leave()

    def _through_slurm(self, root: Path, members: list[Member]) -> None:
        """Submit a job array and wait until Slurm has no more of it; a job that is put back resumes from where it was."""
        try:
            import submitit
        except ImportError:
            raise ConfigError('hydra/launcher=slurm needs submitit: pip install "fmexp[sweep]"') from None
        if not members:
            return
        _prepare_data(members)
        executor = submitit.AutoExecutor(folder=root / ".slurm" / "%j", cluster="slurm")
        executor.update_parameters(**OmegaConf.to_container(self.slurm))  # type: ignore[arg-type]
        jobs = executor.map_array(SlurmJob(), [member.cfg for member in members], [self.hydra_context] * len(members))
        array = jobs[0].job_id.split("_")[0]
        log.info("submitted to Slurm as job %s; what its processes print is in %s", array, root / ".slurm")
        progress = sweep.Progress(root, len(members), 0)
        while subprocess.run(["squeue", "-h", "-j", array], capture_output=True, text=True).stdout.strip():
            progress.show()
            time.sleep(2)
        for member in members:
            if sweep.status(member.folder) == "interrupted":
                _fail(member, "its Slurm job ended without a result")


class SlurmJob:
    """What submitit calls in a job, and puts back into the queue as it is when Slurm warns of the job's end."""

    def __call__(self, cfg: DictConfig, hydra_context: HydraContext) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        execute(cfg, hydra_context)

    def checkpoint(self, *arguments: Any) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def execute(cfg: DictConfig, hydra_context: HydraContext) -> None:
    """Execute one member in this process as Hydra executes a job; what came of it stands in its folder."""
    from fmexp import cli

    setup_globals()
    JobRuntime.instance().set("name", cfg.hydra.job.name)
    run_job(
        task_function=cli.run.__wrapped__,
        config=cfg,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=hydra_context,
    )


def _job(cfg: DictConfig) -> DictConfig:
    """The configuration without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])


def _quiet(cfg: DictConfig) -> DictConfig:
    """The same member, of whose log lines only warnings go to the console that all members share."""
    with open_dict(cfg):
        cfg.hydra.job_logging.handlers.console.level = "WARNING"
    return cfg


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """What a worker process finds in its environment: its share of the cores, and one GPU where there are several."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        visible.split(",")
        if visible
        else [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    )
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _in_worker() -> None:
    """Leave the terminal's process group, so that Ctrl-C reaches the sweep alone, which then tells its workers."""
    os.setpgrp()


def _tell_to_stop(executors: list[Any]) -> None:
    for executor in filter(None, executors):
        for pid in list(executor._processes):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _prepare_data(members: list[Member]) -> None:
    """Download and check each dataset once, before many processes want it; the folder's error comes once, too."""
    from fmexp.datasets import load

    for node in {str(member.cfg.dataset): member.cfg.dataset for member in members}.values():
        if "root" in node:
            load(node)


def _fail(member: Member, error: str) -> None:
    log.error("%s: %s", member.folder.name, error)
    folder.write_failure(member.folder, config.resolved(_job(member.cfg)), member.overrides, error)


def _plan_table(members: list[Member]) -> str:
    varied = sweep.varied_keys([member.overrides for member in members])
    rows = [["member", *varied, "action", "folder"]]
    for member in members:
        values = sweep.split(member.overrides)
        rows.append([str(member.number), *(values.get(key, "") for key in varied), member.action, member.folder.name])
    return sweep.aligned(rows)


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
Launcher.__module__ = "hydra_plugins.fmexp"
Plugins.instance().register(Launcher)
sys.modules.setdefault("hydra_plugins", types.ModuleType("hydra_plugins"))
sys.modules["hydra_plugins.fmexp"] = sys.modules[__name__]
_OPTIONS: dict[str, dict[str, Any]] = {
    "basic": {"n_jobs": 1},
    "joblib": {"n_jobs": -1},
    "slurm": {
        "slurm": {
            "timeout_min": 60,
            "cpus_per_task": 1,
            "slurm_partition": None,
            "slurm_array_parallelism": 256,
            "slurm_signal_delay_s": 90,
        }
    },
}
for _name, _node in _OPTIONS.items():  # after Plugins.instance(), which stores the plugins' own under these names
    ConfigStore.instance().store(
        group="hydra/launcher", name=_name, node={"_target_": "hydra_plugins.fmexp.Launcher", **_node}
    )
