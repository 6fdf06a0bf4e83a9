"""The schemas: which keys a configuration has, of which type and in which range.

Hydra checks names and types against these dataclasses while it composes (command line and YAML alike); `check`
adds the ranges that a type cannot express. Nothing here imports torch, so that `--help` and `--cfg job` are instant.
"""

import difflib
import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fmexp.errors import ConfigError
from fmexp.hydra_versions import VERSION_BASE


class Moment(Enum):
    """When a stage is executed: before training, at each running loss, after each epoch, or at the end."""

    start = "start"
    log = "log"
    epoch = "epoch"
    end = "end"


_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "least": operator.ge,
    "most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


def limited(default: Any, **limits: Any) -> Any:
    """A field whose value has limits: `least` and `most` (inclusive), `above` and `below` (exclusive), `one_of`.

    `word` is what a whole number may be replaced by.
    """
    return field(default=default, metadata=limits)


def listed(*default: Any) -> Any:
    """A field that is a list."""
    return field(default_factory=lambda: list(default))


@dataclass
class Train:
    epochs: int = limited(1, least=1)
    batch_size: int = limited(4, least=1)
    log_every: int = limited(1000, least=1)
    max_steps: int | None = limited(None, least=1)
    num_workers: int = limited(2, least=0)
    compile: Any = limited("auto", one_of=("auto", True, False))
    checkpoint_every: int | None = limited(None, least=1)
    tag: str = "train/loss"


@dataclass
class Backend:
    kernels: str = limited("auto", one_of=("auto", "onednn", "native"))
    threads: Any = limited("auto", word="auto", least=1, most=1024)  # with more, OpenMP ends the process


@dataclass
class Sweep:
    fail_fast: bool = False
    dry_run: bool = False


@dataclass
class Config:
    seed: int = limited(0, least=0, below=2**63)
    device: str = "auto"
    objective: str = "test/accuracy"
    resume: bool = True
    train: Train = field(default_factory=Train)
    backend: Backend = field(default_factory=Backend)
    sweep: Sweep = field(default_factory=Sweep)
    dataset: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    logging: Any = MISSING
    stage: dict[str, Any] = field(default_factory=dict)


# What a key means stands once: in a comment at it in YAML, or else at its field here. docs/reference.py reads both.


@dataclass
class DownloadedDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    root: str = MISSING  # the folder of the files, as torchvision keeps them; FMEXP_DATA changes the default
    download: bool = True  # fetch the files where they are missing; false: say so and stop
    mirrors: list[str] = listed()  # where to fetch them from, tried in this order


@dataclass
class SyntheticDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    train_size: int = limited(12_000, least=1)  # training images
    test_size: int = limited(2_000, least=1)  # test images
    image_size: int = limited(28, least=8)  # height and width, in pixels
    seed: int = limited(0, least=0)  # of what is drawn; the run's own seed does not change it


@dataclass
class Model:
    _target_: str = MISSING  # what makes the model: the import path of a class or function, called with the keys below


@dataclass
class MLP(Model):
    hidden: list[int] = listed(256, 128)  # the width of each hidden layer; []: one linear layer from pixels to classes
    dropout: float = limited(0.0, least=0.0, below=1.0)  # the share of hidden units that each training step leaves out


@dataclass
class Optimizer:
    _target_: str = MISSING  # the import path of the optimizer, called with the model's parameters and the keys below
    lr: float = limited(0.001, least=0.0)  # learning rate: how far a step goes


@dataclass
class SGD(Optimizer):
    momentum: float = limited(0.0, least=0.0)  # the share of the last step that this one keeps
    dampening: float = 0.0  # how much less the gradient counts beside the momentum
    weight_decay: float = limited(0.0, least=0.0)  # pulls weights to zero: this times the weight joins the gradient
    nesterov: bool = False  # take the gradient where momentum will lead; needs momentum above 0 and dampening 0


