"""The program as people call it: help without torch, runs and sweeps in folders of their own, own code, going on."""

import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from program import CHECKOUT, PYTHON, Finished, call, environment, run, start
from program import finish as finished
from tools import SMALL, read_events, result, scalars, weights, write_idx_splits

import fmexp
from fmexp import cli, compose, execute
from fmexp.__main__ import main
from fmexp.build import build
from fmexp.config import conf_dir, resolved
from fmexp.config.overrides import quote, resume_command
from fmexp.process import available_cores
from fmexp.run import Run

SCRIPT = Path(sys.executable).with_name("fmexp")
QUICK = (*SMALL, "logging=light", "train.max_steps=4")
RUN_FOLDER = r"runs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}"
COMPLETE = {".hydra", "fmexp.log", "model.pt", "result.json"}  # and events.out.tfevents.*

WITHOUT_TORCH = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        needless = ("torch", "tensorboard", "matplotlib", *["fmexp.sweep"] * ("--multirun" not in sys.argv))
        if name.startswith(needless):
            raise ImportError(f"{name} was asked for")

sys.meta_path.insert(0, Refuse())
sys.argv[0] = "fmexp"
from fmexp.cli import main
main()
"""


def composed(folder: Path) -> DictConfig:
    """The configuration that a run wrote."""
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def assert_complete(folder: Path) -> None:
    """Check that all of a run's files are in its folder, and say that it is complete."""
    assert {path.name for path in folder.iterdir()} >= COMPLETE
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in (folder / ".hydra").iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "lineage.json",
        "overrides.yaml",
    }
    assert result(folder)["status"] == "complete"
    keep = composed(folder).train.keep_checkpoint
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint.pt"] * keep


def members(sweep: Path) -> list[Path]:
    """The folders of a sweep's members, in the order of their numbers."""
    return sorted((path.parent for path in sweep.glob("*/.hydra")), key=lambda path: int(path.name.partition("_")[0]))


# Help, configuration and completion, at once and without torch


def without_torch(*words: str, cwd: Path, **env: str) -> Finished:
    return run(*words, cwd=cwd, command=(sys.executable, "-c", WITHOUT_TORCH), env=environment(**env))


@pytest.fixture(scope="module")
def help_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    done = without_torch("--help", cwd=tmp_path_factory.mktemp("help"))
    assert (done.status, done.err) == (0, "")
    return done.out


@pytest.mark.parametrize(
    "group", sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name not in ("hydra", "stage"))
)
def test_help_lists_every_option_of_a_group(group: str, help_text: str) -> None:
    listed = re.search(rf"^ {{2}}{group}  +(.*(?:\n {{10,}}.*)*)$", help_text, re.MULTILINE)
    assert listed
    names = re.sub(r"\(chosen\)", "", listed[1])
    options = [name for name in re.split(r"[\s,]+", names) if name]
    assert sorted(options) == sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def test_help_lists_every_stage(help_text: str) -> None:
    listed = re.search(r"^Stages[^:]*:\n((?:  +.*\n)+)", help_text, re.MULTILINE)
    assert listed
    names = re.split(r"[\s,]+", listed[1].strip())
    assert sorted(names) == sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml"))


def test_help_shows_examples_output_and_every_key_within_80_columns(help_text: str) -> None:
    assert "python -m fmexp dataset=synthetic" in help_text
    assert "python -m fmexp -m optimizer.lr=0.1,0.01" in help_text
    assert "--config-dir" in help_text
    assert "runs/<date>/<time>/" in help_text
    assert "multirun/<date>/<time>/<member>/" in help_text
    assert "tensorboard --logdir" in help_text
    assert [line for line in help_text.splitlines() if len(line) > 80 and "://" not in line] == []
    assert "  model        lenet (chosen), " in help_text
    configuration = help_text.partition("(key=value):\n")[2]
    assert OmegaConf.create(configuration) == OmegaConf.create(OmegaConf.to_yaml(compose()))


def test_examples_of_the_help_compose(help_text: str) -> None:
    lines = [line.partition("python -m fmexp")[2] for line in help_text.splitlines() if "python -m fmexp " in line]
    examples = [shlex.split(re.split(r" {3,}", line)[0]) for line in lines]
    own = [words for words in examples if "--config-dir" in words]
    assert len(examples) >= 5
    assert own == [["--config-dir", "my_conf", "model=mine"]]  # which nobody has
    for words in examples:
        if words not in own:
            compose([word.partition(",")[0] for word in words if word != "-m"])


