"""Which configurations are the same run."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fmexp
from fmexp import config
from fmexp.datasets import Dataset, synthetic
from fmexp.errors import ConfigError

OWN = "my.data"
FASHION = "fmexp.datasets.fashion_mnist"


def tree(target: str, **keys: Any) -> dict[str, Any]:
    return {"seed": 0, "dataset": {"_target_": target, **keys}}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two configurations are one run, for which digest and difference must agree."""
    equal = config.digest(first) == config.digest(second)
    assert equal == (config.difference(first, second) == [])
    return equal


@pytest.mark.parametrize(
    ("first", "second", "one_run"),
    [
        (tree(FASHION, root="a", mirrors=[]), tree(FASHION, root="b", mirrors=["c"]), True),
        (tree("fmexp.datasets.arrays.arrays", root="a"), tree("fmexp.datasets.arrays.arrays", root="b"), False),
        (tree(OWN, root="a"), tree(OWN, root="b"), False),
        (tree(OWN, root="a", mirrors=[]), tree(OWN, root="b", mirrors=[]), False),
        (tree(OWN, cache="a", download=True), tree(OWN, cache="a", download=False), False),
        (tree(OWN, root="a", not_in_digest=["root"]), tree(OWN, root="b", not_in_digest=["root"]), True),
        (tree(OWN, root="a", side=1, not_in_digest=["root"]), tree(OWN, root="a", side=2, not_in_digest=[]), False),
        (tree(OWN, x=1), tree(OWN, x=True), False),
        (tree(OWN, x=[1]), tree(OWN, x=[True]), False),
        (tree(OWN, x=[math.nan]), tree(OWN, x=[float("nan")]), True),
        (tree(OWN, x=math.nan), tree(OWN, x=float("nan")), True),
        ({"a.b": 1}, {"a": {"b": 1}}, False),
        ({"a\\": {"b": 1}}, {"a\\.b": 1}, False),
        ({}, {"a": None}, False),
    ],
)
def test_what_is_one_run(first: dict[str, Any], second: dict[str, Any], one_run: bool) -> None:
    assert same(first, second) is one_run


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 1)
    | st.sampled_from([1.0, math.nan, math.inf])
    | st.sampled_from(["", "1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "a.b", ".", "\\"]), inner),
    max_leaves=4,
)


@example({"a": []}, {"a": {}})
@given(st.dictionaries(st.sampled_from("ab"), TREES), st.dictionaries(st.sampled_from("ab"), TREES))
def test_digest_and_difference_agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert same(first, second) is (repr(_sorted(first)) == repr(_sorted(second)))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return dict, sorted((key, _sorted(inner)) for key, inner in value.items())  # {} is not []
    return [_sorted(inner) for inner in value] if isinstance(value, list) else value


def test_the_digest_of_an_ordinary_run_is_as_it_was() -> None:
    """Runs that were begun before own keys, NaN and dots were told apart go on."""
    ordinary = {
        "seed": 0,
        "device": "cpu",
        "dataset": {"_target_": "fmexp.datasets.mnist", "root": "data", "download": True, "mirrors": []},
        "train": {"epochs": 1, "num_workers": 2},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999]},
        "stage": {},
        "model": {"sizes": {1: 2.0}},
    }
    assert config.digest(ordinary) == "9ebdce330198e97605868f54a13f6529821219317301686ca11d3f961f85d1bd"


def rooted(root: str, seed: int) -> Dataset:
    return synthetic(64, 40, 16, seed)


def test_another_root_of_own_data_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "own.yaml").write_text("_target_: test_identity.rooted\nroot: a\nseed: 0\n")

    def cfg(*words: str) -> Any:
        given = ["dataset=own", "device=cpu", "logging=light", "model=mlp", "train.max_steps=2", *words]
        return fmexp.compose(given, config_dir=tmp_path)

    fmexp.execute(cfg(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"dataset\.root: a, now b"):
        fmexp.execute(cfg("dataset.root=b"), tmp_path / "run")
    free = "+dataset.not_in_digest=[root]"
    fmexp.execute(cfg(free), tmp_path / "free")
    assert fmexp.execute(cfg(free, "dataset.root=b"), tmp_path / "free") >= 0  # complete already
    for wrong in ("root", "[rot]", "3"):
        with pytest.raises(ConfigError, match="must be a list of keys of dataset: _target_, root, seed"):
            fmexp.execute(cfg(f"+dataset.not_in_digest={wrong}"), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
