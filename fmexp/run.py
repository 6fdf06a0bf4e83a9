"""A run as its stages see it: what they may read, and how they are executed without disturbing the training."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from fmexp import config, datasets, rng
from fmexp.engine.backend import Backend
from fmexp.engine.cuda_graph import bits
from fmexp.engine.distributed import World
from fmexp.engine.evaluation import Evaluation, evaluate
from fmexp.engine.loss import Loss
from fmexp.engine.schedule import Schedule
from fmexp.engine.step import LastUpdate
from fmexp.rundir.atomic import disk_full

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., None])


def reads_last_update(function: Function) -> Function:
    """Mark the function of a stage that reads `run.last_update`, which is kept at each step for such stages alone."""
    function.reads_last_update = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Stage:
    """A stage as its YAML has it: call `function(run)` at the moment `when`.

    Attributes:
        changes: whether what it does to the weights and the optimizer stays; else that is put back.
    """

    name: str
    when: str
    required: bool
    changes: bool
    function: partial[None]

    @property
    def watched(self) -> bool:
        """fmexp's own stages change nothing, as tests prove, and are not made to wait for copies of the weights."""
        return not self.changes and not self.function.func.__module__.startswith("fmexp.stages.")

    @property
    def reads_last_update(self) -> bool:
        """Whether its function is marked with `reads_last_update`."""
        return getattr(self.function.func, "reads_last_update", False)


