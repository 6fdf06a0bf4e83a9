"""The door: Hydra composes and checks the configuration, and only then is torch imported and the run executed."""

import logging
import os
import re
import shlex
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

import fmexp
from fmexp import config, folder, garbage, launcher, messages, sweep
from fmexp.config import conf_dir, resolved
from fmexp.errors import FmexpError
from fmexp.stop import held_back

log = logging.getLogger(__name__)

DIVERGED = 3  # the exit status of a single run that diverged; an error is 1, a wrong flag 2, a signal 128 + its number


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def run(cfg: DictConfig) -> float:
    """Execute one composed run: what Hydra calls, once or for each member of a sweep."""
    hydra_cfg = HydraConfig.get()
    output_dir = Path(hydra_cfg.runtime.output_dir)
    overrides = OmegaConf.create(list(hydra_cfg.overrides.task))
    files: dict[str, DictConfig | ListConfig] = {
        "hydra.yaml": OmegaConf.create({"hydra": hydra_cfg}),
        "overrides.yaml": overrides,
    }
    single = hydra_cfg.mode == RunMode.RUN
    before = folder.read_result(output_dir)
    try:
        if single:  # execute does so too, but after some seconds of importing torch; members were checked together
            config.check(cfg)
        with held_back():  # a signal's exception in the midst of torch's import aborts the process
            from fmexp.execution import execute  # torch is imported here, and not for --help or --cfg

        garbage.watch()
        with beside_the_bar():
            objective = execute(cfg, output_dir, hydra_files=files, resume_command=resume_command(output_dir, single))
        if single and (folder.read_result(output_dir) or {}).get("status") == "diverged":
            sys.exit(DIVERGED)
        return objective
    except folder.HeldError:
        raise  # who holds the folder writes what comes of it
    except Exception as error:
        if single:
            remove_empty(output_dir)
        elif folder.read_result(output_dir) == before:  # it failed before the run could say so itself
            details = "".join(traceback.format_exception(error)).strip() if error.__cause__ else str(error)
            log.error("%s: %s", output_dir.name, details)
            with suppress(OSError):
                folder.write_failure(output_dir, resolved(cfg), overrides, str(error), details)
        if not isinstance(error, FmexpError) and (output_dir / "fmexp.log").is_file():
            raise FmexpError(  # the log and the console have the traceback
                f"{output_dir}: the run failed, {type(error).__name__}: {error} (fmexp.log has all)"
            ) from error
        raise


def beside_the_bar() -> AbstractContextManager[None]:
    """On a terminal, write log lines above the progress bar and not into it."""
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm()


def main() -> None:
    """The program: Hydra's part, and after a sweep its table."""
    if "--version" in sys.argv[1:]:  # Hydra would say its own alone
        print(f"fmexp {fmexp.__version__} (hydra-core {hydra.__version__})")
        return
    try:
        with messages.instead_of_tracebacks():
            run()
    finally:
        for root, progress in launcher.LAUNCHED.items():
            print(sweep.conclude(root, progress.not_begun))
            if progress.not_begun or any(member.status not in ("complete", "diverged") for member in sweep.read(root)):
                print(f"go on with\n  {resume_command(root / 'member', single=False)}")
            else:
                print(f"compare them with\n  tensorboard --logdir {root}")


def resume_command(output_dir: Path, single: bool) -> str:
    """What to type to go on with this run, or with the sweep that it belongs to."""
    key, folder = ("hydra.run.dir", output_dir) if single else ("hydra.sweep.dir", output_dir.parent)
    words = [word for word in sys.argv[1:] if not word.startswith((f"{key}=", "resume="))]  # resume=false would refuse
    program = ["fmexp"] if Path(sys.argv[0]).name == "fmexp" else ["python", "-m", "fmexp"]
    return shlex.join([*program, *words, f"{key}={quoted(str(folder))}"])


def quoted(value: str) -> str:
    """A value as Hydra's override grammar takes it."""
    if re.fullmatch(r"[\w./:+-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{escaped}'"


def remove_empty(output_dir: Path) -> None:
    """Remove the folder that Hydra made, and its parents below the current one, as far as there is nothing in them."""
    parents = [parent for parent in output_dir.parents if Path.cwd() in parent.parents]
    with suppress(OSError):
        for path in (output_dir, *parents):
            path.rmdir()
