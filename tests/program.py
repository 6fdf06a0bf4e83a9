"""Runs the program as a person does, in a process of its own; or, to save the time of importing, in this one."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

import fmexp
from fmexp import cli

CHECKOUT = Path(__file__).resolve().parent.parent
INSTALLED = Path(fmexp.__file__).resolve().parents[1]  # the checkout, or site-packages where the wheel is installed
OWN_PROJECT = CHECKOUT / "examples" / "own_project"
PYTHON = (sys.executable, "-m", "fmexp")
LIMIT_S = 300


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


def start(
    *words: str, cwd: Path, command: Sequence[str] = PYTHON, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the program in `cwd`."""
    return subprocess.Popen(
        [*command, *words], cwd=cwd, env=env or environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
