"""Members as jobs of Slurm, through submitit."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from fmexp import disk, garbage, results
from fmexp.members import Member, ended_by_signals, execute, fail, prepare_data
from fmexp.progress import Progress

log = logging.getLogger(__name__)

FOLDER, JOBS = ".slurm", "jobs.json"  # what submitit keeps of a sweep, and which member is which job
POLL_S = 2  # how often Slurm is asked


def run(
    root: Path,
    members: list[Member],
    options: DictConfig,
    progress: Progress,
    hydra_context: HydraContext,
    *,
    fail_fast: bool,
) -> None:
    """Submit what Slurm does not have yet as a job array, and wait until it has no more of it.

    A job that is put back into the queue resumes from where it was. The jobs go on if this process ends.
    """
    garbage.watch()
    jobs = _submitted(root)
    queued = _queue()
    new = [member for member in members if jobs.get(member.folder.name) not in queued]
    with ended_by_signals():
        if new:
            jobs |= _submit(root, new, options, hydra_context)
            disk.write(root / FOLDER / JOBS, json.dumps(jobs))
        ours = {jobs[member.folder.name] for member in members}
        numbers = ", ".join(sorted({job.split("_")[0] for job in ours}))
        progress.say(f"{len(new)} members submitted to Slurm, {len(members) - len(new)} there already: job {numbers}; "
                     f"what they print is in {root / FOLDER}")  # fmt: skip
        try:
            while left := ours & _queue():
                progress.look()
                if fail_fast and any(results.status(m.folder) == "failed" for m in members):
                    subprocess.run(["scancel", "--state=PENDING", *left], check=False)
                time.sleep(POLL_S)
        except BaseException:
            progress.say("the jobs stay in Slurm, and the same command waits for them again; "
                         f"to end them: scancel {numbers.replace(',', '')}", logging.WARNING)  # fmt: skip
            raise
    progress.look()
    for member in members:
        if results.status(member.folder) == "interrupted" and not fail_fast:
            fail(member, f"its Slurm job {jobs[member.folder.name]} ended without a result (see {root / FOLDER})")
        if progress.members[member.folder] == "":
            progress.ended(member.folder)


def _submit(root: Path, members: list[Member], options: DictConfig, hydra_context: HydraContext) -> dict[str, str]:
    """Hand members to Slurm as a job array; returns the job of each, by the name of its folder."""
    import submitit

    prepare_data(members)
    executor = submitit.AutoExecutor(root / FOLDER / "%j", "slurm", **_constructor(options))
    executor.update_parameters(name="fmexp", **_parameters(options))
    submitted = executor.map_array(SlurmJob(), [member.cfg for member in members], [hydra_context] * len(members))
    return {member.folder.name: job.job_id for member, job in zip(members, submitted, strict=True)}


class SlurmJob:
    """What submitit calls in a job, and puts back into the queue as it is when Slurm warns of the job's end."""

    def __init__(self) -> None:
        self.command = sys.argv  # which goes on with the sweep

    def __call__(self, cfg: DictConfig, hydra_context: HydraContext) -> None:
        sys.argv = self.command
        os.environ["TQDM_DISABLE"] = "1"
        execute(cfg, hydra_context, console=True)

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
