"""A run: built from a configuration, executed through its moments (start, log, epoch, end), resumed after a stop."""

import errno
import importlib.metadata
import inspect
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

import fmexp
from fmexp import backend, checkpoint, config, datasets, disk, events, folder, randomness
from fmexp import train as training
from fmexp.errors import ConfigError, FmexpError
from fmexp.evaluate import BATCH, Evaluation, evaluate
from fmexp.stop import Stop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage as its YAML has it: call `function(run)` on the moment `on`."""

    name: str
    on: str
    required: bool
    function: Callable[["Run"], None]


@dataclass
class Run:
    """What a stage may look at, and where it writes.

    Attributes:
        step: batches trained on; the global step of all that is written.
        epoch, position: finished epochs, and batches done in the current one.
        batch: the latest training batch, normalised float32 [B, C, H, W] and int64 [B], on the device; before
            training a random one.
        losses: of the batches since the last running loss.
        metrics: the latest value of each metric.
        failures: stage name -> what went wrong.
    """

    cfg: DictConfig
    device: torch.device
    dataset: datasets.Dataset
    model: nn.Module
    optimizer: Optimizer
    stages: list[Stage]
    batch: tuple[Tensor, Tensor]
    backend: backend.Backend
    step: int = 0
    epoch: int = 0
    position: int = 0
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    output_dir: Path = field(init=False)
    writer: SummaryWriter = field(init=False)
    _evaluation: tuple[int, Evaluation] | None = None

    @property
    def evaluation(self) -> Evaluation:
        """What the model, as it is now, says of the test split: one pass, kept until the next batch."""
        if self._evaluation is None or self._evaluation[0] != self.step:
            with looking(self.model, randomness.key(self.cfg.seed, "evaluation")):
                how = backend.choose(self.model, self.batch[0][:1], BATCH)
                with how.applied():
                    done = evaluate(
                        self.model, self.dataset, device=self.device, num_workers=self.cfg.train.num_workers
                    )
            self._evaluation = self.step, done
        return self._evaluation[1]

    def scalar(self, tag: str, value: float) -> None:
        """Write a metric at the current step."""
        self.metrics[tag] = float(value)  # NumPy's numbers would make a checkpoint unreadable
        self.writer.add_scalar(tag, value, self.step)

    def happen(self, moment: str) -> None:
        """Execute the stages that are attached to a moment, in the order of the configuration."""
        for stage in self.stages:
            if stage.on == moment:
                self._execute(stage)

    def _execute(self, stage: Stage) -> None:
        try:
            with looking(self.model, randomness.key(self.cfg.seed, stage.name, self.step)):
                stage.function(self)
        except Exception as error:
            if stage.required or disk_full(error):
                raise
            log.exception("stage %s failed at step %d; the run goes on without it", stage.name, self.step)
            self.failures[stage.name] = f"step {self.step}: {type(error).__name__}: {error}"


@contextmanager
def looking(model: nn.Module, seed: int) -> Iterator[None]:
    """Look at a model in eval mode and leave modes, gradients, buffers (BatchNorm's) and random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with randomness.forked(seed):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def build(cfg: DictConfig) -> Run:
    """Build all that a run is made of, and touch no folder.

    Raises:
        ConfigError, DataError: something cannot be built; the message names the key and the way out.
    """
    device = backend.find_device(cfg.device)
    randomness.seed_all(cfg.seed)
    stages = [_stage(name, node) for name, node in cfg.stage.items() if node.get("enabled", True)]
    _bound("logging", cfg.logging, cfg.logging, log_dir="", comment="", purge_step=None)
    try:
        dataset = datasets.load(cfg.dataset)
    except Exception as error:
        raise _unbuildable("dataset", cfg.dataset, error) from error
    _check_kind("dataset", cfg.dataset, dataset, datasets.Dataset)
    datasets.check(dataset)
    shape, classes = dataset.input_shape, len(dataset.classes)
    given = f"dataset {_target(cfg.dataset)} gives images of {'x'.join(map(str, shape))} and {classes} classes"
    randomness.seed_all(cfg.seed)  # so that the weights do not depend on how the data was made
    try:
        model = hydra.utils.instantiate(cfg.model, _convert_="all", input_shape=shape, num_classes=classes)
    except Exception as error:
        raise _unbuildable("model", cfg.model, error, given) from error
    _check_kind("model", cfg.model, model, nn.Module)
    model = model.to(device)
    with randomness.forked(randomness.key(cfg.seed, "batch")):
        dataset = dataset.to(device)
        images, labels = (part.to(device) for part in dataset.sample(cfg.train.batch_size))
    with looking(model, cfg.seed):
        _check_model(cfg.model, model, images[:2], classes, given)
        steps = training.total_steps(cfg, dataset)
        how = backend.choose(model, images[:2], cfg.train.batch_size, compiled=cfg.train.compile, steps=steps)
    try:
        optimizer = training.build_optimizer(cfg.optimizer, model)
    except Exception as error:
        raise _unbuildable("optimizer", cfg.optimizer, error) from error
    _check_kind("optimizer", cfg.optimizer, optimizer, Optimizer)
    return Run(cfg, device, dataset, model, optimizer, stages, (images, labels), how)


def execute(
    cfg: DictConfig,
    output_dir: str | Path,
    *,
    hydra_files: Mapping[str, DictConfig | ListConfig] | None = None,
    resume_command: str = "",
) -> float:
    """Execute the run of a composed configuration in a folder, or go on with it, and return its objective.

    The folder holds afterwards: .hydra/config.yaml, fmexp.log, events.out.tfevents.*, model.pt and result.json.
    A run that is complete there already returns what it had; one that diverged returns NaN.

    Args:
        hydra_files: more files for .hydra/, by name.
        resume_command: what to type to go on, printed when a signal stops the run.

    Raises:
        ConfigError, DataError: the run cannot begin; the folder is as it was.
        SystemExit: a signal stopped the run after it had saved itself; the status is 128 + the signal's number.
    """
    config.check(cfg)
    tree = config.resolved(cfg)
    output_dir = Path(output_dir).absolute()
    folder.check_identity(output_dir, tree, resume=cfg.resume)
    if (objective := _finished(output_dir)) is not None:
        return objective
    run = build(cfg)
    with folder.locked(output_dir), _log_file(output_dir / "fmexp.log"), events.silent_writer(), Stop() as stop:
        folder.check_identity(output_dir, tree, resume=cfg.resume)  # again, for another process may have been here
        if (objective := _finished(output_dir)) is not None:
            return objective
        state = checkpoint.load(output_dir)
        if state:  # .hydra/, which check_identity reads, may have been removed
            folder.check_same(output_dir, state["config"], tree)
        try:
            return _Execution(run, output_dir, tree, stop, resume_command).go(state, hydra_files or {})
        except Exception as error:
            if full := disk_full(error):
                raise FmexpError(
                    f"The disk is full: {output_dir} ({full}). What the last checkpoint holds is safe; make space, "
                    f"then go on with\n  {resume_command or 'the same call'}"
                ) from error
            log.exception("the run failed at step %d", run.step)
            with suppress(OSError):
                _write_result(run, output_dir, tree, "failed", error=f"{type(error).__name__}: {error}")
            raise


class _Execution:
    """One process's work on a run: from where its folder stands to the end, or to a signal."""

    def __init__(self, run: Run, output_dir: Path, tree: dict[str, Any], stop: Stop, resume_command: str) -> None:
        self.run, self.output_dir, self.tree, self.stop = run, output_dir, tree, stop
        self.resume_command = resume_command
        self.started = time.monotonic()
        self.saved, self.cost = self.started, 0.05  # when the last checkpoint was written, and the seconds that it took
        self.checkpoint_every = run.cfg.train.checkpoint_every  # here, for OmegaConf takes its time at every step
        self.read_back = True  # whether the next checkpoint is the first of this process

    def go(self, state: dict[str, Any] | None, hydra_files: Mapping[str, DictConfig | ListConfig]) -> float:
        """Go on from a checkpoint's state, or begin; return the objective."""
        run = self.run
        begun = state or folder.holds_run(self.output_dir)
        disk.clear((self.output_dir / folder.CONFIG).parent)
        text = folder.write_config(self.output_dir, self.tree, hydra_files)
        (self.output_dir / folder.RESULT).unlink(missing_ok=True)
        if begun:  # else what stands here is not ours
            disk.clear(self.output_dir)
            events.rewind(self.output_dir, state["events"] if state else events.EMPTY)
        if state:
            self._restore(state)
        run.output_dir = self.output_dir
        run.writer = events.open_writer(run.cfg.logging, self.output_dir, step=run.step if state else None)
        try:
            self._announce(resumed=state is not None)
            with run.backend.applied():
                if not state:
                    events.write_hparams(run.writer, self.output_dir, self.tree)
                    run.writer.add_text("config", f"{run.dataset.description}\n\n```yaml\n{text}```", 0)
                    run.happen("start")
                else:  # as the last thing before training, so that nothing draws from it in between
                    randomness.restore(state["random"])
                try:
                    training.train(run, on_log=self._log, on_epoch=self._epoch, on_step=self._step)
                    run.happen("end")
                    status = "complete"
                except training.DivergedError as diverged:
                    log.error("the run diverged: %s. A smaller optimizer.lr is the usual cure.", diverged)
                    status, run.step = "diverged", diverged.step
            return self._finish(status)
        except BaseException as error:
            with suppress(Exception):  # a writer on a full disk raises once more
                if isinstance(error, Exception) and not disk_full(error):
                    events.write_status(run.writer, complete=False)
                run.writer.close()
            raise

    def _finish(self, status: str) -> float:
        run = self.run
        run.seconds += time.monotonic() - self.started
        run.writer.add_scalar("seconds", run.seconds, run.step)
        events.write_status(run.writer, status == "complete")
        events.snapshot(run.writer, self.output_dir)  # so that all is on the disk before result.json says so
        run.writer.close()
        if status == "complete":
            with disk.whole(self.output_dir / "model.pt") as file:
                torch.save(run.model.state_dict(), file)
        objective = _write_result(run, self.output_dir, self.tree, status)
        checkpoint.discard(self.output_dir)
        self._conclude(status)
        return objective

    def _log(self) -> None:
        run = self.run
        loss = training.mean_loss(run.losses, run.step)
        run.losses.clear()
        run.scalar(run.cfg.train.tag, loss)
        log.info("step %d: %s %.4f", run.step, run.cfg.train.tag, loss)
        run.happen("log")

    def _epoch(self) -> None:
        run = self.run
        if run.losses:
            training.mean_loss(run.losses, run.step)  # what has diverged is not evaluated
        run.scalar("test/loss", run.evaluation.loss)
        run.scalar("test/accuracy", run.evaluation.accuracy)
        best = "test/accuracy/best"  # for HPARAMS, which knows the last value alone
        run.scalar(best, max(run.evaluation.accuracy, run.metrics.get(best, 0.0)))
        log.info(
            "epoch %d: test accuracy %.4f, test loss %.4f", run.epoch, run.evaluation.accuracy, run.evaluation.loss
        )
        run.happen("epoch")

    def _step(self) -> None:
        run, every = self.run, self.checkpoint_every
        due = run.step % every == 0 if every else time.monotonic() > self.saved + max(1.0, 100 * self.cost)
        if due or run.position == 0 or self.stop.signal:
            self._save()
        if self.stop.signal:
            run.writer.close()
            log.warning("stopped by %s after step %d; go on with\n  %s",
                        self.stop.signal.name, run.step, self.resume_command or "the same call")  # fmt: skip
            self.stop.leave()

    def _save(self) -> None:
        run, began = self.run, time.monotonic()
        if run.losses:
            training.mean_loss(run.losses, run.step)  # nothing that has diverged is kept
        state = {
            "events": events.snapshot(run.writer, self.output_dir),
            "config": self.tree,
            "config_digest": config.digest(self.tree),
            "step": run.step,
            "epoch": run.epoch,
            "position": run.position,
            "losses": torch.stack(run.losses).cpu() if run.losses else torch.empty(0),
            "metrics": run.metrics,
            "failures": run.failures,
            "seconds": run.seconds + began - self.started,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "random": randomness.capture(),
            "backend": asdict(run.backend),
            "versions": versions(),
        }
        checkpoint.save(self.output_dir, state, read_back=self.read_back)
        self.read_back = False
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def _restore(self, state: dict[str, Any]) -> None:
        run = self.run
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.epoch, run.position = state["step"], state["epoch"], state["position"]
        run.losses = list(state["losses"].to(run.device))
        run.metrics, run.failures, run.seconds = state["metrics"], state["failures"], state["seconds"]
        kept = {name: state["backend"][name] for name in ("threads", "onednn", "compiled")}
        run.backend = replace(run.backend, **kept)
        if changed := run.backend.changed(state["backend"]):
            log.warning("resumed under other conditions, so that the last bits may differ: %s", "; ".join(changed))
        if run.step:
            run.batch = training.latest_batch(run)

    def _announce(self, resumed: bool) -> None:
        run = self.run
        data, cfg = run.dataset, run.cfg
        channels, height, width = data.input_shape
        settings = ", ".join(f"{k} {v}" for k, v in self.tree["optimizer"].items() if k != "_target_" and v)
        log.info("data       %s", data.description or _target(cfg.dataset))
        log.info("           %s training + %s test images of %dx%dx%d, %d classes", f"{datasets.length(data.train):,}",
                 f"{datasets.length(data.test):,}", channels, height, width, len(data.classes))  # fmt: skip
        log.info(
            "model      %s, %s parameters", _target(cfg.model), f"{sum(p.numel() for p in run.model.parameters()):,}"
        )
        log.info("optimizer  %s, %s", _target(cfg.optimizer), settings)
        log.info(
            "training   %s batches of %d, %s", f"{training.total_steps(cfg, data):,}", cfg.train.batch_size, run.backend
        )
        log.info("stages     %s", ", ".join(f"{stage.name} ({stage.on})" for stage in run.stages) or "none")
        log.info("folder     %s", shown(self.output_dir))
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
        log.info(
            "written to %s; see it with\n  tensorboard --logdir %s", shown(self.output_dir), _logdir(self.output_dir)
        )


def disk_full(error: BaseException | None) -> OSError | None:
    """The error of a full disk that an exception is, or comes from: torch.save and Hydra put it into another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "tensorboard")}
    return {"fmexp": fmexp.__version__, **others}


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _logdir(output_dir: Path) -> str:
    """The folder of all runs: what runs/ or multirun/ is, or else the run's own folder."""
    return next((shown(p) for p in output_dir.parents if p.name in ("runs", "multirun")), shown(output_dir))


def _finished(output_dir: Path) -> float | None:
    """The objective of a run that needs no more work, or None."""
    result = folder.read_result(output_dir)
    if not result or result.get("status") not in ("complete", "diverged"):
        return None
    with suppress(OSError):  # a folder that may only be read
        checkpoint.discard(output_dir)  # if the process was killed just before it did so itself
    log.info("%s is %s already; nothing is trained", shown(output_dir), result["status"])
    return math.nan if result["objective"] is None else float(result["objective"])


def _write_result(run: Run, output_dir: Path, tree: dict[str, Any], status: str, **more: str) -> float:
    objective = run.metrics.get(run.cfg.objective, math.nan) if status == "complete" else math.nan
    result = {
        "status": status,
        "objective": objective if math.isfinite(objective) else None,
        "metrics": {tag: value if math.isfinite(value) else None for tag, value in run.metrics.items()},
        "steps": run.step,
        "seconds": round(run.seconds, 3),
        "config_digest": config.digest(tree),
        "failures": run.failures,
        "backend": asdict(run.backend),
        "versions": versions(),
        **more,
    }
    folder.write_result(output_dir, result)
    return objective


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append all log lines to a file, with the time; the file is made by its first line."""
    handler = _LogFile(path, delay=True)
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


def _unbuildable(key: str, node: DictConfig, error: BaseException, given: str = "") -> FmexpError:
    """The message for a target that cannot be imported or called, from Hydra's chain of exceptions."""
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, FmexpError):
        return cause
    target, said = f"{key}._target_={node._target_}", str(cause) or type(cause).__name__
    hint = f"\n{given}." if given else ""
    if isinstance(cause, ImportError | InstantiationException):
        return ConfigError(f"{target} cannot be imported: {said}\nCode of your own must be installed or on PYTHONPATH.")
    if isinstance(cause, TypeError) and "argument" in said:
        with suppress(Exception):
            hint = f"\nIts arguments are {', '.join(_arguments(node)) or 'those that fmexp gives alone'}."
    return ConfigError(f"{target} cannot be built: {said}{hint}")


