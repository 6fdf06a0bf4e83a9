"""Sweeps: runs that differ in some keys, side by side, skipped, resumed or searched."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmexp.config import maximised
    from fmexp.sweep.compare import frame
    from fmexp.sweep.members import Member, ranked, read, start
    from fmexp.sweep.report import conclude, replicates, table
    from fmexp.tables import aligned

__all__ = ["Member", "aligned", "conclude", "frame", "maximised", "ranked", "read", "replicates", "start", "table"]

_LATER = {  # a single run, which imports the sweep's plugins, does without them
    "aligned": "fmexp.tables",
    "frame": "fmexp.sweep.compare",
    "maximised": "fmexp.config",
    **dict.fromkeys(("Member", "ranked", "read", "start"), "fmexp.sweep.members"),
    **dict.fromkeys(("conclude", "replicates", "table"), "fmexp.sweep.report"),
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
