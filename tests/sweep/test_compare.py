"""`python -m fmexp.sweep` of any runs: which there are, how they differ, which is best, with the command for each."""

import csv
import io
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import program
import pytest
from program import Finished
from sweep_tools import SMALL, write_run
from tools import result

from fmexp import sweep
from fmexp.errors import FmexpError
from fmexp.sweep import compare, seeds

Command = Callable[..., Finished]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder where commands are typed."""
    monkeypatch.chdir(tmp_path)


def table(command: Command, *words: str) -> list[dict[str, str]]:
    """The rows of the table, as CSV has them."""
    done = command(*words, "--csv", "-")
    assert (done.status, done.err) == (0, "")
    return list(csv.DictReader(io.StringIO(done.out)))


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    return [row[name] for row in rows]


def folders(rows: list[dict[str, str]]) -> list[str]:
    """The folders of runs, from the folder of the test on, best first."""
    return [str(Path(path).relative_to(Path.cwd())) for path in column(rows, "folder")]


# Which runs there are


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two sweeps, a run below a date, and one beside them."""
    write_run(tmp_path / "multirun" / "day" / "a" / "0_lr-0.1", 0.5, optimizer__lr=0.1)
    write_run(tmp_path / "multirun" / "day" / "a" / "1_lr-0.01", 0.7, optimizer__lr=0.01)
    write_run(tmp_path / "multirun" / "day" / "b" / "0", 0.6, optimizer__lr=0.02)
    write_run(tmp_path / "runs" / "day" / "time", 0.8, optimizer__lr=0.03)
    write_run(tmp_path / "runs" / "first", 0.4, optimizer__lr=0.04)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (["multirun/day/a", "runs/first"], ["multirun/day/a/1_lr-0.01", "multirun/day/a/0_lr-0.1", "runs/first"]),
        (["multirun"], ["multirun/day/a/1_lr-0.01", "multirun/day/b/0", "multirun/day/a/0_lr-0.1"]),
        (["runs"], ["runs/day/time", "runs/first"]),
        (["runs/first"], ["runs/first"]),
        (["multirun/day/b/0", "multirun/day/b", "multirun/day/../day/b/0"], ["multirun/day/b/0"]),
        (["multirun/day/a"], ["multirun/day/a/1_lr-0.01", "multirun/day/a/0_lr-0.1"]),
    ],
)
def test_sweeps_runs_and_folders_above_them(named: list[str], found: list[str], runs: Path, command: Command) -> None:
    assert folders(table(command, *named)) == found
    assert not list(runs.rglob("sweep.csv"))


def test_several_folders_have_a_table_and_nothing_is_written(runs: Path, command: Command) -> None:
    before = sorted(runs.rglob("*"))
    done = command("runs", "multirun/day/b")
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["optimizer.lr", "test/accuracy", "status", "seconds", "folder"]
    assert lines[1].split() == ["0.03", "0.8000", "complete", "1.5", "runs/day/time"]
    assert f"3 runs in {runs}: 3 complete" in lines
    assert "ranked by test/accuracy: more is better" in lines
    assert sorted(runs.rglob("*")) == before


def test_a_sweep_alone_is_concluded_as_ever(runs: Path, command: Command) -> None:
    done = command("multirun/day/a")
    assert "2 members: 2 complete" in done.out
    assert (runs / "multirun" / "day" / "a" / "sweep.csv").is_file()


def test_no_link_is_followed_but_to_a_run_and_nothing_hidden_is_looked_into(runs: Path, command: Command) -> None:
    (runs / "here").mkdir()
    (runs / "here" / "run").symlink_to(runs / "runs" / "first")
    (runs / "here" / "again").symlink_to(runs / "here")
    (runs / "here" / "others").symlink_to(runs / "multirun")
    write_run(runs / "here" / ".hidden" / "run")
    write_run(runs / "here" / ".run", 0.9)
    assert folders(table(command, "here")) == ["here/.run", "here/run"]


def test_a_run_has_no_runs_below_it(runs: Path, command: Command) -> None:
    write_run(runs / "runs" / "first" / "evaluate" / "time", 0.9)
    assert folders(table(command, "runs")) == ["runs/day/time", "runs/first"]


