"""What fmexp says when it cannot go on: a message of a few lines for a person, never a traceback."""

from hydra.errors import CompactHydraException


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, for a warning of one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class FmexpError(CompactHydraException):
    """An error whose message alone is printed: it names the key or file, the value, and the way out.

    Hydra prints exceptions of this family without a traceback (HYDRA_FULL_ERROR=1 shows it). A path in it is absolute.
    """


class ConfigError(FmexpError):
    """A configuration that cannot be run."""


class CodeError(ConfigError):
    """Code that the configuration names raised an exception, whose traceback tells more than the message."""


class DataError(FmexpError):
    """Dataset files that are missing, unreachable or corrupt."""