@dataclass
class Adam(Optimizer):
    # how slowly the running means of the gradient and of its square forget
    betas: tuple[float, float] = limited((0.9, 0.999), least=0.0, below=1.0)
    eps: float = limited(1e-8, least=0.0)  # added to what the step is divided by
    # pulls weights to zero: Adam adds it to the gradient, AdamW takes it from the weights themselves
    weight_decay: float = limited(0.0, least=0.0)
    amsgrad: bool = False  # divide by the largest mean square so far, not by the latest


@dataclass
class RMSprop(Optimizer):
    alpha: float = limited(0.99, least=0.0)  # how slowly the running mean of the squared gradient forgets
    eps: float = limited(1e-8, least=0.0)  # added to what the step is divided by
    weight_decay: float = limited(0.0, least=0.0)  # pulls weights to zero: this times the weight joins the gradient
    momentum: float = limited(0.0, least=0.0)  # the share of the last step that this one keeps
    centered: bool = False  # divide by the gradient's variance, not by its mean square


@dataclass
class Logging:
    _target_: str = MISSING  # the import path of the writer, called with the keys below and the run's folder
    comment: str = ""
    purge_step: int | None = limited(None, least=0)
    max_queue: int = limited(10, least=1)  # records that wait in memory before training waits for the disk
    flush_secs: int = limited(120, least=1)  # seconds between two writes to the disk
    filename_suffix: str = ""  # appended to the names of event files


@dataclass
class Stage:
    _target_: str = MISSING  # the import path of the stage's function, called with the run and the keys below
    enabled: bool = True  # false: leave the stage out
    on: Moment = MISSING  # the moment: before training, at each running loss, after each epoch, at the end
    required: bool = False  # true: a failure ends the run; false: it is logged, and the run goes on


@dataclass
class TaggedStage(Stage):
    tag: str = MISSING  # the name in TensorBoard


@dataclass
class ImageGrid(TaggedStage):
    images: int = limited(4, least=1)  # how many
    layout: str = limited("grid", one_of=("grid", "images"))


@dataclass
class Projector(TaggedStage):
    images: int = limited(100, least=1)  # how many points
    features: str | None = None


@dataclass
class Predictions(TaggedStage):
    images: int = limited(4, least=1)  # how many of the batch, from its first on; no more than train.batch_size


@dataclass
class PRCurves(TaggedStage):
    num_thresholds: int = limited(127, least=2, most=127)
    weights: float | None = limited(None, least=0.0)


SCHEMAS: dict[str, dict[str, type]] = {
    "dataset": {"downloaded": DownloadedDataset, "synthetic": SyntheticDataset},
    "model": {"plain": Model, "mlp": MLP},
    "optimizer": {"plain": Optimizer, "sgd": SGD, "adam": Adam, "rmsprop": RMSprop},
    "logging": {"tensorboard": Logging},
    "stage": {
        "plain": Stage,
        "tagged": TaggedStage,
        "image_grid": ImageGrid,
        "projector": Projector,
        "predictions": Predictions,
        "pr_curves": PRCurves,
    },
}


def register() -> None:
    """Put the schemas where YAML names them: `defaults: [/schema/optimizer/sgd@_here_, _self_]`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=node)


register()


def conf_dir() -> Path:
    """The shipped conf/: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"fmexp's conf/ is neither in {package} nor beside it; install fmexp again")


def compose(
    overrides: list[str] | tuple[str, ...] = (), config_dir: str | os.PathLike[str] | None = None
) -> DictConfig:
    """Compose the configuration that `python -m fmexp <overrides>` would run.

    Args:
        overrides: as on the command line, for example ["optimizer.lr=0.01", "model=mlp"].
        config_dir: a folder with config groups of one's own, as `--config-dir`.
    """
    from fmexp import plugin_options  # noqa: F401  # a recipe may name launchers and sweepers

    own = [f"hydra.searchpath=[{Path(config_dir).resolve().as_uri()}]"] if config_dir is not None else []
    with initialize_config_dir(**VERSION_BASE, config_dir=str(conf_dir()), job_name="fmexp"):
        cfg = hydra_compose("config", overrides=[*overrides, *own])
    _check_keys(cfg)
    return cfg


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, naming key and value, for what Hydra's types let through."""
    _check_keys(cfg)
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


