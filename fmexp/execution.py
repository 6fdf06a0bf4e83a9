"""Executing a run in a folder through its moments (start, log, epoch, end), and going on with it after a stop."""

import importlib.metadata
import logging
import math
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

import fmexp
from fmexp import config, datasets, longer, models, process, rng
from fmexp.build import build, target
from fmexp.engine import distributed
from fmexp.engine.distributed import LostError, World
from fmexp.errors import ConfigError, FmexpError, printable
from fmexp.process import Stop
from fmexp.run import Run, total_steps
from fmexp.rundir import atomic, checkpoint, hparams, layout, lineage, results, rungs, tensorboard
from fmexp.rundir.atomic import disk_full
from fmexp.trainer import DivergedError, Trainer

log = logging.getLogger(__name__)


def execute(
    cfg: DictConfig,
    output_dir: str | Path,
    *,
    hydra_files: Mapping[str, DictConfig | ListConfig] | None = None,
    resume_command: str = "",
    pause_at: int | None = None,
    wait: bool = False,
) -> float:
    """Execute the run of a composed configuration in a folder, or go on with it; its objective, or NaN if it diverged.

    The folder then holds .hydra/, fmexp.log, event files, model.pt and result.json. A complete run is left as it is.

    Args:
        hydra_files: more files for .hydra/, by name.
        resume_command: what to type to go on, printed when a signal stops the run.
        pause_at: after so many batches, or at once if it has done more, evaluate the objective, keep it in rungs.json
            and return it. The next call goes on, and the run's bits are those of one that has not paused.
        wait: while another process is running in the folder, wait: then its result is taken, or its checkpoint.

    Raises:
        ConfigError, DataError: the run cannot begin; the folder is as it was.
        SystemExit: a signal stopped the run after it had saved itself; the status is 128 + the signal's number.
    """
    if process.rank():
        return follow()
    with distributed.lead() as world:
        return _execute(cfg, output_dir, hydra_files, resume_command, pause_at, wait, world)


def follow() -> float:
    """In another process of a run than the first: compute with it what it executes; the objective."""
    command = ""
    with distributed.follow() as world:
        if world is None:
            return math.nan
        with Stop() as stop:
            try:
                given = world.broadcast(None)
                if given is None:  # another command was quicker
                    return math.nan
                cfg, state, command, pause_at = given
                return _follow(world, cfg, state, stop, pause_at)
            except Exception as error:
                explained = world.explain(error, command)
                if not isinstance(explained, FmexpError):
                    raise
                if isinstance(explained, LostError) and world.speaks():  # now: torchrun sends SIGTERM at any moment
                    print(explained, file=sys.stderr, flush=True)
                raise SystemExit(1) from error  # else the first process says why


def _execute(
    cfg: DictConfig, output_dir: str | Path, hydra_files: Mapping[str, DictConfig | ListConfig] | None,
    resume_command: str, pause_at: int | None, wait: bool, world: World | None,
) -> float:  # fmt: skip
    config.check(cfg)
    tree = config.resolved(cfg)
    output_dir = Path(output_dir).absolute()
    layout.check_identity(output_dir, tree, resume=cfg.resume)
    if (objective := _finished(output_dir, tree, pause_at)) is not None:
        _tidy(output_dir, tree)
        return objective
    resumed = checkpoint.exists(output_dir)
    run = build(cfg, resumed=resumed, world=world)
    if world:  # before signals are but noted: an end of another process while it joins would not be seen
        world.join()
    lock = layout.lock(output_dir, wait=wait)
    with lock, _log_file(output_dir / "fmexp.log"), tensorboard.silent_writer(), Stop() as stop:
        layout.check_identity(output_dir, tree, resume=cfg.resume)  # again, for another process may have been here
        if (objective := _finished(output_dir, tree, pause_at)) is not None:
            if world:
                world.broadcast(None)
            return objective
        state = checkpoint.load(output_dir)
        if state:  # .hydra/, which check_identity reads, may have been removed
            layout.check_same(output_dir, state["config"], tree)
            if config.is_longer(state["config"], tree):
                epochs, compiled = state["config"]["train"]["epochs"], state["backend"]["compiled"]
                longer.check(run, output_dir, epochs, step=state["step"], position=state["position"], compiled=compiled)
        elif resumed:  # another process has removed its checkpoint
            run = build(cfg, world=world)
        try:
            if world:
                world.broadcast((config.frozen(cfg), state, resume_command or "the same call", pause_at))
            execution = _Execution(run, output_dir, tree, stop, resume_command, pause_at)
            return execution.go(state, hydra_files or {})
        except Exception as error:
            command = resume_command or "the same call"
            explained = world.explain(error, command) if world else error
            raised = _failed(explained, run, output_dir, tree, command)
            if raised is error:
                raise
            raise raised from error


