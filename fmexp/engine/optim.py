"""Builds the optimizer that a configuration names, in the fastest form that gives the same update."""

import inspect

from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from fmexp.config.hydra_versions import instantiate


def build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer named by `cfg`, fused where torch has that: the same update in one kernel.

    On CUDA also capturable, so that the count of steps is on the device, where a graph can raise it.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        # Otherwise they import torch._dynamo, over a second, only to tell it that it is not wanted.
        vars(inspect.unwrap(method)).setdefault("__dynamo_disable", inspect.unwrap(method))
    build = instantiate(cfg, _partial_=True)
    faster = {"fused"} if not {"fused", "foreach", "differentiable"} & cfg.keys() else set()
    if any(parameter.is_cuda for parameter in model.parameters()) and "capturable" not in cfg:
        faster.add("capturable")
    faster &= inspect.signature(build.func).parameters.keys()
    if faster:
        try:
            return build(model.parameters(), **dict.fromkeys(faster, True))  # type: ignore[no-any-return]
        except RuntimeError:  # not for this optimizer, device or type of parameter
            pass
    return build(model.parameters())  # type: ignore[no-any-return]
