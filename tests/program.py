"""Processes: the program as a person runs it, or in this process to save imports; TensorBoard; waiting for either."""

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

import fmexp
from fmexp import cli

CHECKOUT = Path(__file__).resolve().parent.parent
INSTALLED = Path(fmexp.__file__).resolve().parents[1]  # the checkout, or site-packages where the wheel is installed
OWN_PROJECT = CHECKOUT / "examples" / "own_project"
PYTHON = (sys.executable, "-m", "fmexp")
STAGES = ("image_grid", "model_graph", "projector", "predictions", "pr_curves", "per_class_accuracy",
          "confusion_matrix")  # fmt: skip
LIMIT_S = 300
STATUSES = ("STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING")


@dataclass
class Finished:
    """What a run of the program left on the console, and its exit status."""

    status: int
    out: str
    err: str


def environment(*importable: Path, **changes: str) -> dict[str, str]:
    """This process's environment without what steers fmexp, in which the folders `importable` come first.

    Without `importable` other processes import the fmexp that this one has.
    """
    ours = {key: value for key, value in os.environ.items() if key not in ("FMEXP_DATA", "HYDRA_FULL_ERROR")}
    return {**ours, "PYTHONPATH": os.pathsep.join(map(str, importable or (INSTALLED,))), "COLUMNS": "100", **changes}


def default_signals() -> None:
    """Take back what the tests' own parent may have ignored; a shell does so with what it starts by `&`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(
    *words: str, cwd: Path, command: Sequence[str] = PYTHON, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the program in `cwd`."""
    return subprocess.Popen(
        [*command, *words], cwd=cwd, env=env or environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=default_signals,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Finished:
    """Wait for a started program."""
    with process:
        out, err = process.communicate(timeout=LIMIT_S)
    return Finished(process.returncode, out, err)


def run(*words: str, cwd: Path, command: Sequence[str] = PYTHON, env: dict[str, str] | None = None) -> Finished:
    """Run the program in `cwd` to its end."""
    return finish(start(*words, cwd=cwd, command=command, env=env))


def call(*words: str, cwd: Path) -> Finished:
    """Run the program's entry in this process, as if called `fmexp` in `cwd`, and leave this process as it was.

    Raises:
        Exception: what the program lets through where HYDRA_FULL_ERROR=1.
    """
    before, root = Path.cwd(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out, err, status = io.StringIO(), io.StringIO(), 0
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["fmexp", *words]):
            cli.main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        os.chdir(before)
        root.handlers[:], root.level = handlers, level
        GlobalHydra.instance().clear()
    return Finished(status, out.getvalue(), err.getvalue())


def slurm_answers() -> bool:
    """Whether there is a Slurm here that can be asked, and takes jobs."""
    return bool(shutil.which("sbatch")) and subprocess.run(["sinfo", "-h"], capture_output=True).returncode == 0


def until(condition: Callable[[], Any], what: str, *, ended: Callable[[], bool] = lambda: False) -> Any:
    """Wait for a condition to hold, and return what it gave.

    Raises:
        TimeoutError: it did not hold within LIMIT_S seconds, or within one second after `ended` has become true.
    """
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        if ended():
            deadline = min(deadline, time.monotonic() + 1)
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether any thread of a process runs; one that has ended and that nobody has asked about does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1  # the first thread may end before the others
    except OSError:
        return False


class TensorBoard:
    """A real TensorBoard server on a folder, asked over HTTP; ended at the end of the `with` block.

    Args:
        fast: with its fast loader, or with its slow one.
    """

    def __init__(self, logdir: Path, *, fast: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [f"--logdir={logdir}", "--host=127.0.0.1", f"--port={self.port}", "--reload_interval=1",
                     f"--load_fast={str(fast).lower()}",
                     "--samples_per_plugin=images=1000,pr_curves=1000,scalars=10000,text=1000"]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=default_signals,
        )  # fmt: skip

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def bytes(self, route: str, body: Any = None, **query: Any) -> bytes:
        """The answer of one of its routes; with a body it is posted as JSON."""
        words = f"?{urllib.parse.urlencode(query)}" if query else ""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/data/{route}{words}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def json(self, route: str, body: Any = None, **query: Any) -> Any:
        return json.loads(self.bytes(route, body, **query))

    def wait(self, *runs: str) -> None:
        """Wait until it has begun to read these runs."""
        until(lambda: set(runs) <= self._seen(), f"TensorBoard to show {runs}")

    def _seen(self) -> set[str]:
        try:
            return set(self.json("runs")) & set(self.json("plugin/scalars/tags"))
        except (urllib.error.URLError, ConnectionError):
            return set()

    def hparams(self, rows: int, tag: str = "test/accuracy") -> dict[str, dict[str, Any]]:
        """HPARAMS' rows, once there are so many, by the name of their run: status, settings and metrics."""
        found: dict[str, dict[str, Any]] = until(
            lambda: len(now := self._hparams(tag)) >= rows and now, f"{rows} rows in HPARAMS"
        )
        return found

    def statuses(self) -> dict[str, str]:
        """The rows of HPARAMS so far: run -> status; none while it is not up."""
        return {run: row["status"] for run, row in self._hparams("test/accuracy").items()}

    def _hparams(self, tag: str) -> dict[str, dict[str, Any]]:
        columns = [{"metric": {"tag": tag, "group": ""}, "order": "ORDER_DESC"}]
        body = {"allowedStatuses": STATUSES, "colParams": columns, "startIndex": 0, "sliceSize": 1000}
        try:
            groups = self.json("plugin/hparams/session_groups", body).get("sessionGroups", [])
        except (urllib.error.URLError, ConnectionError):
            return {}
        found = {}
        for group in groups:
            (session,) = group["sessions"]  # a run is one row
            assert session["name"] not in found
            metrics = {m["name"]["tag"]: m["value"] for m in session.get("metricValues", [])}
            found[session["name"]] = {"status": session["status"], "settings": group["hparams"], "metrics": metrics}
        return found
