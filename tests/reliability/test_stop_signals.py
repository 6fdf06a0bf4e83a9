"""A run that is asked to stop finishes its batch, saves itself, and says how to go on."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from program import alive, until
from reliability_tools import BARE, NO_STAGES, Driver, assert_same, environment, listing

from fmexp import process
from fmexp.process import Stop

STATUS = {"TERM": 143, "INT": 130, "USR1": 138, "USR2": 140, "HUP": 129}


@pytest.mark.parametrize("name", STATUS)
def test_stops_after_its_batch_and_goes_on(
    driver: Driver, truth: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "a folder's run"
    plan = [{"steps": 4, "match": "batch half trained", "do": name}]
    ended = driver.run(*BARE, "resume=false", f"hydra.run.dir={quoted(folder)}", plan=plan, cli=True, folder=folder)
    assert ended.code == STATUS[name], ended.output
    found = re.search(rf"stopped by SIG{name} after step 5; go on with\n  (python -m fmexp .*)$", ended.output, re.M)
    assert found, ended.output
    command = found[1]
    words = shlex.split(command)[3:]
    if name == "TERM":  # as one would: into a shell, in another folder than before
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    else:
        output = driver.run(*words, cli=True, folder=folder).output
    assert "going on from the checkpoint at step 5" in output
    assert_same(folder, truth("cli", *BARE, "resume=false"))


def quoted(path: Path) -> str:
    return "'" + str(path).replace("'", r"\'") + "'"


def test_a_signal_to_all_processes_at_once(driver: Driver, tmp_path: Path) -> None:
    """As Ctrl-C, timeout and Slurm send it: the data-loading processes must give what the run still waits for."""
    args = (*BARE, "dataset._target_=reliability_parts.signalling", "train.num_workers=2", "train.epochs=1")
    folder = tmp_path / "run"
    for step, name in enumerate(("TERM", "INT", "USR1", "HUP"), 1):
        told = {"RELIABILITY_SIGNAL": name, "RELIABILITY_SENT": str(tmp_path / name)}
        ended = driver.run(*args, f"hydra.run.dir={folder}", **told)
        assert ended.code == STATUS[name], ended.output
        assert f"stopped by SIG{name} after step {step}" in ended.output
        assert "Error" not in ended.output
    assert driver.run(*args, f"hydra.run.dir={folder}").code == 0
    assert driver.run(*args, f"hydra.run.dir={tmp_path / 'truth'}").code == 0
    assert_same(folder, tmp_path / "truth")


def test_second_signal_ends_at_once(driver: Driver, tmp_path: Path) -> None:
    """Its batch lasts for ever, so that only the second signal can have ended it."""
    args = (*NO_STAGES, "model=lenet", "model._target_=reliability_parts.Waits", f"hydra.run.dir={tmp_path / 'run'}")
    waiting = tmp_path / "waiting"
    pid = driver.start(*args, RELIABILITY_WAITING=str(waiting))
    until(lambda: waiting.exists() or not alive(pid), "the fourth batch is not begun")

    def ended() -> bool:
        time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        return not alive(pid)

    until(ended, "the signals are ignored")
    assert driver.wait(pid).code == -signal.SIGTERM
    assert waiting.exists()
    ended_well = driver.run(*args)
    assert "going on from the checkpoint at step 3" in ended_well.output
    assert driver.run(*args[:-1], f"hydra.run.dir={tmp_path / 'truth'}").code == 0
    assert_same(tmp_path / "run", tmp_path / "truth")


def test_a_signal_while_it_closes_ends_in_a_complete_run(
    driver: Driver, truth: Callable[..., Path], tmp_path: Path
) -> None:
    plan = [{"steps": 32, "match": "open .model.pt.part", "do": "TERM"}]
    assert driver.run(*BARE, f"hydra.run.dir={tmp_path / 'run'}", plan=plan).code == 0
    assert_same(tmp_path / "run", truth(*BARE))


def test_a_signal_before_it_begins_leaves_nothing(driver: Driver, tmp_path: Path) -> None:
    plan = [{"match": "forward", "do": "TERM"}]
    assert driver.run(*BARE, f"hydra.run.dir={tmp_path / 'run'}", plan=plan).code == -signal.SIGTERM
    assert listing(tmp_path) == {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock of fmexp.process, standing still, and SIGUSR1 put back as it was."""
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGUSR1)
    yield now
    signal.signal(signal.SIGUSR1, before)


def test_an_echo_is_no_second_signal(clock: list[float]) -> None:
    """`timeout` sends each signal twice, to the process and to its group."""
    arrived: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    signal.signal(signal.SIGUSR1, handler)
    with Stop() as stopping:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        clock[0] += process.ECHO_S / 2
        signal.raise_signal(signal.SIGUSR1)
        assert stopping.signal == signal.SIGUSR1
        assert arrived == []
        clock[0] += process.ECHO_S
        signal.raise_signal(signal.SIGUSR1)
        assert arrived == [signal.SIGUSR1]


def test_what_was_to_be_done_before_is_done(clock: list[float]) -> None:
    """submitit puts a job back into Slurm's queue in its handler of the signal."""
    arrived: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: arrived.append(number))
    with Stop() as stopping:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(SystemExit) as leaving:
            stopping.leave()
    assert leaving.value.code == 138
    assert arrived == [signal.SIGUSR1]


def test_what_is_ignored_stays_ignored(clock: list[float]) -> None:
    """A shell ignores Ctrl-C for what it starts in the background, nohup ignores SIGHUP."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with Stop() as stopping:
        signal.raise_signal(signal.SIGUSR1)
    assert stopping.signal is None
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_all_is_given_back(clock: list[float]) -> None:
    before = {name: signal.getsignal(getattr(signal, f"SIG{name}")) for name in STATUS}
    with Stop():
        pass
    assert {name: signal.getsignal(getattr(signal, f"SIG{name}")) for name in STATUS} == before
