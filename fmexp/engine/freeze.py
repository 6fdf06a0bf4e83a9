"""Layers that training leaves as they are: their weights, and the statistics of their batch normalisation."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fmexp.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Freeze the layers and parameters whose names match; returns the names of all parameters that are frozen.

    Args:
        patterns: as a shell has them, with * for any characters, dots too; a layer's name stands for all in it.

    Raises:
        ConfigError: one of them matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    names = [name for name, _ in model.named_modules() if name] + list(parameters)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            children = ", ".join(name for name, _ in model.named_children())
            close = difflib.get_close_matches(pattern, names, n=3)
            meant = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"train.freeze: {pattern} is no layer and no parameter of the model.{meant}\n"
                f"Its layers are {children}; what is in one has its name with a dot, such as {names[-1]}."
            )
    frozen = {name for name in parameters if _is_frozen(name, patterns)}
    if patterns and not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        raise ConfigError(f"train.freeze=[{', '.join(patterns)}] leaves no parameter to train. Leave one of them out.")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def train_mode(model: nn.Module, patterns: Sequence[str]) -> None:
    """Put a model into train mode, but for frozen layers that have buffers, such as BatchNorm's running statistics:
    in eval mode these stay as they are."""
    model.train()
    for name, module in model.named_modules() if patterns else ():
        if any(True for _ in module.buffers(recurse=False)):
            own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
            if _is_frozen(name, patterns) or (own and not any(own)):
                module.eval()


def _is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name, or that of a layer which it is in, matches one of the patterns."""
    parts = name.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(one, pattern) for one in around for pattern in patterns)
