"""fmexp: experiments on image classifiers, composed from YAML and seen in TensorBoard."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmexp.config import compose
    from fmexp.execution import execute
    from fmexp.loading import load
    from fmexp.rundir.results import read

__version__ = "0.1.0"
__all__ = ["compose", "execute", "load", "read"]

_LATER = {
    "compose": "fmexp.config",
    "execute": "fmexp.execution",
    "load": "fmexp.loading",
    "read": "fmexp.rundir.results",
}


def __getattr__(name: str) -> object:
    """Import what is public, and Hydra or torch with it, when it is first asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
