"""The learning rate: each schedule beside torch's own scheduler, in a run, over a stop, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import CpuGraph
from tools import assert_same_weights, interrupt, lenet, noise, read_events, small
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR

from fmexp import execute
from fmexp.build import build
from fmexp.engine import schedule
from fmexp.engine.cuda_graph import GraphedStep
from fmexp.engine.step import TrainStep
from fmexp.errors import ConfigError

TOTAL, EPOCH = 40, 10


def torchs_rates(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    """The rate of each of TOTAL steps by a scheduler of torch's, of an optimizer with lr 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(TOTAL):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def warmed(steps: int, after: Callable[[torch.optim.Optimizer], LRScheduler]) -> Callable[..., LRScheduler]:
    """A linear warmup whose last step has the full rate, then another scheduler."""
    return lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 1 / steps, total_iters=steps - 1), after(optimizer)], [steps - 1]
    )


SAME: dict[str, tuple[partial[float], Callable[[torch.optim.Optimizer], LRScheduler]]] = {
    "constant": (partial(schedule.constant, warmup_epochs=0.0), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "warmup": (partial(schedule.constant, warmup_epochs=0.5), warmed(5, lambda o: lr_scheduler.ConstantLR(o, 1.0))),
    "cosine": (
        partial(schedule.cosine, warmup_epochs=0.0, floor=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1),
    ),
    "warmup and cosine": (
        partial(schedule.cosine, warmup_epochs=0.5, floor=0.1),
        warmed(5, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL - 4, eta_min=0.1)),
    ),
    "linear": (
        partial(schedule.linear, warmup_epochs=0.0, floor=0.2),
        lambda o: LinearLR(o, 1.0, 0.2, total_iters=TOTAL),
    ),
    "step in epochs": (
        partial(schedule.step, warmup_epochs=0.0, floor=0.0, milestones=[1, 2.5], gamma=0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [10, 25], gamma=0.3),
    ),
    "step in shares": (
        partial(schedule.step, warmup_epochs=0.0, floor=0.05, milestones=[0.5, 0.75], gamma=0.1),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: max(0.05, 0.1 ** ((step >= 20) + (step >= 30)))),
    ),
    "one cycle": (
        partial(schedule.one_cycle, warmup_epochs=None, start=0.04, floor=4e-6),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, TOTAL, pct_start=0.3, cycle_momentum=False),
    ),
    "inverse sqrt": (
        partial(schedule.inverse_sqrt, warmup_epochs=0.5, floor=0.4),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 5, max(0.4, (5 / (step + 1)) ** 0.5))),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_each_schedule_equals_torchs_at_every_step(name: str) -> None:
    ours, theirs = SAME[name]
    rates = [ours(step, TOTAL, steps_per_epoch=EPOCH) for step in range(TOTAL)]
    assert rates == pytest.approx(torchs_rates(theirs), rel=1e-12, abs=1e-15)
    assert rates[0] > 0


def test_plateau_follows_the_objective_over_a_stop() -> None:
    arguments: dict[str, Any] = {"factor": 0.5, "patience": 1, "cooldown": 1, "min_lr": 0.02, "lr": 0.1}
    ours = schedule.Plateau(**arguments, maximised=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, 1, cooldown=1, min_lr=0.02)
    rates = []
    for accuracy in (0.1, 0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.31, 0.3, 0.3, 0.3, 0.3, 0.3):
        stopped, ours = ours, schedule.Plateau(**arguments, maximised=True)
        ours.load_state_dict(stopped.state_dict())
        ours.after_epoch(accuracy)
        theirs.step(accuracy)
        rates.append(0.1 * ours(0, 1))
        assert rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert len(set(rates)) == 4  # 0.1, 0.05, 0.025, 0.02


