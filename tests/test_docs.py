"""README.md and docs/: every fmexp command runs, code and YAML do what is said, links lead somewhere.

Commands are executed on a few images and for a few batches, in this process, in a folder of their own. What cannot be
executed here is in NOT_HERE.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from program import CHECKOUT, call, environment
from program import run as run_program
from tools import write_idx_splits

from fmexp import read, sweep
from fmexp.evaluate import evaluate
from fmexp.predict import main as predict_main
from fmexp.rundir.layout import read_config
from fmexp.sweep.__main__ import main as sweep_main

BASH = shutil.which("bash") or ""
SCRIPT = Path(sys.executable).with_name("fmexp")
DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", *sorted(DOCS.glob("*.md"))]
SWEPT = "multirun/2026-01-31/12-00-00"
PLACES = {
    "multirun/<date>/<time>": SWEPT,
    "runs/<date>/<time>": "runs/first",
    "<folder>": SWEPT,
    "runs/<date>": SWEPT,
    "<partition>": "main",
}

# A word of a command -> what is added so that nothing is trained, and why.
NOT_HERE = {
    "hydra/launcher=slurm": ("sweep.dry_run=true", "needs Slurm: tests/sweep/test_slurm.py looks for one"),
    "hydra/sweeper=halving": (
        "sweep.dry_run=true",
        "has no rungs in four batches: tests/sweep/test_halving.py has more",
    ),
    "hydra/launcher=joblib": ("sweep.dry_run=true", "starts processes, which takes its time: tests/sweep has them"),
    "model.pretrained=true": ("--cfg=job", "downloads weights: tests/test_models.py has such a file"),
    "weights=runs/first": ("--cfg=job", "is a run of another command: tests/test_weights.py has one"),
    "weights=runs/clothes": ("--cfg=job", "is a run of another command: tests/config/test_conf.py has one"),
    "train.log_every=40": ("--cfg=job", "four batches of 64, where there are 24 images: how_do_i.md has smaller ones"),
    "dataset=cifar10": ("--cfg=job", "170 MB to download: tests/datasets/test_catalog.py reads its format"),
}
# What makes a command small. It stands before the command's own words, so that these win.
QUICK = ("train.max_steps=4", "train.num_workers=0", "device=cpu")
DRAWN = ("dataset.train_size=64", "dataset.test_size=40")
# How many members a sweep has whose values are in a recipe; two trials are enough of a search.
MEMBERS = {"experiment=lr_sweep": 10, "experiment=model_comparison": 8, "optuna": 2, "n_trials=27": 27}


# Reading


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page.

    Attributes:
        language: what stands behind the fence; "" for an indented one.
        above: the page up to the block.
    """

    language: str
    text: str
    above: str


@dataclass(frozen=True)
class Command:
    """A command of a page: the module that `python -m` executes, and its arguments."""

    page: str
    module: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(['python', '-m', self.module, *self.words])}"


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$|((?:^ {4}[^\n]*\n)+)", page.read_text(), re.MULTILINE | re.DOTALL)
    return [
        Block(match[1] or "", match[2] if match[3] is None else re.sub("^ {4}", "", match[3], flags=re.MULTILINE),
              match.string[: match.start()])
        for match in found
    ]  # fmt: skip


