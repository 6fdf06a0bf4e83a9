"""The wheel: what it holds, and the program run from it alone; and that every source file says what it is for."""

import ast
import email
import json
import os
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from program import CHECKOUT, environment, run
from tools import SMALL

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the hook that pip calls."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert [path.name for path in folder.iterdir()] == done.stdout.split()
    return folder / done.stdout.strip()


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    (path,) = unpacked.glob("fmexp-*.dist-info/METADATA")
    return email.message_from_string(path.read_text())


def test_wheel_holds_every_file_of_the_package_and_of_conf(unpacked: Path) -> None:
    expected = {path.relative_to(CHECKOUT): path for path in PACKAGE}
    expected |= {Path("fmexp") / path.relative_to(CHECKOUT): path for path in CONF}
    found = {path.relative_to(unpacked) for path in (unpacked / "fmexp").rglob("*") if path.is_file()}
    assert found == set(expected)
    for name, path in expected.items():
        assert (unpacked / name).read_bytes() == path.read_bytes(), name


def test_wheel_says_what_it_is_and_needs(unpacked: Path, metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("fmexp", fmexp.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert len(metadata["Summary"]) > 20
    (license_file,) = unpacked.glob("fmexp-*.dist-info/licenses/LICENSE")
    assert license_file.read_text() == (CHECKOUT / "LICENSE").read_text()
    assert license_file.read_text().startswith("MIT License")
    assert metadata.get_payload() == (CHECKOUT / "README.md").read_text()
    needed = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    names = {"filelock>=3.31", "matplotlib", "numpy", "omegaconf", "tensorboard", "torch", "torchvision", "tqdm"}
    assert names <= needed
    assert "hydra-core<1.5,>=1.3.8" in needed
    assert {"sweep", "test", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    (scripts,) = unpacked.glob("fmexp-*.dist-info/entry_points.txt")
    assert scripts.read_text().split("\n")[:2] == ["[console_scripts]", "fmexp = fmexp.cli:main"]


def test_program_from_the_wheel_alone(unpacked: Path, tmp_path: Path) -> None:
    env = environment(unpacked)
    shown = run("--cfg", "job", "model=mlp", cwd=tmp_path, env=env)
    assert (shown.status, shown.err) == (0, "")
    expected = OmegaConf.create(OmegaConf.to_yaml(fmexp.compose(["model=mlp"])))
    assert OmegaConf.create(shown.out) == expected
    done = run(*SMALL, "logging=light", "hydra.run.dir=out", cwd=tmp_path, env=env)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["status"] == "complete"
    sources = OmegaConf.load(tmp_path / "out" / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    assert str(unpacked / "fmexp" / "conf") in [source.path for source in sources]
    where = [sys.executable, "-c", "import fmexp.config; print(fmexp.__file__, fmexp.config.conf_dir(), sep='\\n')"]
    found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [str(unpacked / "fmexp" / "__init__.py"), str(unpacked / "fmexp" / "conf")]
    assert str(CHECKOUT) + os.sep not in found + done.out


def test_missing_conf_is_said(unpacked: Path, tmp_path: Path) -> None:
    for path in (unpacked / "fmexp").glob("*.py"):
        target = tmp_path / "fmexp" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
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
