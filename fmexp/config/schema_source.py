"""How Hydra finds the schemas: `defaults: [/schema/optimizer/sgd@_here_, _self_]`."""

import builtins
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from fmexp.config.location import conf_dir
from fmexp.config.options import SCHEMAS
from fmexp.config.schema import Config


def _stages() -> dict[str, Any]:
    """All files of conf/stage together, each with the schema of its name where there is one."""
    names = sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml"))
    schemas = {name: SCHEMAS[f"stage/{name}"] for name in names if f"stage/{name}" in SCHEMAS}
    return {"defaults": ["_self_", *(f"/stage/{name}@stage" for name in names)], "stage": schemas}


NODES: dict[str, Any] = {
    "schema/config": Config,
    "schema/stages": _stages(),
    **{f"schema/{name}": node for name, node in SCHEMAS.items()},
}


class SchemaSource(ConfigSource):
    """Makes a schema when a configuration names it: Hydra's ConfigStore makes, and copies, all of them each time."""

    @staticmethod
    def scheme() -> str:
        return "fmexp"

    def available(self) -> bool:
        return True

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(".yaml") in NODES

    def is_group(self, config_path: str) -> bool:
        return bool(self.list(config_path, None))

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        prefix = f"{config_path}/".lstrip("/")
        below = [path.removeprefix(prefix).partition("/") for path in NODES if path.startswith(prefix)]
        kinds = {(name, ObjectType.GROUP if slash else ObjectType.CONFIG) for name, slash, _ in below}
        return sorted(name for name, kind in kinds if results_filter in (None, kind))

    def load_config(self, config_path: str) -> ConfigResult:
        node = OmegaConf.structured(NODES[config_path.removesuffix(".yaml")])
        return ConfigResult(self.provider, self.full_path(), node, {"package": None})


class SchemaPath(SearchPathPlugin):
    """Lets Hydra look for configurations here, too."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="fmexp", path=f"{SchemaSource.scheme()}://")


for plugin in (SchemaSource, SchemaPath):
    Plugins.instance().register(plugin)
