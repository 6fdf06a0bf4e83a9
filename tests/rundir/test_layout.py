"""What a run's folder holds, and who may change it."""

import threading
from pathlib import Path

import pytest
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


def test_lock_waits_where_it_is_told_to(tmp_path: Path) -> None:
    """Longer than it takes to be refused."""
    entered = []

    def enter() -> None:
        with layout.lock(tmp_path, wait=True):
            entered.append(True)

    second = threading.Thread(target=enter)
    with layout.lock(tmp_path):
        with pytest.raises(layout.LockedError), layout.lock(tmp_path):
            pass
        second.start()
        second.join(1)
        assert not entered
    second.join()
    assert entered
