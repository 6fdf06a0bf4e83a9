"""The worker processes of a sweep that runs side by side."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from program import alive
from sweep_tools import CHECKOUT, OWN, Sweep, until

# Python imports it when it starts: it holds a worker up, before that does anything, until the sweep is gone.
HOLD = """
import os, pathlib, sys, time
if any("popen_loky" in word or "spawn_main" in word for word in sys.orig_argv):
    parent = os.getppid()
    pathlib.Path(os.environ["STARTED"], str(os.getpid())).touch()
    while os.getppid() == parent:
        time.sleep(0.02)
"""


@pytest.mark.slow
def test_workers_end_whose_sweep_was_killed_before_they_had_begun(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    started = tmp_path / "started"
    started.mkdir()
    path = os.pathsep.join(map(str, (tmp_path, CHECKOUT)))
    words = (*OWN[:-2], "model=mlp", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    first = Sweep(tmp_path / "sweep", *words, PYTHONPATH=path, STARTED=str(started))
    until(lambda: len(list(started.iterdir())) == 2, "both workers", first)
    first.kill()
    workers = [int(file.name) for file in started.iterdir()]
    try:
        until(lambda: not any(map(alive, workers)), "the workers' end")
    finally:
        for pid in filter(alive, workers):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
