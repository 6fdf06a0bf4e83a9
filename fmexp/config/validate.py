"""Checks what a type cannot express: ranges, targets, stages, keys that nothing reads."""

import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fmexp.config.identity import GROUPS, OWN, flat
from fmexp.config.location import conf_dir
from fmexp.config.objective import MORE_IS_BETTER
from fmexp.config.schema import Config, Moment
from fmexp.errors import ConfigError, did_you_mean, is_utf8, similar

_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "least": operator.ge,
    "most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, naming key and value, for what Hydra's types let through."""
    check_keys(cfg)
    with in_words():
        for group in (*GROUPS, "logging"):
            check_target(group, cfg[group])
        _check_own_keys(cfg.dataset)
        for key, value, _ in _limited_values(cfg, ""):
            for one in value if OmegaConf.is_config(value) else [value]:
                if isinstance(one, str) and (problem := no_text(one)):
                    raise ConfigError(f"{key}={one} {problem}. Name another.")
        for name, stage in cfg.stage.items():
            _check_stage(f"stage.{name}", stage)
        if cfg.train.precision in ("fp16", 16):
            raise ConfigError(
                f"train.precision={cfg.train.precision} is not supported: the small range of fp16 needs a GPU and "
                "gradient scaling. Take train.precision=bf16, which has the range of 32 bits."
            )
        check_limits(cfg)
        check_device(cfg.device)
        _check_tags(cfg)
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@contextmanager
def in_words() -> Iterator[None]:
    """Raise ConfigError for what OmegaConf finds wrong within the block."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{error.full_key}=??? is left open: give it a value in its YAML file, or with {error.full_key}=<value>."
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(wrong_value(error)) from error


def without_hydra(cfg: DictConfig) -> DictConfig:
    """What a run is made of: the configuration as Hydra composes it, but for Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])


def output_folder(cfg: DictConfig, key: str) -> Path:
    """The absolute path that hydra.run.dir or hydra.sweep.dir names.

    Raises:
        ConfigError: no folder has such a name, or Hydra's other keys ask for what fmexp does itself.
    """
    hydra, name = cfg.hydra, OmegaConf.select(cfg, key)
    path = os.path.abspath(str(name))
    if name is None:
        raise ConfigError(f"{key} is left open: give it a folder with {key}=<folder>.")
    if problem := no_text(path):
        raise ConfigError(f"{key}: the folder {path} {problem}. Name another one.")
    if hydra.output_subdir is not None:
        raise ConfigError(f"hydra.output_subdir={hydra.output_subdir} must be null: fmexp writes .hydra/ itself.")
    if hydra.job.chdir:
        raise ConfigError("hydra.job.chdir must be false: fmexp stays where it is called, as a sweep does.")
    return Path(path)


def no_text(value: str) -> str | None:
    """Why a string cannot be a value, or None: TensorBoard and YAML need UTF-8, which the name of a file may not be."""
    if "${" in value:
        return "holds ${, which is taken for a key"
    return None if is_utf8(value) else "is not UTF-8"


def check_limits(node: DictConfig, key: str = "") -> None:
    """Raise ConfigError where a value of a part of the configuration, `key`, is outside of its schema's limits."""
    for name, value, limits in _limited_values(node, f"{key}." if key else ""):
        if problem := _outside(value, limits):
            said = str(value) if len(str(value)) <= 200 else f"{str(value)[:200]}..."
            raise ConfigError(f"{name}={said} {problem}.")


def closed(schema: type = Config, key: str = "") -> dict[str, list[str]]:
    """The parts of a configuration that have the keys of their schema and no others, with these: the root is "".

    Hydra adds whatever is written with a plus. In these parts nothing would read it.
    """
    parts = {key: [f.name for f in fields(schema)]}
    for f in fields(schema):
        if isinstance(f.type, type) and is_dataclass(f.type):
            parts.update(closed(f.type, f"{key}.{f.name}".lstrip(".")))
    return parts


