"""Training steps of torchvision's and timm's networks: by fmexp's rules for kernels, threads and order, and by default.

    python benchmarks/networks.py [<network> ...]

One JSON a line and cell: network, batch size, what was chosen, and the milliseconds of a training step, fmexp's and by
PyTorch's defaults, or null where the choice is PyTorch's default, and both are the same. benchmarks/run.py calls this.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from fmexp.engine import backend
from fmexp.engine.backend import Backend
from fmexp.engine.step import TrainStep

TORCHVISION = ("mobilenet_v3_small", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0", "resnet18",
               "squeezenet1_1", "densenet121", "mnasnet0_5", "regnet_y_400mf")  # fmt: skip
TIMM = ("timm/mobilenetv3_small_050", "timm/convnext_atto", "timm/ghostnet_100")
SIZES = (4, 16, 64, 256)
SHAPE = (3, 32, 32)
SECONDS = 4.0  # of measuring a cell, at least three turns
TURN = 0.15  # seconds that a turn of one of the two takes, at least one step


def make(name: str) -> nn.Module:
    """The untrained network for ten classes."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), num_classes=10)
    import torchvision

    return torchvision.models.get_model(name, num_classes=10)


def turns(ways: list[Backend], step: Callable[[Backend], None]) -> list[float]:
    """Median seconds of a step in each way, taken in turns; of the processor where all have one thread."""
    now = time.process_time if max(how.threads for how in ways) == 1 else time.perf_counter

    def seconds(how: Backend, steps: int) -> float:
        with how.applied():
            step(how)  # after the other way's turn the caches hold other things
            began = now()
            for _ in range(steps):
                step(how)
            return (now() - began) / steps

    counts = [max(1, int(TURN / seconds(how, 1))) for how in ways]
    found: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + SECONDS
    while len(found[0]) < 3 or time.perf_counter() < end:
        for values, how, count in zip(found, ways, counts, strict=True):
            values.append(seconds(how, count))
    return [statistics.median(values) for values in found]


def cells(name: str) -> Iterator[dict[str, object]]:
    """A network's cells."""
    model = make(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    for size in SIZES:
        images, labels = torch.randn(size, *SHAPE), torch.randint(10, (size,))
        ours = backend.choose(model.eval(), images[:2], size)
        default = replace(ours, threads=torch.get_num_threads(), onednn=True, channels_last=False)
        model.train()

        def step(how: Backend, images: torch.Tensor = images, labels: torch.Tensor = labels) -> None:
            TrainStep(model, optimizer)(images.to(memory_format=how.memory_format), labels)

        found = [1e3 * value for value in turns([ours, default], step)] if ours != default else None
        yield {"network": name, "size": size, "how": str(ours), "ms": found}


def main(names: list[str]) -> None:
    there = importlib.util.find_spec("timm") is not None
    for name in names or [*TORCHVISION, *TIMM]:
        if name in TIMM and not there:
            print(json.dumps({"network": name, "skipped": "timm is not installed"}), flush=True)
            continue
        for cell in cells(name):
            print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
