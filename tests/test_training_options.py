"""What training may be given (schedule, loss, precision, clipping, accumulation, average): exact over any stop, and
beside a plain loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_trainer import Plain, plain_lenet
from tools import assert_same_weights, interrupt, read_events, scalars, small, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmexp import datasets, execute
from fmexp.build import build
from fmexp.errors import ConfigError

LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false", "dataset.train_size=66", "optimizer.lr=0.05")
OPTIONS = {
    "schedule": ("schedule=cosine", "schedule.warmup_epochs=0.3"),
    "plateau": ("schedule=plateau", "schedule.patience=0", "schedule.factor=0.5"),
    "loss": ("loss=focal", "loss.class_weights=balanced"),
    "smoothing": ("loss.label_smoothing=0.1",),
    "precision": ("train.precision=bf16",),
    "clip_grad": ("train.clip_grad=0.5",),
    "accumulate": ("train.accumulate=3",),
    "ema": ("train.ema=0.9",),
    "keep": ("train.validation=0.3", "objective=val/loss", "train.keep=best"),
    "all": ("schedule=one_cycle", "loss=binary", "train.precision=bf16", "train.clip_grad=0.5", "train.accumulate=3",
            "train.ema=0.9", "model._target_=test_training_options.Noisy"),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_exact_over_any_stop(option: str, optimizer: str, tmp_path: Path) -> None:
    words = (*LIGHT, f"optimizer={optimizer}", "optimizer.lr=0.05", "train.epochs=2", *OPTIONS[option])
    cfg = small(*words, "train.checkpoint_every=4")
    execute(cfg, tmp_path / "whole")
    execute(small(*words[: -len(OPTIONS[option])]), tmp_path / "without")
    points = {tag: scalars(read_events(tmp_path / "whole"), tag) for tag in ("train/loss", "train/lr", "test/loss")}
    assert points["train/loss"] != scalars(read_events(tmp_path / "without"), "train/loss") or option in (
        "ema",
        "plateau",
    )
    total = result(tmp_path / "whole")["steps"]
    for stop in (5, total // 2, total - 2):
        interrupt(cfg, tmp_path / "resumed", stop)  # three times the same run
    execute(cfg, tmp_path / "resumed")
    assert "going on from the checkpoint" in (tmp_path / "resumed" / "fmexp.log").read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    assert result(tmp_path / "resumed") == result(tmp_path / "whole")
    events = read_events(tmp_path / "resumed")
    assert points == {tag: scalars(events, tag) for tag in points}


def result(folder: Path) -> dict[str, Any]:
    """What result.json says, but for the times."""
    content = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in content.items() if key not in ("seconds", "lineage")}


def test_the_best_epoch_is_kept_and_the_test_split_is_seen_once(tmp_path: Path) -> None:
    """From the second epoch on it is trained to be worse: the first epoch is the best."""
    words = (*LIGHT, "train.validation=0.3", "objective=val/loss", "schedule._target_=test_training_options.jump")
    execute(small(*words, "train.epochs=1"), tmp_path / "one")
    execute(small(*words, "train.epochs=4"), tmp_path / "best")
    execute(small(*words, "train.epochs=4", "train.keep=last"), tmp_path / "last")
    assert_same_weights(tmp_path / "one", tmp_path / "best")
    one, best, last = (result(tmp_path / name) for name in ("one", "best", "last"))
    assert (best["best_epoch"], best["epochs"], last["best_epoch"]) == (1, 4, None)
    assert best["objective"] == best["metrics"]["val/loss"] == one["objective"]
    assert best["metrics"]["test/loss"] == one["metrics"]["test/loss"]
    assert last["metrics"]["test/loss"] > best["metrics"]["test/loss"]
    events = read_events(tmp_path / "best")
    per_epoch = best["steps"] // 4
    assert [step for step, _ in scalars(events, "val/loss")] == [per_epoch * epoch for epoch in (1, 2, 3, 4)]
    assert [step for step, _ in scalars(events, "test/loss")] == [best["steps"]]


def jump(step: int, total: int, *, steps_per_epoch: int, warmup_epochs: float) -> float:
    """Down in the first epoch, and then uphill."""
    return 1.0 if step < steps_per_epoch else -0.5


def test_a_run_that_ends_early_stays_as_it_is(tmp_path: Path) -> None:
    words = (*LIGHT, "train.validation=0.3", "objective=val/loss", "schedule._target_=test_training_options.jump",
             "train.epochs=9", "train.patience=2", "train.log_every=7")  # fmt: skip
    execute(small(*words), tmp_path / "whole")
    ended = result(tmp_path / "whole")
    assert (ended["status"], ended["epochs"], ended["best_epoch"]) == ("complete", 3, 1)
    assert scalars(read_events(tmp_path / "whole"), "train/loss")[-1][0] == ended["steps"]
    before = (tmp_path / "whole" / "model.pt").stat().st_mtime_ns
    execute(small(*words), tmp_path / "whole")
    assert (tmp_path / "whole" / "model.pt").stat().st_mtime_ns == before
    for stop in (5, ended["steps"] - 3, ended["steps"]):
        interrupt(small(*words, "train.checkpoint_every=4"), tmp_path / "resumed", stop)
    execute(small(*words, "train.checkpoint_every=4"), tmp_path / "resumed")
    assert result(tmp_path / "resumed") == ended
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    ours, theirs = (read_events(tmp_path / name) for name in ("resumed", "whole"))
    assert ours.Tags()["scalars"] == theirs.Tags()["scalars"]
    for tag in ("train/loss", "val/loss", "val/accuracy", "test/loss"):
        assert scalars(ours, tag) == scalars(theirs, tag)


def test_a_run_with_all_of_it_is_the_plain_loop(tmp_path: Path) -> None:
    """Cosine with warmup, smoothing, clipping and an average, as one would write them with torch."""
    words = ("schedule=cosine", "schedule.warmup_epochs=0.5", "loss.label_smoothing=0.1", "train.clip_grad=1.0",
             "train.ema=0.9", "train.epochs=2", "optimizer.momentum=0.9", "train.log_every=1")  # fmt: skip
    execute(small(*LIGHT, *words), tmp_path)
    data, steps = datasets.synthetic(66, 40, 28, 0), 17
    torch.manual_seed(0)
    model = plain_lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    warm, cosine = torch.optim.lr_scheduler.LinearLR, torch.optim.lr_scheduler.CosineAnnealingLR
    warmup = [warm(optimizer, 1 / 8.5, 8 / 8.5, total_iters=7), cosine(optimizer, 2 * steps - 8)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, warmup, [8])
    losses, norms, rates = [], [], []
    for epoch in range(2):
        order = datasets.order(0, epoch, 66)
        for chosen in order.split(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(
                model(Plain.pixels(data.train)[chosen]), data.train.labels[chosen], label_smoothing=0.1
            )
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.item())
    events = read_events(tmp_path)
    for tag, values in (("train/loss", losses), ("train/grad_norm", norms), ("train/lr", rates)):
        assert [value for _, value in scalars(events, tag)] == pytest.approx(values, rel=1e-3, abs=1e-6), tag
    ours = nn.utils.parameters_to_vector(list(weights(tmp_path).values()))
    torch.testing.assert_close(ours, nn.utils.parameters_to_vector(average.module.parameters()), rtol=1e-3, atol=1e-5)
    logits = average.module(Plain.pixels(data.test))
    assert scalars(events, "test/loss")[-1][1] == pytest.approx(
        F.cross_entropy(logits, data.test.labels).item(), abs=1e-4
    )


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    """66 images: the last window of an epoch has 2 images more than one batch."""
    words = (*LIGHT, "train.epochs=2", "train.log_every=1000")
    execute(small(*words, "train.batch_size=12"), tmp_path / "large")
    execute(small(*words, "train.batch_size=4", "train.accumulate=3"), tmp_path / "small")
    ours, theirs = weights(tmp_path / "small"), weights(tmp_path / "large")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.accumulate=17"], "train.accumulate=17 is more than the 16 batches of an epoch. Take at most 16."),
        (["train.accumulate=0"], "train.accumulate=0 must be at least 1"),
        (["train.ema=1"], "train.ema=1.0 must be below 1"),
        (["train.ema=0"], "train.ema=0.0 must be above 0"),
        (["train.clip_grad=0"], "train.clip_grad=0.0 must be above 0"),
        (
            ["objective=val/loss"],
            "objective=val/loss is of the validation split, and train.validation=0 holds none out",
        ),
        (["train.validation=1"], "train.validation=1.0 must be below 1"),
        (["train.patience=3"], "train.patience=3 would end training by objective=test/accuracy"),
        (["train.patience=0"], "train.patience=0 must be at least 1"),
        (["train.keep=first"], "train.keep=first must be one of best, last"),
        (["schedule=plateau", "train.validation=0.1"], "follows objective=test/accuracy, which is measured once"),
        (["train.precision=64"], "train.precision=64 must be one of 32, bf16"),
        (["train.precision=16"], r"train.precision=16 is not supported: .* Take train.precision=bf16"),
        (["train.precision=fp16"], r"fp16 is not supported: .* gradient scaling. Take train.precision=bf16"),
    ],
)
def test_what_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        execute(small(*words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_copied_has_no_average() -> None:
    with pytest.raises(ConfigError, match=r"train.ema=0.9: the model cannot be copied: not me"):
        build(small("model._target_=test_training_options.Single", "train.ema=0.9", "backend.kernels=native"))


class Single(nn.Module):
    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[1] * input_shape[2], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))

    def __deepcopy__(self, memo: object) -> "Single":
        raise TypeError("not me")


class Noisy(nn.Sequential):
    """Running statistics and random numbers."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        pixels = input_shape[0] * input_shape[1] * input_shape[2]
        super().__init__(
            nn.Flatten(), nn.Linear(pixels, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, num_classes)
        )
