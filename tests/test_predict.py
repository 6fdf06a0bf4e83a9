"""`python -m fmexp.predict`: the run's accuracy from exported pictures, files of every kind, table, CSV, messages."""

import csv
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from program import Finished, environment, run
from tools import KEEP, KEPT, interrupt, small

import fmexp
from fmexp import datasets, execute, predict
from fmexp.engine.evaluation import Evaluation

PREDICT = (sys.executable, "-m", "fmexp.predict")
Command = Callable[..., Finished]


def export(data: datasets.Dataset, folder: Path) -> None:
    """The test images as PNG, named by their place."""
    folder.mkdir()
    assert isinstance(data.test, datasets.Split)
    for place, image in enumerate(data.test.images.numpy()):
        Image.fromarray(image[0]).save(folder / f"{place:05}.png")


def add_odd_files(folder: Path) -> dict[str, str]:
    """Files beside those of `export` that are pictures of other kinds, and others; what is said of the latter."""
    first = (folder / "00000.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 2**16, (30, 40), np.uint16)
    Image.fromarray(noise).save(folder / "00003-sixteen.png")
    Image.fromarray((noise >> 8).astype(np.uint8)).convert("RGBA").save(folder / "00007-rgba.png")
    frames = [Image.new("P", (40, 30), color) for color in (0, 200)]
    frames[0].save(folder / "00011-moving.gif.png", format="GIF", save_all=True, append_images=frames[1:])
    (folder / "00005-text.png").write_text("no picture")
    (folder / "00006-cut.png").write_bytes(first[: len(first) // 2])
    (folder / "00008-empty.png").touch()
    os.mkfifo(folder / "00009-pipe.png")
    (folder / "00010-gone.png").symlink_to("nowhere.png")
    Image.new("1", (14_000, 13_000)).save(folder / "00012-bomb.png")
    return {
        "00005-text.png": "is no picture (JPEG, PNG, WEBP, BMP, GIF)",
        "00006-cut.png": "image file is truncated",
        "00008-empty.png": "is empty",
        "00009-pipe.png": "is a folder, a named pipe or a device where a file is needed.",
        "00010-gone.png": "is a link to nowhere.png, which is not there",
        "00012-bomb.png": "Image size (182000000 pixels) exceeds limit of 178956970 pixels, "
        "could be decompression bomb DOS attack.",
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run on 1,100 test images, which are three batches."""
    folder = tmp_path_factory.mktemp("done") / "run"
    execute(small("logging=light", KEEP, "dataset.test_size=1100", "train.epochs=3", "optimizer=adam"), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "test"
    export(KEPT[str(done)][1], folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the program in this process."""

    def call(*words: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            predict.main()
        out, err = capsys.readouterr()
        code = left.value.code
        return Finished(code if isinstance(code, int) else 1, out, err)

    return call


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def accuracy(rows: list[dict[str, str]], kept: tuple[Evaluation, datasets.Dataset]) -> float:
    """Of rows of the exported test images."""
    evaluation, data = kept
    pairs = zip(rows, evaluation.labels.tolist(), strict=True)
    return sum(row["class"] == data.classes[label] for row, label in pairs) / len(rows)


def probabilities(rows: list[dict[str, str]]) -> torch.Tensor:
    return torch.tensor([float(row["probability"]) for row in rows])


# The accuracy of the run


def test_exported_pictures_have_the_accuracy_of_the_run(
    done: Path, pictures: Path, tmp_path: Path, command: Command
) -> None:
    ended = command(done, pictures, "--csv", tmp_path / "said.csv")
    assert ended == Finished(0, f"1,100 pictures written to {tmp_path / 'said.csv'}\n", "")
    rows = read_csv(tmp_path / "said.csv")
    assert [row["file"] for row in rows] == [str(pictures / f"{place:05}.png") for place in range(1100)]
    metric = json.loads((done / "result.json").read_text())["metrics"]["test/accuracy"]
    assert accuracy(rows, KEPT[str(done)]) == metric > 0.2
    assert torch.equal(probabilities(rows), KEPT[str(done)][0].probabilities.amax(1))
    reader = predict.Reader(fmexp.load(done), [str(pictures)])
    assert [len(batch) for batch in reader.batches()] == [500, 500, 100], "as in an evaluation, for the last bits"


def test_real_test_split_as_png_has_the_accuracy_of_the_run_also_among_odd_files(
    fashion_mnist_root: str, tmp_path: Path
) -> None:
    execute(
        fmexp.compose([f"dataset.root={fashion_mnist_root}", "device=cpu", "train.batch_size=256", "optimizer.lr=0.05",
                       "train.max_steps=200", "logging=light", KEEP]),
        tmp_path / "run",
    )  # fmt: skip
    evaluation, data = kept = KEPT[str(tmp_path / "run")]
    export(data, tmp_path / "test")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "run", elsewhere / "moved")
    metric = json.loads((elsewhere / "moved" / "result.json").read_text())["metrics"]["test/accuracy"]

    ended = run("moved", "../test", "--csv", "said.csv", cwd=elsewhere, command=PREDICT)
    assert ended == Finished(0, "10,000 pictures written to said.csv\n", "")
    rows = read_csv(elsewhere / "said.csv")
    assert accuracy(rows, kept) == metric > 0.7
    assert torch.equal(probabilities(rows), evaluation.probabilities.amax(1))

    said = add_odd_files(tmp_path / "test")
    ended = run("moved", "../test", "--csv", "said.csv", cwd=elsewhere, command=PREDICT)
    assert (ended.status, ended.out) == (1, "10,003 pictures written to said.csv\n")
    assert ended.err.splitlines() == [f"{elsewhere / '../test' / name} {what}" for name, what in said.items()]
    rows = [row for row in read_csv(elsewhere / "said.csv") if "-" not in row["file"]]
    assert accuracy(rows, kept) == metric
    # Each image is at another place in its batch, and kernels round by that.
    assert torch.allclose(probabilities(rows), evaluation.probabilities.amax(1), rtol=0, atol=1e-6)


# Files and folders


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(
    done: Path, pictures: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    shutil.copy(pictures / "00000.png", folder)
    said = add_odd_files(folder)
    ended = command(done, folder, tmp_path / "nowhere.png", pictures / "00001.png")
    assert ended.status == 1
    assert ended.err.splitlines() == [
        *(f"{folder / name} {what}" for name, what in said.items()),
        f"{tmp_path / 'nowhere.png'} No such file or directory",
    ]
    names = [line.split()[0] for line in ended.out.splitlines()]
    odd = ("00000.png", "00003-sixteen.png", "00007-rgba.png", "00011-moving.gif.png")
    assert names == ["file", *(str(folder / name) for name in odd), str(pictures / "00001.png")]


def test_folders_are_walked_in_order_without_hidden_files_and_loops(
    done: Path, pictures: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.png", "b/10.PNG", "a/c/1.png", "a/.hidden.png", ".git/0.png", "b/Thumbs.db", "b/notes.txt"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / "00000.png", tmp_path / "all" / name)
    (tmp_path / "all" / "a" / "again").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "d").symlink_to(pictures / "00001.png")
    (tmp_path / "all" / "e.png").symlink_to(pictures / "00001.png")
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    ended = command(done, "all", "none", "all/a/.hidden.png", "all/b/notes.txt")
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert names == ["file", "all/e.png", "all/a/c/1.png", "all/b/10.PNG", "all/b/2.png", "all/a/.hidden.png",
                     "all/b/notes.txt"]  # fmt: skip
    assert (ended.status, ended.err) == (1, "none has no picture (.jpg, .jpeg, .png, .webp, .bmp)\n")


def odd_names(**keys: Any) -> datasets.Dataset:
    """A dataset whose classes are named as formulas and over two lines."""
    split = datasets.Split(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1) * 30, torch.arange(8) % 2)
    return datasets.Dataset(split, split, ["=HYPERLINK(1)", "two\nlines\x1b[2J"])


def test_names_are_shown_in_one_line_and_no_cell_is_a_formula(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(small("logging=light", KEEP, "dataset._target_=test_predict.odd_names", "model=mlp"), tmp_path / "run")
    file = os.fsencode(tmp_path) + b"/+cmd\n\xff.png"
    Image.new("L", (5, 5)).save(os.fsdecode(file))
    probabilities = fmexp.load(tmp_path / "run").predict([Image.new("L", (5, 5))])[0]
    best = probabilities.argsort(descending=True).tolist()
    shown, cells = ["=HYPERLINK(1)", "two\\nlines\\x1b[2J"], ["'=HYPERLINK(1)", "two\\nlines\\x1b[2J"]
    monkeypatch.chdir(tmp_path)
    ended = command("run", os.fsdecode(b"+cmd\n\xff.png"), "--top", "5")
    first, second = (f"{shown[c]}  {probabilities[c]:.4f}" for c in best)
    assert (ended.status, ended.err) == (0, "")
    heads, row = ended.out.splitlines()
    assert heads.split() == ["file", "class", "probability", "class", "2", "probability", "2"]
    assert " ".join(row.split()) == " ".join(f"+cmd\\n\\udcff.png {first} {second}".split())
    assert command("run", os.fsdecode(b"+cmd\n\xff.png"), "--top", "2", "--csv", "said.csv").status == 0
    heads_of_csv, row_of_csv = csv.reader((tmp_path / "said.csv").read_text().splitlines())
    assert heads_of_csv == ["file", "class", "probability", "class 2", "probability 2"]
    assert row_of_csv[::2] == ["'+cmd\\n\\udcff.png", *(f"{probabilities[c]:.9g}" for c in best)]
    assert row_of_csv[1::2] == [cells[c] for c in best]


# What is refused, and when


WRONG = {
    "nowhere x.png": (1, "holds no run: it is no folder. Name the folder of one run"),
    "stopped x.png": (1, "has no trained weights: it was stopped"),
    "run x.png --device gpu": (1, "device=gpu must be auto, cpu, mps, cuda or cuda:<number>."),
    "run x.png --csv no/said.csv": (1, "--csv no/said.csv: there is no folder "),
    "run x.png --top 0": (2, "argument --top: 0 is no whole number from 1 on"),
    "run x.png --top many": (2, "argument --top: many is no whole number from 1 on"),
    "run": (2, "the following arguments are required: pictures"),
    "--help": (0, ""),
}
PROGRAM = "import sys; sys.argv = ['predict', *sys.argv[1:]]; from fmexp import predict\n" \
          "try: predict.main()\nfinally: print('torch imported:', 'torch' in sys.modules)"  # fmt: skip


def test_wrong_arguments_are_told_at_once_without_importing_torch(done: Path, tmp_path: Path) -> None:
    interrupt(small("logging=light"), tmp_path / "stopped", 2)
    shutil.copytree(done, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    for words, (status, said) in WRONG.items():
        ended = run("-c", PROGRAM, *words.split(), cwd=tmp_path, command=(sys.executable,))
        assert (ended.status, "Traceback" in ended.err) == (status, False), words
        assert said in ended.err, words
        assert ended.out.endswith("torch imported: False\n"), words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_that_cannot_be_written_is_told(done: Path, pictures: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "said.csv").mkdir()
    ended = command(done, pictures / "00000.png", "--csv", tmp_path / "said.csv")
    assert ended == Finished(1, "", f"--csv {tmp_path / 'said.csv'} cannot be written: Is a directory\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "said.csv"]


def test_output_that_is_lost_is_told(done: Path, pictures: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    words = shlex.join([*PREDICT, str(done), str(pictures / "00000.png")])
    lost = run("-c", f"{words} > /dev/full", cwd=tmp_path, command=("sh",))
    assert lost == Finished(1, "", "The output cannot be written: No space left on device.\n")


def test_a_terminal_has_a_bar_and_messages_above_it(done: Path, pictures: Path, tmp_path: Path) -> None:
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    (tmp_path / "text.png").write_text("no picture")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # 24 lines of 200 columns
    words = [*PREDICT, str(done), str(pictures), str(tmp_path / "text.png"), "--csv", "said.csv"]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    with suppress(OSError):  # so Linux says that the other side is closed
        while chunk := os.read(ours, 4096):
            screen += chunk
    os.close(ours)
    assert process.wait() == 1, screen.decode()
    lines = screen.decode().splitlines()  # at each \r, too
    assert any("/1101 [" in line and " pictures/s" in line for line in lines)
    assert f"{tmp_path / 'text.png'} is no picture (JPEG, PNG, WEBP, BMP, GIF)" in lines
    assert lines[-1] == "1,100 pictures written to said.csv"
    assert len(read_csv(tmp_path / "said.csv")) == 1100
