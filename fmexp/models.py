"""The models that YAML can name: f(*, input_shape=(channels, height, width), num_classes, ...) -> nn.Module.

Each takes float32 [B, C, H, W] and returns logits [B, num_classes].
"""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """The tutorial's network: two 5x5 convolutions, each with 2x2 max-pooling, then three linear layers.

    Raises:
        ValueError: an image is smaller than 16x16, so that nothing is left after the second pooling.
    """

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, *size = input_shape
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        if min(height, width) < 1:
            raise ValueError(f"LeNet needs images of at least 16x16 pixels, not {size[0]}x{size[1]}")
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


class MLP(nn.Sequential):
    """Linear layers of the `hidden` sizes with ReLU (and dropout, a probability in [0, 1)) on the flattened image."""

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        sizes = [prod(input_shape), *hidden]
        for before, after in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(sizes[-1], num_classes))


def resnet18(*, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al., arXiv 1512.03385), untrained, for images of any number of channels."""
    from torchvision.models import resnet18 as torchvision_resnet18

    model: nn.Module = torchvision_resnet18(num_classes=num_classes)
    if input_shape[0] != 3:
        model.conv1 = nn.Conv2d(input_shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
    return model
