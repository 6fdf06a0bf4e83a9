"""The grid: every combination of the values. And what it shares with a search."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from fmexp.config.plugin_options import checked
from fmexp.errors import ConfigError, FmexpError

MOST = 100_000  # members; a slip such as range(0,1000000000) would fill the memory before anything is said


class Parsing(Sweeper):
    """A sweeper that knows its options, and reads the words of its command line and of its recipe."""

    def __init__(self, **options: Any) -> None:
        """Take what Hydra gives; `setup` has it, too, with its types."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.cfg, self.options = config, checked("sweeper", config.hydra)
        self.parser = OverridesParser.create(config_loader=hydra_context.config_loader)
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides of the sweep, those of its recipe first, for the command line has precedence."""
        parsed: list[Override] = self.parser.parse_overrides(
            [*(f"{key!s}={value}" for key, value in self.options.params.items()), *arguments]
        )
        return parsed


class Grid(Parsing):
    """Every combination of the values, as Hydra's own sweeper has it, but for two things: members are composed once
    only, by the launcher, before the first of them begins; and a dry run writes nothing."""

    def sweep(self, arguments: list[str]) -> Any:
        members = expand(self.parse(arguments))
        size = self.options.max_batch_size or len(members)
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
            values[key] = [f"{key}={value}" for value in choices(override)]
        else:
            raise ConfigError(f"{override.input_line}: an interval is for hydra/sweeper=optuna; name values: a,b.")
    if (count := math.prod(map(len, values.values()))) > MOST:
        raise ConfigError(f"These are {count:,} members, and {MOST:,} is the most: name fewer values.")
    return [list(member) for member in itertools.product(*values.values())]


def choices(override: Override) -> list[str]:
    """The values that a word such as a,b or range(1,4) or glob(*) names.

    Raises:
        ConfigError: there are none, or too many.
    """
    try:
        found = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
    except ValueError as error:  # of Python's range
        raise ConfigError(f"{override.input_line}: {error}.") from error
    if not 0 < len(found) <= MOST:
        said = f"names more than {MOST:,} values" if found else "names no value"
        raise ConfigError(f"{override.input_line} {said}. A sweep has values such as a,b or range(1,4).")
    return found
