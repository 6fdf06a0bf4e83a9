"""Composes a configuration from the shipped conf/ and from folders of one's own."""

import os
import textwrap
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fmexp.config.hydra_versions import VERSION_BASE, register_resolver
from fmexp.config.location import conf_dir
from fmexp.config.validate import check_keys


def compose(
    overrides: list[str] | tuple[str, ...] = (), config_dir: str | os.PathLike[str] | None = None
) -> DictConfig:
    """Compose the configuration that `python -m fmexp <overrides>` would run.

    Args:
        overrides: as on the command line, for example ["optimizer.lr=0.01", "model=mlp"].
        config_dir: a folder with config groups of one's own, as `--config-dir`.
    """
    from fmexp.config import plugin_options  # noqa: F401  # a recipe may name launchers and sweepers

    own = [f"hydra.searchpath=[{Path(config_dir).resolve().as_uri()}]"] if config_dir is not None else []
    with initialize_config_dir(**VERSION_BASE, config_dir=str(conf_dir()), job_name="fmexp"):
        cfg = hydra_compose("config", overrides=[*overrides, *own])
    check_keys(cfg)
    return cfg


def listed_options() -> str:
    """The groups of conf/ and their options for --help, the default one first; found there, so never out of date."""
    root, lines = conf_dir(), []
    defaults = {key: value for entry in OmegaConf.load(root / "config.yaml").defaults for key, value in _pairs(entry)}
    for group in [*(key for key in defaults if (root / key).is_dir()), "experiment"]:
        first = defaults.get(group)
        names = [f"{first} (default)"] * bool(first)
        names += sorted(path.stem for path in (root / group).glob("*.yaml") if path.stem != first)
        lines.append(_wrapped(f"  {group:<13}", names))
    return "\n".join(dict.fromkeys(lines))


def listed_stages() -> str:
    """The stages of conf/ for --help."""
    return _wrapped("  ", sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml")))


def _pairs(entry: object) -> list[tuple[str, str]]:
    """A line of a defaults list as (group, option)."""
    return [(str(key), str(value)) for key, value in entry.items() if value] if isinstance(entry, DictConfig) else []


def _wrapped(head: str, names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 80, initial_indent=head, subsequent_indent=" " * len(head))


register_resolver("fmexp.options", listed_options, replace=True)
register_resolver("fmexp.stages", listed_stages, replace=True)
