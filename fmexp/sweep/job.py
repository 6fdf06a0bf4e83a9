"""One member of a sweep: composing it, and executing it in this process."""

import copy
import logging
import re
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log, env_override, setup_globals
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fmexp import process
from fmexp.errors import FmexpError, printable
from fmexp.process import block_signals
from fmexp.rundir import layout
from fmexp.rundir.atomic import disk_full

log = logging.getLogger(__name__)

ONE_KILLED = "one of its processes was killed, or ran out of memory"


@dataclass
class Job:
    """A member to be run: all that is needed for it, in this process or in another."""

    number: int
    overrides: list[str]
    cfg: DictConfig  # as Hydra composes it, with its own part
    run_cfg: DictConfig  # without that: what the run is executed with
    tree: dict[str, Any]  # the same, resolved
    folder: Path
    action: str  # train, resume or skip
    resume_command: str  # goes on with the whole sweep
    pause_at: int | None = None  # train to this step alone


class Composer:
    """Composes members as Hydra does. Those that differ in values alone, and not in what they choose of the groups,
    share the reading and merging of the YAML files, which is nearly all of the work."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.parser = OverridesParser.create()
        self.bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: list[str]) -> DictConfig:
        values = [word for word in overrides if self._is_value(word)]
        choices = tuple(word for word in overrides if word not in values)
        if choices not in self.bases:
            self.bases[choices] = self.loader.load_sweep_config(self.master, list(choices))
        cfg = copy.deepcopy(self.bases[choices])
        try:
            for override in self.parser.parse_overrides(values):
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            self.loader.load_sweep_config(self.master, overrides)  # says it in Hydra's words
            raise
        with open_dict(cfg):
            cfg.hydra.overrides.task = overrides
            cfg.hydra.job.override_dirname = ",".join(sorted(overrides))
        return cfg

    def _is_value(self, word: str) -> bool:
        """Whether an override is key=value for a key that is no group."""
        key = word.partition("=")[0]
        plain = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key)
        return bool(plain) and not key.startswith("hydra.") and key not in self.master.hydra.runtime.choices


def run(job: Job, *, console: bool = False) -> None:
    """Execute a member in this process; its result is in its folder.

    Where another process is running in that folder, such as one of a sweep whose parent was killed, wait for it: then
    there is its result to take, or its checkpoint to go on from.

    Args:
        console: whether its log lines go to the console, too, and not to its fmexp.log alone.

    Raises:
        OSError: the disk is full, or what came of the member cannot be written.
    """
    setup_globals()
    configure_log(job.cfg.hydra.job_logging, job.cfg.hydra.verbose)
    if not console:
        _silence_console()
    environment = {str(name): str(value) for name, value in job.cfg.hydra.job.env_set.items()}
    outer = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(job.cfg)  # for code of one's own that asks Hydra where it is
    try:
        with env_override(environment):  # as it was for the next member in this process
            while layout.is_locked(job.folder):  # execute waits, too, but with the data in memory
                time.sleep(0.2)
            _run(job)
    finally:
        HydraConfig.instance().cfg = outer


def follow() -> None:
    """In another process of a member's run than the first: compute with it. What goes wrong there, the first one says.

    Raises:
        LostError: it could not begin; the first process may wait for it.
    """
    process.silence()
    from fmexp import execution
    from fmexp.engine.distributed import LostError

    process.resume_gc()
    try:
        execution.follow()
    except LostError:
        raise
    except SystemExit:  # after a signal, or another process's end
        pass
    except Exception:  # of which the first process has the first line alone
        traceback.print_exc()


def _run(job: Job) -> None:
    before = layout.read_result(job.folder)
    files: dict[str, DictConfig | ListConfig] = {
        "hydra.yaml": OmegaConf.masked_copy(job.cfg, ["hydra"]),
        "overrides.yaml": OmegaConf.create(job.overrides),
    }
    try:
        with block_signals():  # a signal's exception in the midst of torch's import aborts the process
            from fmexp.engine.distributed import LostError
            from fmexp.execution import execute

        process.resume_gc()
        execute(
            job.run_cfg, job.folder, hydra_files=files, resume_command=job.resume_command, pause_at=job.pause_at,
            wait=True,
        )  # fmt: skip
    except LostError:
        fail(job, ONE_KILLED)
    except Exception as error:
        if full := disk_full(error):
            raise full from None  # what is to come could not be written either
        if layout.read_result(job.folder) == before:  # it failed before the run could say so itself
            details = "".join(traceback.format_exception(error)).strip() if error.__cause__ else str(error)
            log.error("%s: %s", printable(job.folder.name), details)
            with suppress(PermissionError, FmexpError):  # a folder of another user costs this member alone
                layout.write_failure(job.folder, job.tree, job.overrides, str(error), details)


def _silence_console() -> None:
    """Let no log line of a member go to the console, which has one line for each member."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
            handler.setLevel(logging.CRITICAL + 1)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the process by SystemExit when a signal arrives, so that the sweep's table and command are still printed."""

    def end(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_data(jobs: list[Job]) -> None:
    """Download and check each dataset once, before many processes want it; the folder's error comes once, too."""
    for node in {str(job.cfg.dataset): job.cfg.dataset for job in jobs}.values():
        if "root" in node:
            with block_signals():  # a signal's exception in the midst of torch's import aborts the process
                from fmexp.datasets import load  # and torch, which is not wanted otherwise

            load(node)


def fail(job: Job, error: str) -> None:
    """Note in a member's folder that it failed without a word of its own."""
    layout.write_failure(job.folder, job.tree, job.overrides, error, killed=True)
