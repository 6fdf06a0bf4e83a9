"""What a sweep costs beside its training, and what side by side gains: python benchmarks/sweep.py [--members 50 200]

Prints a table. Sweeps are started as a user starts them, in processes of their own, in a temporary folder.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

BATCH = ("dataset=synthetic", "dataset.test_size=200", "device=cpu")
MLP = ("model=mlp", "model.hidden=[8]")


def sweep(root: Path, *words: str) -> float:
    """Execute a sweep; the seconds that it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "fmexp", "--multirun", *words, f"hydra.sweep.dir={root}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def processor() -> float:
    """The processor seconds of all sweeps so far, which other work on the machine disturbs less than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def trained(root: Path) -> float:
    """The seconds that the members themselves report."""
    return sum(json.loads(path.read_text())["seconds"] for path in root.glob("*/result.json"))


def cores_gain() -> float:
    """What as many processes as cores get done of a plain loop, against one: all that a launcher can gain here."""
    cores = len(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", "for number in range(30_000_000): number * number"]

    def seconds(processes: int) -> float:
        began = time.perf_counter()
        started = [subprocess.Popen(loop) for _ in range(processes)]
        for process in started:
            process.wait()
        return time.perf_counter() - began

    return cores * seconds(1) / seconds(cores)


def side_by_side(folder: Path, rounds: int) -> None:
    """16 members of 1,000 batches, joblib against basic, in turns; then the same without what a sweep needs to begin
    and to end, which is that of two members of one batch."""
    words = (*BATCH, "dataset.train_size=4000", "logging=light")
    wholes, rates, bounds = [], [], []
    for number in range(rounds):
        bounds.append(cores_gain())
        took = {}
        for launcher in ("basic", "joblib"):
            root, chosen = folder / f"{launcher}{number}", f"hydra/launcher={launcher}"
            few = sweep(root / "few", *words, chosen, "train.max_steps=1", "seed=1,2")
            took[launcher] = sweep(root / "many", *words, chosen, "seed=range(1,17)"), few
        (basic, basic_few), (joblib, joblib_few) = took.values()
        wholes.append(basic / joblib)
        rates.append((basic - basic_few) / (joblib - joblib_few))
        print(f"16 members x 1,000 batches   basic {basic:.1f} s   joblib {joblib:.1f} s   {wholes[-1]:.2f} times")
        print(f"    without start and end {basic_few:.1f} s and {joblib_few:.1f} s: {rates[-1]:.2f} times")
        print(f"    a plain loop in as many processes as cores: {bounds[-1]:.2f} times")
    whole, rate, bound = (statistics.median(values) for values in (wholes, rates, bounds))
    print(f"medians of {rounds}, on {len(os.sched_getaffinity(0))} cores: {whole:.2f} times, without start and end "
          f"{rate:.2f} (>= 1.8); a plain loop {bound:.2f}")  # fmt: skip


def kilobytes(root: Path, without: str = "") -> float:
    """KB a member, of all files but those named `without`."""
    members = [path.parent for path in root.glob("*/result.json")]
    sizes = [p.stat().st_size for m in members for p in m.rglob("*") if p.is_file() and p.name != without]
    return sum(sizes) / len(members) / 1000


def overhead(folder: Path, counts: list[int]) -> Path:
    """Members of 10 batches, logging=light, basic launcher: what all but the training costs."""
    words = (*BATCH, *MLP, "dataset.train_size=40", "logging=light")
    before = processor()
    start = statistics.median(sweep(folder / f"start{number}", *words, "seed=1") for number in range(3))
    start_processor = (processor() - before) / 3
    print(f"a sweep of one member takes {start:.2f} s, most of it to import torch; the others are counted without that")
    for count in counts:
        root = folder / f"light{count}"
        before = processor()
        whole = sweep(root, *words, f"seed=range(1,{count + 1})")
        each, within = (whole - start) / (count - 1), trained(root) / count
        print(
            f"{count:4} members x 10 batches   {each:.3f} s a member (<= 0.15 and flat), {within:.3f} s within its run"
        )
        busy = (processor() - before - start_processor) / (count - 1)
        print(f"    {busy:.3f} s of processor time a member")
        print(f"    {kilobytes(root):.1f} KB a member (<= 60), {kilobytes(root, 'model.pt'):.1f} without model.pt")
    sweep(folder / "lenet", *BATCH, "dataset.train_size=40", "logging=light", "seed=1,2")
    sizes = kilobytes(folder / "lenet"), kilobytes(folder / "lenet", "model.pt")
    print(f"a LeNet's member: {sizes[0]:.1f} KB, {sizes[1]:.1f} without model.pt")
    return root


def until_hparams(root: Path, rows: int) -> float:
    """Seconds from TensorBoard's start until its HPARAMS has all rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    body = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 2 * rows}
    url = f"http://127.0.0.1:{port}/data/plugin/hparams/session_groups"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={root}", f"--port={port}", "--host=127.0.0.1"]
    began, found = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while found < rows and time.perf_counter() < began + 300:
            with suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
                found = len(json.load(answer).get("sessionGroups", []))
            time.sleep(0.05)
        took = time.perf_counter() - began
        process.kill()
    print(f"TensorBoard over {rows} members answers HPARAMS with {found} rows after {took:.1f} s (<= 10)")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--rounds", type=int, default=3, help="of basic against joblib; 0: leave it out")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fmexp-sweep-"))
    try:
        root = overhead(folder, arguments.members)
        until_hparams(root, arguments.members[-1])
        if arguments.rounds:
            side_by_side(folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