def _follow(world: World, cfg: DictConfig, state: dict[str, Any] | None, stop: Stop, pause_at: int | None) -> float:
    run = build(cfg, resumed=state is not None, world=world)
    run.writer = tensorboard.NoWriter()  # type: ignore[assignment]
    trainer = Trainer(run, stop=stop, pause_at=pause_at)
    if state:
        trainer.load_state_dict(state)
    try:
        with run.backend.applied():
            trainer.fit()
            if trainer.paused:
                return _value_at_pause(run)
            trainer.finish()
    except DivergedError:
        return math.nan
    finally:
        run.workers.close()
    return run.metrics.get(run.cfg.objective, math.nan)


def _value_at_pause(run: Run) -> float:
    """The objective of a run that has paused, from all of its processes together; NaN where the loss is no number."""
    run.evaluate_together()
    if not math.isfinite(run.evaluation.loss):
        return math.nan
    known = {"loss": run.evaluation.loss, **run.evaluation.metrics}
    return known.get(config.rung_metric(config.resolved(run.cfg)).partition("/")[2], math.nan)


def _failed(error: Exception, run: Run, output_dir: Path, tree: dict[str, Any], command: str) -> Exception:
    """What to raise for an error that ended a run, which is noted in its folder: itself, or one with a message."""
    if full := disk_full(error):
        return FmexpError(
            f"The disk is full: {output_dir} ({full}). What the last checkpoint holds is safe; make space, then go on "
            f"with\n  {command}"
        )
    if isinstance(error, LostError):
        log.error("%s", error)
        return error
    known = error if isinstance(error, FmexpError) else datasets.killed_worker(error)
    said = str(known or f"{type(error).__name__}: {error}")
    log.error("the run failed at step %d: %s", run.step, said, exc_info=None if known else error)
    with suppress(OSError):
        _write_result(run, output_dir, tree, "failed", error=said, lineage=lineage.ended(output_dir))
    return known or error


