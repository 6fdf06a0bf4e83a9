"""What a person reads when the program cannot go on: a message that names key, value and way out, and no traceback."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fmexp import config
from fmexp.errors import CodeError, FmexpError, did_you_mean, first_line, printable, similar

FULL = "HYDRA_FULL_ERROR"


@contextmanager
def instead_of_tracebacks() -> Iterator[None]:
    """End the program with a message on stderr and status 1 where an error leaves the block; HYDRA_FULL_ERROR=1 lets
    the error itself through."""
    if os.environ.get(FULL) == "1":
        yield
        return
    os.environ[FULL] = "1"  # so that Hydra raises what it would print in words of its own
    try:
        yield
    except SystemExit as left:
        if left.code == 2:  # argparse has said which word it does not know
            print("Flags such as --multirun come first. Settings follow, as key=value without dashes.", file=sys.stderr)
        raise
    except KeyboardInterrupt:  # before the run has begun, or the second one
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        sys.stdout.flush()
        hint = f"\n\nSet the environment variable {FULL}=1 for the traceback." if isinstance(error, CodeError) else ""
        print(message(error) + hint, file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ.pop(FULL, None)


def message(error: Exception) -> str:
    """The message for an error; of one that nobody foresaw it is the traceback."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, FmexpError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options:
        return of_option(error)
    if isinstance(error, OverrideParseException):
        return of_word(error)
    if isinstance(error, CompactHydraException) and isinstance(cause, OmegaConfBaseException):
        where, _, hint = str(error).removesuffix(str(cause)).strip().partition("\n")
        part, name = _key(cause)
        closed = (*config.closed(), "hydra.launcher", "hydra.sweeper")
        if part in closed or (part.startswith("stage.") and name == "on"):
            hint = ""  # Hydra's "To append to your config use +" is no way to a key that is not in the schema
        return "\n".join(filter(None, (where, of_config(cause), hint)))
    if isinstance(error, CompactHydraException):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return of_config(error)
    if isinstance(error, YAMLError):
        return f"This is not YAML: {error}"
    if isinstance(error, OSError) and error.filename:
        return (
            f"{Path(str(error.filename)).absolute()}: {error.strerror}. If the run was to be written there, "
            "name another folder with hydra.run.dir=<folder>, or hydra.sweep.dir=<folder> for a sweep."
        )
    if _is_of_hydra(error) and isinstance(error, ValueError):
        return str(error)
    if _is_of_hydra(error):
        words = " ".join(word for word in sys.argv[1:] if "=" in word or word[:1] == "~")
        return f"Hydra cannot compose {words or 'this'}: {type(error).__name__}, {first_line(error)}"
    return "".join(traceback.format_exception(error)).strip()


def of_config(error: OmegaConfBaseException) -> str:
    """What is wrong with a key or its value, in a line, and which keys there are where one does not exist."""
    if error.full_key == "hydra.runtime.cwd":
        return f"The current folder, {os.getcwd()}, holds ${{, which is taken for a key. Call fmexp in another."
    if not isinstance(error, ConfigKeyError | ConfigAttributeError) or not isinstance(error.parent_node, DictConfig):
        return config.wrong_value(error)
    part, name = _key(error)
    return config.no_key(part, name, error.parent_node)


def _key(error: OmegaConfBaseException) -> tuple[str, str]:
    """The key that does not exist: the part of the configuration in which it was looked for, "" for the root."""
    return str(error.full_key or error.key).rpartition(".")[0], str(error.key)


def of_option(error: MissingConfigException) -> str:
    """Which option a group does not have, and those that it has."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or ())
    meant = did_you_mean(f"{group}={name}" for name in similar(option, options))
    return f"{str(error).splitlines()[0]}.{meant}\nThe options of {group} are {', '.join(options)}."


def of_word(error: OverrideParseException) -> str:
    """Which word of the command line is no override, and how one is quoted."""
    if problem := config.no_text(error.override.replace("${", "")):
        return f"{printable(error.override)} {problem}. Name another."
    said = str(error).removeprefix(f"Error parsing override '{error.override}'").strip()
    return (
        f"{error.override} cannot be read as key=value:\n{said}\n"
        "Write no space beside = or in a list. Quote a value that has a space, or a sign with a meaning for Hydra,\n"
        "for the shell and for Hydra: \"key='my value'\"."
    )


def _is_of_hydra(error: Exception) -> bool:
    """Whether Hydra stumbled, over what was typed or stands in YAML, where fmexp only had it compose."""
    ours, door = Path(__file__).parent, ("__main__.py", "cli.py", "messages.py", "composition.py", "job.py")
    passed = (Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__))
    called = [path.name for path in passed if ours in path.parents]
    return not called or called[-1] in door
