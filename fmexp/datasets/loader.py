"""The order of the training images, and their batches."""

import multiprocessing
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fmexp import rng
from fmexp.datasets.dataset import Dataset, MapStyle, Split, stack
from fmexp.errors import DataError
from fmexp.process import block_signals, in_loading_process

BLOCK = 2**21  # bytes of images that are normalised at once, to stay in a cache
SMALL = 2**20  # bytes up to which a loaded tensor goes through a queue (measured: faster than shared memory to 3 MB)
GRACE_S = 5  # how long a loading process may take to finish its batch, once nobody needs it
# How loading processes are started. Named, for within joblib's worker processes the default is a method of joblib's.
START = "fork" if sys.platform == "linux" else "spawn"


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the training images in an epoch, int64 [count]: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(rng.derive_seed(seed, "order", epoch)))


def batches(
    dataset: Dataset,
    split: Split | MapStyle,
    indices: Tensor,
    batch_size: int,
    *,
    device: torch.device,
    num_workers: int = 0,
    seed: tuple[int, int] = (0, 0),
    raw: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [B, C, H, W], labels int64 [B]) on `device`, in the order of `indices`.

    Args:
        num_workers: processes that load a map-style split.
        seed: (seed, epoch). A map-style split's own randomness (augmentation) is seeded with these and the sample's
            index, so that it does not depend on the workers or on where in the epoch one begins.
        raw: give the images as the split has them, uint8 or float32, and do not normalise.
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
    numbers = [chosen.tolist() for chosen in indices.split(batch_size)]
    with _loaded(_Batches(dataset, split, *seed), numbers, num_workers, pin_memory=device.type == "cuda") as loaded:
        for batch in loaded:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            images = images.to(device, non_blocking=True)
            yield images if raw else dataset.ready(images), labels.to(device, non_blocking=True)


class _Batches(torch.utils.data.Dataset[Any]):
    """The batches of a map-style split, by the indices of their images; or what is wrong with one of these."""

    def __init__(self, dataset: Dataset, split: MapStyle, seed: int, epoch: int) -> None:
        self.dataset, self.split, self.seed, self.epoch = dataset, split, seed, epoch

    def __getitem__(self, indices: list[int]) -> "tuple[Tensor, Tensor] | _Packed | DataError":
        try:
            batch = stack([self._sample(index) for index in indices])
            return batch if get_worker_info() is None else _Packed(batch)
        except DataError as error:  # returned, for torch would put a traceback into its message
            return error

    def _sample(self, index: int) -> tuple[Tensor, int]:
        with rng.fork(rng.derive_seed(self.seed, "sample", self.epoch, index)):
            return self.dataset.sample_at(self.split, index)


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


@contextmanager
def _loaded(batches: _Batches, numbers: list[list[int]], workers: int, *, pin_memory: bool) -> Iterator[Iterator[Any]]:
    """The batches, one after another, loaded by processes where there are `workers`, which end with the block."""
    if not workers:
        yield map(batches.__getitem__, numbers)
        return
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        generator=torch.Generator(),  # its own, so that starting an epoch takes nothing from the global one
        pin_memory=pin_memory,
        worker_init_fn=in_loading_process,
        multiprocessing_context=START,
    )
    others = set(multiprocessing.active_children())
    with block_signals():
        started = iter(loader)
    processes = set(multiprocessing.active_children()) - others
    try:
        yield started
    finally:
        _end(started, processes)


def _end(started: Any, processes: set[Any]) -> None:
    """End loading processes: each finishes its batch; those that take longer than GRACE_S are killed.

    Left to torch this would come as late as the end of the program, for a traceback keeps `started`; and then it waits
    without a limit.
    """

    def kill() -> None:
        for process in processes:
            process.kill()

    timer = threading.Timer(GRACE_S, kill)
    timer.start()
    with suppress(RuntimeError):  # of a killed one
        started._shutdown_workers()  # an iterator of torch's has no public way to close it
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
