"""Members as jobs of Slurm, through submitit, of one task or of several, which train the run together."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fmexp import process
from fmexp.errors import ConfigError, FmexpError
from fmexp.rundir import atomic, bounded, results
from fmexp.sweep.job import Job, ended_by_signals, fail, follow, prepare_data
from fmexp.sweep.job import run as run_job
from fmexp.sweep.progress import Progress

log = logging.getLogger(__name__)

FOLDER, JOBS = ".slurm", "jobs.json"  # what submitit keeps of a sweep, and which member is which job
POLL_S = 2  # how often Slurm is asked
_WAY = "Start the sweep where squeue lists your jobs, or on this machine alone with hydra/launcher=joblib."


def executor(root: Path, options: DictConfig) -> Any:
    """What submits jobs for the sweep of a folder; nothing is written yet.

    Raises:
        ConfigError: there is no Slurm, or no such option.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("hydra/launcher=slurm needs submitit: pip install submitit") from None
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise ConfigError(
            f"hydra/launcher=slurm: there is no Slurm here, for {', '.join(missing)} cannot be found. {_WAY}"
        )
    if (asked := _ask()).returncode != 0:
        raise ConfigError(f"hydra/launcher=slurm: Slurm does not answer ({asked.stderr.strip()}). {_WAY}")
    parameters: Any = OmegaConf.to_container(options, resolve=True)
    tasks = parameters.get("nodes", 1) * parameters.get("tasks_per_node", 1)
    if tasks > 1 and parameters.get("slurm_use_srun") is False:
        raise ConfigError("hydra.launcher.slurm.slurm_use_srun=false starts one task: leave nodes and tasks at 1.")
    own = parameters.get("slurm_srun_args") or []
    if not isinstance(own, list):
        raise ConfigError(f"hydra.launcher.slurm.slurm_srun_args={own} must be a list, such as [--cpu-bind=cores].")
    # A task that dies ends the others, which may wait for it; and srun does not take over from sbatch how many cores.
    always = ["--kill-on-bad-exit=1", f"--cpus-per-task={parameters.get('cpus_per_task') or 1}"]
    parameters["slurm_srun_args"] = [*always, *own]
    first = {key: parameters.pop(key) for key in {"slurm_max_num_timeout"} & parameters.keys()}  # submitit's order
    try:
        made = submitit.AutoExecutor(root / FOLDER / "%j", "slurm", **first)
        made.update_parameters(name="fmexp", **parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"hydra.launcher.slurm: {error}") from error
    return made


def run(root: Path, jobs: list[Job], executor: Any, progress: Progress, *, fail_fast: bool) -> None:
    """Submit what Slurm does not have yet as a job array, and wait until it has no more of it.

    A job that is put back into the queue resumes from where it was. The jobs go on if this process ends.
    """
    if not jobs:
        return
    process.resume_gc()
    submitted = _submitted(root)
    queued = _queue()
    new = [job for job in jobs if submitted.get(job.folder.name) not in queued]
    with ended_by_signals():
        if new:
            submitted |= _submit(executor, new)
            atomic.atomic_write(root / FOLDER / JOBS, json.dumps(submitted))
        ours = {submitted[job.folder.name] for job in jobs}
        numbers = ", ".join(sorted({number.split("_")[0] for number in ours}))
        progress.say(f"{len(new)} members submitted to Slurm, {len(jobs) - len(new)} there already: job {numbers}; "
                     f"what they print is in {root / FOLDER}")  # fmt: skip
        try:
            while left := ours & _queue():
                progress.look()
                if fail_fast and any(results.status(m.folder) == "failed" for m in jobs):
                    subprocess.run(["scancel", "--state=PENDING", *left], check=False)
                time.sleep(POLL_S)
        except BaseException:
            progress.say("the jobs stay in Slurm, and the same command waits for them again; "
                         f"to end them: scancel {numbers.replace(',', '')}", logging.WARNING)  # fmt: skip
            raise
    progress.look()
    for job in jobs:
        if results.status(job.folder) == "interrupted" and not fail_fast:
            fail(job, f"its Slurm job {submitted[job.folder.name]} ended without a result (see {root / FOLDER})")
        if progress.members[job.folder] == "":
            progress.ended(job.folder)


def _submit(executor: Any, jobs: list[Job]) -> dict[str, str]:
    """Hand members to Slurm as a job array; returns the job of each, by the name of its folder."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    prepare_data(jobs)
    try:
        submitted = executor.map_array(SlurmJob(), jobs)
    except (FailedJobError, FailedSubmissionError) as error:  # with what sbatch says
        raise ConfigError(f"hydra.launcher.slurm: Slurm takes no such job. {str(error).strip()}") from error
    return {job.folder.name: handed.job_id for job, handed in zip(jobs, submitted, strict=True)}


class SlurmJob:
    """What submitit calls in a job, and puts back into the queue as it is when Slurm warns of the job's end."""

    def __call__(self, job: Job) -> None:
        import submitit

        os.environ["TQDM_DISABLE"] = "1"
        tasks = submitit.JobEnvironment().num_tasks
        if tasks > 1:
            # It would set CUDA_VISIBLE_DEVICES to the task's number, whichever GPUs Slurm has given to the job.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            process.own_cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
            os.environ.setdefault("OMP_NUM_THREADS", str(process.own_cores))
        if process.rank():
            return follow()
        run_job(job, console=True)
        if tasks > 1 and results.status(job.folder) == "failed":
            sys.exit(1)  # so that Slurm ends the others, which wait where the run has not begun

    def checkpoint(self, *arguments: Any) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def _ask() -> subprocess.CompletedProcess[str]:
    command = ["squeue", "--noheader", "--array", "--me", "--format=%F_%K"]
    return subprocess.run(command, capture_output=True, text=True)


def _queue() -> set[str]:
    """The jobs of this user that Slurm has, waiting or running: 12 or, of an array, 12_3."""
    while (asked := _ask()).returncode != 0:
        log.warning("Slurm does not answer: %s", asked.stderr.strip())
        time.sleep(POLL_S)
    return {line.removesuffix("_N/A") for line in asked.stdout.split()}


def _submitted(root: Path) -> dict[str, str]:
    """Which Slurm job each member was last submitted as, by the name of its folder."""
    with suppress(FileNotFoundError, FmexpError):
        jobs = bounded.read_json(root / FOLDER / JOBS)
        return jobs if isinstance(jobs, dict) else {}
    return {}
