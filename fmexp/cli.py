"""The entry point: Hydra composes and checks the configuration; only then is torch imported and the run executed."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

import fmexp
from fmexp import messages, process
from fmexp.config import check, conf_dir, output_folder, plugin_options, without_hydra  # noqa: F401
from fmexp.config.hydra_versions import MAIN
from fmexp.config.overrides import resume_command
from fmexp.errors import ConfigError, FmexpError
from fmexp.process import block_signals

DIVERGED = 3  # the exit status of a single run that diverged; an error is 1, a wrong flag 2, a signal 128 + its number


class RefusedError(BaseException):
    """Carries an error out of a callback, where Hydra makes a warning of any Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Door(Callback):
    """Refuses what cannot be run before Hydra makes a folder for it, and notes which folders it will make.

    Hydra makes one of these itself, for conf/config.yaml names it; so what it notes is the class's.
    """

    entered = executing = False
    new_folders: ClassVar[list[Path]] = []  # the run's, and those parents that are not there either

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refusing():
            folder = output_folder(config, "hydra.run.dir")
            with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
                config.hydra.runtime.output_dir = str(folder)  # as Hydra does next
            HydraConfig.instance().set_config(config)
            check(without_hydra(config))
            if config.sweep.dry_run:
                raise ConfigError("sweep.dry_run=true lists the members of a sweep: write --multirun before the keys.")
            Door.new_folders = [path for path in (folder, *folder.parents) if not path.exists()]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refusing():
            output_folder(config, "hydra.sweep.dir")
            if process.world_size() > 1:
                raise ConfigError(
                    "--multirun under torchrun would start the sweep in each process. A sweep is started without "
                    "torchrun, python -m fmexp --multirun ...; a single run of several processes without --multirun."
                )
            from fmexp.sweep import plugins  # a single run does without

            plugins.register()


@contextmanager
def _refusing() -> Iterator[None]:
    Door.entered = True
    try:
        yield
    except Exception as error:
        raise RefusedError(error) from error


@hydra.main(**MAIN, config_path=str(conf_dir()), config_name="config")
def run(cfg: DictConfig) -> float:
    """Execute a composed run. Hydra calls this for a single run; a sweep's members are `fmexp.sweep`'s."""
    hydra_cfg = HydraConfig.get()
    output_dir = Path(hydra_cfg.runtime.output_dir)
    words = OmegaConf.to_container(hydra_cfg.overrides.task)  # with what they interpolate as it was typed
    files = {"hydra.yaml": OmegaConf.create({"hydra": hydra_cfg}), "overrides.yaml": OmegaConf.create(words)}
    try:
        with block_signals():  # a signal's exception in the midst of torch's import aborts the process
            from fmexp.execution import execute  # torch is imported here, and not for --help or --cfg
            from fmexp.rundir import layout

        process.resume_gc()
        Door.executing = True
        with beside_the_bar():
            command = resume_command("hydra.run.dir", output_dir)
            objective = execute(cfg, output_dir, hydra_files=files, resume_command=command)
    except FmexpError:
        raise
    except Exception as error:
        if not (output_dir / "fmexp.log").is_file():
            raise
        raise FmexpError(  # the log and the console have the traceback
            f"{output_dir}: the run failed, {type(error).__name__}: {error} (fmexp.log has all)"
        ) from error
    if (layout.read_result(output_dir) or {}).get("status") == "diverged":
        sys.exit(DIVERGED)
    return objective


def follow() -> None:
    """In another process of a run than the first: compute, and say nothing that the first one says."""
    process.silence()
    with messages.instead_of_tracebacks():
        from fmexp import execution

        process.resume_gc()
        execution.follow()


def beside_the_bar() -> AbstractContextManager[None]:
    """On a terminal, write log lines above the progress bar and not into it."""
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm()


def main() -> None:
    """The program."""
    if process.rank():
        return follow()
    try:
        _lead()
    finally:
        if process.world_size() > 1 and not Door.executing:
            from fmexp.engine import distributed

            distributed.dismiss()


def _lead() -> None:
    if "--version" in sys.argv[1:]:  # Hydra would say its own alone
        print(f"fmexp {fmexp.__version__} (hydra-core {hydra.__version__})")
        return process.require_output()
    Door.entered, Door.executing, Door.new_folders = False, False, []
    with messages.instead_of_tracebacks():
        try:
            run()
        except RefusedError as refused:
            raise refused.error from refused.error.__cause__
        finally:
            if not Door.entered:  # --help, --cfg and so on
                process.require_output()
            with suppress(OSError):  # the first that holds something ends it
                for path in Door.new_folders:
                    path.rmdir()
