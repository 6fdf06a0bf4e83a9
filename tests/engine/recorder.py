"""A graph on the CPU with the meaning of CUDA's: what was done is done again on the same memory, without its Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmexp.engine.cuda_graph import Graph


class CpuGraph(TorchDispatchMode):
    """Like a CUDA graph it notes operations in place of executing them, refuses to read a value, and knows no Python.

    Attributes:
        replays: how often it was replayed.
        recorded: how often it was recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replays = self.recorded = 0

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def record(self, function: Callable[[], Tensor]) -> Graph:
        self.recorded += 1
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        random = torch.get_rng_state()
        try:
            with self:
                return Graph(function(), self.replay)
        finally:
            torch.set_rng_state(random)
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = kwargs.get(argument.name, args[place] if place < len(args) else None)
                self.before += [(t.detach(), t.detach().clone()) for t in tree_leaves(written) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            if all(part.alias_info is None for part in func._schema.returns):
                for tensor, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(tensor, Tensor):
                        tensor.copy_(value)
