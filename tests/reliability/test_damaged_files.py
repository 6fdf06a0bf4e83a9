"""Checkpoints and event files that came to harm: the run falls back, or says what is wrong, and deletes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability_tools import BARE, RICH, Driver, all_events, assert_same, listing

from fmexp.rundir import bounded, checkpoint, tensorboard
from fmexp.rundir.checkpoint import CheckpointError
from fmexp.rundir.layout import CHECKPOINT, DAMAGED, PREVIOUS

KILLED = [{"steps": 8, "match": "batch trained", "do": "KILL"}]  # checkpoints of the steps 6 and 3


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


HARM: dict[str, Callable[[bytes], bytes]] = {
    "one bit is wrong": flip,
    "it is cut short": lambda content: content[: len(content) * 2 // 3],
    "its last byte is gone": lambda content: content[:-1],
    "it is empty": lambda content: b"",
    "it is all zeros": lambda content: bytes(len(content)),
    "it is something else": lambda content: b"something else",
}


@pytest.fixture(scope="module")
def killed(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Copies a run that was killed after step 8 into a folder."""
    original = tmp_path_factory.mktemp("killed") / "run"
    assert driver.run(*BARE, f"hydra.run.dir={original}", plan=KILLED).code == -9

    def copy(folder: Path) -> Path:
        shutil.copytree(original, folder / "run")
        return folder / "run"

    return copy


def harm(path: Path, how: str) -> None:
    path.write_bytes(HARM[how](path.read_bytes()))


