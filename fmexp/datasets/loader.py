"""The order of the training images, and their batches."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fmexp import rng
from fmexp.datasets.dataset import Dataset, MapStyle, Split
from fmexp.process import block_signals, ignore_signals

BLOCK = 2**21  # bytes of images that are normalised at once, to stay in a cache


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [B, C, H, W], labels int64 [B]) on `device`, in the order of `indices`.

    Args:
        num_workers: processes that load a map-style split.
        seed: (seed, epoch). A map-style split's own randomness (augmentation) is seeded with these and the sample's
            index, so that it does not depend on the workers or on where in the epoch one begins.
    """
    if isinstance(split, Split):
        # Many small batches at a time, for calling a kernel takes longer than a small one does. Not where a batch would
        # begin within 64 bytes: a resumed run begins elsewhere, and kernels may round by how memory is aligned.
        size = 4 * batch_size * split.images[0].numel()
        together = max(1, BLOCK // size) if device.type == "cpu" and size % 64 == 0 else 1
        for block in indices.to(split.labels.device).split(together * batch_size):
            images, labels = (part.to(device) for part in dataset.take(split, block))
            for pair in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                yield pair[0].detach(), pair[1].detach()  # else autograd knows them as views of one, not to be changed
        return
    loader = DataLoader(
        _Seeded(split, *seed),
        batch_sampler=[chosen.tolist() for chosen in indices.split(batch_size)],
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that starting an epoch takes nothing from the global one
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    with block_signals():
        started = iter(loader)
    for images, labels in started:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _Seeded(torch.utils.data.Dataset[Any]):
    def __init__(self, split: MapStyle, seed: int, epoch: int) -> None:
        self.split, self.seed, self.epoch = split, seed, epoch

    def __getitem__(self, index: int) -> Any:
        with rng.fork(rng.derive_seed(self.seed, "sample", self.epoch, index)):
            return self.split[index]
