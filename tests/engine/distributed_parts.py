"""Models and data of the tests of several processes, named by `_target_`; and the program that torchrun starts."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.ops import stochastic_depth

from fmexp import compose, execute
from fmexp.datasets import Dataset, synthetic
from fmexp.models import MLP, LeNet


class Double(nn.Module):
    """A model in float64, in which what differs but by rounding is the same to 1e-12."""

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
        self.drop = nn.Dropout2d(0.3)
        self.last = nn.Linear(6, classes)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.first(images)).relu()
        features = features + stochastic_depth(self.branch(features), 0.4, "row", self.training)
        logits: Tensor = self.last(self.drop(features).mean((2, 3)))
        return logits


def double(kind: str, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A model in float64 by its name."""
    channels = input_shape[0]
    if kind == "lenet":
        return Double(LeNet(input_shape=input_shape, num_classes=num_classes))
    if kind == "mlp":
        return Double(MLP(input_shape=input_shape, num_classes=num_classes, hidden=[32, 16], dropout=0.4))
    if kind == "branches":
        return Double(Branches(channels, num_classes))
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    return Double(model)


class Loaded(torch.utils.data.Dataset[Any]):
    """Images that are loaded one at a time; `noisy`: with random numbers of the process's."""

    def __init__(self, images: Tensor, labels: Tensor, noisy: bool) -> None:
        self.images, self.targets, self.noisy = images, labels, noisy

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].float() / 255 - 0.3
        return image + 0.1 * torch.randn(image.shape) * self.noisy, int(self.targets[index])


def loaded(noisy: bool, **how: Any) -> Dataset:
    """fmexp's drawn data, map-style."""
    drawn = synthetic(**how)
    splits = (Loaded(split.images, split.labels, noisy) for split in (drawn.train, drawn.test))  # type: ignore[union-attr]
    return Dataset(*splits, classes=drawn.classes)


def main() -> None:
    """Execute runs one after another, as each of the processes does: a list of [overrides, folder] in a JSON file."""
    for overrides, folder in json.loads(Path(sys.argv[1]).read_text()):
        cfg = compose(overrides)
        for stage in cfg.stage.values():
            stage.required = True
        execute(cfg, folder)


if __name__ == "__main__":
    main()
