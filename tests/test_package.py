"""The wheel and the sdist: what they hold, and the program and the example project run from the installed wheel alone;
that the extra `test` has all that the tests need; and that every source file says what it is for."""

import ast
import email
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from email.message import Message
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from program import CHECKOUT, OWN_PROJECT, Finished, environment, run
from tools import read_events, scalars, weights

import fmexp

SOURCES = sorted((CHECKOUT / "fmexp").rglob("*.py"))
PACKAGE = [path for path in (CHECKOUT / "fmexp").rglob("*") if path.is_file() and path.suffix != ".pyc"]
CONF = sorted(path for path in (CHECKOUT / "conf").rglob("*") if path.is_file())
OTHERS = sorted(
    path
    for folder in ("tests", "examples", "benchmarks")
    for path in (CHECKOUT / folder).rglob("*")
    if path.suffix in (".py", ".yaml")
)


def shown(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


class Installed(NamedTuple):
    """A virtual environment that has the wheel, and everything else from the environment of the tests."""

    python: Path
    site: Path

    def run(self, *words: str, cwd: Path) -> Finished:
        """Run a program of the environment, which finds no other fmexp than the wheel's."""
        env = environment()
        del env["PYTHONPATH"]
        return run(*words[1:], cwd=cwd, command=(str(self.python.with_name(words[0])),), env=env)


def built(kind: str, folder: Path, project: Path = CHECKOUT) -> Path:
    """The wheel or the sdist, built by the hook that pip calls."""
    build = f"import sys, hatchling.build; print(hatchling.build.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=project, capture_output=True, text=True, check=True
    )
    assert [path.name for path in folder.iterdir()] == done.stdout.split()
    return folder / done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("environment")
    python = folder / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)]
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), *install]):
        subprocess.run(command, capture_output=True, text=True, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # After the wheel's own, and without their .pth files, such as that of an editable install.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return Installed(python, site)


@pytest.fixture(scope="module")
def metadata(installed: Installed) -> Message:
    (path,) = installed.site.glob("fmexp-*.dist-info/METADATA")
    return email.message_from_string(path.read_text())


def test_wheel_installs_every_file_of_the_package_and_of_conf(installed: Installed) -> None:
    expected = {path.relative_to(CHECKOUT): path for path in PACKAGE}
    expected |= {Path("fmexp") / path.relative_to(CHECKOUT): path for path in CONF}
    files = [path for path in (installed.site / "fmexp").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(installed.site) for path in files} == set(expected)
    for name, path in expected.items():
        assert (installed.site / name).read_bytes() == path.read_bytes(), name


def test_wheel_says_what_it_is_and_needs(installed: Installed, metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("fmexp", fmexp.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert len(metadata["Summary"]) > 20
    (license_file,) = installed.site.glob("fmexp-*.dist-info/licenses/LICENSE")
    assert license_file.read_text() == (CHECKOUT / "LICENSE").read_text()
    assert license_file.read_text().startswith("MIT License")
    assert metadata.get_payload() == (CHECKOUT / "README.md").read_text()
    needed = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    names = {"filelock>=3.31", "matplotlib", "numpy>=1.24", "omegaconf", "pillow>=10.1", "protobuf", "pyyaml",
             "tensorboard", "torch", "torchvision", "tqdm"}  # fmt: skip
    assert names <= needed
    assert "hydra-core<1.5,>=1.3.8" in needed
    assert {"sweep", "optuna", "browser", "test", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    (scripts,) = installed.site.glob("fmexp-*.dist-info/entry_points.txt")
    assert scripts.read_text().split("\n")[:2] == ["[console_scripts]", "fmexp = fmexp.__main__:main"]


def imported(path: Path) -> Iterator[str]:
    """The first words of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def add_needed(found: set[str], requirements: Iterable[str], extras: Iterable[str]) -> None:
    """Add the distributions that requirements with these extras lead to, near and far, as pip would install them."""
    for line in requirements:
        one = Requirement(line)
        name = canonicalize_name(one.name)
        wanted = not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if wanted and name not in found:
            found.add(name)
            add_needed(found, requires(name) or (), one.extras)


def test_all_that_is_imported_is_declared(metadata: Message) -> None:
    installed: set[str] = set()
    add_needed(installed, metadata.get_all("Requires-Dist", []), ["test"])
    sources = [*SOURCES, *(path for path in OTHERS if path.is_relative_to(CHECKOUT / "tests"))]
    known = {"fmexp", *sys.stdlib_module_names, *(path.stem for path in OTHERS)}
    names = {name for path in sources for name in imported(path)} - known
    providers = packages_distributions()
    assert {"torch", "submitit", "optuna", "playwright", "PIL"} <= names
    missing = {name for name in names if installed.isdisjoint(map(canonicalize_name, providers.get(name, ())))}
    assert not missing
    declared = {canonicalize_name(Requirement(line).name) for line in metadata.get_all("Requires-Dist", [])}
    own = {name for path in SOURCES for name in imported(path)} - known
    assert {name for name in own if declared.isdisjoint(map(canonicalize_name, providers[name]))} == set()


def test_pytest_takes_all_cores_with_one_thread_each_and_leaves_out_the_slow_tests(
    pytestconfig: pytest.Config,
) -> None:
    words = pytestconfig.getini("addopts")
    assert {("-n", "auto"), ("--dist", "worksteal"), ("-m", "not slow and not nightly")} <= set(
        itertools.pairwise(words)
    )
    assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)


def test_no_text_installs_fmexp_from_an_index() -> None:
    """It is in none: `pip install` names a checkout, or the package that is missing."""
    texts = [*SOURCES, *OTHERS, *CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").glob("*.*"), OWN_PROJECT / "README.md"]
    assert [shown(path) for path in texts if re.search(r"pip install \S?fmexp", path.read_text())] == []


def test_sdist_holds_what_the_tests_need(tmp_path: Path) -> None:
    root = f"fmexp-{fmexp.__version__}"
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    docs = [path for path in (CHECKOUT / "docs").iterdir() if path.is_file()]
    texts = [*CHECKOUT.glob("*.md"), OWN_PROJECT / "README.md", CHECKOUT / "LICENSE", CHECKOUT / "pyproject.toml"]
    hidden = [CHECKOUT / name for name in (".ci/run", ".gitignore", ".pre-commit-config.yaml", "multirun/.gitignore")]
    assert names >= {shown(path) for path in (*PACKAGE, *CONF, *OTHERS, *docs, *texts, *hidden)}
    assert not [name for name in names if re.search(r"__pycache__|(^|/)(runs|data|\.venv|\.\w+_cache)/|tfevents", name)]


def test_sdist_leaves_out_what_runs_write(tmp_path: Path) -> None:
    project, out = tmp_path / "project", tmp_path / "out"
    for name in ("fmexp", "conf"):
        shutil.copytree(CHECKOUT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "multirun").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "multirun/.gitignore"):
        shutil.copy(CHECKOUT / name, project / name)
    kept = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    for place in (".", "docs", "examples/own_project"):
        for folder in ("runs/notebook", "runs/2026-01-31/12-00", "multirun/2026-01-31/0_seed-1", "multirun/mine/0"):
            (project / place / folder).mkdir(parents=True)
            (project / place / folder / "result.json").write_text("{}")
    out.mkdir()
    with tarfile.open(built("sdist", out, project)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == kept | {"PKG-INFO"}


def test_program_of_the_wheel(installed: Installed, tmp_path: Path) -> None:
    shown = installed.run("fmexp", "--cfg", "job", "model=mlp", cwd=tmp_path)
    assert (shown.status, shown.err) == (0, "")
    expected = OmegaConf.create(OmegaConf.to_yaml(fmexp.compose(["model=mlp"])))
    assert OmegaConf.create(shown.out) == expected
    where = "import fmexp.config; print(fmexp.__file__, fmexp.config.conf_dir(), sep='\\n')"
    found = installed.run("python", "-c", where, cwd=tmp_path)
    package = installed.site / "fmexp"
    assert found == Finished(0, f"{package / '__init__.py'}\n{package / 'conf'}\n", "")


@pytest.fixture
def own_project(tmp_path: Path) -> Path:
    """A copy of the example, as a person makes it."""
    left_out = shutil.ignore_patterns("__pycache__", "runs", "multirun")
    return shutil.copytree(OWN_PROJECT, tmp_path / "own_project", ignore=left_out)


def commands_of_the_example() -> list[str]:
    text = (OWN_PROJECT / "README.md").read_text()
    return re.findall(r"^ {4}(python .*)$", text, re.MULTILINE)


def results(project: Path) -> list[Path]:
    """The folders of the runs in a project, in the order of their names."""
    return sorted(path.parent for path in project.rglob("result.json"))


def test_own_dataset_model_and_stage_with_the_wheel(installed: Installed, own_project: Path) -> None:
    command = commands_of_the_example()[0]
    assert command == "python -m fmexp --config-dir conf dataset=stripes model=roughness +stage=weight_norm"
    done = installed.run(*shlex.split(command), cwd=own_project)
    assert (done.status, done.err) == (0, "")
    assert "600 stripes" in done.out
    (folder,) = results(own_project)
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert cfg.dataset._target_ == "stripes.data.stripes"
    assert (cfg.model._target_, cfg.model.scale) == ("stripes.model.Roughness", 10.0)
    sources = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    used = {source.path for source in sources}
    assert {str(installed.site / "fmexp" / "conf"), str(own_project / "conf")} <= used
    assert not {path for path in used if Path(path).is_relative_to(CHECKOUT)}

    result, trained, events = json.loads((folder / "result.json").read_text()), weights(folder), read_events(folder)
    assert (result["status"], result["steps"], result["failures"]) == ("complete", 135, {})
    assert result["objective"] == result["metrics"]["val/accuracy"] > 0.6
    assert {name: tuple(tensor.shape) for name, tensor in trained.items()} == {
        "judge.weight": (2, 2), "judge.bias": (2,)}  # fmt: skip
    norm = float(torch.cat([tensor.flatten() for tensor in trained.values()]).norm())
    assert scalars(events, "weights/norm") == [(135, pytest.approx(norm))]
    assert result["metrics"]["weights/norm"] == pytest.approx(norm)
    assert {"along", "across"} <= set(events.Tags()["tensors"]), "a PR curve for each class"
    assert scalars(events, "within_class_accuracy/along")


def test_a_moved_run_predicts_with_the_wheel_and_names_the_code_that_it_lacks(
    installed: Installed, own_project: Path, tmp_path: Path
) -> None:
    command = shlex.split(commands_of_the_example()[0])
    assert installed.run(*command, "logging=light", "train.max_steps=20", cwd=own_project).status == 0
    (folder,) = results(own_project)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.rename(elsewhere / "moved")
    Image.new("L", (50, 40), 200).save(elsewhere / "picture.png")
    words = ("python", "-m", "fmexp.predict", "moved", "picture.png", "--top", "2")
    refused = installed.run(*words, cwd=elsewhere)
    assert (refused.status, refused.out) == (1, "")
    assert "model._target_=stripes.model.Roughness cannot be imported: " in refused.err
    assert refused.err.endswith("Code of your own must be installed or on PYTHONPATH.\n")
    (elsewhere / "stripes").symlink_to(own_project / "stripes")  # `python -m` imports from the current folder
    ended = installed.run(*words, cwd=elsewhere)
    assert (ended.status, ended.err) == (0, "")
    heads, row = (line.split() for line in ended.out.splitlines())
    assert heads == ["file", "class", "probability", "class", "2", "probability", "2"]
    load = "import fmexp; p = fmexp.load('moved').predict('picture.png')[0]; print(*(f'{v:.4f}' for v in p))"
    found = installed.run("python", "-c", load, cwd=elsewhere)
    assert (found.status, found.err) == (0, "")
    assert (row[0], {row[1], row[3]}) == ("picture.png", {"along", "across"})
    assert sorted(row[2::2]) == sorted(found.out.split())


@pytest.mark.parametrize("command", commands_of_the_example()[1:])
def test_commands_of_the_example(command: str, installed: Installed, own_project: Path) -> None:
    done = installed.run(*shlex.split(command), cwd=own_project)
    assert done.status == 0, done.err
    folders = results(own_project)
    assert len(folders) == (1 if "--config-dir" in command else 3) + ("--multirun" in command)
    seeds = set()
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["steps"], result["failures"]) == ("complete", 405, {})
        points = scalars(read_events(folder), "weights/norm")
        assert [step for step, _ in points] == [135, 270, 405]
        assert points[-1][1] == pytest.approx(result["metrics"]["weights/norm"])
        seeds.add(OmegaConf.load(folder / ".hydra" / "config.yaml").seed)
    if "train.py" in command:
        assert seeds == {0, 1, 2}
        assert re.fullmatch(r"test accuracy 0\.\d{3}, spread 0\.\d{3}\n", done.out)


def test_missing_conf_is_said(installed: Installed, tmp_path: Path) -> None:
    shutil.copytree(installed.site / "fmexp", tmp_path / "fmexp", ignore=shutil.ignore_patterns("conf", "__pycache__"))
    done = run("--help", cwd=tmp_path, env=environment(tmp_path))
    assert done.status == 1
    assert f"fmexp's conf/ is neither in {tmp_path / 'fmexp'} nor beside it; install fmexp again" in done.err


@pytest.mark.parametrize("path", [*SOURCES, *CONF, *OTHERS], ids=shown)
def test_file_begins_with_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".py":
        assert (ast.get_docstring(ast.parse(text)) or "").strip(), "no docstring"
        return
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), "no comment in the first line"
    assert len(lines[0].split()) >= 5, "a first line that says too little"


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_every_public_function_says_what_it_does(path: Path) -> None:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    public = [node for node in functions if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
