"""Members of a sweep that had fewer epochs, and go on as those of the longer one in their folders."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fmexp import config
from fmexp.errors import ConfigError
from fmexp.process import block_signals
from fmexp.rundir import layout, results
from fmexp.sweep.job import Job
from fmexp.sweep.members import member_folders

log = logging.getLogger(__name__)


def shorter(root: Path, jobs: Sequence[Job]) -> list[Job]:
    """Of the jobs that would begin in a folder of their own, those that a member with fewer train.epochs can become, in
    its folder: its checkpoint is there, and its learning rates are those of the longer run."""
    taken = {job.folder for job in jobs}
    new = {_but_epochs(job.tree): job for job in jobs if job.action == "train"}
    found: dict[int, tuple[int, Job]] = {}
    allowed: dict[str, bool] = {}
    for path in member_folders(root) if new else ():
        try:
            held = layout.read_config(path)
            job, epochs = new[_but_epochs(held)], held["train"]["epochs"]
        except (
            Exception
        ):  # another member, or whatever a damaged file makes a reader raise, of which the plan has said so
            continue
        status, best = results.status(path), found.get(job.number, (0,))[0]
        ended = status == "complete" and not (path / layout.CHECKPOINT).exists()
        if path in taken or ended or not best < epochs <= job.tree["train"]["epochs"]:
            continue
        key = str([epochs, job.tree["dataset"], job.tree["schedule"], job.tree["train"]])
        if key not in allowed:
            allowed[key] = _allowed(job, path, held)
        if allowed[key]:
            todo = "skip" if status == "diverged" else "resume"
            found[job.number] = epochs, replace(job, folder=path, action=todo)
    return [job for _, job in found.values()]


def lengthen(job: Job) -> None:
    """Make a folder that of the longer run, which has paused where the shorter one has ended.

    Raises:
        LockedError: the shorter one is running there.
    """
    with layout.lock(job.folder):
        result = layout.read_result(job.folder)
        layout.write_config(job.folder, job.tree, {"overrides.yaml": OmegaConf.create(job.overrides)})
        if result:  # last: until then its digest is the old one
            digest = config.digest(job.tree)
            paused = {"status": "paused", "objective": None} if result["status"] != "diverged" else {}
            layout.write_result(job.folder, {**result, **paused, "config_digest": digest})


def _but_epochs(tree: dict[str, Any]) -> str:
    return config.digest({**tree, "train": {**tree["train"], "epochs": None}})


def _allowed(job: Job, path: Path, held: dict[str, Any]) -> bool:
    """Whether all steps of the shorter run are those of the longer one; of many members one speaks for all."""
    with block_signals():  # a signal's exception in the midst of torch's import aborts the process
        from fmexp import longer
        from fmexp.build import build
        from fmexp.run import total_steps

    try:
        run = build(OmegaConf.merge(job.run_cfg, {"device": "cpu"}), resumed=True)  # type: ignore[arg-type]
        steps = total_steps(run.cfg, run.dataset, epochs=held["train"]["epochs"])
        longer.check(run, path, {"config": held, "step": steps, "position": 0})
    except ConfigError as error:
        log.info("%s. Such members begin at the start.", str(error).partition(". Begin from its weights")[0])
        return False
    return True