def check_keys(cfg: DictConfig) -> None:
    """Raise ConfigError for a key that nothing reads, where the keys are fixed."""
    for part, names in closed().items():
        node = OmegaConf.select(cfg, part) if part else cfg
        if gone := [f"{part}.{name}".lstrip(".") for name in names if name not in node]:
            raise ConfigError(f"{gone[0]} is missing: only a key that was added can be removed with ~.")
        for name in map(str, node):
            key = f"{part}.{name}".lstrip(".")
            if name not in names and not re.search(rf"\$\{{\.*{re.escape(key)}\b", OmegaConf.to_yaml(cfg)):
                raise ConfigError(no_key(part, name, node))


def no_key(part: str, name: str, node: DictConfig) -> str:
    """The message for a key that a part of the configuration, `node`, does not have: what was meant, what there is."""
    if part.startswith("stage.") and name in ("on", "True"):
        return _renamed(part)
    if (part, name) == ("hydra.launcher", "processes"):
        return (
            "hydra.launcher.processes is for one machine. With hydra/launcher=slurm write "
            "hydra.launcher.slurm.tasks_per_node, and hydra.launcher.slurm.nodes for several machines."
        )
    names = closed().get(part) or [str(other) for other in node if other not in ("_target_", "_recursive_", "hydra")]
    groups = [other for other in names if not part and (conf_dir() / other).is_dir()]
    groups += [] if part else ["experiment"]  # of which nothing remains in the configuration
    below = flat(OmegaConf.to_container(node, throw_on_missing=False))  # type: ignore[arg-type]
    same = [key for key in below if key.rpartition(".")[2] == name != key and not key.startswith("hydra.")]
    prefix = f"{part}." if part else ""
    meant = did_you_mean(prefix + other for other in same or similar(name, [*names, *groups]))
    if part:
        return f"There is no key {prefix}{name}.{meant}\n{part} has {', '.join(names) or 'no keys'}."
    others = ", ".join(other for other in names if other not in groups)
    return f"There is no key and no group {name}.{meant}\nThe groups are {', '.join(groups)}; the keys are {others}."