@pytest.mark.parametrize("how", HARM)
def test_the_one_before_it(
    driver: Driver, truth: Callable[..., Path], killed: Callable[[Path], Path], tmp_path: Path, how: str
) -> None:
    folder = killed(tmp_path)
    harm(folder / CHECKPOINT, how)
    ended = driver.run(*BARE, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    warnings = [line for line in ended.output.splitlines() if "cannot be read" in line]
    assert len(warnings) == 1
    assert str(folder / CHECKPOINT) in warnings[0]
    assert PREVIOUS in warnings[0]
    assert "going on from the checkpoint at step 3" in ended.output
    assert_same(folder, truth(*BARE))


def test_the_good_one_outlives_the_next(
    driver: Driver, truth: Callable[..., Path], killed: Callable[[Path], Path], tmp_path: Path
) -> None:
    """The first checkpoint after a damaged one must not put that in the good one's place before it stands itself."""
    folder = killed(tmp_path)
    harm(folder / CHECKPOINT, "one bit is wrong")
    damaged = (folder / CHECKPOINT).read_bytes()
    plan = [{"match": r"rename .checkpoint.pt.part$", "do": "KILL"}]
    assert driver.run(*BARE, f"hydra.run.dir={folder}", plan=plan).code == -9
    assert (folder / DAMAGED).read_bytes() == damaged
    state = checkpoint.load(folder)
    assert state
    assert state["step"] == 3
    assert driver.run(*BARE, f"hydra.run.dir={folder}").code == 0
    assert_same(folder, truth(*BARE))


@pytest.mark.parametrize("how", HARM)
def test_neither(driver: Driver, killed: Callable[[Path], Path], tmp_path: Path, how: str) -> None:
    folder = killed(tmp_path)
    for name in (CHECKPOINT, PREVIOUS):
        harm(folder / name, how)
    before = listing(folder, ".lock.owner")
    for cli in (False, True):
        ended = driver.run(*BARE, f"hydra.run.dir={folder}", cli=cli)
        assert ended.code == 1
        assert "no checkpoint of this run can be read" in ended.output
        assert str(folder / CHECKPOINT) in ended.output
        assert str(folder / PREVIOUS) in ended.output
        assert f"Nothing was deleted. To start over, move {folder} away or name another folder." in ended.output
        assert "Traceback" not in ended.output
        assert listing(folder, ".lock.owner") == before


def test_a_state_that_cannot_be_kept_is_told_at_once(driver: Driver, tmp_path: Path) -> None:
    """Not by the resume, when it is too late."""
    args = (*BARE[:-2], "model=lenet", "model._target_=reliability_parts.Unkept", f"hydra.run.dir={tmp_path / 'run'}")
    ended = driver.run(*args)
    assert ended.code == 1
    assert "cannot be kept in a checkpoint" in ended.output
    assert "Keepsake" in ended.output
    assert "add_safe_globals" in ended.output


def test_other_conditions(
    driver: Driver, truth: Callable[..., Path], killed: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = killed(tmp_path)
    state = checkpoint.load(folder)
    assert state
    checkpoint.save(folder, {**state, "backend": {**state["backend"], "torch": "1.0", "device": "Abacus"}})
    ended = driver.run(*BARE, f"hydra.run.dir={folder}")
    warnings = [line for line in ended.output.splitlines() if "other conditions" in line]
    assert len(warnings) == 1
    assert "device: Abacus, now cpu" in warnings[0]
    assert f"torch: 1.0, now {torch.__version__}" in warnings[0]
    assert "threads" not in warnings[0]
    assert_same(folder, truth(*BARE))


def test_no_warning_without_a_reason(driver: Driver, killed: Callable[[Path], Path], tmp_path: Path) -> None:
    assert "conditions" not in driver.run(*BARE, f"hydra.run.dir={killed(tmp_path)}").output


TAILS = {
    "garbage": b"\x00\xff" * 500,
    "zeros": bytes(4096),
    "half a record": (1 << 20).to_bytes(8, "little") + b"1234 and no more",
    "a length that no memory has": b"\xff" * 12,
}


@pytest.mark.parametrize("tail", TAILS)
def test_torn_tails(
    driver: Driver, truth: Callable[..., Path], killed: Callable[[Path], Path], tmp_path: Path, tail: str
) -> None:
    folder = killed(tmp_path)
    for path in bounded.event_files(folder):
        path.write_bytes(path.read_bytes() + TAILS[tail])
    assert driver.run(*BARE, f"hydra.run.dir={folder}").code == 0
    assert_same(folder, truth(*BARE))


def test_an_event_file_that_is_too_short_is_told(
    driver: Driver, killed: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = killed(tmp_path)
    (path,) = bounded.event_files(folder)
    path.write_bytes(b"")
    ended = driver.run(*BARE, f"hydra.run.dir={folder}")
    assert ended.code == 0
    assert f"{path} is shorter than when the checkpoint was written" in ended.output


def test_an_embedding_that_is_gone_takes_no_other_with_it(driver: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = [{"steps": 13, "match": "batch trained", "do": "KILL"}]
    assert driver.run(*RICH, f"hydra.run.dir={folder}", plan=plan).code == -9
    (folder / "00008" / "default" / "tensors.tsv").unlink()
    ended = driver.run(*RICH, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    assert "tensors.tsv is gone" in ended.output
    config = (folder / tensorboard.PROJECTOR).read_text()
    assert "00008/" not in config
    assert "00004/" in config
    assert "00012/" in config


# ---- thought of by a machine ----

FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def harmed(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that some fault made of `content`: parts overwritten, cut out, put in or exchanged."""
    for _ in range(draw(st.integers(1, 4))):
        place, size = draw(st.integers(0, len(content))), draw(st.integers(0, 64))
        how = draw(st.sampled_from(["overwrite", "cut", "insert", "end", "move"]))
        if how == "overwrite":
            new = draw(st.binary(min_size=size, max_size=size))
            content = content[:place] + new + content[place + size :]
        elif how == "cut":
            content = content[:place] + content[place + size :]
        elif how == "insert":
            content = content[:place] + draw(st.binary(min_size=size, max_size=size)) + content[place:]
        elif how == "end":
            content = content[:place]
        else:
            content = content[place:] + content[:place]
    return content


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@FUZZED
@given(data=st.data())
def test_fuzzed_checkpoints(
    killed: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever became of the two files: the exact state of one of them, or the stated error."""
    good = originals(killed, tmp_path_factory)
    folder = tmp_path_factory.mktemp("fuzz")
    for name in (CHECKPOINT, PREVIOUS):
        content = good[name]
        if data.draw(st.booleans(), label=f"harm {name}"):
            content = data.draw(harmed(content))
        (folder / name).write_bytes(content)
    written = {name: (folder / name).read_bytes() for name in (CHECKPOINT, PREVIOUS)}
    try:
        state = checkpoint.load(folder)
    except CheckpointError:
        assert all(written[name] != good[name] for name in written)
        assert {name: (folder / name).read_bytes() for name in written} == written
    else:
        states = [states_of[name] for name in (CHECKPOINT, PREVIOUS)]
        assert any(equal(state, one) for one in states)
        if written[CHECKPOINT] == good[CHECKPOINT]:
            assert equal(state, states[0])
    finally:
        shutil.rmtree(folder)


contents: dict[str, bytes] = {}
states_of: dict[str, Any] = {}


def originals(killed: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    if not contents:
        folder = killed(tmp_path_factory.mktemp("originals"))
        for name in (CHECKPOINT, PREVIOUS):
            contents[name] = (folder / name).read_bytes()
            states_of[name] = checkpoint._unsealed(contents[name])
        assert not equal(states_of[CHECKPOINT], states_of[PREVIOUS])
    return contents


@FUZZED
@given(data=st.data())
def test_fuzzed_tails(
    killed: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands behind what the checkpoint knows of is cut off, to the byte."""
    folder = killed(tmp_path_factory.mktemp("fuzz"))
    state = checkpoint.load(folder)
    assert state
    (path,) = bounded.event_files(folder)
    size = state["events"]["files"][path.name]
    known, tail = path.read_bytes()[:size], path.read_bytes()[size:]
    path.write_bytes(known + data.draw(harmed(tail)))
    second = folder / f"events.out.tfevents.{data.draw(st.integers(0, 10**10))}.host.1.0"
    second.write_bytes(data.draw(st.binary(max_size=200)))
    tensorboard.rewind(folder, state["events"])
    assert path.read_bytes() == known
    assert bounded.event_files(folder) == [path]
    shutil.rmtree(folder.parent)


@settings(FUZZED, max_examples=8)
@given(data=st.data())
def test_fuzzed_runs(
    driver: Driver,
    truth: Callable[..., Path],
    killed: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    """The same with whole runs: one of the stated errors, or the same end as without any harm."""
    folder = killed(tmp_path_factory.mktemp("fuzz"))
    for name in (CHECKPOINT, PREVIOUS):
        if data.draw(st.booleans(), label=f"harm {name}"):
            (folder / name).write_bytes(data.draw(harmed((folder / name).read_bytes())))
    (path,) = bounded.event_files(folder)
    path.write_bytes(path.read_bytes() + data.draw(st.binary(max_size=100)))
    ended = driver.run(*BARE, f"hydra.run.dir={folder}")
    if ended.code == 0:
        assert_same(folder, truth(*BARE))
        assert all_events(folder)
    else:
        assert "no checkpoint of this run can be read" in ended.output
        assert "Traceback" not in ended.output
    shutil.rmtree(folder.parent)
