"""The training step in its plain form, and the signature that every form of it has."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

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
    """Update the weights; torch's own optimizers without the wrappers for profiling, hooks and torch.compile.

    The wrappers cost 60 us a step, as much as the update of a small model.
    """
    bare = _bare(type(optimizer).step)
    if bare is None or "step" in vars(optimizer) or has_step_hooks(optimizer):
        optimizer.step()
    else:
        bare(optimizer)


@cache
def _bare(step: Callable[..., Any]) -> Callable[..., Any] | None:
    """What torch's wrappers around an optimizer's `step` call; None where the step or a wrapper is not torch's.

    A wrapper says by its globals who wrote it, for functools.wraps copies everything else from what is wrapped.
    """

    def foreign(layer: Any) -> bool:
        return not getattr(layer, "__globals__", {}).get("__name__", "").startswith("torch.optim.")

    innermost = inspect.unwrap(step, stop=foreign)
    return None if foreign(innermost) else innermost


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether functions are registered to be called at each step of this optimizer or of all: torch has no public way
    to ask."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))
