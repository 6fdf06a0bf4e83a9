"""`python -m fmexp.sweep`: the table of any folder of runs, whatever made them and whatever one of them holds."""

import csv
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from program import Finished, environment
from program import run as execute_program
from tools import small

from fmexp import execute, sweep

Command = Callable[..., Finished]
DAMAGE = {
    ".hydra/config.yaml": ("a: [", "", "\0"),
    ".hydra/overrides.yaml": ("a: [", "\0"),
    "result.json": (
        '{"status": "complete", "objective": "best"}',
        '{"status": "complete", "metrics": [1]}',
        '{"status": "complete", "metrics": {"test/accuracy": "good"}}',
        '{"status": "complete", "seconds": null}',
    ),
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs that fmexp.execute has made."""
    folder = tmp_path_factory.mktemp("executed") / "runs"
    execute(small("train.max_steps=1", "logging=light"), folder / "mine")
    shutil.copytree(folder / "mine", folder / "yours")
    return folder


@pytest.fixture
def runs(executed: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(executed, tmp_path / "runs")


def test_table_of_runs_that_python_has_executed(runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    done = command("runs")
    assert (done.status, done.err) == (0, "")
    for name in ("mine", "yours"):
        accuracy = next(member for member in sweep.read(runs) if member.folder.name == name).objective
        (line,) = (line for line in done.out.splitlines() if line.endswith(name))
        assert f"{accuracy:.4f}" in line
        assert "complete" in line
    assert "2 members: 2 complete" in done.out
    assert len((runs / "sweep.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(("damaged", "sound"), [("mine", "yours"), ("yours", "mine")])
@pytest.mark.parametrize(("file", "content"), [(file, content) for file in DAMAGE for content in DAMAGE[file]])
def test_one_damaged_run_does_not_cost_the_table(
    file: str, content: str, damaged: str, sound: str, runs: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    (runs / damaged / file).write_text(content)
    done = command(str(runs))
    assert done.status == 0
    shown = {line.split()[-1] for line in done.out.splitlines() if " complete " in line}
    assert shown - {damaged} == {sound}
    left_out = f"{runs / damaged} is left out, for it cannot be read: " in caplog.text
    assert left_out == (damaged not in shown)
    assert left_out or file.endswith("config.yaml")  # of which the table needs that of one member


def test_help_says_what_is_printed_and_written(tmp_path: Path) -> None:
    done = execute_program("--help", cwd=tmp_path, command=(sys.executable, "-m", "fmexp.sweep"))
    assert (done.status, done.err) == (0, "")
    assert "usage: python -m fmexp.sweep [-h] " in done.out
    assert "folder [folder ...]\n" in done.out
    assert "sweep.csv" in done.out
    assert list(tmp_path.iterdir()) == []
    env = environment() | {"COLUMNS": "80"}
    assert max(map(len, execute_program("--help", cwd=tmp_path, command=(sys.executable, "-m", "fmexp.sweep"), env=env)
                   .out.splitlines())) <= 80  # fmt: skip


def test_folder_that_is_not_there_or_holds_no_run(
    runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    missing = command("nowhere")
    assert missing.status == 2
    assert f"error: {runs.parent / 'nowhere'} is no folder" in missing.err
    assert command().status == 2
    (runs / "empty").mkdir()
    assert command("runs/empty") == Finished(1, "", f"No folder in {runs / 'empty'} holds a run.")
    assert list((runs / "empty").iterdir()) == []
    above = command(".")
    assert (above.status, above.err) == (0, "")
    assert f"2 runs in {runs}: 2 complete" in above.out
    assert not (runs / "sweep.csv").exists()


def test_no_cell_is_a_formula_and_a_number_is_a_number(runs: Path, command: Command) -> None:
    (runs / "mine" / ".hydra" / "overrides.yaml").write_text("['a==HYPERLINK(1)', 'b=-0.5', 'c=\\e[2J']")
    (runs / "yours" / ".hydra" / "overrides.yaml").write_text("[a=1, b=2, c=3]")
    assert command(str(runs)).status == 0
    rows = list(csv.DictReader((runs / "sweep.csv").read_text().splitlines()))
    cells = next(row for row in rows if row["folder"] == "mine")
    assert [cells[key] for key in ("a", "b", "c")] == ["'=HYPERLINK(1)", "-0.5", "\\e[2J"]


def test_a_link_in_place_of_the_summary_is_left_alone(
    runs: Path, command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "theirs").mkdir()
    (runs / "summary").symlink_to(tmp_path / "theirs")
    assert command(str(runs)).status == 0
    assert f"{runs / 'summary'} is not the sweep's own, and is left alone" in caplog.text
    assert list((tmp_path / "theirs").iterdir()) == []
    assert (runs / "sweep.csv").is_file()


def test_a_result_that_no_run_has_written_counts_as_not_ended(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    (runs / "mine" / "result.json").write_text('{"status": "complete", "objective": "best"}')
    with caplog.at_level("INFO"):
        value = execute(small("train.max_steps=1", "logging=light"), runs / "mine")
    assert f"{runs / 'mine' / 'result.json'} is damaged, and the run counts as not ended" in caplog.text
    assert value == sweep.read(runs)[0].objective == sweep.read(runs)[1].objective
