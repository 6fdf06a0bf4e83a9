"""Sweeps that nothing disturbs: folders, table, picture, HPARAMS, dry run, skipping, extending, parallel execution."""

import csv
import errno
import json
import logging
import os
import pickle
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import program
import pytest
from hydra.errors import HydraException
from matplotlib import image
from omegaconf import OmegaConf
from program import TensorBoard
from sweep_tools import SMALL, THREADS, Sweep, files, members
from tools import result

from fmexp import compose, config, sweep
from fmexp.config.hydra_versions import VERSION_BASE
from fmexp.rundir import atomic, layout
from fmexp.sweep.job import Composer, run
from fmexp.sweep.launcher import Launcher


def test_each_member_has_a_folder_with_all_of_its_run(grid: Sweep) -> None:
    names = ["0_optimizer-sgd_lr-0.01", "1_optimizer-sgd_lr-0.001", "2_optimizer-adam_lr-0.01",
             "3_optimizer-adam_lr-0.001"]  # fmt: skip
    assert [path.name for path in members(grid.root)] == names
    for path, optimizer, lr in zip(members(grid.root), ["SGD", "SGD", "Adam", "Adam"], [0.01, 0.001] * 2, strict=True):
        held = layout.read_config(path)
        assert held["optimizer"]["_target_"] == f"torch.optim.{optimizer}"
        assert held["optimizer"]["lr"] == lr
        assert result(path)["config_digest"] == config.digest(held)
        assert {entry.name for entry in path.iterdir()} >= {"fmexp.log", "model.pt", "result.json", ".hydra"}
        assert len(list(path.glob("events.out.tfevents.*"))) == 1
        assert not list(path.glob("checkpoint*"))
    assert (grid.root / "multirun.yaml").is_file()


