"""The whole training step as one CUDA graph: index, normalise, forward, backward and update are one call.

A replay repeats what the kernels did, and nothing that Python did. So a step is captured only if it leaves all of the
model and the optimizer as it is but for what their tensors hold, and its graph is used only if the first replay gives
the very bits of the plain step: a resumed run takes its first steps plainly, and must end with the same weights.
"""

import logging
import pickle
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fmexp import randomness
from fmexp.datasets import Split
from fmexp.errors import first_line
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

    A stage may change the model or the optimizer: then the step is captured anew.
    """

    def __init__(self, run: Run, step: Callable[[Tensor, Tensor], Tensor], recorder: Recorder) -> None:
        self.run, self.step, self.recorder = run, step, recorder
        self.possible = True
        self.graph: Graph | None = None
        self.wait = self.patience = WARM_UP  # plain steps until the next capture
        self.replays, self.looked = 0, (0, 0)
        self.fixed: Any = None
        self.kept: list[Tensor] = []  # what the graph uses must not be freed

    def __call__(self, chosen: Tensor) -> Taken:
        """Train on the training images at `chosen`, int64 [B] on the device."""
        if not self.possible or len(chosen) != self.run.cfg.train.batch_size:
            return self._plain(chosen)
        if self.graph and self._holds():
            self.replays += 1
            return self._replay(self.graph, chosen)
        if self.wait:
            self.wait -= 1
            with self.recorder.aside():
                return self._plain(chosen)
        return self._capture(chosen)

    def _holds(self) -> bool:
        """Whether all is as it was captured. A stage can have changed it, or another batch size at an epoch's end."""
        if self.looked != (self.run.executed, self.run.epoch):
            self.looked = self.run.executed, self.run.epoch
            try:
                same = _Look(self.run).fixed == self.fixed
            except Exception:  # something of an unknown kind has come; the next capture says so
                same = False
            if not same:
                self.patience = WARM_UP if self.replays > self.patience else 2 * self.patience
                self.graph, self.wait = None, self.patience
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
            look = _Look(self.run)
            before = look.values()
        except Exception as error:  # for a state of an unknown kind
            self._give_up(error)
            return self._plain(chosen)
        with self.recorder.aside():
            done = self._plain(chosen)
        after = look.values()
        try:
            if _Look(self.run).fixed != look.fixed or look.outside(before) != look.outside(after):
                raise RuntimeError("it changes what Python keeps, or draws random numbers there")
            if look.hooked:
                raise RuntimeError("the model has hooks")
            self.chosen = torch.zeros_like(chosen)
            graph = self.recorder.record(lambda: self._plain(self.chosen))
            if _Look(self.run).fixed != look.fixed:
                raise RuntimeError("it changes what Python keeps")
            look.put(before)
            replayed = self._replay(graph, chosen)
            if bits([replayed, look.values()]) != bits([done, after]):
                raise RuntimeError("a replay does not give the bits of the plain step")
            self.graph, self.fixed, self.kept, self.replays = graph, look.fixed, look.tensors, 0
            self.looked = self.run.executed, self.run.epoch
            log.info("step %d: the training step is a CUDA graph from here on", self.run.step + 1)
        except Exception as error:  # whatever a capture raises
            look.put(after)
            self._give_up(error)
        return done

    def _give_up(self, error: Exception) -> None:
        self.possible = False
        why = first_line(error)
        log.warning("the training step cannot be a CUDA graph and is taken kernel by kernel: %s", why)


class _Look:
    """What a step is made of, at one moment.

    Attributes:
        tensors: all that is on the device: parameters, buffers, other attributes of modules, the optimizer's state. A
            step, and so a graph, may change what they hold.
        fixed: everything else of the model and of the optimizer, and where these tensors are: what a graph takes as it
            stood when it was captured.
        hooked: whether the model has hooks, which are Python.

    Raises:
        Exception: something of a kind that cannot be compared.
    """

    def __init__(self, run: Run) -> None:
        self.device = run.device.type
        model, found = run.model, dict[int, Tensor]()
        own = [{k: v for k, v in vars(module).items() if k not in INTERNAL} for module in model.modules()]
        parts = [own, list(model.parameters()), list(model.buffers()), vars(run.optimizer)]
        owners = (*model.modules(), *model.parameters())
        self.hooked = any(getattr(owner, kind, None) for owner in owners for kind in HOOKS)
        self.fixed = self.hooked, self._compared(parts, found)
        self.tensors = list(found.values())

    def values(self) -> dict[str, Any]:
        """A copy of the tensors on the host, where there is more room, and of the random state."""
        tensors = [tensor.detach().to("cpu", copy=True) for tensor in self.tensors]
        return {"tensors": tensors, "random": randomness.capture()}

    @torch.no_grad()
    def put(self, values: dict[str, Any]) -> None:
        """Give back what `values` took."""
        for tensor, value in zip(self.tensors, values["tensors"], strict=True):
            tensor.copy_(value)
        randomness.restore(values["random"])

    def outside(self, values: dict[str, Any]) -> Any:
        """The random state but for the device's own, which is captured."""
        device = "cuda" if self.device == "cuda" else "torch"
        return bits({name: state for name, state in values["random"].items() if name != device})

    def _compared(self, value: Any, found: dict[int, Tensor]) -> Any:
        """A nested value, to be compared with ==; the device's tensors in it are added to those found."""
        if isinstance(value, Tensor) and value.device.type == self.device:
            found[id(value)] = value
            return value.data_ptr(), value.shape, value.stride(), value.requires_grad
        if isinstance(value, dict):
            return [(id(k) if isinstance(k, Tensor) else k, self._compared(v, found)) for k, v in value.items()]
        if isinstance(value, list | tuple):
            return [self._compared(part, found) for part in value]
        if isinstance(value, Tensor):
            return bits(value)
        if isinstance(value, AS_THEY_ARE):
            return value
        return pickle.dumps(value)


INTERNAL = vars(nn.Module()).keys() - {"training"}
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
AS_THEY_ARE = (
    bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, weakref.ref,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
)  # fmt: skip


def bits(value: Any) -> Any:
    """A nested value with its tensors as bytes, so that == says whether it is the same to the bit."""
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return value