def wrong_value(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value, with its key, in a line."""
    said = str(error).splitlines()[0]
    if "is not a ListConfig" in said:
        return f"{error.full_key} must be a list: write {error.full_key}=[one,two]."
    if found := re.search(r"field '(.*)' is not Optional", said):
        return f"{found[1]} must not be null."
    if not (found := re.search(r"Value '(.*)' of type '\w+' could not be converted to Integer", said)):
        return f"{error.full_key}: {said}" if error.full_key else said
    try:
        number = math.ceil(float(found[1]))
        write = f": write {error.full_key}={number}" if number == float(found[1]) else f", such as {number}"
    except (ValueError, OverflowError):  # no number, nan or inf
        write = ", such as 1"
    return f"{error.full_key}={found[1]} must be a whole number{write}."


def check_target(key: str, node: Any) -> None:
    """Raise ConfigError where a part of the configuration does not say what is to be called."""
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}={node} must be a mapping with _target_: the import path of what is to be called.")


def check_device(name: str) -> None:
    """Raise ConfigError for what is no name of a device, whether there is one or not."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"device={name} must be auto, cpu, mps, cuda or cuda:<number>.")


def _check_own_keys(dataset: DictConfig) -> None:
    names = dataset.get(OWN)
    if names is not None and not (OmegaConf.is_list(names) and all(name in dataset for name in names)):
        raise ConfigError(f"dataset.{OWN}={names} must be a list of keys of dataset: {', '.join(map(str, dataset))}.")


def _check_tags(cfg: DictConfig) -> None:
    train, splits = cfg.train, ("test", "val") if cfg.train.validation else ("test",)
    written = [*(f"{split}/{name}" for split in splits for name in MORE_IS_BETTER), "train/accuracy"]
    if not train.validation and str(cfg.objective).startswith("val/"):
        raise ConfigError(
            f"objective={cfg.objective} is of the validation split, and train.validation={train.validation:g} holds "
            f"none out. Take a share, such as train.validation=0.1, or objective=test/{cfg.objective[len('val/') :]}."
        )
    if train.patience is not None and str(cfg.objective).startswith("test/"):
        raise ConfigError(
            f"train.patience={train.patience} would end training by objective={cfg.objective}, and so choose by the "
            "test split. Take objective=val/accuracy with train.validation=0.1."
        )
    if cfg.objective not in (*written, train.tag):
        raise ConfigError(f"objective={cfg.objective} must be one of {', '.join((*written, train.tag))}.")
    taken = {tag: tag for tag in (*written, "train/lr", "train/grad_norm", "wall_seconds", "config", "lineage")}
    taken |= {stage.tag: f"stage.{name}.tag" for name, stage in cfg.stage.items() if stage.get("tag")}
    if cfg.train.tag in taken:
        raise ConfigError(f"train.tag={cfg.train.tag} is taken by {taken[cfg.train.tag]}. Name another.")


def _check_stage(key: str, stage: Any) -> None:
    moments = ", ".join(moment.name for moment in Moment)
    if not isinstance(stage, DictConfig):
        raise ConfigError(f"{key}={stage} must be a mapping with _target_ and when ({moments}).")
    if "on" in stage or True in stage:
        raise ConfigError(_renamed(key))
    for needed in ("_target_", "when"):
        if OmegaConf.is_missing(stage, needed) or needed not in stage:
            raise ConfigError(f"{key}.{needed} is missing: a stage names its function and its moment ({moments}).")
    if str(getattr(stage.when, "name", stage.when)) not in Moment.__members__:
        raise ConfigError(f"{key}.when={stage.when} must be one of {moments}.")
    for switch in ("enabled", "required", "changes"):
        if not isinstance(stage.get(switch, True), bool):
            raise ConfigError(f"{key}.{switch}={stage[switch]} must be true or false.")


def _renamed(stage: str) -> str:
    return f"{stage}.on is {stage}.when now, for YAML reads a bare on as true: {', '.join(Moment.__members__)}."


def _limited_values(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    schema = OmegaConf.get_type(node) if prefix else Config  # a copy without Hydra's part may have lost its type
    limits = {f.name: dict(f.metadata) for f in fields(schema)} if is_dataclass(schema) else {}
    for name in node:
        if OmegaConf.is_missing(node, name):
            continue
        value, key, limit = node[name], f"{prefix}{name!s}", limits.get(str(name), {})
        if isinstance(value, DictConfig) and not limit:
            yield from _limited_values(value, f"{key}.")
        elif value is not None:
            yield key, value, limit


def _outside(value: Any, limits: dict[str, Any]) -> str | None:
    """What is wrong with a value (or with one in a list), or None."""
    kinds, values = limits.get("one_of", ()), value if "each" in limits else [value]
    if kinds and not all(any(type(each) is type(one) and each == one for one in kinds) for each in values):
        return f"must be one of {', '.join(str(one).lower() for one in kinds)}"
    if "word" in limits and (value == limits["word"] or type(value) is not int):
        return None if value == limits["word"] else f"must be {limits['word']} or a whole number"
    if "longest" in limits and not all(isinstance(one, str) and len(one) <= limits["longest"] for one in values):
        return f"must be text of at most {limits['longest']:,} letters"
    if "length" in limits and len(value) != limits["length"]:
        return f"must be {limits['length']} numbers"
    for one in value if OmegaConf.is_config(value) else [value]:  # a list, or a tuple, which 1.4 has of its own
        if isinstance(one, float) and not math.isfinite(one):
            return "must be a finite number"
        if isinstance(one, int) and not -(2**63) <= one < 2**63:
            return "must be a number of 64 bits, which end at 2**63"
        for word, holds in _LIMITS.items():
            if word in limits and not holds(one, limits[word]):
                return f"must be {'at ' if word in ('least', 'most') else ''}{word} {limits[word]}"
    return None
