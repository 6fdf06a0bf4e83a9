"""Training a run further: whether its folder may become that of the run with more epochs, and how it does."""

import logging
from pathlib import Path
from typing import Any, NoReturn

from fmexp.build import target
from fmexp.config.overrides import quote
from fmexp.engine import backend
from fmexp.errors import ConfigError
from fmexp.run import Run, steps_per_epoch, total_steps
from fmexp.rundir import checkpoint, hparams, tensorboard

log = logging.getLogger(__name__)


def check(run: Run, output_dir: Path, epochs: int, *, step: int, position: int, compiled: bool) -> None:
    """Raise ConfigError where a run of `epochs` that has come so far would have been another one with the run's.

    Args:
        compiled: whether its step is.
    """
    before, now = (total_steps(run.cfg, run.dataset, epochs=count) for count in (epochs, None))
    changed = f"{output_dir} cannot go on with train.epochs={run.cfg.train.epochs} in place of {epochs}, for"
    if position != step % steps_per_epoch(run.cfg, run.dataset):
        refuse(f"{changed} train.max_steps={run.cfg.train.max_steps} has ended it within an epoch.", output_dir)
    if run.backend.compiled and not compiled and before < backend.MANY_BATCHES <= now:
        refuse(f"{changed} train.compile=auto compiles the step of a run of so many batches.", output_dir)
    if any(run.schedule(done, before) != run.schedule(done, now) for done in range(step)):
        schedule = target(run.cfg.schedule)
        refuse(f"{changed} the learning rate of schedule={schedule} follows the length of the run.", output_dir)


def refuse(why: str, output_dir: Path) -> NoReturn:
    """Raise ConfigError with the ways out."""
    raise ConfigError(
        f"{why} Begin from its weights in a new folder, with weights={quote(str(output_dir))}, or train all epochs in "
        "a new one, from the start."
    )


def lengthen(run: Run, output_dir: Path, state: dict[str, Any], about: dict[str, Any], text: str) -> None:
    """Make the folder, as its last checkpoint has it, that of the run with more epochs: TensorBoard has the first value
    of HPARAMS and of a text, so that they are changed where they are.

    Args:
        state: of the checkpoint; it is changed, too.
        about: what it has of the longer run beside that.
        text: that of TensorBoard's tag config.
    """

    def change(value: Any) -> None:
        hparams.set_epochs(value, epochs)
        if value.tag == "config/text_summary":
            value.tensor.string_val[0] = text.encode()

    epochs = run.cfg.train.epochs
    state |= about
    state["events"] = tensorboard.rewrite(output_dir, state["events"], f".{epochs}", change)
    for _ in range(2):  # the previous one, too, for it would name files that are gone next
        checkpoint.save(output_dir, state)  # a kill before this begins again here, and after it goes on
    tensorboard.rewind(output_dir, state["events"])
    log.info("trained further, from epoch %d to %d", state["epoch"], epochs)