def test_table_is_ranked_and_csv_and_picture_agree_with_it(grid: Sweep) -> None:
    found = sweep.read(grid.root)
    assert [m.objective for m in found] == [result(path)["objective"] for path in members(grid.root)]
    rows = list(csv.reader((grid.root / "sweep.csv").read_text().splitlines()))
    heads = ["optimizer", "optimizer.lr", "train/loss", "test/loss", "test/accuracy", "train/accuracy",
             "test/accuracy/best", "status", "seconds", "folder"]  # fmt: skip
    assert rows[0] == heads
    accuracies = [float(row[heads.index("test/accuracy")]) for row in rows[1:]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {row[-1] for row in rows[1:]} == {m.folder.name for m in found}
    for row in rows[1:]:
        written = result(grid.root / row[-1])["metrics"]
        assert [float(cell) for cell in row[2:7]] == [written[name] for name in heads[2:7]], "to the last digit"
    printed = [line.split() for line in grid.output.splitlines()]
    short = [[*row[:2], *(f"{float(cell):.4f}" for cell in row[2:7]), row[7], f"{float(row[8]):.1f}", row[9]]
             for row in rows[1:]]  # fmt: skip
    places = [printed.index(row) for row in [heads, *short]]
    assert places == list(range(places[0], places[0] + 5))
    assert f"tensorboard --logdir {grid.root}" in grid.output
    pixels = image.imread(grid.root / "sweep.png")
    assert np.unique(pixels[..., :3].reshape(-1, 3), axis=0).shape[0] > 10


def test_losses_are_ranked_upwards(tmp_path: Path) -> None:
    words = [*SMALL, "objective=test/loss", "optimizer.lr=0.1,0.00001", f"hydra.sweep.dir={tmp_path}/s"]
    assert program.call("-m", *words, cwd=tmp_path).status == 0
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").read_text().splitlines()))
    assert float(rows[0]["test/loss"]) < float(rows[1]["test/loss"])


def test_hparams_has_a_row_a_member_and_all_their_keys(grid: Sweep) -> None:
    with TensorBoard(grid.root) as server:
        rows = server.hparams(4)
        columns = server.json("plugin/hparams/experiment", {})
        runs = server.json("runs")
    assert rows.keys() == {path.name for path in members(grid.root)}
    for path in members(grid.root):
        row, metrics = rows[path.name], result(path)["metrics"]
        assert row["status"] == "STATUS_SUCCESS"
        settings = row["settings"]
        assert settings["optimizer"] == ("SGD" if "sgd" in path.name else "Adam")
        assert (settings["dataset"], settings["model"], settings["seed"]) == ("synthetic", "MLP", 0)
        assert settings["optimizer.lr"] == float(path.name.split("lr-")[1])
        assert ("optimizer.momentum" in settings) == ("sgd" in path.name)
        assert ("optimizer.eps" in settings) == ("adam" in path.name)
        for tag in ("test/accuracy", "test/accuracy/best", "test/loss", "train/loss"):
            assert row["metrics"][tag] == pytest.approx(metrics[tag])
        assert row["metrics"]["wall_seconds"] > 0
    shown = {info["name"] for info in columns["hparamInfos"]}
    assert shown >= {"dataset", "model", "optimizer", "seed", "optimizer.lr", "optimizer.momentum", "optimizer.eps"}
    assert not shown & {"dataset.train_size", "train.batch_size", "model.hidden"}  # they do not vary
    metrics = [info["name"]["tag"] for info in columns["metricInfos"]]
    assert metrics == ["test/accuracy", "test/accuracy/best", "test/loss", "train/loss", "wall_seconds"]
    assert "summary" in runs


def test_the_same_command_trains_nothing_twice_and_an_extended_grid_trains_the_new_ones(
    grid: Sweep, tmp_path: Path
) -> None:
    root = tmp_path / "sweep"
    root.mkdir()
    for path in members(grid.root):  # a sweep moved elsewhere is the same sweep
        path.rename(root / path.name)
    try:
        before = {path.name: files(path) for path in members(root)}
        words = [*SMALL, *THREADS, "optimizer=sgd,adam", f"hydra.sweep.dir={root}"]
        again = program.call("-m", *words, "optimizer.lr=0.01,0.001", cwd=tmp_path)
        assert again.status == 0
        assert "(0 to train, 0 to resume, 4 to skip)" in again.out
        assert {path.name: files(path) for path in members(root)} == before

        planned = program.call("-m", *words, "optimizer.lr=0.1,0.01,0.001", "sweep.dry_run=true", cwd=tmp_path)
        assert [line.split()[1:4] for line in planned.out.splitlines()[1:7]] == [
            ["sgd", "0.1", "train"], ["sgd", "0.01", "skip"], ["sgd", "0.001", "skip"],
            ["adam", "0.1", "train"], ["adam", "0.01", "skip"], ["adam", "0.001", "skip"],
        ]  # fmt: skip

        extended = program.call("-m", *words, "optimizer.lr=0.1,0.01,0.001", cwd=tmp_path)
        assert extended.status == 0, extended.out + extended.err
        assert "(2 to train, 0 to resume, 4 to skip)" in extended.out
        now = {path.name: files(path) for path in members(root)}
        new = now.keys() - before.keys()
        assert new == {"0_optimizer-sgd_lr-0.1", "3_optimizer-adam_lr-0.1"}
        assert {name: now[name] for name in before} == before
        assert {result(root / name)["status"] for name in new} == {"complete"}
        assert {layout.read_config(root / name)["optimizer"]["lr"] for name in new} == {0.1}
    finally:
        for name in before:
            (root / name).rename(grid.root / name)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = program.call("-m", *SMALL, "optimizer.lr=0.1,0.01", "sweep.dry_run=true", cwd=tmp_path)
    assert done.status == 0
    assert [line.split() for line in done.out.splitlines()[:3]] == [
        ["member", "optimizer.lr", "action", "folder"],
        ["0", "0.1", "train", "0_lr-0.1"],
        ["1", "0.01", "train", "1_lr-0.01"],
    ]
    assert not list(tmp_path.iterdir())


def test_a_member_that_cannot_be_composed_stops_the_sweep_before_it_begins(tmp_path: Path) -> None:
    done = program.call("-m", *SMALL, "optimizer.lr=0.1,fast", cwd=tmp_path)
    assert done.status == 1
    assert "optimizer.lr" in done.err
    assert not list(tmp_path.iterdir())


def test_side_by_side_gives_the_same_bits(grid: Sweep, parallel: Sweep) -> None:
    assert [path.name for path in members(parallel.root)] == [path.name for path in members(grid.root)]
    for ours, theirs in zip(members(parallel.root), members(grid.root), strict=True):
        assert (ours / "model.pt").read_bytes() == (theirs / "model.pt").read_bytes()
        assert result(ours)["metrics"] == result(theirs)["metrics"]
    assert "[4/4] " in parallel.output


def test_side_by_side_the_members_share_the_cores(grid: Sweep, parallel: Sweep) -> None:
    noted = [json.loads((path / "noted.json").read_text()) for path in members(parallel.root)]
    cores = len(os.sched_getaffinity(0))
    assert {one["threads"] for one in noted} == {max(1, cores // 2)}  # OMP_NUM_THREADS was 8
    assert len({one["pid"] for one in noted}) == 2
    assert {one["cuda"] for one in noted} == {"7", "9"}, "a GPU each"
    assert {json.loads((path / "noted.json").read_text())["pid"] for path in members(grid.root)} == {grid.process.pid}


def test_replicates_are_put_together(tmp_path: Path) -> None:
    words = [*SMALL, "optimizer.lr=0.1,0.001", "seed=1,2,3", f"hydra.sweep.dir={tmp_path}/s"]
    done = program.call("-m", *words, cwd=tmp_path)
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines()]
    head = lines.index(["optimizer.lr", "n", "mean", "test/accuracy", "spread", "95", "%", "interval"])
    rows = {row[0]: row[1:] for row in lines[head + 1 : head + 3]}
    written = list(csv.DictReader((tmp_path / "s" / "replicates.csv").read_text().splitlines()))
    for lr in ("0.1", "0.001"):
        values = [result(path)["objective"] for path in members(tmp_path / "s") if f"lr-{lr}_" in path.name]
        half = 4.30265273 * np.std(values, ddof=1) / np.sqrt(3)  # Student's t of 2 degrees of freedom
        interval = [f"{np.mean(values) - half:.4f}", "to", f"{np.mean(values) + half:.4f}"]
        assert rows[lr] == ["3", f"{np.mean(values):.4f}", f"{np.std(values, ddof=1):.4f}", *interval]
        (kept,) = (row for row in written if row["optimizer.lr"] == lr)
        assert kept["n"] == "3"
        assert float(kept["mean test/accuracy"]) == pytest.approx(np.mean(values), rel=1e-15)
        assert float(kept["spread"]) == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_equal_members_and_odd_values_have_folders_of_their_own(tmp_path: Path) -> None:
    odd = "'pythonic: {a/b}=[1,2] é'"
    words = [*SMALL, "seed=1,1", f"logging.filename_suffix='','{'x' * 120}'", f"hydra.sweep.dir={tmp_path}/s"]
    assert program.call("-m", *words, f"logging.comment={odd}", cwd=tmp_path).status == 0
    found = members(tmp_path / "s")
    assert len(found) == 4
    assert all(result(path)["status"] == "complete" for path in found)
    assert all(len(path.name) <= 110 for path in found)
    again = program.call("-m", *words, f"logging.comment={odd}", cwd=tmp_path)
    assert "(0 to train, 0 to resume, 4 to skip)" in again.out
    assert members(tmp_path / "s") == found


def test_a_member_that_a_second_sweep_begins_meanwhile_has_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, "seed=1", f"hydra.sweep.dir={tmp_path}/s"]
    assert program.call("-m", *words, cwd=tmp_path).status == 0
    monkeypatch.setattr("fmexp.sweep.launcher.by_digest", lambda root: {})  # as it was before that began
    again = program.call("-m", *words, cwd=tmp_path)
    assert "(0 to train, 0 to resume, 1 to skip)" in again.out
    assert len(members(tmp_path / "s")) == 1


def test_what_a_kill_in_the_last_moment_leaves_is_removed(tmp_path: Path) -> None:
    words = [*SMALL, "seed=1", f"hydra.sweep.dir={tmp_path}/s"]
    assert program.call("-m", *words, cwd=tmp_path).status == 0
    (path,) = members(tmp_path / "s")
    before = result(path)
    (path / "checkpoint.pt").touch()  # which is removed after result.json is written
    for name in (".sweep.csv.old_____.part", ".sweep.csv.new_____.part"):
        (tmp_path / "s" / name).touch()
    os.utime(tmp_path / "s" / ".sweep.csv.old_____.part", (0, 0))
    assert program.call("-m", *words, cwd=tmp_path).status == 0
    assert not (path / "checkpoint.pt").exists()
    assert result(path) == before
    assert [file.name for file in (tmp_path / "s").glob(".*")] == [".sweep.csv.new_____.part"], (
        "a second sweep may write it"
    )


def test_a_sweep_that_diverges_is_a_result(tmp_path: Path) -> None:
    words = [*SMALL, "optimizer.lr=0.01,1e30", f"hydra.sweep.dir={tmp_path}/s"]
    done = program.call("-m", *words, cwd=tmp_path)
    assert done.status == 0
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["complete", "diverged"]
    assert "(0 to train, 0 to resume, 2 to skip)" in program.call("-m", *words, cwd=tmp_path).out


def test_started_and_read_from_python_and_the_table_again(tmp_path: Path) -> None:
    found = sweep.start([*SMALL, "optimizer.lr=0.1,0.01"], tmp_path / "it's here")
    assert [member.overrides["optimizer.lr"] for member in found] == ["0.1", "0.01"]
    assert [member.status for member in found] == ["complete"] * 2
    assert found == sweep.read(tmp_path / "it's here")
    printed = program.run(str(tmp_path / "it's here"), cwd=tmp_path, command=[program.PYTHON[0], "-m", "fmexp.sweep"])
    assert printed.status == 0
    assert "2 members: 2 complete" in printed.out
    assert all(member.folder.name in printed.out for member in found)
    refused = program.run("nowhere", cwd=tmp_path, command=[program.PYTHON[0], "-m", "fmexp.sweep"])
    assert refused.status == 2
    assert "usage" in refused.err


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=0.5"],
        ["model=mlp", "model.hidden=[7,8]", "seed=3"],
        ["optimizer=adam", "+optimizer.extra=1", "train={epochs: 3}", "train.epochs=4"],
        ["experiment=tutorial", "logging.comment='a b'", "train.max_steps=null"],
        ["~stage.projector", "stage.predictions.when=end"],
    ],
)
def test_members_are_composed_as_hydra_does(words: list[str]) -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(**VERSION_BASE, config_dir=str(config.conf_dir()), job_name="fmexp"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["dataset=synthetic"], RunMode.MULTIRUN)
        expected = loader.load_sweep_config(master, words)
        composer = Composer(loader, master)
        composer.compose(["seed=99", *words])
        composed = composer.compose(words)
        assert len(composer.bases) == 1
    assert OmegaConf.to_container(composed) == OmegaConf.to_container(expected)
    for theirs, ours in ((expected, composed), (expected.train, composed.train), (expected.model, composed.model)):
        assert OmegaConf.is_struct(ours) == OmegaConf.is_struct(theirs)
        assert OmegaConf.get_type(ours) == OmegaConf.get_type(theirs)
    with pytest.raises(HydraException):
        composer.compose([*words, "train.nothing=1"])


