"""Print the table of docs/performance.md: what fmexp's speed is, against the tutorial's script and bare loops.

    FMEXP_DATA=<folder with FashionMNIST/raw> python benchmarks/run.py [--rows whole training ...] [options]

Everything is measured in turns (A B A B), on the wall clock, and medians are compared: run it on an idle machine.
This process imports no torch, for a child's peak memory begins with that of its parent.
"""

import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPERIMENT = ["-m", "fmexp", "experiment=tutorial", "device=cpu"]
LOOPS = [  # model, batch size, batches
    ("lenet", 4, 3000), ("lenet", 64, 400), ("lenet", 512, 60),
    ("mlp", 4, 3000), ("mlp", 64, 800), ("mlp", 512, 100),
    ("resnet18", 4, 60), ("resnet18", 64, 30), ("resnet18", 512, 3),
]  # fmt: skip
DATASET_BYTES = 70_000 * (28 * 28 + 8)  # uint8 images and int64 labels


def child(*arguments: str) -> tuple[float, int, str]:
    """Run Python with arguments; its wall-clock seconds, its peak memory in bytes, its last line."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as users have it
    with tempfile.TemporaryFile("w+") as out:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{said}")
    lines = [line for line in said.splitlines() if line.strip()]
    return seconds, usage.ru_maxrss * 1024, lines[-1] if lines else ""


class Bench:
    """The rows, each yielding (work, fmexp, what against, its figure, ratio, at least)."""

    def __init__(self, scratch: Path, pairs: int, quick: bool, device: str) -> None:
        self.scratch, self.pairs, self.device = scratch, pairs, device
        self.batches = 1500 if quick else 15_000
        self.scale = 10 if quick else 1
        self.number = 0

    def folder(self) -> str:
        self.number += 1
        return str(self.scratch / f"run{self.number}")

    def tutorial(self) -> tuple[float, int, dict]:
        seconds, peak, last = child(
            str(HERE / "tutorial.py"), str(self.scratch / "data"), self.folder(), str(self.batches)
        )
        return seconds, peak, json.loads(last)

    def fmexp(self) -> tuple[float, int, dict]:
        folder = self.folder()
        seconds, peak, _ = child(*EXPERIMENT, f"train.max_steps={self.batches}", f"hydra.run.dir={folder}")
        return seconds, peak, json.loads((Path(folder) / "result.json").read_text())

    def whole(self) -> Iterator[tuple]:
        """Whole processes, their accuracies and their peak memory."""
        ours, theirs = self.turns(self.fmexp, self.tutorial)
        a, b = median(ours, 0), median(theirs, 0)
        found = statistics.median(run[2]["metrics"]["test/accuracy"] for run in ours)
        expected = statistics.median(run[2]["accuracy"] for run in theirs)
        work = f"tutorial, whole process, {self.batches:,} batches"
        yield work, f"{a:.1f} s", "tutorial's script", f"{b:.1f} s", b / a, 4
        yield "its test accuracy", f"{found:.3f}", "tutorial's script", f"{expected:.3f}", found / expected, 0.97
        a, b = median(ours, 1), median(theirs, 1) + DATASET_BYTES
        yield "its peak memory", f"{a / 1e6:.0f} MB", "tutorial's + dataset", f"{b / 1e6:.0f} MB", b / a, 1
        parts = {name: statistics.median(run[2]["seconds"][name] for run in theirs) for name in theirs[0][2]["seconds"]}
        print("the tutorial's parts:", ", ".join(f"{name} {value:.2f} s" for name, value in parts.items()))

    def training(self) -> Iterator[tuple]:
        """Training loops, each in a process of its own."""
        for model, size, count in LOOPS:
            batches = max(2, count // self.scale)
            *_, last = child(str(HERE / "loops.py"), "training", str(self.pairs), str(batches),
                             f"device={self.device}", f"model={model}", f"train.batch_size={size}")  # fmt: skip
            seconds = {name: statistics.median(values) / batches for name, values in json.loads(last).items()}
            a = seconds.pop("fmexp")
            for name, b in seconds.items():
                yield f"training, {model}, batch {size}", f"{a * 1e3:.2f} ms", name, f"{b * 1e3:.2f} ms", b / a, 1

    def options(self) -> Iterator[tuple]:
        """Cosine, clipping, an average of the weights and label smoothing, against the same written by hand."""
        for model, size, count in LOOPS:
            batches = max(2, count // self.scale)
            *_, last = child(str(HERE / "loops.py"), "options", str(self.pairs), str(batches),
                             f"device={self.device}", f"model={model}", f"train.batch_size={size}")  # fmt: skip
            seconds = {name: statistics.median(values) / batches for name, values in json.loads(last).items()}
            a, b, low = (seconds[name] for name in ("fmexp", "bare", "fmexp, bf16"))
            work = f"cosine, clip, average, smoothing: {model}, batch {size}"
            yield work, f"{a * 1e3:.2f} ms", "bare", f"{b * 1e3:.2f} ms", b / a, 0.95
            yield work, f"{low * 1e3:.2f} ms with bf16", "with 32", f"{a * 1e3:.2f} ms", a / low, 0

    def networks(self) -> Iterator[tuple]:
        """Networks of torchvision and timm, 32x32, a training step as the rules have it against PyTorch's defaults."""
        lines = subprocess.Popen(
            [sys.executable, str(HERE / "networks.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )  # fmt: skip
        for line in lines.stdout or ():
            if not line.startswith("{"):
                continue  # what timm says of what it misses
            cell = json.loads(line)
            work = cell["network"]
            if "skipped" in cell:
                print(f"{work} is skipped: {cell['skipped']}")
                continue
            work = f"{work}, batch {cell['size']}"
            if cell["ms"] is None:
                yield work, "the default", "PyTorch's defaults", "the same", 1, 0.97
            else:
                a, b = cell["ms"]
                yield f"{work}: {cell['how']}", f"{a:.2f} ms", "PyTorch's defaults", f"{b:.2f} ms", b / a, 0.97
        if lines.wait():
            raise SystemExit("networks.py failed: run it by itself to see why")

    def processes(self) -> Iterator[tuple]:
        """resnet18 by two processes of one thread, against plain DistributedDataParallel and one process of two."""
        batches = max(2, 30 // self.scale)
        words = [str(batches), "device=cpu", "model=resnet18", "train.batch_size=64"]
        script, torchrun = str(HERE / "loops.py"), ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        pairs = [  # of which the first of a process, who pays for what is done once, does not count
            [json.loads(child(*start, script, what, "2", *words)[2])
             for start, what in ((torchrun, "processes"), ([], "training"))]
            for _ in range(self.pairs)
        ]  # fmt: skip
        two, one = ({name: statistics.median(pair[k][name][-1] for pair in pairs) / batches for name in pairs[0][k]}
                    for k in (0, 1))  # fmt: skip
        plain, work = two.pop("DistributedDataParallel"), "resnet18, batch 64, two processes"
        for name, a in two.items():
            own = name.removeprefix("fmexp")
            yield work + own, f"{a * 1e3:.1f} ms", "plain DDP", f"{plain * 1e3:.1f} ms", plain / a, 0.95
        a, b = two["fmexp"], one["fmexp"]
        yield work, f"{a * 1e3:.1f} ms", "one process, two threads", f"{b * 1e3:.1f} ms", b / a, 0.5

    def data(self) -> Iterator[tuple]:
        """The second epoch on data that is loaded or augmented, batch 64, against a plain loop with a DataLoader."""
        fashion, pictures = str(self.scratch / "data"), self.scratch / "pictures"
        root, few = f"dataset.root={fashion}", f"{pictures}/few"
        draw(pictures, 20_000 // self.scale)
        folder = ["dataset=image_folder", f"dataset.cache_dir={self.scratch}/cache"]
        images = [*folder, f"dataset.root={few}", "dataset.image_size=32"]
        kinds = [("map-style, crop and flip, lenet", "map", fashion, (0, 2), 0.95, [root]),
                 ("pictures in memory, lenet", "pictures", few, (0, 2), 3, [*images, "dataset.cache=memory"]),
                 ("pictures on disk, lenet", "pictures", few, (0, 2), 2, [*images, "dataset.cache=disk"]),
                 ("augment=crop_flip, mlp", "memory", fashion, (0,), 4, [root, "augment=crop_flip", "model=mlp"]),
        ]  # fmt: skip
        for name, kind, place, counts, least, overrides in kinds:
            if "crop_flip" in name and not (HERE.parent / "conf" / "augment" / "crop_flip.yaml").exists():
                print(f"{name} is skipped: there is no such option")
                continue
            for workers in counts:
                part = self.scale if place == fashion else 1
                *_, last = child(str(HERE / "loops.py"), "data", str(self.pairs), kind, str(workers), place, str(part),
                                 *overrides)  # fmt: skip
                a, b = (statistics.median(json.loads(last)[who]) for who in ("fmexp", "plain"))
                yield name, f"{a:.2f} s", f"plain, {workers} workers", f"{b:.2f} s", b / a, least
        own = [json.loads(child(str(HERE / "loops.py"), "memory", "1", *folder, "dataset.image_size=64", "model=mlp",
                                "train.batch_size=64", "dataset.cache=disk", f"dataset.root={pictures}/{size}")[2])
               ["fmexp"][0] / 1e6 for size in ("many", "few")]  # fmt: skip
        work = f"memory, disk cache, {20_000 // self.scale:,} pictures"
        yield work, f"{own[0]:.0f} MB", "a tenth of them", f"{own[1]:.0f} MB", own[1] / own[0], 0.95

    def evaluation(self) -> Iterator[tuple]:
        """The test split's 10,000 images and what is written of them."""
        ours, theirs = self.turns(
            lambda: json.loads(child(str(HERE / "loops.py"), "evaluation", "3")[2])["fmexp"],
            lambda: json.loads(
                child(str(HERE / "tutorial.py"), str(self.scratch / "data"), self.folder(), "1")[2]
            )["seconds"]["evaluation"],
        )  # fmt: skip
        first, a = statistics.median(run[0] for run in ours), statistics.median(run[-1] for run in ours)
        b = statistics.median(theirs)
        yield "evaluation, stages, first in a process", f"{first:.2f} s", "tutorial's", f"{b:.2f} s", b / first, 10
        yield "evaluation, stages, later", f"{a:.2f} s", "tutorial's", f"{b:.2f} s", b / a, 10

    def sweep(self) -> Iterator[tuple]:
        """16 members side by side on two cores; the tutorial's script 16 times is 16 times its median."""
        seeds = ",".join(map(str, range(16)))

        def ours() -> float:
            return child("-m", "fmexp", "-m", "hydra/launcher=joblib", *EXPERIMENT[2:], f"seed={seeds}",
                         f"train.max_steps={self.batches}", f"hydra.sweep.dir={self.folder()}")[0]  # fmt: skip

        a, b = (statistics.median(values) for values in self.turns(ours, lambda: 16 * self.tutorial()[0]))
        work = f"sweep of 16, joblib, {self.batches:,} batches"
        yield work, f"{a:.1f} s", "tutorial's script x 16", f"{b:.1f} s", b / a, 9

    def start(self) -> Iterator[tuple]:
        """--cfg job: its time, and that torch stays out."""
        job = ["-m", "fmexp", "--cfg", "job"]
        show = "import sys, fmexp.cli; sys.argv[1:] = ['--cfg', 'job']; fmexp.cli.main(); print('torch' in sys.modules)"
        if child("-c", show)[2] != "False":
            raise SystemExit("--cfg job imports torch")
        pairs, self.pairs = self.pairs, max(7, self.pairs)
        ours, theirs = self.turns(lambda: child(*job)[0], lambda: child("-c", "import hydra")[0])
        self.pairs = pairs
        a, b = statistics.median(ours), statistics.median(theirs)
        yield "--cfg job (no torch)", f"{a:.2f} s", "import hydra", f"{b:.2f} s", b / a, 0.5

    def turns(self, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[list, list]:
        results = [(ours(), theirs()) for _ in range(self.pairs)]
        return [pair[0] for pair in results], [pair[1] for pair in results]


def median(runs: list, index: int) -> float:
    return statistics.median(run[index] for run in runs)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def draw(folder: Path, count: int) -> None:
    """`few`: JPEGs of 160x128 in two classes, half of them for the test; `many`: `count`, each ten times, by links."""
    from numpy.random import default_rng
    from PIL import Image

    rng = default_rng(0)
    for number in range(count // 10):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 20, 3), "uint8"))
        place = Path(("train", "test")[number % 2], "ab"[number // 2 % 2])
        first = folder / "few" / place / f"{number}.jpg"
        for other in (first.parent, folder / "many" / place):
            other.mkdir(parents=True, exist_ok=True)
        coarse.resize((160, 128)).save(first)
        for copy in range(10):
            os.link(first, folder / "many" / place / f"{number}_{copy}.jpg")


def unpack(folder: Path) -> None:
    """Fashion-MNIST as torchvision wants it, from the packed files or the unpacked ones."""
    raw = Path(os.environ.get("FMEXP_DATA", "data")) / "FashionMNIST" / "raw"
    if not raw.is_dir():
        raise SystemExit(f"{raw} is not there: set FMEXP_DATA to a folder with FashionMNIST/raw")
    target = folder / "FashionMNIST" / "raw"
    target.mkdir(parents=True)
    for path in raw.iterdir():
        if path.suffix == ".gz":
            with gzip.open(path) as packed, open(target / path.stem, "wb") as file:
                shutil.copyfileobj(packed, file)
        else:
            shutil.copy(path, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = ["whole", "training", "options", "data", "networks", "processes", "evaluation", "sweep", "start"]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="which rows")
    parser.add_argument("--pairs", type=int, default=3, help="how often each of two is measured")
    parser.add_argument("--quick", action="store_true", help="a tenth of the batches; says how it works, not how fast")
    parser.add_argument("--device", default="cpu", help="of the training loops: cpu, cuda; other rows are the CPU's")
    chosen = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "hydra-core", "tensorboard"))
    print(f"{len(os.sched_getaffinity(0))} cores, {processor()}; Python {platform.python_version()}, {versions}")
    quick = ", QUICK: a tenth of the batches" if chosen.quick else ""
    print(f"{chosen.pairs} pairs, load at the start {os.getloadavg()[0]:.1f}{quick}\n")
    print("| work | fmexp | against | its figure | ratio | at least |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if {"whole", "data", "evaluation", "sweep"} & set(chosen.rows):
            unpack(Path(scratch) / "data")
        bench = Bench(Path(scratch), chosen.pairs, chosen.quick, chosen.device)
        for row in chosen.rows:
            for work, ours, against, theirs, ratio, least in getattr(bench, row)():
                verdict = "" if ratio >= least else " (falls short)"
                print(f"| {work} | {ours} | {against} | {theirs} | {ratio:.2f}{verdict} | {least} |", flush=True)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
