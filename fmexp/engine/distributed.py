"""One run on several processes, as torchrun starts them: each computes a part of every batch.

The loss is of the whole batch, whatever the loss is: each process gathers the logits of all, its own with their graph,
and takes the loss of them together. Its gradient is thus that part of the whole one that flows through its own images;
DistributedDataParallel sums the parts. Batch normalisation and dropout see the whole batch, too: see `_AsOne`.

The first process alone decides, writes and logs. The others do the same steps, so that all have the same weights, the
same random state and the same evaluations at every moment.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # its __init__ has no list
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from fmexp import process, rng
from fmexp.engine.loss import Loss
from fmexp.engine.step import plain_backward
from fmexp.errors import FmexpError, first_line
from fmexp.process import Stop

# How long one process waits for another, as for a stage of the first one: a process that ends is noticed at once.
PATIENCE = timedelta(days=7)


_number = itertools.count()


class LostError(FmexpError):
    """Another process of the run has ended, and has not said why."""


@dataclass(frozen=True)
class Part:
    """The images of a batch that one process computes.

    Attributes:
        first, count: they are `first`, `first + 1` and so on; 0 where there are fewer images than processes.
        whole: the images of the batch.
    """

    first: int
    count: int
    whole: int

    @property
    def rows(self) -> slice:
        """Where they are in the batch. A process that has none computes the batch's first, which counts for nothing."""
        return slice(self.first, self.first + self.count) if self.count else slice(0, 1)


class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank, size: which one this is, from 0, and how many there are.
        stop: the signal that one of them got, as all know of it after the same batch.
    """

    def __init__(self) -> None:
        store, self.rank, self.size = next(rendezvous("env://", timeout=PATIENCE))
        self.store = PrefixStore(f"fmexp/{next(_number)}", store)  # of this run, for a program may have several
        self.stop = SharedStop(self, Stop())

    def join(self) -> None:
        """Connect to the others, which may begin now."""
        if self.rank == 0:
            self.store.set("begin", "run")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = PrefixStore("group", self.store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)

    def leave(self) -> None:
        """Let go of the others; where this is the first and they have never begun, they never will."""
        if dist.is_initialized():
            dist.destroy_process_group()
        elif self.rank == 0:
            with suppress(Exception):  # the store ends with the program that holds it
                self.store.set("begin", "end")

    def part(self, whole: int, rank: int | None = None) -> Part:
        """What a process (this one) computes of a batch of `whole` images: its share of them, in the order of ranks."""
        rank = self.rank if rank is None else rank
        each, more = divmod(whole, self.size)
        return Part(rank * each + min(rank, more), each + (rank < more), whole)

    def own(self, indices: Tensor) -> Tensor:
        """What this process has to load of a batch."""
        return indices[self.part(len(indices)).rows]

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all are here."""
        dist.barrier()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, one after another: [size, ...]."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_rows(self, rows: Tensor, whole: int) -> Tensor:
        """A batch of `whole` rows, of each process's part of it."""
        return self._gather(rows, whole, rows.new_empty(0, dtype=torch.uint8))[0]

    def gather_batch(self, images: Tensor, labels: Tensor, whole: int, *, all_images: bool) -> tuple[Tensor, Tensor]:
        """The labels of a batch, and its images, or this process's part of them, where each has loaded its part."""
        if len(labels) == whole:
            return images, labels
        return self.gather_rows(images, whole) if all_images else images, self.gather_rows(labels, whole)

    def gather_logits(self, logits: Tensor, part: Part) -> Tensor:
        """The logits of the whole batch, this process's own with their graph.

        In the same message the first process gives the others its random state, of which a model may have drawn as much
        as its own images needed; and each says which signal it got.
        """
        signal = torch.tensor([self.stop.own.signal or 0], dtype=torch.uint8)
        about = torch.cat([signal, torch.get_rng_state()]).to(logits.device)
        values, told = self._gather(logits.detach(), part.whole, about)
        told = told.cpu()
        torch.set_rng_state(told[0, 1:].clone())
        if (number := int(told[:, 0].max())) and self.stop.signal is None:
            self.stop.signal = Signals(number)
        return torch.cat([values[: part.first], logits[: part.count], values[part.first + part.count :]])

    def _gather(self, rows: Tensor, whole: int, about: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of all processes, and the bytes that each has sent along: [whole, ...] and uint8 [size, N].

        Parts that are smaller than others are filled up. All goes as bytes, for gloo knows few types.
        """
        own, most = self.part(whole).count, -(-whole // self.size)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[:own] = rows[:own]
        content = padded.flatten().view(torch.uint8)
        messages = self.all_gather(torch.cat([content, about]))
        parts = messages[:, : len(content)].contiguous().view(rows.dtype).view(self.size, most, *rows.shape[1:])
        counts = [self.part(whole, rank).count for rank in range(self.size)]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), messages[:, len(content) :]

    def combine(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors of which each process has some rows, and 0 in the others, with the rows of all, to the bit."""
        for tensor in tensors:
            dist.all_reduce(tensor.view({4: torch.int32, 8: torch.int64}[tensor.element_size()]))

    def batches(self, count: int, size: int) -> Tensor:
        """The indices of those of the batches of `size` of `count` images that this process evaluates: each whole, for
        the bits of a result may depend on what is computed together."""
        return torch.cat([*torch.arange(count).split(size)[self.rank :: self.size], torch.arange(0)])

    def explain(self, error: Exception, resume_command: str) -> Exception:
        """What an error in this process means for the run: itself, of which the others are told; or the other process's
        that was first, where this one has only lost the connection."""
        with suppress(Exception):  # the store ends with the program that holds it
            if not _is_lost(error):
                said = json.dumps([self.rank, str(error) if isinstance(error, FmexpError) else first_line(error)])
                self.store.set("problem", said)
            elif self.store.check(["problem"]):
                rank, said = json.loads(self.store.get("problem"))
                return FmexpError(f"Process {rank} of {self.size}: {said}")
        if _is_lost(error):
            return LostError(
                "Another process of this run has ended, and so this one ends. What the last checkpoint holds is safe; "
                f"go on with\n  {resume_command}"
            )
        return error

    def speaks(self) -> bool:
        """Whether it is for this process to say what has happened: the first one that asks."""
        with suppress(Exception):
            return not self.store.check(["problem"]) and self.store.add("said", 1) == 1
        return True


def _is_lost(error: Exception) -> bool:
    """Whether it says that a connection between processes is gone; gloo's errors have no type of their own."""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError))


