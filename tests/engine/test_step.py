"""One training step: what is called around an update; clipping, accumulation and precision, each beside torch's."""

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
from fmexp.engine.step import TrainStep, plain_backward

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


# Clipping, accumulation, precision


def double(seed: int = 0) -> nn.Module:
    """A small model in float64, with dropout nowhere."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


IMAGES, LABELS = (
    torch.rand(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)),
    torch.arange(14) % 2,
)


@pytest.mark.parametrize("sizes", [[4, 4], [4, 4, 4, 2]])
def test_batches_of_a_window_make_the_update_of_one_large_batch(sizes: list[int]) -> None:
    small, large = double(), double()
    step = TrainStep(small, SGD(small.parameters(), lr=0.1))
    before, total = small[0].weight.clone(), sum(sizes)  # type: ignore[index, union-attr, operator]
    for number, (images, labels) in enumerate(zip(IMAGES[:total].split(4), LABELS[:total].split(4), strict=True)):
        step.begins, step.ends, step.share = number == 0, number == len(sizes) - 1, len(labels) / total
        assert torch.equal(small[0].weight, before)  # type: ignore[index, union-attr, arg-type]
        step(images, labels)
    TrainStep(large, SGD(large.parameters(), lr=0.1))(IMAGES[:total], LABELS[:total])
    torch.testing.assert_close(gradients(small), gradients(large), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(nn.utils.parameters_to_vector(small.parameters()),
                               nn.utils.parameters_to_vector(large.parameters()), rtol=1e-12, atol=1e-15)  # fmt: skip


def test_gradients_are_cut_to_a_norm_as_torch_does_it() -> None:
    models = [double(), double()]
    step = TrainStep(models[0], SGD(models[0].parameters(), lr=0.1), clip_grad=0.05)
    step(IMAGES, LABELS)
    nn.functional.cross_entropy(models[1](IMAGES), LABELS).backward()
    norm = nn.utils.clip_grad_norm_(models[1].parameters(), 0.05)
    assert norm > 0.05
    assert torch.equal(gradients(models[0]), gradients(models[1]))
    assert float(step.grad_norm) == pytest.approx(float(norm), rel=1e-6)


def test_a_graph_writes_the_norm_of_each_replay() -> None:
    norms = []
    for graphed in (False, True):
        model = double()
        plain = TrainStep(model, SGD(model.parameters(), lr=0.1), clip_grad=0.05)
        step = GraphedStep(plain, model, plain.optimizer, 7, CpuGraph()) if graphed else plain
        norms.append([])
        for _ in range(4):
            for part in (slice(7), slice(7, 14)):
                step(IMAGES[part], LABELS[part])
                norms[-1].append(float(plain.grad_norm))
        assert not graphed or step.graph is not None  # type: ignore[union-attr]
    assert norms[0] == norms[1]
    assert len(set(norms[0])) == 8


def test_bf16_computes_the_forward_pass_in_bf16_and_keeps_the_rest() -> None:
    seen: list[torch.dtype] = []
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    backward = plain_backward(model, precision="bf16")
    loss = backward(*BATCH, 1.0)
    assert seen == [torch.bfloat16]
    assert (loss.dtype, model.weight.grad.dtype) == (torch.float32, torch.float32)  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.functional.cross_entropy(model(BATCH[0]).float(), BATCH[1])
    assert torch.equal(loss, expected.detach())
