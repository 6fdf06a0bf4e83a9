"""Successive halving: who goes on, how members are drawn, what a person reads of it, and what is refused."""

import csv
import itertools
import json
import logging
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import program
import pytest
from sweep_tools import Sweep, files, member, members, until
from tools import read_events, result, scalars, small

from fmexp import execute, sweep
from fmexp.engine import backend
from fmexp.rundir.rungs import write as write_rung
from fmexp.sweep import figure, figure_data, halving, progress, slurm

# 30 training batches of 4 in an epoch; by default rungs at 4 and 10 for nine members.
DATA = ("dataset=synthetic", "dataset.train_size=160", "dataset.test_size=40", "logging=light", "device=cpu",
        "train.batch_size=4", "train.log_every=10", "train.validation=0.25", "objective=val/accuracy", "model=mlp",
        "model.hidden=[16]", "optimizer=adam")  # fmt: skip
WORDS = ("-m", *DATA, "hydra/sweeper=halving")
LRS = ("1e-09", "0.01", "0.003", "1e-05", "0.001", "0.03", "0.0003", "0.0001", "2e-09")  # as Hydra writes them
NINE = (*WORDS, f"optimizer.lr={','.join(LRS)}")


def rungs(path: Path) -> dict[int, float]:
    found = json.loads((path / "rungs.json").read_text())
    return {int(step): math.nan if value is None else value for step, value in found.items()}


def call(root: Path, *words: str) -> program.Finished:
    return program.call(*words, f"hydra.sweep.dir={root}", cwd=root.parent)


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, program.Finished]:
    root = tmp_path_factory.mktemp("nine") / "s"
    done = call(root, *NINE)
    assert done.status == 0, done.err
    return root, done


def test_the_best_third_goes_on_from_each_rung_and_of_equal_ones_the_first(
    nine: tuple[Path, program.Finished], tmp_path: Path
) -> None:
    root, _ = nine
    values = {path.name: rungs(path) for path in members(root)}
    left = list(values)
    for step, count in ((4, 3), (10, 1)):
        assert {name for name in values if step in values[name]} == set(left)
        left = sorted(left, key=lambda name: -values[name][step])[:count]  # stable: by the members' numbers
    statuses = {path.name: result(path)["status"] for path in members(root)}
    assert statuses == {name: "complete" if name in left else "pruned" for name in values}
    assert len({values[name][4] for name in values}) < 9, "some are equal"
    for path in members(root):
        found = result(path)
        assert found["steps"] == (30 if path.name in left else max(values[path.name]))
        assert (found["objective"] is None) == (path.name not in left)
        assert path.name in left or (path / "checkpoint.pt").exists(), "it may go on later"
        # The objective of a rung is that of a run which ends there.
        lr = path.name.partition("lr-")[2]
        execute(small(*DATA, f"optimizer.lr={lr}", "train.max_steps=4"), tmp_path / path.name)
        assert result(tmp_path / path.name)["objective"] == values[path.name][4]


