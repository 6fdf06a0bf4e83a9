"""The training step in its plain form, and the signature that every form of it has."""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

# Images float32 [B, C, H, W] and labels int64 [B] to the loss before the update, a scalar tensor. Plain, compiled or a
# CUDA graph: whoever trains calls a step and does not know which it is.
Step = Callable[[Tensor, Tensor], Tensor]


def train_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """Train on one batch: forward, cross-entropy, backward, update."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    with torch.no_grad():
        update(optimizer)
    return loss.detach()


def update(optimizer: Optimizer) -> None:
    """Update the weights without the wrappers for profiling, hooks and torch.compile around `Optimizer.step`.

    The wrappers cost 60 us a step, as much as the update of a small model.
    """
    if wrapped := vars(optimizer).get("step"):  # by a scheduler, which warns where its wrapper is left out
        wrapped()
    else:
        inspect.unwrap(type(optimizer).step)(optimizer)
