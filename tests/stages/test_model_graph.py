"""model_graph: the layers by name, and models that cannot be traced."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stages_tools import Seen, only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from fmexp.models import LeNet

# model_graph


def test_model_graph_names_the_layers(seen: Seen) -> None:
    names = {node.name for node in seen.events.Graph().node}
    layers = {"/".join(name.split("/")[:3]) for name in names}
    for layer in ("Conv2d[conv1]", "Conv2d[conv2]", "Linear[fc1]", "Linear[fc2]", "Linear[fc3]"):
        assert {f"LeNet/{layer}/weight", f"LeNet/{layer}/bias"} <= layers
    assert any(name.startswith("LeNet/MaxPool2d[pool]/") for name in names)
    assert any(name.startswith("input/") for name in names)
    assert any(name.startswith("output/") for name in names)


class Untraceable(LeNet):
    """Refuses to be traced, as compiled models do."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("not this one\nfor many reasons")
        return super().forward(x)


def test_a_model_that_cannot_be_traced_is_a_warning(
    run_small: Callable[..., tuple[Path, EventAccumulator]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, events = run_small(*only("model_graph"), "model._target_=test_model_graph.Untraceable")
    assert not events.Tags()["graph"]
    (line,) = [line for line in (folder / "fmexp.log").read_text().splitlines() if "[WARNING]" in line]
    assert "graph is not written, for it cannot be traced: not this one" in line
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("complete", {})
    assert "No graph saved" not in capsys.readouterr().out
