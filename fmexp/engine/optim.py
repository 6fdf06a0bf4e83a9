"""Builds the optimizer that a configuration names, in the fastest form that gives the same update.

`no_decay` and `layer_decay` are keys of every optimizer: they make groups of parameters, as timm's do.
"""

import inspect
from collections.abc import Callable, Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from fmexp.config.hydra_versions import instantiate
from fmexp.engine.step import update
from fmexp.errors import ConfigError, first_line

GROUPED = ("no_decay", "layer_decay")  # the keys that the optimizer's class does not get


def build_optimizer(cfg: DictConfig, model: nn.Module, frozen: Collection[str] = ()) -> Optimizer:
    """Build the optimizer named by `cfg`, fused where torch has that: the same update in one kernel.

    On CUDA also capturable, so that the count of steps is on the device, where a graph can raise it.

    Args:
        frozen: names of parameters that it does not get.

    Raises:
        ConfigError: it cannot take a step for this model.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        # Otherwise they import torch._dynamo, over a second, only to tell it that it is not wanted.
        vars(inspect.unwrap(method)).setdefault("__dynamo_disable", inspect.unwrap(method))
    build: partial[Optimizer] = instantiate({k: v for k, v in cfg.items() if k not in GROUPED}, _partial_=True)
    groups = _groups(cfg, model, frozen)
    faster = {"fused"} if not {"fused", "foreach", "differentiable"} & cfg.keys() else set()
    if any(parameter.is_cuda for parameter in model.parameters()) and "capturable" not in cfg:
        faster.add("capturable")
    faster &= inspect.signature(build.func).parameters.keys()
    if faster:
        with suppress(RuntimeError, ConfigError):  # not for this optimizer, device, or kind of parameter or gradient
            return _tried(partial(build, **dict.fromkeys(faster, True)), groups, model, cfg._target_)
    return _tried(build, groups, model, cfg._target_)


def _groups(cfg: DictConfig, model: nn.Module, frozen: Collection[str]) -> list[Any]:
    """The parameters that are trained: as they are, or in groups by their layer and by whether they decay."""
    named = {name: parameter for name, parameter in model.named_parameters() if name not in frozen}
    no_decay, layer_decay = set(cfg.get("no_decay") or ()), cfg.get("layer_decay")
    if not no_decay and layer_decay is None:
        return list(named.values())
    if layer_decay is not None and not isinstance(cfg.get("lr"), int | float):
        raise ConfigError(f"optimizer.layer_decay={layer_decay} is a factor of optimizer.lr, which is not set.")
    own: Collection[str] = getattr(model, "no_weight_decay", set)() if "norm" in no_decay else ()
    layers = _layers(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        is_bias = name.rpartition(".")[2] == "bias"
        spared = "bias" in no_decay if is_bias else "norm" in no_decay and parameter.dim() <= 1
        spared = spared or any(fnmatchcase(name, pattern) for pattern in own)
        layer = 0 if layer_decay is None else layers.get(name, 0)
        group = groups.setdefault((layer, spared), {"params": []})
        group["params"].append(parameter)
        if spared:
            group["weight_decay"] = 0.0
        if layer_decay is not None:
            group["lr"] = cfg.lr * layer_decay ** (max(layers.values()) - layer)
    return list(groups.values())


def _layers(model: nn.Module) -> dict[str, int]:
    """The number of each parameter's layer, from 0 at the images.

    A layer is a child of the model, or a member of a child that is a Sequential or ModuleList, in their order; what
    the model holds itself goes with the first. Models of timm's say it themselves.
    """
    if matcher := getattr(model, "group_matcher", None):
        from timm.models import group_parameters

        return group_parameters(model, matcher(coarse=False), reverse=True)  # type: ignore[no-any-return]
    layers: list[nn.Module] = []
    for child in model.children():
        layers += child.children() if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    layers = [layer for layer in layers if any(True for _ in layer.parameters())]
    numbers = {id(p): number for number, layer in reversed([*enumerate(layers)]) for p in layer.parameters()}
    return {name: numbers.get(id(parameter), 0) for name, parameter in model.named_parameters()}


def _tried(build: Callable[[Any], Optimizer], groups: list[Any], model: nn.Module, name: str) -> Optimizer:
    """The model's optimizer, once another has taken two steps for one number of each kind of the model's parameters:
    torch finds out in a step what its optimizers cannot take. One of somebody else's may want more than that."""
    optimizer = build(groups)
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