@dataclass
class Run:
    """What a stage may read, and where it writes.

    Attributes:
        step: batches trained on; the global step of all that is written.
        epoch, position: finished epochs, and batches done in the current one.
        augment: what changes a batch before the model sees it; None: nothing.
        batch: the latest training batch as the model was given it, on the device: normalised float32 [B, C, H, W], and
            int64 [B], or after mixup and cutmix probabilities float32 [B, K]; before training a random one.
        losses: of the batches since the last running loss.
        loss, schedule: what is trained for, and the factor of the learning rate at each step.
        average: the running average of the weights (train.ema), or None.
        split: what is evaluated now: val during training, where there is a validation split, and test at the end.
        last_update: gradients and changes of the weights in the last update; None, unless a stage is marked with
            `reads_last_update`.
        metrics: the latest value of each metric.
        failures: stage name -> what went wrong.
        best_epoch: whose weights were kept, once training has ended; None: the last ones.
        begun_from: what was taken from cfg.weights, in words; empty where nothing was.
        backend, evaluation_backend: how the training and the evaluation are computed.
        world: the processes that train this run together; None: this one alone.
    """

    cfg: DictConfig
    device: torch.device
    dataset: datasets.Dataset
    model: nn.Module
    optimizer: Optimizer
    loss: Loss
    schedule: Schedule
    average: AveragedModel | None
    stages: list[Stage]
    augment: datasets.augment.Augment | None
    batch: tuple[Tensor, Tensor]
    backend: Backend
    evaluation_backend: Backend
    world: World | None = None
    step: int = 0
    epoch: int = 0
    position: int = 0
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    begun_from: str = ""
    best_epoch: int | None = None
    split: str = field(init=False)
    last_update: LastUpdate | None = None
    output_dir: Path = field(init=False)
    writer: SummaryWriter = field(init=False)
    _evaluations: dict[str, Evaluation] = field(default_factory=dict, init=False)
    _told: set[str] = field(default_factory=set, init=False)  # stages that were warned of

    def __post_init__(self) -> None:
        self.split = "test" if self.dataset.val is None else "val"

    @property
    def kept(self) -> nn.Module:
        """The model that is evaluated and written to model.pt: the average of the weights, where there is one."""
        return self.average.module if self.average else self.model

    def evaluate(self, split: str) -> Evaluation:
        """What the model, as it is now, says of a split (train, val, test): one pass, kept until the next batch."""
        if split not in self._evaluations:
            self._evaluations[split] = self.evaluate_images(split)
        return self._evaluations[split]

    def evaluate_together(self) -> None:
        """Evaluate `split` on all processes of the run, each of which has a share of the images."""
        if self.world:
            self._evaluations[self.split] = self.evaluate_images(self.split, world=self.world)

    def evaluate_images(self, split: str, indices: Tensor | None = None, *, world: World | None = None) -> Evaluation:
        """What the model, as it is now, says of a split, or of those of its images that `indices`, int64 [N], has."""
        how = self.evaluation_backend
        with eval_mode(self.kept, rng.derive_seed(self.cfg.seed, "evaluation")), how.applied():
            return evaluate(
                self.kept,
                self.dataset,
                self.dataset.splits[split],
                indices,
                device=self.device,
                workers=self.workers,
                memory_format=how.memory_format,
                world=world,
            )

    @cached_property
    def workers(self) -> datasets.Workers:
        """The processes that load for evaluations; those of the training are the Trainer's, and load in between."""
        return datasets.Workers(self.dataset, self.cfg.train.num_workers, self.device)

    @cached_property
    def seed(self) -> int:
        """`cfg.seed`, for OmegaConf is slow in a loop."""
        return int(self.cfg.seed)

    @torch.no_grad()
    def augmented(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A batch as a split has it to what the model is given at a step: augmented, and normalised float32."""
        raw = images.dtype == torch.uint8
        if self.augment is not None:
            images, labels = self.augment(images, labels, datasets.augment.generator(self.seed, step))
        return self.dataset.normalise(images) if raw else images, labels

    def forget_evaluations(self) -> None:
        """Called after a batch: the model is another."""
        self._evaluations.clear()

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation of `split`."""
        return self.evaluate(self.split)

    @property
    def split_name(self) -> str:
        """`split` in words: training, validation or test."""
        return datasets.SPLIT_NAMES[self.split]

    def write_metrics(self) -> Evaluation:
        """Evaluate `split`; keep its metrics, and write those that are shown."""
        for name, value in {"loss": self.evaluation.loss, **self.evaluation.metrics}.items():
            tag = f"{self.split}/{name}"
            self.metrics[tag] = value
            if config.is_shown(tag, self.cfg.objective):
                self.scalar(tag, value)
        return self.evaluation

    def scalar(self, tag: str, value: float) -> None:
        """Write a metric at the current step."""
        self.metrics[tag] = float(value)  # NumPy's numbers would make a checkpoint unreadable
        self.writer.add_scalar(tag, value, self.step)

    def run_stages(self, moment: str) -> None:
        """Execute the stages of a moment, in the order of the configuration; the first process of a run does so."""
        for stage in self.stages:
            if stage.when == moment and not (self.world and self.world.rank):
                self._execute(stage)

    def _execute(self, stage: Stage) -> None:
        before = _Trained(self.model, self.optimizer) if stage.watched else None
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            try:
                with eval_mode(self.model, rng.derive_seed(self.cfg.seed, stage.name, self.step)):
                    stage.function(self)
            except Exception as error:
                if stage.required or disk_full(error):
                    raise
                log.exception("stage %s failed at step %d; the run goes on without it", stage.name, self.step)
                self.failures[stage.name] = f"step {self.step}: {type(error).__name__}: {error}"
            changed = before.put_back() if before else []
        if changed and stage.name not in self._told:
            self._told.add(stage.name)
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            log.warning(
                "stage %s changed %s, and each time this is put back: `changes: true` in its YAML lets it stay",
                stage.name, ", ".join(changed[:5]) + more,
            )  # fmt: skip
        if stage.changes:
            self.forget_evaluations()


class _Trained:
    """What a training step changes, and how, as it is at one moment."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer, self.grad = model, optimizer, torch.is_grad_enabled()
        self.parameters = [(*named, named[1].detach().clone(), named[1].requires_grad)
                           for named in model.named_parameters()]  # fmt: skip
        self.state = copy.deepcopy(optimizer.state_dict())

    def put_back(self) -> list[str]:
        """Give back what is not as it was, and return its names."""
        changed = ["the grad mode"] if torch.is_grad_enabled() != self.grad else []
        now: dict[str, Any] = dict(self.model.named_parameters())
        for name, parameter, value, trained in self.parameters:
            path, _, attribute = name.rpartition(".")
            if now.get(name) is not parameter:
                self.model.get_submodule(path).register_parameter(attribute, parameter)
            if now.get(name) is not parameter or bits(parameter) != bits(value):
                changed.append(name)
                with torch.no_grad():
                    parameter.copy_(value)
            if parameter.requires_grad != trained:
                changed.append(f"requires_grad of {name}")
                parameter.requires_grad_(trained)
        if bits(self.optimizer.state_dict()) != bits(self.state):
            changed.append("the optimizer")
            self.optimizer.load_state_dict(self.state)
        return changed


@contextmanager
def eval_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """Put a model into eval mode for the block, then restore modes, gradients, buffers and random state."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with rng.fork(seed):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def steps_per_epoch(cfg: DictConfig, dataset: datasets.Dataset) -> int:
    """How many batches an epoch has, the last of which may be smaller."""
    return math.ceil(datasets.length(dataset.train) / int(cfg.train.batch_size))


def total_steps(cfg: DictConfig, dataset: datasets.Dataset, *, epochs: int | None = None) -> int:
    """How many batches the run has, from train.epochs (or `epochs` in its place) and train.max_steps."""
    steps = int(epochs or cfg.train.epochs) * steps_per_epoch(cfg, dataset)
    return min(steps, int(cfg.train.max_steps or steps))
