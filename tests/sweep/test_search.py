"""Searches with Optuna: resumed to a total, equal to an undisturbed one, and with any launcher."""

from pathlib import Path

import optuna
import program
import pytest
from sweep_tools import OWN, Gate, Sweep, files, members, result

from fmexp import compose, config, sweep
from fmexp.rundir import layout

SPACE = ("hydra/sweeper=optuna", "optimizer.lr=tag(log, interval(1e-4, 1e-1))", "optimizer.momentum=interval(0.0,0.9)",
         "+model.tag=a,b", "dataset.train_size=64")  # fmt: skip


def trials(root: Path) -> list[tuple[str, dict[str, object], float | None]]:
    study = optuna.load_study(study_name="fmexp", storage=f"sqlite:///{root / 'optuna.db'}")
    return [(trial.state.name, trial.params, trial.value) for trial in study.get_trials()]


@pytest.mark.slow
def test_a_killed_search_goes_on_to_its_total_as_if_undisturbed(tmp_path: Path, gate: Gate) -> None:
    truth = Sweep(tmp_path / "truth", *OWN, *SPACE, "hydra.sweeper.n_trials=5").end().root
    root = tmp_path / "sweep"
    words = (*OWN, *SPACE, "hydra.sweeper.n_trials=3")
    first = Sweep(root, *words, **gate.environ)
    gate.until_waiting(first, 1)
    first.kill()
    assert [state for state, _, _ in trials(root)] == ["RUNNING"]
    second = Sweep(root, *words).end()
    assert "0 of 3 trials done" in second.output
    assert [state for state, _, _ in trials(root)] == ["COMPLETE"] * 3
    assert trials(root) == trials(truth)[:3]
    before = {path.name: files(path) for path in members(root)}
    assert len(before) == 3

    planned = Sweep(root, *OWN, *SPACE, "hydra.sweeper.n_trials=5", "sweep.dry_run=true").end()
    assert "5 trials: 3 done, 0 to resume, 2 to choose and train. Nothing was written." in planned.output
    assert len(trials(root)) == 3
    third = Sweep(root, *OWN, *SPACE, "hydra.sweeper.n_trials=5").end()
    assert trials(root) == trials(truth)
    assert {name: files(root / name) for name in before} == before
    best = max(member.objective for member in sweep.read(root))
    assert f"best of 5 trials: {best:.4f} with " in third.output
    for path, (_, params, value) in zip(members(root), trials(root), strict=True):
        held = layout.read_config(path)
        assert held["optimizer"]["lr"] == pytest.approx(params["optimizer.lr"], rel=1e-5)
        assert held["model"]["tag"] == params["+model.tag"]
        assert value == result(path)["objective"]
        assert 1e-4 <= held["optimizer"]["lr"] <= 1e-1

    refused = Sweep(root, *OWN, *SPACE, "hydra.sweeper.n_trials=5", "seed=7")
    assert refused.wait() == 1
    assert "was begun with" in refused.output
    assert len(trials(root)) == 5


@pytest.mark.slow
def test_failed_trials_stay_open_and_parallel_ones_are_searched_too(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    words = (*OWN, *SPACE, "+model.batch_fails=a", "hydra.sweeper.n_trials=6", *launcher)
    first = Sweep(root, *words)
    assert first.wait() == 1
    states = [(state, params["+model.tag"]) for state, params, _ in trials(root)]
    assert set(states) == {("RUNNING", "a"), ("COMPLETE", "b")}
    assert "trials failed; the same command executes them again" in first.output
    second = Sweep(root, *words, SWEEP_MENDED="1").end()
    assert f"{states.count(('COMPLETE', 'b'))} of 6 trials done" in second.output
    assert [state for state, _, _ in trials(root)] == ["COMPLETE"] * 6
    assert len(members(root)) == 6


def test_recipe_searches_learning_rate_momentum_and_model(tmp_path: Path) -> None:
    config.check(compose(["experiment=optuna"]))
    small = ("dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "train.max_steps=2")
    words = ("-m", "experiment=optuna", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}/s")
    assert program.call(*words, *small, cwd=tmp_path).status == 0
    for member in sweep.read(tmp_path / "s"):
        assert member.status == "complete"
        assert {"optimizer.lr", "optimizer.momentum", "model"} <= member.overrides.keys()
    assert [state for state, _, _ in trials(tmp_path / "s")] == ["COMPLETE"] * 2
