"""The model: how rough an image is in both directions, and a linear layer."""

import torch
from torch import Tensor, nn


class Roughness(nn.Module):
    """Logits [B, num_classes] from the mean step between neighbouring pixels, downwards and sideways."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.judge = nn.Linear(2 * input_shape[0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        downwards, sideways = (images.diff(dim=axis).abs().mean(dim=(2, 3)) for axis in (2, 3))
        return self.judge(self.scale * torch.cat([downwards, sideways], dim=1))
