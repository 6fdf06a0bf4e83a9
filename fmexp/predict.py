"""python -m fmexp.predict <run> <pictures or folders>...: the class and the probability of each picture."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmexp import messages, process
from fmexp.config.validate import check_device
from fmexp.errors import ConfigError, DataError, printable
from fmexp.rundir import atomic, results
from fmexp.tables import aligned, csv_text

if TYPE_CHECKING:  # torch is imported once the arguments are known to be right
    from torch import Tensor

    from fmexp.loading import Classifier


def main() -> None:
    """Print what a run's model says of pictures: python -m fmexp.predict <run> <pictures or folders>..."""
    process.require_alone("fmexp.predict")
    arguments = _parser().parse_args()
    with messages.instead_of_tracebacks():
        sys.exit(_predict(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    """The exit status: 1 where something cannot be read."""
    file: Path | None = arguments.csv
    check_device(arguments.device)
    results.read_complete(arguments.run)
    if file and not (folder := file.absolute().parent).is_dir():
        raise ConfigError(f"--csv {file}: there is no folder {folder}.")
    with process.block_signals():  # a signal's exception in the midst of torch's import aborts the process
        from fmexp.loading import load
    reader = Reader(load(arguments.run, arguments.device), arguments.pictures)
    rows = table(reader, arguments.top, ".9g" if file else ".4f")
    if file:
        try:
            atomic.atomic_write(file, csv_text(rows))
        except OSError as error:
            raise ConfigError(f"--csv {file} cannot be written: {error.strerror}") from error
        print(printable(f"{len(reader.read):,} pictures written to {file}"))
    elif reader.read:
        print(aligned(rows))
    process.require_output()
    return 1 if reader.problems else 0


class Reader:
    """The pictures of files, and of folders, of which all in or below are taken, as batches for a model.

    What cannot be read is named on stderr as soon as it is met. On a terminal a progress bar is shown.

    Attributes:
        files: the pictures, those of a folder sorted.
        read: those that were read so far.
        problems: what is wrong with the others, and with folders.
    """

    def __init__(self, classifier: "Classifier", names: Sequence[str]) -> None:
        self.classifier = classifier
        self.read: list[str] = []
        self.problems: list[str] = []
        self.files = [file for name in names for file in (self._walk(name) if os.path.isdir(name) else [name])]

    def batches(self) -> Iterator["Tensor"]:
        """What is read, as the model takes it: float32 [B, C, H, W], as many at once as in an evaluation."""
        import torch
        from PIL import Image
        from tqdm import tqdm

        from fmexp.datasets import pictures
        from fmexp.engine.evaluation import BATCH

        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of what is large and read all the same
        hidden = True if os.environ.get("TQDM_DISABLE") else None  # None: shown on a terminal alone
        images: list[Tensor] = []
        found = zip(self.files, pictures.attempt(self.classifier.open, self.files), strict=True)
        for file, image in tqdm(found, total=len(self.files), unit=" pictures", disable=hidden, leave=False):
            if isinstance(image, DataError):
                self._refuse(str(image))
                continue
            self.read.append(file)
            images.append(image)
            if len(images) == BATCH:
                yield torch.stack(images)
                images.clear()
        if images:
            yield torch.stack(images)

    def _walk(self, folder: str) -> list[str]:
        from fmexp.datasets.pictures import SUFFIXES, walk

        found = walk(folder, lambda error: self._refuse(f"{error.filename} cannot be read: {error.strerror}"))
        files = [os.path.join(*parts) for parts in sorted(found) if parts[1].lower().endswith(SUFFIXES)]
        if not files:
            self._refuse(f"{folder} has no picture ({', '.join(SUFFIXES)})")
        return files

    def _refuse(self, problem: str) -> None:
        from tqdm import tqdm

        self.problems.append(_line(problem))
        tqdm.write(self.problems[-1], file=sys.stderr)  # above the bar


def table(reader: Reader, top: int, digits: str) -> list[list[str]]:
    """Rows of text, the first the heads, for the pictures that can be read.

    Args:
        top: how many classes a row has, the most probable first.
        digits: the format of a probability.
    """
    classifier = reader.classifier
    top = min(top, len(classifier.classes))
    more = [head for place in range(2, top + 1) for head in (f"class {place}", f"probability {place}")]
    rows = [["file", "class", "probability", *more]]
    for probabilities in classifier.probabilities(reader.batches()):
        best = probabilities.argsort(descending=True, stable=True)[:, :top]  # of equal ones the first, as argmax
        values = probabilities.gather(1, best).tolist()
        for indices, numbers in zip(best.tolist(), values, strict=True):
            pairs = zip((classifier.classes[index] for index in indices), numbers, strict=True)
            cells = [cell for name, number in pairs for cell in (name, format(number, digits))]
            rows.append([_line(cell) for cell in (reader.read[len(rows) - 1], *cells)])
    return rows


def _line(text: str) -> str:
    """A text of a file, to be shown in one line."""
    return printable(text).replace("\n", "\\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmexp.predict",
        description="Print the class and the probability of pictures, as the model of a complete run has them. One "
        "that cannot be read is named on stderr and left out; the exit status is then 1.",
    )
    parser.add_argument("run", type=Path, help="its folder, such as runs/<date>/<time>. It calls the code that the "
                        "run's configuration names: use the runs alone of people you trust")  # fmt: skip
    parser.add_argument("pictures", nargs="+", help="files, and folders, of which all pictures in or below are taken")
    parser.add_argument("--top", type=_count, default=1, metavar="N", help="the N most probable classes of each; 1")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, with all digits")
    parser.add_argument("--device", default="cpu", help="auto, cpu (the default), cuda, cuda:1 or mps")
    return parser


if __name__ == "__main__":
    process.open_console()
    main()
