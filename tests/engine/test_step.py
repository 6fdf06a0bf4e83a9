"""One training step: whatever somebody put around an optimizer's `step` is called, and torch's own wrappers are not."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from recorder import CpuGraph
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fmexp.engine.cuda_graph import GraphedStep
from fmexp.engine.step import TrainStep

Calls = list[Any]


def noting(step: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    """A step that notes its calls, as one that clips gradients is written."""

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return step(*args, **kwargs)

    return wrapper


class Mine(SGD):
    """A class of one's own, whose step is torch's but for what is put around it."""


class Overrides(SGD):
    """A class of one's own with a step of its own."""

    calls: Calls

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls.append(closure)
        super().step()


@contextmanager
def around(way: str, parameters: list[nn.Parameter], calls: Calls) -> Iterator[Optimizer]:
    """An optimizer around whose step something is put in one of many ways, which notes each call."""
    kind = type("Mine", (Mine,), {"step": noting(SGD.step, calls)}) if way == "a class's wrapper" else SGD
    kind = Overrides if way == "a class's step" else kind
    optimizer = kind(parameters, lr=0.1)
    if isinstance(optimizer, Overrides):
        optimizer.calls = calls
    note = lambda *_: calls.append(_)  # noqa: E731
    handle = {
        "a hook before": optimizer.register_step_pre_hook,
        "a hook after": optimizer.register_step_post_hook,
        "a hook before all": register_optimizer_step_pre_hook,
        "a hook after all": register_optimizer_step_post_hook,
    }.get(way, lambda _: None)(note)
    with pytest.MonkeyPatch.context() as patch:
        if way == "an instance's wrapper":
            optimizer.step = noting(optimizer.step, calls)  # type: ignore[method-assign]
        if way == "a wrapper put around torch's class":
            patch.setattr(SGD, "step", noting(SGD.step, calls))
        yield optimizer
    if handle:
        handle.remove()


WAYS = (
    "a class's wrapper", "a class's step", "an instance's wrapper", "a wrapper put around torch's class",
    "a hook before", "a hook after", "a hook before all", "a hook after all",
)  # fmt: skip
BATCH = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("way", WAYS)
def test_what_is_put_around_a_step_is_called_once_a_step(way: str) -> None:
    model, calls = nn.Linear(3, 2), Calls()
    before = model.weight.clone()
    with around(way, list(model.parameters()), calls) as optimizer:
        for _ in range(3):
            TrainStep(model, optimizer)(*BATCH)
    assert len(calls) == 3
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("way", WAYS[4:])
def test_a_step_with_hooks_is_no_graph(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, calls, recorder = nn.Linear(3, 2), Calls(), CpuGraph()
    with around(way, list(model.parameters()), calls) as optimizer:
        graphed = GraphedStep(lambda *batch: TrainStep(model, optimizer)(*batch), model, optimizer, 4, recorder)
        for _ in range(6):
            graphed(*BATCH)
    assert (len(calls), recorder.recorded) == (6, 0)
    assert "the optimizer or the model has hooks" in caplog.text


@pytest.mark.parametrize("kind", [SGD, Adam, Mine])
def test_torchs_own_wrappers_are_left_out(kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called = Calls()
    monkeypatch.setattr(Optimizer, "_optimizer_step_code", lambda self: called.append(self))
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (kind(model.parameters(), lr=0.1) for model in models)
    TrainStep(models[0], ours)(*BATCH)
    assert called == []
    nn.functional.cross_entropy(models[1](BATCH[0]), BATCH[1]).backward()
    theirs.step()
    assert called == [theirs]
    assert torch.equal(models[0].weight, models[1].weight)
