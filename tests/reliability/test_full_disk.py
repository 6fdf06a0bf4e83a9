"""A full disk stops a run with one clear error; with space it goes on, and nothing of it is lost."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability_tools import BARE, RICH, Driver, assert_same

from fmexp.rundir import checkpoint

# Where the disk is full from, how many bytes are left, and the step of the last checkpoint before.
POINTS = {
    "beginning": ({"match": "open .hydra/.config.yaml.part"}, 0, None),
    "first events": ({"match": "open events"}, 0, None),
    "first checkpoint": ({"steps": 3, "match": "open .checkpoint.pt.part"}, 0, None),
    "checkpoint": ({"steps": 9, "match": "open .checkpoint.pt.part"}, 4096, 6),
    "events": ({"steps": 13, "match": "batch trained"}, 0, 12),
    "log": ({"match": "open fmexp.log"}, 0, None),
    "graph": ({"match": "within events", "nth": 4}, 0, None),
    "embedding": ({"steps": 4, "match": "open 00004/default/tensors.tsv"}, 0, 3),
    "projector": ({"steps": 8, "match": "open projector_config.pbtxt"}, 0, 6),
    "last events": ({"steps": 32, "match": r"fsync \. done"}, 0, 32),
    "model": ({"steps": 32, "match": "open .model.pt.part"}, 4096, 32),
    "result": ({"steps": 32, "match": "open .result.json.part"}, 0, 32),
}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mount point of a file system of 4 MB."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {getattr(error, 'stderr', '') or error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def space(small_disk: Path) -> Iterator[Path]:
    """A small disk, emptied after use."""
    yield small_disk
    subprocess.run(["find", str(small_disk), "-mindepth", "1", "-delete"], check=True)


@pytest.mark.parametrize("name", POINTS)
def test_stops_and_goes_on(driver: Driver, truth: Callable[..., Path], space: Path, name: str) -> None:
    point, bytes_left, saved = POINTS[name]
    args = RICH if name != "beginning" else BARE
    folder, filler = space / "run", space / "filler"
    plan = [{"do": "fill", "file": str(filler), "leave": bytes_left, **point}]
    for again in ("", "still full, "):
        ended = driver.run(*args, f"hydra.run.dir={folder}", plan=plan)
        assert ended.code == 1, again + ended.output
        assert ended.output.count("The disk is full") == 1, again + ended.output
        assert ended.output.rstrip().endswith("make space, then go on with\n  the same call"), again + ended.output
        assert "Traceback" not in ended.output, again + ended.output
        assert "Error" not in ended.output, again + ended.output
        state = checkpoint.load(folder)
        assert (state and state["step"]) == saved, again
        assert not list(folder.rglob("*.part")), again
        assert not (folder / "result.json").exists(), again
        plan = []
    filler.unlink()
    ended = driver.run(*args, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.output
    assert_same(folder, truth(*args))


def test_message_of_the_program(driver: Driver, truth: Callable[..., Path], space: Path) -> None:
    folder = space / "run"
    plan = [{"steps": 6, "match": "open .checkpoint.pt.part", "do": "fill", "file": str(space / "filler")}]
    ended = driver.run(*BARE, f"hydra.run.dir={folder}", plan=plan, cli=True)
    assert ended.code == 1
    assert "Traceback" not in ended.output
    said = ended.output[ended.output.index("The disk is full") :]
    assert f"The disk is full: {folder} ([Errno 28] No space left on device" in said
    assert f"then go on with\n  python -m fmexp {' '.join(BARE[:5])}" in said
    (space / "filler").unlink()
    assert driver.run(*BARE, f"hydra.run.dir={folder}", cli=True).code == 0
    assert_same(folder, truth("cli", *BARE))
