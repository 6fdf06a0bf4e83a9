"""This process: its signals, its console, its garbage collection, its cores.

Stopping is in good order: a signal is noted, the run finishes its batch and saves, and only then the process ends.
"""

import atexit
import gc
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, the request of the system and of Slurm to end, Slurm's warnings before it does so, a closed terminal.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
# Within so many seconds of the first, a second signal is the first one's echo: `timeout` sends to the process and then
# to its group, a terminal and the program in between both pass Ctrl-C on.
ECHO_S = 0.5


def in_loading_process(worker: int) -> None:
    """Let a data-loading process outlive a signal that goes to all processes, so that its parent can finish a batch.

    It ends when the parent tells it to, kills it, or is gone.
    """
    end_with_parent(lambda: os._exit(1))
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)
    unblock_signals()


def is_orphan() -> bool:
    """Whether the process that has started this one, by multiprocessing, is gone; it may be from the beginning."""
    from multiprocessing import parent_process  # which a command that only composes does without

    starter = parent_process()
    return starter is not None and os.getppid() != starter.pid


def end_with_parent(end: Callable[[], None]) -> None:
    """Call `end`, in a thread, once the process that has started this one is gone."""

    def watch() -> None:
        while not is_orphan():
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def block_signals() -> Iterator[None]:
    """Let signals wait within the block, and in processes that are started there until they `unblock_signals`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """Let signals come, and those that have waited."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers())


def _numbers() -> list[signal.Signals]:
    return [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


class Stop:
    """Notes the first signal that arrives within the block; a second one acts as it would without the block.

    Signals that the process was started to ignore stay ignored.

    Attributes:
        signal: the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python takes handlers there alone
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._give_back()

    def leave(self) -> None:
        """End the process as the signal asks: exit status 128 + its number, or what was to be done before the block."""
        assert self.signal is not None
        before = self._before.get(self.signal)
        self._give_back()
        if callable(before) and before is not signal.default_int_handler:
            before(self.signal, None)  # submitit's, which puts the job back into Slurm's queue
        raise SystemExit(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._noted = signal.Signals(number), time.monotonic()
        elif time.monotonic() > self._noted + ECHO_S:
            self._give_back()
            os.kill(os.getpid(), number)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)


class _Stream(io.FileIO):
    """A standard stream that drops what cannot be written, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


def open_console() -> None:
    """Let no print and no log line fail, whether nobody reads (`| head`), the disk is full, or a stream was closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: a file of the run's would get the number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before, raw = getattr(sys, name), _Stream(number, "w", closefd=False)
        encoding, at_once = getattr(before, "encoding", None), number == 2 or raw.isatty()
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=at_once)
        setattr(sys, name, stream)


def require_output() -> None:
    """End the program with status 1 where something of what it printed was lost: for a program that does no more."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if error := getattr(raw, "error", None):
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"The output cannot be written: {error.strerror}.")


def pause_gc() -> None:
    """Collect no garbage until `resume_gc` is called, and none at the end of the process.

    Hydra, torch and matplotlib leave a million objects that stay to the end. To look for garbage among them, while they
    are imported and once more when the process ends, takes about a second.
    """
    gc.disable()
    atexit.register(gc.freeze)


def resume_gc() -> None:
    """After `pause_gc`: collect what becomes garbage from now on. Without it, leave all as it is."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def silence() -> None:
    """In another process of a run than the first: say nothing that the first one says."""
    logging.disable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run begins: Python's own waits for the other process


def rank() -> int:
    """Which of a run's processes this is, from 0, as torchrun says."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Which one it is of those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes torchrun has started to train one run."""
    told = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if told else 1


def share_a_machine() -> bool:
    """Whether all of a run's processes are on this machine, which is Linux."""
    return sys.platform == "linux" and os.environ.get("LOCAL_WORLD_SIZE") == str(world_size())


def require_alone(program: str) -> None:
    """End the program with status 1 where torchrun has started it several times."""
    if world_size() > 1:  # the others end well, or else torchrun might end the first before it has said why
        sys.exit(f"{program} is not divided among processes: start it without torchrun." if rank() == 0 else 0)


sharers = 1  # processes that share the cores with this one: those of a sweep side by side


own_cores = 0  # that are this process's alone, where Slurm says so; 0: the system is asked


def available_cores() -> int:
    """How many cores this process may use; macOS does not say, and there it is how many there are."""
    if own_cores:
        return own_cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1
    return max(1, cores // (sharers * ranks))


def available_memory() -> int:
    """How many bytes of memory this process may hope for: what is free or can be freed, within its control group."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # what follows is Linux's
        limits += [1024 * int(kib) for kib in re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())]
        group = Path(
            "/sys/fs/cgroup", *Path(Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()).parts[1:]
        )
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max"
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits)
