"""benchmarks/soak.py: that it stops sweeps and compares them, and that it sees a difference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from reliability_tools import BARE, ROOT, environment, left

from fmexp import compose, execute


@pytest.mark.slow
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    words = ("--minutes", "0.3", "--seed", "3", "--members", "dropout", "lstm", "map-style")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "soak.py", *words],
        env=environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.match(r"(\d+) sweeps, (\d+) members compared, 0 differences, 0 hangs, (\d+) signals, (\d+) starts", last)
    assert found, last
    sweeps, members, signals, starts = map(int, found.groups())
    assert members == 3 * sweeps > 0
    assert signals > 0
    assert starts > sweeps
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import soak

    folder = tmp_path / "sweep" / "0_experiment-lstm"
    execute(compose([*BARE, "train.max_steps=4"]), folder)
    (tmp_path / "sweep" / "sweep.csv").write_text("status\ncomplete\n")
    all_of_it = soak.Soak(tmp_path, ["lstm"], seed=0, minutes=0)
    all_of_it.truth["lstm"] = left(folder)
    soak.Round(all_of_it, tmp_path / "sweep").compare()
    assert all_of_it.summary().startswith("0 sweeps, 1 members compared, 0 differences, 0 hangs")

    result = folder / "result.json"
    result.write_text(result.read_text().replace('"steps": 4', '"steps": 5'))
    (folder / ".model.pt.x.part").touch()
    soak.Round(all_of_it, tmp_path / "sweep").compare()
    printed = capsys.readouterr().out
    assert "result of 0_experiment-lstm" in printed
    assert "temporary files are left" in printed
    assert all_of_it.counts["differences"] == 3  # of the result, of the files, of the temporary one
