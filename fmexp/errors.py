"""What fmexp says when it cannot go on: a message of a few lines for a person, never a traceback."""

import difflib
from collections.abc import Iterable

from hydra.errors import CompactHydraException


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, for a warning of one line; its type where it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """A text in which what a terminal would obey, or not show, stands as its code: \\x1b, \\u202e; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(names: Iterable[str]) -> str:
    """A question to end a message with, or nothing where there are no names."""
    meant = " or ".join(dict.fromkeys(names))
    return f" Did you mean {meant}?" if meant else ""


def similar(name: str, others: Iterable[str]) -> list[str]:
    """The three of the others that are most like a name, of those that are."""
    return difflib.get_close_matches(name, list(others), n=3)


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: the name of a file may not be."""
    return text.encode(errors="ignore").decode() == text


class FmexpError(CompactHydraException):
    """An error whose message alone is printed: it names the key or file, the value, and the way out.

    Hydra prints exceptions of this family without a traceback (HYDRA_FULL_ERROR=1 shows it). A path in it is absolute.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(FmexpError):
    """A configuration that cannot be run."""


class CodeError(ConfigError):
    """Code that the configuration names raised an exception, whose traceback tells more than the message."""


class DataError(FmexpError):
    """Dataset files that are missing, unreachable or corrupt."""
