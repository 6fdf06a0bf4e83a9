"""The update: torch's own step without its wrapper, and fused where torch can; both beside the plain one."""

import inspect
from math import prod
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from timm.optim import create_optimizer_v2
from tools import assert_same_weights, interrupt, lenet, noise, small
from torch import Tensor, nn

from fmexp import execute
from fmexp.build import build
from fmexp.engine import optim, step
from fmexp.errors import ConfigError

QUIET = ("logging=light", "stage.per_class_accuracy.enabled=false")

# The update


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}),
        ("Adam", {}),
        ("AdamW", {}),
        ("RMSprop", {"momentum": 0.5}),
        ("NAdam", {}),
    ],
)
def test_the_raw_update_is_the_optimizers_step_to_the_bit(name: str, settings: dict[str, Any], fused: bool) -> None:
    kind = getattr(torch.optim, name)
    if "fused" in inspect.signature(kind).parameters:
        settings = {**settings, "fused": fused}
    models_ = lenet(), lenet()
    ours, theirs = (kind(model.parameters(), **settings) for model in models_)
    for images, labels in noise(5):
        loss = step.TrainStep(models_[0], ours)(images, labels)
        theirs.zero_grad()
        expected = F.cross_entropy(models_[1](images), labels)
        expected.backward()
        theirs.step()
        assert torch.equal(loss, expected)
    for one, other in zip(models_[0].parameters(), models_[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_optimizers_are_fused_where_torch_can_and_the_configuration_does_not_say_otherwise() -> None:
    def fused(**settings: Any) -> bool:
        cfg = OmegaConf.create({"_target_": "torch.optim.SGD", "lr": 0.1, **settings})
        return bool(optim.build_optimizer(cfg, lenet()).defaults["fused"])

    assert fused()
    assert not fused(fused=False)
    assert not fused(foreach=True)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_fused_update_is_close_to_the_plain_one(name: str) -> None:
    curves = []
    for fused in (True, False):
        model = lenet()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.001, fused=fused)
        curves.append([float(step.TrainStep(model, optimizer)(*batch)) for batch in noise(20)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


# Groups


def groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Weight decay and learning rate of each parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}


def grouped(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    cfg = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.01, **settings}
    return optim.build_optimizer(OmegaConf.create(cfg), model)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_the_groups_are_timms(name: str, layer_decay: float | None) -> None:
    model = timm.create_model(name, num_classes=10)
    theirs = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.01, layer_decay=layer_decay)
    for group in theirs.param_groups:
        group["lr"] *= group.get("lr_scale", 1)
    ours = grouped(model, no_decay=["norm", "bias"], layer_decay=layer_decay)
    assert groups(ours, model) == groups(theirs, model)
    assert len(ours.param_groups) == len(theirs.param_groups)
    assert {decay for decay, _ in groups(ours, model).values()} == {0, 0.01}


def test_no_decay_is_of_norms_or_of_biases() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2)})
    for names, spared in (
        ([], set()),
        (["norm"], {"norm.weight"}),
        (["bias"], {"conv.bias", "norm.bias"}),
        (["bias", "norm"], {"conv.bias", "norm.weight", "norm.bias"}),
    ):
        assert {
            name for name, (decay, _) in groups(grouped(model, no_decay=names), model).items() if not decay
        } == spared


class Deep(nn.Module):
    """A parameter of its own, a layer, three in two containers, one without weights, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.stem, self.act = nn.Parameter(torch.zeros(1, 2)), nn.Linear(2, 2), nn.ReLU()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.neck, self.head = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))]), nn.Linear(2, 2)


def test_layer_decay_lowers_the_rate_layer_by_layer_from_the_last() -> None:
    model = Deep()
    rates = {name: rate for name, (_, rate) in groups(grouped(model, layer_decay=0.5), model).items()}
    assert {name.removesuffix(".weight"): rate for name, rate in rates.items() if not name.endswith("bias")} == {
        "token": 0.1 / 16, "stem": 0.1 / 16, "body.0": 0.1 / 8, "body.2": 0.1 / 4, "neck.0.0": 0.1 / 2,
        "neck.0.1": 0.1 / 2, "head": 0.1,
    }  # fmt: skip
    assert all(rates[name] == rates[name.replace("bias", "weight")] for name in rates)


def test_by_default_there_is_one_group_of_all_parameters() -> None:
    model = lenet()
    (group,) = optim.build_optimizer(small().optimizer, model).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


def test_layer_decay_without_a_rate_is_refused() -> None:
    cfg = OmegaConf.create({"_target_": "torch.optim.Adam", "layer_decay": 0.5})
    with pytest.raises(ConfigError, match=r"layer_decay=0\.5 is a factor of optimizer\.lr, which is not set"):
        optim.build_optimizer(cfg, lenet())


# What an optimizer cannot take


class Embeds(nn.Module):
    """Logits from the brightness of pixels, by an embedding with sparse gradients, and by a dense bias where `bias`."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int, bias: bool) -> None:
        super().__init__()
        self.of_brightness = nn.EmbeddingBag(256, num_classes, mode="mean", sparse=True)
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else 0

    def forward(self, images: Tensor) -> Tensor:
        return self.of_brightness((images * 127 + 128).long().flatten(1)) + self.bias  # type: ignore[no-any-return]


class Complex(nn.Module):
    """Complex weights, after numbers that are not trained."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(prod(input_shape), num_classes, dtype=torch.complex64) / 28)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1).to(torch.complex64) @ self.weight).abs()  # type: ignore[no-any-return]


EMBEDS, COMPLEX = "model._target_=test_optim.Embeds", "model._target_=test_optim.Complex"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("model", [(EMBEDS, "+model.bias=true"), (EMBEDS, "+model.bias=false"), (COMPLEX,)])
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad"])
def test_fused_is_not_forced_where_it_cannot_be(model: tuple[str, ...], optimizer: str, tmp_path: Path) -> None:
    cfg = small(*QUIET, *model, "optimizer=custom", f"optimizer._target_=torch.optim.{optimizer}", "optimizer.lr=0.1")
    assert not build(cfg).optimizer.defaults["fused"]
    cfg.train.checkpoint_every = 1
    execute(cfg, tmp_path / "whole")
    interrupt(cfg, tmp_path / "parts", 7)
    execute(cfg, tmp_path / "parts")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


class Twice(torch.optim.SGD):
    """Wants the loss again."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        closure()


@pytest.mark.parametrize(
    ("optimizer", "model", "said"),
    [
        ("torch.optim.LBFGS", (), "computes the loss several times a step, which fmexp does not do"),
        ("test_optim.Twice", (), "computes the loss several times a step, which fmexp does not do"),
        ("torch.optim.SparseAdam", (), "cannot train this model: SparseAdam does not support dense gradients"),
        ("torch.optim.Adam", (EMBEDS, "+model.bias=true"), "cannot train this model: Adam does not support sparse"),
    ],
)
def test_what_an_optimizer_cannot_do_is_said_before_training(
    optimizer: str, model: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\._target_={optimizer} {said}"):
        execute(small(*QUIET, *model, "optimizer=custom", f"optimizer._target_={optimizer}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_sparse_adam_trains_what_is_sparse(tmp_path: Path) -> None:
    optimizer = "optimizer=custom", "optimizer._target_=torch.optim.SparseAdam"
    execute(small(*QUIET, EMBEDS, "+model.bias=false", *optimizer), tmp_path)
    assert (tmp_path / "model.pt").is_file()
