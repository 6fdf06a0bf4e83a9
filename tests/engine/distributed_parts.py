"""Models, data and stages of the tests of several processes, named by `_target_`; and what torchrun starts of them."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import open_dict
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.ops import stochastic_depth

from fmexp import compose, execute
from fmexp.datasets import Dataset, synthetic
from fmexp.models import MLP, LeNet
from fmexp.run import Run


class Double(nn.Module):
    """A model in float64, in which what differs by rounding alone is the same to 1e-12."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.double())
        return logits


class Branches(nn.Module):
    """Layers that are left out for some images (DropPath), dropout of channels, and a parameter that nothing uses."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 3)
        self.norm = nn.BatchNorm2d(6, momentum=None)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.plain_norm = nn.BatchNorm2d(6, affine=False)
        self.drop = nn.Dropout2d(0.3)
        self.last = nn.Linear(6, classes)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.first(images)).relu()
        features = features + stochastic_depth(self.plain_norm(self.branch(features)), 0.4, "row", self.training)
        logits: Tensor = self.last(self.drop(features).mean((2, 3)))
        return logits


class Centred(nn.Module):
    """A linear layer after a running mean of its own, a new tensor at each batch."""

    mean: Tensor

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.last = nn.Linear(input_shape[1] * input_shape[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * images.detach().mean()
        logits: Tensor = self.last((images - self.mean).flatten(1))
        return logits


class Attends(nn.Module):
    """Attention between the rows of an image, with dropout inside of torch's own function."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.3, batch_first=True)
        self.last = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1, 2)
        logits: Tensor = self.last(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))
        return logits


def double(kind: str, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A model in float64 by its name."""
    channels = input_shape[0]
    models = {
        "lenet": lambda: LeNet(input_shape=input_shape, num_classes=num_classes),
        "mlp": lambda: MLP(input_shape=input_shape, num_classes=num_classes, hidden=[32, 16], dropout=0.4),
        "branches": lambda: Branches(channels, num_classes),
        "resnet18": lambda: resnet18(num_classes=num_classes),
    }
    model = models[kind]()
    if kind == "resnet18":
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    return Double(model)


class Struck(Attends):
    """STRIKES, such as "TERM 1 5", sends the signal to process 1 in the midst of its fifth batch of several images."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(input_shape[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > 2:  # else it is a check before training
            SEEN.append(len(images))
            if os.environ.get("STRIKES", "").endswith(f" {os.environ.get('RANK')} {len(SEEN)}"):
                os.kill(os.getpid(), getattr(signal, f"SIG{os.environ['STRIKES'].split()[0]}"))
        return super().forward(images)


SEEN: list[int] = []


class Loaded(torch.utils.data.Dataset[Any]):
    """Images that are loaded one at a time; `noisy`: with random numbers of the process's; `broken`: one cannot be."""

    def __init__(self, images: Tensor, labels: Tensor, noisy: bool, broken: int) -> None:
        self.images, self.targets, self.noisy, self.broken = images, labels, noisy, broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.broken:
            raise OSError("the disk has a scratch")
        image = self.images[index].float() / 255 - 0.3
        return image + 0.1 * torch.randn(image.shape) * self.noisy, int(self.targets[index])


def loaded(noisy: bool = False, broken: int = -1, **how: Any) -> Dataset:
    """fmexp's drawn data, map-style."""
    drawn = synthetic(**how)
    train, test = (Loaded(split.images, split.labels, noisy, broken) for split in (drawn.train, drawn.test))  # type: ignore[union-attr]
    return Dataset(train, test, classes=drawn.classes)


def shrink(run: Run, *, tag: str) -> None:
    """A stage that changes the weights."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(0.9)


def execute_strictly(overrides: list[str], folder: Path, pause_at: int | None = None) -> float:
    """Execute a run in which every stage's failure is the run's."""
    cfg = compose(overrides)
    for stage in cfg.stage.values():
        with open_dict(stage):
            stage.required = True
    return execute(cfg, folder, pause_at=pause_at)


def main() -> None:
    """Execute runs one after another, as each of the processes does: [overrides, folder, steps] in a list of a JSON
    file. At the steps a run pauses; what is returned there is kept beside its folder, by rank. With APART in the
    environment each process believes that the others are on other machines."""
    if os.environ.get("APART"):
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    for overrides, folder, pauses in json.loads(Path(sys.argv[1]).read_text()):
        values = [execute_strictly(overrides, folder, step) for step in [*pauses, None]]
        if pauses:
            Path(f"{folder}.{os.environ['RANK']}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
