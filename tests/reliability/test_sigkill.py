"""A run that is killed at any moment, however often, ends as if it had never been."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import alive, default_signals, until
from reliability_tools import BARE, NO_STAGES, RICH, Driver, Victim, assert_same, environment, random_moments

SEED = "RELIABILITY_SEED"

# Within one epoch, and at the exact points around what is written; each goes on from what the one before it left.
POINTS = [
    *[{"steps": 5, "match": "batch half trained"}] * 3,
    {"match": "open .hydra/.config.yaml.part"},
    {"match": "within .hydra/.config.yaml.part"},
    {"match": "written events"},
    {"steps": 1, "match": "batch trained"},
    {"match": "open .checkpoint.pt.part"},
    {"match": "within .checkpoint.pt.part"},
    {"match": r"fsync .checkpoint.pt.part$"},
    {"match": "fsync .checkpoint.pt.part done"},
    {"match": r"rename checkpoint.pt$"},
    {"match": "rename checkpoint.pt to checkpoint.previous.pt done"},
    {"match": r"rename .checkpoint.pt.part$"},
    {"match": "rename .checkpoint.pt.part to checkpoint.pt done"},
    {"steps": 1, "match": r"fsync \.$"},
    {"steps": 1, "match": r"fsync \. done"},
    {"match": "within events", "nth": 2},
    {"match": "remove checkpoint", "last": True},
    {"steps": 16, "match": "batch trained", "new": True},  # the epoch's last batch, and nothing written of it
    {"match": "forward MLP eval", "nth": 2},  # the first one is that of choosing a backend
    {"match": r"rename .checkpoint.pt.part$"},
    {"match": "batch half trained"},
    {"steps": 15, "match": "forward Linear eval", "nth": 3},
    {"match": "open .model.pt.part"},
    {"match": "within .model.pt.part", "nth": 20},
    {"match": r"rename .model.pt.part$"},
    {"match": "rename .model.pt.part to model.pt done"},
    {"match": "within .result.json.part"},
    {"match": r"rename .result.json.part$"},
    {"match": "rename .result.json.part to result.json done", "last": True},
    {"match": "remove checkpoint.previous.pt", "last": True},
    {"match": r"remove checkpoint.pt$", "last": True},
]


def test_fixed_points(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    victim = Victim(driver, tmp_path, truth(*BARE), *BARE)
    for point in POINTS:
        if point.get("new"):
            victim.finish()
            victim.begin()
        victim.kill(point)
        if point.get("last"):  # it is complete, and must be found so
            victim.finish()
            victim.begin()
    victim.finish()
    assert victim.kills == len(POINTS)


def test_order_of_writing(truth: Callable[..., Path]) -> None:
    """What a power cut may take: nothing that a checkpoint or the result speaks of, for that is on the disk before."""
    trace = (truth(*RICH).parent / "trace.txt").read_text()
    labels = [re.sub(r"tfevents.*", "tfevents", line.split("\t")[1]) for line in trace.splitlines()]
    unsynced: set[str] = set()
    seen = []
    for label in labels:
        if label.startswith("written "):
            unsynced.add(label.removeprefix("written "))
        if label.startswith("fsync "):
            unsynced.discard(label.removeprefix("fsync "))
        if re.fullmatch(r"rename \.(checkpoint|model|result).*\.part", label):
            assert unsynced <= {"projector_config.pbtxt"}, label  # which the checkpoint holds itself
            seen.append(label)
        if re.fullmatch(r"rename \.(.*)\.part to \1 done", label):
            name = label.split()[1]
            assert f"fsync {name} done" in labels[labels.index(f"open {name}") :]
            folder = os.path.dirname(name) or "."
            assert f"fsync {folder} done" in labels[labels.index(label) :][:3], label
    assert len(seen) == 12 + 2
    assert labels.index("rename .result.json.part to result.json done") < labels.index("remove checkpoint.pt")


def test_random_moments_of_a_fixed_seed(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    assert random_moments(driver, truth(*RICH), tmp_path, RICH, 8, 1).kills == 8


@pytest.mark.slow
def test_25_random_moments(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    print(f"{SEED}={seed}")
    victim = random_moments(driver, truth(*RICH), tmp_path, RICH, 25, seed)
    print(f"{victim.kills} kills survived by {victim.runs} runs")
    assert victim.kills == 25


@pytest.mark.slow
def test_random_times(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    """As above, but with the clock in place of the events; a run may be complete before its kill."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    print(f"{SEED}={seed}")
    chosen = random.Random(seed)
    expected = truth(*RICH)
    began = time.monotonic()
    driver.run(*RICH, f"hydra.run.dir={tmp_path / 'timed'}")
    took = time.monotonic() - began
    victim = Victim(driver, tmp_path, expected, *RICH)
    for _ in range(15):
        pid = driver.start(*RICH, f"hydra.run.dir={victim.folder}")
        time.sleep(chosen.uniform(0, took))  # any length is right
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        victim.count(driver.wait(pid))
    victim.finish()
    print(f"{victim.kills} kills survived")
    assert victim.kills > 0


