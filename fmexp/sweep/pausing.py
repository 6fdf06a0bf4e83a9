"""Members that pause on their way, to be compared there: how long they are, whether they can be, and how one ends."""

from collections.abc import Sequence
from contextlib import suppress

from fmexp.errors import ConfigError
from fmexp.process import block_signals
from fmexp.rundir import atomic, layout, rungs
from fmexp.sweep.job import Job
from fmexp.sweep.members import rung_tag
from fmexp.sweep.report import write_rungs


def check_comparable(jobs: Sequence[Job], option: str) -> None:
    """Raise ConfigError where members cannot be compared on their way, as an option asks, or go on from there."""
    if not all(job.tree["resume"] for job in jobs):
        raise ConfigError(
            f"resume=false: with {option} members pause and go on. Leave it out, and name a new folder with "
            "hydra.sweep.dir=<folder>."
        )
    names = {str(job.tree["objective"]) for job in jobs}
    if len(names) > 1:
        raise ConfigError(f"objective={','.join(sorted(names))}: the members are compared by one objective. Name one.")
    (name,) = names
    if name.partition("/")[0] not in ("val", "test") or name in {str(job.tree["train"]["tag"]) for job in jobs}:
        raise ConfigError(
            f"objective={name} is not measured where members of {option} pause: take a metric of an evaluation, "
            "such as objective=val/accuracy with train.validation=0.1."
        )


def lengths(jobs: Sequence[Job]) -> list[tuple[int, int]]:
    """How many batches each member has, in an epoch and in all. Loads each dataset, once."""
    with block_signals():  # a signal's exception in the midst of torch's import aborts the process
        from fmexp.build import build_dataset
        from fmexp.run import steps_per_epoch, total_steps

    known: dict[str, tuple[int, int]] = {}
    found = []
    for job in jobs:
        train = job.tree["train"]
        key = str([job.tree["dataset"], *(train[name] for name in ("validation", "batch_size", "epochs", "max_steps"))])
        if key not in known:
            dataset = build_dataset(job.run_cfg)
            known[key] = steps_per_epoch(job.run_cfg, dataset), total_steps(job.run_cfg, dataset)
        found.append(known[key])
    return found


def prune(job: Job, step: int) -> None:
    """Note of a member that it does not go on from a step, unless another command has let it go on."""
    with suppress(layout.LockedError), layout.lock(job.folder):
        if (layout.read_result(job.folder) or {}).get("status") not in ("complete", "diverged", "pruned"):
            atomic.remove_leftovers(job.folder)
            write_rungs(job.folder, rung_tag(str(job.tree["objective"])), rungs.read(job.folder))
            layout.write_pruned(job.folder, job.tree, step)  # last: then nothing is left to be done
