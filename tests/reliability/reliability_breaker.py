"""Breaks a run from outside: counts what it does (files, batches, layers), and kills it at a chosen moment.

Nothing of this is in the product: the functions of os, tensorboard and torch that it calls are wrapped here.
A moment is an *event* with a label, such as "fsync .checkpoint.pt.x.part done" or "forward LeNet training". A plan is a
list of actions {"steps": s, "match": regex, "nth": n, "do": what}: at the n-th event whose label matches, counted from
when this process has trained s batches, do one of
    KILL, TERM, INT, USR1 ...   send the signal to this process
    fill                        fill the file system of the run's folder, but for "leave" bytes
"""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.tensorflow_stub.io import gfile

from fmexp.engine import step

_write, _fsync, _replace, _fdopen = os.write, os.fsync, os.replace, os.fdopen
AUDITED = {"open", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.rename"}


def install(folder: str, plan: list[dict[str, Any]], trace: str | None, layers: bool = True) -> None:
    """Watch what this process does, above all in `folder`; write the labels of all events to the file `trace`.

    Without `layers` there are no events of the model's layers, which a compiler could not take.
    """
    breaker = _Breaker(folder, plan, trace)
    os.fsync, os.replace, os.fdopen = breaker.fsync, breaker.replace, breaker.fdopen  # type: ignore[assignment]
    gfile.LocalFileSystem._write = breaker.gfile_write
    step.update = breaker.update(step.update)
    torch.Tensor.backward = breaker.backward(torch.Tensor.backward)  # type: ignore[method-assign]
    sys.addaudithook(breaker.audit)
    if layers:
        torch.nn.modules.module.register_module_forward_pre_hook(breaker.forward)


class _Breaker:
    def __init__(self, folder: str, plan: list[dict[str, Any]], trace: str | None) -> None:
        self.folder, self.plan, self.pid = os.path.abspath(folder), plan, os.getpid()
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if trace else None
        self.steps = 0
        self.counts = [0] * len(plan)
        self.lock = threading.RLock()
        self.busy = False

    def event(self, label: str) -> None:
        if os.getpid() != self.pid or self.busy:  # a data-loading process; or what an action does itself
            return
        with self.lock:
            if self.trace is not None:
                _write(self.trace, f"{self.steps}\t{label}\n".encode())
            for number, action in enumerate(self.plan):
                if self.steps >= action.get("steps", 0) and re.search(action.get("match", ""), label):
                    self.counts[number] += 1
                    if self.counts[number] == action.get("nth", 1):
                        self.act(action)

    def act(self, action: dict[str, Any]) -> None:
        if action["do"] == "fill":
            self.busy = True
            fill(Path(action["file"]), action.get("leave", 0))
            self.busy = False
        else:
            os.kill(self.pid, signal.Signals[f"SIG{action['do']}"])

    def update(self, function: Callable[..., None]) -> Callable[..., None]:
        def watched(*arguments: Any) -> None:
            function(*arguments)
            self.steps += 1
            self.event("batch trained")

        return watched

    def forward(self, module: torch.nn.Module, _: Any) -> None:
        self.event(f"forward {type(module).__name__} {'training' if module.training else 'eval'}")

    def backward(self, function: Callable[..., None]) -> Callable[..., None]:
        def watched(*arguments: Any, **more: Any) -> None:
            function(*arguments, **more)
            self.event("batch half trained")

        return watched

    def name(self, path: Any) -> str | None:
        """How a label names a path within the run's folder; None for others."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(self.folder):
            return None
        # The part of a temporary file's name that is random is of no interest.
        return re.sub(r"\.[^./]+\.part$", ".part", os.path.relpath(path, self.folder))

    def audit(self, what: str, arguments: tuple[Any, ...]) -> None:
        if what not in AUDITED or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if what == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if (name := self.name(arguments[0])) is not None:
            self.event(f"{what.removeprefix('os.')} {name}")

    def fsync(self, handle: int) -> None:
        name = self.name(handle)
        self.event(f"fsync {name}")
        _fsync(handle)
        self.event(f"fsync {name} done")

    def replace(self, old: Any, new: Any) -> None:
        _replace(old, new)
        self.event(f"rename {self.name(old)} to {self.name(new)} done")

    def fdopen(self, handle: int, *arguments: Any) -> Any:
        return _Halving(self, self.name(handle), _fdopen(handle, *arguments))

    def gfile_write(self, path: str, content: Any, mode: str) -> None:
        name = self.name(path)
        content = content if isinstance(content, bytes) else content.encode()
        half = len(content) // 2
        with open(path, mode if "b" in mode else f"{mode}b") as file:
            file.write(content[:half])
            file.flush()
            self.event(f"within {name}")
            file.write(content[half:])
        self.event(f"written {name}")


class _Halving:
    """A file of which half is written before the event "within" and the rest after it."""

    def __init__(self, breaker: _Breaker, name: str | None, file: Any) -> None:
        self.breaker, self.label, self.file = breaker, name, file

    def write(self, content: Any) -> int:
        content = bytes(content)
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.breaker.event(f"within {self.label}")
        self.file.write(content[len(content) // 2 :])
        return len(content)

    def __enter__(self) -> "_Halving":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fill(path: Path, leave: int) -> None:
    """Let a file grow until the disk is full, and then take `leave` bytes off it."""
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
        file.truncate(max(0, file.tell() - leave))


if __name__ == "__main__":  # python reliability_breaker.py '{"folder": ..., "plan": [...]}' <the command line of fmexp>
    spec = json.loads(sys.argv[1])
    sys.argv = ["python -m fmexp", *sys.argv[2:]]
    install(spec["folder"], spec.get("plan", []), spec.get("trace"))
    from fmexp.cli import main

    main()
