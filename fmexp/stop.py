"""Stopping in good order: a signal is noted, the run finishes its batch and saves, and only then the process ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, the system's and Slurm's request to end, and the warnings that Slurm sends before it ends a job.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


class Stop:
    """Notes the first signal that arrives within the block; a second one acts as it would without the block.

    Attributes:
        signal: the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python takes handlers there alone
            for name in SIGNALS:
                if number := getattr(signal, name, None):
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
        self.signal = signal.Signals(number)
        if self._before.get(self.signal) is not None:
            signal.signal(number, self._before[self.signal])

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)
