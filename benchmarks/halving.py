"""What hydra/sweeper=halving saves, and whether kills change it: 27 members on the real Fashion-MNIST against the grid.

    FMEXP_DATA=<folder with FashionMNIST/raw> python benchmarks/halving.py <empty folder>

First the grid of nine learning rates and three momenta, then the same by halving, undisturbed; then by halving again
with 1 and with 2 workers, each killed three times at random, with all its processes. Decisions are compared by
rungs.json and statuses, bits by the SHA-256 of model.pt and of all scalars.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from fmexp import sweep

GRID = (
    "model=lenet", "train.batch_size=64", "train.log_every=50", "train.validation=0.1", "objective=val/accuracy",
    "logging=light", "device=cpu", "backend.threads=1", "optimizer.lr=1,0.3,0.1,0.03,0.01,0.003,0.001,0.0003,0.0001",
    "optimizer.momentum=0,0.5,0.9",
)  # fmt: skip
HALVING = ("hydra/sweeper=halving",)
WORKERS = {n: ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={n}") for n in (1, 2)}


def start(root: Path, *words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fmexp", "--multirun", *GRID, *words, f"hydra.sweep.dir={root}"]
    with root.with_suffix(".txt").open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def run(root: Path, *words: str) -> float:
    """Execute a sweep to its end, and return the seconds that it took."""
    began = time.monotonic()
    if start(root, *words).wait() != 0:
        sys.exit(root.with_suffix(".txt").read_text())
    return time.monotonic() - began


def kill(root: Path, *words: str, after: int, and_s: float) -> None:
    """Start a sweep and SIGKILL it with its workers, which have process groups of their own, some seconds after so many
    values of rungs are there."""
    process = start(root, *words)
    while noted(root) < after and process.poll() is None:
        time.sleep(0.05)
    time.sleep(and_s)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [process.pid, *map(int, children.read_text().split())] if children.exists() else [process.pid]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    states = Counter(m.status for m in sweep.read(root))
    print(f"  killed at {noted(root)} values of rungs; members: {dict(states)}", flush=True)


def noted(root: Path) -> int:
    return sum(len(json.loads(path.read_text())) for path in root.glob("*/rungs.json"))


def decisions(root: Path) -> dict[str, object]:
    return {m.folder.name: (m.status, m.rungs) for m in sweep.read(root)}


def digests(root: Path) -> dict[str, tuple[str, str]]:
    """SHA-256 of model.pt and of every scalar with its step, of each complete member."""
    found = {}
    for member in sweep.read(root):
        if member.status == "complete":
            scalars = {tag: points for tag, points in member.scalars.items() if tag != "wall_seconds"}
            contents = ((member.folder / "model.pt").read_bytes(), json.dumps(scalars, sort_keys=True).encode())
            found[member.folder.name] = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("words", nargs="*", help="more overrides of the halving sweeps")
    args = parser.parse_intermixed_args()
    args.folder.mkdir(exist_ok=True)
    words, chosen = (*HALVING, *args.words), random.Random(args.seed)
    whole = run(args.folder / "grid", *WORKERS[2])
    grid = sweep.ranked(sweep.read(args.folder / "grid"), "val/accuracy")
    print(f"grid: {sum(m.steps for m in grid):,} batches, {whole:.0f} s with 2 workers; best:")
    for member in grid[:3]:
        print(
            f"  {member.name}: val/accuracy {member.objective:.4f}, test/accuracy {member.metrics['test/accuracy']:.4f}"
        )
    seconds = run(args.folder / "halving", *words, *WORKERS[2])
    truth, first = args.folder / "halving", sweep.read(args.folder / "halving")
    print(f"halving: {sum(m.steps for m in first):,} batches, {seconds:.0f} s with 2 workers")
    lines = truth.with_suffix(".txt").read_text().splitlines()
    print("\n".join(f"  {line}" for line in lines if line.startswith(("halving of", "after ", "trained "))))
    for member in (m for m in sweep.ranked(first, "val/accuracy") if m.status == "complete"):
        print(f"  complete: {member.name}: val/accuracy {member.objective:.4f}")
    last = max(max(m.rungs) for m in first if m.rungs)
    print(f"  the grid's best came to the last rung: {last in next(m for m in first if m.name == grid[0].name).rungs}")
    alone, ours = digests(args.folder / "grid"), digests(truth)
    print(f"  survivors have the bits of the grid's members: {all(alone[name] == ours[name] for name in ours)}")
    for workers, launcher in WORKERS.items():
        root = args.folder / f"killed{workers}"
        print(f"{workers} worker(s), killed three times:")
        for after in sorted(chosen.sample(range(noted(truth) + 1), 3)):
            kill(root, *words, *launcher, after=after, and_s=chosen.uniform(0, 3))
        run(root, *words, *launcher)
        same = decisions(root) == decisions(truth)
        print(f"  the same decisions: {same}; the same bits: {digests(root) == ours}")


if __name__ == "__main__":
    main()
