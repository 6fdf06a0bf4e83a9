"""Sweeps: runs that differ in some keys, side by side, skipped, resumed or searched."""

from fmexp.config import maximised
from fmexp.sweep.compare import frame
from fmexp.sweep.members import Member, ranked, read, start
from fmexp.sweep.report import conclude, replicates, table
from fmexp.tables import aligned

__all__ = ["Member", "aligned", "conclude", "frame", "maximised", "ranked", "read", "replicates", "start", "table"]
