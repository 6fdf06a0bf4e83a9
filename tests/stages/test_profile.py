"""profile: what is in the trace and in its table, of which steps; and that nothing of the training is another."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stages_tools import only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tools import assert_same_weights, interrupt, read_events, scalars, small

from fmexp import execute
from fmexp.datasets import Dataset, synthetic
from fmexp.models import LeNet

BASE = (*only("profile"), "train.max_steps=6")
ON = ("stage.profile.enabled=true", "stage.profile.steps=3")


def trace(folder: Path) -> list[dict[str, Any]]:
    """The events of a trace, in the format of chrome://tracing."""
    content = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    events: list[dict[str, Any]] = content["traceEvents"]
    for event in events:
        assert {"name", "ph", "ts"} <= event.keys()
    return events


def spans(folder: Path) -> Counter[str]:
    """How often each name has a span, which has a length."""
    found = [event for event in trace(folder) if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in found)
    return Counter(event["name"] for event in found)


def table(events: EventAccumulator, tag: str = "profile") -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    text: str = event.tensor_proto.string_val[0].decode()
    return text


def test_the_trace_has_the_steps_with_their_layers_and_kernels(tmp_path: Path) -> None:
    execute(small(*BASE, *ON), tmp_path)
    found = spans(tmp_path)
    for name in ("training step", "load a batch", "model", "conv1", "conv2", "fc1", "fc2", "fc3"):
        assert found[name] == 3, name
    assert found["pool"] == 6  # the model calls it twice
    assert found["augment"] == 0
    assert found["aten::conv2d"] == 6
    assert found["aten::_fused_sgd_"] == 3
    assert sum(name.endswith("ConvolutionBackward0") for name in found.elements()) > 0
    steps = [event for event in trace(tmp_path) if event["name"] == "training step"]
    inside = [event for event in trace(tmp_path) if event["name"] in ("fc3", "aten::_fused_sgd_")]
    for event in inside:
        assert any(one["ts"] <= event["ts"] <= one["ts"] + one["dur"] for one in steps)


def test_the_top_of_the_table_is_in_the_log_and_in_tensorboard(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    execute(small(*BASE, *ON, "stage.profile.tag=where"), tmp_path)
    text = table(read_events(tmp_path), "where")
    assert text.startswith("```\n")
    assert text.endswith("\n```")
    lines = text[4:-4].splitlines()
    heads = lines[1].split("  ")
    assert {"Name", "Self CPU %"} <= {head.strip() for head in heads}
    rows = [line.split() for line in lines[3:] if line[0] != "-" and not line.startswith("Self")]
    assert len(rows) == 12
    shares = [float(next(word for word in row if word.endswith("%"))[:-1]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert "profile of 3 updates, in trace.json.gz for ui.perfetto.dev\n" + text[4:-4] + "\n" in (
        (tmp_path / "fmexp.log").read_text()
    )
    assert "profiler_st" not in capfd.readouterr().err  # what its library says of itself


OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer=adamw", "train.freeze=[conv1]"),
    "window": ("train.accumulate=2", "train.clip_grad=0.5", "augment=crop_flip"),
    "bf16": ("train.precision=bf16", "model._target_=test_stages.Frail"),
    "few": ("train.batch_size=40",),  # an epoch has two batches, less than are traced
    "workers": ("dataset._target_=test_profile.map_style", "train.num_workers=2"),
}


def map_style(**arguments: int) -> Dataset:
    """The drawn garments, an image at a time."""
    made = synthetic(**arguments)
    splits = (One(split.images.float() / 255, split.labels) for split in (made.train, made.test))
    return Dataset(*splits, made.classes)


class One:
    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], int(self.labels[index])


@pytest.mark.parametrize("option", OPTIONS)
def test_every_kind_of_step_is_traced_and_none_of_the_runs_own_is_another(option: str, tmp_path: Path) -> None:
    for name, words in {"on": ON, "off": ("stage.profile.enabled=false",)}.items():
        execute(small(*BASE, *words, *OPTIONS[option]), tmp_path / name)
    assert_same_weights(tmp_path / "on", tmp_path / "off")
    on, off = read_events(tmp_path / "on"), read_events(tmp_path / "off")
    assert set(on.Tags()["tensors"]) - set(off.Tags()["tensors"]) == {"profile/text_summary"}
    tags = off.Tags()["scalars"]
    assert on.Tags()["scalars"] == tags
    for tag in set(tags) - {"wall_seconds"}:
        assert scalars(on, tag) == scalars(off, tag), tag
    found, window = spans(tmp_path / "on"), 2 if option == "window" else 1
    assert found["training step"] == found["load a batch"] == 3 * window
    assert found["augment"] == 3 * window * (option == "window")
    updates = found["aten::_fused_adamw_" if option == "adamw" else "aten::_fused_sgd_"]
    assert updates == 3
    assert not (tmp_path / "off" / "trace.json.gz").exists()


def test_a_run_that_goes_on_after_a_stop_has_its_trace(tmp_path: Path) -> None:
    cfg = small(*BASE, *ON, "train.checkpoint_every=2")
    interrupt(cfg, tmp_path, 1)  # before a checkpoint: all begins again
    first = (tmp_path / "trace.json.gz").read_bytes()
    interrupt(cfg, tmp_path, 5)
    second = (tmp_path / "trace.json.gz").read_bytes()
    execute(cfg, tmp_path)
    assert (tmp_path / "trace.json.gz").read_bytes() == second != first
    table(read_events(tmp_path))  # one, and no more


class Uncopied(LeNet):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")


def test_a_model_that_cannot_be_copied_is_trained_without(tmp_path: Path) -> None:
    cfg = small(*BASE, *ON, "model._target_=test_profile.Uncopied")
    cfg.stage.profile.required = False
    execute(cfg, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "complete"
    assert "not to be copied" in result["failures"]["profile"]
    assert not (tmp_path / "trace.json.gz").exists()
