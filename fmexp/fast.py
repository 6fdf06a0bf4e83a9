"""Faster ways to take the same training step: a compiled function, and a CUDA graph (docs/performance.md)."""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fmexp import capture, datasets, train
from fmexp.errors import first_line
from fmexp.run import Run, looking

log = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]


def training(run: Run) -> Callable[[Tensor], Iterator[Tensor]]:
    """How this run is trained: a function that trains on the images at some indices, int64 [N], a batch at a time.

    It yields the loss of each batch, a scalar tensor, after it has set run.batch.
    """
    step = _any_step(run)
    size, recorder = run.cfg.train.batch_size, capture.recorder(run)

    def plain(indices: Tensor) -> Iterator[Tensor]:
        workers, seed = run.cfg.train.num_workers, (run.cfg.seed, run.epoch)
        for images, labels in datasets.batches(
            run.dataset, run.dataset.train, indices, size, device=run.device, num_workers=workers, seed=seed
        ):
            run.batch = images, labels
            yield step(images, labels)

    if recorder is None:
        return plain
    captured = capture.Captured(run, step, recorder)

    def by_graph(indices: Tensor) -> Iterator[Tensor]:
        for chosen in indices.to(run.device).split(size):
            images, labels, loss = captured(chosen)
            run.batch = images, labels
            yield loss

    return by_graph


def _any_step(run: Run) -> Step:
    """The step for batches of any size: compiled for whole ones, if run.backend says so and the model can be.

    Trying it changes nothing of the run but run.backend.compiled.
    """
    size, memory_format = run.cfg.train.batch_size, run.backend.memory_format

    def plain(images: Tensor, labels: Tensor) -> Tensor:
        return train.step(run.model, run.optimizer, images.to(memory_format=memory_format), labels)

    if run.backend.compiled and datasets.length(run.dataset.train) >= size:
        try:
            with looking(run.model, 0):
                run.model.train()
                images, labels = run.dataset.take(run.dataset.train, torch.arange(size))
                whole = compiled(run.model, run.optimizer, images.to(run.device), labels.to(run.device))
            return lambda images, labels: (whole if len(labels) == size else plain)(images, labels)
        except Exception as error:  # whatever a compiler raises
            log.warning("the model cannot be compiled and is trained without that: %s", first_line(error))
    run.backend = replace(run.backend, compiled=False)
    return plain


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
