"""What the reliability tests share: starting and breaking runs, and comparing what two runs left."""

import hashlib
import json
import os
import random
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from program import STAGES, default_signals
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import masked_crc32c

from fmexp.rundir import checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLINE_S = 120

# 16 batches an epoch, and a checkpoint at 3, 6, 9, 12, 15, 16 and so on: kills land between them.
SMALL = ("dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "dataset.image_size=16", "device=cpu",
         "train.epochs=2", "train.log_every=4", "train.checkpoint_every=3", "train.keep_checkpoint=false",
         "train.validation=0", "objective=test/accuracy")  # fmt: skip
NO_STAGES = (*SMALL, *(f"stage.{stage}.enabled=false" for stage in STAGES))
BARE = (*NO_STAGES, "model=mlp", "model.hidden=[16]")
# Stages that write of every kind of summary before, between and after checkpoints.
RICH = (*SMALL, "model=lenet", "stage.confusion_matrix.enabled=false", "stage.image_grid.when=log",
        "stage.projector.when=log", "stage.projector.images=6", "stage.projector.features=fc2",
        "stage.pr_curves.when=epoch", "stage.predictions.when=end", "stage.predictions.images=2",
        "stage.calibration.enabled=true", "stage.calibration.when=epoch", "stage.mistakes.enabled=true",
        "stage.mistakes.when=log", "stage.mistakes.images=3")  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """A child's environment: one thread, this checkout, and the tests' models."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = os.pathsep.join([str(ROOT), str(HERE)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": own, "PATH": path, "TQDM_DISABLE": "1", **more}


# What two runs of one configuration need not have in common: times, and the words to find them by.
OF_EACH_RUN = ("seconds", "lineage", "tags", "note")


@dataclass
class Ended:
    """How a process ended: its exit status, or minus the signal that killed it, and what it printed."""

    code: int
    output: str


class Driver:
    """Starts command lines of fmexp through reliability_driver.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, *args: str, **how: Any) -> Ended:
        """Execute a command line to its end; see `start`."""
        return self.wait(self.start(*args, **how))

    def start(
        self,
        *args: str,
        plan: Sequence[dict[str, Any]] | None = None,
        trace: Path | None = None,
        cli: bool = False,
        folder: Path | None = None,
        layers: bool = True,
        **environ: str,
    ) -> int:
        """Start a process and return its pid.

        With a `plan` or a `trace` it is watched by reliability_breaker in `folder` (default: what hydra.run.dir says).
        With `cli` it goes through the command line, else through fmexp.execute, which is quicker.
        """
        if self.server is None:
            with (self.folder / "driver.txt").open("w") as errors:
                self.server = subprocess.Popen(
                    [sys.executable, HERE / "reliability_driver.py"], env=environment(), cwd=self.folder, bufsize=0,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, preexec_fn=default_signals,
                )  # fmt: skip
        self.number += 1
        self.output = self.folder / f"output{self.number}.txt"
        watched = None
        if plan is not None or trace is not None:
            watched = {
                "folder": str(folder or run_dir(args)),
                "plan": list(plan or ()),
                "trace": str(trace) if trace else None,
                "layers": layers,
            }
        request = {
            "args": args, "cli": cli, "output": str(self.output), "break": watched, "cwd": str(self.folder),
            "environment": environ,
        }  # fmt: skip
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        return int(self._answer()["pid"])

    def wait(self, pid: int) -> Ended:
        try:
            status = self._answer()["status"]
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        output = self.output.read_text() if self.output.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), output)

    def close(self) -> None:
        if self.server is not None:
            assert self.server.stdin is not None
            self.server.stdin.close()
            self.server.wait(DEADLINE_S)
            assert self.server.stdout is not None
            self.server.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.server is not None
        assert self.server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.server.stdout, selectors.EVENT_READ)
            line = b""
            until = time.monotonic() + DEADLINE_S
            while not line.endswith(b"\n"):
                if not selector.select(until - time.monotonic()):
                    raise TimeoutError(f"no end after {DEADLINE_S} s: {self.output.read_text()}")
                if not (byte := self.server.stdout.read(1)):
                    raise RuntimeError(f"the driver ended: {(self.folder / 'driver.txt').read_text()}")
                line += byte
        return json.loads(line)  # type: ignore[no-any-return]


def run_dir(args: Sequence[str]) -> str:
    return next(arg.partition("=")[2] for arg in args if arg.startswith("hydra.run.dir="))


def records(path: Path) -> list[Event]:
    """All events of a file; an AssertionError where one is torn or damaged."""
    content, events, at = path.read_bytes(), [], 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        assert masked_crc32c(content[at : at + 8]) == int.from_bytes(content[at + 8 : at + 12], "little"), path
        data, at = content[at + 12 : at + 12 + length], at + 16 + length
        assert masked_crc32c(data) == int.from_bytes(content[at - 4 : at], "little"), f"{path} is torn"
        events.append(Event.FromString(data))
    return events


def all_events(folder: Path) -> list[Event]:
    return [event for path in sorted(folder.glob("events.out.tfevents.*")) for event in records(path)]


