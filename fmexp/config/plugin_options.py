"""What hydra/launcher and hydra/sweeper can be, as data: `fmexp.sweep.plugins` has the classes.

It is stored here and not in conf/, for Hydra would check YAML files against its own entries of the same names.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from fmexp.config.hydra_versions import store
from fmexp.config.schema import limited
from fmexp.config.validate import check_limits, check_target, in_words, no_key
from fmexp.errors import ConfigError

# Hydra 1.3 instantiates plugins only under the name of this package. 1.4 drops the rule.
PACKAGE = "hydra_plugins.fmexp"


@dataclass
class LocalLauncher:
    _target_: str = f"{PACKAGE}.Launcher"
    # how many members at once, each in a process of its own; 1: in this process; -1: as many as there are cores for
    n_jobs: int = limited(1, least=1, word=-1)
    processes: int = limited(1, least=1)  # how many train each member together, as torchrun does with a single run


SLURM = {
    "timeout_min": 60,  # of one job; a member that needs longer takes several
    "nodes": 1,
    "tasks_per_node": 1,  # nodes * tasks_per_node processes train each member together
    "cpus_per_task": 1,
    "slurm_partition": None,
    "slurm_array_parallelism": 256,
    "slurm_signal_delay_s": 90,  # how long before the end of its time a job is told to save itself
    "slurm_max_num_timeout": 100,  # how often a member may run out of time
}


@dataclass
class SlurmLauncher:
    _target_: str = f"{PACKAGE}.Launcher"
    slurm: dict[str, Any] = field(default_factory=lambda: dict(SLURM))  # arguments of submitit's AutoExecutor


@dataclass
class Grid:
    _target_: str = f"{PACKAGE}.Grid"
    max_batch_size: int | None = limited(None, least=1)  # members that the launcher gets together; null: all
    # what a recipe sweeps, such as {optimizer.lr: "0.1,0.01"}; the command line has precedence
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class Search:
    _target_: str = f"{PACKAGE}.Search"
    _recursive_: bool = False  # a new sampler is made for each trial
    n_trials: int = limited(20, least=1)  # in all, those of earlier commands included
    n_jobs: int | None = limited(None, least=1)  # trials chosen together; null: as many as the launcher runs at once
    seed: int = limited(0, least=0, below=2**32)  # trial n follows from it and from the trials before it
    # any of Optuna's that takes a seed, with its arguments
    sampler: Any = field(default_factory=lambda: {"_target_": "optuna.samplers.TPESampler"})
    # any of Optuna's, with its arguments: after each epoch it may end a trial; then one trial is trained after another
    pruner: Any = field(default_factory=lambda: {"_target_": "optuna.pruners.NopPruner"})
    # what a recipe searches: choices, range and interval of Hydra's grammar; the command line has precedence
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class Halving:
    _target_: str = f"{PACKAGE}.Halving"
    eta: int = limited(3, least=2)  # at each rung the best 1/eta go on, to eta times as many batches
    # batches before the first rung; null: so many that the last rung leaves fewer than eta members
    min_steps: int | None = limited(None, least=1)
    brackets: int = limited(1, least=1)  # of Hyperband; each begins eta times as late as the one before it
    # null: every combination of the values; a number: so many members, drawn by chance from intervals and values
    n_trials: int | None = limited(None, least=1)
    seed: int = limited(0, least=0)  # draw n follows from it and from n alone
    resume_pruned: bool = False  # true: at the end, let those go on to their end that were left behind
    # what a recipe sweeps, such as {optimizer.lr: "tag(log, interval(1e-4, 1e-1))"}; the command line has precedence
    params: dict[str, Any] = field(default_factory=dict)


OPTIONS: dict[str, dict[str, Any]] = {
    "launcher": {"basic": LocalLauncher(), "joblib": LocalLauncher(n_jobs=-1), "slurm": SlurmLauncher()},
    "sweeper": {"basic": Grid(), "optuna": Search(), "halving": Halving()},
}


def checked(group: str, hydra: DictConfig) -> Any:
    """The options of Hydra's launcher or sweeper; ConfigError, naming key and value, for what types let through."""
    node, key = hydra[group], f"hydra.{group}"
    known = [f.name for f in fields(OmegaConf.get_type(node))]  # type: ignore[arg-type]
    with in_words():
        for name in map(str, node):
            if name not in known:
                raise ConfigError(no_key(key, name, OmegaConf.masked_copy(node, known)))
        check_limits(node, key)
        for name, value in (node.get("slurm") or {}).items():
            least = 1 if name in ("nodes", "tasks_per_node") else 0
            if isinstance(SLURM.get(name), int) and (type(value) is not int or value < least):
                raise ConfigError(f"{key}.slurm.{name}={value} must be a whole number, at least {least}.")
        OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    for name in {"sampler", "pruner"} & node.keys():
        check_target(f"{key}.{name}", node[name])
    return node


def register() -> None:
    """Put the options where Hydra looks for them."""
    Plugins.instance()  # stores Hydra's own of the same names first, so that these replace them
    for group, options in OPTIONS.items():
        for name, node in options.items():
            store(f"hydra/{group}", name, node)


register()
