"""What is found out about an error of the disk."""

import errno

from fmexp.rundir import atomic


def test_a_full_disk_is_found_in_a_chain_of_exceptions_that_may_be_a_circle() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    outer, inner = RuntimeError("outer"), RuntimeError("inner")
    outer.__cause__, inner.__cause__ = inner, outer
    assert atomic.disk_full(outer) is None
    inner.__cause__ = full
    assert atomic.disk_full(outer) is full
