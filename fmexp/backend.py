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

# Below this many multiplications a convolution, calling oneDNN costs more than it saves (docs/performance.md).
SMALL_CONVOLUTION = 1_000_000
# From so many images on, oneDNN gains more by having the channels last than it loses.
MANY_IMAGES = 16
# Below this many multiplications a batch, a second thread costs more than it saves.
SMALL_BATCH = 10_000_000
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
        compiled = ", compiled" * self.compiled
        if self.device != "cpu":
            return self.device + compiled
        kernels = "oneDNN" if self.onednn else "native"
        order = ", channels last" * self.channels_last
        return f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, {kernels} kernels{order}{compiled}"

    def changed(self, recorded: dict[str, object]) -> list[str]:
        """What is not as a checkpoint recorded it, as "name: recorded, now this"."""
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
    model: nn.Module, images: Tensor, batch_size: int, *, compiled: bool | str = False, steps: int = 0
) -> Backend:
    """The backend for batches of `batch_size` images like `images` [B, C, H, W], which stand on the device.

    Args:
        compiled: whether to compile the training step; "auto" where `steps` batches pay for it.
    """
    convolutions, linear = _multiplications(model, images)
    scale = batch_size / len(images)
    small = bool(convolutions) and scale * sum(convolutions) / len(convolutions) < SMALL_CONVOLUTION
    one_thread = scale * (sum(convolutions) + linear) < SMALL_BATCH
    if compiled == "auto":
        compiled = images.device.type == "cpu" and one_thread and steps >= MANY_BATCHES
    onednn = torch._C._get_mkldnn_enabled() and not small
    candidate = onednn and convolutions and batch_size >= MANY_IMAGES and images.device.type == "cpu" and not compiled
    return Backend(
        device=torch.cuda.get_device_name(images.device) if images.is_cuda else images.device.type,
        threads=1 if one_thread else torch.get_num_threads(),
        onednn=onednn,
        torch=str(torch.__version__),
        processor=torch.backends.cpu.get_cpu_capability(),
        compiled=bool(compiled),
        channels_last=bool(candidate) and _takes_channels_last(model, images),
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


@torch.no_grad()
def _multiplications(model: nn.Module, images: Tensor) -> tuple[list[int], int]:
    """How many multiplications each convolution needs for a batch, and all linear layers together."""
    convolutions: list[int] = []
    linear: list[int] = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        (linear if isinstance(module, nn.Linear) else convolutions).append(output.numel() * weight[0].numel())

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return convolutions, sum(linear)
