"""The whole training step as one CUDA graph: index, normalise, forward, backward and update are one call.

A replay repeats what the kernels did, and nothing that Python did. So a step is captured only if it changes nothing
but the device's memory, and its graph is used only if the first replay gives the very bits of the plain step: a resumed
run takes its first steps plainly, and must end with the same weights.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fmexp import randomness
from fmexp.datasets import Split
from fmexp.run import Run

log = logging.getLogger(__name__)

WARM_UP = 3  # plain steps before a capture, in which libraries and optimizers set themselves up
Taken = tuple[Tensor, Tensor, Tensor]  # images and labels of a batch, and its loss


class Recorder(Protocol):
    """What is needed of CUDA's graphs."""

    def aside(self) -> AbstractContextManager[None]:
        """The stream on which it records, for the steps before that."""

    def record(self, function: Callable[[], Taken]) -> "Graph":
        """Note the kernels of a function, in place of running them."""


@dataclass(frozen=True)
class Graph:
    """What was recorded: the tensors that a replay fills."""

    filled: Taken
    replay: Callable[[], None]


class CudaGraph:
    """A `Recorder` on a CUDA device (PyTorch's notes on CUDA semantics, section CUDA Graphs)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                yield
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Callable[[], Taken]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
            filled = function()
        return Graph(filled, graph.replay)


def recorder(run: Run) -> Recorder | None:
    """What can capture this run's step: nothing but on CUDA, with the data there and train.compile not false."""
    possible = run.device.type == "cuda" and isinstance(run.dataset.train, Split) and run.cfg.train.compile is not False
    return CudaGraph(run.device) if possible else None


class Captured:
    """Training on the batch at some indices: plainly at first, then by a graph, and plainly again where that fails.

    What a stage changes of the optimizer's settings, of what is trained or of hooks is seen: the step is captured anew.
    """

    def __init__(self, run: Run, step: Callable[[Tensor, Tensor], Tensor], recorder: Recorder) -> None:
        self.run, self.step, self.recorder = run, step, recorder
        self.possible, self.executed = True, 0
        self.graph: Graph | None = None
        self.wait, self.next_wait = WARM_UP, 2 * WARM_UP
        self.modules = list(run.model.modules())

    def __call__(self, chosen: Tensor) -> Taken:
        """Train on the training images at `chosen`, int64 [B] on the device."""
        if not self.possible or len(chosen) != self.run.cfg.train.batch_size:
            return self._plain(chosen)
        if self.graph and self._holds():
            return self._replay(self.graph, chosen)
        if self.wait:
            self.wait -= 1
            with self.recorder.aside():
                return self._plain(chosen)
        return self._capture(chosen)

    def _holds(self) -> bool:
        """Whether all is as it was captured. Only a stage can have changed it; else the graph is dropped."""
        if self.executed != self.run.executed:
            self.executed = self.run.executed
            if self._fixed() != self.fixed:
                self.graph, self.wait, self.next_wait = None, self.next_wait, 2 * self.next_wait
        return self.graph is not None

    def _plain(self, chosen: Tensor) -> Taken:
        images, labels = self.run.dataset.take(self.run.dataset.train, chosen)
        return images, labels, self.step(images, labels)

    def _replay(self, graph: Graph, chosen: Tensor) -> Taken:
        self.chosen.copy_(chosen)
        graph.replay()
        images, labels, loss = graph.filled
        return images.clone(), labels.clone(), loss.clone()  # the next replay fills them anew

    def _capture(self, chosen: Tensor) -> Taken:
        """Take a step plainly, and capture one, and see whether it does the same. The plain one counts."""
        try:
            before, outside = self._state(), self._outside()
        except Exception as error:  # for a state of an unknown kind
            self._give_up(error)
            return self._plain(chosen)
        with self.recorder.aside():
            done = self._plain(chosen)
        after = self._state()
        try:
            if self._outside() != outside:
                raise RuntimeError("it changes what Python keeps, or draws random numbers there")
            self.fixed, self.chosen = self._fixed(), torch.zeros_like(chosen)
            if self._hooked():
                raise RuntimeError("the model has hooks")
            graph = self.recorder.record(lambda: self._plain(self.chosen))
            self._put(before)
            replayed = self._replay(graph, chosen)
            if _bits([replayed, self._state()]) != _bits([done, after]):
                raise RuntimeError("a replay does not give the bits of the plain step")
            self.graph, self.executed = graph, self.run.executed
            log.info("step %d: the training step is a CUDA graph from here on", self.run.step + 1)
        except Exception as error:  # whatever a capture raises
            self._put(after)
            self._give_up(error)
        return done

    def _give_up(self, error: Exception) -> None:
        self.possible = False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("the training step cannot be a CUDA graph and is taken kernel by kernel: %s", reason)

    def _tensors(self) -> list[Tensor]:
        """What a step changes: parameters, buffers, and what the optimizer keeps on the device."""
        model, state = self.run.model, self.run.optimizer.state.values()
        kept = [value for values in state for value in values.values() if self._on_device(value)]
        return [*model.parameters(), *model.buffers(), *kept]

    def _on_device(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.run.device.type

    def _state(self) -> dict[str, Any]:
        """A copy of it on the host, where there is more room, and of the random state."""
        tensors = [tensor.detach().to("cpu", copy=True) for tensor in self._tensors()]
        return {"tensors": tensors, "random": randomness.capture()}

    @torch.no_grad()
    def _put(self, state: dict[str, Any]) -> None:
        for tensor, value in zip(self._tensors(), state["tensors"], strict=True):
            tensor.copy_(value)
        randomness.restore(state["random"])

    def _settings(self) -> list[Any]:
        groups = self.run.optimizer.param_groups
        return [value for group in groups for key, value in group.items() if key != "params"]

    def _fixed(self) -> dict[str, Any]:
        """What a graph takes as it stood when it was captured."""
        return {
            "settings": self._settings(),
            "tensors": [(tensor.data_ptr(), tensor.requires_grad) for tensor in self._tensors()],
            "modes": [module.training for module in self.modules],
            "hooks": self._hooked(),
        }

    def _hooked(self) -> bool:
        return any(
            getattr(owner, kind, None) for owner in (*self.modules, *self.run.model.parameters()) for kind in HOOKS
        )

    def _outside(self) -> Any:
        """What a graph cannot change: Python's own part of the model, of the optimizer and of the random state."""
        random = randomness.capture()
        del random["cuda" if self.run.device.type == "cuda" else "torch"]  # the device's own, which is captured
        owned = [*map(vars, self.modules), *self.run.optimizer.state.values()]
        values = [
            {name: value for name, value in own.items() if name not in MODULE and not self._on_device(value)}
            for own in owned
        ]
        return _bits([random, self._settings(), values])


MODULE = vars(nn.Module()).keys()
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip


def _bits(value: Any) -> Any:
    """A nested value with its tensors as bytes, so that == says whether it is the same to the bit."""
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: _bits(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(part) for part in value]
    return value
