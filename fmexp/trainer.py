"""Trains a run: one loop, what is logged on the way, and the state from which it continues bit for bit after a stop."""

import logging
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fmexp import datasets, rng
from fmexp.engine.compile import compile_step
from fmexp.engine.cuda_graph import CudaRecorder, GraphedStep, Recorder
from fmexp.engine.extra_state import ExtraState
from fmexp.engine.freeze import train_mode
from fmexp.engine.step import Step, train_step
from fmexp.errors import first_line
from fmexp.process import Stop
from fmexp.run import Run, eval_mode, steps_per_epoch, total_steps
from fmexp.rundir import checkpoint, tensorboard

log = logging.getLogger(__name__)


class DivergedError(Exception):
    """A loss that is not a finite number, at `step`."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss is {loss} at step {step}")
        self.step = step


class Trainer:
    """Trains a run from its current step to its end.

    Args:
        folder: where checkpoints are written; None: nowhere.
        about: what a checkpoint holds beside `state_dict`, such as the configuration.
        stop: ends the run after the batch in which a signal has arrived.
        resume_command: what to type to go on, printed at such a stop.
    """

    def __init__(
        self,
        run: Run,
        *,
        folder: Path | None = None,
        about: dict[str, Any] | None = None,
        stop: Stop | None = None,
        resume_command: str = "",
    ) -> None:
        self.run, self.folder, self.about = run, folder, about or {}
        self.stop, self.resume_command = stop or Stop(), resume_command
        self.step: Step | None = None
        cfg = run.cfg.train
        self.batch_size, self.num_workers = cfg.batch_size, cfg.num_workers  # here, for OmegaConf is slow in a loop
        self.log_every, self.checkpoint_every = cfg.log_every, cfg.checkpoint_every
        self.steps_per_epoch = steps_per_epoch(run.cfg, run.dataset)
        self.total_steps = total_steps(run.cfg, run.dataset)
        self.started = time.monotonic()
        self.saved, self.save_seconds = self.started, 0.05  # when the last checkpoint was written, and how long it took
        self.first_save = True
        self.extra = ExtraState(run.model, run.optimizer, checkpoint.can_keep)

    def fit(self) -> None:
        """Train to the end.

        Raises:
            DivergedError: the loss is not a finite number any more.
            SystemExit: a signal stopped the run, after it was saved.
        """
        run, seed = self.run, self.run.cfg.seed
        step = self.step = build_step(run)
        # tqdm reads its variable at import alone, and not where `disable` is given. None: shown on a terminal alone.
        hidden = True if os.environ.get("TQDM_DISABLE") else None
        with tqdm(
            total=self.total_steps, initial=run.step, unit=" batches", disable=hidden, leave=False, dynamic_ncols=True
        ) as bar:
            while run.step < self.total_steps:
                order = datasets.order(seed, run.epoch, datasets.length(run.dataset.train))
                rest = order[run.position * self.batch_size :]  # of an epoch that was begun before a stop
                train_mode(run.model, run.cfg.train.freeze)
                for images, labels in datasets.batches(
                    run.dataset, run.dataset.train, rest, self.batch_size,
                    device=run.device, num_workers=self.num_workers, seed=(seed, run.epoch),
                ):  # fmt: skip
                    run.batch = images, labels
                    loss = step(images, labels)
                    self.after_step(loss)
                    bar.update()
                    if run.step == self.total_steps:  # train.max_steps may cut an epoch short
                        break

    def after_step(self, loss: Tensor) -> None:
        """Count a step, and do what is due after it: running loss, end of an epoch, checkpoint, stop."""
        run = self.run
        run.losses.append(loss)
        run.step += 1
        run.position += 1
        run.forget_evaluations()
        if run.step % self.log_every == 0 or run.step == self.total_steps:
            self.log()
        if run.position == self.steps_per_epoch or run.step == self.total_steps:
            run.epoch, run.position = run.epoch + 1, 0
            self.end_epoch()
        self.save_if_due()

    def log(self) -> None:
        """Write the running loss, the mean since the last one, and execute the stages on `log`."""
        run = self.run
        loss = mean_loss(run.losses, run.step)
        run.losses.clear()
        run.scalar(run.cfg.train.tag, loss)
        log.info("step %d: %s %.4f", run.step, run.cfg.train.tag, loss)
        self.run_stages("log")

    def end_epoch(self) -> None:
        """Evaluate, and execute the stages on `epoch`."""
        run = self.run
        if run.losses:
            mean_loss(run.losses, run.step)  # a model that has diverged is not evaluated
        evaluation = run.evaluate("test")
        if not math.isfinite(evaluation.loss):
            raise DivergedError(run.step, evaluation.loss)
        run.scalar("test/loss", evaluation.loss)
        run.scalar("test/accuracy", evaluation.accuracy)
        best = "test/accuracy/best"  # for HPARAMS, which knows the last value alone
        run.scalar(best, max(evaluation.accuracy, run.metrics.get(best, 0.0)))
        log.info("epoch %d: test accuracy %.4f, test loss %.4f", run.epoch, evaluation.accuracy, evaluation.loss)
        self.run_stages("epoch")

    def run_stages(self, moment: str) -> None:
        """Execute the stages of a moment, and tell a graph of the step that they may have changed something."""
        self.run.run_stages(moment)
        if isinstance(self.step, GraphedStep):
            self.step.state_may_have_changed()

    def save_if_due(self) -> None:
        """Save at the end of an epoch, at a stop, and as often as train.checkpoint_every says, or else so rarely that
        it takes under 1 % of the time."""
        run, every = self.run, self.checkpoint_every
        now = time.monotonic()
        due = run.step % every == 0 if every else now > self.saved + max(1.0, 100 * self.save_seconds)
        if due or run.position == 0 or self.stop.signal:
            self.save()
        if self.stop.signal:
            run.writer.close()
            log.warning("stopped by %s after step %d; go on with\n  %s",
                        self.stop.signal.name, run.step, self.resume_command or "the same call")  # fmt: skip
            self.stop.leave()

    def save(self) -> None:
        """Write a checkpoint. What TensorBoard has been told is on the disk before it."""
        if self.folder is None:
            return
        began = time.monotonic()
        state = {"events": tensorboard.snapshot(self.run.writer, self.folder), **self.about, **self.state_dict()}
        checkpoint.save(self.folder, state, read_back=self.first_save)
        self.first_save = False
        self.saved = time.monotonic()
        self.save_seconds = self.saved - began

    def state_dict(self) -> dict[str, Any]:
        """All that the next batch depends on, and what was counted and measured so far.

        Raises:
            DivergedError: a loss is not finite; nothing that has diverged is kept.
        """
        run = self.run
        if run.losses:
            mean_loss(run.losses, run.step)
        return {
            "step": run.step,
            "epoch": run.epoch,
            "position": run.position,
            "losses": torch.stack(run.losses).cpu() if run.losses else torch.empty(0),
            "metrics": run.metrics,
            "failures": run.failures,
            "seconds": run.seconds + time.monotonic() - self.started,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "extra": self.extra.state_dict(),
            "random": rng.get_state(),
            "backend": asdict(run.backend),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken, but for the random state.

        The caller restores that as the last thing before `fit`, so that nothing draws from it in between.
        """
        run = self.run
        run.model.load_state_dict(state["model"])
        for saved, group in zip(state["optimizer"].get("param_groups", ()), run.optimizer.param_groups, strict=False):
            saved.update({name: group[name] for name in ("fused", "capturable") if name in group})  # of this device
        run.optimizer.load_state_dict(state["optimizer"])
        self.extra.load_state_dict(state.get("extra", {}))
        run.step, run.epoch, run.position = state["step"], state["epoch"], state["position"]
        run.losses = list(state["losses"].to(run.device))
        run.metrics, run.failures, run.seconds = state["metrics"], state["failures"], state["seconds"]
        kept = {k: state["backend"].get(k, False) for k in ("threads", "onednn", "compiled", "channels_last")}
        run.backend = replace(run.backend, **kept)
        if changed := run.backend.changed(state["backend"]):
            log.warning("resumed under other conditions, so that the last bits may differ: %s", "; ".join(changed))
        if run.step:
            run.batch = last_batch(run)


