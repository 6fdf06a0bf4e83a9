"""`python -m fmexp`, and the command `fmexp`."""

import os
import sys

from fmexp import process


def main() -> None:
    """Run the program."""
    if sys.platform == "win32":  # which has neither these signals nor renames over open files
        sys.exit("fmexp runs on Linux and macOS. On Windows, run it in WSL.")
    process.open_console()
    process.pause_gc()
    # By default waiting threads of OpenMP spin so long that a busy machine comes to a standstill: benchmarks/README.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from fmexp import cli

    cli.main()


if __name__ == "__main__":
    main()
