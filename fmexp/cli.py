"""The door: Hydra composes and checks the configuration, and only then is torch imported and the run executed."""

import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

import fmexp
from fmexp import config, messages, process
from fmexp.config import conf_dir
from fmexp.config.hydra_versions import VERSION_BASE
from fmexp.config.overrides import resume_command
from fmexp.errors import FmexpError
from fmexp.process import block_signals
from fmexp.rundir import layout
from fmexp.sweep import plugins

log = logging.getLogger(__name__)

DIVERGED = 3  # the exit status of a single run that diverged; an error is 1, a wrong flag 2, a signal 128 + its number


@hydra.main(**VERSION_BASE, config_path=str(conf_dir()), config_name="config")
def run(cfg: DictConfig) -> float:
    """Execute a composed run. Hydra calls this for a single run; a sweep's members are `fmexp.sweep`'s."""
    hydra_cfg = HydraConfig.get()
    output_dir = Path(hydra_cfg.runtime.output_dir)
    files: dict[str, DictConfig | ListConfig] = {
        "hydra.yaml": OmegaConf.create({"hydra": hydra_cfg}),
        "overrides.yaml": OmegaConf.create(list(hydra_cfg.overrides.task)),
    }
    try:
        config.check(cfg)  # execute does so too, but after some seconds of importing torch
        with block_signals():  # a signal's exception in the midst of torch's import aborts the process
            from fmexp.execution import execute  # torch is imported here, and not for --help or --cfg

        process.resume_gc()
        with beside_the_bar():
            command = resume_command("hydra.run.dir", output_dir)
            objective = execute(cfg, output_dir, hydra_files=files, resume_command=command)
    except layout.LockedError:
        raise
    except Exception as error:
        remove_empty(output_dir)
        if not isinstance(error, FmexpError) and (output_dir / "fmexp.log").is_file():
            raise FmexpError(  # the log and the console have the traceback
                f"{output_dir}: the run failed, {type(error).__name__}: {error} (fmexp.log has all)"
            ) from error
        raise
    if (layout.read_result(output_dir) or {}).get("status") == "diverged":
        sys.exit(DIVERGED)
    return objective


def beside_the_bar() -> AbstractContextManager[None]:
    """On a terminal, write log lines above the progress bar and not into it."""
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm()


def main() -> None:
    """The program."""
    if "--version" in sys.argv[1:]:  # Hydra would say its own alone
        print(f"fmexp {fmexp.__version__} (hydra-core {hydra.__version__})")
        return
    plugins.register()
    with messages.instead_of_tracebacks():
        run()


def remove_empty(output_dir: Path) -> None:
    """Remove the folder that Hydra made, and its parents below the current one, as far as there is nothing in them."""
    parents = [parent for parent in output_dir.parents if Path.cwd() in parent.parents]
    with suppress(OSError):
        for path in (output_dir, *parents):
            path.rmdir()
