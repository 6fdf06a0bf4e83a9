"""A halving sweep: a survivor has the bits of a run that was alone, and kills change no decision."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from program import alive, default_signals, until
from reliability_tools import BARE, DEADLINE_S, NO_STAGES, Driver, environment, left

from fmexp import compose, execute, rng
from fmexp.rundir import layout

# 22 training batches in two epochs; rungs at 2, 6 and 18.
HALVING = (
    *NO_STAGES, "model=mlp", "model.hidden=[16]", "model.dropout=0.2", "train.validation=0.25",
    "objective=val/accuracy", "optimizer=adam", "logging=light", "hydra/sweeper=halving", "hydra.sweeper.min_steps=2",
    "optimizer.lr=1e-2,1e-9,3e-3,1e-5,1e-3,1e30,3e-4,3e-2,1e-4",
)  # fmt: skip
LONE = tuple(word for word in HALVING if not word.startswith(("hydra", "optimizer.lr")))

OPTIONS = {
    "plain": ("model=mlp", "model.hidden=[16]", "model.dropout=0.2"),
    "average": ("model=mlp", "model.dropout=0.1", "train.ema=0.9", "train.accumulate=3", "schedule=cosine"),
    "norm": ("model=lenet", "model._target_=reliability_parts.Noisy", "augment=mixup", "optimizer=adamw"),
    "follows": ("model=mlp", "schedule=plateau", "schedule.patience=0", "train.patience=1", "train.epochs=4"),
    "stages": ("model=lenet", "stage.image_grid.enabled=true", "stage.image_grid.when=log",
               "stage.pr_curves.enabled=true", "stage.pr_curves.when=epoch", "stage.learning.enabled=true"),
}  # fmt: skip


def bits(folder: Path) -> dict[str, Any]:
    """What a run left, but for what a halving sweep adds."""
    found = left(folder)
    found["files"] = [name for name in found["files"] if name != "rungs.json"]
    return found


def rungs(root: Path) -> dict[str, dict[str, float]]:
    """What each member was compared by, by the name of its folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(root.glob("*/rungs.json"))}


def statuses(root: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in sorted(root.glob("*/result.json"))}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_that_pauses_has_the_bits_of_one_that_does_not(options: str, tmp_path: Path) -> None:
    """In the midst of an epoch and of a window of batches, at an epoch's end, and twice at one step."""
    cfg = compose([*NO_STAGES, "train.validation=0.25", "objective=val/accuracy", *OPTIONS[options]])
    alone, paused = tmp_path / "alone", tmp_path / "paused"
    execute(cfg, alone)
    values = {}
    for step in (4, 11, 17):
        values[step] = execute(cfg, paused, pause_at=step)
        assert layout.read_result(paused)["status"] == "paused"  # type: ignore[index]
        assert not (paused / "model.pt").exists()
        before = rng.get_state()["torch"].tolist()
        assert execute(cfg, paused, pause_at=step) == values[step]
        assert rng.get_state()["torch"].tolist() == before, "nothing is done twice"
    execute(cfg, paused)
    assert bits(paused) == bits(alone)
    assert rungs(tmp_path) == {"paused": {str(step): value for step, value in values.items()}}
    recorded = {step: value for step, tag, value in left(paused)["events"] if tag == "val/accuracy"}
    assert float(recorded[11]) == pytest.approx(values[11]), "an epoch's end, where the run evaluates, too"


