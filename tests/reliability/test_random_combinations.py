"""Combinations of all groups and options, drawn from conf/ and its schemas by a seed: each is killed twice and resumed,
and equals to the bit the run that was not."""

import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from reliability_draws import CACHE, DATA, GROUPS, dealt, draw, keys, options_of, value_of
from reliability_tools import Driver, random_moments
from tools import write_datasets

from fmexp import compose
from fmexp.config.schema import Train
from fmexp.config.validate import check_limits

SEED = os.environ.get("RELIABILITY_SEED", "0")
CHEAP = ("lenet", "mlp", "lenet model._target_=reliability_parts.Noisy")  # models whose runs take a second


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "data"
    write_datasets(root, classes=10)
    return root


def test_every_key_has_values() -> None:
    """Within its limits; a key of which nobody tells its values is named."""
    chosen, drawn = random.Random(0), set()
    groups = {group: options_of(group) for group in GROUPS}
    for number in range(max(map(len, groups.values()))):
        words = [f"{group}={options[number % len(options)].split()[0]}" for group, options in groups.items()]
        cfg = compose(words)
        for _ in range(5):
            for key, node, field in keys(cfg):
                OmegaConf.update(cfg, key, value_of(chosen, key, node, field))
                drawn.add(key)
            check_limits(cfg)
    assert drawn >= {f"train.{field.name}" for field in dataclasses.fields(Train)} - {"train.freeze"}


@dataclasses.dataclass
class Longer(Train):
    mode: str = "slow"


def test_a_key_without_values_is_named() -> None:
    (key, node, field), *_ = [found for found in keys(OmegaConf.create({"train": Longer})) if found[0] == "train.mode"]
    with pytest.raises(
        AssertionError, match=r"values to draw for train.mode, which is .*str.*: give it limits .* a line in DRAWS"
    ):
        value_of(random.Random(0), key, node, field)


def test_three_combinations(driver: Driver, data: Path, tmp_path: Path) -> None:
    assert_exact(driver, data, tmp_path, {number: {"model": CHEAP[number]} for number in range(3)})


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("first", [0, 10])
def test_twenty_combinations(driver: Driver, data: Path, tmp_path: Path, first: int) -> None:
    refused = assert_exact(driver, data, tmp_path, {number: {} for number in range(first, first + 10)})
    assert len(refused) < 20, refused  # or little can be combined, and this tests little


def assert_exact(driver: Driver, data: Path, folder: Path, combinations: dict[int, dict[str, str]]) -> list[str]:
    """Assert it of combinations with some options given; of those that fmexp refuses, others are drawn.

    Returns:
        what was said to those that were refused.
    """
    refused: list[str] = []
    for number, given in combinations.items():
        for tried in range(20):
            place = folder / f"{number}_{tried}"
            chosen = random.Random(f"{SEED} {number} {tried}")
            options = {group: dealt(SEED, group, number) for group in GROUPS} if not tried else {}
            words = complete(driver, data, place / "begin", chosen, draw(chosen, **{**options, **given}))
            print(f"RELIABILITY_SEED={SEED}, combination {number}:", *words)
            truth = place / "truth" / "run"
            truth.parent.mkdir(parents=True)
            ended = driver.run(*words, f"hydra.run.dir={truth}", trace=truth.parent / "trace.txt")
            assert "Traceback" not in ended.output, ended.output
            if ended.code == 0:
                victim = random_moments(driver, truth, place, tuple(words), 2, chosen.randrange(2**32))
                assert victim.kills == 2
                break
            assert not truth.exists(), ended.output
            refused.append(ended.output)
            print(ended.output)
        else:
            raise AssertionError(f"All of these were refused: {refused}")
    return refused


def complete(driver: Driver, data: Path, folder: Path, chosen: random.Random, words: list[str]) -> list[str]:
    """The overrides with what has to be there first: files of the dataset, names of layers, weights to begin from."""
    words = [word.replace(DATA, str(data)).replace(CACHE, str(folder / "cache")) for word in words]
    if chosen.random() < 0.4:
        asked = driver.run(*words, "train.freeze=[no layer of this name]", f"hydra.run.dir={folder}").output
        layers = said[1].split(", ") if (said := re.search(r"Its layers are (.*);", asked)) else []
        frozen = [chosen.choice([*layers[1:], "*.bias", "*.1.*"]) for _ in range(chosen.randint(1, 2))]
        words = [*words, f"train.freeze={json.dumps(frozen)}"]
    if chosen.random() < 0.4:
        begun = driver.run(*words, "train.max_steps=1", f"hydra.run.dir={folder}")
        words = [*words, f"weights={folder}"] if begun.code == 0 else words
    return words
