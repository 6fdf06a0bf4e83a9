"""Learning-rate schedules: what the optimizer's rate is multiplied by at each step.

A schedule is `f(step, total, ...) -> factor`, a pure function of the batches done and of all that the run has: there is
nothing to keep, and nothing that drifts on a resume. `Plateau` alone follows what the run measures, and has a state.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fmexp.errors import ConfigError

Schedule = Callable[[int, int], float]


@runtime_checkable
class Following(Protocol):
    """A schedule that follows the objective."""

    def after_epoch(self, objective: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plateau:
    """Multiply the rate by `factor` when the objective has not improved for more than `patience` epochs.

    Args:
        cooldown: epochs after that in which nothing is counted.
        min_lr: the rate is not lowered below it.
        lr: the optimizer's rate; it and `maximised`, whether more of the objective is better, are given by the run.
    """

    def __init__(
        self, *, factor: float, patience: int, cooldown: int, min_lr: float, lr: float, maximised: bool
    ) -> None:
        stand_in = torch.optim.SGD([torch.zeros(())], lr=1.0)  # its rate is the factor of the run's
        self.scheduler = ReduceLROnPlateau(
            stand_in, "max" if maximised else "min", factor, patience, cooldown=cooldown, min_lr=min(min_lr / lr, 1.0)
        )
        self.group = stand_in.param_groups[0]

    def __call__(self, step: int, total: int) -> float:
        return float(self.group["lr"])

    def after_epoch(self, objective: float) -> None:
        self.scheduler.step(objective)

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.group["lr"], **{k: getattr(self.scheduler, k) for k in _COUNTED}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.group["lr"] = state["factor"]
        for name in _COUNTED:
            setattr(self.scheduler, name, state[name])


_COUNTED = ("best", "num_bad_epochs", "cooldown_counter")  # its state_dict has its arguments, too, and deprecated ones


def constant(step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float) -> float:
    """1 throughout, after the warmup."""
    return _warmed(step, total, steps_per_epoch * warmup_epochs) or 1.0


def cosine(step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float, floor: float) -> float:
    """From 1 to `floor` along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    warmup = steps_per_epoch * warmup_epochs
    return _warmed(step, total, warmup) or _between(1.0, floor, _progress(step, total, warmup))


def linear(step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float, floor: float) -> float:
    """From 1 to `floor` along a straight line."""
    warmup = steps_per_epoch * warmup_epochs
    return _warmed(step, total, warmup) or 1.0 - (1.0 - floor) * _progress(step, total, warmup)


def step(
    step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float, floor: float, milestones: Sequence[float],
    gamma: float,
) -> float:  # fmt: skip
    """Times `gamma` at each of the milestones: epochs or, where all are below 1, shares of the run."""
    unit = total if all(milestone < 1 for milestone in milestones) else steps_per_epoch
    at = [round(milestone * unit) for milestone in milestones]
    if at != sorted(at) or any(milestone < 0 for milestone in milestones):
        raise ConfigError(f"schedule.milestones={list(milestones)} must rise: write them in the order of the run.")
    passed = bisect.bisect_right(at, step)
    return _warmed(step, total, steps_per_epoch * warmup_epochs) or max(floor, gamma**passed)


def one_cycle(
    step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float | None, start: float, floor: float
) -> float:
    """From `start` to 1 over the warmup (null: 0.3 of the run), then to `floor`, along cosines (Smith, Topin 2018)."""
    warmup = 0.3 * total if warmup_epochs is None else steps_per_epoch * warmup_epochs
    _check_warmup(warmup, total)
    peak = warmup - 1
    if step <= peak:
        return _between(start, 1.0, step / peak if peak > 0 else 1.0)
    return _between(1.0, floor, (step - max(peak, 0)) / max(total - 1 - max(peak, 0), 1))


def inverse_sqrt(step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float, floor: float) -> float:
    """1 / sqrt(steps), scaled to be 1 at the end of the warmup (Vaswani et al. 2017)."""
    warmup = steps_per_epoch * warmup_epochs
    return _warmed(step, total, warmup) or max(floor, math.sqrt(max(warmup, 1.0) / (step + 1)))


def _warmed(step: int, total: int, warmup: float) -> float | None:
    """The factor within a warmup of so many steps, the first of which moves already; None after it."""
    _check_warmup(warmup, total)
    return (step + 1) / warmup if step + 1 < warmup else None


def _check_warmup(warmup: float, total: int) -> None:
    if warmup >= total:
        raise ConfigError(
            f"schedule.warmup_epochs: a warmup of {warmup:,.0f} batches is no shorter than the run, which has "
            f"{total:,}. Shorten it, or train longer."
        )


def _progress(step: int, total: int, warmup: float) -> float:
    """How far the run is after the warmup: 0 at its first step, below 1 at the last, and 1 beyond."""
    begin = max(math.ceil(warmup) - 1, 0)  # the step of the warmup's end, which is at 1 already
    return min((step - begin) / (total - begin), 1.0)


def _between(first: float, last: float, share: float) -> float:
    """The value at a share of half a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def varies(schedule: Schedule) -> bool:
    """Whether the factor may ever be another than 1."""
    function = getattr(schedule, "func", None)
    return function is not constant or schedule.keywords["warmup_epochs"] > 0  # type: ignore[attr-defined]


class LearningRate:
    """Gives each of an optimizer's groups its own rate, as configured, times the schedule's factor.

    A factor that stays as it is touches nothing, so that an optimizer may change its rates itself where the schedule is
    constant.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, total: int) -> None:
        self.optimizer, self.schedule, self.total = optimizer, schedule, total
        self.base = [_rate(group) for group in optimizer.param_groups]
        self.factor = 1.0

    @property
    def value(self) -> float | None:
        """The first group's rate, as the last step had it; None where it has none."""
        return _rate(self.optimizer.param_groups[0])

    def set(self, step: int) -> None:
        """Set the rates of the step after `step` batches."""
        factor = self.schedule(step, self.total)
        if factor != self.factor:
            self.factor = factor
            for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
                if base is None:
                    continue
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(base * factor)
                else:
                    group["lr"] = base * factor

    def on_device(self, device: torch.device) -> None:
        """Hold the rates in tensors of the device, where a CUDA graph reads them at each replay: a number would be
        captured as it was."""
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)


def _rate(group: dict[str, Any]) -> float | None:
    """The rate of an optimizer's group; one of somebody else's may have none."""
    return float(group["lr"]) if "lr" in group else None
