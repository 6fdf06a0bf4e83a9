"""What a training step spends its time on."""

import copy
import gzip
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function

from fmexp import datasets
from fmexp.engine.freeze import freeze, train_mode
from fmexp.engine.optim import build_optimizer
from fmexp.engine.step import TrainStep, plain_backward
from fmexp.run import Run
from fmexp.rundir import layout
from fmexp.rundir.atomic import atomic_write

log = logging.getLogger(__name__)

WARM_UP = 3  # updates before those that are traced, in which libraries and optimizers set themselves up
ROWS, NAME = 12, 40  # of the table, and the letters of a name


def profile(run: Run, *, tag: str, steps: int) -> None:
    """Trace `steps` updates, with the loading of their batches, on copies of the model and the optimizer.

    trace.json.gz is for ui.perfetto.dev or chrome://tracing; the log and TensorBoard's TEXT get the top of its table.
    Steps are taken plainly, kernel by kernel, also where training compiles them or replays a CUDA graph.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it greets on stderr, and misses GPUs that are not there
    window = int(run.cfg.train.accumulate)
    step, batches = _step(run), _batches(run, (WARM_UP + steps) * window)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])]
    _take(run, step, batches, WARM_UP * window)
    with torch.profiler.profile(activities=activities) as profiler:
        _take(run, step, batches, steps * window)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        atomic_write(run.output_dir / layout.TRACE, gzip.compress(path.read_bytes()))
    sorted_by = f"self_{'device' if run.device.type == 'cuda' else 'cpu'}_time_total"
    lines = profiler.key_averages().table(sort_by=sorted_by, row_limit=ROWS, max_name_column_width=NAME).splitlines()
    table = "\n".join(line.rstrip() for line in lines).strip()
    log.info("profile of %d updates, in %s for ui.perfetto.dev\n%s", steps, layout.TRACE, table)
    run.writer.add_text(tag, f"```\n{table}\n```", run.step)


def _step(run: Run) -> TrainStep:
    """A step like the run's, of copies, in which the calls of layers have their names in the trace."""
    train = run.cfg.train
    model = copy.deepcopy(run.model)
    optimizer = build_optimizer(run.cfg.optimizer, model, freeze(model, train.freeze))
    train_mode(model, train.freeze)
    for name, module in model.named_modules():
        _name_calls(module, name or "model")
    return TrainStep(model, optimizer, plain_backward(model, run.loss, train.precision), train.clip_grad)


def _name_calls(module: nn.Module, name: str) -> None:
    entered: list[record_function] = []  # a module may call itself

    def enter(*_: object) -> None:
        entered.append(record_function(name))
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _batches(run: Run, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` batches of this epoch, all whole, and again from its beginning where it has no more."""
    size = int(run.cfg.train.batch_size)
    order = datasets.order(run.seed, run.epoch, datasets.length(run.dataset.train))
    return datasets.batches(
        run.dataset, run.dataset.train, order[torch.arange(count * size) % len(order)], size,
        device=run.device, workers=run.workers, seed=(run.seed, run.epoch), raw=run.augment is not None,
    )  # fmt: skip


def _take(run: Run, step: TrainStep, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
    """Train on so many batches."""
    window = int(run.cfg.train.accumulate)
    for number in range(count):
        with record_function("load a batch"):
            images, labels = next(batches)
        if run.augment is not None:
            with record_function("augment"):
                images, labels = run.augmented(images, labels, run.step + number)
        step.begins, step.ends, step.share = number % window == 0, (number + 1) % window == 0, 1 / window
        with record_function("training step"):
            step(images.to(memory_format=run.backend.memory_format), labels)
