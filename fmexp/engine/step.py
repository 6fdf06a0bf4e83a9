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

from fmexp.engine.loss import Loss

# Images float32 [B, C, H, W] and labels (int64 [B], or probabilities [B, K]) to the loss before the update, a scalar
# tensor. Plain, compiled or a CUDA graph: whoever trains calls a step and does not know which it is.
Step = Callable[[Tensor, Tensor], Tensor]
# The same, and the gradients, times a factor, are added to those of the parameters.
Backward = Callable[[Tensor, Tensor, float], Tensor]


def plain_backward(model: nn.Module, loss: Loss = F.cross_entropy, precision: str | int = 32) -> Backward:
    """Forward, loss and backward as PyTorch does them; with bf16 the forward under autocast."""
    forward = precise(model, loss, precision)

    def backward(images: Tensor, labels: Tensor, factor: float) -> Tensor:
        value = forward(images, labels)
        (value if factor == 1 else value * factor).backward()
        return value.detach()

    return backward


def precise(model: Callable[[Tensor], Tensor], loss: Loss, precision: str | int) -> Step:
    """The loss of a batch, computed in a precision: 32, or bf16 where autocast finds that it is safe."""
    if precision == 32:
        return lambda images, labels: loss(model(images), labels)

    def autocast(images: Tensor, labels: Tensor) -> Tensor:
        # Without its cache, which a CUDA graph would read after its time (pytorch#71631).
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return loss(model(images).float(), labels)

    return autocast


class TrainStep:
    """A training step: backward, clip, update.

    Args:
        backward: how gradients are computed; by default plainly, of the cross-entropy.
        clip_grad: the norm to which the gradients of all parameters together are cut.

    Attributes:
        begins, ends, share: where the batch stands in its window, whose gradients make one update: whether it is the
            first, whether it is the last, and what share of the window's images it has. One batch is a window, unless
            train.accumulate is above 1.
        grad_norm: the norm before the last update, a scalar tensor; 0 while there was none, or without clip_grad.
        last_update: what the last update was, where somebody wants to know; else None, which costs nothing.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, backward: Backward | None = None, clip_grad: float | None = None
    ) -> None:
        self.optimizer, self.backward, self.clip_grad = optimizer, backward or plain_backward(model), clip_grad
        self.begins, self.ends, self.share = True, True, 1.0
        self.grad_norm = torch.zeros((), device=next(model.parameters()).device)
        self.last_update: LastUpdate | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.begins:
            for parameter in self.parameters():
                parameter.grad = None
        loss = self.backward(images, labels, self.share)
        if self.ends:
            with torch.no_grad():
                if self.clip_grad is not None:  # copied, for a graph fills the same tensor at each replay
                    self.grad_norm.copy_(nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad))
                if self.last_update is None:
                    update(self.optimizer)
                else:
                    self.last_update.make(self.optimizer)
        return loss

    def parameters(self) -> list[Tensor]:
        """What the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class LastUpdate:
    """What an optimizer's last update was made from, and what it did: for stages that show how a model learns.

    It is copied within the step, so that it is the same of a plain step, a compiled one and a graph, which fills these
    tensors at each replay.

    Attributes:
        made: whether there was an update yet.
        parameters: all that the optimizer has.
        gradients: theirs, as the optimizer took them: of a whole window, and clipped; zeros where one had none.
        changes: the new weights minus the old ones.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.made = False
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.changes = [torch.zeros_like(parameter) for parameter in self.parameters]

    def make(self, optimizer: Optimizer) -> None:
        """Update the weights, and keep what that was."""
        for parameter, gradient, change in zip(self.parameters, self.gradients, self.changes, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad.to_dense())
            change.copy_(parameter)
        update(optimizer)
        for parameter, change in zip(self.parameters, self.changes, strict=True):
            torch.sub(parameter, change, out=change)
        self.made = True

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "gradients": self.gradients, "changes": self.changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]
        for kept, saved in ((self.gradients, state["gradients"]), (self.changes, state["changes"])):
            for tensor, value in zip(kept, saved, strict=True):
                tensor.copy_(value)


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
