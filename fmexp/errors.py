"""What fmexp says when it cannot go on: a message of a few lines for a person, never a traceback."""

from hydra.errors import CompactHydraException


class FmexpError(CompactHydraException):
    """An error whose message alone is printed: it names the key or file, the value, and the way out.

    Hydra prints exceptions of this family without a traceback (HYDRA_FULL_ERROR=1 shows it).
    """


class ConfigError(FmexpError):
    """A configuration that cannot be run."""


class DataError(FmexpError):
    """Dataset files that are missing, unreachable or corrupt."""
