"""The whole training step as one CUDA graph: forward, backward and update are one call.

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
from torch.optim import Optimizer

from fmexp import rng
from fmexp.engine.step import Step, has_step_hooks
from fmexp.errors import first_line

log = logging.getLogger(__name__)

WARM_UP = 3  # plain steps before a capture, in which libraries and optimizers set themselves up


class Recorder(Protocol):
    """What is needed of CUDA's graphs; the tests have one for the CPU."""

    def side_stream(self) -> AbstractContextManager[None]:
        """The stream on which it records, for the steps before that: CUDA asks for warm-up on a side stream."""

    def record(self, function: Callable[[], Tensor]) -> "Graph":
        """Note the kernels of a function, in place of running them."""


@dataclass(frozen=True)
class Graph:
    """What was recorded, and the loss that a replay fills."""

    loss: Tensor
    replay: Callable[[], None]


class CudaRecorder:
    """A `Recorder` on a CUDA device (PyTorch's notes on CUDA semantics, section CUDA Graphs)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                yield
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Callable[[], Tensor]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
            loss = function()
        return Graph(loss, graph.replay)


class GraphedStep:
    """A `Step` that runs plainly at first, then as a graph, and plainly for good where it cannot be captured.

    Args:
        step: the plain step, for batches of any size.
        batch_size: the size of the batches that the graph is for; others are taken plainly.
    """

    def __init__(self, step: Step, model: nn.Module, optimizer: Optimizer, batch_size: int, recorder: Recorder) -> None:
        self.step, self.model, self.optimizer = step, model, optimizer
        self.batch_size, self.recorder = batch_size, recorder
        self.possible = True
        self.graph: Graph | None = None
        self.wait = self.patience = WARM_UP  # plain steps until the next capture
        self.replays = 0
        self.fixed: Any = None
        self.kept: list[Tensor] = []  # memory that the graph uses must not be freed

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if not self.possible or len(labels) != self.batch_size:
            return self.step(images, labels)
        if self.graph:
            if labels.dtype != self.labels.dtype:  # an augmentation that makes probabilities of some batches alone
                return self.step(images, labels)
            self.replays += 1
            return self._replay(self.graph, images, labels)
        if self.wait:
            self.wait -= 1
            with self.recorder.side_stream():
                return self.step(images, labels)
        return self._capture(images, labels)

    def state_may_have_changed(self) -> None:
        """Give the graph up where the model or the optimizer is no longer as it was captured.

        To be called after whatever may change them but a step: a stage, an evaluation, a batch of another size.
        """
        if self.graph is None:
            return
        try:
            same = _State(self.model, self.optimizer).fixed == self.fixed
        except Exception:  # something of an unknown kind has come; the next capture says so
            same = False
        if not same:
            # What changes every few steps would cost a capture each time: wait twice as long.
            self.patience = WARM_UP if self.replays > self.patience else 2 * self.patience
            self.graph, self.wait = None, self.patience

    def _replay(self, graph: Graph, images: Tensor, labels: Tensor) -> Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        graph.replay()
        return graph.loss.clone()  # the next replay overwrites it

    def _capture(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take a step plainly, capture one, and compare the two. The plain one counts."""
        try:
            state = _State(self.model, self.optimizer)
            before = state.values()
        except Exception as error:  # for a state of an unknown kind
            self._give_up(error)
            return self.step(images, labels)
        with self.recorder.side_stream():
            loss = self.step(images, labels)
        after = state.values()
        try:
            self._check_capturable(state, before, after)
            self.images, self.labels = images.clone(), labels.clone()
            graph = self.recorder.record(lambda: self.step(self.images, self.labels))
            if _State(self.model, self.optimizer).fixed != state.fixed:
                raise RuntimeError("it changes what Python keeps")
            state.put(before)
            replayed = self._replay(graph, images, labels)
            if bits([replayed, state.values()]) != bits([loss, after]):
                raise RuntimeError("a replay does not give the bits of the plain step")
            self.graph, self.fixed, self.kept, self.replays = graph, state.fixed, state.tensors, 0
            log.info("the training step is a CUDA graph from here on")
        except Exception as error:  # whatever a capture raises
            state.put(after)
            self._give_up(error)
        return loss

    def _check_capturable(self, state: "_State", before: dict[str, Any], after: dict[str, Any]) -> None:
        changed = _State(self.model, self.optimizer).fixed != state.fixed
        if changed or state.host_random(before) != state.host_random(after):
            raise RuntimeError("it changes what Python keeps, or draws random numbers there")
        if state.hooked:
            raise RuntimeError("the optimizer or the model has hooks")

    def _give_up(self, error: Exception) -> None:
        self.possible = False
        why = first_line(error)
        log.warning("the training step cannot be a CUDA graph and is taken kernel by kernel: %s", why)


class _State:
    """All that a step works on, at one moment.

    Attributes:
        tensors: all that is on the device: parameters, buffers, other attributes of modules, the optimizer's state. A
            step, and so a graph, may change what they hold.
        fixed: everything else of the model and of the optimizer, and where these tensors are: what a graph keeps
            as it was at the capture.
        hooked: whether the model or the optimizer has hooks, which are Python.

    Raises:
        Exception: something of a kind that cannot be compared.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        found = dict[int, Tensor]()
        own = [{k: v for k, v in vars(module).items() if k not in INTERNAL} for module in model.modules()]
        parts = [own, list(model.parameters()), list(model.buffers()), vars(optimizer)]
        owners = (*model.modules(), *model.parameters())
        self.hooked = has_step_hooks(optimizer) or any(getattr(o, kind, None) for o in owners for kind in HOOKS)
        self.fixed = self.hooked, self._compared(parts, found)
        self.tensors = list(found.values())

    def values(self) -> dict[str, Any]:
        """A copy of the tensors on the host, where there is more room, and of the random state."""
        tensors = [tensor.detach().to("cpu", copy=True) for tensor in self.tensors]
        return {"tensors": tensors, "random": rng.get_state()}

    @torch.no_grad()
    def put(self, values: dict[str, Any]) -> None:
        """Give back what `values` took."""
        for tensor, value in zip(self.tensors, values["tensors"], strict=True):
            tensor.copy_(value)
        rng.set_state(values["random"])

    def host_random(self, values: dict[str, Any]) -> Any:
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
        value = value.to_dense() if value.is_sparse else value
        return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return value
