"""Searches with Optuna: resumed to a total, equal to an undisturbed one, and with any launcher."""

import os
import re
from pathlib import Path

import optuna
import program
import pytest
from omegaconf import OmegaConf
from sweep_tools import OWN, SMALL, Gate, Sweep, files, members
from tools import assert_same_weights, result

from fmexp import compose, config, execute, sweep
from fmexp.rundir import layout
from fmexp.sweep import search

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


SEARCH = (*SMALL, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2")
LR = "optimizer.lr=interval(0.01,0.1)"
SAMPLER = "hydra.sweeper.sampler._target_=optuna.samplers"
PRUNER = "hydra.sweeper.pruner._target_=optuna.pruners"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{LR} hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 must be at least 1."),
        (f"{LR} hydra.sweeper.n_trials=-1", "hydra.sweeper.n_trials=-1 must be at least 1."),
        (f"{LR} hydra.sweeper.n_trials=abc", "hydra.sweeper.n_trials=abc must be a whole number"),
        (f"{LR} hydra.sweeper.n_trials=1.5", "hydra.sweeper.n_trials=1.5 must be a whole number"),
        (f"{LR} hydra.sweeper.n_trials=true", "hydra.sweeper.n_trials=True must be a whole number"),
        (f"{LR} hydra.sweeper.n_trials=null", "hydra.sweeper.n_trials must not be null"),
        (f"{LR} hydra.sweeper.n_jobs=-1", "hydra.sweeper.n_jobs=-1 must be at least 1."),
        (f"{LR} hydra.sweeper.n_jobs=0", "hydra.sweeper.n_jobs=0 must be at least 1."),
        (f"{LR} hydra.sweeper.n_jobs=1.5", "hydra.sweeper.n_jobs=1.5 must be a whole number"),
        (f"{LR} hydra.sweeper.seed=-1", "hydra.sweeper.seed=-1 must be at least 0."),
        (f"{LR} hydra.sweeper.seed=abc", "hydra.sweeper.seed=abc must be a whole number"),
        (f"{LR} hydra.sweeper.seed=4294967296", "hydra.sweeper.seed=4294967296 must be below 4294967296."),
        (f"{LR} hydra.sweeper.params=abc", "hydra.sweeper.params: Cannot assign str to Dict"),
        (f"{LR} +hydra.sweeper.n_tirals=3", "There is no key hydra.sweeper.n_tirals. Did you mean"),
        (f"{LR} hydra.sweeper.sampler=tpe", "hydra.sweeper.sampler=tpe must be a mapping with _target_"),
        (f"{LR} hydra.sweeper.sampler=null", "hydra.sweeper.sampler=None must be a mapping with _target_"),
        (f"{LR} +hydra.sweeper.sampler.nothing=1", "unexpected keyword argument 'nothing'"),
        (f"{LR} +hydra.sweeper.sampler.n_startup_trials=abc", "TPESampler cannot choose trial 0: '<' not supported"),
        (
            f"{LR} {SAMPLER}.BruteForceSampler",
            "BruteForceSampler cannot choose trial 0: FloatDistribution.step must",
        ),
        (f"{LR} {SAMPLER}.GridSampler", "GridSampler cannot choose trial 0: Error in call to target"),
        (f"{LR} {SAMPLER}.Nope", "Nope cannot choose trial 0: Error locating target 'optuna.samplers.Nope'"),
        (f"{LR} hydra.sweeper.sampler._target_=builtins.dict", "builtins.dict cannot choose trial 0: 'dict' object"),
        (f"{LR} hydra.sweeper.pruner=median", "hydra.sweeper.pruner=median must be a mapping with _target_"),
        (f"{LR} {PRUNER}.Nope", "pruners.Nope cannot be made: Error locating target 'optuna.pruners.Nope'"),
        (f"{LR} {SAMPLER.replace('sampler', 'pruner', 1)}.RandomSampler", "is no pruner of Optuna's, such as"),
        (
            f"{LR} {PRUNER}.SuccessiveHalvingPruner",
            "successive halving, which decides alike after any stop, is hydra/sw",
        ),
        (f"{LR} {PRUNER}.ThresholdPruner", "ThresholdPruner cannot be made: Error in call to target"),
        (f"{LR} {PRUNER}.MedianPruner hydra.sweeper.n_jobs=2", "and 2 would be trained at once: what each is compared"),
        (f"{LR} {PRUNER}.MedianPruner objective=train/accuracy", "objective=train/accuracy is not measured"),
        ("seed=1", "hydra/sweeper=optuna has nothing to search"),
        ("optimizer.lr=interval(0.2,0.1)", "optimizer.lr=interval(0.2,0.1) cannot be searched: `low <= high` must"),
        ("optimizer.lr=tag(log,interval(0,1))", "optimizer.lr=tag(log,interval(0,1)) cannot be searched: `low > 0`"),
        ("optimizer.lr=interval(0.1,inf)", "optimizer.lr=inf must be a finite number."),
        ("optimizer.lr=interval(-0.1,0.1)", "optimizer.lr=-0.1 must be at least 0.0."),
        ("optimizer.lr=0.1,fast", "optimizer.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("train.batch_size=interval(1,8)", "train.batch_size=3.674 must be a whole number, such as 4."),
        ("seed=range(0,0)", "seed=range(0,0) names no value."),
        ("seed=range(0,3,0)", "seed=range(0,3,0): range() arg 3 must not be zero."),
        ("model=glob(zzz*)", "model=glob(zzz*) names no value."),
        ("optimizer=sgd,nope", "Could not find 'optimizer/nope'."),
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_search_that_cannot_be_is_refused_in_words(words: str, message: str, tmp_path: Path) -> None:
    done = program.call("-m", *SEARCH, *words.split(), cwd=tmp_path)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_search_whose_trials_all_diverge_is_a_result(tmp_path: Path) -> None:
    done = program.call(
        "-m", *SEARCH, "optimizer.lr=interval(1e30,1e31)", f"hydra.sweep.dir={tmp_path}/s", cwd=tmp_path
    )
    assert done.status == 0, done.err
    assert "all of 2 trials diverged, so none is the best" in done.out
    assert [state for state, _, _ in trials(tmp_path / "s")] == ["PRUNED"] * 2


@pytest.mark.parametrize("content", [b"no database " * 100, None], ids=["garbage", "folder"])
def test_a_file_that_is_no_search_is_said_in_words(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "s" / "optuna.db"
    if content is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir()
        file.write_bytes(content)
    done = program.call("-m", *SEARCH, LR, f"hydra.sweep.dir={tmp_path}/s", cwd=tmp_path)
    assert done.status == 1
    assert re.match(rf"{file} cannot be used: (file is not a database|unable to open database file)\.", done.err)
    assert "Traceback" not in done.err
    assert content is None or file.read_bytes() == content


def test_a_second_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    words = ("-m", *SEARCH, LR, f"hydra.sweep.dir={tmp_path}/s")
    with layout.lock(tmp_path / "s"):
        done = program.call(*words, cwd=tmp_path)
        assert done.status == 1
        assert f"process {os.getpid()} on " in done.err
        assert "is running in this folder. Wait for it, or name another folder." in done.err
        assert not (tmp_path / "s" / "optuna.db").exists()
        assert program.call(*words, "sweep.dry_run=true", cwd=tmp_path).status == 0, "to look is allowed"
        grid = program.call("-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s", cwd=tmp_path)
        assert grid.status == 0, "so is a grid, whose members are locked one by one"
    assert program.call(*words, cwd=tmp_path).status == 0
    assert [state for state, _, _ in trials(tmp_path / "s")] == ["COMPLETE"] * 2


def test_state_that_another_user_may_have_pickled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, me = tmp_path / "s", os.geteuid()
    words = ("-m", *SEARCH, LR, f"hydra.sweep.dir={root}")
    assert program.call(*words, "hydra.sweeper.n_trials=1", cwd=tmp_path).status == 0
    before = files(root)
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    for sampler in (f"{SAMPLER}.CmaEsSampler", "hydra.sweeper.sampler._target_=mine.Sampler"):
        done = program.call(*words, sampler, cwd=tmp_path)
        assert done.status == 1
        assert f"{root}/optuna.db belongs to another user, and {sampler.partition('=')[2]} may execute" in done.err
        assert files(root) == before
    assert program.call(*words, cwd=tmp_path).status == 0, "with a sampler that pickles nothing"


PRUNED = ("-m", *SEARCH, "hydra.sweeper.n_trials=6", "optimizer.lr=tag(log,interval(1e-5,1))", "train.max_steps=null",
          "train.epochs=3", f"{SAMPLER}.RandomSampler", f"{PRUNER}.MedianPruner",
          "+hydra.sweeper.pruner.n_startup_trials=1")  # fmt: skip


class KilledError(BaseException):
    """In place of a SIGKILL."""


def killed(*arguments: object, **named: object) -> None:
    raise KilledError


def test_a_pruner_ends_trials_by_their_epochs_and_decides_the_same_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reported(root: Path) -> list[dict[int, float]]:
        study = optuna.load_study(study_name="fmexp", storage=f"sqlite:///{root / 'optuna.db'}")
        return [trial.intermediate_values for trial in study.get_trials()]

    truth = tmp_path / "truth"
    done = program.call(*PRUNED, f"hydra.sweep.dir={truth}", cwd=tmp_path)
    assert done.status == 0, done.err
    states = [state for state, _, _ in trials(truth)]
    assert {*states} == {"COMPLETE", "PRUNED"}
    found = sweep.read(truth)
    assert [member.status.upper() for member in found] == states
    for member, values in zip(found, reported(truth), strict=True):
        assert values == {step // 16: value for step, value in member.rungs.items()}
        assert member.steps == (48 if member.status == "complete" else 16 * len(values))
        assert (member.folder / "checkpoint.pt").exists() == (member.status == "pruned")
    whole = next(member for member in found if member.status == "complete")
    alone = tmp_path / "alone"
    words = [f"{key}={value}" for key, value in whole.overrides.items()]
    execute(compose([*SMALL, "train.max_steps=null", "train.epochs=3", *words]), alone)
    assert_same_weights(whole.folder, alone)

    root = tmp_path / "killed"
    for module, name in ((search, "prune"), (optuna.study.Study, "tell"), (optuna.trial.Trial, "should_prune")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed)
            with pytest.raises(KilledError):
                program.call(*PRUNED, f"hydra.sweep.dir={root}", cwd=tmp_path)
    assert program.call(*PRUNED, f"hydra.sweep.dir={root}", cwd=tmp_path).status == 0
    assert trials(root) == trials(truth)
    assert reported(root) == reported(truth)


def test_a_trial_whose_checkpoint_is_beyond_an_epoch_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*PRUNED, "hydra.sweeper.n_trials=1", f"hydra.sweep.dir={tmp_path}/s")
    with monkeypatch.context() as patched:
        patched.setattr(optuna.trial.Trial, "report", killed)
        with pytest.raises(KilledError):
            program.call(*words, cwd=tmp_path)
    (folder,) = members(tmp_path / "s")
    (folder / "rungs.json").unlink()
    execute(OmegaConf.create(layout.read_config(folder)), folder, pause_at=20)
    assert program.call(*words, cwd=tmp_path).status == 0
    assert [state for state, _, _ in trials(tmp_path / "s")] == ["COMPLETE"]
    assert [*sweep.read(tmp_path / "s")[0].rungs] == [20, 32]


def test_a_trial_that_cannot_be_built_or_diverges_ends_no_search(tmp_path: Path) -> None:
    words = [word for word in PRUNED if not word.startswith("optimizer.lr=")]
    words += [
        "dataset.train_size=64,1",
        "optimizer.lr=0.01,1e30",
        "hydra.sweeper.seed=5",
        "train.validation=0.25",
        f"hydra.sweep.dir={tmp_path}/s",
    ]
    done = program.call(*words, cwd=tmp_path)
    assert done.status == 1
    assert "trials failed; the same command executes them again" in done.err
    statuses = [member.status for member in sweep.read(tmp_path / "s")]
    assert len(trials(tmp_path / "s")) == 6
    assert {*statuses} == {"complete", "diverged", "failed"}
    assert "Traceback" not in done.err


def test_without_a_pruner_no_trial_pauses(tmp_path: Path) -> None:
    words = [word for word in PRUNED if "pruner" not in word]
    assert program.call(*words, "hydra.sweeper.n_trials=7", f"hydra.sweep.dir={tmp_path}/s", cwd=tmp_path).status == 0
    assert [state for state, _, _ in trials(tmp_path / "s")] == ["COMPLETE"] * 7
    assert not [*(tmp_path / "s").glob("*/rungs.json")]
