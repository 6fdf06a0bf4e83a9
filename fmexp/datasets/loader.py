"""The order of the training images, and their batches."""

import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fmexp import rng
from fmexp.datasets.dataset import Dataset, MapStyle, Split, stack
from fmexp.errors import DataError
from fmexp.process import available_cores, block_signals, in_loading_process

BLOCK = 2**21  # bytes of images that are normalised at once, to stay in a cache
SMALL = 2**20  # bytes up to which a loaded tensor goes through a queue (measured: faster than shared memory to 3 MB)
MOST = 8  # loading processes by default: more seldom pay, and each takes memory
GRACE_S = 5  # how long a loading process may take to finish its batch, once nobody needs it
# How loading processes are started. Named, for within joblib's worker processes the default is a method of joblib's.
START = "fork" if sys.platform == "linux" else "spawn"


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the training images in an epoch, int64 [count]: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(rng.derive_seed(seed, "order", epoch)))


# Which split, seed, epoch, the indices of a batch, and whether each of its images has random numbers of its own.
Task = tuple[str, int, int, list[int], bool]


def batches(
    dataset: Dataset,
    split: Split | MapStyle,
    indices: Tensor,
    batch_size: int,
    *,
    device: torch.device,
    workers: "Workers | None" = None,
    seed: tuple[int, int] = (0, 0),
    raw: bool = False,
    own: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [B, C, H, W], labels int64 [B]) on `device`, in the order of `indices`.

    Args:
        workers: the processes that load a map-style split; None: this one.
        seed: (seed, epoch). A map-style split's own randomness (augmentation) is seeded with these and the first index
            of a batch, so that it does not depend on the workers or on where in the epoch one begins.
        raw: give the images as the split has them, uint8 or float32, and do not normalise.
        own: what this process loads of a map-style split's batch, where several share it. Each image is then seeded by
            its own index, so that its random numbers do not depend on who loads it. Of a split in memory it has all.
    """
    if isinstance(split, Split):
        # Many small batches at a time, for calling a kernel takes longer than a small one does. Not where a batch would
        # begin within 64 bytes: a resumed run begins elsewhere, and kernels may round by how memory is aligned.
        size = 4 * batch_size * split.images[0].numel()
        together = max(1, BLOCK // size) if device.type == "cpu" and size % 64 == 0 else 1
        for block in indices.to(split.labels.device).split(together * batch_size):
            images, labels = (part.to(device) for part in dataset.take(split, block, raw=raw))
            for pair in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                yield pair[0].detach(), pair[1].detach()  # else autograd knows them as views of one, not to be changed
        return
    name = next(name for name, part in vars(dataset).items() if part is split)
    parts = indices.split(batch_size) if own is None else map(own, indices.split(batch_size))
    tasks = [(name, *seed, chosen.tolist(), own is not None) for chosen in parts]
    loaded: Iterator[Any] = workers.load(tasks) if workers else map(_Batches(dataset).__getitem__, tasks)
    for batch in loaded:
        if isinstance(batch, DataError):
            raise batch
        images, labels = batch
        images = images.to(device, non_blocking=True)
        yield images if raw else dataset.ready(images), labels.to(device, non_blocking=True)


class _Batches(torch.utils.data.Dataset[Any]):
    """The batches of a dataset's map-style splits; or what is wrong with one of their images."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, task: Task) -> "tuple[Tensor, Tensor] | _Packed | DataError":
        name, seed, epoch, indices, each = task
        samples, split = [], getattr(self.dataset, name)
        try:
            for together in [[index] for index in indices] if each else [indices]:
                with rng.fork_cpu(rng.derive_seed(seed, "sample", epoch, together[0])):
                    samples += self.dataset.samples_at(split, together)
            batch = stack(samples)
            return batch if get_worker_info() is None else _Packed(batch)
        except DataError as error:  # returned, for torch would put a traceback into its message
            return error


class _Packed:
    """A batch on its way to the main process, pickled at once. torch does so in a thread of the queue, whose errors
    reach nobody: the main process would wait for ever.

    What is small goes through the queue, which is several times as fast as shared memory, and holds no open file.
    """

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        try:
            parts = [part if part.nbytes > SMALL else part.numpy() for part in batch]
            self.content = bytes(ForkingPickler.dumps(parts))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"A process that loads images cannot hand over a batch of {batch[0].nbytes:,} bytes: {error}\n"
                "Make room in /dev/shm, let TMPDIR be a shorter path, or load without such processes: "
                "train.num_workers=0."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.content,)


def _unpack(content: bytes) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(part) for part in pickle.loads(content))  # of our own process's making


class Workers:
    """Processes that load a dataset's map-style splits. They start with the first pass and live until `close`.

    One pass at a time: what is left of one that was not read to its end is dropped when the next begins.

    Args:
        count: how many, or "auto": as many as this process may use cores, at most MOST. 0: this process loads.
    """

    def __init__(self, dataset: Dataset, count: int | str, device: torch.device) -> None:
        self.batches, self.pin_memory = _Batches(dataset), device.type == "cuda"
        self.count = min(available_cores(), MOST) if count == "auto" else int(count)
        self._tasks: list[Task] = []
        self._loader: DataLoader[Any] | None = None
        self._processes: set[Any] = set()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def load(self, tasks: list[Task]) -> Iterator[Any]:
        """The batches, one after another, or what is wrong with one."""
        if not self.count:
            return map(self.batches.__getitem__, tasks)
        self._tasks[:] = tasks
        if self._loader:
            return iter(self._loader)
        self._loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=self._tasks,
            num_workers=self.count,
            persistent_workers=True,
            generator=torch.Generator(),  # its own, so that starting takes nothing from the global one
            pin_memory=self.pin_memory,
            worker_init_fn=in_loading_process,
            multiprocessing_context=START,
        )
        others = set(multiprocessing.active_children())
        with block_signals():
            started = iter(self._loader)
        self._processes = set(multiprocessing.active_children()) - others
        return started

    def close(self) -> None:
        """End the processes: each finishes its batch; those that take longer than GRACE_S are killed.

        Left to torch this would come as late as the end of the program, for a traceback keeps its iterator; and then it
        waits without a limit.
        """
        loader, self._loader = self._loader, None
        if loader is None:
            return

        def kill() -> None:
            for process in self._processes:
                process.kill()

        timer = threading.Timer(GRACE_S, kill)
        timer.start()
        with suppress(RuntimeError):  # of a killed one
            loader._iterator._shutdown_workers()  # type: ignore[union-attr]  # torch has no public way
        timer.cancel()
        kill()


def killed_worker(error: BaseException) -> DataError | None:
    """What to say of torch's error for a loading process that was killed; it comes at any moment of a run."""
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker (pid"):
        return None
    return DataError(
        f"A process that loads images was killed: {str(error).strip()}\n"
        "Too little memory is the usual cause. Each such process needs its own: lower train.num_workers, "
        "or load without them: train.num_workers=0."
    )
