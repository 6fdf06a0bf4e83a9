"""torch.compile: when it is chosen, what it takes, and a compiled run beside a plain one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tools import assert_same_weights, interrupt, lenet, noise, read_events, scalars, small
from torch import Tensor

from fmexp import config, execute, models
from fmexp.engine import backend
from fmexp.errors import ConfigError

LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false")


# Compiling


def test_auto_compiles_only_where_many_small_batches_are_to_come() -> None:
    images = noise(1)[0][0]

    def compiled(size: int, steps: int, setting: bool | str = "auto") -> bool:
        return backend.choose(lenet(), images, size, compiled=setting, steps=steps).compiled

    assert not compiled(4, backend.MANY_BATCHES - 1)
    assert compiled(4, backend.MANY_BATCHES)
    assert not compiled(512, backend.MANY_BATCHES)
    assert compiled(512, 1, True)
    assert not compiled(4, backend.MANY_BATCHES, False)


@pytest.mark.parametrize("value", ["sometimes", "3"])
def test_compile_takes_auto_true_and_false_alone(value: str) -> None:
    with pytest.raises(ConfigError, match=f"train.compile={value} must be one of auto, true, false"):
        config.check(small(f"train.compile={value}"))


class Unwilling(models.LeNet):
    """A model that breaks under torch.compile, after it has counted and drawn."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if torch.compiler.is_compiling():
            torch.rand(1)
            raise RuntimeError("not with me")
        return super().forward(x)


def test_a_model_that_breaks_under_the_compiler_is_trained_without(tmp_path: Path) -> None:
    for value in ("true", "false"):
        execute(small(*LIGHT, "model._target_=test_compile.Unwilling", f"train.compile={value}"), tmp_path / value)
    assert_same_weights(tmp_path / "true", tmp_path / "false")
    (line,) = [line for line in (tmp_path / "true" / "fmexp.log").read_text().splitlines() if "[WARNING]" in line]
    assert "cannot be compiled" in line
    assert not json.loads((tmp_path / "true" / "result.json").read_text())["backend"]["compiled"]


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_is_close_to_a_plain_one_and_resumes_to_the_bit(tmp_path: Path) -> None:
    # 16 batches an epoch and one of 2 images, dropout, labels that are probabilities, and a stop in the second epoch
    settings = ("model=mlp", "model.dropout=0.3", "optimizer=adam", "dataset.train_size=66", "train.epochs=2",
                "augment=mixup")  # fmt: skip
    compiled = (*settings, "train.compile=true", "train.checkpoint_every=1")
    execute(small(*compiled), tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["backend"]["compiled"]
    execute(small(*compiled, *LIGHT), tmp_path / "light")
    assert_same_weights(tmp_path / "whole", tmp_path / "light")  # stages disturb nothing
    interrupt(small(*compiled), tmp_path / "resumed", 20)
    torch._dynamo.reset()
    execute(small(*compiled), tmp_path / "resumed")
    assert "going on from the checkpoint at step 20" in (tmp_path / "resumed" / "fmexp.log").read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    plain = (*LIGHT, "train.log_every=1", "dataset.train_size=66", "stage.learning.enabled=true")
    for value in ("true", "false"):
        execute(small(*plain, f"train.compile={value}"), tmp_path / f"lenet {value}")
    ran = [read_events(tmp_path / f"lenet {value}") for value in ("true", "false")]
    for tag in ("train/loss", "weights_norm/fc3", "weights_grad_norm/fc3", "weights_update_ratio/conv1"):
        curves = [scalars(events, tag) for events in ran]
        assert len(curves[0]) == 17
        assert np.array(curves[0]) == pytest.approx(np.array(curves[1]), abs=1e-4), tag
