"""In one process, taken in turns: fmexp's training against bare PyTorch loops, or fmexp's evaluation with its stages;
an epoch of data that is loaded or augmented against a plain loop; the memory of a run, in bytes.

    python benchmarks/loops.py training <pairs> <batches> device=<device> <override>...
    python benchmarks/loops.py options <pairs> <batches> device=<device> <override>...
    python benchmarks/loops.py evaluation <pairs>
    python benchmarks/loops.py data <pairs> <kind> <workers> <folder of the data> <part> <override>...
    python benchmarks/loops.py memory 1 <override>...
    torchrun --nproc-per-node=2 benchmarks/loops.py processes <pairs> <batches> device=cpu <override>...

The last line of its output is JSON: seconds by name, one of each a pair. benchmarks/run.py calls this.
"""

import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from hydra.utils import instantiate
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision import transforms
from torchvision.datasets import FashionMNIST, ImageFolder

from fmexp import compose, execute, execution, process
from fmexp.build import build
from fmexp.datasets import Dataset
from fmexp.rundir import tensorboard
from fmexp.trainer import Trainer

DEFAULT_THREADS = torch.get_num_threads()
PLAIN = itertools.count()
OPTIONS = ["schedule=cosine", "loss.label_smoothing=0.1", "train.clip_grad=1.0", "train.ema=0.999"]


