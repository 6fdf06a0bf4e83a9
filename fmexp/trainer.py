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
from fmexp.config import maximised
from fmexp.engine.compile import compiled_backward
from fmexp.engine.cuda_graph import CudaRecorder, GraphedStep, Recorder
from fmexp.engine.data_parallel import DataParallel
from fmexp.engine.evaluation import Evaluation
from fmexp.engine.extra_state import ExtraState
from fmexp.engine.freeze import train_mode
from fmexp.engine.schedule import Following, LearningRate, varies
from fmexp.engine.selection import Selection
from fmexp.engine.step import Backward, LastUpdate, Step, TrainStep, plain_backward
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
        pause_at: end `fit` after so many steps, with a checkpoint there; None: only at the end of the training.
    """

    def __init__(
        self,
        run: Run,
        *,
        folder: Path | None = None,
        about: dict[str, Any] | None = None,
        stop: Stop | None = None,
        resume_command: str = "",
        pause_at: int | None = None,
    ) -> None:
        self.run, self.folder, self.about = run, folder, about or {}
        self.pause_at = pause_at
        self.stop, self.resume_command = stop or Stop(), resume_command
        if run.world:
            run.world.stop.own, self.stop = self.stop, run.world.stop
        self.train_step = TrainStep(run.model, run.optimizer, clip_grad=run.cfg.train.clip_grad)
        self.step: Step | None = None  # the same, perhaps as a graph
        if any(stage.reads_last_update for stage in run.stages):
            self.train_step.last_update = run.last_update = LastUpdate(run.optimizer)
        cfg = run.cfg.train
        self.batch_size = cfg.batch_size  # here, for OmegaConf is slow in a loop
        self.log_every, self.checkpoint_every, self.accumulate = cfg.log_every, cfg.checkpoint_every, cfg.accumulate
        self.steps_per_epoch = steps_per_epoch(run.cfg, run.dataset)
        self.total_steps = total_steps(run.cfg, run.dataset)
        self.rate = LearningRate(run.optimizer, run.schedule, self.total_steps)
        self.started = time.monotonic()
        self.saved, self.save_seconds = self.started, 0.05  # when the last checkpoint was written, and how long it took
        self.first_save = True
        self.extra = ExtraState(run.model, run.optimizer, checkpoint.can_keep)
        self.selection = Selection(
            maximised=maximised(run.cfg.objective), keep=cfg.keep == "best" and run.cfg.objective.startswith("val/"),
            patience=cfg.patience, min_delta=cfg.min_delta,
        )  # fmt: skip

    @property
    def paused(self) -> bool:
        """Whether `fit` has ended before the training has."""
        return self.run.step < self.total_steps and not self.selection.exhausted

    def fit(self) -> None:
        """Train to the end, or to `pause_at`.

        Raises:
            DivergedError: the loss is not a finite number any more.
            SystemExit: a signal stopped the run, after it was saved.
        """
        run, seed = self.run, self.run.cfg.seed
        step = self.step = self.build_step()
        until = min(self.total_steps, self.pause_at or self.total_steps)
        # tqdm reads its variable at import alone, and not where `disable` is given. None: shown on a terminal alone.
        hidden = True if os.environ.get("TQDM_DISABLE") or (run.world and run.world.rank) else None
        bar = tqdm(
            total=self.total_steps, initial=run.step, unit=" batches", disable=hidden, leave=False, dynamic_ncols=True
        )
        with bar, datasets.Workers(run.dataset, run.cfg.train.num_workers, run.device) as workers:
            while run.step < until and not self.selection.exhausted:
                order = datasets.order(seed, run.epoch, datasets.length(run.dataset.train))
                rest = order[run.position * self.batch_size :]  # of an epoch that was begun before a stop
                train_mode(run.model, run.cfg.train.freeze)
                for images, labels in datasets.batches(
                    run.dataset, run.dataset.train, rest, self.batch_size,
                    device=run.device, workers=workers, seed=(seed, run.epoch),
                    raw=run.augment is not None,  # else it normalises many small batches at a time
                    own=run.world.own if run.world else None,
                ):  # fmt: skip
                    if run.world:
                        whole = min(self.batch_size, len(order) - run.position * self.batch_size)
                        every = run.augment is not None
                        images, labels = run.world.gather_batch(images, labels, whole, all_images=every)
                    if run.augment is not None:
                        images, labels = run.augmented(images, labels, run.step)
                    run.batch = images, labels
                    self.rate.set(run.step)
                    if self.accumulate > 1:
                        self.enter_window(len(labels))
                    loss = step(images, labels)
                    self.after_step(loss)
                    bar.update()
                    if run.step == until:  # train.max_steps may cut an epoch short
                        break

    def build_step(self) -> Step:
        """The fastest step that this run can have: plain, compiled, or a CUDA graph of either."""
        run = self.run
        self.train_step.backward = build_backward(run)
        self.share_changes("start")
        recorder = find_recorder(run)
        if recorder is None:
            return self.train_step
        if varies(run.schedule):
            self.rate.on_device(run.device)
        return GraphedStep(self.train_step, run.model, run.optimizer, self.batch_size, recorder)

    def enter_window(self, images: int) -> None:
        """Tell the step where a batch of so many images stands in its window of train.accumulate batches; the last
        window of an epoch, or of the run, has those that are left."""
        run, step = self.run, self.train_step
        first = run.position - run.position % self.accumulate
        end = min(first + self.accumulate, self.steps_per_epoch, run.position + self.total_steps - run.step)
        count = min(end * self.batch_size, datasets.length(run.dataset.train)) - first * self.batch_size
        step.begins, step.ends, step.share = run.position == first, run.position + 1 == end, images / count

    def after_step(self, loss: Tensor) -> None:
        """Count a step, and do what is due after it: running loss, end of an epoch, checkpoint, stop."""
        run = self.run
        if run.average and self.train_step.ends:
            run.average.update_parameters(run.model)
        run.losses.append(loss)
        run.step += 1
        if run.world and not loss.isfinite():
            mean_loss(run.losses, run.step)  # now, and not when the first process alone saves itself: all end together
        run.position += 1
        run.forget_evaluations()
        if run.step % self.log_every == 0:  # at the end, too, `finish` logs the rest: a longer run has no point there
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
        if (rate := self.rate.value) is not None:  # no metrics, this and the norm: nobody ranks runs by them
            run.writer.add_scalar("train/lr", rate, run.step)
        if run.cfg.train.clip_grad is not None:
            run.writer.add_scalar("train/grad_norm", float(self.train_step.grad_norm), run.step)
        log.info("step %d: %s %.4f", run.step, run.cfg.train.tag, loss)
        self.run_stages("log")

    def end_epoch(self) -> None:
        """Evaluate, and execute the stages on `epoch`."""
        run = self.run
        if run.losses:
            mean_loss(run.losses, run.step)  # a model that has diverged is not evaluated
        evaluation = self.evaluate()
        run.scalar("train/accuracy", run.evaluate_images("train", self.recent_images()).accuracy)
        best = f"{run.split}/accuracy/best"  # for HPARAMS, which knows the last value alone
        run.scalar(best, max(evaluation.accuracy, run.metrics.get(best, 0.0)))
        if (objective := run.metrics.get(run.cfg.objective)) is not None:  # train.tag comes with train.log_every
            self.selection.after_epoch(objective, run.epoch, run.metrics, run.kept)
            if isinstance(run.schedule, Following):
                run.schedule.after_epoch(objective)
        of = run.split_name
        log.info("epoch %d: %s accuracy %.4f, %s loss %.4f",
                 run.epoch, of, evaluation.accuracy, of, evaluation.loss)  # fmt: skip
        self.run_stages("epoch")

    def recent_images(self) -> Tensor:
        """Which images the last batches of an epoch that has ended were of: a fiftieth of the training split, which
        costs little beside the epoch, but 100 at least. int64 [N], in the order of training."""
        run, epoch = self.run, self.run.epoch - 1
        count = datasets.length(run.dataset.train)
        trained = (run.step - epoch * self.steps_per_epoch) * self.batch_size
        return datasets.order(run.cfg.seed, epoch, count)[:trained][-max(100, count // 50) :]

    def evaluate(self) -> Evaluation:
        """Evaluate the split that is looked at now, and write its metrics."""
        run = self.run
        run.evaluate_together()
        if not math.isfinite(run.evaluation.loss):
            raise DivergedError(run.step, run.evaluation.loss)
        return run.write_metrics()

    def finish(self) -> None:
        """After training: take the weights that are kept, evaluate the test split, where that is not done at each
        epoch, and execute the stages on `end`."""
        run, best = self.run, self.selection.best
        if run.losses:
            self.log()
        if self.selection.exhausted and run.step < self.total_steps:
            log.info("ended early: %s has not improved for %d epochs", run.cfg.objective, self.selection.waited)
        if self.selection.weights:
            run.kept.load_state_dict(self.selection.weights)
            run.metrics.update({tag: value for tag, value in best["metrics"].items() if tag.startswith("val/")})
            run.best_epoch = best["epoch"]
            log.info("kept: the weights of epoch %d, %s %.4f", best["epoch"], run.cfg.objective, best["score"])
        if run.split == "val":
            run.split = "test"
            run.forget_evaluations()
            self.evaluate()
        self.run_stages("end")

    def run_stages(self, moment: str) -> None:
        """Execute the stages of a moment, and tell a graph of the step that they may have changed something."""
        run = self.run
        if len(run.batch[0]) < len(run.batch[1]) and any(stage.when == moment for stage in run.stages):
            run.batch = last_batch(run)  # whole: of data that is loaded each of several processes has its part
        run.run_stages(moment)
        self.share_changes(moment)
        if isinstance(self.step, GraphedStep):
            self.step.state_may_have_changed()

    def share_changes(self, moment: str) -> None:
        """Give the other processes what stages that change the model or the optimizer have changed."""
        run = self.run
        if run.world and any(stage.when == moment and stage.changes for stage in run.stages):
            model, optimizer = run.world.broadcast((run.model.state_dict(), run.optimizer.state_dict()))
            run.model.load_state_dict(model)
            run.optimizer.load_state_dict(optimizer)

    def save_if_due(self) -> None:
        """Save at the end of an epoch, at a stop, and as often as train.checkpoint_every says, or else so rarely that
        it takes under 1 % of the time."""
        run, every = self.run, self.checkpoint_every
        now = time.monotonic()
        due = run.step % every == 0 if every else now > self.saved + max(1.0, 100 * self.save_seconds)
        if due or run.position == 0 or run.step == self.pause_at or self.stop.signal:
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
            "lr_factor": self.rate.factor,
            "schedule": run.schedule.state_dict() if isinstance(run.schedule, Following) else {},
            "average": run.average.state_dict() if run.average else {},
            "grad_norm": self.train_step.grad_norm,
            "last_update": run.last_update.state_dict() if run.last_update else {},
            # of a window that is not full; else the next step begins by forgetting them
            "gradients": [] if self.train_step.ends else [p.grad for p in run.model.parameters()],
            "extra": self.extra.state_dict(),
            "selection": self.selection.state_dict(),
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
            if "lr" in saved:
                saved["lr"] = float(saved["lr"])  # on CUDA it was a tensor, perhaps
        run.optimizer.load_state_dict(state["optimizer"])
        self.rate.factor = state["lr_factor"]
        if isinstance(run.schedule, Following):
            run.schedule.load_state_dict(state["schedule"])
        if run.average:
            run.average.load_state_dict(state["average"])
        self.train_step.grad_norm.copy_(state["grad_norm"])
        if run.last_update:
            run.last_update.load_state_dict(state["last_update"])
        for parameter, gradient in zip(run.model.parameters(), state["gradients"], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.extra.load_state_dict(state.get("extra", {}))
        self.selection.load_state_dict(state["selection"])
        run.step, run.epoch, run.position = state["step"], state["epoch"], state["position"]
        run.losses = list(state["losses"].to(run.device))
        run.metrics, run.failures, run.seconds = state["metrics"], state["failures"], state["seconds"]
        if state["backend"].get("processes", 1) == run.backend.processes:
            kept = {k: state["backend"].get(k, False) for k in ("threads", "onednn", "compiled", "channels_last")}
            run.backend = replace(run.backend, **kept)
        if changed := run.backend.changed(state["backend"]):
            log.warning("resumed under other conditions, so that the last bits may differ: %s", "; ".join(changed))
        if run.step:
            run.batch = last_batch(run)


def build_backward(run: Run) -> Backward:
    """Plain, or compiled for whole batches where run.backend says so and the model can be compiled.

    Trying it changes nothing of the run but run.backend.compiled.
    """
    size, memory_format, precision = run.cfg.train.batch_size, run.backend.memory_format, run.cfg.train.precision
    if run.world:
        if run.cfg.train.compile is True:
            log.warning("train.compile=true: the step of several processes is not compiled")
        return DataParallel(
            run.world, run.model, run.loss, precision, memory_format=memory_format,
            sync_batchnorm=run.cfg.train.sync_batchnorm, unused=has_unused_parameters(run),
        )  # fmt: skip
    in_order = plain_backward(run.model, run.loss, precision)

    def plain(images: Tensor, labels: Tensor, factor: float) -> Tensor:
        return in_order(images.to(memory_format=memory_format), labels, factor)

    whole: Backward = plain
    if run.backend.compiled and datasets.length(run.dataset.train) >= size:
        try:
            with eval_mode(run.model, 0):
                train_mode(run.model, run.cfg.train.freeze)
                images, labels = run.dataset.take(run.dataset.train, torch.arange(size), raw=True)
                batch = run.augmented(images.to(run.device), labels.to(run.device), 0)
                whole = compiled_backward(run.model, *batch, run.loss, precision)
        except Exception as error:  # whatever a compiler raises
            log.warning("the model cannot be compiled and is trained without that: %s", first_line(error))
    if whole is plain:
        run.backend = replace(run.backend, compiled=False)
        return plain
    return lambda images, labels, factor: (whole if len(labels) == size else plain)(images, labels, factor)


def has_unused_parameters(run: Run) -> bool:
    """Whether training leaves out some of the parameters that it could train: DistributedDataParallel wants to know."""
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    with eval_mode(run.model, 0):
        train_mode(run.model, run.cfg.train.freeze)
        loss = run.model(run.batch[0][:2]).sum()
        return any(gradient is None for gradient in torch.autograd.grad(loss, parameters, allow_unused=True))


def find_recorder(run: Run) -> Recorder | None:
    """What can capture this run's step: on CUDA alone, with the data there, and where train.compile is not false.

    Steps of several batches (train.accumulate) are not all alike.
    """
    in_memory, cfg = isinstance(run.dataset.train, datasets.Split), run.cfg.train
    alone = in_memory and cfg.accumulate == 1 and run.world is None
    possible = run.device.type == "cuda" and alone and cfg.compile is not False
    return CudaRecorder(run.device) if possible else None


def last_batch(run: Run) -> tuple[Tensor, Tensor]:
    """Recreate the last training batch after a resume: stages read it."""
    cfg, count = run.cfg.train, datasets.length(run.dataset.train)
    epoch, position = divmod(run.step - 1, steps_per_epoch(run.cfg, run.dataset))
    indices = datasets.order(run.cfg.seed, epoch, count)[position * cfg.batch_size :][: cfg.batch_size]
    how: dict[str, Any] = {"device": run.device, "seed": (run.cfg.seed, epoch), "raw": True}
    how["own"] = (lambda every: every) if run.world else None
    images, labels = next(datasets.batches(run.dataset, run.dataset.train, indices, cfg.batch_size, **how))
    return run.augmented(images, labels, run.step - 1)


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
