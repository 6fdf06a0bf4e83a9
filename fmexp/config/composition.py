"""Composes a configuration from the shipped conf/ and from folders of one's own."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from fmexp.config import schema_source  # noqa: F401  # which Hydra finds the schemas by
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


def listed_options(choices: Mapping[str, str | None]) -> str:
    """The groups of conf/ and their options for --help, the chosen one first; found there, so never out of date.

    Args:
        choices: the option of each group, as hydra.runtime.choices has them.
    """
    lines = []
    for group, chosen in sorted(choices.items()):
        if "/" not in group and (folder := conf_dir() / group).is_dir():
            others = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != chosen)
            lines.append(_wrapped(f"  {group:<13}", [f"{chosen} (chosen)"] * bool(chosen) + others))
    return "\n".join(lines)


def listed_stages() -> str:
    """The stages of conf/ for --help."""
    return _wrapped("  ", sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml")))


def _wrapped(head: str, names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 80, initial_indent=head, subsequent_indent=" " * len(head))


register_resolver("fmexp.options", listed_options, replace=True)
register_resolver("fmexp.stages", listed_stages, replace=True)