def lines(page: Path) -> Iterator[list[str]]:
    """The commands, whatever the program, that stand on lines of their own, as words."""
    programs = r"((?:\w+=\S+ )*)((\S*/)?(python3?|fmexp|tensorboard|pip|pytest) .*)"
    for block in blocks(page):
        if block.language in ("", "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if command := re.match(programs, f"{line} "):
                    words = shlex.split(command[2], comments=True)  # without the variables before it
                    while "&&" in words:
                        yield words[: words.index("&&")]
                        words = words[words.index("&&") + 1 :]
                    yield words


def spans(page: Path) -> Iterator[list[str]]:
    """The commands within a sentence."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        if span.startswith("-m experiment="):
            span = f"fmexp {span}"
        if re.match(r"(python -m fmexp|fmexp )", span):
            yield shlex.split(span)


def commands(page: Path) -> Iterator[Command]:
    """The fmexp commands of a page."""
    for words in (*lines(page), *spans(page)):
        name = words[0].rpartition("/")[2]
        if name == "fmexp":
            yield Command(page.name, "fmexp", tuple(words[1:]))
        elif name.startswith("python") and words[1] == "-m" and words[2].partition(".")[0] == "fmexp":
            yield Command(page.name, words[2], tuple(words[3:]))


OWN = "--config-dir"
QUESTIONS = "how_do_i.md"  # has commands of other pages, without their files


def once(found: Iterator[Command]) -> list[Command]:
    """Each command once, even if several pages have it; but words of one's own mean something else on each page."""
    own = (c for c in found if OWN not in c.words or c.page != QUESTIONS)
    return list({(c.module, c.words, c.page if OWN in c.words else ""): c for c in own}.values())


ALL = [command for page in PAGES for command in commands(page)]
COMMANDS = once(iter(ALL))
RUNS = [command for command in COMMANDS if command.module == "fmexp"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_is_overlooked(page: Path) -> None:
    modules = [command for command in ALL if command.page == page.name]
    assert len(modules) >= page.read_text().count("python -m fmexp")
    assert {command.module for command in modules} <= {"fmexp", "fmexp.evaluate", "fmexp.predict", "fmexp.sweep"}


def test_there_is_something_to_execute() -> None:
    assert len(RUNS) >= 25
    assert {"README.md", "own.md", "sweeps.md", "tutorial.md"} <= {command.page for command in COMMANDS}


# Commands


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 + 12 random images as Fashion-MNIST and as MNIST."""
    root = tmp_path_factory.mktemp("data")
    write_idx_splits(root, "FashionMNIST")
    write_idx_splits(root, "MNIST")
    return root


@pytest.fixture
def here(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where commands are typed, which Python imports from."""
    monkeypatch.setenv("FMEXP_DATA", str(data))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)  # where a download would be
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def write_own(page: Path, folder: Path) -> None:
    """Write what a page says to write, mine.py and my_conf/, and some data for it."""
    code = [block.text for block in blocks(page) if block.language == "python" and "execute(" not in block.text]
    (folder / "mine.py").write_text("\n\n".join(text for text in code if "np.savez" not in text))
    for text in code:
        if "np.savez" in text:  # a file that the page makes, in the current folder
            exec(compile(text, page.name, "exec"), {})
    for block in (block for block in blocks(page) if block.language == "yaml"):
        (name, *_) = re.findall(r"^# (my_conf/\S+\.yaml)$", block.text, re.MULTILINE) or reversed(
            re.findall(r"`(my_conf/\S+\.yaml)`", block.above)
        )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(block.text)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for name in ("cat", "dog"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(count // 2):
                pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{number}.png")


def placed(words: tuple[str, ...]) -> list[str]:
    """The words with something in place of what a reader fills in."""
    found = []
    for word in words:
        for place, value in PLACES.items():
            word = word.replace(place, value)
        assert not re.search(r"<\w+>", word), f"{word}: what is to be put there?"
        found.append(word)
    return found


def smaller(words: list[str]) -> list[str]:
    """A run's words with others before its keys that make it quick, and its data small or not downloaded."""
    flags = next((number for number, word in enumerate(words) if "=" in word), len(words))
    data: tuple[str, ...] = ()
    if {"dataset=synthetic", "experiment=mine"} & set(words):
        data = DRAWN
    elif not any(word.startswith("dataset=") for word in words):
        data = ("dataset.download=false",)
    if {"-m", "--multirun"} & set(words):
        data += ("logging=light",)  # single runs have all stages
    return [*words[:flags], *QUICK, *data, *words[flags:]]


def members(words: list[str]) -> int:
    """How many members a sweep has."""
    for name, count in MEMBERS.items():
        if any(name in word for word in words):
            return count
    return math.prod(len(word.split(",")) for word in words if "=" in word)


def assert_complete(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("complete", {}), result
    assert 1 <= result["steps"] <= 16  # an epoch of what smaller() leaves
    objective = read_config(folder)["objective"]
    assert result["objective"] == result["metrics"][objective]
    assert read(folder).scalars["test/accuracy"]


@pytest.mark.parametrize("command", RUNS, ids=str)
def test_command(command: Command, here: Path) -> None:
    words = placed(command.words)
    if any("optuna" in word for word in words):
        words.append(f"hydra.sweeper.n_trials={MEMBERS['optuna']}")
    if OWN in words or {"dataset=image_folder", "dataset=arrays"} & set(words):
        (page,) = (page for page in PAGES if page.name == command.page)
        write_own(page, here)
    added = [NOT_HERE[word][0] for word in words if word in NOT_HERE]
    before = sorted(here.rglob("*"))
    done = call(*smaller(words), *added, cwd=here)
    assert done.status == 0, done.err
    if {"--help", "--cfg", "--cfg=job"} & {*words, *added}:
        assert "train:\n" in done.out
        assert "optimizer:\n" in done.out
        assert sorted(here.rglob("*")) == before
    elif "sweep.dry_run=true" in (*words, *added):
        assert f"{members(words)} members: " in done.out
        assert "Nothing was written." in done.out
        assert sorted(here.rglob("*")) == before
    elif {"-m", "--multirun"} & set(words):
        (table,) = here.rglob("sweep.csv")
        found = sweep.read(table.parent)
        assert len(found) == members(words)
        assert len(table.read_text().splitlines()) == 1 + len(found)
        for member in found:
            assert_complete(member.folder)
            assert member.folder.name in done.out
    else:
        (result,) = here.rglob("result.json")
        assert_complete(result.parent)
        assert str(result.parent.relative_to(here)) in done.out
        wanted = [word.partition("=")[2] for word in words if word.startswith("hydra.run.dir=")]
        assert not wanted or result.parent == here / wanted[0]


def test_commands_that_print_a_table(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["-m", "dataset=synthetic", "optimizer.lr=0.01,0.001", f"hydra.sweep.dir={SWEPT}"]
    assert call(*smaller(grid), cwd=here).status == 0
    assert call(*smaller(["dataset=synthetic", "hydra.run.dir=runs/first"]), cwd=here).status == 0
    accuracy = {path.name: read(path).objective for path in (*(here / SWEPT).glob("*_lr*"), here / "runs" / "first")}
    commands = [command for command in COMMANDS if command.module == "fmexp.sweep"]
    assert len(commands) >= 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *placed(command.words)])
        sweep_main()
        table = capsys.readouterr().out
        shown = {name for name, value in accuracy.items() if f"{value:.4f}" in table and name in table}
        if "--delete" in command.words:
            assert re.fullmatch(r"0 of \d runs (failed|pruned): nothing was deleted\n", table)
        elif "--where" in command.words:
            assert "1 runs in" in table
        elif command.words == ("runs",):
            assert "1 members: 1 complete" in table
            assert shown == {"first"}
        elif len(command.words) == 1:
            assert "2 members: 2 complete" in table
            assert shown == accuracy.keys() - {"first"}
        else:
            assert "3 runs in" in table
            assert shown == accuracy.keys()


def first_run(here: Path) -> None:
    """Make the run of which questions are asked, and pictures."""
    assert call(*QUICK, *DRAWN, "dataset=synthetic", "hydra.run.dir=runs/first", cwd=here).status == 0
    (here / "photos").mkdir()
    for name in ("shirt.png", "bag.jpg"):
        Image.new("RGB", (40, 30), "gray").save(here / "photos" / name)


def test_commands_that_predict(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first_run(here)
    capsys.readouterr()
    commands = [command for command in COMMANDS if command.module == "fmexp.predict"]
    assert {command.page for command in commands} >= {"README.md", QUESTIONS}
    for command in commands:
        words = placed(command.words)
        monkeypatch.setattr(sys, "argv", ["predict.py", *words])
        with pytest.raises(SystemExit) as left:
            predict_main()
        said = capsys.readouterr()
        assert (left.value.code, said.err) == (0, ""), command
        table = (here / words[-1]).read_text() if "--csv" in words else said.out
        assert all(f"photos/{name}" in table for name in ("shirt.png", "bag.jpg")), command


def test_commands_that_evaluate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first_run(here)
    capsys.readouterr()
    commands = [command for command in COMMANDS if command.module == "fmexp.evaluate"]
    assert {command.page for command in commands} >= {"README.md", QUESTIONS}
    for command in commands:
        run, *words = placed(command.words)
        folder, metrics = evaluate(run, words)
        assert (folder / "result.json").is_file()
        assert any(tag.endswith("/accuracy") for tag in metrics)


def test_every_exception_is_needed() -> None:
    used = {word for command in RUNS for word in command.words}
    assert {word for word in NOT_HERE if word in used} >= {"hydra/launcher=slurm", "hydra/launcher=joblib"}
    assert all(len(why) > 20 for _, why in NOT_HERE.values())


@pytest.mark.parametrize(
    "line", sorted({shlex.join(words) for page in PAGES for words in lines(page) if words[0] == "tensorboard"})
)
def test_tensorboard_takes_the_flags(line: str) -> None:
    """Without starting it: tests/client asks a real server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard import default, program

        server = program.TensorBoard(default.get_plugins())
        server.configure(argv=shlex.split(line))
    assert server.flags.logdir.startswith(("runs", "multirun"))


def test_scripts_and_folders_that_commands_name_are_there() -> None:
    for page in (page for page in LINKED if page.suffix == ".md"):
        for words in lines(page):
            for word in words[1:]:
                if re.match(r"(tests|docs|benchmarks|examples)/", word):
                    assert (CHECKOUT / word).exists(), f"{page.name}: {word}"


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if "## From Python" in page.read_text()], ids=lambda p: p.name)
def test_from_python(page: Path, here: Path) -> None:
    write_own(page, here)
    (script,) = (block.text for block in blocks(page) if block.above.rstrip().endswith("## From Python"))
    assert script.count('(["') == 1
    small = [*QUICK, *(("dataset.download=false", "logging=light") if "sweep" in script else DRAWN)]
    space: dict[str, Any] = {"small": small}
    script = script.replace('(["', '([*small, "').replace("hydra/launcher=joblib", "hydra/launcher=basic")
    exec(compile(script, page.name, "exec"), space)
    if "sweep" in script:
        assert [member.status for member in space["members"]] == ["complete", "complete"]
        assert space["best"].objective == max(member.objective for member in space["members"])
        folders = [member.folder for member in space["members"]]
    else:
        folders = [path.parent for path in here.rglob("result.json")]
        assert [read(folder).objective for folder in folders] == [space["accuracy"]]
    for folder in folders:
        assert_complete(folder)


def test_from_python_is_tested_of_each_page_that_has_it() -> None:
    assert [page.name for page in PAGES if "## From Python" in page.read_text()] == ["README.md", "own.md", "sweeps.md"]


def test_questions_about_parts_of_ones_own_are_answered_where_the_files_are() -> None:
    ours = [command for command in ALL if command.page == QUESTIONS and OWN in command.words]
    assert len(ours) >= 4
    for command in ours:
        assert command.words in [other.words for other in ALL if other.page != QUESTIONS], command


def test_results_are_read_from_python_as_the_questions_say(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / QUESTIONS
    first_run(here)
    small = [*QUICK, *DRAWN, "dataset=synthetic"]
    assert call("-m", *small, "seed=1,2", f"hydra.sweep.dir={SWEPT}", cwd=here).status == 0
    (results, best, gpu) = [placed(tuple(words))[2] for words in lines(page) if words[:2] == ["python", "-c"]]
    run = read("runs/first")
    exec(results, {})
    assert capsys.readouterr().out == f"complete {run.metrics}\n"
    exec(best, {})
    first, second = sweep.read(SWEPT)
    assert capsys.readouterr().out == f"{(second if second.objective > first.objective else first).folder}\n"
    exec(gpu, {})
    assert set(capsys.readouterr().out.split()) <= {"True", "False"}
    (program,) = (block.text for block in blocks(page) if block.language == "python")
    space: dict[str, Any] = {}
    exec(compile(program, page.name, "exec"), space)
    assert not space["classifier"].model.training
    shown = [line.rpartition(" ") for line in capsys.readouterr().out.splitlines()]
    best = space["probabilities"].max(1)
    assert [name for name, _, _ in shown] == [space["classifier"].classes[index] for index in best.indices]
    assert [float(value) for _, _, value in shown] == best.values.tolist()


@pytest.mark.skipif(not SCRIPT.is_file() or not BASH, reason="needs fmexp installed (pip install -e .), and bash")
def test_tab_completes_keys_and_options_in_bash(tmp_path: Path) -> None:
    (install,) = re.findall(r"^ {4}(eval .*)$", (DOCS / QUESTIONS).read_text(), re.MULTILINE)
    line = "fmexp optimizer=adam stage.projector.im"
    script = f"""{install}
        COMP_LINE="{line}" COMP_POINT={len(line)} COMP_CWORD=2
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
        complete -p fmexp"""
    env = environment(PATH=f"{SCRIPT.parent}:{os.environ['PATH']}")
    done = run_program(cwd=tmp_path, command=(BASH, "-c", script), env=env)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "stage.projector.images=", "complete -o default -o nospace -F hydra_bash_completion fmexp"
    ]  # fmt: skip


# Links


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> set[tuple[Path, str]]:
    """The files that a page links to and shows, other than on the net, and "" or the heading in them."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    parts = [link.partition("#") for link in found if not re.match(r"https?:", link)]
    return {((page.parent / path).resolve() if path else page, heading) for path, _, heading in parts}


def headings(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


OTHERS = ("CONTRIBUTING.md", "benchmarks/README.md", "examples/own_project/README.md")
LINKED = [*PAGES, *(CHECKOUT / name for name in OTHERS), *sorted(DOCS.glob("*.ipynb"))]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in links(page):
        if target.parent == DOCS / "pictures" and not target.parent.exists():
            continue  # docs/pictures.py has not been run yet
        assert target.exists(), target
        assert not heading or heading in headings(target), f"{target}#{heading}"


@pytest.mark.parametrize("page", LINKED[1:], ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_page_is_linked(page: Path) -> None:
    assert any(page == target for other in LINKED if other != page for target, _ in links(other))


def test_every_picture_that_is_made_is_small_and_shown() -> None:
    made = re.search(r"^TABS.*?= \((.*?)^\)", (DOCS / "pictures.py").read_text(), re.MULTILINE | re.DOTALL)
    assert made
    linked = {target for page in PAGES for target, _ in links(page)}
    for name in re.findall(r"\w+", made[1]):
        picture = DOCS / "pictures" / f"{name}.png"
        assert picture in linked
        assert picture.stat().st_size <= 60_000


# The reference


@pytest.fixture(scope="module")
def reference() -> Any:
    """docs/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_up_to_date(reference: Any) -> None:
    reference.main(["--check"])


def test_reference_that_is_out_of_date_is_told_and_made_again(reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "reference.md"
    path.write_text((DOCS / "reference.md").read_text().replace("`4`", "`5`", 1))
    with pytest.raises(
        SystemExit, match=r"reference\.md is out of date; make it again with: python docs/reference\.py"
    ):
        reference.main(["--check"], path)
    reference.main([], path)
    assert path.read_text() == (DOCS / "reference.md").read_text()