class _Execution:
    """One process's work on a run: from where its folder stands to the end, or to a signal."""

    def __init__(
        self,
        run: Run,
        output_dir: Path,
        tree: dict[str, Any],
        stop: Stop,
        resume_command: str,
        pause_at: int | None,
    ) -> None:
        self.run, self.output_dir, self.tree = run, output_dir, tree
        self.about = {"config": tree, "config_digest": config.digest(tree), "versions": versions(),
                      "dataset": run.dataset.facts}  # fmt: skip
        self.trainer = Trainer(
            run, folder=output_dir, about=self.about, stop=stop, resume_command=resume_command, pause_at=pause_at
        )

    def go(self, state: dict[str, Any] | None, hydra_files: Mapping[str, DictConfig | ListConfig]) -> float:
        """Go on from a checkpoint's state, or begin; return the objective."""
        run = self.run
        begun = state or layout.holds_run(self.output_dir)
        atomic.remove_leftovers((self.output_dir / layout.CONFIG).parent)
        yaml = layout.write_config(self.output_dir, self.tree, hydra_files)
        text = f"{printable(run.dataset.description)}\n\n```yaml\n{yaml}```"  # a description names a folder
        more = state is not None and config.is_longer(state["config"], self.tree)
        origin = lineage.begin(self.output_dir, self.trainer.resume_command, resumed=state is not None, longer=more)
        (self.output_dir / layout.RESULT).unlink(missing_ok=True)
        if begun:  # else the files here are not ours
            atomic.remove_leftovers(self.output_dir)
            tensorboard.rewind(self.output_dir, state["events"] if state else tensorboard.EMPTY)
        if state:
            if more:  # epochs
                longer.lengthen(run, self.output_dir, state, self.about, text)
            self.trainer.load_state_dict(state)
        run.output_dir = self.output_dir
        run.writer = tensorboard.open_writer(run.cfg.logging, self.output_dir, step=run.step if state else None)
        try:
            self._announce(resumed=state is not None)
            with run.backend.applied():
                if not state:
                    hparams.write_hparams(run.writer, self.output_dir, self.tree, run.backend.processes)
                    run.writer.add_text("config", text, 0)
                    run.writer.add_text("lineage", lineage.text(origin), 0)
                    run.run_stages("start")
                else:  # as the last thing before training, so that nothing draws from it in between
                    rng.set_state(state["random"])
                try:
                    self.trainer.fit()
                    if self.trainer.paused:
                        return self._pause()
                    self.trainer.finish()
                    status = "complete"
                except DivergedError as diverged:
                    log.error("the run diverged: %s. A smaller optimizer.lr is the usual cure.", diverged)
                    if (weights := self.output_dir / layout.WEIGHTS).exists():
                        log.error("the weights of before it was trained further are still there: weights=%s", weights)
                    status, run.step = "diverged", diverged.step
                    run.epoch = (diverged.step - 1) // self.trainer.steps_per_epoch  # wherever it was noticed
            return self._finish(status)
        except BaseException as error:
            with suppress(Exception):  # a writer on a full disk raises once more
                if isinstance(error, Exception) and not disk_full(error):
                    hparams.write_status(run.writer, complete=False)
                run.writer.close()
            raise
        finally:
            run.workers.close()

    def _pause(self) -> float:
        """Evaluate the objective where the last checkpoint was written, and leave no trace of that in the run."""
        run = self.run
        value = _value_at_pause(run)
        run.seconds += time.monotonic() - self.trainer.started
        run.writer.close()
        log.info("paused after step %d: %s %.4f", run.step, config.rung_metric(self.tree), value)
        _write_result(run, self.output_dir, self.tree, "paused", lineage=lineage.ended(self.output_dir))
        rungs.write(self.output_dir, run.step, value)  # last: without it the run is evaluated once more
        return value

    def _finish(self, status: str) -> float:
        run = self.run
        run.seconds += time.monotonic() - self.trainer.started
        run.writer.add_scalar("wall_seconds", run.seconds, run.step)
        origin = lineage.ended(self.output_dir)
        run.writer.add_text("lineage", lineage.text(origin), run.step)
        hparams.write_status(run.writer, status == "complete")
        tensorboard.snapshot(run.writer, self.output_dir)  # so that all is on the disk before result.json says so
        run.writer.close()
        if status == "complete":
            weights = run.kept.state_dict()
            for name, value in weights.items():
                if isinstance(value, torch.Tensor):
                    weights[name] = value.cpu()  # to be read where there is no such device
            with atomic.atomic_open(self.output_dir / "model.pt") as file:
                torch.save(weights, file)
        objective = _write_result(run, self.output_dir, self.tree, status, lineage=origin)
        layout.discard_checkpoints(self.output_dir, status, self.tree)
        self._conclude(status)
        return objective

    def _announce(self, resumed: bool) -> None:
        run = self.run
        data, cfg = run.dataset, run.cfg
        channels, height, width = data.input_shape
        settings = ", ".join(f"{k} {v}" for k, v in self.tree["optimizer"].items() if k != "_target_" and v)
        stages = ", ".join(f"{stage.name} ({stage.when})" for stage in run.stages)
        model = f"{target(cfg.model)} {cfg.model.get('name', '')}".rstrip()
        counts = [sum(p.numel() for p in run.model.parameters() if p.requires_grad >= trained) for trained in (0, 1)]
        trained = f", {counts[1]:,} of them trained" * (counts[0] != counts[1])
        images = " + ".join(
            f"{datasets.length(part):,} {datasets.SPLIT_NAMES[name]}" for name, part in data.splits.items()
        )
        for name, text in (
            ("data", data.description or target(cfg.dataset)),
            ("", f"{images} images of {channels}x{height}x{width}, {len(data.classes)} classes"),
            *([("augment", target(cfg.augment))] if run.augment else []),
            ("model", f"{model}, {counts[0]:,} parameters{trained}"),
            *([("weights", run.begun_from)] if run.begun_from else []),
            ("optimizer", f"{target(cfg.optimizer)}, {settings}"),
            ("training", f"{total_steps(cfg, data):,} batches of {cfg.train.batch_size}, {run.backend}"),
            ("stages", stages or "none"),
        ):
            log.info("%s", _column(name, text))
        log.info("folder     %s", shown(self.output_dir))  # in one piece, to be copied
        if cfg.model.get("pretrained") and (unlike := models.unlike_pretraining(run.model, data, cfg.dataset)):
            log.warning("%s", unlike)
        if resumed:
            log.info("going on from the checkpoint at step %d", run.step)

    def _conclude(self, status: str) -> None:
        run = self.run
        for name, problem in run.failures.items():
            log.warning("stage %s failed, %s", name, problem)
        if status == "complete":
            accuracy, loss = run.metrics["test/accuracy"], run.metrics["test/loss"]
            log.info(
                "test accuracy %.4f, test loss %.4f after %s batches in %.1f s",
                accuracy,
                loss,
                f"{run.step:,}",
                run.seconds,
            )
        logdir = shlex.quote(_logdir(self.output_dir))
        log.info("written to %s; see it with\n  tensorboard --logdir %s", shown(self.output_dir), logdir)