def clock() -> float:
    """Seconds, once a GPU has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare(overrides: list[str], batches: int, threads: int, options: bool = False) -> float:
    """Seconds of a plain loop of PyTorch's defaults over normalised images in memory, without any logging.

    With `options` it has the four of OPTIONS, as torch has them.
    """
    cfg = compose(overrides)
    run = build(cfg)
    data = run.dataset
    images, labels = data.normalise(data.train.images), data.train.labels
    model, size = run.model.train(), cfg.train.batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optimizer.lr, momentum=cfg.optimizer.momentum)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1 if options else 0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    torch.set_num_threads(threads)
    began = clock()
    done = 0
    while done < batches:
        for chosen in torch.randperm(len(images)).split(size)[: batches - done]:
            optimizer.zero_grad()
            loss = criterion(model(images[chosen]), labels[chosen])
            loss.backward()
            if options:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if options:
                schedule.step()
                average.update_parameters(model)
            done += 1
    seconds = clock() - began
    torch.set_num_threads(DEFAULT_THREADS)
    return seconds


def distributed(overrides: list[str], batches: int) -> float:
    """Seconds of a plain loop with DistributedDataParallel, as in torch's tutorial, on images in memory."""
    cfg = compose(overrides)
    data = build(cfg).dataset
    images, labels = data.normalise(data.train.images), data.train.labels
    store, rank, size = next(dist.rendezvous("env://"))
    prefix = f"plain {next(PLAIN)}"  # torchrun's store still has the addresses of the last one
    dist.init_process_group("gloo", store=dist.PrefixStore(prefix, store), rank=rank, world_size=size)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        instantiate(cfg.model, input_shape=data.input_shape, num_classes=len(data.classes)).train()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optimizer.lr, momentum=cfg.optimizer.momentum)
    criterion = nn.CrossEntropyLoss()
    sampler = DistributedSampler(range(len(images)))
    dist.barrier()
    began = clock()
    for chosen in torch.tensor(list(sampler)).split(cfg.train.batch_size // dist.get_world_size())[:batches]:
        optimizer.zero_grad()
        loss = criterion(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
    seconds = clock() - began
    dist.destroy_process_group()
    return seconds


def ours(overrides: list[str], batches: int) -> float:
    """Seconds of fmexp's own loop in a whole run, with running losses, figures and checkpoints.

    The end of the run is left out: its evaluation and checkpoint come once an epoch, however few `batches` are timed
    here. What happens at each running loss counts as often as it does in a long run, once in train.log_every batches.
    """
    cfg = compose([*overrides, f"train.max_steps={batches}"])
    logs: list[float] = []
    seconds = apart = 0.0  # apart is what does not count

    class Timed(Trainer):
        def fit(self) -> None:
            nonlocal seconds
            began = clock()
            super().fit()
            seconds = clock() - began - apart - sum(logs)

        def log(self) -> None:
            began = clock()
            super().log()
            logs.append(clock() - began)

        def end_epoch(self) -> None:
            nonlocal apart
            began = clock()
            super().end_epoch()
            apart += clock() - began

        def save_if_due(self) -> None:
            nonlocal apart
            began = clock() if self.run.step == batches else 0.0
            super().save_if_due()
            if began:
                apart += clock() - began

    with mock.patch.object(execution, "Trainer", Timed), tempfile.TemporaryDirectory() as folder:
        execute(cfg, folder)
    return seconds + statistics.mean(logs) * batches / cfg.train.log_every  # one comes after a run of fewer batches


def plain_data(kind: str, folder: str, part: int) -> Dataset:
    """What a plain loop loads: a part of torchvision's Fashion-MNIST, cropped and flipped; or its ImageFolder."""
    plain = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    if kind == "pictures":
        small = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), *plain])
        train, test = (ImageFolder(f"{folder}/{split}", small) for split in ("train", "test"))
    else:
        crop = transforms.RandomCrop(28, padding=4)
        train = FashionMNIST(folder, True, transforms.Compose([crop, transforms.RandomHorizontalFlip(), *plain]))
        test = FashionMNIST(folder, False, transforms.Compose(plain))
    return Dataset(Subset(train, range(len(train) // part)), test, train.classes)


def map_style(root: str, part: int, **others: object) -> Dataset:
    """The same for YAML."""
    return plain_data("map", root, part)


def plain_epoch(overrides: list[str], data: Dataset, workers: int) -> float:
    """Seconds of one epoch of a plain loop with torch's DataLoader."""
    cfg = compose(overrides)
    model = instantiate(cfg.model, input_shape=data.input_shape, num_classes=len(data.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optimizer.lr, momentum=cfg.optimizer.momentum)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(data.train, cfg.train.batch_size, shuffle=True, num_workers=workers)
    began = clock()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
    return clock() - began


def second_epoch(overrides: list[str]) -> float:
    """Seconds of fmexp's second epoch, with the checkpoint before it and without its evaluation."""
    begun, ended = [], []

    class Timed(Trainer):
        def end_epoch(self) -> None:
            ended.append(clock())
            super().end_epoch()
            begun.append(clock())

    with mock.patch.object(execution, "Trainer", Timed), tempfile.TemporaryDirectory() as folder:
        execute(compose([*overrides, "train.epochs=2"]), folder)
    return ended[1] - begun[0]


def memory(overrides: list[str]) -> int:
    """The most memory, in bytes, that a run has of its own: pages of mapped files, which the system may drop, left out.

    Taken after each batch of two epochs.
    """
    most = 0

    class Watched(Trainer):
        def after_step(self, loss: torch.Tensor) -> None:
            nonlocal most
            super().after_step(loss)
            (kib,) = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            most = max(most, 1024 * int(kib))

    with mock.patch.object(execution, "Trainer", Watched), tempfile.TemporaryDirectory() as folder:
        execute(compose(["device=cpu", "logging=light", "train.epochs=2", *overrides]), folder)
    return most


def evaluation() -> float:
    """Seconds of fmexp's pass over the test split and the stages after it."""
    run = build(compose(["experiment=tutorial", "device=cpu"]))
    with tempfile.TemporaryDirectory() as folder:
        run.writer = tensorboard.open_writer(run.cfg.logging, Path(folder), step=None)
        began = time.perf_counter()
        with run.backend.applied():
            run.run_stages("end")
        seconds = time.perf_counter() - began
        run.writer.close()
    if run.failures:
        raise SystemExit(f"stages failed: {run.failures}")
    return seconds


def main(what: str, pairs: int, *rest: str) -> None:
    if what == "evaluation":
        work = {"fmexp": evaluation}
    elif what == "memory":
        work = {"fmexp": lambda: memory([*rest])}
    elif what == "processes":
        batches, overrides = int(rest[0]), ["experiment=tutorial", "train.epochs=1000", *rest[1:]]
        work = {
            "fmexp": lambda: ours(overrides, batches),
            "fmexp, each its own batch statistics": lambda: ours([*overrides, "train.sync_batchnorm=false"], batches),
            "DistributedDataParallel": lambda: distributed(overrides, batches),
        }
    elif what == "data":
        kind, workers, data = rest[0], int(rest[1]), plain_data(rest[0], rest[2], int(rest[3]))
        overrides = ["device=cpu", "logging=light", "train.batch_size=64", "optimizer.momentum=0.9", *rest[4:]]
        if kind == "map":
            overrides += [
                "dataset._target_=loops.map_style",
                f"+dataset.part={rest[3]}",
                f"train.num_workers={workers}",
            ]
        work = {
            "fmexp": lambda: second_epoch(overrides),
            "plain": lambda: plain_epoch(overrides, data, workers),
        }
    else:
        batches, overrides = int(rest[0]), ["experiment=tutorial", "train.epochs=1000", *rest[1:]]
        options = what == "options"
        work = {
            "fmexp": lambda: ours([*overrides, *(OPTIONS if options else [])], batches),
            "bare": lambda: bare(overrides, batches, DEFAULT_THREADS, options),
        }
        if options:
            work["fmexp, bf16"] = lambda: ours([*overrides, *OPTIONS, "train.precision=bf16"], batches)
        elif "device=cpu" in overrides:
            work["bare, one thread"] = lambda: bare(overrides, batches, 1)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(pairs):
        for name, function in work.items():
            gc.collect()
            seconds[name].append(function())
    if not process.rank():
        print(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
