"""Several processes against one: the same weights in float64 to 1e-12, the same evaluation to the bit."""

import json
from pathlib import Path

import pytest
import torch
from distributed_parts import execute_strictly
from program import environment, finish, start, until
from several import DRAWN, execute_all
from tools import read_events, scalars, weights
from torch import nn
from torch.distributed import TCPStore

from fmexp import compose
from fmexp.build import build
from fmexp.engine import data_parallel
from fmexp.evaluate import evaluate


def double(kind: str) -> list[str]:
    return ["model._target_=distributed_parts.double", f"+model.kind={kind}"]


LENET = [*double("lenet"), "dataset.image_size=28", "optimizer.lr=0.05"]
LOADED = ["dataset._target_=distributed_parts.loaded", "train.num_workers=1", "optimizer.lr=0.05"]
CASES = {
    "lenet": LENET,
    "mlp with dropout": [*double("mlp"), "optimizer=adam", "train.clip_grad=1"],
    "resnet18": [*double("resnet18"), "dataset.train_size=40", "train.batch_size=16"],
    "mixup and weighted loss": [*LENET, "augment=mixup", "loss.label_smoothing=0.1", "loss.class_weights=balanced"],
    "accumulated and averaged": [*LENET, "train.accumulate=3", "train.clip_grad=0.5", "train.ema=0.9",
                                 "train.validation=0.2", "train.epochs=3", "train.patience=2",
                                 "objective=val/accuracy", "schedule=plateau", "train.freeze=[model.conv1]"],
    "loaded and augmented": [*double("mlp"), *LOADED, "augment=crop_flip", "stage.predictions.enabled=true"],
    "branches": [*double("branches"), *LOADED, "stage.predictions.enabled=true", "stage.learning.enabled=true"],
    "changing stage": [*LENET, "+stage.shrink={_target_: distributed_parts.shrink, when: log, tag: a, changes: true}"],
}  # fmt: skip
UNSYNCED = [*double("branches"), "dataset.train_size=64", "train.compile=true", "train.sync_batchnorm=false"]
SHARED = ["dataset.test_size=1740", "train.max_steps=3", "train.sync_batchnorm=false", "train.ema=0.9"]
EVALUATED = {
    "evaluated": ["model=lenet", "dataset.image_size=28", *SHARED[:2]],
    "its own statistics": [*double("branches"), *SHARED, "dataset.train_size=64"],
    "its own buffers": ["model._target_=distributed_parts.Centred", *SHARED],
}


def one_process(overrides: list[str], folder: Path) -> Path:
    execute_strictly([*DRAWN, *overrides], folder)
    return folder


def assert_same_but_for_rounding(ours: Path, theirs: Path, name: str) -> None:
    """All weights to 1e-12, and every point of every scalar as closely as float32 is evaluated."""
    mine, its = weights(ours), weights(theirs)
    assert mine.keys() == its.keys(), name
    for key, tensor in mine.items():
        assert tensor.dtype == its[key].dtype
        torch.testing.assert_close(
            tensor, its[key], rtol=1e-12, atol=1e-12, msg=lambda said, key=key: f"{name} {key}: {said}"
        )
    found, expected = read_events(ours), read_events(theirs)
    tags = expected.Tags()["scalars"]
    assert found.Tags()["scalars"] == tags, name
    assert found.Tags()["images"] == expected.Tags()["images"], name
    for tag in set(tags) - {"wall_seconds"}:
        points, its_points = scalars(found, tag), scalars(expected, tag)
        assert [step for step, _ in points] == [step for step, _ in its_points], (name, tag)
        assert [value for _, value in points] == pytest.approx([v for _, v in its_points], rel=1e-5, abs=1e-7), (
            name,
            tag,
        )


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    ended = execute_all({**CASES, **EVALUATED, "not one": UNSYNCED, "one": UNSYNCED[:-1]}, tmp_path)
    assert ended.status == 0, ended.err
    for name, overrides in CASES.items():
        assert_same_but_for_rounding(tmp_path / name, one_process(overrides, tmp_path / f"{name}, alone"), name)
    trained = weights(tmp_path / "lenet")
    begun = build(compose([*DRAWN, *LENET])).model.state_dict()
    assert all((begun[name] - value).abs().max() > 1e-4 for name, value in trained.items())
    assert any((weights(tmp_path / "one")[k] - v).abs().max() > 1e-6 for k, v in weights(tmp_path / "not one").items())
    for name in EVALUATED:
        said = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        _, here = evaluate(tmp_path / name, [])
        assert {tag: said[tag] for tag in here} == here, name
        assert len(here) > 8


def test_processes_of_several_machines_compute_the_bits_of_those_of_one(tmp_path: Path) -> None:
    for name, environ in (("one", {}), ("several", {"APART": "1"})):
        ended = execute_all({name: CASES["branches"]}, tmp_path, **environ)
        assert ended.status == 0, ended.err
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert all(torch.equal(several[name], value) for name, value in one.items())


def test_three_processes_whose_parts_are_uneven(tmp_path: Path) -> None:
    """Of eight images they have three, three and two; of the last batch's one, two processes have none."""
    cases = {name: CASES[name] for name in ("mlp with dropout", "branches", "loaded and augmented")}
    cases["branches"] = [*cases["branches"], "dataset.train_size=66"]
    noisy = [*double("mlp"), *LOADED, "+dataset.noisy=true"]
    for processes, some in ((3, {**cases, "three": noisy}), (2, {"two": noisy})):
        ended = execute_all(some, tmp_path, processes)
        assert ended.status == 0, ended.err
    for name, overrides in cases.items():
        assert_same_but_for_rounding(tmp_path / name, one_process(overrides, tmp_path / f"{name}, alone"), name)
    assert_same_but_for_rounding(tmp_path / "three", tmp_path / "two", "random numbers of a map-style dataset")


def test_a_first_process_that_goes_before_the_run_begins_is_told_of_in_words(tmp_path: Path) -> None:
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    before, port = stores[0].num_keys(), stores[0].port
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    follower = start(cwd=tmp_path, env=environment(**where))
    until(lambda: stores[0].num_keys() > before, "the other process")
    stores.clear()
    ended = finish(follower)
    assert ended.status == 1
    assert "The first process of this run cannot be reached: " in ended.err
    assert "Traceback" not in ended.err


def test_buffers_of_what_is_no_plain_batchnorm_are_shared() -> None:
    class Ghost(nn.BatchNorm2d):
        """Of its own statistics."""

    model = nn.Sequential(nn.BatchNorm2d(2), Ghost(2))
    names = ["running_mean", "running_var", "num_batches_tracked"]
    assert data_parallel._own_buffers(model, True) == [(model[1], name) for name in names]
    assert len(data_parallel._own_buffers(model, False)) == 6
