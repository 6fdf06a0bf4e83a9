"""The processes that train one run together, as torchrun starts them: how they meet, exchange, stop and fail.

The first process alone decides, writes and logs. The others do the same steps, so that all have the same weights, the
same random state and the same evaluations at every moment. What a step is: `fmexp.engine.data_parallel`.
"""

import itertools
import json
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]  # no list in __init__

from fmexp import process
from fmexp.errors import FmexpError, first_line
from fmexp.process import Stop

# How long one process waits for another, as for a stage of the first one: a process that ends is noticed at once.
PATIENCE = timedelta(days=7)
# Bytes of all processes' messages together, up to which sockets are quicker than gloo (measured, by 2 to 20 times).
SMALL = 2**17


_number = itertools.count()


class LostError(FmexpError):
    """Another process of the run has ended, and has not said why, or cannot be reached."""


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
        self.lines: list[Connection[Any, Any]] = []  # to the first process, and from there to the others

    def join(self) -> None:
        """Connect to the others, which may begin now."""
        if self.rank == 0:
            self.store.set("begin", "run")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = PrefixStore("group", self.store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        if process.share_a_machine():
            self._connect()

    def _connect(self) -> None:
        """Sockets for small messages: one takes 50 us by them, and 300 to 1600 by gloo, where threads wait for threads
        of other processes. Their address is no file, so that nothing is left of it."""
        with _as_lost():
            if self.rank == 0:
                name = f"\0fmexp {uuid.uuid4()}"
                with Listener(name, "AF_UNIX", backlog=self.size) as listener:
                    self.store.set("lines", name)
                    lines = [listener.accept() for _ in range(1, self.size)]
                self.lines = [line for _, line in sorted((line.recv_bytes(), line) for line in lines)]
            else:
                self.lines = [Client(self.store.get("lines").decode(), "AF_UNIX")]
                self.lines[0].send_bytes(self.rank.to_bytes(4, "big"))

    def leave(self) -> None:
        """Let go of the others; where this is the first and they have never begun, they never will."""
        for line in self.lines:
            line.close()
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
        parts = tensor.new_empty(self.size, *tensor.shape)
        if not self.lines or tensor.device.type != "cpu" or parts.nbytes > SMALL:
            dist.all_gather(list(parts), tensor.contiguous())
            return parts
        parts[self.rank] = tensor
        # Gathered by the first process, which gives it to the others.
        whole = memoryview(parts.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer since 1.0
        each = len(whole) // self.size
        with _as_lost():
            if self.rank:
                self.lines[0].send_bytes(whole[self.rank * each :][:each])
                received = self.lines[0].recv_bytes_into(whole)
            else:
                received = each + sum(
                    line.recv_bytes_into(whole[rank * each :][:each]) for rank, line in enumerate(self.lines, 1)
                )
                for line in self.lines:
                    line.send_bytes(whole)
        if received != len(whole):
            raise RuntimeError(f"a message of {received} bytes came in place of {len(whole)}")
        return parts

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors with the first process's values, to the bit, by one message."""
        if tensors:
            values = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
            message = torch.cat(values)
            dist.broadcast(message, src=0)
            for tensor, value in zip(tensors, message.split([len(value) for value in values]), strict=True):
                tensor.copy_(value.clone().view(tensor.dtype).view(tensor.shape))  # cloned, to be aligned

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
def _as_lost() -> Iterator[None]:
    """Raise for a socket that is closed what torch raises for its own."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise dist.DistNetworkError(f"the connection to another process is gone: {error}") from error


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
        explained = world.explain(error, "the same call")  # so that the others end without a word
        if explained is error:
            raise
        raise explained from error
    finally:
        world.leave()


@contextmanager
def follow() -> Iterator[World | None]:
    """In another process: wait until the first one has joined the others; None where it has nothing to run.

    Raises:
        LostError: the first one cannot be reached.
    """
    try:
        world = World()
        if begun := world.store.get("begin") == b"run":
            world.join()
    except RuntimeError as error:  # DistError is one
        raise LostError(f"The first process of this run cannot be reached: {first_line(error)}") from error
    try:
        yield world if begun else None
    finally:
        world.leave()


@contextmanager
def listen(at: socket.socket) -> Iterator[None]:
    """In the first process, where MASTER_PORT is that of a socket: let the others meet there, within the block."""
    host, port = at.getsockname()
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=at.detach()
    )  # World takes the same
    yield
    del store


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
