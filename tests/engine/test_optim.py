"""The update: torch's own step without its wrapper, and fused where torch can; both beside the plain one."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tools import lenet, noise

from fmexp.engine import optim, step

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
        loss = step.train_step(models_[0], ours, images, labels)
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
        curves.append([float(step.train_step(model, optimizer, *batch)) for batch in noise(20)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
