"""Where and how the arithmetic is done: device, threads, convolution library. The bits of a result rest on these.

They follow from the configuration and the machine by rule, never by a stopwatch: the same command on the same machine
gives the same bits. A resumed run keeps what its checkpoint recorded.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fmexp.errors import ConfigError

MemoryFormat = torch.memory_format

# The numbers of the rules; benchmarks/README.md has the measurements behind them.
SMALL_CONVOLUTION = 1_500_000  # multiplications up to which calling oneDNN costs more than it saves
MANY_IMAGES = 16  # from so many on native kernels lose, and oneDNN gains by having the channels last
OUTPUTS_A_WEIGHT = 0.3  # of the convolutions; with fewer a batch both lose, for they handle the weights worse
SMALL_BATCH = 10_000_000  # multiplications below which a second thread costs more than it saves,
FEW_WEIGHTS = 2_000_000  # as long as there are no more weights to read and to update
# From so many small batches on, compiling the step costs less than it saves.
MANY_BATCHES = 200_000


@dataclass(frozen=True)
class Backend:
    device: str
    threads: int
    onednn: bool
    torch: str
    processor: str
    compiled: bool = False
    channels_last: bool = False
    processes: int = 1  # that compute a batch together

    @property
    def memory_format(self) -> MemoryFormat:
        """The order in memory that the model's images are to have."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute in this way within the block, and as before after it."""
        threads, onednn = torch.get_num_threads(), torch._C._get_mkldnn_enabled()
        deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        self._set(self.threads, self.onednn, True, False)
        try:
            yield
        finally:
            self._set(threads, onednn, deterministic, benchmark)

    @staticmethod
    def _set(threads: int, onednn: bool, deterministic: bool, benchmark: bool) -> None:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        torch._C._set_mkldnn_enabled(onednn)  # torch.backends.mkldnn.flags would warn of GPUs that are not there
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark

    def __str__(self) -> str:
        compiled = ", compiled" * self.compiled + f", {self.processes} processes" * (self.processes > 1)
        if self.device != "cpu":
            return self.device + compiled
        kernels = "oneDNN" if self.onednn else "native"
        order = ", channels last" * self.channels_last
        return f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, {kernels} kernels{order}{compiled}"

    def changed(self, recorded: dict[str, object]) -> list[str]:
        """What is not as a checkpoint recorded it, as "name: recorded, now this"."""
        recorded = {"processes": 1, **recorded}
        return [f"{k}: {recorded.get(k)}, now {v}" for k, v in asdict(self).items() if recorded.get(k) != v]


def find_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:1, mps) means on this machine.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise ConfigError(
            f"device={name}: this machine has {found}. Use device=cpu, or device=auto to take what there is."
        )
    if device.type == "mps" and not _has_mps():
        raise ConfigError(f"device={name}: this machine has no MPS device. Use device=cpu, or device=auto.")
    return device


def choose(
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    *,
    kernels: str = "auto",
    threads: str | int = "auto",
    compiled: bool | str = False,
    steps: int = 0,
    processes: int = 1,
) -> Backend:
    """The backend for batches of `batch_size` images like `images` [B, C, H, W], which are on the device.

    Where nothing speaks for another choice it is PyTorch's own: oneDNN, all threads, the plain order in memory.

    Args:
        kernels: the convolutions' library: "onednn", "native", or "auto", by rule.
        threads: how many, or "auto", by rule.
        compiled: whether to compile the training step; "auto" where `steps` batches pay for it.
        processes: how many there are that compute such a batch each.
    """
    layers = _layers(model, images, batch_size / len(images))
    small = _is_small(model, layers)
    cpu, many, outweighs = images.device.type == "cpu", batch_size >= MANY_IMAGES, _outweighs_weights(layers)
    if kernels == "auto":
        kernels = "native" if small and not many and outweighs and _suits_native(layers) else "onednn"
    if threads == "auto":
        threads = 1 if small else torch.get_num_threads()
    if compiled == "auto":
        compiled = cpu and small and steps >= MANY_BATCHES
    onednn = torch._C._get_mkldnn_enabled() and kernels == "onednn"
    candidate = onednn and cpu and many and outweighs and not compiled
    return Backend(
        device=torch.cuda.get_device_name(images.device) if images.is_cuda else images.device.type,
        threads=int(threads),
        onednn=onednn,
        torch=str(torch.__version__),
        processor=torch.backends.cpu.get_cpu_capability(),
        compiled=bool(compiled),
        channels_last=candidate and _takes_channels_last(model, images),
        processes=processes,
    )


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _takes_channels_last(model: nn.Module, images: Tensor) -> bool:
    try:
        tried = copy.deepcopy(model).train()
        tried(images.to(memory_format=torch.channels_last)).sum().backward()
        with torch.no_grad():
            tried.eval()(images.to(memory_format=torch.channels_last))
    except Exception:  # view() cannot flatten what a convolution then returns
        return False
    return True


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer that was called, and how many numbers it returns for a batch."""

    module: nn.Module
    outputs: float

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight  # not a parameter where it is computed, as by weight_norm
        assert isinstance(weight, Tensor)
        return weight

    @property
    def multiplications(self) -> float:
        return self.outputs * self.weight[0].numel()


@torch.no_grad()
def _layers(model: nn.Module, images: Tensor, scale: float) -> list[_Layer]:
    """The layers that the model calls for `scale` times as many images."""
    layers: list[_Layer] = []

    def called(module: nn.Module, inputs: object, output: Tensor) -> None:
        layers.append(_Layer(module, scale * output.numel()))

    kinds = (*_CONVOLUTIONS, nn.Linear)
    hooks = [module.register_forward_hook(called) for module in model.modules() if isinstance(module, kinds)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_small(model: nn.Module, layers: list[_Layer]) -> bool:
    """Whether the model does little for a batch: in these layers, and outside of them, where it cannot be counted.

    Attention, recurrent layers and F.conv2d multiply by weights that are not of these layers.
    """
    seen = {id(layer.weight) for layer in layers}
    complete = all(id(parameter) in seen for parameter in model.parameters() if parameter.dim() > 1)
    few = sum(layer.weight.numel() for layer in layers) <= FEW_WEIGHTS
    return complete and few and sum(layer.multiplications for layer in layers) < SMALL_BATCH


def _suits_native(layers: list[_Layer]) -> bool:
    """Whether all convolutions are small and without groups, which native kernels compute one after another."""
    return all(
        layer.module.groups == 1 and layer.multiplications <= SMALL_CONVOLUTION
        for layer in layers
        if isinstance(layer.module, _CONVOLUTIONS)
    )


def _outweighs_weights(layers: list[_Layer]) -> bool:
    """Whether there are convolutions, and the images in them are large beside their weights."""
    convolutions = [layer for layer in layers if isinstance(layer.module, _CONVOLUTIONS)]
    weights = sum(layer.weight.numel() for layer in convolutions)
    return bool(convolutions) and sum(layer.outputs for layer in convolutions) >= OUTPUTS_A_WEIGHT * weights
