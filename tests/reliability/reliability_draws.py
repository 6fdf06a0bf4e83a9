"""Draws configurations: an option of each group of conf/, and values for the keys that it has, from their schema.

Nothing is listed here that conf/ and the schemas tell, so that what is new in them is drawn by being there. What they
cannot tell is in DRAWS and STAYS; a key of which nobody tells its values is an error that says so.
"""

import enum
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args, get_origin

import torch
from omegaconf import DictConfig, OmegaConf

from fmexp import compose
from fmexp.config import conf_dir
from fmexp.config.identity import GROUPS

# Beside the options of conf/: random numbers in a map-style split, recurrent layers, a scheduler in an optimizer, and
# {optimizer}, any of torch's. It may be one that fmexp refuses.
OWN = {
    "dataset": ["synthetic dataset._target_=reliability_parts.augmented"],
    "model": ["lenet model._target_=reliability_parts.Noisy", "lenet model._target_=reliability_parts.LSTM"],
    "optimizer": ["custom optimizer._target_=reliability_parts.Scheduled",
                  "custom optimizer._target_=torch.optim.{optimizer}"],
}  # fmt: skip
OPTIMIZERS = [
    name for name, made in sorted(vars(torch.optim).items()) if isinstance(made, type) and name != "Optimizer"
]
SMALL = {  # of the about thousand models of these two
    "fmexp.models.torchvision": ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"),
    "fmexp.models.timm": ("test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_nfnet"),
}

DATA, CACHE = "<data>", "<cache>"  # to be replaced by folders

Draw = Callable[[random.Random, DictConfig], Any]  # given the part of the configuration that the key is in


def one_of(*values: Any) -> Draw:
    return lambda chosen, _: chosen.choice(values)


def between(least: int, most: int) -> Draw:
    return lambda chosen, _: chosen.randint(least, most)


# Drawn each time, and in this way: what makes a run of some tens of batches, with several checkpoints, evaluations and
# points of the running loss; and what the schema has no limits for.
DRAWS: dict[str, Draw] = {
    "train.epochs": between(1, 3),
    "train.batch_size": between(3, 8),
    "train.log_every": between(2, 9),
    "train.max_steps": one_of(None, None, 11, 23),
    "train.checkpoint_every": between(1, 7),
    "train.accumulate": one_of(1, 1, 2, 3),
    "train.num_workers": between(0, 2),
    "train.compile": one_of("auto", False),  # true takes up to a minute a process: test_exact_resume.py has it
    "train.tag": one_of("train/loss", "own/tag"),
    "train.validation": one_of(0.0, 0.2, 0.4),
    "objective": one_of("{split}/accuracy", "{split}/loss", "{split}/f1", "${train.tag}"),
    "device": one_of("cpu"),
    "backend.threads": one_of("auto", 1),  # with two a batch takes seconds where the cores are busy
    "dataset.root": lambda _, node: f"{DATA}/{node._target_.rpartition('.')[2]}" if "root" not in node else DATA,
    "dataset.cache_dir": one_of(CACHE),
    "dataset.train_size": between(48, 66),
    "dataset.test_size": between(20, 40),
    "dataset.image_size": one_of(16, 28),
    "dataset.resize": one_of(None, 30),
    "dataset.download": one_of(False),
    "augment.order": lambda chosen, node: chosen.sample([*node.steps], chosen.randint(1, 3)),
    "model.name": lambda chosen, node: chosen.choice(SMALL[node._target_]),
    "model.pretrained": one_of(False),
    "model.hidden": lambda chosen, _: [chosen.randint(4, 40) for _ in range(chosen.randint(0, 3))],
    "loss.class_weights": lambda chosen, _: chosen.choice((None, "balanced", [chosen.random() for _ in range(10)])),
    "stage.image_grid.images": between(1, 6),
    "stage.predictions.images": between(1, 3),
    "stage.projector.images": between(2, 12),
}  # fmt: skip
# Left as YAML has it: what the test gives itself, for it has to ask the model (train.freeze) or to make files first;
# what no run has, but a sweep; names; and whether a failure ends a run, for here it is one of the test.
STAYS = ("train.freeze", "weights", "tags", "note", "dataset.mirrors", "dataset.classes", "resume",
         "sweep.*", "logging.comment", "logging.filename_suffix", "logging.purge_step", "stage.*.tag",
         "stage.*.required", "stage.*.changes", "stage.projector.features", "*._target_")  # fmt: skip


