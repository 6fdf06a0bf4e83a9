"""What a model or an optimizer holds beside its state_dict is kept in checkpoints, or named by the first of them."""

import logging
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import assert_same_weights, interrupt, read_events, scalars, small
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fmexp import execute
from fmexp.build import build
from fmexp.config import conf_dir
from fmexp.engine import step
from fmexp.engine.extra_state import ExtraState
from fmexp.run import Run
from fmexp.rundir import checkpoint

QUIET = ("logging=light", "stage.per_class_accuracy.enabled=false")
SCHEDULED = (
    *QUIET, "optimizer=custom", "optimizer._target_=test_extra_state.Scheduled", "optimizer.lr=0.1",
    "+stage.rate._target_=test_extra_state.rate", "+stage.rate.when=log", "train.log_every=1",
    "train.checkpoint_every=5",
)  # fmt: skip
OPTIONS = {group: sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) for group in ("model", "optimizer")}
OTHERS = ("Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")


class Scheduled(torch.optim.SGD):
    """Lowers its rate itself, by one of torch's schedulers or by two, which it holds in one of three ways."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, held: str) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        made = lr_scheduler.CosineAnnealingLR(self, 16)
        self.held = {"attribute": made, "list": [made, lr_scheduler.StepLR(self, 3)], "dict": {"rate": made}}[held]

    def step(self, closure: Any = None) -> None:
        super().step()
        held = self.held
        for scheduler in held.values() if isinstance(held, dict) else held if isinstance(held, list) else [held]:
            scheduler.step()


class Mean:
    """A running mean of what it was shown."""

    def __init__(self) -> None:
        self.value, self.count = torch.zeros(()), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.count = state["value"], state["count"]


class Linear(nn.Module):
    """Logits of a linear layer."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(prod(input_shape), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))  # type: ignore[no-any-return]


class Remembers(Linear):
    """Scales its logits by what it has seen in training."""

    def __init__(self, **known: Any) -> None:
        super().__init__(**known)
        self.mean = Mean()

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean.count += 1
            self.mean.value = self.mean.value + (images.detach().mean() - self.mean.value) / self.mean.count
        return super().forward(images) * (1 + self.mean.value)


class Keepsake:
    """Has a state that no checkpoint can keep."""

    def state_dict(self) -> Any:
        return {"what": self}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("it was kept")


class Forgets(Linear):
    """Counts and draws in many ways that no state_dict has, and holds as much that does not change, or is covered."""

    def __init__(self, **known: Any) -> None:
        super().__init__(**known)
        self.count, self.size, self.name = 0, 3, "mine"
        self.sums = {"images": torch.zeros(())}
        self.generator = torch.Generator()
        self.keepsake = [Keepsake()]
        self.same = torch.ones(3)
        self.weights = [self.linear.weight, self.linear.bias]
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("unseen", torch.zeros(()), persistent=False)
        self.tells = Tells()

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.sums["images"] = self.sums["images"] + images.detach().sum()
            torch.rand((), generator=self.generator)
            self.seen += 1
            self.unseen += 1
            self.tells.count += 1
        return super().forward(images)


class Tells(nn.Module):
    """Keeps its count as nn.Module lets it."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


class OfTorch(Linear):
    """Layers of torch's own that keep tensors beside their parameters."""

    def __init__(self, **known: Any) -> None:
        super().__init__(**known)
        self.recurrent, self.attention = nn.LSTM(10, 10), nn.MultiheadAttention(10, 2)
        self.norm = nn.BatchNorm1d(10)
        nn.utils.parametrizations.weight_norm(self.linear)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.norm(super().forward(images))
        return self.recurrent(rows)[0] + self.attention(rows, rows, rows)[0]  # type: ignore[no-any-return]


def rate(run: Run) -> None:
    """A stage that writes the learning rate."""
    run.scalar("rate", run.optimizer.param_groups[0]["lr"])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("held", ["attribute", "list", "dict"])
def test_schedulers_inside_an_optimizer_go_on(held: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = small(*SCHEDULED, f"+optimizer.held={held}")
    execute(cfg, tmp_path / "whole")
    interrupt(cfg, tmp_path / "parts", 7)
    assert checkpoint.load(tmp_path / "parts")["step"] == 5  # type: ignore[index]
    execute(cfg, tmp_path / "parts")
    rates = scalars(read_events(tmp_path / "whole"), "rate")
    assert scalars(read_events(tmp_path / "parts"), "rate") == rates
    assert [step for step, _ in rates] == list(range(1, 17))
    assert rates[0][1] > 10 * rates[-1][1] > -1e-6  # so that it matters where the schedule stands
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert not [line for line in warnings(caplog) if "resumed run" in line or "no state of" in line]


def test_what_a_model_holds_goes_on(tmp_path: Path) -> None:
    cfg = small(*QUIET, "model._target_=test_extra_state.Remembers", "train.checkpoint_every=5")
    execute(cfg, tmp_path / "whole")
    interrupt(cfg, tmp_path / "parts", 7)
    kept = checkpoint.load(tmp_path / "parts")
    assert kept is not None
    assert kept["extra"]["model.mean"]["count"] == 5
    execute(cfg, tmp_path / "parts")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_from_before_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = small(*SCHEDULED, "+optimizer.held=attribute")
    interrupt(cfg, tmp_path, 7)
    state = checkpoint.load(tmp_path)
    assert state is not None
    del state["extra"]
    checkpoint.save(tmp_path, state)
    execute(cfg, tmp_path)
    assert (tmp_path / "model.pt").is_file()
    assert "the checkpoint has no state of optimizer.held, which starts again" in warnings(caplog)


def test_the_first_checkpoint_names_what_it_does_not_keep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    execute(small(*QUIET, "model._target_=test_extra_state.Forgets", "train.checkpoint_every=5"), tmp_path)
    (line,) = (line for line in warnings(caplog) if "resumed run begins" in line)
    names = "model.count, model.generator, model.keepsake.0, model.sums.images, model.unseen"
    assert line.startswith(f"a resumed run begins with what these hold at its start: {names}. Checkpoints keep")
    assert line in (tmp_path / "fmexp.log").read_text()


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What is kept after two steps."""
    extra = ExtraState(model, optimizer, checkpoint.can_keep)
    model.train()
    for _ in range(2):
        step.TrainStep(model, optimizer)(*batch)
    return extra.state_dict()


@pytest.mark.parametrize(
    "words",
    [
        *((f"{group}={name}",) for group, names in OPTIONS.items() for name in names),
        *(("optimizer=custom", f"optimizer._target_=torch.optim.{name}") for name in OTHERS),
    ],
    ids=" ".join,
)
def test_nothing_is_said_of_what_comes_with_fmexp_or_torch(
    words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    run = build(small(*words, "train.compile=false"))
    assert stepped(run.model, run.optimizer, run.batch) == {}
    assert warnings(caplog) == []


def test_nothing_is_said_of_layers_that_keep_tensors_beside_their_parameters(caplog: pytest.LogCaptureFixture) -> None:
    model = OfTorch(input_shape=(1, 4, 4), num_classes=10)
    images, labels = torch.rand(4, 1, 4, 4), torch.arange(4)
    assert stepped(model, torch.optim.SGD(model.parameters()), (images, labels)) == {}
    assert warnings(caplog) == []
