"""Reading what a folder holds, whoever has written it: regular files alone, within bounds, and as data.

A run's folder may be somebody else's. Nothing in it is resolved or executed, and no file in it can make a reader wait.
"""

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import yaml  # type: ignore[import-untyped]

from fmexp.errors import FmexpError, first_line, printable

MOST_JSON, MOST_YAML = 2**24, 2**20  # bytes
DEEPEST, MOST_NODES, MOST_SCALAR, MOST_INTERPOLATIONS = 100, 50_000, 2**16, 500  # of YAML, which is slow to read
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without libyaml
TAIL = 2**16  # bytes of a log that are looked at


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, but no link, pipe or device: opening a pipe would wait for its other end.

    Raises:
        FileNotFoundError: there is none.
        FmexpError: it is something else, or cannot be opened.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = "a link" if path.is_symlink() else error.strerror
        raise FmexpError(f"{path} cannot be read: {problem}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FmexpError(f"{path} is no file. Move it away to go on.")
    return file


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        FmexpError: it is no JSON, or not within bounds.
    """
    try:
        return json.loads(_read_text(path, MOST_JSON))
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise FmexpError(f"{path} is damaged: {first_line(error)}. Move it away to go on.") from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain dicts and lists; what it interpolates stays as it is written.

    Raises:
        FileNotFoundError: there is none.
        FmexpError: it is no YAML, or not within bounds.
    """
    text = _read_text(path, MOST_YAML)
    try:
        _check_bounds(text)
        found = parse_yaml(text)
    except Exception as error:  # whatever a damaged file makes a YAML reader raise
        raise FmexpError(f"{path} is damaged: {first_line(error)}. Move it away to go on.") from error
    return {} if found is None else found


def parse_yaml(text: str) -> Any:
    """What a YAML text says, as OmegaConf reads it, but about five times as fast: a table may read 1,000 files.

    Raises:
        yaml.YAMLError, ValueError: it is no YAML.
    """
    return yaml.load(text, _Loader)


class _Loader(_Parser):  # type: ignore[misc, valid-type]
    """YAML's plain types with what OmegaConf changes: 1e-3 is a number, a date is text, no key is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value) or None in found:
            raise ValueError("a key is there twice, or is null")
        return found


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Parser.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, or none."""
    try:
        with open_regular(path) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
            return printable(file.read().decode(errors="replace")).splitlines()[-count:]
    except (FileNotFoundError, FmexpError):
        return []


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder, in the order of their names; links and pipes are none of a run's."""
    return sorted(path for path in folder.glob("events.out.tfevents.*") if path.is_file() and not path.is_symlink())


def next_second(paths: Iterable[Path]) -> int:
    """The first second that an event file may be named by to be read after `paths`: TensorBoard reads in the order of
    names, which begin with the second of their making."""
    seconds = [int(word) for path in paths if (word := path.name.split(".")[3]).isdigit()]
    return max(seconds, default=-1) + 1


def check_regular(path: Path) -> None:
    """Raise FmexpError where something else than a file is in a file's place."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise FmexpError(f"{path} is no file, where a run has one. Move it away, or name another folder.")


def _check_bounds(text: str) -> None:
    """Raise ValueError for YAML that would keep its reader busy: a few KiB of it can do so for minutes."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _Parser)):
        if isinstance(event, yaml.AliasEvent):  # a few lines of them stand for any amount of data; a run writes none
            raise ValueError("it has references")
        if getattr(event, "tag", None) not in (None, "!"):  # of bytes, sets, dates: no configuration has them
            raise ValueError(f"it has a tag, {event.tag}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or number > MOST_NODES or len(getattr(event, "value", "")) > MOST_SCALAR:
            raise ValueError("it is deeper or longer than what a run writes")
    if text.count("${") > MOST_INTERPOLATIONS:
        raise ValueError("it has too many interpolations")


def _read_text(path: Path, most: int) -> str:
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FmexpError(f"{path} has more than {most:,} bytes, and no run writes that. Move it away to go on.")
    return content.decode(errors="replace")
