"""Frozen layers: neither their weights nor their statistics move, whichever form of the step trains."""

from pathlib import Path

import pytest
import torch
from tools import assert_same_weights, interrupt, small, weights
from torch import Tensor, nn

from fmexp import execute
from fmexp.build import build
from fmexp.engine.freeze import freeze, train_mode
from fmexp.errors import ConfigError

QUIET = ("logging=light", "stage.per_class_accuracy.enabled=false", "dataset.image_size=16", "optimizer.lr=0.05")


class Normed(nn.Module):
    """Two convolutions with batch normalisation, and a linear layer."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(input_shape[0], 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(self.stem(images))).relu().mean((2, 3)))  # type: ignore[no-any-return]


def net() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.BatchNorm2d(2, affine=False))
    return nn.ModuleDict({"stem": layers, "head": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("patterns", "frozen", "in_eval_mode"),
    [
        ([], [], []),
        (["stem.0"], ["stem.0.weight", "stem.0.bias"], []),
        (["*.bias"], ["stem.0.bias", "stem.1.bias", "head.bias"], []),
        (["stem.1.*"], ["stem.1.weight", "stem.1.bias"], ["stem.1"]),
        (["st*"], ["stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"], ["stem.1", "stem.3"]),
        (["stem.3", "head.weight"], ["head.weight"], ["stem.3"]),
    ],
)
def test_what_a_pattern_freezes(patterns: list[str], frozen: list[str], in_eval_mode: list[str]) -> None:
    model = net()
    assert freeze(model, patterns) == set(frozen)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    train_mode(model.eval(), patterns)
    assert [name for name, module in model.named_modules() if not module.training] == in_eval_mode


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (
            ["stem.0", "hed"],
            r"hed is no layer and no parameter.* mean head\?\nIts layers are stem, head; ",
        ),
        (["stem", "head.*"], r"train\.freeze=\[stem, head\.\*\] leaves no parameter to train"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_all_is_refused(patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        freeze(net(), patterns)


@pytest.mark.parametrize("form", ["false", pytest.param("true", marks=pytest.mark.slow)])  # compiled
def test_frozen_layers_keep_weights_and_statistics_over_epochs_and_a_stop(form: str, tmp_path: Path) -> None:
    cfg = small(
        *QUIET, "model._target_=test_freeze.Normed", "train.freeze=[stem,norm.*]", "train.epochs=2",
        "train.checkpoint_every=3", f"train.compile={form}", "optimizer=adamw", "optimizer.no_decay=[norm,bias]",
        "optimizer.layer_decay=0.8",
    )  # fmt: skip
    execute(cfg, tmp_path / "whole")
    interrupt(cfg, tmp_path / "parts", 5)
    execute(cfg, tmp_path / "parts")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    begun, ended = build(cfg).model.state_dict(), weights(tmp_path / "whole")
    same = {name for name, value in begun.items() if torch.equal(value, ended[name])}
    assert same == {name for name in begun if name.startswith(("stem.", "norm."))}
    assert len(same) == 12


def test_a_frozen_batch_norm_takes_a_batch_of_one_image() -> None:
    cfg = small("dataset.train_size=33", "dataset.image_size=16", "train.batch_size=16", "model=resnet18")
    with pytest.raises(ConfigError, match="cannot be trained on one"):
        build(cfg)
    cfg.train.freeze = ["bn1", "layer*"]
    build(cfg)
