"""Training: the very curve of a plain loop, its points and their steps, what a run leaves behind, and divergence."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import assert_same_weights, read_events, scalars, small, weights
from torch import Tensor, nn

import fmexp
from fmexp import compose, config, datasets, execute, trainer
from fmexp.build import build
from fmexp.datasets import Dataset, Split
from fmexp.engine.evaluation import evaluate
from fmexp.models import LeNet
from fmexp.run import total_steps

SCALARS = ("logging=light", "stage.per_class_accuracy.enabled=false")  # nothing but the training's own points

LEARNS = ("train.epochs=4", "optimizer.lr=0.02", "dataset.train_size=120")


def plain_lenet() -> nn.Sequential:
    """The tutorial's network, written down once more."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Plain:
    """The training as anyone would write it: SGD by hand, nothing fused, nothing cached."""

    def __init__(self, *, seed: int, epochs: int, batch_size: int, lr: float, momentum: float, train_size: int) -> None:
        data = datasets.synthetic(train_size, 40, 28, 0)
        torch.manual_seed(seed)
        self.model = plain_lenet()
        velocity = [torch.zeros_like(parameter) for parameter in self.model.parameters()]
        self.losses: list[float] = []
        self.tests: list[tuple[float, float]] = []  # loss and accuracy after each epoch
        for epoch in range(epochs):
            order = datasets.order(seed, epoch, train_size).tolist()
            for start in range(0, train_size, batch_size):
                chosen = order[start : start + batch_size]
                loss = F.cross_entropy(self.model(self.pixels(data.train)[chosen]), data.train.labels[chosen])
                gradients = torch.autograd.grad(loss, list(self.model.parameters()))
                with torch.no_grad():
                    for parameter, speed, gradient in zip(self.model.parameters(), velocity, gradients, strict=True):
                        speed.mul_(momentum).add_(gradient)
                        parameter.sub_(lr * speed)
                self.losses.append(loss.item())
            with torch.no_grad():
                logits = self.model(self.pixels(data.test))
            right = (logits.argmax(1) == data.test.labels).double().mean()
            self.tests.append((float(F.cross_entropy(logits, data.test.labels)), float(right)))

    @staticmethod
    def pixels(split: Split) -> Tensor:
        return split.images.float() / 255 * 2 - 1

    def points(self, log_every: int) -> list[tuple[int, float]]:
        """The mean loss of each window, the last one as far as it goes."""
        starts = range(0, len(self.losses), log_every)
        windows = [self.losses[start : start + log_every] for start in starts]
        return [(start + len(window), sum(window) / len(window)) for start, window in zip(starts, windows, strict=True)]


def close(points: list[tuple[int, float]]) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(value, abs=1e-4)) for step, value in points]


# The curve


