"""Members as jobs of Slurm, through submitit."""

import json
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fmexp import process
from fmexp.rundir import atomic, results
from fmexp.sweep.job import Job, ended_by_signals, fail, prepare_data
from fmexp.sweep.job import run as run_job
from fmexp.sweep.progress import Progress

log = logging.getLogger(__name__)

FOLDER, JOBS = ".slurm", "jobs.json"  # what submitit keeps of a sweep, and which member is which job
POLL_S = 2  # how often Slurm is asked


def run(
    root: Path,
    jobs: list[Job],
    options: DictConfig,
    progress: Progress,
    *,
    fail_fast: bool,
) -> None:
    """Submit what Slurm does not have yet as a job array, and wait until it has no more of it.

    A job that is put back into the queue resumes from where it was. The jobs go on if this process ends.
    """
    process.resume_gc()
    submitted = _submitted(root)
    queued = _queue()
    new = [job for job in jobs if submitted.get(job.folder.name) not in queued]
    with ended_by_signals():
        if new:
            submitted |= _submit(root, new, options)
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


def _submit(root: Path, jobs: list[Job], options: DictConfig) -> dict[str, str]:
    """Hand members to Slurm as a job array; returns the job of each, by the name of its folder."""
    import submitit

    prepare_data(jobs)
    executor = submitit.AutoExecutor(root / FOLDER / "%j", "slurm", **_constructor(options))
    executor.update_parameters(name="fmexp", **_parameters(options))
    submitted = executor.map_array(SlurmJob(), jobs)
    return {job.folder.name: handed.job_id for job, handed in zip(jobs, submitted, strict=True)}


class SlurmJob:
    """What submitit calls in a job, and puts back into the queue as it is when Slurm warns of the job's end."""

    def __call__(self, job: Job) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        run_job(job, console=True)

    def checkpoint(self, *arguments: Any) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


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
        jobs: dict[str, str] = json.loads((root / FOLDER / JOBS).read_text())
    except (OSError, ValueError):
        return {}
    return jobs


def _constructor(options: DictConfig) -> dict[str, Any]:
    """The arguments that submitit takes when the executor is made, and not with the others."""
    return {key: value for key, value in options.items() if key == "slurm_max_num_timeout"}


def _parameters(options: DictConfig) -> dict[str, Any]:
    parameters: Any = OmegaConf.to_container(options)
    return {key: value for key, value in parameters.items() if key not in _constructor(options)}
