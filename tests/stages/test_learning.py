"""learning: each point against a plain loop of torch's, over any stop; what it shows; it disturbs nothing."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stages_tools import only
from tools import assert_same_weights, interrupt, read_events, scalars, small
from torch import Tensor, nn

from fmexp import datasets, execute, trainer
from fmexp.build import build
from fmexp.engine.step import LastUpdate
from fmexp.run import Run, reads_last_update
from fmexp.stages import learning

ON = ("stage.learning.enabled=true",)
# 17 batches, the last one of two images.
BASE = (*only("learning"), "dataset.train_size=66", "optimizer.lr=0.05", "train.batch_size=4")
FIGURES = ("norm", "grad_norm", "update_ratio")


def points(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """All that the stage wrote: (step, value) of each scalar and histogram, by tag."""
    events = read_events(folder)
    found = {tag: scalars(events, tag) for tag in events.Tags()["scalars"] if tag.startswith("weights_")}
    histograms = {tag: events.Histograms(tag) for tag in events.Tags()["histograms"]}
    return found | {tag: [(one.step, one.histogram_value) for one in points] for tag, points in histograms.items()}


def norm(tensors: list[Tensor]) -> float:
    return sum(float((tensor.detach().double() ** 2).sum()) for tensor in tensors) ** 0.5


LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
OPTIONS: dict[str, tuple[str, ...]] = {
    "sgd": ("optimizer.weight_decay=0.01",),
    "adamw": ("optimizer=adamw", "optimizer.lr=0.01"),
    "window": ("train.accumulate=3", "train.clip_grad=0.5"),
    "bf16": ("train.precision=bf16",),
    "frozen": ("train.freeze=[conv1,fc2.bias]",),
    "groups": ("optimizer=adamw", "optimizer.lr=0.01", "optimizer.no_decay=[bias]"),
}


def plain_loop(option: str, steps: int) -> Iterator[dict[str, dict[str, float]]]:
    """After each batch: figure -> layer -> value, of training as one would write it with torch."""
    words = OPTIONS[option]
    run = build(small(*BASE, *words))
    model, data = run.model.train(), run.dataset
    frozen = ("conv1.weight", "conv1.bias", "fc2.bias") if option == "frozen" else ()
    trained = {name: parameter for name, parameter in model.named_parameters() if name not in frozen}
    if "optimizer=adamw" in words:
        spared = [p for name, p in trained.items() if name.endswith("bias") and option == "groups"]
        others = [p for p in trained.values() if not any(p is one for one in spared)]
        groups = [{"params": others}, {"params": spared, "weight_decay": 0.0}]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.01)
    else:
        decay = 0.01 if option == "sgd" else 0.0
        optimizer = torch.optim.SGD(trained.values(), lr=0.05, momentum=0.9, weight_decay=decay)
    with run.backend.applied():  # bf16 rounds by it
        yield from figures_of(option, model, optimizer, trained, data, steps)


def figures_of(
    option: str, model: nn.Module, optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter],
    data: datasets.Dataset, steps: int,
) -> Iterator[dict[str, dict[str, float]]]:  # fmt: skip
    window = 3 if option == "window" else 1
    chosen = datasets.order(0, 0, 66).split(4)
    figures: dict[str, dict[str, float]] = {}
    for first in range(0, steps, window):
        batches = chosen[first : first + window]
        images = sum(map(len, batches))
        optimizer.zero_grad()
        for number, indices in enumerate(batches):
            pixels, labels = data.take(data.train, indices)
            with torch.autocast("cpu", torch.bfloat16, enabled=option == "bf16"):
                logits = model(pixels)
            (F.cross_entropy(logits.float(), labels, reduction="sum") / images).backward()
            if number < len(batches) - 1:
                yield figures
        if option == "window":
            nn.utils.clip_grad_norm_(trained.values(), 0.5)
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        optimizer.step()
        figures = {figure: {} for figure in FIGURES}
        for layer in LAYERS:
            names = [name for name in trained if name.startswith(layer)]
            if names:
                weight = norm([trained[name] for name in names])
                change = norm([trained[name].detach() - before[name] for name in names])
                gradients = [trained[name].grad for name in names]
                values = (weight, norm([g for g in gradients if g is not None]), change / weight)
                for figure, value in zip(FIGURES, values, strict=True):
                    figures[figure][layer] = value
        yield figures


@pytest.mark.parametrize("option", OPTIONS)
def test_each_point_is_what_a_plain_loop_of_torchs_gives(option: str, tmp_path: Path) -> None:
    execute(small(*BASE, *ON, *OPTIONS[option], "train.log_every=1"), tmp_path)
    written, layers = points(tmp_path), [layer for layer in LAYERS if option != "frozen" or layer != "conv1"]
    assert written.keys() == {f"weights_{figure}/{layer}" for figure in FIGURES for layer in layers}
    expected = [*plain_loop(option, 17)]
    assert len(expected) == 17
    for figure in FIGURES:
        for layer in layers:
            known = [(step, figures[figure][layer]) for step, figures in enumerate(expected, 1) if figures]
            found = written[f"weights_{figure}/{layer}"]
            if figure == "norm":  # which there is before the first update, too
                found = found[-len(known) :]
            assert [step for step, _ in found] == [step for step, _ in known]
            assert [value for _, value in found] == pytest.approx([value for _, value in known], rel=1e-3)


def test_within_a_window_it_is_the_update_before(tmp_path: Path) -> None:
    """And not the gradient that is just being collected."""
    execute(small(*BASE, *ON, *OPTIONS["window"], "train.log_every=1"), tmp_path)
    for figure in FIGURES:
        values = dict(points(tmp_path)[f"weights_{figure}/fc3"])
        assert values[3] == values[4] == values[5] != values[6]
        assert values[15] == values[16] != values[17]  # the last window has two batches
    steps = {figure: {step for step, _ in points(tmp_path)[f"weights_{figure}/fc3"]} for figure in FIGURES}
    assert steps["norm"] - steps["grad_norm"] == {1, 2}


def test_histograms_hold_the_weights_and_the_gradients(tmp_path: Path) -> None:
    words = (*BASE, *ON, "stage.learning.histograms=true", "stage.learning.tag=mine", "train.log_every=17")
    execute(small(*words), tmp_path)
    events, state = read_events(tmp_path), torch.load(tmp_path / "model.pt", weights_only=True)
    tags = events.Tags()
    assert set(tags["histograms"]) == {
        f"mine{kind}/{name}" for name in state for kind in ("_histogram", "_grad_histogram")
    }
    for name, weight in state.items():
        (event,) = events.Histograms(f"mine_histogram/{name}")
        value = event.histogram_value
        assert (event.step, value.num, value.min, value.max) == (17, weight.numel(), weight.min(), weight.max())
        assert value.sum_squares == pytest.approx(float((weight.double() ** 2).sum()))
    squares = [events.Histograms(f"mine_grad_histogram/fc3.{part}")[0].histogram_value for part in ("weight", "bias")]
    total = sum(value.sum_squares for value in squares) ** 0.5
    assert total == pytest.approx(scalars(events, "mine_grad_norm/fc3")[0][1], rel=1e-5)


@pytest.mark.parametrize("option", ["sgd", "window"])
def test_it_disturbs_nothing_and_costs_nothing_where_it_is_off(option: str, tmp_path: Path) -> None:
    for name, words in {
        "on": (*ON, "stage.learning.histograms=true"),
        "off": ("stage.learning.enabled=false",),
    }.items():
        cfg = small(*BASE, *words, *OPTIONS[option], "train.epochs=2")
        execute(cfg, tmp_path / name)
        run = build(cfg)
        assert (trainer.Trainer(run).train_step.last_update is None) == (run.last_update is None) == (name == "off")
    assert_same_weights(tmp_path / "on", tmp_path / "off")
    on, off = read_events(tmp_path / "on"), read_events(tmp_path / "off")
    tags = off.Tags()["scalars"]
    assert "train/loss" in tags
    assert {tag for tag in on.Tags()["scalars"] if not tag.startswith("weights_")} == set(tags)
    for tag in set(tags) - {"wall_seconds"}:
        assert scalars(on, tag) == scalars(off, tag), tag


# The moment of a point is within a window whose update was made before the checkpoint; or after the last batch.
@pytest.mark.parametrize("moment", ["log", "end"])
@pytest.mark.parametrize("option", ["adamw", "window"])
def test_a_run_that_goes_on_after_a_stop_writes_the_same(option: str, moment: str, tmp_path: Path) -> None:
    words = (*BASE, *ON, *OPTIONS[option], "stage.learning.histograms=true", f"stage.learning.when={moment}")
    cfg = small(*words, "train.log_every=5", "train.checkpoint_every=1", "train.epochs=2")
    execute(cfg, tmp_path / "whole")
    for stop in (2, 9, 24, 34):
        interrupt(cfg, tmp_path / "resumed", stop)
    execute(cfg, tmp_path / "resumed")
    assert "going on from the checkpoint at step 34" in (tmp_path / "resumed" / "fmexp.log").read_text()
    expected = points(tmp_path / "whole")
    assert expected
    assert points(tmp_path / "resumed") == expected
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_at_the_start_there_are_weights_alone(tmp_path: Path) -> None:
    cfg = small(*BASE, *ON, "stage.learning.when=start", "stage.learning.histograms=true", "train.max_steps=1")
    model = dict(build(cfg).model.named_parameters())
    execute(cfg, tmp_path)
    assert points(tmp_path).keys() == {f"weights_norm/{layer}" for layer in LAYERS} | {
        f"weights_histogram/{name}" for name in model
    }
    for layer in LAYERS:
        expected = norm([model[f"{layer}.weight"], model[f"{layer}.bias"]])
        assert points(tmp_path)[f"weights_norm/{layer}"] == [(0, pytest.approx(expected))]


# What is shown of a model


def seen(
    model: nn.Module, gradients: Any = None, optimizer: torch.optim.Optimizer | None = None, *, histograms: bool = False
) -> dict[str, Any]:
    """What the stage writes, after an update with some gradients, or before one."""
    optimizer, written = optimizer or torch.optim.SGD(model.parameters(), lr=1.0), dict[str, Any]()
    last = LastUpdate(optimizer)
    if gradients is not None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            last.make(optimizer)
    write = lambda tag, value, step: written.update({tag: value})  # noqa: E731
    writer = SimpleNamespace(add_scalar=write, add_histogram=write)
    run: Any = SimpleNamespace(model=model, last_update=last, writer=writer, step=3)
    learning.learning(run, tag="w", histograms=histograms)
    return written


class Own(nn.Module):
    """A parameter of its own, one that is never used, and one that a zero begins."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((2,), 3.0))
        self.head = nn.Linear(1, 1)
        self.zero = nn.Linear(1, 1)
        self.still = nn.Linear(1, 1).requires_grad_(False)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)
        nn.init.constant_(self.head.weight, 4.0)
        nn.init.constant_(self.head.bias, 3.0)


