"""State that a model or an optimizer of one's own holds beside its state_dict, such as a scheduler of torch's.

Whatever has `state_dict` and `load_state_dict` is kept in checkpoints, under the path of its attribute. The rest, such
as a number that counts batches, is not, and the first checkpoint names what of it has changed.
"""

import collections
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fmexp.engine.cuda_graph import bits

log = logging.getLogger(__name__)

# What the state_dict covers, or fmexp itself sets; and two private names of torch's, which its first step changes.
_OF_MODULES = {*vars(nn.Module())}
_OF_OPTIMIZERS = {"state", "param_groups", "defaults", "_opt_called", "_need_device_dtype_check_for_fused"}
_AS_THEY_ARE = (bool, int, float, complex, str, bytes, type(None))
_PICKLED = (np.ndarray, np.generic, np.random.Generator, np.random.RandomState, random.Random, collections.deque, set)


class ExtraState:
    """The state that a run's model and optimizer hold beside their state_dict; made before the training begins.

    Args:
        can_keep: whether a checkpoint can hold what the `state_dict` of an object gives.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, can_keep: Callable[[Any], bool]) -> None:
        self.model, self.optimizer, self.can_keep = model, optimizer, can_keep
        self.kept = set(self._parts())
        self.before = self._values()
        self.first = True

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, by its path. The first call warns of what a resumed run will not have."""
        parts = self._parts()
        if self.first:
            self.first = False
            self.kept = {path for path in self.kept & parts.keys() if self.can_keep(parts[path])}
            values = self._values()
            changed = [path for path in values if path not in self.before or [values[path]] != [self.before[path]]]
            if lost := sorted({*parts} - self.kept | {*changed}):
                more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
                log.warning(
                    "a resumed run begins with what these hold at its start: %s. Checkpoints keep parameters, buffers, "
                    "and what a state_dict gives: tensors, numbers, strings, lists and dicts.",
                    ", ".join(lost[:5]) + more,
                )
        return {path: parts[path].state_dict() for path in sorted(self.kept & parts.keys())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each part its state back, and warn of those that have none."""
        parts = self._parts()
        for path in state.keys() & parts.keys():
            parts[path].load_state_dict(state[path])
        if absent := sorted(parts.keys() - state.keys()):
            log.warning("the checkpoint has no state of %s, which starts again", ", ".join(absent))

    def _held(self) -> Iterator[tuple[str, object, Any]]:
        """What the modules and the optimizer hold, also in lists, tuples and dicts: its path, its owner, itself."""
        modules = [(f"model.{name}".rstrip("."), module) for name, module in self.model.named_modules()]
        for path, module in modules:
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{path}.{name}", module, buffer
        for path, owner in (*modules, ("optimizer", self.optimizer)):
            covered = _OF_MODULES if isinstance(owner, nn.Module) else _OF_OPTIMIZERS
            for name, value in vars(owner).items():
                if name not in covered:
                    yield f"{path}.{name}", owner, value
                    yield from ((f"{path}.{name}.{key}", owner, part) for key, part in _inside(value))

    def _parts(self) -> dict[str, Any]:
        """All that has a state_dict of its own, once each, and that no other state_dict covers."""
        found, known = {}, {id(self.optimizer), *map(id, self.model.modules())}
        for path, _, value in self._held():
            methods = (getattr(type(value), name, None) for name in ("state_dict", "load_state_dict"))
            if all(map(callable, methods)) and id(value) not in known:
                known.add(id(value))
                found[path] = value
        return found

    def _values(self) -> dict[str, Any]:
        """Numbers, strings, tensors and generators that no state_dict covers, to be compared with =="""
        covered = {t.data_ptr() for t in self.model.state_dict().values() if isinstance(t, Tensor)}
        found: dict[str, Any] = {}
        for path, owner, value in self._held():
            if _keeps_its_own(owner):
                continue
            if isinstance(value, torch.Generator):
                value = value.get_state()
            with suppress(Exception):  # of a kind that cannot be compared
                if isinstance(value, Tensor) and value.data_ptr() not in covered:
                    found[path] = bits(value)
                elif isinstance(value, _AS_THEY_ARE):
                    found[path] = value
                elif isinstance(value, _PICKLED):
                    found[path] = pickle.dumps(value)
        return found


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """The parts of a list, tuple or dict, by their index or key."""
    if isinstance(value, dict):
        return [(key if isinstance(key, str | int) else n, part) for n, (key, part) in enumerate(value.items())]
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _keeps_its_own(owner: object) -> bool:
    """Whether an object is of torch's own classes, or says itself what its state is."""
    own = [base for base in type(owner).__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    return not own or any({"state_dict", "get_extra_state"} & vars(base).keys() for base in own)
