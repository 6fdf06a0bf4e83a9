"""Builds the optimizer that a configuration names, in the fastest form that gives the same update."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from fmexp.config.hydra_versions import instantiate
from fmexp.engine.step import update
from fmexp.errors import ConfigError, first_line


def build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer named by `cfg`, fused where torch has that: the same update in one kernel.

    On CUDA also capturable, so that the count of steps is on the device, where a graph can raise it.

    Raises:
        ConfigError: it cannot take a step for this model.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        # Otherwise they import torch._dynamo, over a second, only to tell it that it is not wanted.
        vars(inspect.unwrap(method)).setdefault("__dynamo_disable", inspect.unwrap(method))
    build: partial[Optimizer] = instantiate(cfg, _partial_=True)
    faster = {"fused"} if not {"fused", "foreach", "differentiable"} & cfg.keys() else set()
    if any(parameter.is_cuda for parameter in model.parameters()) and "capturable" not in cfg:
        faster.add("capturable")
    faster &= inspect.signature(build.func).parameters.keys()
    if faster:
        with suppress(RuntimeError, ConfigError):  # not for this optimizer, device, or kind of parameter or gradient
            return _tried(partial(build, **dict.fromkeys(faster, True)), model, cfg._target_)
    return _tried(build, model, cfg._target_)


def _tried(build: Callable[[Any], Optimizer], model: nn.Module, name: str) -> Optimizer:
    """The model's optimizer, once another has taken two steps for one number of each kind of the model's parameters:
    torch finds out in a step what its optimizers cannot take. One of somebody else's may want more than that."""
    optimizer = build(model.parameters())
    if not isinstance(optimizer, Optimizer):
        return optimizer
    if "closure" in (p.name for p in inspect.signature(optimizer.step).parameters.values() if p.default is p.empty):
        raise ConfigError(f"optimizer._target_={name} computes the loss several times a step, which fmexp does not do.")
    if type(optimizer).__module__.startswith("torch.optim."):
        try:
            tried = build(_stand_ins(model))
            with torch.no_grad():
                update(tried)
                update(tried)
        except Exception as error:  # whatever torch raises
            raise ConfigError(f"optimizer._target_={name} cannot train this model: {first_line(error)}.") from error
    return optimizer


def _stand_ins(model: nn.Module) -> list[nn.Parameter]:
    """A parameter of one number, with its gradient, for each kind that the model has, in the model's order."""
    layers = [module for module in model.modules() if getattr(module, "sparse", False) is True]  # nn.Embedding's word
    sparse = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    kinds = ((p.dtype, p.device, p.dim(), p.requires_grad, id(p) in sparse) for p in model.parameters())
    made = []
    for dtype, device, dimensions, trained, is_sparse in dict.fromkeys(kinds):
        one = torch.ones([1] * dimensions, dtype=dtype, device=device)
        made.append(nn.Parameter(one, requires_grad=trained))
        if trained:
            made[-1].grad = one.to_sparse(1) if is_sparse else one.clone()
    return made