def test_parameters_of_the_model_itself_unused_ones_and_zeros() -> None:
    gradients = [torch.full((2,), 1.0), torch.full((1, 1), 0.5), None, *[None] * 4]
    written = seen(Own(), gradients)
    assert written == {
        "w_norm/token": pytest.approx(8**0.5), "w_grad_norm/token": pytest.approx(2**0.5),
        "w_update_ratio/token": pytest.approx(0.5),
        "w_norm/head": pytest.approx((3.5**2 + 9) ** 0.5), "w_grad_norm/head": 0.5,
        "w_update_ratio/head": pytest.approx(0.5 / (3.5**2 + 9) ** 0.5),
        "w_norm/zero": 0.0, "w_grad_norm/zero": 0.0,
    }  # fmt: skip
    assert {tag.partition("/")[0] for tag in seen(Own())} == {"w_norm"}


def test_sparse_gradients() -> None:
    layer = nn.Embedding(5, 1, sparse=True)
    layer(torch.tensor([1, 1, 3])).sum().backward()
    before, gradient = layer.weight.detach().clone(), layer.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    written = seen(layer, [gradient])
    assert written["w_grad_norm/weight"] == pytest.approx(5**0.5)
    assert torch.equal(before - layer.weight.detach(), torch.tensor([[0.0], [2.0], [0.0], [1.0], [0.0]]))


