"""The grid: every combination of the values."""

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from fmexp.errors import ConfigError, FmexpError


class Grid(Sweeper):
    """Every combination of the values, as Hydra's own sweeper has it, but for two things: members are composed once
    only, by the launcher, before the first of them begins; and a dry run writes nothing.

    Args:
        max_batch_size: how many members are handed over to the launcher together; None: all.
        params: sweeps of a recipe, such as {"optimizer.lr": "0.1,0.01"}; the command line has precedence.
    """

    def __init__(self, max_batch_size: int | None = None, params: DictConfig | None = None) -> None:
        self.max_batch_size = max_batch_size
        self.params = [f"{key!s}={value}" for key, value in (params or {}).items()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides([*self.params, *arguments])
        members = expand(parsed)
        size = self.max_batch_size or len(members)
        returned: list[Sequence[JobReturn]] = []
        with self.launcher.reporting(len(members)):
            for first in range(0, len(members), size):
                returned.append(self.launcher.launch(members[first : first + size], first))
        jobs = [job for batch in returned for job in batch]
        if without := sum(job.status != JobStatus.COMPLETED for job in jobs):
            raise FmexpError(f"{without} of {len(jobs)} members have no result; the same command goes on with them.")
        return returned


def expand(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each member, the last key varying fastest; of a key that is given twice the last one counts."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigError(f"{override.input_line}: an interval is for hydra/sweeper=optuna; name values: a,b.")
    return [list(member) for member in itertools.product(*values.values())]
