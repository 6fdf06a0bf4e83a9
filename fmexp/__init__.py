"""fmexp: experiments on image classifiers, composed from YAML and seen in TensorBoard."""

from fmexp.config import compose

__version__ = "0.1.0"
__all__ = ["compose", "execute"]


def __getattr__(name: str) -> object:
    """Import `execute`, and torch with it, when it is first asked for."""
    if name == "execute":
        from fmexp.execution import execute

        return execute
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
