"""What a run wrote is what `fmexp.read` returns: every point and picture, of a run complete, going on or broken."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from program import environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tools import scalars, small
from torch.utils.tensorboard import SummaryWriter

import fmexp
from fmexp import execute, sweep
from fmexp.config import resolved
from fmexp.errors import FmexpError
from fmexp.run import Run
from fmexp.rundir import layout, results

SEEN: list[results.Result] = []


def look(run: Run) -> None:
    """A stage that reads its own run, after what was written so far is on the disk."""
    run.writer.flush()
    seen = results.read(run.output_dir)
    assert seen.scalars
    SEEN.append(seen)


def stop(run: Run) -> None:
    """A stage that asks for the end of the process at its eighth step."""
    if run.step == 8:
        os.kill(os.getpid(), signal.SIGTERM)


def fail(run: Run) -> None:
    """A stage that fails."""
    raise ValueError(f"no luck at step {run.step}")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has written its configuration, and nothing else."""
    path = tmp_path / "run"
    path.mkdir()
    layout.write_config(path, resolved(small()), {})
    return path


def test_a_complete_run(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    path, events = run_small()
    run = fmexp.read(str(path))
    assert (run.folder, run.status, run.steps, run.failures, run.error) == (path, "complete", 16, {}, "")
    assert run.content == layout.read_result(path)
    assert run.objective == run.metrics["test/accuracy"] == run.content["objective"]
    assert run.seconds == run.content["seconds"] > 0
    assert set(run.scalars) == set(events.Tags()["scalars"])
    for tag in run.scalars:
        assert run.scalars[tag] == scalars(events, tag)
    assert [step for step, _ in run.scalars["train/loss"]] == [4, 8, 12, 16]
    assert run.scalars["train/loss"][-1][1] == pytest.approx(run.metrics["train/loss"])
    assert {tag: [step for step, _ in found] for tag, found in run.images.items()} == {
        "view/images": [0],
        "view/predictions": [4, 8, 12, 16],
        "view/confusion_matrix": [16],
    }
    assert run.images["view/predictions"][0][1].size == (700, 230)


def test_every_point_is_there_and_has_its_value(begun: Path) -> None:
    values = np.random.default_rng(0).normal(size=12_000).astype(np.float32)  # TensorBoard would keep 10,000
    with SummaryWriter(str(begun)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar("noise", value, step)
    assert results.read(begun).scalars == {"noise": [(step, float(value)) for step, value in enumerate(values)]}


def test_every_picture_is_there_and_has_its_pixels(begun: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 5, 7), np.uint8)
    with SummaryWriter(str(begun)) as writer:
        for step, image in enumerate(pixels):
            writer.add_image("noise", image, 10 * step)
    found = results.read(begun).images
    assert [step for step, _ in found["noise"]] == list(range(0, 300, 10))
    for (_, image), expected in zip(found["noise"], pixels, strict=True):
        assert (np.asarray(image) == expected.transpose(1, 2, 0)).all()


def test_pictures_one_by_one(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    path, _ = run_small("stage.image_grid.layout=images", "stage.image_grid.images=3", "train.max_steps=1")
    found = results.read(path).images["view/images"]
    assert [(step, image.size, image.mode) for step, image in found] == [(0, (28, 28), "L")] * 3
    assert len({image.tobytes() for _, image in found}) == 3


def test_a_run_that_is_going_on(tmp_path: Path) -> None:
    SEEN.clear()
    execute(small("+stage.look._target_=test_results.look", "+stage.look.when=log", "logging=light"), tmp_path)
    assert [run.status for run in SEEN] == ["running"] * 4
    assert [len(run.scalars["train/loss"]) for run in SEEN] == [1, 2, 3, 4]
    last, after = SEEN[-1], results.read(tmp_path)
    assert (last.metrics, last.steps, last.content) == ({}, 0, {})
    assert math.isnan(last.objective)
    assert after.status == "complete"
    assert after.scalars["train/loss"] == last.scalars["train/loss"]


def test_a_record_that_is_being_written(begun: Path) -> None:
    with SummaryWriter(str(begun)) as writer:
        writer.add_scalar("loss", 0.5, 1)
        writer.add_scalar("loss", 0.25, 2)
    (path,) = begun.glob("events.out.tfevents.*")
    os.truncate(path, path.stat().st_size - 3)
    with layout.lock(begun):
        run = results.read(begun)
    assert (run.status, run.scalars) == ("running", {"loss": [(1, 0.5)]})
    assert results.read(begun).status == results.status(begun) == "interrupted"


def test_a_run_that_was_interrupted_and_goes_on(tmp_path: Path) -> None:
    cfg = small("+stage.stop._target_=test_results.stop", "+stage.stop.when=log", "logging=light")
    with pytest.raises(SystemExit):
        execute(cfg, tmp_path)
    run = results.read(tmp_path)
    assert run.status == results.status(tmp_path) == "interrupted"
    assert [step for step, _ in run.scalars["train/loss"]] == [4, 8]
    assert math.isnan(run.objective)
    execute(cfg, tmp_path)
    after = results.read(tmp_path)
    assert after.status == "complete"
    assert [step for step, _ in after.scalars["train/loss"]] == [4, 8, 12, 16]
    assert after.scalars["train/loss"][:2] == run.scalars["train/loss"]


def test_a_run_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"):
        execute(small("+stage.fail._target_=test_results.fail", "+stage.fail.when=log", "logging=light"), tmp_path)
    run = results.read(tmp_path)
    assert run.status == results.status(tmp_path) == "failed"
    assert (run.steps, run.error) == (4, "ValueError: no luck at step 4")
    assert math.isnan(run.objective)


def test_a_run_that_diverged(tmp_path: Path) -> None:
    execute(small("optimizer.lr=1e30", "logging=light"), tmp_path)
    run = results.read(tmp_path)
    assert run.status == results.status(tmp_path) == "diverged"
    assert math.isnan(run.objective)
    assert all(map(math.isfinite, run.metrics.values()))


@pytest.mark.parametrize(("name", "why"), [("nowhere", "is no folder"), ("", "has no .hydra/config.yaml")])
def test_a_folder_without_a_run(name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FmexpError) as caught:
        fmexp.read(name)
    assert str(caught.value).startswith(f"{tmp_path / name} holds no run: it {why}. ")
    assert "fmexp.sweep.read" in str(caught.value)


def test_the_run_of_a_damaged_result_is_not_complete(begun: Path) -> None:
    (begun / "result.json").write_text('{"status": "compl')
    assert results.read(begun).status == "interrupted"


def test_members_have_what_their_runs_have(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    for number, lr in enumerate((0.01, 0.1)):
        path = root / f"{number}_lr-{lr}"
        execute(small(f"optimizer.lr={lr}", "logging=light", "train.max_steps=4"), path)
        (path / ".hydra" / "overrides.yaml").write_text(f"- optimizer.lr={lr}\n")
    members = sweep.read(root)
    assert [member.overrides for member in members] == [{"optimizer.lr": "0.01"}, {"optimizer.lr": "0.1"}]
    for member in members:
        run = results.read(member.folder)
        assert member.status == results.status(member.folder) == "complete"
        assert (member.objective, member.metrics, member.seconds) == (run.objective, run.metrics, run.seconds)


def test_reading_needs_no_torch() -> None:
    code = "import sys, fmexp; fmexp.read; print({'torch', 'tensorboard', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
