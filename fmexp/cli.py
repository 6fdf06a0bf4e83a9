"""The door: Hydra composes and checks the configuration, and only then is torch imported and the run executed."""

import logging
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from fmexp.config import conf_dir
from fmexp.errors import FmexpError

log = logging.getLogger(__name__)


def member_name(root: Any) -> str:
    """Name a sweep member's folder: its number, then its overrides in letters that every file system takes.

    The number makes it unique, so the rest may be cut: at most 100 characters. Folders are told by their
    content, not by where the data lies, so `dataset.root` is left out.
    """
    words = [override for override in root.hydra.overrides.task if not override.startswith("dataset.root=")]
    slug = "_".join(
        re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{key.lstrip('+~').split('.')[-1]}-{value}").strip("-.")
        for key, _, value in (word.partition("=") for word in words)
    )
    return f"{root.hydra.job.num}_{slug}"[:100].rstrip("_")


OmegaConf.register_new_resolver("fmexp_member", lambda _root_: member_name(_root_), replace=True)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def main(cfg: DictConfig) -> float:
    hydra_cfg = HydraConfig.get()
    output_dir = Path(hydra_cfg.runtime.output_dir)
    files: dict[str, DictConfig | ListConfig] = {
        "hydra.yaml": OmegaConf.create({"hydra": hydra_cfg}),
        "overrides.yaml": OmegaConf.create(list(hydra_cfg.overrides.task)),
    }
    single = hydra_cfg.mode == RunMode.RUN
    try:
        from fmexp.run import execute  # torch is imported here, and not for --help or --cfg

        return execute(cfg, output_dir, hydra_files=files, resume_command=resume_command(output_dir, single))
    except FmexpError as error:
        if single:
            remove_empty(output_dir)
        else:
            log.error("%s: %s", output_dir.name, error)
        raise
    except Exception:
        if single and not os.environ.get("HYDRA_FULL_ERROR"):
            sys.exit(1)  # the traceback is in the log and on the console
        raise


def resume_command(output_dir: Path, single: bool) -> str:
    """What to type to go on with this run, or with the sweep that it belongs to."""
    key, folder = ("hydra.run.dir", output_dir) if single else ("hydra.sweep.dir", output_dir.parent)
    words = [word for word in sys.argv[1:] if not word.startswith(f"{key}=")]
    program = ["fmexp"] if Path(sys.argv[0]).name == "fmexp" else ["python", "-m", "fmexp"]
    return shlex.join([*program, *words, f"{key}={quoted(str(folder))}"])


def quoted(value: str) -> str:
    """A value as Hydra's override grammar takes it."""
    if re.fullmatch(r"[\w./:+-]+", value):
        return value
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{escaped}'"


def remove_empty(output_dir: Path) -> None:
    """Remove the folder that Hydra made, and its parents, as far as there is nothing in them."""
    with suppress(OSError):
        os.removedirs(output_dir)
