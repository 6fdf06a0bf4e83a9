"""The worker processes of a sweep that runs side by side."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from program import alive
from sweep_tools import CHECKOUT, OWN, Gate, Sweep, until

pytestmark = pytest.mark.slow

# Python imports it when it starts: it holds a worker up, before that does anything, until the sweep is gone, or until
# the file `go` is there.
HOLD = """
import os, pathlib, sys, time
if any("spawn_main" in word for word in sys.orig_argv):
    parent, folder = os.getppid(), pathlib.Path(os.environ["STARTED"])
    (folder / str(os.getpid())).touch()
    while os.getppid() == parent and not (folder / "go").exists():
        time.sleep(0.02)
"""


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[tuple[Sweep, list[int]]]:
    """A sweep whose two workers are held up at their very start, and their pids."""
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    started = tmp_path / "started"
    started.mkdir()
    path = os.pathsep.join(map(str, (tmp_path, CHECKOUT)))
    words = (*OWN[:-2], "model=mlp", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    sweep = Sweep(tmp_path / "sweep", *words, PYTHONPATH=path, STARTED=str(started))
    until(lambda: len(list(started.iterdir())) == 2, "both workers", sweep)
    workers = [int(file.name) for file in started.iterdir()]
    yield sweep, workers
    for pid in filter(alive, workers):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_workers_end_whose_sweep_was_killed_before_they_had_begun(starting: tuple[Sweep, list[int]]) -> None:
    sweep, workers = starting
    sweep.kill()
    until(lambda: not any(map(alive, workers)), "the workers' end")


def test_ctrl_c_while_workers_start_prints_no_traceback(starting: tuple[Sweep, list[int]], tmp_path: Path) -> None:
    """It comes to all of the terminal's group, which they leave a little later."""
    sweep, _ = starting
    os.killpg(sweep.process.pid, signal.SIGINT)
    (tmp_path / "started" / "go").touch()
    assert sweep.wait() == 128 + signal.SIGINT
    assert "Traceback" not in sweep.output
    assert "go on with" in sweep.output


def test_a_worker_that_waits_ends_at_a_signal_without_a_traceback(tmp_path: Path, gate: Gate) -> None:
    (gate.folder / "hold-a").touch()
    words = (*OWN, "+model.tag=a,b", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    sweep = Sweep(tmp_path / "sweep", *words, **gate.environ)
    pids = gate.until_waiting(sweep, 2)
    gate.open()
    until(lambda: "[1/2] 1_tag-b" in sweep.output, "the end of b", sweep)
    os.kill(pids["b"], signal.SIGINT)
    until(lambda: not alive(pids["b"]), "the end of its worker", sweep)
    (gate.folder / "hold-a").unlink()
    sweep.end()
    assert "Traceback" not in sweep.output
