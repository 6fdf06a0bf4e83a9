"""python -m fmexp.sweep <folder>...: the table of a sweep, finished or not, or of any runs; or some of them deleted."""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fmexp import process
from fmexp.config import maximised
from fmexp.errors import FmexpError, printable
from fmexp.rundir import atomic, results
from fmexp.sweep import compare, delete
from fmexp.sweep.report import STATUSES, conclude, printed, table
from fmexp.tables import csv_text

ABOUT = """\
Print a table of runs, best first. Of a sweep that runs, was stopped or is done
it is written to the sweep's folder, too, with a picture (sweep.csv, sweep.png),
and for TensorBoard (summary/). Of several folders, of a folder above them, or
with one of the options below, the table has the keys in which the runs differ,
with the mean over runs that differ in their seed alone, and nothing is written
but --csv."""


def main() -> None:
    """Print the table of a sweep or of any runs, or delete some of them."""
    parser = _parser()
    args = parser.parse_intermixed_args()
    roots = [root.absolute() for root in args.folder]
    _check(parser, args, roots)
    status = 0
    try:
        folders = compare.find(roots)
        asked = args.objective or args.where or args.best or args.csv or args.delete
        if not asked and len(roots) == 1 and all(folder.parent == roots[0] for folder in folders):
            print(conclude(roots[0]))
            statuses = {results.status(folder) for folder in folders}
            is_open = statuses & {"interrupted", "failed", "paused"} and "running" not in statuses
            if is_open and (again := compare.sweep_command(roots[0])):
                print(f"go on with\n  {again}")
        else:
            runs = compare.choose(compare.read(folders), args.where)
            if args.delete:
                status = delete.ask_and_delete(runs, args.delete, yes=args.yes)
            else:
                _print_table(runs, args)
        process.require_output()
    except FmexpError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"The table cannot be written: {error}")
    if status:
        sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmexp.sweep",
        description=ABOUT,
        allow_abbrev=False,  # --d is no way to delete
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, nargs="+", help="a sweep, a run, or a folder above them, such as multirun or runs"
    )
    parser.add_argument("--objective", metavar="METRIC", help="rank by this metric, and not by the runs' own objective")
    parser.add_argument(
        "--where", metavar="KEY=VALUE", action="append", default=[],
        help="only runs whose configuration has this value; all of several",
    )  # fmt: skip
    parser.add_argument("--best", metavar="N", type=int, help="the N best, each with the command that makes it again")
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file, or with - to the standard output")
    parser.add_argument(
        "--delete", metavar="STATUS", choices=delete.STATUSES,
        help=f"delete the folders of runs that are {', '.join(delete.STATUSES)}; they are named, and you are asked",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, roots: list[Path]) -> None:
    """End the program where arguments cannot be used."""
    for root in roots:
        if not root.is_dir():
            parser.error(printable(f"{root} is no folder"))
    for condition in args.where:
        if "=" not in condition:
            parser.error(printable(f"--where {condition} must be key=value, such as optimizer.lr=0.01"))
    if args.best is not None and args.best < 1:
        parser.error(f"--best {args.best} must be at least 1")
    if args.csv is not None and args.csv != "-":
        file = Path(args.csv).absolute()
        if not file.parent.is_dir() or (file.exists() and not file.is_file()) or file.is_symlink():
            parser.error(printable(f"--csv: {file} cannot be written, for it is no file in a folder that is there"))
    if args.delete and (args.objective or args.best or args.csv):
        parser.error("--delete goes with --where and --yes alone: look at the table before")
    if args.yes and not args.delete:
        parser.error("--yes is for --delete")


def _print_table(runs: list[compare.Entry], args: argparse.Namespace) -> None:
    """The table of any runs, on the console or as CSV."""
    if not runs:
        raise FmexpError("None of the runs can be read.")
    objective, runs = compare.judged(runs, args.objective)
    keys = compare.differing(runs)
    shown = compare.with_differences(runs, keys) if len(runs) > 1 else runs  # of one, what was typed
    end = args.best and args.best + 1  # with the heads
    if args.csv:
        in_full = [replace(run, label=printable(str(run.folder))) for run in shown]
        csv = csv_text(table(Path(), in_full, None, objective)[:end])
        if args.csv == "-":
            return print(csv, end="")
        atomic.atomic_write(Path(args.csv).absolute(), csv)
    groups, twins = compare.replicates(shown, objective)
    rows = table(Path(), shown, objective=objective)[:end]
    for line in printed(rows, groups[:end], objective, args.csv or "the file of --csv", keys_too=True):
        print(line)
    counts = Counter(run.status for run in runs)
    said = ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name])
    print(f"\n{len(runs)} runs in {printable(str(compare.above([run.folder for run in runs])))}: {said}")
    print(f"ranked by {printable(objective)}: {'more' if maximised(objective) else 'less'} is better")
    if twins:
        more = f" and {len(twins) - 1} more such pairs" if len(twins) > 1 else ""
        print(f"the same run, which counts once as a replicate: {twins[0][0].name} and {twins[0][1].name}{more}")
    for number, run in enumerate(compare.best(runs, objective, args.best or 0), 1):
        print(f"\n{number}. {printable(objective)} {run.objective:.4f}: {printable(str(run.folder))}")
        print(f"  {compare.command(run.folder) or 'executed from Python: its configuration is in .hydra/config.yaml'}")


if __name__ == "__main__":
    process.open_console()
    main()
