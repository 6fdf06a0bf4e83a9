"""What the sweep tests share: starting sweeps as processes, holding them up, and reading what they left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import program
from omegaconf import OmegaConf
from program import alive, default_signals
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tools import small

from fmexp.config import resolved
from fmexp.rundir import layout

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
DEADLINE_S = 120

SMALL = ("dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "logging=light", "device=cpu",
         "train.max_steps=8", "train.log_every=4", "model=mlp", "model.hidden=[8]", "train.validation=0",
         "objective=test/accuracy")  # fmt: skip
# Of 300 batches, which take some 150 s while the gate is closed; a checkpoint every five.
OWN = ("dataset=synthetic", "dataset.train_size=600", "dataset.test_size=40", "dataset.image_size=8", "logging=light",
       "device=cpu", "train.batch_size=2", "train.checkpoint_every=5", "train.log_every=100", "model=lenet",
       "model._target_=sweep_parts.Model", "train.validation=0", "objective=test/accuracy")  # fmt: skip
GRID = ("optimizer=sgd,adam", "optimizer.lr=0.01,0.001")
THREADS = ("+stage.threads._target_=sweep_parts.threads", "+stage.threads.when=end", "+stage.threads.required=true")


class Sweep:
    """A sweep as a process, what it prints, and its folder."""

    started: ClassVar[list["Sweep"]] = []

    def __init__(self, root: Path, *words: str, **environ: str) -> None:
        self.root = root
        path = os.pathsep.join(map(str, (CHECKOUT, HERE)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environ}
        environment.pop("HYDRA_FULL_ERROR", None)
        root.parent.mkdir(parents=True, exist_ok=True)
        self.output_file = root.parent / f"{root.name}.{time.monotonic_ns()}.txt"
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fmexp", "--multirun", *words, f"hydra.sweep.dir={root}"],
                env=environment, cwd=root.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=default_signals,
            )  # fmt: skip
        self.started.append(self)

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def wait(self) -> int:
        """Wait for the end, and return the exit status."""
        return self.process.wait(DEADLINE_S)

    def end(self) -> "Sweep":
        """Wait for an end with exit status 0."""
        assert self.wait() == 0, self.output
        return self

    def kill(self, *others: int) -> None:
        """SIGKILL the process, and `others`; they have ended, and let go of their locks, when this returns."""
        for pid in (self.process.pid, *others):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        until(lambda: not any(map(alive, others)), "the end of those that were killed")


def until(condition: Callable[[], Any], what: str, sweep: Sweep | None = None) -> Any:
    """Wait for a condition to hold, before the sweep ends, and return what it gave."""
    try:
        return program.until(condition, what, ended=lambda: sweep is not None and sweep.process.poll() is not None)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{sweep.output if sweep else ''}") from None


class Gate:
    """Holds models of sweep_parts up from their sixth batch on, until it is opened."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.environ = {"SWEEP_GATE": str(folder)}

    def open(self) -> None:
        (self.folder / "open").touch()

    def forget(self) -> None:
        """Close it again, for another sweep."""
        for path in self.folder.iterdir():
            path.unlink()

    def waiting(self) -> dict[str, int]:
        """Which tags are held up, and in which process."""
        return {path.name.split(".")[0]: int(path.suffix[1:]) for path in self.folder.glob("*.*")}

    def until_waiting(self, sweep: Sweep, count: int) -> dict[str, int]:
        found: dict[str, int] = until(
            lambda: len(self.waiting()) >= count and self.waiting(), f"{count} members at the gate", sweep
        )
        return found


def members(root: Path) -> list[Path]:
    """The members' folders, by number."""
    found = [path for path in root.iterdir() if (path / ".hydra").is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("_")[0]))


def member(root: Path, end: str) -> Path:
    (found,) = (path for path in members(root) if path.name.endswith(end))
    return found


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: when it was changed, and its content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def fabricate(
    root: Path,
    number: int,
    overrides: dict[str, Any],
    objective: float | None,
    curve: Sequence[tuple[int, float]] = (),
    status: str = "complete",
    **metrics: float,
) -> Path:
    """Write the folder of a member that was never trained: configuration, result, and a curve of train/loss."""
    slug = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items())
    path = root / f"{number}_{slug}"
    (path / ".hydra").mkdir(parents=True)
    tree = {"seed": 0, "objective": "test/accuracy", "train": {"tag": "train/loss"}}
    for group, name in (("dataset", "fmexp.datasets.fashion_mnist"), ("model", "fmexp.models.LeNet"),
                        ("optimizer", "torch.optim.SGD")):  # fmt: skip
        tree[group] = {"_target_": name}
    (path / ".hydra" / "config.yaml").write_text(json.dumps(tree))
    (path / ".hydra" / "overrides.yaml").write_text(json.dumps([f"{k}={v}" for k, v in overrides.items()]))
    found = {"test/accuracy": objective, **{name.replace("__", "/"): value for name, value in metrics.items()}}
    content = {
        "status": status,
        "objective": objective,
        "metrics": found,
        "seconds": 1.25,
        "config_digest": str(number),
    }
    (path / "result.json").write_text(json.dumps(content))
    if curve:
        writer = EventFileWriter(str(path))
        for step, loss in curve:
            summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=loss)])
            writer.add_event(Event(wall_time=0.0, step=step, summary=summary))
        writer.close()
    return path


CHOICES = {"sgd": (), "adam": ("optimizer=adam",), "mlp": ("model=mlp",)}
TREES: dict[str, dict[str, Any]] = {}


def write_run(
    folder: Path,
    score: float | None = 0.5,
    status: str = "complete",
    choice: str = "sgd",
    words: Sequence[str] | None = None,
    metrics: dict[str, float] | None = None,
    **keys: Any,
) -> Path:
    """Write the folder of a run that was never trained; optimizer__lr=0.1 is optimizer.lr."""
    if choice not in TREES:
        TREES[choice] = resolved(small("logging=light", *CHOICES[choice]))
    cfg = OmegaConf.create(TREES[choice])
    for key, value in keys.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    tree = resolved(cfg)
    folder.mkdir(parents=True)
    layout.write_config(folder, tree, {} if words is None else {"overrides.yaml": OmegaConf.create(list(words))})
    if status != "interrupted":
        content = {"status": status, "objective": score, "seconds": 1.5, "metrics": metrics or {}}
        if score is not None:
            content["metrics"] = {tree["objective"]: score, **(metrics or {})}
        layout.write_result(folder, content)
    return folder
