"""Models and datasets of the reliability tests, named by `_target_`: with state, noise and delays of all kinds."""

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmexp.datasets import Dataset, synthetic
from fmexp.run import Run


class Noisy(nn.Module):
    """Batch normalisation (running statistics) and dropout (random numbers): what a careless resume gets wrong."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 4, 3, stride=3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Flatten(),
            nn.LazyLinear(24),
            nn.BatchNorm1d(24),
            nn.Dropout(0.3),
            nn.Linear(24, num_classes),
        )
        self.body(torch.zeros(2, channels, height, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class LSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, _, width = input_shape
        self.lstm = nn.LSTM(channels * width, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.transpose(1, 2).flatten(2))  # [B, C, H, W] -> [B, H, C * W]
        logits: Tensor = self.head(states[:, -1])
        return logits


class Waits(nn.Module):
    """Linear; its fourth training batch makes the file $RELIABILITY_WAITING, if given, and lasts until that is gone."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        if self.training and self.batches == 4 and os.environ.get("RELIABILITY_WAITING"):
            sign = Path(os.environ["RELIABILITY_WAITING"])
            sign.touch()
            until = time.monotonic() + 60
            while sign.exists() and time.monotonic() < until:
                time.sleep(0.01)
        return self.linear(x.flatten(1))


class Explodes(nn.Module):
    """Linear, and infinite from the eleventh training batch on."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        logits = self.linear(x.flatten(1))
        return logits * float("inf") if self.batches > 10 else logits


class Scheduled(torch.optim.SGD):
    """Lowers its rate along a cosine over 32 batches, by a scheduler that it holds."""

    def __init__(self, params: Iterable[Tensor], *, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self, 32)

    def step(self, closure: Any = None) -> None:
        super().step()
        self.scheduler.step()


class Keepsake:
    """What no checkpoint can keep."""


class Unkept(nn.Linear):
    """A model whose state holds an object of a class that torch does not know."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(input_shape[0] * input_shape[1] * input_shape[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))

    def get_extra_state(self) -> Any:
        return Keepsake()

    def set_extra_state(self, state: Any) -> None:
        pass


class Augmented(torch.utils.data.Dataset[Any]):
    """Images that are shifted, flipped and noisy in another way each time, by all three sources of random numbers."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].float() / 127.5 - 1
        if random.random() < 0.5:
            image = image.flip(-1)
        row, column = np.random.randint(0, 5, 2)
        size = image.shape[-1]
        image = F.pad(image, (2, 2, 2, 2))[:, row : row + size, column : column + size]
        return image + 0.05 * torch.randn(image.shape), int(self.labels[index])


def deadly(load: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """Loading in which a process kills the run once it has loaded $RELIABILITY_LOADS images. Each is a file in the
    folder $RELIABILITY_LOADERS."""
    loaded = 0

    def loads(self: Any, index: int) -> Any:
        nonlocal loaded
        loaded += 1
        (Path(os.environ["RELIABILITY_LOADERS"]) / str(os.getpid())).touch()
        if loaded == int(os.environ["RELIABILITY_LOADS"]):
            os.kill(os.getpid() if torch.utils.data.get_worker_info() is None else os.getppid(), signal.SIGKILL)
        return load(self, index)

    return loads


class Signalling(Augmented):
    """The first image that is loaded sends a signal, $RELIABILITY_SIGNAL, to all processes of the run, which waits."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, sent = os.environ.get("RELIABILITY_SIGNAL"), Path(os.environ.get("RELIABILITY_SENT", ""))
        if name and torch.utils.data.get_worker_info() is not None and not sent.exists():
            sent.touch()
            os.killpg(0, signal.Signals[f"SIG{name}"])
        return super().__getitem__(index)


def signalling(**arguments: int) -> Dataset:
    """The same as `augmented`, loaded with a signal."""
    made = augmented(**arguments)
    assert isinstance(made.train, Augmented)
    return dataclasses.replace(made, train=Signalling(made.train.images, made.train.labels))


def augmented(**arguments: int) -> Dataset:
    """The drawn garments, with splits of the map style, which are random in training and evaluation."""
    made = synthetic(**arguments)
    splits = (Augmented(split.images, split.labels) for split in (made.train, made.test))
    return Dataset(*splits, made.classes, description="augmented")


def bad_metric(run: Run, *, value: str) -> None:
    """A stage that keeps a metric which is NumPy's, or not finite."""
    run.scalar("own/metric", np.float64(value))


def fails_when_told(run: Run) -> None:
    """A stage that fails where the environment says so."""
    if os.environ.get("RELIABILITY_FAIL"):
        raise RuntimeError("told to fail")