def build_step(run: Run) -> Step:
    """The fastest step that this run can have: plain, compiled, or a CUDA graph of either.

    Trying it changes nothing of the run but run.backend.compiled.
    """
    memory_format = run.backend.memory_format

    def plain(images: Tensor, labels: Tensor) -> Tensor:
        return train_step(run.model, run.optimizer, images.to(memory_format=memory_format), labels)

    step = _compiled(run, plain) if run.backend.compiled else plain
    if step is plain:
        run.backend = replace(run.backend, compiled=False)
    recorder = find_recorder(run)
    if recorder is None:
        return step
    return GraphedStep(step, run.model, run.optimizer, run.cfg.train.batch_size, recorder)


def _compiled(run: Run, plain: Step) -> Step:
    """The step compiled for whole batches and plain for others, or the plain one where the model cannot be compiled."""
    size = run.cfg.train.batch_size
    if datasets.length(run.dataset.train) < size:
        return plain
    try:
        with eval_mode(run.model, 0):
            train_mode(run.model, run.cfg.train.freeze)
            images, labels = run.dataset.take(run.dataset.train, torch.arange(size))
            whole = compile_step(run.model, run.optimizer, images.to(run.device), labels.to(run.device))
    except Exception as error:  # whatever a compiler raises
        log.warning("the model cannot be compiled and is trained without that: %s", first_line(error))
        return plain
    return lambda images, labels: (whole if len(labels) == size else plain)(images, labels)


def find_recorder(run: Run) -> Recorder | None:
    """What can capture this run's step: on CUDA alone, with the data there, and where train.compile is not false."""
    in_memory = isinstance(run.dataset.train, datasets.Split)
    possible = run.device.type == "cuda" and in_memory and run.cfg.train.compile is not False
    return CudaRecorder(run.device) if possible else None


def last_batch(run: Run) -> tuple[Tensor, Tensor]:
    """Recreate the last training batch after a resume: stages read it."""
    cfg, count = run.cfg.train, datasets.length(run.dataset.train)
    epoch, position = divmod(run.step - 1, steps_per_epoch(run.cfg, run.dataset))
    indices = datasets.order(run.cfg.seed, epoch, count)[position * cfg.batch_size :][: cfg.batch_size]
    seed = run.cfg.seed, epoch
    return next(datasets.batches(run.dataset, run.dataset.train, indices, cfg.batch_size, device=run.device, seed=seed))


def mean_loss(losses: list[Tensor], step: int) -> float:
    """The mean of the losses of the batches up to `step`.

    Raises:
        DivergedError: one of them is not finite.
    """
    values = torch.stack(losses).double().cpu()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise DivergedError(step - len(losses) + first + 1, float(values[first]))
    return float(values.mean())