def test_what_is_printed_and_written_names_rungs_and_those_left_behind(nine: tuple[Path, program.Finished]) -> None:
    root, done = nine
    lines = done.out.splitlines()
    assert lines[0] == f"halving of 9 members in {root}: 3 from 4, 1 from 10 go on, to the end at 30 batches"
    found = {m.folder.name: m for m in sweep.read(root)}
    assert re.sub(r"\s+", " ", lines[1]).startswith(
        f"[1/9] 0_lr-1e-09 step 4: val/accuracy {found['0_lr-1e-09'].rungs[4]:.4f} "
    )
    first = sorted((m.rungs[4] for m in found.values()), reverse=True)[:3]
    assert f"after 4 batches 3 of 9 members go on, with val/accuracy from {first[2]:.4f} to {first[0]:.4f}" in lines
    assert "9 members: 1 complete, 8 pruned" in lines
    assert lines[-1] == "trained 74 of the 270 batches of all 9 members (27.4%)", "9 * 4 + 3 * 6 + 20"
    assert any(line.startswith("pruned: ended early, by the objective there, and not ranked with") for line in lines)

    rows = list(csv.DictReader((root / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["complete", *["pruned"] * 8]
    assert [int(row["rung"]) for row in rows] == [10, 10, 10, *[4] * 6]
    values = [float(row["rung/accuracy"]) for row in rows]
    assert values[1:3] == sorted(values[1:3], reverse=True)
    assert values[3:] == sorted(values[3:], reverse=True)
    for row in rows:
        assert found[row["folder"]].rungs[int(row["rung"])] == float(row["rung/accuracy"])
        assert (row["val/accuracy"] == "") == (row["status"] == "pruned")

    for m in found.values():  # for HPARAMS and SCALARS; a survivor's events are those of a run that was alone
        events = read_events(m.folder)
        if m.status == "pruned":
            assert scalars(events, "rung/accuracy") == [(s, pytest.approx(v)) for s, v in m.rungs.items()]
        else:
            assert "rung/accuracy" not in events.Tags()["scalars"]
    drawn = figure.draw(figure_data.read(root, list(found.values())))
    (marks,) = (line for axis in drawn.axes for line in axis.get_lines() if line.get_gid() == "pruned")
    pruned = {float(m.overrides["optimizer.lr"]): list(m.rungs.values())[-1]
              for m in found.values() if m.status == "pruned"}  # fmt: skip
    assert dict(marks.get_xydata().tolist()) == pruned
    assert "of 1 members (8 more pruned: x, at their last rung)" in drawn.get_suptitle()


def test_the_time_left_is_estimated_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """74 in all; where a member counts, those of the first rung would seem to be nearly everything."""
    monkeypatch.setattr(progress, "EVERY_S", 0)
    lines = [line for line in call(tmp_path / "s", *NINE).out.splitlines() if line.startswith("sweep: ")]
    counts = [re.match(r"sweep: (\d+) of 74 batches, \d\d:\d\d left", line) for line in lines]
    assert [int(found[1]) for found in counts if found] == [*range(4, 37, 4), 42, 48, 54], "and the end has none"


def test_of_a_sweep_that_was_killed_the_table_says_how_to_go_on(
    nine: tuple[Path, program.Finished], command: Any, tmp_path: Path
) -> None:
    root = tmp_path / "a sweep"
    begun = Sweep(root, *NINE[1:])
    until(lambda: len(list(root.glob("*/rungs.json"))) >= 3, "three members at the first rung", begun)
    begun.kill()
    said = command(str(root)).out
    assert re.search(r"^\d members: \d paused", said, re.MULTILINE)
    (line,) = (line for line in said.splitlines() if line.startswith("  python -m fmexp"))
    words = shlex.split(line)[3:]
    assert f"hydra.sweep.dir='{root}'" in words
    assert program.call(*words, cwd=tmp_path).status == 0
    for path in members(nine[0]):
        assert rungs(root / path.name) == rungs(path)
    assert "go on with" not in command(str(root)).out


def test_pruned_members_can_be_deleted(nine: tuple[Path, program.Finished], command: Any, tmp_path: Path) -> None:
    shutil.copytree(nine[0], tmp_path / "s")
    done = command(str(tmp_path / "s"), "--delete", "pruned", "--yes")
    assert done.out.endswith("8 deleted\n"), done
    assert [result(path)["status"] for path in members(tmp_path / "s")] == ["complete"]


def test_the_table_of_the_folder_is_the_same(nine: tuple[Path, program.Finished], command: Any, tmp_path: Path) -> None:
    root, done = nine
    printed = command(str(root)).out
    assert printed.split("\n\n")[0] in done.out
    assert "9 members: 1 complete, 8 pruned" in printed
    together = list(csv.DictReader(command(str(root), "--csv", "-", "--where", "seed=0").out.splitlines()))
    assert [row["rung"] for row in together] == ["10"] * 3 + ["4"] * 6, "nor are they ranked among any runs"


def test_the_same_command_trains_nothing_and_with_resume_pruned_all_go_on(
    nine: tuple[Path, program.Finished], tmp_path: Path
) -> None:
    root = tmp_path / "s"
    assert call(root, *NINE).status == 0
    before = {path.name: files(path) for path in members(root)}
    again = call(root, *NINE)
    assert again.status == 0
    assert again.out.splitlines()[-1] == nine[1].out.splitlines()[-1]
    assert {path.name: files(path) for path in members(root)} == before
    done = call(root, *NINE, "hydra.sweeper.resume_pruned=true")
    assert done.status == 0, done.err
    assert "9 members: 9 complete" in done.out
    assert done.out.splitlines()[-1] == "trained 270 of the 270 batches of all 9 members (100.0%)"
    grid = tmp_path / "grid"
    assert program.call("-m", *DATA, NINE[-1], f"hydra.sweep.dir={grid}", cwd=tmp_path).status == 0
    for path in members(grid):
        ours = root / path.name
        assert (ours / "model.pt").read_bytes() == (path / "model.pt").read_bytes()
        assert result(ours)["config_digest"] == result(path)["config_digest"]
        assert "rung/accuracy" not in read_events(ours).Tags()["scalars"], "it has an end now"
    assert call(root, *NINE).status == 0, "those that went on stay as they are"
    assert {result(path)["status"] for path in members(root)} == {"complete"}


def test_a_plain_sweep_goes_on_with_pruned_members(nine: tuple[Path, program.Finished], tmp_path: Path) -> None:
    root = tmp_path / "s"
    assert call(root, *NINE).status == 0
    done = program.call("-m", *DATA, f"optimizer.lr={LRS[0]},{LRS[1]}", f"hydra.sweep.dir={root}", cwd=tmp_path)
    assert done.status == 0
    assert result(member(root, f"lr-{LRS[0]}"))["status"] == "complete"
    assert "going on from the checkpoint at step" in (member(root, f"lr-{LRS[0]}") / "fmexp.log").read_text()


def plan(tmp_path: Path, *words: str) -> list[dict[str, str]]:
    """The members of a dry run, as its table has them."""
    done = program.call(*WORDS, *words, "sweep.dry_run=true", f"hydra.sweep.dir={tmp_path}/none", cwd=tmp_path)
    assert done.status == 0, done.err
    assert not (tmp_path / "none").exists()
    rows = [re.split(r"\s{2,}", line) for line in done.out.partition("\n\n")[0].splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


SPACE = ("optimizer.lr=tag(log, interval(1e-4, 1e-1))", "model.dropout=interval(0.0, 0.5)",
         "train.batch_size=int(interval(2, 4))", "augment=none,crop_flip")  # fmt: skip


def test_draws_follow_from_the_seed_and_their_number_alone(tmp_path: Path) -> None:
    keys = ("optimizer.lr", "model.dropout", "train.batch_size", "augment")
    few, many = (plan(tmp_path, *SPACE, f"hydra.sweeper.n_trials={n}") for n in (5, 60))
    assert [[row[key] for key in keys] for row in few] == [[row[key] for key in keys] for row in many[:5]]
    assert len(many) == 60
    lrs = sorted(float(row["optimizer.lr"]) for row in many)
    assert 1e-4 <= lrs[0] < lrs[-1] <= 1e-1
    assert 10 < sum(lr < 10**-2.5 for lr in lrs) < 50, "on a logarithmic scale"
    assert {row["train.batch_size"] for row in many} == {"2", "3", "4"}
    assert {row["augment"] for row in many} == {"none", "crop_flip"}
    assert all(0 <= float(row["model.dropout"]) <= 0.5 for row in many)
    places = [sorted(many, key=lambda row: float(row[key])) for key in ("optimizer.lr", "model.dropout")]
    assert places[0] != places[1], "each key for itself"
    turned = plan(tmp_path, *reversed(SPACE), "hydra.sweeper.n_trials=5")
    assert [[row[key] for key in keys] for row in turned] == [[row[key] for key in keys] for row in few]
    other = plan(tmp_path, *SPACE, "hydra.sweeper.n_trials=5", "hydra.sweeper.seed=1")
    assert other[0]["optimizer.lr"] != few[0]["optimizer.lr"]


def test_a_search_that_is_extended_takes_what_is_there(tmp_path: Path) -> None:
    root = tmp_path / "s"
    words = (*WORDS, "optimizer.lr=tag(log, interval(1e-5, 1e-1))", "hydra.sweeper.min_steps=4", "hydra.sweeper.eta=2")
    assert call(root, *words, "hydra.sweeper.n_trials=4").status == 0
    first = {path.name: (rungs(path), (path / "fmexp.log").read_text()) for path in members(root)}
    assert sorted(len(values) for values, _ in first.values()) == [1, 1, 2, 3]
    done = call(root, *words, "hydra.sweeper.n_trials=7")
    assert done.status == 0, done.err
    assert len(members(root)) == 7
    for name, (values, log) in first.items():
        now = rungs(root / name)
        assert {step: now[step] for step in values} == values
        assert len(now) > len(values) or (root / name / "fmexp.log").read_text() == log, "nothing is trained again"
    truth = tmp_path / "truth"
    assert call(truth, *words, "hydra.sweeper.n_trials=7").status == 0
    of_truth = {path.name: rungs(path) for path in members(truth)}
    assert all(of_truth[path.name].items() <= rungs(path).items() for path in members(root))


def test_rungs_of_more_members_are_those_of_fewer_and_earlier_ones() -> None:
    assert [halving.rung_steps(2531, 3, count, None) for count in (2, 8, 9, 27, 80, 81)] == [
        [844], [844], [282, 844], [94, 282, 844], [94, 282, 844], [32, 94, 282, 844]]  # fmt: skip
    assert halving.rung_steps(10, 3, 81, None) == [1, 2, 4], "two at one step are one"
    assert halving.rung_steps(1000, 3, 81, 100) == [100, 300, 900], "any number of members has the same"
    for total in range(2, 200):
        for eta in (2, 3, 4):
            found = [halving.rung_steps(total, eta, eta**n, None) for n in range(1, 6)]
            assert all(few == more[-len(few) :] for few, more in itertools.pairwise(found)), (total, eta)
            assert all(steps[0] >= 1 and steps[-1] < total for steps in found)


def test_members_are_compared_at_the_same_step_after_an_extension_by_a_power_of_eta(tmp_path: Path) -> None:
    """Three of nine have passed the first rung of nine before there was one: they go on from it without a comparison,
    and a third of the other six; at the next one all five are compared."""
    root = tmp_path / "s"
    assert call(root, *WORDS, f"optimizer.lr={','.join(LRS[:3])}").status == 0
    assert {path.name: list(rungs(path)) for path in members(root)} == {path.name: [10] for path in members(root)}
    first = {path.name for path in members(root)}
    done = call(root, *NINE)
    assert done.status == 0, done.err
    found = {path.name: rungs(path) for path in members(root)}
    rest = sorted(found.keys() - first, key=lambda name: (-found[name].get(4, math.nan), int(name[0])))
    assert len(rest) == 6
    for name in rest:
        assert list(found[name]) == ([4, 10] if name in rest[:2] else [4])
    best = sorted([*first, *rest[:2]], key=lambda name: (-found[name][10], int(name[0])))[0]
    statuses = {path.name: result(path)["status"] for path in members(root)}
    assert statuses[best] == "complete"
    assert all(statuses[name] == "pruned" for name in statuses.keys() - first - {best})
    assert re.search(
        r"after 4 batches 5 of 9 members go on, with .*; 3 of them are further, and compared later\n", done.out
    )


def test_a_rung_that_trains_nobody_says_nothing_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(slurm, "_queue", lambda: {"12_3"})
    with progress.Progress(1, "val/accuracy") as shown:
        slurm.run(tmp_path, [], None, shown, fail_fast=False)
    assert not caplog.records


def test_more_epochs_where_the_best_has_kept_no_checkpoint(nine: tuple[Path, program.Finished], tmp_path: Path) -> None:
    """The pruned ones go on from theirs; it begins at the start, beside its old folder, which stays as it is."""
    root = tmp_path / "s"
    assert call(root, *NINE).status == 0
    (best,) = (path for path in members(root) if result(path)["status"] == "complete")
    before = files(best)
    done = call(root, *NINE, "train.epochs=3")
    assert done.status == 0, done.err
    assert "8 members with fewer epochs go on" in done.out
    assert files(best) == before
    assert {path.name for path in members(root)} == {path.name for path in members(nine[0])} | {f"{best.name}_2"}
    assert min(rungs(root / f"{best.name}_2")) == 10
    for path in members(root):
        assert (result(path)["config_digest"] == result(best)["config_digest"]) == (path == best)
        assert "going on from the checkpoint" in (path / "fmexp.log").read_text() or path.name.startswith(best.name)


@pytest.mark.parametrize("wrong", ["hydra.sweeper.brackets=9", "hydra.sweeper.min_steps=1000", "hydra/launcher=slurm"])
def test_more_epochs_that_are_refused_leave_the_members_as_they_are(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s"
    words = (*WORDS, f"optimizer.lr={','.join(LRS[:3])}", "train.keep_checkpoint=true")
    assert call(root, *words).status == 0
    before = {path.name: files(path) for path in members(root)}
    monkeypatch.setenv("PATH", "")  # where no Slurm is
    refused = call(root, *words, "train.epochs=3", wrong)
    assert refused.status == 1
    assert {path.name: files(path) for path in members(root)} == before


def test_members_that_would_be_compiled_begin_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "s"
    words = (*WORDS, f"optimizer.lr={','.join(LRS[:3])}", "train.keep_checkpoint=true")
    assert call(root, *words).status == 0
    monkeypatch.setattr(backend, "MANY_BATCHES", 40)
    done = call(root, *words, "train.epochs=3", "sweep.dry_run=true")
    assert done.status == 0, done.err
    assert "train.compile=auto compiles the step" in done.out
    assert "3 members: 3 to train, 0 to resume" in done.out


def test_brackets_begin_later_and_choose_among_themselves(tmp_path: Path) -> None:
    root = tmp_path / "s"
    words = (*WORDS, "seed=1,2,3,4,5,6,7,8,9,10", "hydra.sweeper.brackets=2", "hydra.sweeper.min_steps=3")
    done = call(root, *words)
    assert done.status == 0, done.err
    first = [{min(rungs(path)) for path in members(root)[:5]}, {min(rungs(path)) for path in members(root)[5:]}]
    assert first == [{3, 9}, {3, 9}]
    by_bracket = {step: [path for path in members(root) if min(rungs(path)) == step] for step in (3, 9)}
    assert [len(found) for found in by_bracket.values()] == [6, 4], "in Hyperband's proportions, 3 to 2"
    for found in by_bracket.values():
        assert sum(result(path)["status"] == "complete" for path in found) == 1
    assert f"halving of 10 members in {root}: 6 from 3, 2 from 9, 2 from 27 go on" in done.out


def test_what_fails_or_diverges_is_worst_and_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "s"
    words = (*WORDS[:-1], "hydra/sweeper=halving", "model=lenet", "model._target_=sweep_parts.Model", "~model.hidden",
             "~model.dropout", "hydra.sweeper.min_steps=4", "+model.batch_fails=b", "+model.tag=b,a,c,d",
             "optimizer.lr=1e-3", "optimizer=sgd")  # fmt: skip
    words = tuple(word for word in words if not word.startswith(("model.hidden", "~model", "optimizer=adam")))
    done = call(root, *words)
    assert done.status == 1
    assert "1 of 4 members have no result; the same command goes on with them." in done.err
    statuses = {path.name: result(path)["status"] for path in members(root)}
    assert statuses["0_tag-b"] == "failed"
    assert sorted(statuses.values()) == ["complete", "failed", "pruned", "pruned"]
    log = (root / "0_tag-b" / "fmexp.log").read_text()
    assert log.count("the run failed at step 2") == 1, "its own failure is not tried twice"
    monkeypatch.setenv("SWEEP_MENDED", "1")
    again = call(root, *words)
    assert again.status == 0, again.err
    assert 4 in rungs(root / "0_tag-b")


def test_a_member_that_diverges_is_not_ranked(tmp_path: Path) -> None:
    root = tmp_path / "s"
    done = call(root, *WORDS, "optimizer=sgd", "optimizer.lr=1e30,1e-3,1e-2,1e-4", "hydra.sweeper.min_steps=4",
                "train.log_every=2")  # fmt: skip
    assert done.status == 0, done.err
    assert result(member(root, "lr-1e+30"))["status"] == "diverged"
    assert not (member(root, "lr-1e+30") / "rungs.json").exists()
    assert "4 members: 1 complete, 2 pruned, 1 diverged" in done.out


def test_a_member_without_a_finite_objective_does_not_go_on(tmp_path: Path) -> None:
    root = tmp_path / "s"
    words = (*WORDS, "optimizer.lr=1e-2,1e-9,1e-4", "hydra.sweeper.min_steps=6", "objective=val/loss")
    assert call(root, *words).status == 0
    first, _, third = members(root)
    assert [result(path)["status"] for path in members(root)] == ["complete", "pruned", "pruned"]
    write_rung(first, 6, math.nan)
    assert call(root, *words).status == 0
    assert result(third)["status"] == "complete", "the best of those that are left"
    assert json.loads((first / "rungs.json").read_text())["6"] is None


def test_a_loss_is_minimised_and_the_test_split_is_spared_where_there_is_another(tmp_path: Path) -> None:
    for words, metric in ((("objective=val/loss",), "val/loss"), (("objective=test/loss",), "val/loss"),
                          (("objective=test/loss", "train.validation=0"), "test/loss")):  # fmt: skip
        root = tmp_path / f"{metric.replace('/', '-')}{len(words)}{words[0][10:11]}"
        done = call(root, *WORDS, *words, "optimizer.lr=1e-9,1e-2,1e-4", "hydra.sweeper.min_steps=6")
        assert done.status == 0, done.err
        assert f"step 6: {metric} " in done.out
        values = {path: rungs(path)[6] for path in members(root)}
        best = min(values, key=lambda path: values[path])
        assert [path for path in values if result(path)["status"] == "complete"] == [best]
        assert values[best] < max(values.values())


REFUSED = {
    "as long as a run": ("hydra.sweeper.min_steps=30",
                         "hydra.sweeper.min_steps=30 must be below the 30 batches of a member, for nothing would end "
                         "early. Take fewer, such as 3, or a longer run."),
    "one batch": ("train.max_steps=1", "hydra/sweeper=halving compares members before their end, and they have one b"),
    "no step": ("hydra.sweeper.min_steps=0", "hydra.sweeper.min_steps=0 must be at least 1"),
    "no fraction": ("hydra.sweeper.eta=1", "hydra.sweeper.eta=1 must be at least 2"),
    "brackets": ("hydra.sweeper.brackets=5 hydra.sweeper.min_steps=4",
                 "hydra.sweeper.brackets=5 must be at most 3, for there are 3 members and 2 rungs (at 4, 12 of 30 "
                 "batches)."),
    "rungs": ("hydra.sweeper.brackets=3 hydra.sweeper.min_steps=10", "hydra.sweeper.brackets=3 must be at most 2"),
    "running loss": ("objective=train/loss", "objective=train/loss is not measured where members"),
    "objectives": ("objective=val/loss,val/f1", "objective=val/f1,val/loss: the members are compared by one"),
    "no interval": ("hydra.sweeper.n_trials=5", "hydra.sweeper.n_trials=5 draws from intervals, and there is none"),
    "no count": ("optimizer.lr=interval(1e-4,1e-1)",
                 "optimizer.lr=interval(1e-4,1e-1): an interval is drawn from: say how often, such as"),
    "one member": ("seed=1", "hydra/sweeper=halving compares members, and there is one"),
    "log of 0": ("optimizer.lr=tag(log,interval(0.0,1.0)) hydra.sweeper.n_trials=3",
                 "optimizer.lr=tag(log,interval(0.0,1.0)) cannot be drawn from: an interval is from above 0 to a "),
    "turned": ("optimizer.lr=interval(1.0,0.5) hydra.sweeper.n_trials=3", "optimizer.lr=interval(1.0,0.5) cannot be "),
    "no resume": ("resume=false", "resume=false: with hydra/sweeper=halving members pause and go on."),
    "a key of none": ("+hydra.sweeper.rungs=2", "There is no key hydra.sweeper.rungs."),
    "trials of a search": ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(words: str, message: str, tmp_path: Path) -> None:
    given = words.split()
    swept = () if any(word.startswith(("seed", "optimizer.lr")) for word in given) else ("seed=1,2,3",)
    done = call(tmp_path / "s", *WORDS, *swept, *given)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_two_workers_decide_alike(nine: tuple[Path, program.Finished], tmp_path: Path) -> None:
    root = tmp_path / "s"
    done = call(root, *NINE, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.status == 0, done.err
    for path in members(nine[0]):
        assert rungs(root / path.name) == rungs(path)
        assert result(root / path.name)["status"] == result(path)["status"]
        if (path / "model.pt").exists():
            assert (root / path.name / "model.pt").read_bytes() == (path / "model.pt").read_bytes()