@pytest.mark.slow
def test_every_kind_of_moment(driver: Driver, truth: Callable[..., Path], tmp_path: Path) -> None:
    """Kill at the first event of each label that a run with all kinds of summaries has."""
    expected = truth(*RICH)
    labels = [line.split("\t")[1] for line in (expected.parent / "trace.txt").read_text().splitlines()]
    patterns = dict.fromkeys(f"^{re.sub('[0-9]+', '[0-9]+', re.escape(label))}$" for label in labels)
    victim = Victim(driver, tmp_path, expected, *RICH)
    for pattern in patterns:
        victim.kill({"match": pattern})
    victim.finish()
    print(f"{victim.kills} kills survived")
    assert victim.kills == len(patterns) > 70


AUGMENTED = (*BARE, "dataset._target_=reliability_parts.augmented")
PICTURES = (*BARE[4:], "dataset=image_folder", "dataset.image_size=16")
LOADING = {  # what of the same run each process does in its own way
    "map-style": ["train.num_workers=0", "train.num_workers=1", "train.num_workers=2", "train.num_workers=4"],
    "pictures": ["dataset.cache=memory", "dataset.cache=disk", "dataset.cache=none",
                 "dataset.cache=none train.num_workers=0", "dataset.cache=none train.num_workers=4"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADING)
def test_random_moments_while_images_are_loaded(
    driver: Driver, truth: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """By other numbers of processes each time, cached or not; none of them lives on."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    print(f"{SEED}={seed}")
    chosen, loaders = random.Random(seed), tmp_path / "loaders"
    loaders.mkdir()
    args = AUGMENTED
    if kind == "pictures":
        draw_pictures(tmp_path / "pictures")
        args = (*PICTURES, f"dataset.root={tmp_path / 'pictures'}", f"dataset.cache_dir={tmp_path / 'cache'}")
    victim = Victim(driver, tmp_path, truth(*args, LOADING[kind][0]), *args)
    victim.but = "config/text_summary"  # which says how it is loaded
    while victim.kills < 15:
        how, most = chosen.choice(LOADING[kind]).split(), chosen.choice((10, 40, 120))
        loads = {"RELIABILITY_LOADS": str(chosen.randint(1, most)), "RELIABILITY_LOADERS": str(loaders)}
        victim.count(driver.run(*args, *how, f"hydra.run.dir={victim.folder}", **loads))
        pids = [int(entry.name) for entry in loaders.iterdir()]
        until(lambda pids=pids: not any(map(alive, pids)), "a process that loads lives on")
    victim.finish()
    print(f"{victim.kills} kills survived by {victim.runs} runs")


def draw_pictures(folder: Path) -> None:
    """64 + 40 of two classes."""
    for split, count in (("train", 64), ("test", 40)):
        for number in range(count):
            place = folder / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (20, 18, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


def test_killed_from_outside(driver: Driver, tmp_path: Path) -> None:
    """The whole program, killed by another process while it is within a batch, and typed again."""
    args = (*NO_STAGES, "model=lenet", "model._target_=reliability_parts.Waits")
    command = [sys.executable, "-m", "fmexp", *args, f"hydra.run.dir={tmp_path / 'run'}"]
    waiting = tmp_path / "waiting"
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, env=environment(RELIABILITY_WAITING=str(waiting)), stdout=output, preexec_fn=default_signals
        )
        until(lambda: waiting.exists() or process.poll() is not None, "the fourth batch is not begun")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "going on from the checkpoint at step 3" in ended.stdout
    assert driver.run(*args, f"hydra.run.dir={tmp_path / 'truth'}", cli=True).code == 0
    assert_same(tmp_path / "run", tmp_path / "truth")
