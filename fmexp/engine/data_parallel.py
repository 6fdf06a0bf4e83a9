"""The training step of one of several processes, which computes a part of every batch.

The loss is of the whole batch, whatever the loss is: each process gathers the logits of all, its own with their graph,
and takes the loss of them together. Its gradient is thus that part of the whole one that flows through its own images;
DistributedDataParallel sums the parts. Batch normalisation and dropout see the whole batch, too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from fmexp import rng
from fmexp.engine.distributed import Part, World
from fmexp.engine.loss import Loss
from fmexp.engine.step import plain_backward


class DataParallel:
    """Loss and gradients of a batch, a `fmexp.engine.step.Backward`: the whole batch's, in every process.

    It takes the labels of the whole batch, and its images, or those alone of this process's part.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        loss: Loss,
        precision: str | int,
        *,
        memory_format: torch.memory_format,
        sync_batchnorm: bool,
        unused: bool,
    ) -> None:
        self.world, self.memory_format, self.sync_batchnorm = world, memory_format, sync_batchnorm
        self.model = DistributedDataParallel(model, find_unused_parameters=unused)
        self.model.broadcast_buffers = False  # as an argument it warns; its follower is unknown to older versions
        self.buffers = _own_buffers(model, sync_batchnorm)
        self.part = world.part(world.size)
        self.backward = plain_backward(self._logits, loss, precision)  # type: ignore[arg-type]
        rng.set_state(world.broadcast(rng.get_state()))

    def __call__(self, images: Tensor, labels: Tensor, factor: float) -> Tensor:
        self.part = self.world.part(len(labels))
        own = images[self.part.rows] if len(images) == len(labels) else images
        # Times the size, for DistributedDataParallel takes the mean of the gradients, of which the sum is meant.
        loss = self.backward(own.to(memory_format=self.memory_format), labels, factor * self.world.size)
        # By name, for a model may have put others in their places.
        self.world.share([getattr(module, name) for module, name in self.buffers])
        return loss

    def _logits(self, images: Tensor) -> Tensor:
        with _AsOne(self.world, self.part, self.sync_batchnorm):
            logits = self.model(images)
        return self.world.gather_logits(logits, self.part)


def _own_buffers(model: nn.Module, sync_batchnorm: bool) -> list[tuple[nn.Module, str]]:
    """The buffers that may be others in each process after a step, as a module and a name: all but BatchNorm's, where
    that has the statistics of the whole batch."""
    same = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if sync_batchnorm else ()
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if type(module) not in same or name not in ("running_mean", "running_var", "num_batches_tracked")
    ]


class _AsOne(TorchFunctionMode):
    """Within the block, functions that look beyond an image of their own do as if the process had the whole batch.

    Batch normalisation takes the statistics of all processes, and dropout draws the mask of the whole batch. Random
    numbers within other functions (attention) are those of this process's images, and the same in all processes.
    """

    def __init__(self, world: World, part: Part, sync_batchnorm: bool) -> None:
        super().__init__()
        self.world, self.part, self.sync_batchnorm = world, part, sync_batchnorm
        self.functions: dict[Any, Callable[..., Tensor]] = {
            F.batch_norm: self._batch_norm,
            torch.Tensor.bernoulli_: self._bernoulli_,
        }
        for dropout in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
            self.functions[dropout] = partial(self._dropout, dropout)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))

    def _whole(self, shape: torch.Size) -> tuple[list[int], slice] | None:
        """The shape for the whole batch of what has a row, or several, for each image, and where this part is there."""
        rows = self.part.rows
        each, rest = divmod(shape[0] if shape else 0, rows.stop - rows.start)
        if rest or not each:
            return None
        return [each * self.part.whole, *shape[1:]], slice(each * rows.start, each * rows.stop)

    def _dropout(
        self, function: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        whole = self._whole(input.shape)
        if not training or not 0 < p < 1 or whole is None:
            return function(input, p, training, inplace)
        mask = function(input.new_ones(whole[0]), p, True)[whole[1]]
        return input.mul_(mask) if inplace else input * mask

    def _bernoulli_(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole = self._whole(tensor.shape)
        if whole is None:
            return tensor.bernoulli_(*args, **kwargs)
        return tensor.copy_(tensor.new_empty(whole[0]).bernoulli_(*args, **kwargs)[whole[1]])

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if not training or not self.sync_batchnorm:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        statistics = _Statistics(self.world, input, bool(self.part.count))
        if running_mean is not None and running_var is not None:
            statistics.update(running_mean, running_var, momentum)
        output: Tensor = _BatchNorm.apply(input, weight, bias, eps, self.world, statistics)
        return output


class _Statistics:
    """Mean and variance of each channel of [B, C, ...], over the images of all processes.

    Args:
        counts: whether the images of this process count.
    """

    def __init__(self, world: World, input: Tensor, counts: bool) -> None:
        self.counts = counts
        channels = input.shape[1]
        precise = torch.promote_types(input.dtype, torch.float32)
        aside = [torch.zeros(channels, dtype=precise, device=input.device) for _ in range(2)]
        with torch.no_grad():
            # With somewhere to keep them, for else those of bf16 are of that precision.
            own = torch.stack(torch.ops.aten.batch_norm_update_stats(input, *aside, 0.0)).double()
            number = own.new_full((1, channels), counts * input.numel() / channels)
            means, variances, numbers = world.all_gather(torch.cat([own, number])).unbind(1)
            self.number = float(numbers[:, 0].sum())
            if self.number <= 1:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
            mean = (means * numbers).sum(0) / self.number
            variance = ((variances + (means - mean) ** 2) * numbers).sum(0) / self.number
        self.mean, self.variance = mean.to(precise), variance.to(precise)

    @torch.no_grad()
    def update(self, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
        """Move running statistics towards these; the variance's is the unbiased one, as nn.BatchNorm2d has it."""
        running_mean.mul_(1 - momentum).add_(self.mean, alpha=momentum)
        unbiased = self.variance * (self.number / (self.number - 1))
        running_var.mul_(1 - momentum).add_(unbiased, alpha=momentum)


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation by given statistics of the whole batch, through which gradients flow.

    torch.nn.SyncBatchNorm is for GPUs alone. The kernels are those of evaluation, which take given statistics.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World, of: _Statistics
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.eps, ctx.world, ctx.of = eps, world, of
        return torch.batch_norm(input, weight, bias, of.mean, of.variance, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of: _Statistics = ctx.of
        direct, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, of.mean, of.variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = ctx.world.all_gather(torch.stack([by_weight, by_bias])).sum(0)
        # What flows through the mean and the variance is of the form a * normalised + b: the same kernel again.
        scale = (of.variance + ctx.eps).rsqrt() * (1 if weight is None else weight) / of.number
        by_mean = sums * scale
        through = torch.batch_norm(input, by_mean[0], by_mean[1], of.mean, of.variance, False, 0.0, ctx.eps, False)
        by_input = direct - through if of.counts else torch.zeros_like(direct)
        wanted = zip((by_input, by_weight, by_bias), ctx.needs_input_grad, strict=False)
        return *(gradient if needed else None for gradient, needed in wanted), None, None, None