def written(folder: Path) -> list[tuple[int, str, str]]:
    """All that a run wrote for TensorBoard, in its order: (step, tag, digest of the content), without clock times."""
    found = []
    for event in all_events(folder):
        if event.graph_def:
            graph = GraphDef.FromString(event.graph_def).SerializeToString(deterministic=True)  # else maps in any order
            found.append((event.step, "graph", digest(graph)))
        for value in event.summary.value:
            plugin = value.metadata.plugin_data
            if plugin.plugin_name == hparams.PLUGIN_NAME:
                content = HParamsPluginData.FromString(plugin.content)
                content.session_start_info.ClearField("start_time_secs")
                content.session_start_info.ClearField("group_name")  # which is the folder
                content.session_end_info.ClearField("end_time_secs")
                plugin.content = content.SerializeToString(deterministic=True)
            if value.tag == "wall_seconds":
                value.simple_value = 0
            if value.tag in ("lineage/text_summary", "profile/text_summary"):  # of each run its own: host, times
                value.ClearField("tensor")
            shown = str(value.simple_value) if value.HasField("simple_value") else digest(value.SerializeToString())
            found.append((event.step, value.tag, shown))
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def left(folder: Path) -> dict[str, Any]:
    """All that a complete run leaves, such that it is equal for two runs of one configuration."""
    result = json.loads((folder / "result.json").read_text())
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    model = torch.load(folder / "model.pt", weights_only=True) if (folder / "model.pt").exists() else {}
    return {
        "result": {key: value for key, value in result.items() if key not in OF_EACH_RUN},
        "model": {name: (str(t.dtype), tuple(t.shape), digest(t.numpy().tobytes())) for name, t in model.items()},
        "events": written(folder),
        "files": sorted(name for name in files if "tfevents" not in name and name != ".lock.owner"),
        "projector": {name: digest((folder / name).read_bytes()) for name in files
                      if re.match(r"\d{5}/|projector_config", name)},
    }  # fmt: skip


def assert_same(folder: Path, truth: Path, *, but: str = "") -> None:
    """Assert that a run which was stopped left what the one that was not has left, `but` for the events of a tag."""
    mine, its = left(folder), left(truth)
    for found in (mine, its):
        found["events"] = [event for event in found["events"] if event[1] != but]
    for part in its:
        assert mine[part] == its[part], part


def listing(folder: Path, *leave_out: str) -> dict[str, tuple[int, str]]:
    """Each file of a folder: its time of change in ns, and its content's digest."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, digest(path.read_bytes()))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


class Victim:
    """A run that is killed again and again; one that is complete is compared, and the next one begun."""

    def __init__(self, driver: Driver, folder: Path, truth: Path, *args: str) -> None:
        self.driver, self.parent, self.truth, self.args = driver, folder, truth, args
        self.kills = self.runs = 0
        self.but = ""  # a tag that may differ
        self.begin()

    def begin(self) -> None:
        self.runs += 1
        self.folder = self.parent / f"run{self.runs}"

    def kill(self, point: dict[str, object]) -> None:
        """Kill it at a point, which a run that has gone too far does not come to: then kill a new one there."""
        for _ in range(2):
            ended = self.driver.run(*self.args, f"hydra.run.dir={self.folder}", plan=[{"do": "KILL", **point}])
            if self.count(ended):
                return
        raise AssertionError(f"no run comes to {point}")

    def count(self, ended: Ended) -> bool:
        """Count a kill, or check the run that came to its end before it."""
        if ended.code == -signal.SIGKILL:
            self.kills += 1
            return True
        self.finished(ended)
        self.begin()
        return False

    def finish(self) -> None:
        self.finished(self.driver.run(*self.args, f"hydra.run.dir={self.folder}"))

    def finished(self, ended: Ended) -> None:
        assert ended.code == 0, ended.output
        assert_same(self.folder, self.truth, but=self.but)


def random_moments(driver: Driver, truth: Path, folder: Path, args: tuple[str, ...], count: int, seed: int) -> Victim:
    """Kill a run `count` times, at random ones of all the events of the uninterrupted run, in their order."""
    chosen = random.Random(seed)
    trace = (truth.parent / "trace.txt").read_text().splitlines()
    victim = Victim(driver, folder, truth, *args)
    while victim.kills < count:
        for number in sorted(chosen.choices(range(len(trace)), k=count - victim.kills)):
            step = int(trace[number].split("\t")[0])
            nth = 1 + sum(line.startswith(f"{step}\t") for line in trace[:number])
            state = checkpoint.load(victim.folder) if victim.folder.exists() else None
            done = state["step"] if state else 0
            # A run that has gone on beyond the step is killed as early as that step's event was. One that comes to its
            # end before it is compared, and the next moment is one of a new run.
            plan = [{"steps": max(0, step - done), "nth": nth, "do": "KILL"}]
            victim.count(driver.run(*args, f"hydra.run.dir={victim.folder}", plan=plan))
    victim.finish()
    return victim
