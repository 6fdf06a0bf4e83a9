"""A faster way to take the same training step: loss and gradients as one compiled function (docs/performance.md)."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fmexp import datasets, train
from fmexp.run import Run, looking

log = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]


def whole_batches(run: Run) -> Step:
    """The step for batches of train.batch_size as run.backend has it; where that fails, the plain one, and it is said.

    Trying it changes nothing of the run but run.backend.compiled.
    """
    size = run.cfg.train.batch_size
    whole = datasets.length(run.dataset.train) >= size
    if run.backend.compiled and whole:
        try:
            with looking(run.model, 0):
                run.model.train()
                images, labels = run.dataset.take(run.dataset.train, torch.arange(size))
                return compiled(run.model, run.optimizer, images.to(run.device), labels.to(run.device))
        except Exception as error:  # whatever a compiler raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("the model cannot be compiled and is trained without that: %s", reason)
    run.backend = replace(run.backend, compiled=False)
    return partial(train.step, run.model, run.optimizer)


def compiled(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> Step:
    """`train.step` of a model, compiled for batches of this shape: loss and gradients are one function.

    The modules' own gradient functions are not called, so hooks on gradients are not either.
    """
    parameters: dict[str, Tensor] = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, (parameters, buffers), (images,)), labels)

    # Called from C++ and in the model's own memory layout, without which a small batch gains nothing.
    options: dict[str, Any] = {"cpp_wrapper": True, "layout_optimization": False} if images.device.type == "cpu" else {}
    function = torch.compile(torch.func.grad_and_value(loss), dynamic=False, fullgraph=True, options=options)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            gradients, value = function(parameters, buffers, images, labels)
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
            train.update(optimizer)
        return value  # type: ignore[no-any-return]

    toolchain = logging.getLogger("torch.utils.cpp_extension")  # it warns of GPUs that are not there
    level = toolchain.level
    toolchain.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler's own modules, while it compiles
            function(parameters, buffers, images, labels)
    finally:
        toolchain.setLevel(level)
    return step
