"""How the members of a sweep are executed: one after another, side by side on this machine, or by Slurm.

Hydra's sweepers (the grid, Optuna) hand the members over as lists of overrides. Each is composed once, found in the
sweep's folder by its configuration, and then skipped, resumed or trained; what came of it is read from its folder.
"""

import copy
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from fmexp import config, disk, folder, sweep
from fmexp.errors import ConfigError, FmexpError
from fmexp.search import Search
from fmexp.stop import Stop

log = logging.getLogger(__name__)

LAUNCHED: list[Path] = []  # the folders of the sweeps of this process, whose tables are still to be shown
SLURM, JOBS = ".slurm", "jobs.json"  # what submitit keeps of a sweep, and which member is which job


@dataclass
class Member:
    """A member of the sweep at hand: its composed configuration, its folder, and what is to be done."""

    number: int
    overrides: list[str]
    cfg: DictConfig
    tree: dict[str, Any]  # the same, resolved and without Hydra's part
    folder: Path
    action: str  # train, resume or skip


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
        self.loader = hydra_context.config_loader
        self.launch = (
            Plugins.instance()
            .instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)
            .launch
        )

    def sweep(self, arguments: list[str]) -> Any:
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides([*self.params, *arguments])
        returned: list[Sequence[JobReturn]] = []
        for batch in BasicSweeper.split_arguments(parsed, self.max_batch_size):
            returned.append(self.launch(batch, sum(map(len, returned))))
        for member in (member for batch in returned for member in batch):
            _ = member.return_value  # raises the error of one that failed
        return returned


class Launcher(HydraLauncher):
    """Executes members in `n_jobs` processes (-1: as many as there are cores; 1: in this one), or through Slurm.

    Args:
        slurm: arguments of submitit's AutoExecutor (timeout_min, slurm_partition and so on), or None.
    """

    def __init__(self, n_jobs: int = 1, slurm: DictConfig | None = None) -> None:
        self.n_jobs, self.slurm = n_jobs, slurm
        self.varied: list[str] | None = None  # the keys that name a member's folder; None: those that vary

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
        members = self._plan(root, job_overrides, initial_job_idx)
        if self.config.sweep.dry_run:
            print(_plan_table(members))
            raise SystemExit(0)
        root.mkdir(parents=True, exist_ok=True)
        disk.write(root / "multirun.yaml", OmegaConf.to_yaml(self.config))
        sweep.begin(root, {member.folder: member.tree for member in members})
        if root not in LAUNCHED:
            LAUNCHED.append(root)
        todo = [member for member in members if member.action != "skip"]
        log.info("sweep of %d members (%s) in %s", len(members), _counts(members), root)
        todo_folders = {member.folder for member in todo}
        progress = sweep.Progress([m.folder for m in members], todo_folders, members[0].cfg.objective)
        if self.slurm is not None:
            self._through_slurm(root, todo, progress)
        elif (jobs := min(self.at_once, len(todo))) > 1:
            self._in_parallel(todo, jobs, progress)
        else:
            self._one_after_another(todo)
        return [_outcome(member) for member in members]

    def _plan(self, root: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Member]:
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
            finished = mine and sweep.status(path) in ("completed", "diverged")
            action = "skip" if finished else "resume" if mine else "train"
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = number
                cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = str(root), path.name
            members.append(Member(number, list(overrides), cfg, tree, path, action))
        return members

    def _one_after_another(self, members: list[Member]) -> None:
        with _ended_by_signals():
            for number, member in enumerate(members, 1):
                log.info("\nmember %d of %d: %s", number, len(members), member.folder.name)
                execute(member.cfg, self.hydra_context)
                configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
                if self.config.sweep.fail_fast and sweep.status(member.folder) == "failed":
                    break

    def _in_parallel(self, members: list[Member], jobs: int, progress: sweep.Progress) -> None:
        """Run members in `jobs` processes, each in an executor of its own: one that dies costs its member alone."""
        try:
            from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor
        except ImportError:
            raise ConfigError('hydra/launcher=joblib needs joblib: pip install "fmexp[sweep]"') from None
        with _ended_by_signals():
            _prepare_data(members)
        waiting: queue.SimpleQueue[Member] = queue.SimpleQueue()
        for member in members:
            waiting.put(member)
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
                    executors[slot].submit(_execute_in_worker, _quiet(member.cfg), self.hydra_context).result()
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

    def _through_slurm(self, root: Path, members: list[Member], progress: sweep.Progress) -> None:
        """Submit what Slurm does not have yet as a job array, and wait until it has no more of it.

        A job that is put back into the queue resumes from where it was. The jobs go on if this process ends.
        """
        try:
            import submitit
        except ImportError:
            raise ConfigError('hydra/launcher=slurm needs submitit: pip install "fmexp[sweep]"') from None
        jobs = _submitted(root)
        queued = _queue()
        new = [member for member in members if jobs.get(member.folder.name) not in queued]
        with _ended_by_signals():
            if new:
                _prepare_data(new)
                executor = submitit.AutoExecutor(root / SLURM / "%j", "slurm", **_constructor(self.slurm))
                executor.update_parameters(name="fmexp", **_parameters(self.slurm))
                contexts = [self.hydra_context] * len(new)
                submitted = executor.map_array(SlurmJob(), [member.cfg for member in new], contexts)
                jobs |= {member.folder.name: job.job_id for member, job in zip(new, submitted, strict=True)}
                disk.write(root / SLURM / JOBS, json.dumps(jobs))
            ours = {jobs[member.folder.name] for member in members}
            numbers = ", ".join(sorted({job.split("_")[0] for job in ours}))
            log.info("%d members submitted to Slurm, %d there already: job %s; what they print is in %s",
                     len(new), len(members) - len(new), numbers, root / SLURM)  # fmt: skip
            try:
                while left := ours & _queue():
                    progress.show()
                    if self.config.sweep.fail_fast and any(sweep.status(m.folder) == "failed" for m in members):
                        subprocess.run(["scancel", "--state=PENDING", *left], check=False)
                    time.sleep(POLL_S)
            except BaseException:
                log.warning("the jobs stay in Slurm, and the same command waits for them again; "
                            "to end them: scancel %s", numbers.replace(",", ""))  # fmt: skip
                raise
        progress.show()
        for member in members:
            if sweep.status(member.folder) == "interrupted" and not self.config.sweep.fail_fast:
                _fail(member, f"its Slurm job {jobs[member.folder.name]} ended without a result (see {root / SLURM})")


