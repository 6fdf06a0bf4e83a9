"""Loss and gradients of a batch, compiled by torch.compile as one function (benchmarks/README.md)."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmexp.engine.loss import Loss
from fmexp.engine.step import Backward, precise


def compiled_backward(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss = F.cross_entropy, precision: str | int = 32
) -> Backward:
    """Compile `plain_backward` for batches shaped as this one.

    The modules' own gradient functions are not called, so hooks on gradients are not either.

    Raises:
        Exception: whatever the compiler raises on a model that it cannot take.
    """
    parameters: dict[str, Tensor] = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    buffers = dict(model.named_buffers())

    def of_batch(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        called = partial(torch.func.functional_call, model, (parameters, buffers))
        return precise(called, loss, precision)(images, labels)

    # Called from C++ and in the model's own memory layout, without which a small batch gains nothing.
    options: dict[str, Any] = {"cpp_wrapper": True, "layout_optimization": False} if images.device.type == "cpu" else {}
    function = torch.compile(torch.func.grad_and_value(of_batch), dynamic=False, fullgraph=True, options=options)

    def backward(images: Tensor, labels: Tensor, factor: float) -> Tensor:
        with torch.no_grad():
            gradients, value = function(parameters, buffers, images, labels)
            for name, parameter in parameters.items():
                gradient = gradients[name] if factor == 1 else gradients[name] * factor
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return value  # type: ignore[no-any-return]

    with _quiet_compiler(), torch.no_grad():
        function(parameters, buffers, images, labels)  # compiles now, so that a failure is known before training
    return backward


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Silence what the compiler says about its own modules, and its toolchain about GPUs that are not there."""
    toolchain = logging.getLogger("torch.utils.cpp_extension")
    level = toolchain.level
    toolchain.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        toolchain.setLevel(level)
