"""Composes a configuration from the shipped conf/ and from folders of one's own."""

import os
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from fmexp.config.hydra_versions import VERSION_BASE
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
