"""Checks what a type cannot express: ranges, targets, stages, keys that nothing reads."""

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fmexp.config.identity import flat
from fmexp.config.location import conf_dir
from fmexp.config.schema import Config, Moment
from fmexp.errors import ConfigError

_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "least": operator.ge,
    "most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, naming key and value, for what Hydra's types let through."""
    check_keys(cfg)
    try:
        for group in ("dataset", "model", "optimizer", "logging"):
            _check_target(group, cfg[group])
        for name, stage in cfg.stage.items():
            _check_stage(f"stage.{name}", stage)
        for key, value, limits in _limited_values(cfg, ""):
            if problem := _outside(value, limits):
                raise ConfigError(f"{key}={value} {problem}.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg.device):
            raise ConfigError(f"device={cfg.device} must be auto, cpu, mps, cuda or cuda:<number>.")
        _check_objective(cfg)
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{error.full_key}=??? is left open: give it a value in its YAML file, or with {error.full_key}=<value>."
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(wrong_value(error)) from error


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
        for name in map(str, node):
            key = f"{part}.{name}".lstrip(".")
            if name not in names and not re.search(rf"\$\{{\.*{re.escape(key)}\b", OmegaConf.to_yaml(cfg)):
                raise ConfigError(no_key(part, name, node))


def no_key(part: str, name: str, node: DictConfig) -> str:
    """The message for a key that a part of the configuration, `node`, does not have: what was meant, what there is."""
    if part.startswith("stage.") and name in ("on", "True"):
        return _renamed(part)
    names = closed().get(part) or [str(other) for other in node if other not in ("_target_", "hydra")]
    groups = [other for other in names if not part and (conf_dir() / other).is_dir()]
    groups += [] if part else ["experiment"]  # of which nothing remains in the configuration
    below = flat(OmegaConf.to_container(node, throw_on_missing=False))  # type: ignore[arg-type]
    same = [key for key in below if key.rpartition(".")[2] == name != key and not key.startswith("hydra.")]
    prefix = f"{part}." if part else ""
    close = [prefix + other for other in same or difflib.get_close_matches(name, [*names, *groups], n=3)]
    meant = f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
    if part:
        return f"There is no key {prefix}{name}.{meant}\n{part} has {', '.join(names) or 'no keys'}."
    others = ", ".join(other for other in names if other not in groups)
    return f"There is no key and no group {name}.{meant}\nThe groups are {', '.join(groups)}; the keys are {others}."


def wrong_value(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value, with its key, in a line."""
    said = str(error).splitlines()[0]
    if not (found := re.search(r"Value '(.*)' of type '\w+' could not be converted to Integer", said)):
        return f"{error.full_key}: {said}" if error.full_key else said
    try:
        number = math.ceil(float(found[1]))
        write = f": write {error.full_key}={number}" if number == float(found[1]) else f", such as {number}"
    except (ValueError, OverflowError):  # no number, nan or inf
        write = ", such as 1"
    return f"{error.full_key}={found[1]} must be a whole number{write}."


def _check_target(key: str, node: Any) -> None:
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}={node} must be a mapping with _target_: the import path of what is to be called.")


def _check_objective(cfg: DictConfig) -> None:
    metrics = ("test/accuracy", "test/loss", cfg.train.tag)
    if cfg.objective not in metrics:
        raise ConfigError(f"objective={cfg.objective} must be one of {', '.join(metrics)}.")


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
    for one in value if OmegaConf.is_list(value) else [value]:
        if isinstance(one, float) and not math.isfinite(one):
            return "must be a finite number"
        if "one_of" in limits and one not in limits["one_of"]:
            return f"must be one of {', '.join(str(one).lower() for one in limits['one_of'])}"
        if "word" in limits and type(one) is not int:
            return None if one == limits["word"] else f"must be {limits['word']} or a whole number"
        for word, holds in _LIMITS.items():
            if word in limits and not holds(one, limits[word]):
                return f"must be {'at ' if word in ('least', 'most') else ''}{word} {limits[word]}"
    return None
