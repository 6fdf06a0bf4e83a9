"""python -m fmexp.sweep <folder>: print the table of a sweep, finished or not."""

import argparse
import sys
from pathlib import Path

from fmexp import process
from fmexp.errors import printable
from fmexp.rundir import layout
from fmexp.sweep.members import member_folders
from fmexp.sweep.report import conclude


def main() -> None:
    """Print the table of a sweep: python -m fmexp.sweep <folder>."""
    parser = argparse.ArgumentParser(
        prog="python -m fmexp.sweep",
        description="Print the table of a sweep that runs, was stopped or is done, best member first. It is written "
        "to the sweep's folder, too, with a picture (sweep.csv, sweep.png), and for TensorBoard (summary/).",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="what the runs lie side by side in: multirun/<date>/<time> of a sweep, or any other folder of runs",
    )
    root = parser.parse_args().folder.absolute()
    if not root.is_dir():
        parser.error(f"{root} is no folder")
    if not member_folders(root):
        deeper = sorted({str(path.parents[2]) for path in root.glob(f"*/*/**/{layout.CONFIG}")})
        hint = f" There are runs in {', '.join(deeper[:3])}." if deeper else ""
        sys.exit(printable(f"No folder in {root} holds a run.{hint}"))
    try:
        print(conclude(root))
        process.require_output()
    except OSError as error:
        sys.exit(f"The table cannot be written: {error}")


if __name__ == "__main__":
    process.open_console()
    main()
