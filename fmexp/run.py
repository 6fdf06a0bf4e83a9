"""A run as its stages see it: what they may look at, and how they are executed without disturbing the training."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from fmexp import datasets, randomness
from fmexp.backend import Backend
from fmexp.evaluate import Evaluation, evaluate

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
        backend, evaluation_backend: how the training and the evaluation are computed.
        executed: how many stages were, by this process.
    """

    cfg: DictConfig
    device: torch.device
    dataset: datasets.Dataset
    model: nn.Module
    optimizer: Optimizer
    stages: list[Stage]
    batch: tuple[Tensor, Tensor]
    backend: Backend
    evaluation_backend: Backend
    step: int = 0
    epoch: int = 0
    position: int = 0
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    output_dir: Path = field(init=False)
    writer: SummaryWriter = field(init=False)
    executed: int = field(default=0, init=False)
    _evaluation: tuple[int, Evaluation] | None = None

    @property
    def evaluation(self) -> Evaluation:
        """What the model, as it is now, says of the test split: one pass, kept until the next batch."""
        if self._evaluation is None or self._evaluation[0] != self.step:
            how = self.evaluation_backend
            with looking(self.model, randomness.key(self.cfg.seed, "evaluation")), how.applied():
                done = evaluate(
                    self.model,
                    self.dataset,
                    device=self.device,
                    num_workers=self.cfg.train.num_workers,
                    memory_format=how.memory_format,
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
        self.executed += 1
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


def disk_full(error: BaseException | None) -> OSError | None:
    """The error of a full disk that an exception is, or comes from: torch.save and Hydra put it into another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None