def test_configuration_is_shown_without_torch(tmp_path: Path) -> None:
    done = without_torch("--cfg", "job", "optimizer=adam", "optimizer.lr=0.5", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    expected = compose(["optimizer=adam", "optimizer.lr=0.5"])
    assert OmegaConf.create(done.out) == OmegaConf.create(OmegaConf.to_yaml(expected))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line", "shown"),
    [
        (("--info", "defaults-tree"), "", "schema/optimizer/sgd"),
        (("--info", "searchpath"), "", str(conf_dir())),
        (("--hydra-help",), "", "--multirun"),
        (("--version",), "", f"fmexp {fmexp.__version__} (hydra-core {hydra.__version__})\n"),
        (("--shell-completion", "query=bash"), "fmexp optimizer=ad", "optimizer=adam optimizer=adamw"),
        (("--shell-completion", "query=bash"), "fmexp stage.pr_curves.num", "stage.pr_curves.num_thresholds="),
        (("--multirun", "optimizer.lr=0.1,0.2", "sweep.dry_run=true"), "", "0.2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_information_without_torch(words: tuple[str, ...], line: str, shown: str, tmp_path: Path) -> None:
    done = without_torch(*words, cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert (done.status, done.err) == (0, "")
    assert shown in done.out


def test_torch_is_refused_where_a_run_needs_it(tmp_path: Path) -> None:
    done = without_torch(*SMALL, cwd=tmp_path)
    assert done.status == 1
    assert "torch was asked for" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs fmexp installed: pip install -e .")
def test_same_program_from_checkout_from_elsewhere_and_as_a_script(tmp_path: Path) -> None:
    bare = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    from_checkout = run("--cfg", "job", cwd=CHECKOUT, env=bare)
    elsewhere = run("--cfg", "job", cwd=tmp_path)
    script = run("--cfg", "job", cwd=tmp_path, command=(str(SCRIPT),), env=bare)
    assert from_checkout.out.startswith("seed: 0\n")
    assert from_checkout == elsewhere == script == Finished(0, from_checkout.out, "")


def redirected(words: Sequence[str], to: str, cwd: Path, module: str = "fmexp") -> Finished:
    """Run the program from a shell that redirects what it prints."""
    command = f"set -o pipefail; {shlex.join([sys.executable, '-m', module, *words])} {to}"
    return run(cwd=cwd, command=("bash", "-c", command))


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
NO_SPACE = "The output cannot be written: No space left on device.\n"


@FULL
@pytest.mark.parametrize("word", ["--help", "--cfg=job", "--version"])
@pytest.mark.parametrize(
    ("to", "status", "says"), [("> /dev/full", 1, NO_SPACE), ("| true", 1, ""), (">&-", 0, ""), ("2>&-", 0, "")]
)
def test_output_that_cannot_be_written(word: str, to: str, status: int, says: str, tmp_path: Path) -> None:
    done = redirected([word], to, tmp_path)
    assert done.err == says
    assert done.status == status or to == "| true"  # which may leave before or after it is given all
    assert bool(done.out) == (to == "2>&-")


@FULL
@pytest.mark.parametrize("to", ["> /dev/full", "| true", ">&- 2>&- <&-"])
def test_a_run_is_complete_where_the_console_is_gone(to: str, tmp_path: Path) -> None:
    assert redirected([*QUICK, "hydra.run.dir=run"], to, tmp_path) == Finished(0, "", "")
    assert_complete(tmp_path / "run")
    assert "see it with" in (tmp_path / "run" / "fmexp.log").read_text().splitlines()[-2]


@FULL
def test_a_sweep_and_its_table_where_the_console_is_gone(tmp_path: Path) -> None:
    words = ["-m", *QUICK, "seed=1,2", "hydra/launcher=joblib", "hydra.sweep.dir=sweep"]
    assert redirected(words, "> /dev/full 2>&-", tmp_path) == Finished(0, "", "")
    for folder in members(tmp_path / "sweep"):
        assert_complete(folder)
    assert redirected(["sweep"], "> /dev/full", tmp_path, "fmexp.sweep") == Finished(1, "", NO_SPACE)


# Runs


class SideBySide(NamedTuple):
    """Two runs that were started at the same time: one into pipes, the other on a terminal."""

    cwd: Path
    piped: Finished
    piped_folder: Path
    screen: str
    screen_folder: Path


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> SideBySide:
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    cwd = tmp_path_factory.mktemp("side_by_side")
    command = (str(SCRIPT),) if SCRIPT.is_file() else PYTHON
    piped = start(*SMALL, "seed=1", cwd=cwd, command=command)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # 24 lines of 80 columns
    words = [*PYTHON, *SMALL, "seed=2", "logging=light"]
    on_screen = subprocess.Popen(words, cwd=cwd, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 4096):
            screen += chunk
    except OSError:  # so Linux says that the other side is closed
        pass
    os.close(ours)
    assert on_screen.wait() == 0, screen.decode()
    done = finished(piped)
    assert done.status == 0, done.err
    folders = {composed(path.parent).seed: path.parent for path in cwd.glob("runs/*/*/.hydra")}
    assert sorted(folders) == [1, 2]
    return SideBySide(cwd, done, folders[1], screen.decode(), folders[2])


def test_runs_started_at_once_have_folders_of_their_own(side_by_side: SideBySide) -> None:
    for folder in (side_by_side.piped_folder, side_by_side.screen_folder):
        # Microseconds, so that being started in the same second is no matter of luck.
        assert re.fullmatch(RUN_FOLDER, str(folder.relative_to(side_by_side.cwd)))
        assert_complete(folder)
    ours, theirs = weights(side_by_side.piped_folder), weights(side_by_side.screen_folder)
    assert not torch.equal(ours["fc3.weight"], theirs["fc3.weight"])


def test_folder_of_a_run(side_by_side: SideBySide) -> None:
    folder = side_by_side.piped_folder
    others = {".lock", "projector_config.pbtxt", "00000"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events.")} <= COMPLETE | others | {
        "checkpoint.pt"
    }
    assert composed(folder) == OmegaConf.create(resolved(compose([*SMALL, "seed=1"])))
    assert OmegaConf.load(folder / ".hydra" / "overrides.yaml") == [*SMALL, "seed=1"]
    assert OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.output_dir == str(folder)
    assert weights(folder).keys() == {f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
                                      for kind in ("weight", "bias")}  # fmt: skip
    metrics, events = result(folder)["metrics"], read_events(folder)
    assert isinstance(metrics, dict)
    assert [step for step, _ in scalars(events, "train/loss")] == [4, 8, 12, 16]
    assert scalars(events, "test/accuracy") == [(16, pytest.approx(metrics["test/accuracy"]))]
    assert result(folder)["objective"] == metrics["test/accuracy"]


def test_last_lines_name_accuracy_folder_and_tensorboard(side_by_side: SideBySide) -> None:
    accuracy, where, command = side_by_side.piped.out.splitlines()[-3:]
    assert accuracy.startswith(f"test accuracy {result(side_by_side.piped_folder)['objective']:.4f}, test loss ")
    assert where == f"written to {side_by_side.piped_folder.relative_to(side_by_side.cwd)}; see it with"
    assert command == "  tensorboard --logdir runs"


def test_log_file_has_what_the_console_had(side_by_side: SideBySide) -> None:
    logged = (side_by_side.piped_folder / "fmexp.log").read_text()
    lines = re.sub(r"^\[[^]]*\]\[fmexp[\w.]*\]\[INFO\] ", "", logged, flags=re.MULTILINE)
    assert lines == side_by_side.piped.out
    assert "step 16: train/loss " in lines


def test_progress_bar_on_a_terminal_and_log_lines_elsewhere(side_by_side: SideBySide) -> None:
    assert "0/16 [" in side_by_side.screen
    for line in side_by_side.screen.splitlines():  # at each \r, too: the bar is removed before a line is written
        assert not ("0/16 [" in line and "train/loss" in line), line
    assert side_by_side.piped.err == ""
    assert "\r" not in side_by_side.piped.out
    assert "/16 [" not in side_by_side.piped.out


@pytest.mark.parametrize("width", [45, 80, 300])
def test_the_announcement_goes_on_below_its_column(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stages = [f"stage.{name}.enabled=true" for name in ("image_grid", "predictions", "confusion_matrix")]
    done = call(*QUICK, *stages, "optimizer=adamw", "hydra.run.dir=run", cwd=tmp_path)
    lines = done.out.splitlines()
    heads = ("data", "model", "optimizer", "training", "stages", "folder")
    begins = [next(i for i, line in enumerate(lines) if line.startswith(f"{head:<11}")) for head in heads]
    assert begins == sorted(begins)
    announced = {head: lines[i:j] for head, i, j in zip(heads, begins, [*begins[1:], begins[-1] + 1], strict=True)}
    assert all(len(line) <= width for part in announced.values() for line in part)
    assert all(re.match(r" {11}\S", line) for part in announced.values() for line in part[1:])
    items = [item for line in announced["stages"] for item in line[11:].removesuffix(",").split(", ")]
    moments = {"image_grid": "start", "predictions": "log", "confusion_matrix": "end", "per_class_accuracy": "end"}
    known = [item for item in items if item.split(" ")[0] in moments]  # there may be more than those of today
    assert known == [f"{name} ({moment})" for name, moment in moments.items()]  # none of them is on two lines
    settings = "AdamW, lr 0.001, betas [0.9, 0.999], eps 1e-08, weight_decay 0.01"
    assert " ".join(line[11:] for line in announced["optimizer"]) == settings
    assert (len(announced["stages"]) > 1) == (width < 90)


def test_data_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_splits(tmp_path / "my data", "FashionMNIST")
    monkeypatch.setenv("FMEXP_DATA", str(tmp_path / "my data"))
    done = call("logging=light", "device=cpu", "dataset.download=false", cwd=tmp_path)
    assert done.status == 0, done.err
    assert "14 training + 10 validation + 12 test images of 1x28x28, 10 classes" in done.out
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/*/result.json"))
    assert composed(folder).dataset.root == str(tmp_path / "my data")
    assert result(folder)["steps"] == 4
    assert compose(["dataset.root=elsewhere"]).dataset.root == "elsewhere"


@pytest.mark.parametrize("name", ["a = b", "caf\udce9", "a ${seed} b", "${"])
def test_a_run_and_a_sweep_where_the_current_folder_has_an_odd_name(name: str, tmp_path: Path) -> None:
    (here := tmp_path / name).mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8)
    np.savez(here / "own = data.npz", images=images, labels=np.arange(40) % 4)
    words = ("dataset=arrays", "dataset.root='own = data.npz'", "model=mlp", "logging=light", "device=cpu")
    done = call(*words, "hydra.run.dir=run", cwd=here)
    assert (done.status, done.err.count("\n")) == ((0, 0) if name == "a = b" else (1, 1))
    assert any(said in done.err for said in ("is not UTF-8", "holds ${")) == (name != "a = b")
    if name != "${":  # where Hydra itself cannot begin
        for mode in (f"hydra.run.dir={tmp_path}/run", f"hydra.mode=MULTIRUN hydra.sweep.dir={tmp_path}/sweep"):
            done = call(*words, *mode.split(), cwd=here)
            assert (done.status, done.err) == (0, "")
        for folder in (tmp_path / "run", *members(tmp_path / "sweep")):
            assert_complete(folder)
    assert sorted(path.name for path in here.iterdir()) == ["own = data.npz", "run"][: 1 + (name == "a = b")]


def test_any_other_optimizer_of_torch() -> None:
    words = ("optimizer=custom", "optimizer._target_=torch.optim.Adagrad", "optimizer.lr=0.5")
    optimizer = build(compose([*SMALL, *words, "+optimizer.lr_decay=0.1"])).optimizer
    assert type(optimizer) is torch.optim.Adagrad
    assert (optimizer.defaults["lr"], optimizer.defaults["lr_decay"]) == (0.5, 0.1)


DIVERGES = (*QUICK, "optimizer.lr=1e10", "train.max_steps=16", "hydra.run.dir=run")


def test_a_run_that_diverged_has_an_exit_status_of_its_own_again_and_again(tmp_path: Path) -> None:
    done = run(*DIVERGES, cwd=tmp_path)
    assert (done.status, done.err) == (cli.DIVERGED, "")
    assert "the run diverged" in done.out
    again = call(*DIVERGES, cwd=tmp_path)
    assert (again.status, again.err) == (3, "")
    assert "run is diverged already; nothing is trained" in again.out
    assert result(tmp_path / "run")["status"] == "diverged"
    assert math.isnan(execute(compose(DIVERGES[:-1]), tmp_path / "run"))


def test_the_exit_status_is_documented(help_text: str) -> None:
    assert f"{cli.DIVERGED} the run diverged\n" in help_text.partition("Exit status: ")[2]
    assert f"{cli.DIVERGED} where a single run diverged" in (CHECKOUT / "README.md").read_text()
    assert f"exit status {cli.DIVERGED};" in (CHECKOUT / "docs" / "reliability.md").read_text()


# Sweeps


def test_sweep_over_two_keys(tmp_path: Path) -> None:
    done = run("--multirun", "optimizer.lr=0.1,0.2", "optimizer=sgd,adam", *QUICK, cwd=tmp_path)
    assert done.status == 0, done.err
    (sweep,) = tmp_path.glob("multirun/*/*")
    folders = members(sweep)
    assert [path.name.partition("_")[0] for path in folders] == ["0", "1", "2", "3"]
    found = []
    for folder in folders:
        assert_complete(folder)
        cfg = composed(folder)
        found.append((cfg.optimizer._target_.rpartition(".")[2].lower(), cfg.optimizer.lr))
        overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        assert {f"optimizer={found[-1][0]}", f"optimizer.lr={found[-1][1]}", *QUICK} == set(overrides)
        assert [step for step, _ in scalars(read_events(folder), "train/loss")] == [4]
        logged = (folder / "fmexp.log").read_text()
        assert f"optimizer  {cfg.optimizer._target_.rpartition('.')[2]}, lr {cfg.optimizer.lr}" in logged
        assert str(cfg.optimizer.lr) in folder.name
        assert found[-1][0] in folder.name
    assert sorted(found) == [("adam", 0.1), ("adam", 0.2), ("sgd", 0.1), ("sgd", 0.2)]
    first = [weights(folder)["conv1.weight"].numpy().tobytes() for folder in folders]
    assert len(set(first)) == 4
    assert "tensorboard --logdir" in done.out.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_sweep_by_hydras_own_key(tmp_path: Path) -> None:
    words = (*QUICK, "seed=1,2", "hydra.sweep.dir=sweep", "sweep.dry_run=true")
    by_key, by_flag = (call(*mode, *words, cwd=tmp_path) for mode in (["hydra.mode=MULTIRUN"], ["--multirun"]))
    assert by_key == by_flag
    assert (by_key.status, by_key.err) == (0, "")
    assert "2 members: 2 to train" in by_key.out


ODD_VALUES = (
    "a/b",
    "a b",
    "a=b",
    "a,b",
    "../up",
    "größe",
    "it's",
    'say "so"',
    "x" * 299 + "1",
    "x" * 299 + "2",
)


def test_sweep_over_odd_values(tmp_path: Path) -> None:
    words = f"train.tag={','.join(quote(value) for value in ODD_VALUES)}"
    done = call("--multirun", *QUICK, words, cwd=tmp_path)
    assert done.status == 0, done.err
    (sweep,) = tmp_path.glob("multirun/*/*")
    folders = members(sweep)
    assert [composed(folder).train.tag for folder in folders] == list(ODD_VALUES)
    assert {path.parent.parent for path in sweep.rglob("result.json")} == {sweep}
    for folder, value in zip(folders, ODD_VALUES, strict=True):
        assert len(os.fsencode(folder.name)) <= 255
        assert_complete(folder)
        assert [step for step, _ in scalars(read_events(folder), value)] == [4]
        parser = OverridesParser.create()
        overrides = parser.parse_overrides(list(OmegaConf.load(folder / ".hydra" / "overrides.yaml")))
        assert {parsed.key_or_group: parsed.value() for parsed in overrides}["train.tag"] == value


def faulty(run: Run, *, complaint: str | None) -> None:
    """A stage of these tests: raise a ValueError with the complaint, if there is one."""
    if complaint is not None:
        raise ValueError(complaint)


FAULTY = ("+stage.faulty._target_=test_cli.faulty", "+stage.faulty.when=log", "+stage.faulty.required=true")


def test_failing_members_harm_no_others(tmp_path: Path) -> None:
    words = ("--multirun", *QUICK, *FAULTY, "+stage.faulty.complaint=boom,null", "dataset.image_size=8,28")
    done = call(*words, cwd=tmp_path)
    assert done.status == 1
    (sweep,) = tmp_path.glob("multirun/*/*")
    states, logs = {}, {}
    for folder in members(sweep):
        cfg = composed(folder)
        key = cfg.stage.faulty.complaint, cfg.dataset.image_size
        states[key], logs[key] = result(folder)["status"], (folder / "fmexp.log").read_text()
    assert states == {("boom", 8): "failed", ("boom", 28): "failed", (None, 8): "failed", (None, 28): "complete"}
    assert "Traceback (most recent call last)" in logs["boom", 28]
    assert logs["boom", 28].rstrip().endswith("ValueError: boom")
    for key, text in logs.items():
        assert ("boom" in text) == (key == ("boom", 28)), key
        assert ("LeNet needs images of at least 16x16" in text) == (key[1] == 8), key
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 12


# Going on

FOLDERS = ("plain", "with space", "a=b", "a,b", "it's", 'say "so"', "$HOME", "back\\slash", "tail\\", "größe", "[1]{2}",
           "(3)", "a:b", "#1", "~x", "100%", "it\\'s", " edges ")  # fmt: skip


def folder_in(command: str, key: str) -> object:
    """The folder that a shell and then Hydra take a command to name."""
    (word,) = (word for word in shlex.split(command) if word.startswith(f"{key}="))
    value = OverridesParser.create().parse_override(word).value()
    return OmegaConf.create({"seed": 0, "folder": value}).folder


@pytest.mark.parametrize("name", FOLDERS)
def test_command_to_go_on_names_the_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("/somewhere") / name / "run"
    monkeypatch.setattr(sys, "argv", ["/bin/fmexp", "seed=1", "hydra.run.dir='old one'", "train.tag='a b'"])
    command = resume_command("hydra.run.dir", folder)
    assert folder_in(command, "hydra.run.dir") == str(folder)
    assert shlex.split(command)[:-1] == ["fmexp", "seed=1", "train.tag='a b'"]
    monkeypatch.setattr(sys, "argv", ["/package/fmexp/__main__.py", "-m", "seed=1,2"])
    command = resume_command("hydra.sweep.dir", folder.parent)
    assert folder_in(command, "hydra.sweep.dir") == str(folder.parent)
    assert shlex.split(command)[:-1] == ["python", "-m", "fmexp", "-m", "seed=1,2"]


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    return tmp_path / "it's, at=last" / "größe = 3"


def test_run_in_an_oddly_named_folder_and_once_more(odd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd_folder.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["fmexp", *QUICK])
    words = shlex.split(resume_command("hydra.run.dir", odd_folder))[1:]
    done = call(*words, cwd=odd_folder.parent)
    assert done.status == 0, done.err
    assert [path.name for path in odd_folder.parent.iterdir()] == [odd_folder.name]
    assert_complete(odd_folder)
    before = (odd_folder / "result.json").read_bytes()
    again = call(*words, cwd=odd_folder.parent)
    assert again.status == 0, again.err
    assert "complete already; nothing is trained" in again.out
    assert (odd_folder / "result.json").read_bytes() == before


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"runs on Linux and macOS\. On Windows, run it in WSL"):
        main()


def test_the_cores_of_a_system_that_does_not_say_which_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == os.cpu_count()


@pytest.mark.parametrize("name", ["a folder", "a=b", "${x}", "d\udcffg", "d'g", "a,b", "[a]"])
def test_any_folder_is_worked_in_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    here = tmp_path / name
    here.mkdir()
    inside = call(*QUICK, "hydra.run.dir=run", cwd=here)
    named = call(*QUICK, f"hydra.run.dir={quote(str(here / 'run2'))}", cwd=tmp_path)
    for done, folder in ((inside, "run"), (named, "run2")):
        assert "Traceback" not in done.out + done.err
        if done.status:
            assert len(done.err.splitlines()) <= 3, done.err
            assert not (here / folder).exists()
        else:
            assert json.loads((here / folder / "result.json").read_text())["status"] == "complete"
    assert bool(inside.status) == bool(named.status) == (name in ("${x}", "d\udcffg"))