def draw(chosen: random.Random, **options: str) -> list[str]:
    """The overrides of a combination in which some groups have these options."""
    words = []
    for group in (*GROUPS, "logging"):
        option = options.get(group) or chosen.choice(options_of(group))
        words += f"{group}={option.format(optimizer=chosen.choice(OPTIMIZERS))}".split()
    for key, node, field in keys(compose(words)):
        if key in DRAWS or chosen.random() < 0.5:
            words.append(f"{key}={typed(value_of(chosen, key, node, field))}")
    if (
        "train.validation=0.0" in words
    ):  # then the test split is evaluated after each epoch, and none may end early by it
        return [word.replace("{split}", "test") for word in words if not word.startswith("train.patience=")]
    return [word.replace("{split}", "val") for word in words]


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) + OWN.get(group, [])


def dealt(seed: object, group: str, number: int) -> str:
    """An option such that each one of a group comes once before any comes again, as `number` rises."""
    options = options_of(group)
    times, place = divmod(number, len(options))
    random.Random(f"{seed} {group} {times}").shuffle(options)
    return options[place]


def keys(cfg: DictConfig, part: str = "") -> Iterator[tuple[str, DictConfig, "Field[Any]"]]:
    """The keys whose values are drawn, each with the part of the configuration that it is in and its field there."""
    node = OmegaConf.select(cfg, part) if part else cfg
    schema = OmegaConf.get_type(node)
    known = {field.name: field for field in fields(schema)} if is_dataclass(schema) else {}
    for name in map(str, node):
        key = f"{part}.{name}".lstrip(".")
        if any(fnmatchcase(key, pattern) for pattern in STAYS):
            continue
        if OmegaConf.is_dict(node._get_node(name)):
            yield from keys(cfg, key)
        elif name in known:
            yield key, node, known[name]


def value_of(chosen: random.Random, key: str, node: DictConfig, field: "Field[Any]") -> Any:
    """A value of a key: from DRAWS, or any that its schema allows."""
    if key in DRAWS:
        return DRAWS[key](chosen, node)
    limits, kinds = field.metadata, get_args(field.type) if type(None) in get_args(field.type) else (field.type,)
    kind = next(one for one in kinds if one is not type(None))
    if len(kinds) > 1 and chosen.random() < 0.5:
        return None
    if values := limits.get("one_of"):
        return [one for one in values if chosen.random() < 0.5] if "each" in limits else chosen.choice(values)
    if "word" in limits:
        return limits["word"] if chosen.random() < 0.5 else number(chosen, int, 1, limits)
    if kind is bool:
        return chosen.random() < 0.5
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return chosen.choice([*kind]).name
    given = None if OmegaConf.is_missing(node, field.name) else node[field.name]
    if kind in (int, float):
        return number(chosen, kind, given, limits)
    if get_origin(kind) in (list, tuple) and get_args(kind)[0] in (int, float):  # rising, as ranges and milestones do
        return sorted(number(chosen, get_args(kind)[0], one, limits) for one in given or ())
    raise AssertionError(
        f"There are no values to draw for {key}, which is {field.type}: give it limits that tell them (one_of, least, "
        "most ...) in fmexp/config/schema.py, or where none can, a line in DRAWS or STAYS of reliability_draws.py."
    )


def number(chosen: random.Random, kind: type, given: float | None, limits: Any) -> Any:
    """Any within the limits, where there are two; else one of the size of that which YAML has."""
    low, high = limits.get("least", limits.get("above")), limits.get("most", limits.get("below"))
    if kind is float and low is not None and high is not None:
        return chosen.uniform(low, high)
    if kind is float:
        return given * 10 ** chosen.uniform(-1, 1) if given else chosen.random() or 0.5
    low, high = low or 0, min(max(2 * (given or 0), 8), high or math.inf)
    return low + int((high - low) * chosen.random() ** 2)  # mostly small ones: large numbers take long


def typed(value: Any) -> str:
    """A value as it is written on a command line."""
    return json.dumps(value) if isinstance(value, list | bool | None) else str(value)
