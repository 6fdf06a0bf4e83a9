"""The three changes of CONTRIBUTING.md: each applies, touches two files, and does what it says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import CHECKOUT, environment, run
from tools import SMALL, read_events

DIFFS = re.findall(r"^```diff\n(.*?)^```$", (CHECKOUT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
QUICK = ("device=cpu", "logging=light", "hydra.run.dir=out")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of fmexp and its conf with all three changes."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    copy = tmp_path_factory.mktemp("changed")
    for folder in ("fmexp", "conf"):
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    return copy


def result(*words: str, changed: Path, cwd: Path) -> dict[str, float]:
    done = run(*words, *QUICK, cwd=cwd, env=environment(changed))
    assert done.status == 0, done.err
    metrics: dict[str, float] = json.loads((cwd / "out" / "result.json").read_text())["metrics"]
    return metrics


def test_each_change_touches_two_files() -> None:
    assert [len(re.findall(r"^diff --git", diff, re.MULTILINE)) for diff in DIFFS] == [2, 2, 2]


def test_the_model_and_the_dataset(changed: Path, tmp_path: Path) -> None:
    metrics = result("model=linear", "dataset=quadrants", "optimizer.lr=0.1", changed=changed, cwd=tmp_path)
    assert metrics["test/accuracy"] == 1.0


def test_the_stage(changed: Path, tmp_path: Path) -> None:
    result("stage.weights.required=true", "model=mlp", *SMALL, changed=changed, cwd=tmp_path)
    tags = read_events(tmp_path / "out").Tags()["histograms"]
    assert "weights/1.weight" in tags
    assert len(tags) == 6


@pytest.mark.slow
def test_the_tests_of_the_configuration_and_of_help_pass_with_all_three(tmp_path: Path) -> None:
    """There is no list to extend: help, schemas and tests find a new option by itself."""
    for name in ("fmexp", "conf", "tests", "docs", "examples", "README.md", "CONTRIBUTING.md", "pyproject.toml"):
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "runs", "multirun"))
        else:
            shutil.copy(source, tmp_path)
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    words = ["-v", "-n", "0", "-p", "no:cacheprovider", "tests/config/test_conf.py", "tests/test_cli.py"]
    words += ["-k", "linear or quadrants or weights or help"]  # of all others the checkout's own are enough
    done = run(*words, cwd=tmp_path, command=(sys.executable, "-m", "pytest"), env=environment(tmp_path))
    assert done.status == 0, done.out
    trains = "test_every_option_trains_with_all_defaults"
    for passed in (f"{trains}[model-linear]", f"{trains}[dataset-quadrants]", "test_help_lists_every_stage"):
        assert f"{passed} PASSED" in done.out