def test_a_job_is_run_again_as_slurm_does_with_one_that_it_has_put_back(tmp_path: Path) -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(**VERSION_BASE, config_dir=str(config.conf_dir()), job_name="fmexp"):
        loader = GlobalHydra.instance().config_loader()
        launcher = Launcher()
        launcher.config = loader.load_configuration("config", [*SMALL, "logging=light"], RunMode.MULTIRUN)
        launcher.hydra_context = SimpleNamespace(config_loader=loader)
        words = [*SMALL, "logging=light", "seed=3", "+hydra.job.env_set.OF_THE_MEMBER=3"]
        (job,) = launcher.plan(tmp_path, [words], 0)
    handlers = logging.getLogger().handlers[:]
    try:
        run(job)
        assert "OF_THE_MEMBER" not in os.environ
        assert result(job.folder)["status"] == "complete"
        (job.folder / "result.json").unlink()
        run(pickle.loads(pickle.dumps(job)))
    finally:
        logging.getLogger().handlers[:] = handlers
    assert result(job.folder)["status"] == "complete"
    assert OmegaConf.load(job.folder / ".hydra" / "hydra.yaml").hydra.runtime.output_dir == str(job.folder)


@pytest.mark.parametrize("name", ["lr_sweep", "model_comparison"])
def test_recipes_carry_their_sweep(name: str, tmp_path: Path) -> None:
    single = compose([f"experiment={name}"])
    config.check(single)
    done = program.call("-m", f"experiment={name}", "sweep.dry_run=true", cwd=tmp_path)
    assert done.status == 0
    rows = [line.split() for line in done.out.splitlines()[1:-2]]
    assert len(rows) == {"lr_sweep": 10, "model_comparison": 8}[name]
    assert len({tuple(row[1:-2]) for row in rows}) == len(rows)
    fewer = program.call("-m", f"experiment={name}", "seed=5", "sweep.dry_run=true", cwd=tmp_path)
    assert len(fewer.out.splitlines()) == len(rows) // 2 + 3


