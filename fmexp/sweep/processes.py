"""Members side by side on this machine, each in a worker process."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from fmexp import process
from fmexp.process import Stop, available_cores
from fmexp.rundir import results
from fmexp.sweep.job import Job, ended_by_signals, fail, prepare_data
from fmexp.sweep.job import run as run_job
from fmexp.sweep.progress import Progress


def run(jobs: list[Job], workers: int, progress: Progress, *, fail_fast: bool) -> None:
    """Run members in `workers` processes, each in an executor of its own: one that dies costs its member alone."""
    process.resume_gc()
    with ended_by_signals():
        prepare_data(jobs)
    waiting = deque(jobs)
    executors: list[ProcessPoolExecutor | None] = [None] * workers
    halt = threading.Event()
    unwritten: list[OSError] = []

    def work(slot: int) -> None:
        while not halt.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                break
            executor = executors[slot] = executors[slot] or _executor(slot, workers)
            progress.started(job.folder)
            try:
                _result(executor, job, halt)
            except BrokenProcessPool:
                executors[slot] = None
            except OSError as error:  # what became of a member cannot be written, nor will it for the next one
                unwritten.append(error)
                halt.set()
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
        _wait(threads, stop, halt)
        for executor in filter(None, executors):
            executor.shutdown()
        if stop.signal:
            stop.leave()
        if unwritten:
            raise unwritten[0]


def _executor(slot: int, workers: int) -> ProcessPoolExecutor:
    """A worker process. Spawned, for a fork would take along this process's threads and its torch."""
    new = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, new, _in_worker, (_environment(slot, workers), workers))


def _result(executor: ProcessPoolExecutor, job: Job, halt: threading.Event) -> None:
    """Run a member in its worker, and wait for it."""
    try:
        with process.block_signals():  # in the worker, which this starts, until it is ready for them
            future = executor.submit(_run_in_worker, job)
        future.result()
    except BrokenProcessPool:
        executor.shutdown()  # waits for the process, which holds the folder's lock to its end
        if not halt.is_set():
            fail(job, "its process was killed, or ran out of memory")
        raise


def _wait(threads: list[threading.Thread], stop: Stop, halt: threading.Event) -> None:
    """Wait for the threads. At a signal no more members are started, and those that run are told to stop."""
    told: set[int | None] = set()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(0.1)
        if stop.signal:
            halt.set()
            for worker in multiprocessing.active_children():  # one may have been starting the last time
                if worker.pid not in told:
                    told.add(worker.pid)
                    worker.terminate()  # SIGTERM, at which a run saves itself


def _run_in_worker(job: Job) -> None:
    try:
        run_job(job)
    finally:
        if process.is_orphan():  # nobody is left to give this process another member
            os._exit(128 + signal.SIGTERM)


def _in_worker(environment: dict[str, str], workers: int) -> None:
    """Prepare a worker process, before it imports torch, which reads the environment.

    It leaves the terminal's process group, so that Ctrl-C reaches the sweep alone, which then tells its workers; and it
    ends, as by a signal, when the sweep itself was killed.
    """
    os.environ.update(environment)
    process.sharers = workers
    process.pause_gc()
    tqdm.set_lock(threading.RLock())  # its own, between processes, would be reported as a leak after a SIGKILL
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which forgets a Ctrl-C that has waited
    process.unblock_signals()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no exception: in the midst of torch's import it would spoil torch
    process.end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))


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
