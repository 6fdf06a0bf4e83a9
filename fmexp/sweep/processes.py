"""Members side by side on this machine, each in a worker process of joblib's loky."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmexp import process
from fmexp.process import Stop, available_cores
from fmexp.rundir import results
from fmexp.sweep.job import Job, ended_by_signals, fail, prepare_data
from fmexp.sweep.job import run as run_job
from fmexp.sweep.progress import Progress


def run(jobs: list[Job], workers: int, progress: Progress, *, fail_fast: bool) -> None:
    """Run members in `workers` processes, each in an executor of its own: one that dies costs its member alone."""
    from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

    process.resume_gc()
    with ended_by_signals():
        prepare_data(jobs)
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    executors: list[Any] = [None] * workers
    halt = threading.Event()

    def work(slot: int) -> None:
        while not halt.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            if executors[slot] is None:
                executors[slot] = ProcessPoolExecutor(1, env=_environment(slot, workers), initializer=_in_worker)
            progress.started(job.folder)
            try:
                executors[slot].submit(_run_in_worker, job).result()
            except BrokenProcessPool:
                executors[slot] = None
                if not halt.is_set():
                    fail(job, "its process was killed, or ran out of memory")
            except BaseException as error:  # SystemExit, when the member was told to stop
                if not isinstance(error, SystemExit):
                    progress.say(f"{job.folder.name}: {error}", logging.ERROR)
            progress.ended(job.folder)
            if fail_fast and results.status(job.folder) == "failed":
                halt.set()

    with Stop() as stop:
        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(workers)]
        for thread in threads:
            thread.start()
        _wait(threads, stop, halt, executors)
        for executor in filter(None, executors):
            executor.shutdown()
        if stop.signal:
            stop.leave()


def _wait(threads: list[threading.Thread], stop: Stop, halt: threading.Event, executors: list[Any]) -> None:
    """Wait for the threads. At a signal no more members are started, and those that run are told to stop."""
    told = False
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(0.1)
        if stop.signal and not told:
            told = True
            halt.set()
            _tell_to_stop(executors)


def _run_in_worker(job: Job) -> None:
    try:
        run_job(job)
    finally:
        if os.getppid() != _parent:  # nobody is left to give this process another member
            os._exit(128 + signal.SIGTERM)


_parent = 0


def _in_worker() -> None:
    """Leave the terminal's process group, so that Ctrl-C reaches the sweep alone, which then tells its workers; and
    end, as by a signal, when the sweep itself was killed."""
    global _parent
    process.pause_gc()
    starter = multiprocessing.parent_process()
    assert starter is not None
    _parent = starter.pid or 0  # not os.getppid(), for the sweep may be gone already
    os.setpgrp()

    def watch() -> None:
        while os.getppid() == _parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _environment(slot: int, workers: int) -> dict[str, str]:
    """What a worker process finds in its environment: its share of the cores, and one GPU where there are several."""
    threads = max(1, available_cores() // workers)
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    else:
        gpus = visible.split(",")
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _tell_to_stop(executors: list[Any]) -> None:
    for executor in filter(None, executors):
        for pid in list(executor._processes):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
