"""A sweep's members: composing one, and executing it in this process."""

import copy
import logging
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from fmexp import folder
from fmexp.stop import held_back


@dataclass
class Member:
    """A member of the sweep at hand: its composed configuration, its folder, and what is to be done."""

    number: int
    overrides: list[str]
    cfg: DictConfig
    tree: dict[str, Any]  # the same, resolved and without Hydra's part
    folder: Path
    action: str  # train, resume or skip


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
        ConfigLoaderImpl._apply_overrides_to_config(self.parser.parse_overrides(values), cfg)
        with open_dict(cfg):
            cfg.hydra.overrides.task = overrides
            cfg.hydra.job.override_dirname = get_overrides_dirname(
                self.parser.parse_overrides(overrides), **cfg.hydra.job.config.override_dirname
            )
        return cfg

    def _is_value(self, word: str) -> bool:
        """Whether an override is key=value for a key that is no group."""
        key = word.partition("=")[0]
        plain = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key)
        return bool(plain) and not key.startswith("hydra.") and key not in self.master.hydra.runtime.choices


def execute(cfg: DictConfig, hydra_context: HydraContext, *, console: bool = False) -> None:
    """Execute one member in this process as Hydra executes a job; what came of it stands in its folder.

    Where another process is running in that folder, such as one of a sweep whose parent was killed, wait for it: then
    there is its result to take, or its checkpoint to go on from.

    Args:
        console: whether its log lines go to the console, too, and not to its fmexp.log alone.
    """
    from fmexp import cli

    setup_globals()
    JobRuntime.instance().set("name", cfg.hydra.job.name)
    path = Path(str(cfg.hydra.sweep.dir)) / cfg.hydra.sweep.subdir
    while True:
        while folder.is_held(path):
            time.sleep(0.2)
        done = run_job(
            task_function=cli.run.__wrapped__ if console else _quiet(cli.run.__wrapped__),
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=hydra_context,
        )
        if not isinstance(done._return_value, folder.HeldError):
            return


def _quiet(task: TaskFunction) -> TaskFunction:
    """The same, with no log lines on the console, which has one line for each member."""

    def quiet_task(cfg: DictConfig) -> Any:  # Hydra has set up the job's logging when it calls this
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
                handler.setLevel(logging.CRITICAL + 1)
        return task(cfg)

    return quiet_task


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


def prepare_data(members: list[Member]) -> None:
    """Download and check each dataset once, before many processes want it; the folder's error comes once, too."""
    for node in {str(member.cfg.dataset): member.cfg.dataset for member in members}.values():
        if "root" in node:
            with held_back():  # a signal's exception in the midst of torch's import aborts the process
                from fmexp.datasets import load  # and torch, which is not wanted otherwise

            load(node)


def fail(member: Member, error: str) -> None:
    """Note in a member's folder that it failed without a word of its own."""
    folder.write_failure(member.folder, member.tree, member.overrides, error)