CONFIGURATIONS = {
    "cosine": ("schedule=cosine", "schedule.warmup_epochs=0.5", "schedule.floor=0.1"),
    "plateau": ("schedule=plateau", "schedule.patience=0", "objective=test/accuracy", "schedule.factor=0.5"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_writes_its_rates_and_goes_on_with_them(name: str, tmp_path: Path) -> None:
    cfg = small(*CONFIGURATIONS[name], "train.epochs=3", "train.log_every=1", "optimizer.lr=0.1", "logging=light")
    execute(cfg, tmp_path / "whole")
    events = read_events(tmp_path / "whole")
    rates = {event.step: event.value for event in events.Scalars("train/lr")}
    total = len(rates)
    if name == "cosine":
        expected = [0.1 * schedule.cosine(step, total, steps_per_epoch=total // 3, warmup_epochs=0.5, floor=0.1)
                    for step in range(total)]  # fmt: skip
        assert [rates[step + 1] for step in range(total)] == pytest.approx(expected, rel=1e-6)
    assert len(set(rates.values())) > 1
    for stop in (2, total // 3 + 1, total - 2):
        interrupt(cfg, tmp_path / f"resumed {stop}", stop)
        execute(cfg, tmp_path / f"resumed {stop}")
        assert_same_weights(tmp_path / "whole", tmp_path / f"resumed {stop}")
        again = {e.step: e.value for e in read_events(tmp_path / f"resumed {stop}").Scalars("train/lr")}
        assert again == rates


def test_a_constant_rate_is_left_to_the_optimizer() -> None:
    """It may have a scheduler of its own."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    rate = schedule.LearningRate(optimizer, partial(schedule.constant, steps_per_epoch=1, warmup_epochs=0.0), 10)
    optimizer.param_groups[0]["lr"] = 0.03
    rate.set(5)
    assert rate.value == 0.03
    assert not schedule.varies(rate.schedule)


def test_each_group_keeps_its_own_rate() -> None:
    first, second = torch.zeros(1), torch.zeros(1)
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.01}], lr=1.0)
    rate = schedule.LearningRate(optimizer, lambda step, total: 0.5**step, 10)
    rate.set(2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.25, 0.01 * 0.25]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_graph_follows_the_rate(kind: type[torch.optim.Optimizer]) -> None:
    """The rate is in a tensor, which the graph reads at each replay: shown with the recorder on the CPU."""
    weights = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = lenet()
        optimizer = kind(model.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
        rate = schedule.LearningRate(optimizer, lambda step, total: 1 - step / total, 20)
        rate.on_device(torch.device("cpu"))
        plain = TrainStep(model, optimizer)
        step = GraphedStep(plain, model, optimizer, 4, CpuGraph()) if graphed else plain
        for number, batch in enumerate(noise(12)):
            rate.set(number)
            step(*batch)
        assert not graphed or step.graph is not None  # type: ignore[union-attr]
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schedule.warmup_epochs=1"], "schedule.warmup_epochs: a warmup of 16 batches is no shorter than the run"),
        (["schedule=one_cycle", "schedule.warmup_epochs=2"], "schedule.warmup_epochs: a warmup of 32 batches is no"),
        (["schedule=step", "schedule.milestones=[0.5,0.2]"], r"schedule.milestones=\[0.5, 0.2\] must rise"),
        (["schedule._target_=fmexp.engine.schedule.nothing"], "schedule._target_=fmexp.engine.schedule.nothing cannot"),
        (["+schedule.speed=1"], "Its arguments are warmup_epochs"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(small(*words))


class Rateless(torch.optim.Optimizer):
    """An optimizer of somebody else's, which has no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.01)


def own_optimizer(folder: Path, target: str) -> tuple[str, ...]:
    """The words that choose an optimizer by a YAML of one line."""
    (folder / "optimizer").mkdir(parents=True)
    (folder / "optimizer" / "own.yaml").write_text(f"_target_: {target}\n")
    return "optimizer=own", f"hydra.searchpath=[{folder.as_uri()}]", "logging=light", "train.checkpoint_every=3"


@pytest.mark.parametrize("target", ["torch.optim.SGD", "test_schedule.Rateless"])
def test_an_optimizer_whose_yaml_has_no_rate_is_trained_and_goes_on(target: str, tmp_path: Path) -> None:
    cfg = small(*own_optimizer(tmp_path / "conf", target))
    execute(cfg, tmp_path / "whole")
    interrupt(cfg, tmp_path / "resumed", 8)
    execute(cfg, tmp_path / "resumed")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    written = read_events(tmp_path / "whole").Tags()["scalars"]
    assert ("train/lr" in written) == (target == "torch.optim.SGD")


@pytest.mark.parametrize("name", ["cosine", "plateau"])
def test_a_schedule_without_a_rate_to_change_is_refused(name: str, tmp_path: Path) -> None:
    words = own_optimizer(tmp_path, "test_schedule.Rateless")
    with pytest.raises(ConfigError, match=r"_target_=test_schedule\.Rateless has none\. Take schedule=constant"):
        build(small(*words, f"schedule={name}"))


def test_plateau_waits_for_an_objective_that_is_not_there_yet(tmp_path: Path) -> None:
    """The running loss is first written in the second epoch."""
    words = ("schedule=plateau", "schedule.patience=0", "objective=train/loss", "train.log_every=20", "train.epochs=2")
    execute(small(*words, "logging=light"), tmp_path)
    assert [event.step for event in read_events(tmp_path).Scalars("train/lr")] == [20, 32]
