"""Building a run: models whose weights are computed, masked or drawn late; all train, and resume to the bit."""

from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import assert_same_weights, interrupt, small, weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fmexp import execute
from fmexp.build import build
from fmexp.errors import ConfigError

QUIET = ("logging=light", "stage.per_class_accuracy.enabled=false", "dataset.image_size=16", "optimizer.lr=0.05")

WAYS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


class Normed(nn.Sequential):
    """A convolution and two linear layers, to whose weights `way` is done; with lazy layers where it is "lazy"."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int, way: str) -> None:
        channels, height, width = input_shape
        if way == "lazy":
            layers: list[nn.Module] = [nn.LazyConv2d(6, 5), nn.LazyBatchNorm2d(), nn.LazyLinear(20)]
        else:
            layers = [nn.Conv2d(channels, 6, 5), nn.BatchNorm2d(6), nn.Linear(6 * prod((height - 4, width - 4)), 20)]
        head = nn.Linear(20, num_classes)
        for layer in (layers[0], layers[2], head) if way in WAYS else ():
            WAYS[way](layer)
        super().__init__(layers[0], layers[1], nn.ReLU(), nn.Flatten(), layers[2], nn.Dropout(0.2), head)


@pytest.mark.parametrize("way", [*WAYS, "lazy"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_computed_masked_or_drawn_late_trains_and_resumes(way: str, tmp_path: Path) -> None:
    cfg = small(*QUIET, "model._target_=test_build.Normed", f"+model.way='{way}'", "train.checkpoint_every=1")
    execute(cfg, tmp_path / "whole")
    interrupt(cfg, tmp_path / "parts", 7)
    execute(cfg, tmp_path / "parts")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert "WARNING" not in (tmp_path / "parts" / "fmexp.log").read_text()
    state, begun = weights(tmp_path / "whole"), build(cfg).model
    assert not [name for name, parameter in begun.named_parameters() if torch.equal(state[name], parameter)]
    Normed(input_shape=(1, 16, 16), num_classes=10, way=way).load_state_dict(state)


def test_lazy_layers_give_the_run_of_layers_that_are_not(tmp_path: Path) -> None:
    """All layers are lazy and called in the order in which they are made, so that the same numbers are drawn."""
    for name in ("lazy_net", "eager_net"):
        execute(small(*QUIET, f"model._target_=test_build.{name}"), tmp_path / name)
    assert_same_weights(tmp_path / "lazy_net", tmp_path / "eager_net")


def lazy_net(*, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(20), nn.Dropout(0.5), nn.LazyLinear(num_classes))


def eager_net(*, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 20), nn.Dropout(0.5), nn.Linear(20, num_classes))


class Aside(nn.Module):
    """Has a lazy layer that only training calls."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.head, self.aside = nn.LazyLinear(10), nn.LazyLinear(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))  # type: ignore[no-any-return]


def test_a_lazy_layer_that_no_image_reaches_is_named() -> None:
    with pytest.raises(ConfigError, match=r"test_build\.Aside leaves aside\.weight, aside\.bias out in eval mode"):
        build(small(*QUIET, "model._target_=test_build.Aside"))


@pytest.mark.parametrize(("size", "other"), [(16, 17), (1, 3), (15, None), (33, None)])
def test_a_batch_of_one_image_that_batch_norm_cannot_take_is_told_before_training(size: int, other: int | None) -> None:
    data = ("dataset.train_size=33", "dataset.image_size=16", f"train.batch_size={size}", "logging=light")
    build(small(*data, "model=lenet"))
    if other is None:
        build(small(*data, "model=resnet18"))
        return
    message = rf"train\.batch_size={size} leaves one of 33 images .*resnet18 .*such as train\.batch_size={other}\."
    with pytest.raises(ConfigError, match=message):
        build(small(*data, "model=resnet18"))


def test_what_each_step_calls_is_not_checked_by_hydra_each_time() -> None:
    """A partial of Hydra's is of another class, which looks up its target's rights at each call: 0.1 ms a step."""
    run = build(small("augment=chain", "augment.order=[crop_flip]", "schedule=cosine", "loss=focal"))
    assert isinstance(run.augment, partial)
    calls = {"augment": run.augment, **run.augment.keywords["steps"], "loss": run.loss, "schedule": run.schedule}
    assert {name for name, call in calls.items() if type(call) is not partial} == set()