@pytest.mark.parametrize(
    ("seed", "epochs", "batch_size", "log_every", "momentum", "train_size"),
    [
        (0, 1, 4, 4, 0.9, 64),  # 16 batches, 4 whole windows
        (3, 2, 4, 7, 0.9, 64),  # 32 batches: windows reach over the epochs, and the last is cut short
        (1, 3, 5, 4, 0.0, 23),  # 5 batches an epoch, the last of 3 images
    ],
)
def test_the_curve_is_that_of_a_plain_loop(
    seed: int, epochs: int, batch_size: int, log_every: int, momentum: float, train_size: int, tmp_path: Path
) -> None:
    cfg = small(
        *SCALARS, f"seed={seed}", f"train.epochs={epochs}", f"train.batch_size={batch_size}",
        f"train.log_every={log_every}", f"optimizer.momentum={momentum}", "optimizer.lr=0.01",
        f"dataset.train_size={train_size}",
    )  # fmt: skip
    accuracy = execute(cfg, tmp_path)
    plain = Plain(seed=seed, epochs=epochs, batch_size=batch_size, lr=0.01, momentum=momentum, train_size=train_size)
    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == close(plain.points(log_every))
    steps = [math.ceil(train_size / batch_size) * (epoch + 1) for epoch in range(epochs)]
    assert scalars(events, "test/loss") == close(list(zip(steps, [loss for loss, _ in plain.tests], strict=True)))
    assert scalars(events, "test/accuracy") == close(list(zip(steps, [share for _, share in plain.tests], strict=True)))
    assert accuracy == plain.tests[-1][1]
    for ours, theirs in zip(weights(tmp_path).values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


class OnePixel(nn.Module):
    """The smallest model there is, so that 15,000 batches take a moment."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.bias + images.flatten(1)


def one_pixel(train_size: int, test_size: int, image_size: int, seed: int) -> Dataset:
    images = torch.zeros(train_size, 1, 1, 1, dtype=torch.uint8)
    train, test = (Split(images[:count], torch.arange(count) % 10) for count in (train_size, test_size))
    return Dataset(train, test, datasets.GARMENTS)


def test_the_tutorials_settings_give_the_tutorials_15_points(tmp_path: Path) -> None:
    cfg = compose(
        ["experiment=tutorial", "dataset=synthetic", "dataset._target_=test_trainer.one_pixel", "device=cpu",
         "dataset.train_size=60000", "model._target_=test_trainer.OnePixel", "logging=light"]
    )  # fmt: skip
    assert total_steps(cfg, one_pixel(60_000, 1, 1, 0)) == 15_000
    execute(cfg, tmp_path)
    points = scalars(read_events(tmp_path), cfg.train.tag)
    assert [step for step, _ in points] == list(range(1000, 15_001, 1000))
    assert all(2.2 < value < 2.4 for _, value in points)  # the logarithm of 10 is 2.30


@pytest.mark.parametrize(
    ("settings", "size", "steps"),
    [
        ({}, 60_000, 15_000),
        ({"epochs": 3}, 60_000, 45_000),
        ({"epochs": 2, "batch_size": 64}, 60_000, 2 * 938),
        ({"max_steps": 7}, 60_000, 7),
        ({"max_steps": 70_000}, 60_000, 15_000),
        ({"batch_size": 100}, 3, 1),
    ],
)
def test_how_many_batches_a_run_has(settings: dict[str, int], size: int, steps: int) -> None:
    cfg = compose([f"train.{key}={value}" for key, value in settings.items()])
    assert total_steps(cfg, one_pixel(size, 1, 1, 0)) == steps


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch_with_its_last_points(tmp_path: Path) -> None:
    execute(small(*SCALARS, "train.epochs=3", "train.max_steps=22", "optimizer.lr=0.01"), tmp_path)
    plain = Plain(seed=0, epochs=2, batch_size=4, lr=0.01, momentum=0.9, train_size=64)
    plain.losses = plain.losses[:22]
    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == close(plain.points(4))
    assert [step for step, _ in scalars(events, "train/loss")] == [4, 8, 12, 16, 20, 22]
    tests = scalars(events, "test/loss")
    assert [step for step, _ in tests] == [16, 22]
    assert tests[0][1] == pytest.approx(plain.tests[0][0], abs=1e-4)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["metrics"]["test/loss"]) == (22, pytest.approx(tests[1][1]))


def test_the_running_loss_has_the_tag_asked_for(tmp_path: Path) -> None:
    execute(small(*SCALARS, "train.tag=training loss", "train.max_steps=4", "objective=training loss"), tmp_path)
    events = read_events(tmp_path)
    ((step, value),) = scalars(events, "training loss")
    assert step == 4
    assert "train/loss" not in events.Tags()["scalars"]
    assert json.loads((tmp_path / "result.json").read_text())["objective"] == pytest.approx(value)


# What a run leaves behind


@pytest.mark.parametrize("objective", ["test/accuracy", "test/loss", "train/loss"])
def test_the_objective_is_the_metrics_last_value(objective: str, tmp_path: Path) -> None:
    value = execute(small(*SCALARS, *LEARNS, f"objective={objective}"), tmp_path)
    points = scalars(read_events(tmp_path), objective)
    assert len(points) > 1
    assert points[-1][1] == pytest.approx(value, rel=1e-6)
    assert points[-1][1] != points[0][1]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["objective"] == result["metrics"][objective] == value


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that has learnt something, and the objective that it returned."""
    folder = tmp_path_factory.mktemp("done") / "run"
    cfg = small(*SCALARS, *LEARNS, "seed=5")
    return folder, execute(cfg, folder)


def test_the_result_says_what_came_of_the_run(done: tuple[Path, float]) -> None:
    folder, objective = done
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "complete"
    assert result["objective"] == objective
    assert result["steps"] == 120
    events = read_events(folder)
    for tag in ("train/loss", "test/loss", "test/accuracy"):
        assert scalars(events, tag)[-1] == (120, pytest.approx(result["metrics"][tag], rel=1e-6))
    assert result["seconds"] > 0
    assert result["failures"] == {}
    cfg = small(*SCALARS, *LEARNS, "seed=5")
    assert result["config_digest"] == config.digest(config.resolved(cfg))
    assert result["versions"]["fmexp"] == fmexp.__version__
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["backend"]["device"] == "cpu"
    assert result["backend"]["threads"] >= 1
    assert not list(folder.glob("checkpoint*"))


def test_the_model_file_is_the_state_dict_alone_and_reproduces_the_accuracy(done: tuple[Path, float]) -> None:
    folder, accuracy = done
    model = LeNet(input_shape=(1, 28, 28), num_classes=10)
    state = torch.load(folder / "model.pt", weights_only=True)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    data = datasets.synthetic(120, 40, 28, 0)
    found = evaluate(model.eval(), data, data.test, device=torch.device("cpu"))
    assert found.accuracy == accuracy
    assert accuracy > 0.3  # ten classes
    assert found.loss == pytest.approx(json.loads((folder / "result.json").read_text())["metrics"]["test/loss"], 1e-5)


def test_the_log_tells_the_run(done: tuple[Path, float]) -> None:
    folder, accuracy = done
    log = (folder / "fmexp.log").read_text()
    assert "120 training + 40 test images of 1x28x28, 10 classes" in log
    assert "LeNet, 44,426 parameters" in log
    assert "SGD, lr 0.02, momentum 0.9" in log
    events = read_events(folder)
    for step, value in scalars(events, "train/loss"):
        assert f"step {step}: train/loss {value:.4f}" in log
    for epoch, (_, value) in enumerate(scalars(events, "test/accuracy"), 1):
        assert f"epoch {epoch}: test accuracy {value:.4f}" in log
    assert f"test accuracy {accuracy:.4f}" in log.splitlines()[-3]


def test_the_same_seed_gives_the_same_bits_and_another_one_others(done: tuple[Path, float], tmp_path: Path) -> None:
    folder, _ = done
    torch.manual_seed(1234)  # what went before does not matter
    execute(small(*SCALARS, *LEARNS, "seed=5"), tmp_path / "same")
    execute(small(*SCALARS, *LEARNS, "seed=6"), tmp_path / "other")
    assert_same_weights(tmp_path / "same", folder)
    ours, theirs, others = (read_events(path) for path in (tmp_path / "same", folder, tmp_path / "other"))
    for tag in ("train/loss", "test/loss", "test/accuracy"):
        assert scalars(ours, tag) == scalars(theirs, tag)
    assert scalars(others, "train/loss") != scalars(theirs, "train/loss")
    for name, tensor in weights(tmp_path / "other").items():
        assert not torch.equal(tensor, weights(folder)[name])


@pytest.mark.parametrize("overrides", [("model=mlp", "model.dropout=0.5"), ("optimizer=adam",), ("optimizer=custom",)])
def test_other_models_and_optimizers_repeat_themselves_too(overrides: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("one", "two"):
        execute(small(*SCALARS, "train.max_steps=8", *overrides), tmp_path / name)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


# Divergence


@pytest.mark.parametrize("objective", ["test/accuracy", "test/loss", "train/loss"])
def test_a_run_that_diverges_says_where(objective: str, tmp_path: Path) -> None:
    value = execute(small("optimizer.lr=1e10", f"objective={objective}"), tmp_path)
    assert math.isnan(value)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["objective"]) == ("diverged", None)
    log = (tmp_path / "fmexp.log").read_text()
    assert re.search(rf"the run diverged: the loss is (nan|inf) at step {result['steps']}\.", log)
    assert "smaller optimizer.lr" in log
    assert 1 < result["steps"] < 16
    # The step is the first one, as a plain loop finds it, and what came before it is written.
    plain = Plain(seed=0, epochs=1, batch_size=4, lr=1e10, momentum=0.9, train_size=64)
    first = next(step for step, loss in enumerate(plain.losses, 1) if not math.isfinite(loss))
    assert result["steps"] == first
    assert "train/loss" not in read_events(tmp_path).Tags()["scalars"]  # it was in the first window
    assert not (tmp_path / "model.pt").exists()


class LostInEvalMode(LeNet):
    """Gives finite logits in training alone, as a BatchNorm does whose running statistics overflowed."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if self.training else logits * math.nan


def test_a_test_loss_that_is_not_finite_is_a_run_that_diverged(tmp_path: Path) -> None:
    value = execute(small(*SCALARS, "model._target_=test_trainer.LostInEvalMode"), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert math.isnan(value)
    assert (result["status"], result["steps"], result["objective"]) == ("diverged", 16, None)
    assert "test/accuracy" not in read_events(tmp_path).Tags()["scalars"]


def test_a_run_that_diverges_later_keeps_the_points_before(tmp_path: Path) -> None:
    value = execute(small(*SCALARS, "model._target_=test_trainer.Bursts", "objective=train/loss"), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert math.isnan(value)  # and not the last point before
    assert (result["status"], result["steps"], result["objective"]) == ("diverged", 10, None)
    points = scalars(read_events(tmp_path), "train/loss")
    assert [step for step, _ in points] == [4, 8]
    assert all(math.isfinite(value) for _, value in points)
    assert result["metrics"]["train/loss"] == pytest.approx(points[-1][1])


class Bursts(LeNet):
    """Has an infinite logit in its tenth batch of training."""

    def __init__(self, **known: Any) -> None:
        super().__init__(**known)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(x) * (math.inf if self.batches == 10 else 1)


def test_the_mean_of_losses_names_the_first_that_is_not_finite() -> None:
    losses = [torch.tensor(value) for value in (1.0, 2.0, 6.0)]
    assert trainer.mean_loss(losses, 50) == 3
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(trainer.DivergedError, match=f"the loss is {bad} at step 49") as caught:
            trainer.mean_loss([losses[0], torch.tensor(bad), torch.tensor(math.nan)], 50)
        assert caught.value.step == 49


def test_train_accuracy_is_that_of_the_last_images_trained_on(tmp_path: Path) -> None:
    """Of two epochs of 300 images, the second of which ends after 22 of 38 batches."""
    cfg = small(
        "dataset.train_size=300", "train.batch_size=8", "train.epochs=2", "train.max_steps=60", "optimizer.lr=0.05"
    )
    execute(cfg, tmp_path)
    run = build(cfg)
    run.model.load_state_dict(weights(tmp_path))
    recent = datasets.order(cfg.seed, 1, 300)[: 22 * 8][-100:]
    images, labels = run.dataset.take(run.dataset.train, recent)
    with torch.no_grad():
        right = run.model.eval()(images).argmax(1) == labels
    points = scalars(read_events(tmp_path), "train/accuracy")
    assert [step for step, _ in points] == [38, 60]
    assert points[-1][1] == pytest.approx(float(right.double().mean()))
    assert 0.15 < points[-1][1] < 1