def _check_keys(cfg: DictConfig) -> None:
    for part, names in closed().items():
        node = OmegaConf.select(cfg, part) if part else cfg
        for name in map(str, node):
            key = f"{part}.{name}".lstrip(".")
            if name not in names and not re.search(rf"\$\{{\.*{re.escape(key)}\b", OmegaConf.to_yaml(cfg)):
                raise ConfigError(no_key(part, name, node))


def no_key(part: str, name: str, node: DictConfig) -> str:
    """The message for a key that a part of the configuration, `node`, does not have: what was meant, what there is."""
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
        raise ConfigError(f"{key}={stage} must be a mapping with _target_ and on ({moments}).")
    if True in stage:  # YAML 1.1 reads a bare `on` as true
        raise ConfigError(f'{key}: write "on" in quotes in its YAML file: "on": {stage[True]}.')
    for needed in ("_target_", "on"):
        if OmegaConf.is_missing(stage, needed) or needed not in stage:
            raise ConfigError(f"{key}.{needed} is missing: a stage names its function and its moment ({moments}).")
    if str(getattr(stage.on, "name", stage.on)) not in Moment.__members__:
        raise ConfigError(f"{key}.on={stage.on} must be one of {moments}.")
    for switch in ("enabled", "required"):
        if not isinstance(stage.get(switch, True), bool):
            raise ConfigError(f"{key}.{switch}={stage[switch]} must be true or false.")


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


# Keys that do not change what a run computes or writes, so that a run may be resumed with others.
# The device is not in the digest either: a resume on another one goes on with a warning, for the bits may differ.
NOT_IN_DIGEST = ("resume", "device", "train.num_workers", "train.checkpoint_every", "logging.max_queue",
                 "logging.flush_secs", "dataset.root", "dataset.download", "dataset.mirrors",
    "sweep.fail_fast",
    "sweep.dry_run",
)  # fmt: skip


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists, strings and numbers, every interpolation resolved."""
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            items.update(flat(value, f"{prefix}{name}."))
        else:
            items[f"{prefix}{name}"] = value
    return items


def identity(tree: dict[str, Any]) -> dict[str, Any]:
    """The flat keys of a resolved configuration that decide what a run computes and writes."""
    return {key: value for key, value in sorted(flat(tree).items()) if key not in NOT_IN_DIGEST}


def digest(tree: dict[str, Any]) -> str:
    """SHA-256 of a resolved configuration's identity: equal for two configurations that give the same run."""
    return hashlib.sha256(json.dumps(identity(tree), sort_keys=True).encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two resolved configurations are not the same run, as "key: old value, now new value"."""
    before, after = identity(old), identity(new)
    return [
        f"{key}: {before.get(key, 'not there')}, now {after.get(key, 'not there')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, MISSING) != after.get(key, MISSING)
    ]


def hparams(tree: dict[str, Any]) -> dict[str, bool | float | str]:
    """A run's row in HPARAMS: what was chosen of each group, and the settings of what is trained and how."""
    values = {group: tree[group]["_target_"].rpartition(".")[2] for group in ("dataset", "model", "optimizer")}
    for key, value in flat(tree).items():
        if key.startswith("backend.") and value == "auto":
            continue  # only what was chosen deserves a column
        if key.startswith(_HPARAMS) and not key.endswith("_target_") and key not in NOT_IN_DIGEST and value is not None:
            values[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return values


_HPARAMS = (
    "seed",
    "dataset.",
    "model.",
    "optimizer.",
    "backend.",
    "train.epochs",
    "train.batch_size",
    "train.max_steps",
)
