"""python -m fmexp.evaluate: a run again, on its splits and on other data, to the bit and without touching it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tools import interrupt, read_events, result, scalars, small

from fmexp import execute
from fmexp.datasets import Split, synthetic
from fmexp.errors import FmexpError
from fmexp.evaluate import evaluate

RUN = ("logging=light", "train.validation=0.3", "objective=val/loss", "train.epochs=3", "optimizer.lr=0.05",
       "dataset.test_size=60", "train.ema=0.9")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    execute(small(*RUN), folder)
    return folder


def of(split: str, metrics: dict[str, float]) -> dict[str, float]:
    return {tag: value for tag, value in metrics.items() if tag.startswith(f"{split}/") and not tag.endswith("/best")}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "evaluate" not in path.parts}  # fmt: skip


@pytest.mark.parametrize("split", ["test", "val"])
def test_its_own_splits_give_the_run_s_own_bits(run: Path, split: str) -> None:
    before = files(run)
    folder, metrics = evaluate(run, [f"split={split}"])
    expected = of(split, result(run)["metrics"])
    assert metrics == expected
    assert len(expected) == 9
    assert files(run) == before
    assert (folder.parent, result(folder)["metrics"]) == (run / "evaluate", expected)
    events = read_events(folder)
    for tag in (f"{split}/loss", f"{split}/accuracy"):
        value = expected[tag]
        assert scalars(events, tag) == [(result(run)["steps"], pytest.approx(value, abs=1e-6))]


def test_the_training_split(run: Path) -> None:
    _, metrics = evaluate(run, ["split=train"])
    assert set(metrics) == {tag.replace("test/", "train/") for tag in of("test", result(run)["metrics"])}


def test_stages_are_turned_on_and_off(run: Path) -> None:
    folder, _ = evaluate(run, ["stage.confusion_matrix.enabled=true", "stage.confusion_matrix.tag=mine",
                               "stage.per_class_accuracy.enabled=false"])  # fmt: skip
    tags = read_events(folder).Tags()
    assert tags["images"] == ["mine"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("within_class_accuracy")]
    assert result(folder)["failures"] == {}


def test_a_stopped_run_is_evaluated_with_what_it_would_keep(run: Path, tmp_path: Path) -> None:
    total = result(run)["steps"]
    interrupt(small(*RUN, "train.checkpoint_every=1"), tmp_path / "stopped", total - 1)
    before = files(tmp_path / "stopped")
    _, metrics = evaluate(tmp_path / "stopped", ["split=val"])
    events = read_events(tmp_path / "stopped")
    assert metrics["val/loss"] == pytest.approx(min(value for _, value in scalars(events, "val/loss")), abs=1e-6)
    assert files(tmp_path / "stopped") == before
    # Its checkpoint says how other images are made the model's input, for there is no result.json yet.
    assert evaluate(tmp_path / "stopped", ["dataset.seed=0"])[1] == evaluate(tmp_path / "stopped", [])[1]
    assert evaluate(tmp_path / "stopped", ["dataset.seed=1"])[1] != evaluate(tmp_path / "stopped", [])[1]


def test_other_data_with_classes_in_another_order(run: Path, tmp_path: Path) -> None:
    """The run's own test images, as arrays whose classes are sorted by name, one of them under another name."""
    test = synthetic(64, 60, 28, 0).test
    names = list(synthetic(64, 60, 28, 0).classes)
    theirs = sorted({"Boot" if name == "Ankle Boot" else name for name in names})
    numbers = torch.tensor([theirs.index("Boot" if name == "Ankle Boot" else name) for name in names])
    assert isinstance(test, Split)
    labels = numbers[test.labels].numpy()
    np.savez(tmp_path / "own.npz", train_images=test.images.numpy(), train_labels=labels,
             test_images=test.images.numpy(), test_labels=labels)  # fmt: skip
    data = ["dataset=arrays", f"dataset.root={tmp_path}/own.npz", f"dataset.classes={json.dumps(theirs)}",
            "dataset.mean=[0.1]"]  # fmt: skip
    with pytest.raises(FmexpError, match=r"the run has no class Boot; its classes are T-shirt/top"):
        evaluate(run, data)
    _, metrics = evaluate(run, [*data, "mapping={Boot: Ankle Boot}"])
    assert metrics == of("test", result(run)["metrics"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["split=dev"], "split=dev must be one of test, val, train"),
        (["optimizer.lr=1"], "optimizer.lr cannot be changed: it is the run's"),
        (["stage.pr_curve.enabled=true"], "There is no"),
        (["stage.pr_curves.num_thresholds=0"], "stage.pr_curves.num_thresholds=0 must be at least 2"),
        (["device=tpu"], "device=tpu"),
        (["dataset=synthetic", "dataset.image_size=32"], "its images are 1x32x32, and the run's 1x28x28"),
        (["mapping=Boot"], "mapping=Boot must be of the form"),
    ],
)
def test_what_is_refused(run: Path, words: list[str], said: str) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(FmexpError, match=said):
        evaluate(run, words)
    assert sorted(run.rglob("*")) == before


def test_folders_that_cannot_be_evaluated(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FmexpError, match=r"holds no run"):
        evaluate(tmp_path, [])
    execute(small("logging=light"), tmp_path / "run")
    with pytest.raises(FmexpError, match=r"split=val: the run has no validation split"):
        evaluate(tmp_path / "run", ["split=val"])
    (tmp_path / "run" / "model.pt").write_bytes(b"no weights")
    with pytest.raises(FmexpError, match=r"model.pt cannot be read"):
        evaluate(tmp_path / "run", [])
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(FmexpError, match=r"has no weights: it has not ended, and there is no checkpoint"):
        evaluate(tmp_path / "run", [])