def _arguments(node: DictConfig) -> list[str]:
    """The names of a target's arguments, but for those that fmexp gives it."""
    ours = ("run", "params", "input_shape", "num_classes", "log_dir")
    return [name for name in inspect.signature(hydra.utils.get_method(node._target_)).parameters if name not in ours]


def _bound(key: str, node: DictConfig, arguments: Any, *given: Any, **known: Any) -> Callable[..., Any]:
    """The target of `node` with its arguments, after a check that it can be imported and takes them."""
    try:
        function: partial[Any] = hydra.utils.instantiate(arguments, _partial_=True, _convert_="all")
        inspect.signature(function.func).bind(*given, *function.args, **{**function.keywords, **known})
    except Exception as error:
        raise _unbuildable(key, node, error) from error
    return function


def _stage(name: str, node: DictConfig) -> Stage:
    arguments = {k: v for k, v in node.items() if k not in ("enabled", "on", "required")}
    function = _bound(f"stage.{name}", node, arguments, None)
    return Stage(name, str(getattr(node.on, "name", node.on)), bool(node.get("required", False)), function)


def _check_kind(key: str, node: DictConfig, made: object, kind: type) -> None:
    if not isinstance(made, kind):
        needed = f"{kind.__module__}.{kind.__qualname__}"
        raise ConfigError(f"{key}._target_={node._target_} returned {type(made).__name__} where {needed} is needed.")


def _check_model(node: DictConfig, model: nn.Module, images: Tensor, classes: int, given: str) -> None:
    try:
        with torch.no_grad():
            shape = tuple(model(images).shape)
    except Exception as error:
        raise ConfigError(f"model._target_={node._target_} cannot take the images: {given}. {error}") from error
    if shape != (len(images), classes):
        raise ConfigError(
            f"model._target_={node._target_} returns {shape} for {len(images)} images where logits "
            f"({len(images)}, {classes}) are needed: {given}."
        )


def _target(node: DictConfig) -> str:
    return str(node._target_).rpartition(".")[2]