def test_of_more_than_100_layers_those_with_the_most_weights() -> None:
    model = nn.Sequential(*(nn.Linear(1 + number % 7, 1) for number in range(120)))
    written = seen(model, [torch.ones_like(parameter) for parameter in model.parameters()])
    shown = [int(tag.partition("/")[2]) for tag in written if tag.startswith("w_norm/")]
    smallest = [number for number in range(120) if number % 7 == 0]
    assert shown == [number for number in range(120) if number not in (*smallest, 106, 113)[:20]]
    assert all(one < other for one, other in pairwise(shown))


def test_histograms_are_of_the_finite_numbers() -> None:
    model = nn.Linear(2, 1)
    gradients = [torch.tensor([[float("inf"), 1.0]]), torch.tensor([float("nan")])]
    written = seen(model, gradients, torch.optim.SGD(model.parameters(), lr=0.0), histograms=True)
    assert written["w_grad_histogram/weight"].tolist() == [1.0]
    assert "w_grad_histogram/bias" not in written
    assert written["w_grad_norm/weight"] == float("inf")


# Stages of one's own


@reads_last_update
def largest_change(run: Run) -> None:
    """A stage of these tests."""
    assert run.last_update is not None
    run.writer.add_scalar("largest", max(float(change.abs().max()) for change in run.last_update.changes), run.step)


def test_a_stage_of_ones_own_reads_the_last_update(tmp_path: Path) -> None:
    own = "+stage.own={_target_:test_learning.largest_change,when:log}"
    words = (*only(), own, "optimizer.momentum=0", "train.log_every=1", "train.max_steps=2", "optimizer.lr=0.05")
    execute(small(*words), tmp_path)
    run = build(small(*words))
    pixels, labels = run.dataset.take(run.dataset.train, datasets.order(0, 0, 64)[:4])
    F.cross_entropy(run.model.train()(pixels), labels).backward()
    first = max(float(p.grad.abs().max()) * 0.05 for p in run.model.parameters() if p.grad is not None)
    assert scalars(read_events(tmp_path), "largest")[0] == (1, pytest.approx(first, rel=1e-3))