NOT_OF_SLURM = (
    "hydra.launcher.processes is for one machine. With hydra/launcher=slurm write hydra.launcher.slurm.tasks_per_node"
)


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "no numbers": ("seed=range(0,0)", "seed=range(0,0) names no value."),
        "no step": ("seed=range(0,3,0)", "seed=range(0,3,0): range() arg 3 must not be zero."),
        "too many": ("seed=range(0,1000000000)", "seed=range(0,1000000000) names more than 100,000 values."),
        "too many members": ("seed=range(0,999) model.hidden=[7],[8] optimizer.lr=range(1,99)", "195,804 members"),
        "no options": ("model=glob(zzz*)", "model=glob(zzz*) names no value."),
        "interval": ("seed=interval(1,3)", "seed=interval(1,3): an interval is for hydra/sweeper=optuna"),
        "jobs 0": ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0 must be at least 1"),
        "jobs -5": ("hydra.launcher.n_jobs=-5", "hydra.launcher.n_jobs=-5 must be at least 1"),
        "jobs abc": ("hydra.launcher.n_jobs=abc", "hydra.launcher.n_jobs=abc must be a whole number"),
        "jobs 1.5": ("hydra.launcher.n_jobs=1.5", "hydra.launcher.n_jobs=1.5 must be a whole number"),
        "jobs null": ("hydra.launcher.n_jobs=null", "hydra.launcher.n_jobs must not be null"),
        "processes 0": ("hydra.launcher.processes=0", "hydra.launcher.processes=0 must be at least 1."),
        "tasks 0": ("hydra/launcher=slurm hydra.launcher.slurm.tasks_per_node=0",
                    "hydra.launcher.slurm.tasks_per_node=0 must be a whole number, at least 1."),
        "nodes 0": ("hydra/launcher=slurm hydra.launcher.slurm.nodes=0",
                    "hydra.launcher.slurm.nodes=0 must be a whole number, at least 1."),
        "processes of Slurm": ("hydra/launcher=slurm hydra.launcher.processes=2", NOT_OF_SLURM),
        "more processes of Slurm": ("hydra/launcher=slurm +hydra.launcher.processes=2", NOT_OF_SLURM),
        "batch 0": ("hydra.sweeper.max_batch_size=0", "hydra.sweeper.max_batch_size=0 must be at least 1"),
        "batch -5": ("hydra.sweeper.max_batch_size=-5", "hydra.sweeper.max_batch_size=-5 must be at least 1"),
        "batch abc": ("hydra.sweeper.max_batch_size=abc", "hydra.sweeper.max_batch_size=abc must be a whole number"),
        "batch 1.5": ("hydra.sweeper.max_batch_size=1.5", "hydra.sweeper.max_batch_size=1.5 must be a whole number"),
        "params": ("hydra.sweeper.params=abc", "hydra.sweeper.params: Cannot assign str to Dict"),
        "a key of none": ("+hydra.launcher.jobs=2", "There is no key hydra.launcher.jobs. Did you mean"),
        "array": ("hydra/launcher=slurm hydra.launcher.slurm.slurm_array_parallelism=abc",
                  "hydra.launcher.slurm.slurm_array_parallelism=abc must be a whole number"),
        "slurm": ("hydra/launcher=slurm hydra.launcher.slurm=abc", "hydra.launcher.slurm: Cannot assign str"),
    }.values(),
)  # fmt: skip
def test_a_grid_of_nonsense_is_refused_in_words(words: str, message: str, tmp_path: Path) -> None:
    done = program.call("-m", *SMALL, *words.split(), cwd=tmp_path)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert "To append" not in done.err, "Hydra's way is none, for no other key is read"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
