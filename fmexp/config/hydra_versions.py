"""Where Hydra 1.3 and 1.4 ask for different words, each in one place."""

from typing import Any

import hydra.utils
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

# 1.4 asks which targets a configuration may name. In fmexp that is whatever its user writes, for the configuration is
# the user's own program; a folder that is only read is never instantiated. `fmexp.load` instantiates the model of a run
# that the user trusts, as its docs say.
_UNCHECKED = getattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)

# 1.4 has no behaviours of older versions to choose from.
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if _UNCHECKED is None else {}

MAIN: dict[str, Any] = VERSION_BASE or {"execution_whitelist": _UNCHECKED}  # what hydra.main is told

# OmegaConf 2.4, which comes with Hydra 1.4, calls it register_resolver; 2.3 has that name for something older.
register_resolver: Any = OmegaConf.register_new_resolver if _UNCHECKED is None else OmegaConf.register_resolver


def instantiate(node: Any, **arguments: Any) -> Any:
    """hydra.utils.instantiate, with plain lists and dicts in place of OmegaConf's."""
    if _UNCHECKED is not None:
        arguments["_execution_whitelist_"] = _UNCHECKED
    return hydra.utils.instantiate(node, _convert_="all", **arguments)


def store(group: str, name: str, node: Any) -> None:
    """Store an option, in place of Hydra's own of the same name."""
    replace: dict[str, Any] = {} if _UNCHECKED is None else {"replace": True}
    ConfigStore.instance().store(group=group, name=name, node=node, **replace)
