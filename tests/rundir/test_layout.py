"""What a run's folder holds, and who may change it."""

from pathlib import Path

from tools import small

from fmexp import config, execute
from fmexp.rundir import layout


def test_a_complete_run_is_not_made_a_failed_one(tmp_path: Path) -> None:
    """Its process may be killed, or wait for another sweep's to end, when all is written."""
    cfg = small("model=mlp", "logging=light")
    execute(cfg, tmp_path)
    before = layout.read_result(tmp_path)
    layout.write_failure(tmp_path, config.resolved(cfg), [], "its process was killed")
    assert layout.read_result(tmp_path) == before