def _column(name: str, text: str) -> str:
    """A name and, beside it, a text that goes on below its beginning where it is wider than the terminal."""
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)  # 100 where the output is a file
    text = text.replace(" (", "\N{NO-BREAK SPACE}(")  # what is in brackets stays with the word before it
    lines = textwrap.fill(
        text, width, initial_indent=f"{name:<11}", subsequent_indent=" " * 11, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "tensorboard")}
    return {"fmexp": fmexp.__version__, **others}


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return printable(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _logdir(output_dir: Path) -> str:
    """The folder of all runs: what runs/ or multirun/ is, or else the run's own folder."""
    return next((shown(p) for p in output_dir.parents if p.name in ("runs", "multirun")), shown(output_dir))


def _finished(output_dir: Path, tree: dict[str, Any], pause_at: int | None) -> float | None:
    """The objective of a run that needs no more work, to the step where it pauses, or None.

    Raises:
        ConfigError: it is to have more epochs, and has no checkpoint to go on from.
    """
    result = layout.read_result(output_dir)
    begun = layout.holds_run(output_dir)
    held = layout.digest(output_dir) if begun else (result or {}).get("config_digest")
    shorter = held != config.digest(tree)  # for `check_identity` has refused all others
    if pause_at and begun and not shorter and (value := rungs.value_at(output_dir, pause_at)) is not None:
        return value
    if not result or result.get("status") not in ("complete", "diverged"):
        return None
    if results.status(output_dir) != result["status"]:
        log.warning("%s is damaged, and the run counts as not ended", output_dir / layout.RESULT)
        return None
    if shorter:
        if result["status"] == "diverged":
            raise ConfigError(
                f"{output_dir} holds a run of fewer epochs that has diverged, at step {result.get('steps')}. Name "
                "another folder; a smaller optimizer.lr is the usual cure."
            )
        if checkpoint.exists(output_dir):
            return None
        longer.refuse(
            f"{output_dir} is complete after {result.get('epochs')} epochs, and has kept no checkpoint to go on from "
            "(train.keep_checkpoint=false).", output_dir,
        )  # fmt: skip
    log.info("%s is %s already; nothing is trained", shown(output_dir), result["status"])
    objective = result.get("objective")
    return math.nan if objective is None else float(objective)


def _tidy(output_dir: Path, tree: dict[str, Any]) -> None:
    """Discard the checkpoints of a run that was killed just before it did so itself, unless a process is at work there,
    or the folder may only be read."""
    if layout.superfluous_checkpoints(output_dir, results.status(output_dir), tree):
        with suppress(OSError, ConfigError), layout.lock(output_dir):
            layout.discard_checkpoints(output_dir, results.status(output_dir), tree)


def _write_result(run: Run, output_dir: Path, tree: dict[str, Any], status: str, **more: Any) -> float:
    objective = run.metrics.get(run.cfg.objective, math.nan) if status == "complete" else math.nan
    result = {
        "status": status,
        "objective": objective if math.isfinite(objective) else None,
        "metrics": {tag: value if math.isfinite(value) else None for tag, value in run.metrics.items()},
        "steps": run.step,
        "epochs": run.epoch,
        "best_epoch": run.best_epoch,
        "seconds": round(run.seconds, 3),
        "config_digest": config.digest(tree),
        "failures": run.failures,
        "backend": asdict(run.backend),
        "evaluation_backend": asdict(run.evaluation_backend),
        "dataset": run.dataset.facts,
        "versions": versions(),
        "tags": tree["tags"],
        "note": tree["note"],
        **more,
    }
    layout.write_result(output_dir, result)
    return objective


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append all log lines to a file, with the time; the file is made by its first line."""
    handler = _LogFile(path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("fmexp")
    level = ours.level
    ours.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with suppress(OSError):
            handler.close()
        ours.setLevel(level)


class _LogFile(logging.FileHandler):
    """A log that says nothing of a full disk: what the run itself cannot write is reported, and once."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