def test_a_pause_that_was_not_noted_is_measured_again_from_its_checkpoint(driver: Driver, tmp_path: Path) -> None:
    words = (*BARE, "optimizer.lr=0.05")
    truth = execute(compose(list(words)), tmp_path / "truth", pause_at=5)
    execute(compose(list(words)), tmp_path / "run", pause_at=5)
    (tmp_path / "run" / "rungs.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    assert execute(compose(list(words)), tmp_path / "run", pause_at=5) == truth
    assert execute(compose(list(words)), tmp_path / "run", pause_at=3) == truth, "it is beyond, and has no other value"


@pytest.fixture(scope="module")
def undisturbed(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a halving sweep, one member after another, with a trace of its events beside it."""
    root = tmp_path_factory.mktemp("undisturbed") / "sweep"
    trace = root.parent / "trace.txt"
    words = ("--multirun", *HALVING, f"hydra.sweep.dir={root}")
    ended = driver.run(*words, cli=True, folder=root, trace=trace)
    assert ended.code == 0, ended.output
    assert [len(found) for found in rungs(root).values()].count(3) == 1
    return root


def assert_as(root: Path, truth: Path) -> None:
    """Assert that two sweeps decided alike, by the same values, and that their members have the same bits."""
    assert rungs(root) == rungs(truth)
    assert statuses(root) == statuses(truth)
    for name, status in statuses(truth).items():
        ours, theirs = left(root / name), left(truth / name)
        assert {name for name in ours["files"] if "checkpoint" not in name} == {
            name for name in theirs["files"] if "checkpoint" not in name}  # fmt: skip
        for part in ("model", "events") if status != "pruned" else ("events",):
            assert ours[part] == theirs[part], (name, part)


def test_survivors_have_the_bits_of_plain_runs(undisturbed: Path, driver: Driver, tmp_path: Path) -> None:
    found = {name: status for name, status in statuses(undisturbed).items() if status != "pruned"}
    assert sorted(found.values()) == ["complete", "diverged"]
    for name in found:
        lr = name.partition("lr-")[2]
        ended = driver.run(*LONE, f"optimizer.lr={lr}", f"hydra.run.dir={tmp_path / name}")
        assert ended.code == 0, ended.output
        ours, theirs = bits(undisturbed / name), bits(tmp_path / name)
        ours["files"].remove(".hydra/hydra.yaml")  # of the command line alone, as the next
        ours["files"].remove(".hydra/overrides.yaml")
        assert ours == theirs


@pytest.mark.parametrize("first", [("hydra.sweeper.min_steps=2",), ()], ids=["min_steps", "default"])
def test_three_times_as_many_epochs_take_over_what_members_have(
    first: tuple[str, ...], driver: Driver, tmp_path: Path
) -> None:
    """Decisions and bits are those of a sweep that had so many from the start; one that was killed on the way, too."""
    words = tuple(word for word in HALVING if not word.startswith("hydra.sweeper.min_steps"))
    words = ("--multirun", *words, *first, "train.keep_checkpoint=true")
    root, truth = tmp_path / "sweep", tmp_path / "truth"
    assert driver.run(*words, "train.epochs=3", f"hydra.sweep.dir={truth}", cli=True).code == 0
    words = (*words, f"hydra.sweep.dir={root}")
    assert driver.run(*words, "train.epochs=1", cli=True).code == 0
    before = rungs(root)
    (best,) = (name for name, status in statuses(root).items() if status == "complete")
    dry = driver.run(*words, "train.epochs=3", "sweep.dry_run=true", cli=True)
    assert "9 members: 0 to train, 8 to resume, 1 to skip. Nothing was written." in dry.output
    assert rungs(root) == before
    for point, nth in ((r"rename .*config.yaml.part to .*config.yaml done", 4),
                       (r"rename .*result.json.part to .*result.json done", 4),
                       (r"rename .*rungs.json.part to .*rungs.json done", 1)):  # fmt: skip
        ended = driver.run(
            *words, "train.epochs=3", cli=True, folder=root, plan=[{"match": point, "nth": nth, "do": "KILL"}]
        )
        assert ended.code == -signal.SIGKILL, ended.output
    ended = driver.run(*words, "train.epochs=3", cli=True)
    assert ended.code == 0, ended.output
    assert statuses(root) == statuses(truth)
    for name, values in rungs(truth).items():
        assert rungs(root)[name] == {**before[name], **values}
    for path in truth.glob("*/result.json"):
        name, status = path.parent.name, statuses(truth)[path.parent.name]
        assert layout.digest(root / name) == layout.digest(truth / name)
        assert (root / name / layout.CONFIG).read_text() == (truth / name / layout.CONFIG).read_text()
        words_file = ".hydra/overrides.yaml"
        assert (root / name / words_file).read_text() == (truth / name / words_file).read_text()
        if status == "complete":
            ours, theirs = left(root / name), left(truth / name)
            assert (ours["model"], ours["events"]) == (theirs["model"], theirs["events"])
    assert (root / best / "fmexp.log").read_text().count("trained further, from epoch 1 to 3") == 1


def test_where_the_rate_follows_the_length_of_the_run_members_begin_at_the_start(
    driver: Driver, tmp_path: Path
) -> None:
    words = ("--multirun", *HALVING, "train.keep_checkpoint=true", f"hydra.sweep.dir={tmp_path}", "schedule=cosine")
    assert driver.run(*words, "train.epochs=1", cli=True).code == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*.json")}
    ended = driver.run(*words, "train.epochs=3", cli=True)
    assert ended.code == 0, ended.output
    assert "schedule=cosine follows the length of the run. Such members begin at the start." in ended.output
    assert {path: path.read_bytes() for path in before} == before
    assert len(statuses(tmp_path)) == 18


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2, 3))])
def test_kills_at_random_events_change_nothing(undisturbed: Path, driver: Driver, tmp_path: Path, seed: int) -> None:
    """Each goes on from what the one before it left, until a sweep comes to its end."""
    trace = (undisturbed.parent / "trace.txt").read_text().splitlines()
    chosen, root, kills = random.Random(seed), tmp_path / "sweep", 0
    words = ("--multirun", *HALVING, f"hydra.sweep.dir={root}")
    for number in chosen.sample(range(len(trace)), 5):
        # How many events a sweep has that goes on from there is not known: so this counts from its start.
        plan = [{"nth": 1 + number // 3, "do": "KILL"}]
        ended = driver.run(*words, cli=True, folder=root, plan=plan)
        kills += ended.code == -signal.SIGKILL
        assert ended.code in (0, -signal.SIGKILL), ended.output
    ended = driver.run(*words, cli=True)
    assert ended.code == 0, ended.output
    assert kills >= 2
    assert_as(root, undisturbed)


POINTS = (
    r"rename .*checkpoint.pt.part to .*checkpoint.pt done",
    r"open \d_.*/.result.json.part",
    r"within \d_.*/.rungs.json.part",
    r"rename .*rungs.json.part to .*rungs.json done",
    r"rename .*result.json.part to .*result.json done",
)


@pytest.mark.slow
def test_kills_around_what_a_rung_writes_change_nothing(undisturbed: Path, driver: Driver, tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    words, killed = ("--multirun", *HALVING, f"hydra.sweep.dir={root}"), set()
    for nth in (2, 9, 3):  # of the first rung, of its end, of the next one
        for point in POINTS:
            ended = driver.run(*words, cli=True, folder=root, plan=[{"match": point, "nth": nth, "do": "KILL"}])
            assert ended.code in (0, -signal.SIGKILL), ended.output
            killed |= {point} if ended.code else set()
    assert killed == set(POINTS), "each is there to be killed at"
    ended = driver.run(*words, cli=True)
    assert ended.code == 0, ended.output
    assert_as(root, undisturbed)


@pytest.mark.slow
def test_with_two_workers_and_kills_of_a_worker_and_of_all_it_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    words = [sys.executable, "-m", "fmexp", "--multirun", *HALVING, *launcher, f"hydra.sweep.dir={root}"]

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "output.txt").open("ab") as output:
            return subprocess.Popen(
                words, cwd=tmp_path, env=environment(), stdout=output, stderr=output, start_new_session=True,
                preexec_fn=default_signals,
            )  # fmt: skip

    def noted() -> int:
        return sum(map(len, rungs(root).values()))

    for count, worker_alone in ((2, True), (5, False), (10, False), (12, True)):
        sweep = start()
        until(lambda count=count: noted() >= count, "more values", ended=lambda s=sweep: s.poll() is not None)
        workers = children(sweep.pid)
        for pid in workers[:1] if worker_alone else [sweep.pid, *workers]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if worker_alone:
            os.killpg(sweep.pid, signal.SIGTERM)
        sweep.wait(DEADLINE_S)
        until(lambda workers=workers: not any(map(alive, workers)), "the end of the workers")
    assert start().wait(DEADLINE_S) == 0, (tmp_path / "output.txt").read_text()
    assert_as(root, undisturbed)


def children(pid: int) -> list[int]:
    """The worker processes of a sweep, and not the tracker of its semaphores."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if Path(f"/proc/{pid}").exists() else []
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
