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
from fmexp.rundir import atomic, layout, results
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
            job, epochs = new[_but_epochs(held)], int(held["train"]["epochs"])
        except Exception:  # another member, or whatever a damaged file makes a reader raise: the plan has said so
            continue
        status, best = results.status(path), found.get(job.number, (0,))[0]
        ended = status == "complete" and not (path / layout.CHECKPOINT).exists()
        if path in taken or ended or not best < epochs <= job.tree["train"]["epochs"]:
            continue
        key = _alike(job.tree, epochs)
        if key not in allowed:
            allowed[key] = _allowed(job, path, epochs)
        if allowed[key]:
            todo = "skip" if status == "diverged" else "resume"
            found[job.number] = epochs, replace(job, folder=path, action=todo)
    return [job for _, job in found.values()]


def lengthen(job: Job) -> None:
    """Make a folder that of the longer run, paused where the shorter one has ended, once no process runs there."""
    with layout.lock(job.folder, wait=True):
        atomic.remove_leftovers(job.folder / ".hydra")
        result = layout.read_result(job.folder)
        layout.write_config(job.folder, job.tree, {"overrides.yaml": OmegaConf.create(job.overrides)})
        if result:  # last: until then its digest is the old one
            digest = config.digest(job.tree)
            paused = {"status": "paused", "objective": None} if result["status"] != "diverged" else {}
            layout.write_result(job.folder, {**result, **paused, "config_digest": digest})


def _but_epochs(tree: dict[str, Any]) -> str:
    return config.digest({**tree, "train": {**tree["train"], "epochs": None}})


def _alike(tree: dict[str, Any], epochs: int) -> str:
    """What decides whether a run of so many epochs can become that of `tree`: of members that are alike one speaks for
    all. A schedule of one's own may take the optimizer's rate."""
    own = not str(tree["schedule"].get("_target_")).startswith("fmexp.")
    parts = ("dataset", "model", "schedule", "train", "backend", *(["optimizer"] if own else []))
    return str([epochs, *(tree.get(part) for part in parts)])


def _allowed(job: Job, path: Path, epochs: int) -> bool:
    """Whether all steps of the shorter run are those of the longer one."""
    with block_signals():  # a signal's exception in the midst of torch's import aborts the process
        from fmexp import longer
        from fmexp.build import build
        from fmexp.run import total_steps

    try:
        run = build(OmegaConf.merge(job.run_cfg, {"device": "cpu"}), resumed=True)  # type: ignore[arg-type]
        steps = total_steps(run.cfg, run.dataset, epochs=epochs)
        longer.check(run, path, epochs, step=steps, position=0, compiled=False)
    except ConfigError as error:
        log.info("%s. Such members begin at the start.", str(error).partition(". Begin from its weights")[0])
        return False
    return True
