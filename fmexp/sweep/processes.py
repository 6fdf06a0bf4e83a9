"""Members side by side on this machine, each in a worker process, which may start others to train its run with it."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from fmexp import process
from fmexp.errors import FmexpError
from fmexp.process import Stop, available_cores
from fmexp.rundir import results
from fmexp.sweep.job import ONE_KILLED, Job, ended_by_signals, fail, follow, prepare_data
from fmexp.sweep.job import run as run_job
from fmexp.sweep.progress import Progress


def run(jobs: list[Job], workers: int, progress: Progress, *, processes: int = 1, fail_fast: bool) -> None:
    """Run members, `workers` at a time, each by an executor of its own: a process that dies costs its member alone.

    Args:
        processes: how many train one member together; the executor's one starts the others.
    """
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
            executor = executors[slot] = executors[slot] or _executor(slot, workers, processes)
            progress.started(job.folder)
            try:
                _result(executor, job, processes, halt)
            except BrokenProcessPool:
                executors[slot] = None
            except OSError as error:  # what became of a member cannot be written, nor will it for the next one
                unwritten.append(error)
                halt.set()
            except BaseException as error:  # SystemExit, when the member was told to stop
                if not isinstance(error, SystemExit):
                    progress.say(f"{job.folder.name}: {error}", logging.ERROR)
            if processes > 1 and executors[slot]:  # the processes of a run meet once
                executor.shutdown()
                executors[slot] = None
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


def _executor(slot: int, workers: int, processes: int) -> ProcessPoolExecutor:
    """A worker process. Spawned, for a fork would take along this process's threads and its torch."""
    new = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, new, _in_worker, (_environment(slot, workers, processes), workers))


def _result(executor: ProcessPoolExecutor, job: Job, processes: int, halt: threading.Event) -> None:
    """Run a member in its worker, and wait for it."""
    try:
        with process.block_signals():  # in the worker, which this starts, until it is ready for them
            future = executor.submit(_run_in_worker, job, processes)
        future.result()
    except BrokenProcessPool:
        executor.shutdown()  # waits for the process, which holds the folder's lock to its end
        if not halt.is_set():
            fail(job, ONE_KILLED if processes > 1 else "its process was killed, or ran out of memory")
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


def _run_in_worker(job: Job, processes: int) -> None:
    try:
        with _followers(processes - 1) if processes > 1 else nullcontext():
            run_job(job)
    finally:
        if process.is_orphan():  # nobody is left to give this process another member
            os._exit(128 + signal.SIGTERM)


@contextmanager
def _followers(count: int) -> Iterator[None]:
    """Have `count` other processes train the run that this one executes within the block.

    Where one of them dies, this one dies at once, for it might wait. They notice by themselves when this one does.
    """
    listening = socket.create_server(("127.0.0.1", 0))  # closed below, or by what takes it
    size = {name: str(count + 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    port = listening.getsockname()[1]
    os.environ.update(size, RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    new, ended = multiprocessing.get_context("spawn"), threading.Event()
    followers = [new.Process(target=_follow, args=(rank, process.sharers)) for rank in range(1, count + 1)]

    def watch(follower: BaseProcess) -> None:
        follower.join()
        if follower.exitcode and not ended.is_set():
            os._exit(1)

    begun: list[BaseProcess] = []
    try:
        with process.block_signals():  # a signal's exception in the midst of torch's import aborts the process
            from fmexp.engine import distributed

            for follower in followers:
                try:
                    follower.start()
                except OSError as error:
                    raise FmexpError(f"one of its {count + 1} processes cannot be started: {error.strerror}") from error
                begun.append(follower)
                threading.Thread(target=watch, args=(follower,), daemon=True).start()
        with distributed.listen(listening):
            yield
    finally:
        ended.set()
        listening.close()
        for one in begun:  # it has ended, or waits for this one, where it would but note a signal; it writes nothing
            one.kill()
            one.join()


def _follow(rank: int, workers: int) -> None:
    _in_worker({"RANK": str(rank), "LOCAL_RANK": str(rank)}, workers)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the first process and the sweep say all there is, and torch that a connection is gone
        os.dup2(null, stream)
    follow()


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


def _environment(slot: int, workers: int, processes: int) -> dict[str, str]:
    """What a worker process finds in its environment: its share of the cores, and a GPU for each process of its run
    where there are several."""
    threads = max(1, available_cores() // (workers * processes))
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    else:
        gpus = visible.split(",")
    if len(gpus) > 1:
        own = [gpus[number % len(gpus)] for number in range(slot * processes, (slot + 1) * processes)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
    return environment