class Composer:
    """Composes members as Hydra does. Those that differ in values alone, and not in what they choose of the groups,
    share the reading and merging of the YAML files, which is nearly all of the work."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.parser = OverridesParser.create()
        self.bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: list[str]) -> DictConfig:
        values = [word for word in overrides if self._is_value(word)]
        choices = tuple(word for word in overrides if word not in values)
        if choices not in self.bases:
            self.bases[choices] = self.loader.load_sweep_config(self.master, list(choices))
        cfg = copy.deepcopy(self.bases[choices])
        ConfigLoaderImpl._apply_overrides_to_config(self.parser.parse_overrides(values), cfg)
        with open_dict(cfg):
            cfg.hydra.overrides.task = overrides
            cfg.hydra.job.override_dirname = get_overrides_dirname(
                self.parser.parse_overrides(overrides), **cfg.hydra.job.config.override_dirname
            )
        return cfg

    def _is_value(self, word: str) -> bool:
        """Whether an override is key=value for a key that is no group."""
        key = word.partition("=")[0]
        plain = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key)
        return bool(plain) and not key.startswith("hydra.") and key not in self.master.hydra.runtime.choices


class SlurmJob:
    """What submitit calls in a job, and puts back into the queue as it is when Slurm warns of the job's end."""

    def __init__(self) -> None:
        self.command = sys.argv  # which goes on with the sweep

    def __call__(self, cfg: DictConfig, hydra_context: HydraContext) -> None:
        sys.argv = self.command
        os.environ["TQDM_DISABLE"] = "1"
        execute(cfg, hydra_context)

    def checkpoint(self, *arguments: Any) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def execute(cfg: DictConfig, hydra_context: HydraContext) -> None:
    """Execute one member in this process as Hydra executes a job; what came of it stands in its folder.

    Where another process is running in that folder, such as one of a sweep whose parent was killed, wait for it: then
    there is its result to take, or its checkpoint to go on from.
    """
    from fmexp import cli

    setup_globals()
    JobRuntime.instance().set("name", cfg.hydra.job.name)
    path = Path(str(cfg.hydra.sweep.dir)) / cfg.hydra.sweep.subdir
    while True:
        if folder.is_held(path):
            log.warning("%s: waiting for %s, which is running in this folder", path.name, folder.owner(path))
            while folder.is_held(path):
                time.sleep(0.2)
        done = run_job(
            task_function=cli.run.__wrapped__,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=hydra_context,
        )
        if not isinstance(done._return_value, folder.HeldError):
            return


def _execute_in_worker(cfg: DictConfig, hydra_context: HydraContext) -> None:
    try:
        execute(cfg, hydra_context)
    finally:
        if os.getppid() != _parent:  # nobody is left to give this process another member
            os._exit(128 + signal.SIGTERM)


_parent = 0


def _in_worker() -> None:
    """Leave the terminal's process group, so that Ctrl-C reaches the sweep alone, which then tells its workers; and
    end, as by a signal, when the sweep itself was killed."""
    global _parent
    _parent = os.getppid()
    os.setpgrp()

    def watch() -> None:
        while os.getppid() == _parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End the process by SystemExit when a signal arrives, so that the sweep's table and command are still printed."""

    def end(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    if visible is None:
        gpus = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    else:
        gpus = visible.split(",")
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


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


POLL_S = 2  # how often Slurm is asked


def _queue() -> set[str]:
    """The jobs of this user that Slurm has, waiting or running: 12 or, of an array, 12_3."""
    while True:
        command = ["squeue", "--noheader", "--array", "--me", "--format=%F_%K"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0:
            return {line.removesuffix("_N/A") for line in asked.stdout.split()}
        log.warning("Slurm does not answer: %s", asked.stderr.strip())
        time.sleep(POLL_S)


def _submitted(root: Path) -> dict[str, str]:
    """Which Slurm job each member was last submitted as, by the name of its folder."""
    try:
        jobs: dict[str, str] = json.loads((root / SLURM / JOBS).read_text())
    except (OSError, ValueError):
        return {}
    return jobs


def _constructor(options: DictConfig | None) -> dict[str, Any]:
    """The arguments that submitit takes when the executor is made, and not with the others."""
    return {key: value for key, value in (options or {}).items() if key == "slurm_max_num_timeout"}


def _parameters(options: DictConfig | None) -> dict[str, Any]:
    parameters: Any = OmegaConf.to_container(options or OmegaConf.create())
    return {key: value for key, value in parameters.items() if key not in _constructor(options)}


def _fail(member: Member, error: str) -> None:
    log.error("%s: %s", member.folder.name, error)
    folder.write_failure(member.folder, member.tree, member.overrides, error)


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