def test_too_much_to_look_through_is_said(runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MOST_FOLDERS", 3)
    done = command(".", "--best", "1")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"{runs} has more than 3 folders. Name one that is nearer to the runs."


def test_a_damaged_run_and_one_of_another_program_are_left_out(
    runs: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    (runs / "runs" / "first" / ".hydra" / "config.yaml").write_text("a: [")
    (runs / "runs" / "theirs" / ".hydra").mkdir(parents=True)
    (runs / "runs" / "theirs" / ".hydra" / "config.yaml").write_text("db: {user: root}")
    assert folders(table(command, "runs")) == ["runs/day/time"]
    assert f"{runs / 'runs' / 'first'} is left out, for it cannot be read: " in caplog.text
    assert f"{runs / 'runs' / 'theirs'} is left out" in caplog.text
    assert "its configuration is not that of a run of fmexp" in caplog.text
    (runs / "runs" / "day" / "time" / ".hydra" / "config.yaml").write_text("a: [")
    assert command("runs", "--best", "1").err == "None of the runs can be read."


# How they differ


def heads(command: Command, *words: str) -> list[str]:
    """The columns before the metrics."""
    names = list(table(command, *words)[0])
    return names[: next(place for place, name in enumerate(names) if "/" in name)]


def test_keys_of_the_identity_that_differ_in_the_order_of_the_configuration(tmp_path: Path, command: Command) -> None:
    write_run(
        tmp_path / "a", device="cpu", train__num_workers=1, dataset__seed=1, seed=1, model__hidden=[1], choice="mlp"
    )
    write_run(
        tmp_path / "b", device="mps", train__num_workers=2, dataset__seed=1, seed=2, model__hidden=[1], choice="adam"
    )
    assert heads(command, ".") == ["seed", "model", "optimizer"]
    rows = {Path(row["folder"]).name: row for row in table(command, ".")}
    assert [rows["a"][name] for name in ("seed", "model", "optimizer")] == ["1", "MLP", "SGD"]
    assert [rows["b"][name] for name in ("seed", "model", "optimizer")] == ["2", "LeNet", "Adam"]


def test_a_key_of_one_choice_counts_where_runs_of_that_choice_differ(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a", choice="mlp", model__hidden=[8])
    write_run(tmp_path / "b", choice="mlp", model__hidden=[16, 8])
    write_run(tmp_path / "c")
    assert heads(command, ".") == ["model", "model.hidden"]
    assert dict(zip(folders(rows := table(command, ".")), column(rows, "model.hidden"), strict=True)) == {
        "a": "[8]", "b": "[16, 8]", "c": "",
    }  # fmt: skip
    write_run(tmp_path / "d", model__old=1)  # of another version of the code
    assert "model.old" in heads(command, "c", "d")


def test_two_functions_of_one_name_are_shown_in_full(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a", model___target_="mine.Net")
    write_run(tmp_path / "b", model___target_="theirs.Net")
    assert sorted(column(table(command, "."), "model")) == ["mine.Net", "theirs.Net"]


def test_what_a_terminal_or_a_spreadsheet_would_obey_is_shown(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "=a", 0.6, train__tag="=1+1")
    write_run(tmp_path / "b", 0.5, train__tag="\x1b[2J")
    rows = table(command, ".")
    assert column(rows, "train.tag") == ["'=1+1", "\\x1b[2J"]
    assert folders(rows) == ["=a", "b"]
    assert "\x1b" not in command(".", "--best", "2").out


# Which is best


def test_the_best_is_first_and_those_without_objective_are_last(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a", None, "failed")
    write_run(tmp_path / "b", 0.5)
    write_run(tmp_path / "c", 0.7)
    write_run(tmp_path / "d", status="interrupted")
    rows = table(command, ".")
    assert folders(rows) == ["c", "b", "a", "d"]
    assert column(rows, "status") == ["complete", "complete", "failed", "interrupted"]
    assert column(rows, "test/accuracy") == ["0.7", "0.5", "", ""]


def test_of_a_loss_less_is_better(tmp_path: Path, command: Command) -> None:
    for name, loss in (("a", 0.5), ("b", 0.3), ("c", 0.4)):
        write_run(tmp_path / name, loss, objective="test/loss")
    assert folders(table(command, ".")) == ["b", "c", "a"]
    assert "ranked by test/loss: less is better" in command(".", "--best", "1").out


@pytest.fixture
def unlike(tmp_path: Path) -> Path:
    """Two runs that are judged by their accuracy and one by its loss; one has failed with an accuracy."""
    write_run(tmp_path / "a", 0.7, metrics={"test/loss": 0.2})
    write_run(tmp_path / "b", 0.3, objective="test/loss", metrics={"test/accuracy": 0.8})
    write_run(tmp_path / "c", None, "failed", metrics={"test/accuracy": 0.9})
    return tmp_path


def test_runs_of_different_objectives_are_not_ranked_but_by_a_metric_that_one_names(
    unlike: Path, command: Command
) -> None:
    done = command(".", "--best", "1")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        "The runs have different objectives, so that none is the best: test/accuracy (2 runs), test/loss (1 runs). "
        "Name a metric that ranks them all, such as --objective test/accuracy, or choose some with "
        "--where objective=test/accuracy."
    )
    assert folders(table(command, ".", "--objective", "test/accuracy")) == ["b", "a", "c"]
    assert folders(table(command, ".", "--objective", "test/loss")) == ["a", "b", "c"]
    assert folders(table(command, ".", "--where", "objective=test/accuracy")) == ["a", "c"]


def test_a_metric_that_no_run_has_written_is_named_with_those_that_there_are(unlike: Path, command: Command) -> None:
    assert command(".", "--objective", "accuracy").err == (
        "--objective accuracy: no run has written this metric. Did you mean test/accuracy?"
    )
    assert command(".", "--objective", "zzz").err.endswith("There are test/accuracy, test/loss.")


def test_the_n_best_are_in_the_table_and_in_csv(tmp_path: Path, command: Command) -> None:
    for number in range(5):
        write_run(tmp_path / str(number), number / 10, train__epochs=number + 1)
    write_run(tmp_path / "5", None, "failed")
    assert folders(table(command, ".", "--best", "2")) == ["4", "3"]
    out = command(".", "--best", "9").out
    assert re.findall(r"^\d\. test/accuracy (\S+): (\S+)", out, re.MULTILINE) == [
        (f"{number / 10:.4f}", str(tmp_path / str(number))) for number in (4, 3, 2, 1, 0)
    ]


def test_csv_has_all_digits_and_goes_to_a_file_with_the_table_on_the_console(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a" / "run", 1 / 3)
    write_run(tmp_path / "b" / "run", 0.25, seed=1)
    done = command("a", "b", "--csv", "table.csv")
    assert "0.3333" in done.out
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert column(rows, "test/accuracy") == [repr(1 / 3), "0.25"]
    assert folders(rows) == ["a/run", "b/run"]
    assert list(rows[0]) == ["seed", "test/accuracy", "status", "seconds", "folder"]


# Which are chosen


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    write_run(tmp_path / "a", optimizer__lr=0.01, train__freeze=["conv1", "fc1"], seed=1)
    write_run(tmp_path / "b", optimizer__lr=1.0, optimizer__nesterov=True, choice="mlp", train__clip_grad=2.5)
    return tmp_path


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["optimizer.lr=0.01"], "a"),
        (["optimizer.lr=1e-2"], "a"),
        (["optimizer.lr=1"], "b"),
        (["optimizer.lr=+1.00"], "b"),
        (["optimizer.nesterov=true"], "b"),
        (["optimizer.nesterov=no"], "a"),
        (["model=MLP"], "b"),
        (["model._target_=fmexp.models.MLP"], "b"),
        (["train.freeze=[conv1, fc1]"], "a"),
        (["train.freeze=fc1"], "a"),
        (["train.freeze=[]"], "b"),
        (["train.clip_grad=null"], "a"),
        (["device=cpu", "seed=1"], "a"),
        (["dataset._target_=fmexp.datasets.synthetic"], "ab"),
    ],
)
def test_where_compares_values_and_not_letters(
    conditions: list[str], found: str, varied: Path, command: Command
) -> None:
    words = [word for condition in conditions for word in ("--where", condition)]
    assert folders(table(command, ".", *words)) == list(found)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("lr=0.1", "no run has the key lr. Did you mean optimizer.lr?"),
        ("optimiser.lr=0.1", "no run has the key optimiser.lr. Did you mean optimizer.lr"),
        ("optimizer.lr=2", "of 2 runs none has this; optimizer.lr is 0.01, 1.0."),
        ("optimizer.nesterov=1", "of 2 runs none has this; optimizer.nesterov is false, true."),
        ("optimizer.lr=[", "of 2 runs none has this; "),
    ],
)
def test_a_condition_that_nothing_meets(condition: str, said: str, varied: Path, command: Command) -> None:
    done = command(".", "--where", condition)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"--where {condition}: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is no folder"),
        ([".", "--where", "seed"], "--where seed must be key=value, such as optimizer.lr=0.01"),
        ([".", "--best", "0"], "--best 0 must be at least 1"),
        ([".", "--best", "many"], "invalid int value"),
        (["--csv", "a", "b"], "a cannot be written, for it is no file"),
        ([".", "--csv", "c/d.csv"], "d.csv cannot be written, for it is no file in a folder that is there"),
        ([".", "--csv", "link"], "link cannot be written"),
        ([".", "--delete", "complete"], "invalid choice: 'complete'"),
        ([".", "--delete", "running"], "invalid choice: 'running'"),
        ([".", "--delete", "failed", "--best", "1"], "--delete goes with --where and --yes alone"),
        ([".", "--del", "failed"], "unrecognized arguments: --del"),
        ([".", "--yes"], "--yes is for --delete"),
    ],
)
def test_arguments_that_cannot_be_used(words: list[str], said: str, tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a", None, "failed")
    write_run(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b" / "result.json")
    before = sorted(tmp_path.rglob("*"))
    done = command(*words)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert sorted(tmp_path.rglob("*")) == before


# Replicates


def test_replicates_have_mean_spread_n_and_interval(tmp_path: Path, command: Command) -> None:
    scores = (0.80, 0.83, 0.81, 0.86)
    for seed, score in enumerate(scores):
        write_run(tmp_path / "a" / str(seed), score, seed=seed, optimizer__lr=0.1)
    write_run(tmp_path / "a" / "4", None, "diverged", seed=4, optimizer__lr=0.1)
    for seed, score in ((0, 0.6), (1, 0.7)):
        write_run(tmp_path / "b" / str(seed), score, seed=seed, optimizer__lr=0.2)
    write_run(tmp_path / "single", 0.9, optimizer__lr=0.3)
    lines = command("a", "b", "single").out.splitlines()
    start = next(number for number, line in enumerate(lines) if "spread" in line)
    assert lines[start].split("  ") == ["optimizer.lr", "n", "mean test/accuracy", "spread", "95 % interval"]
    spread = statistics.stdev(scores)
    half = 3.182446305 * spread / 2  # Student's t of 3 degrees of freedom, and the square root of 4
    assert lines[start + 1 : start + 4] == [
        "0.3           1  0.9000",
        f"0.1           4  0.8250              {spread:.4f}  {0.825 - half:.4f} to {0.825 + half:.4f}",
        "0.2           2  0.6500              0.0707  0.0147 to 1.2853",  # 12.706 times 0.0707 / sqrt(2)
    ]


def test_the_same_run_twice_is_no_replicate(tmp_path: Path, command: Command) -> None:
    for name, seed, score in (("a", 0, 0.5), ("b", 0, 0.5), ("c", 1, 0.6)):
        write_run(tmp_path / name, score, seed=seed)
    out = command(".", "--objective", "test/accuracy").out
    assert re.search(r"^2  0\.5500 +0\.0707 ", out, re.MULTILINE)
    assert "the same run, which counts once as a replicate: a and b" in out


def test_runs_that_differ_in_more_than_the_seed_are_no_replicates(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a" / "0", seed=0)
    write_run(tmp_path / "b" / "1", seed=1, train__ema=0.9)
    assert "spread" not in command("a", "b").out


def test_student_t_is_that_of_the_tables() -> None:
    known = {1: 12.7062047362, 2: 4.3026527297, 3: 3.1824463053, 4: 2.7764451052, 5: 2.5705818356, 10: 2.2281388520,
             29: 2.0452296421, 30: 2.0422724563, 120: 1.9799304051, 1000: 1.9623390808}  # fmt: skip
    for freedom, quantile in known.items():
        assert math.isclose(seeds.student_t(freedom), quantile, rel_tol=1e-10)


# The command that makes a run again


def printed_command(done: Finished) -> list[str]:
    """The words of the one command below the table, without `python -m fmexp`."""
    (line,) = (line for line in done.out.splitlines() if line.startswith("  python"))
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "fmexp"]
    return words[3:]


def test_the_command_makes_the_run_again(tmp_path: Path, command: Command) -> None:
    own = tmp_path / "my conf" / "optimizer"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "defaults: [/schema/optimizer/sgd@_here_, _self_]\n_target_: torch.optim.SGD\nlr: 0.5\n"
    )
    words = ("--config-dir", "my conf", "-m", *SMALL, "optimizer=mine", "train.tag='a loss, $HOME'", "seed=1,2")
    assert program.call(*words, "hydra.sweep.dir=sweep", cwd=tmp_path).status == 0
    again = printed_command(command("sweep", "--best", "1"))
    assert again[:2] == ["--config-dir", str(tmp_path / "my conf")]
    assert program.call(*again, "hydra.run.dir=again", cwd=tmp_path).status == 0
    (first,) = (result(path) for path in (tmp_path / "sweep").glob("[01]_*") if f"seed={path.name[-1]}" in again)
    assert result(tmp_path / "again")["config_digest"] == first["config_digest"]
    assert result(tmp_path / "again")["objective"] == first["objective"]


def test_a_run_that_python_has_executed_has_no_command(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", words=["seed=0", "--config-dir=/tmp"])
    out = command("a", "--best", "1").out
    assert "executed from Python: its configuration is in .hydra/config.yaml" in out
    assert "executed from Python" in command("b", "--best", "1").out  # an option is no override: nobody has typed it


# From Python


def test_frame_gives_pandas_what_the_table_has(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = ModuleType("pandas")
    monkeypatch.setattr(pandas, "DataFrame", lambda columns: columns, raising=False)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    write_run(runs / "runs" / "second", 0.3, choice="mlp", metrics={"test/loss": 1.5}, seed=3)
    columns = sweep.frame(runs / "multirun" / "day" / "a", str(runs / "runs" / "second"))
    assert columns == {
        "seed": [0, 0, 3],
        "model": ["LeNet", "LeNet", "MLP"],
        "optimizer.lr": [0.1, 0.01, 0.001],
        "test/accuracy": [0.5, 0.7, 0.3],
        "test/loss": [pytest.approx(math.nan, nan_ok=True)] * 2 + [1.5],
        "status": ["complete"] * 3,
        "steps": [0, 0, 0],
        "seconds": [1.5] * 3,
        "folder": [str(runs / "multirun" / "day" / "a" / name) for name in ("0_lr-0.1", "1_lr-0.01")]
        + [str(runs / "runs" / "second")],
    }


def test_frame_of_the_real_pandas(runs: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is no dependency of fmexp")
    found = sweep.frame(runs)
    assert isinstance(found, pandas.DataFrame)
    assert found["test/accuracy"].max() == 0.8


def test_frame_says_what_is_missing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FmexpError, match="needs pandas: pip install pandas"):
        sweep.frame(runs)
    monkeypatch.setitem(sys.modules, "pandas", ModuleType("pandas"))
    with pytest.raises(FmexpError, match="nowhere is no folder"):
        sweep.frame(runs / "nowhere")
    (runs / "empty").mkdir()
    with pytest.raises(FmexpError, match=f"No folder in {runs / 'empty'} holds a run"):
        sweep.frame(runs / "empty")


def test_a_table_imports_no_torch(runs: Path) -> None:
    code = "import sys; from fmexp.sweep.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    command = (sys.executable, "-c", code)
    done = program.run("multirun", "runs", cwd=runs, command=command)
    assert (done.status, done.err) == (0, "")
    assert "5 runs" in done.out