@contextmanager
def lead() -> Iterator[World | None]:
    """In the first process: the others wait until it has begun a run within the block, or left it; None: it is alone.

    Raises:
        FmexpError: another process has failed.
    """
    if process.world_size() == 1:
        yield None
        return
    world = World()
    try:
        yield world
    except Exception as error:
        world.explain(error, "")  # so that the others end without a word
        raise
    finally:
        world.leave()


@contextmanager
def follow() -> Iterator[World | None]:
    """In another process: wait until the first one has joined the others; None where it has nothing to run."""
    world = World()
    try:
        if world.store.get("begin") == b"run":
            world.join()
            yield world
        else:
            yield None
    finally:
        world.leave()


def dismiss() -> None:
    """Let the other processes end, for the first one has nothing to run."""
    World().leave()


class SharedStop(Stop):
    """A stop after the batch in which all processes know of the signal.

    Attributes:
        own: the signal that this process got.
    """

    def __init__(self, world: World, own: Stop) -> None:
        super().__init__()
        self.world, self.own = world, own

    def leave(self) -> None:
        """End the process as the signal asks, once the first process has saved the run."""
        self.world.barrier()
        self.own.signal = self.signal
        self.own.leave()


class Backward:
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
        self.part = world.part(world.size)
        self.backward = plain_backward(self._logits, loss, precision)  # type: ignore[arg-type]
        rng.set_state(world.broadcast(rng.get_state()))

    def __call__(self, images: Tensor, labels: Tensor, factor: float) -> Tensor:
        self.part = self.world.part(len(labels))
        own = images[self.part.rows] if len(images) == len(labels) else images
        # Times the size, for DistributedDataParallel takes the mean of the gradients, of which the sum is meant.
        return self.backward(own.to(memory_format=self.memory_format), labels, factor * self.world.size)

    def _logits(self, images: Tensor) -> Tensor:
        with _AsOne(self.world, self.part, self.sync_batchnorm):
            logits = self.model(images)
        return self.world.gather_logits(logits, self.part)


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
        sums = torch.stack([by_weight, by_bias])
        dist.all_reduce(sums)
        # What flows through the mean and the variance is of the form a * normalised + b: the same kernel again.
        scale = (of.variance + ctx.eps).rsqrt() * (1 if weight is None else weight) / of.number
        by_mean = sums * scale
        through = torch.batch_norm(input, by_mean[0], by_mean[1], of.mean, of.variance, False, 0.0, ctx.eps, False)
        by_input = direct - through if of.counts else torch.zeros_like(direct)
        wanted = zip((by_input, by_weight, by_bias), ctx.needs_input_grad, strict=False)
        return *(gradient if needed else None for gradient, needed in wanted), None, None, None