@pytest.mark.parametrize("removed", ["", ".hydra"])
def test_a_sweep_in_the_folder_of_a_run_is_refused(removed: str, sweeper: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert program.call(*SMALL, f"hydra.run.dir={root}", cwd=tmp_path).status == 0
    if removed:
        shutil.rmtree(root / removed)
    before = files(root)
    assert any("tfevents" in name for name in before)
    done = program.call("-m", *SMALL, "seed=1,2", f"hydra/sweeper={sweeper}", f"hydra.sweep.dir={root}", cwd=tmp_path)
    assert done.status == 1
    assert f"{root} is the folder of a run" in done.err
    assert "Name another with hydra.sweep.dir=<folder>." in done.err
    assert files(root) == before


def test_event_files_of_others_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    theirs = [root / "events.out.tfevents.1.host.1.0", root / "summary" / "events.out.tfevents.1.host.1.0.v2"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"theirs")
    for seeds in ("1,2", "1,2,3"):
        words = [*SMALL, f"seed={seeds}", f"hydra.sweep.dir={root}"]
        assert program.call("-m", *words, cwd=tmp_path).status == 0
        for path in theirs:
            assert path.read_bytes() == b"theirs"
            (ours,) = set(path.parent.glob("events.out.tfevents.*")) - {path}
            assert ours.name.endswith(".sweep")
    assert program.call(*SMALL, f"hydra.run.dir={root}/summary", cwd=tmp_path).status == 0
    before = files(root / "summary")
    sweep.conclude(root)
    assert files(root / "summary") == before, "a run of that name"


@pytest.mark.parametrize("name", ["multirun.yaml", "config.yaml", "model.pt", "result.json", "sweep.csv", "summary"])
def test_a_full_disk_ends_a_sweep_in_words_and_it_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, atomic_open = tmp_path / "sweep", atomic.atomic_open

    def full(path: Path, keep: Path | None = None) -> AbstractContextManager[BinaryIO]:
        if name in (path.name, path.parent.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return atomic_open(path, keep)

    words = [*SMALL, "seed=1,2", f"hydra.sweep.dir={root}"]
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "atomic_open", full)
        done = program.call("-m", *words, cwd=tmp_path)
    assert done.status == 1
    assert "Traceback" not in done.out + done.err
    assert done.err.startswith("The disk is full ([Errno 28] No space left on device). What the sweep has is safe;")
    assert done.err.rstrip().endswith(f"hydra.sweep.dir={root}")
    assert not list(root.rglob("*.part"))
    assert program.call("-m", *words, cwd=tmp_path).status == 0
    assert [result(path)["status"] for path in members(root)] == ["complete"] * 2


@pytest.mark.parametrize(
    ("programs", "word", "message"),
    [
        ({}, "seed=1", "there is no Slurm here, for sbatch, srun, squeue cannot be found"),
        (
            {"sbatch": "", "srun": "", "squeue": "echo no route >&2; exit 1"},
            "seed=1",
            "Slurm does not answer (no route)",
        ),
        ({"sbatch": "", "srun": "", "squeue": ""}, "+hydra.launcher.slurm.colour=red", "hydra.launcher.slurm: "),
        (
            {"sbatch": "", "srun": "", "squeue": ""},
            "+hydra.launcher.slurm.slurm_use_srun=false hydra.launcher.slurm.nodes=2",
            "hydra.launcher.slurm.slurm_use_srun=false starts one task: leave nodes and tasks at 1.",
        ),
    ],
)
def test_slurm_that_is_not_there_is_said_in_words(
    programs: dict[str, str], word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = (*SMALL, *word.split(), "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}/s")
    done = program.call("-m", *words, cwd=tmp_path)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "s").exists()
