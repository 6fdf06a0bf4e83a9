"""The training: one step, and the loop that makes a run's moments happen."""

import inspect
import math
import os
from collections.abc import Callable

import hydra.utils
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from fmexp import datasets
from fmexp.run import Run


class DivergedError(Exception):
    """A loss that is not a finite number, at `step`."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss is {loss} at step {step}")
        self.step = step


def step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """One training step on images [B, C, H, W] and labels [B]; the cross-entropy before it, a scalar tensor."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    with torch.no_grad():
        update(optimizer)
    return loss.detach()


def update(optimizer: Optimizer) -> None:
    """The update itself, without the wrappers for profiling, hooks and torch.compile around it."""
    if noted := vars(optimizer).get("step"):  # a scheduler's wrapper, which warns where it is left out
        noted()
    else:
        inspect.unwrap(type(optimizer).step)(optimizer)


def build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer named by `cfg`, in its fused form where torch has one: the same update in one kernel.

    On CUDA also in the form that a graph can capture, which keeps its count of steps on the device.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        # Otherwise they import torch._dynamo, over a second, only to tell it that it is not wanted.
        vars(inspect.unwrap(method)).setdefault("__dynamo_disable", inspect.unwrap(method))
    build = hydra.utils.instantiate(cfg, _partial_=True, _convert_="all")
    faster = {"fused"} if not {"fused", "foreach", "differentiable"} & cfg.keys() else set()
    if any(parameter.is_cuda for parameter in model.parameters()) and "capturable" not in cfg:
        faster.add("capturable")
    faster &= inspect.signature(build.func).parameters.keys()
    if faster:
        try:
            return build(model.parameters(), **dict.fromkeys(faster, True))  # type: ignore[no-any-return]
        except RuntimeError:  # not for this optimizer, device or type of parameter
            pass
    return build(model.parameters())  # type: ignore[no-any-return]


def batches_per_epoch(cfg: DictConfig, dataset: datasets.Dataset) -> int:
    """How many batches an epoch has, the last of which may be smaller."""
    return math.ceil(datasets.length(dataset.train) / int(cfg.train.batch_size))


def total_steps(cfg: DictConfig, dataset: datasets.Dataset) -> int:
    """How many batches the run has, from train.epochs and train.max_steps."""
    steps = int(cfg.train.epochs) * batches_per_epoch(cfg, dataset)
    return min(steps, int(cfg.train.max_steps or steps))


def train(
    run: Run,
    *,
    on_log: Callable[[], None],
    on_epoch: Callable[[], None],
    on_step: Callable[[], None],
) -> None:
    """Train from where the run stands to its end.

    `on_log` is called every train.log_every batches and at the end with run.losses filled since the last time,
    `on_epoch` after each epoch (and after a last one that train.max_steps cut short), `on_step` after each batch.
    """
    from fmexp import fast

    cfg = run.cfg.train
    trained = fast.training(run)
    epochs, log_every = batches_per_epoch(run.cfg, run.dataset), cfg.log_every
    total = total_steps(run.cfg, run.dataset)
    count = datasets.length(run.dataset.train)
    # tqdm asks its variable by itself only at its import, and not where `disable` is given; None: not on a terminal.
    hidden = True if os.environ.get("TQDM_DISABLE") else None
    with tqdm(total=total, initial=run.step, unit=" batches", disable=hidden, leave=False, dynamic_ncols=True) as bar:
        while run.step < total:
            rest = datasets.order(run.cfg.seed, run.epoch, count)[run.position * cfg.batch_size :]
            run.model.train()
            for loss in trained(rest):
                run.losses.append(loss)
                run.step += 1
                run.position += 1
                if run.step % log_every == 0 or run.step == total:
                    on_log()
                if run.position == epochs or run.step == total:
                    run.epoch, run.position = run.epoch + 1, 0
                    on_epoch()
                on_step()
                bar.update()
                if run.step == total:
                    break


def latest_batch(run: Run) -> tuple[Tensor, Tensor]:
    """The batch that a run which has trained was trained on last, made again."""
    cfg, count = run.cfg.train, datasets.length(run.dataset.train)
    epoch, position = divmod(run.step - 1, batches_per_epoch(run.cfg, run.dataset))
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
