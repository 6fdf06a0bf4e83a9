"""Which kernels and how many threads a run computes with: by rule, or as the configuration says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import program
import pytest
import torch
import torch.nn.functional as F
from tools import assert_same_weights, interrupt, lenet, noise, read_events, scalars, small
from torch import Tensor, nn

from fmexp import config, execute, models
from fmexp.build import build
from fmexp.engine import backend, step
from fmexp.errors import ConfigError

DEFAULT = (torch._C._get_mkldnn_enabled(), torch.get_num_threads())


def tiny(*, kernel: int = 3, groups: int = 1, channels: int = 8) -> nn.Module:
    """Two convolutions, of which the second one is given, of images with one channel."""
    second = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups)
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels, 10))  # fmt: skip


class Functional(nn.Module):
    """Multiplies by a weight that is no layer's, as attention and recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.seen = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.seen(nn.functional.conv2d(x, self.weight)).mean((2, 3)))  # type: ignore[no-any-return]


def chosen(model: nn.Module, batch_size: int, size: int = 28, **settings: Any) -> backend.Backend:
    return backend.choose(model, torch.zeros(2, 1, size, size), batch_size, **settings)


def kernels_and_threads(model: nn.Module, batch_size: int, size: int = 28, **settings: Any) -> tuple[bool, int]:
    how = chosen(model, batch_size, size, **settings)
    return how.onednn, how.threads


LENET = models.LeNet(input_shape=(1, 28, 28), num_classes=10)
MLP = models.MLP(input_shape=(1, 28, 28), num_classes=10)


@pytest.mark.parametrize(
    ("model", "batch_size", "size", "onednn"),
    [
        pytest.param(LENET, 4, 28, False, id="LeNet"),
        pytest.param(LENET, 8, 28, False, id="LeNet, twice as many"),
        pytest.param(LENET, 16, 28, True, id="LeNet, large batch"),
        pytest.param(MLP, 4, 28, True, id="no convolution"),
        pytest.param(tiny(), 2, 28, False, id="plain"),
        pytest.param(tiny(groups=8), 2, 28, True, id="depthwise"),
        pytest.param(tiny(groups=2), 2, 28, True, id="grouped"),
        pytest.param(tiny(kernel=1), 2, 28, False, id="1x1"),
        pytest.param(tiny(kernel=1, channels=64), 2, 28, True, id="1x1, many channels"),
        pytest.param(tiny(channels=128), 2, 2, True, id="more weights than outputs"),
        pytest.param(tiny(), 2, 128, True, id="large images"),
        pytest.param(Functional(), 2, 28, True, id="a convolution that is no layer"),
    ],
)
def test_native_kernels_are_for_small_convolutions_without_groups(
    model: nn.Module, batch_size: int, size: int, onednn: bool
) -> None:
    assert chosen(model, batch_size, size).onednn == (onednn and DEFAULT[0])


def test_one_large_convolution_among_many_small_ones_is_enough_for_onednn() -> None:
    layers = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        *(nn.Conv2d(16, 1, 1), nn.Conv2d(1, 16, 1)) * 20,
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    assert chosen(model, 2).onednn == DEFAULT[0]


def test_one_thread_is_for_small_batches_of_layers_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [chosen(model, 4).threads for model in (LENET, MLP, tiny())] == [1, 1, 1]
    assert [chosen(model, 512).threads for model in (LENET, MLP, tiny())] == [8, 8, 8]
    assert chosen(Functional(), 2).threads == 8


def test_a_model_of_many_weights_has_pytorchs_defaults_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little it multiplies: each step reads and updates the weights, and oneDNN reorders them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    wide = models.MLP(input_shape=(1, 2, 2), num_classes=10, hidden=[1024, 1024, 1024])
    for model in (tiny(channels=512), wide):
        how = chosen(model, 1, 2)
        assert (how.onednn, how.threads, how.channels_last) == (DEFAULT[0], 8, False)


@pytest.mark.parametrize(("images", "channels_last"), [(16, False), (512, True)])
def test_channels_come_last_where_the_images_outweigh_the_weights(images: int, channels_last: bool) -> None:
    assert chosen(tiny(channels=256), images, 4).channels_last == (channels_last and DEFAULT[0])
    assert chosen(tiny(groups=8), images).channels_last == DEFAULT[0]


@pytest.mark.parametrize("batch_size", [4, 512])
def test_the_keys_override_the_rules(batch_size: int) -> None:
    assert kernels_and_threads(LENET, batch_size, kernels="native", threads=3) == (False, 3)
    assert kernels_and_threads(LENET, batch_size, kernels="onednn", threads=2) == (DEFAULT[0], 2)
    assert kernels_and_threads(LENET, batch_size, kernels="native") == (False, chosen(LENET, batch_size).threads)
    assert not chosen(LENET, batch_size, kernels="native").channels_last, "native kernels would have to bring it back"


def test_the_keys_hold_in_training_and_in_evaluation() -> None:
    run = build(small("backend.kernels=native", "backend.threads=3"))
    for how in (run.backend, run.evaluation_backend):
        assert (how.onednn, how.threads) == (False, 3)


def test_auto_takes_no_more_threads_than_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a sweep has its share of the cores."""
    for share in (1, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda share=share: share)
        assert chosen(LENET, 512).threads == share
        assert chosen(LENET, 512, threads=4).threads == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("backend.kernels=foo", "backend.kernels=foo must be one of auto, onednn, native."),
        ("backend.threads=0", "backend.threads=0 must be at least 1."),
        ("backend.threads=-2", "backend.threads=-2 must be at least 1."),
        ("backend.threads=5000", "backend.threads=5000 must be at most 1024."),
        ("backend.threads=many", "backend.threads=many must be auto or a whole number."),
        ("backend.threads=1.5", "backend.threads=1.5 must be auto or a whole number."),
        ("backend.threads=true", "backend.threads=True must be auto or a whole number."),
    ],
)
def test_what_the_keys_cannot_be(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.check(small(override))
    assert str(refused.value) == said
    ended = program.call(override, "dataset=synthetic", "hydra.run.dir=run", cwd=tmp_path)
    assert ended.status
    assert said in ended.err
    assert not list(tmp_path.iterdir())


def test_the_keys_decide_bits_and_belong_to_the_runs_identity(tmp_path: Path) -> None:
    trees = [config.resolved(small(*words)) for words in ([], ["backend.kernels=native"], ["backend.threads=2"])]
    assert len({config.digest(tree) for tree in trees}) == 3
    settings = ("logging=light", "train.max_steps=4")
    execute(small(*settings, "backend.threads=1"), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["backend"]["threads"], result["backend"]["onednn"]) == (1, False)
    with pytest.raises(ConfigError, match=r"backend\.threads: 1, now 2"):
        execute(small(*settings, "backend.threads=2"), tmp_path)


def test_a_resumed_run_keeps_the_kernels_and_threads_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("logging=light", "train.checkpoint_every=1")
    assert interrupt(small(*settings), tmp_path, 5)["backend"]["onednn"] is False
    monkeypatch.setattr(backend, "SMALL_CONVOLUTION", 0)  # another rule
    monkeypatch.setattr(backend, "SMALL_BATCH", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    execute(small(*settings), tmp_path)
    kept = json.loads((tmp_path / "result.json").read_text())["backend"]
    assert (kept["onednn"], kept["threads"]) == (False, 1)


def test_the_keys_are_in_hparams_only_where_they_were_chosen() -> None:
    def columns(*words: str) -> dict[str, Any]:
        return {k: v for k, v in config.hparams(config.resolved(small(*words))).items() if k.startswith("backend")}

    assert columns() == {}
    assert columns("backend.threads=2") == {"backend.threads": 2}
    assert columns("backend.kernels=native") == {"backend.kernels": "native"}


class WeightNorm(models.LeNet):
    """Computes a layer's weight from two others."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fc1 = nn.utils.parametrizations.weight_norm(self.fc1)


def test_a_weight_that_is_computed_is_trained(tmp_path: Path) -> None:
    execute(small("logging=light", "model._target_=test_backend.WeightNorm"), tmp_path)
    first, last = torch.load(tmp_path / "model.pt"), WeightNorm(input_shape=(1, 28, 28), num_classes=10).state_dict()
    assert first.keys() == last.keys()
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "complete"


LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false")


# Kernels and threads


def test_native_and_onednn_kernels_give_nearly_the_same_curve() -> None:
    curves = []
    for onednn in (True, False):
        how = backend.Backend("cpu", 1, onednn, torch.__version__, "")
        with how.applied():
            model = lenet()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            curves.append([float(step.TrainStep(model, optimizer)(*batch)) for batch in noise(20)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_the_kernels_and_threads_follow_from_the_work_a_batch() -> None:
    threads = torch.get_num_threads()
    chosen = {size: backend.choose(lenet(), noise(1)[0][0], size) for size in (4, 512)}
    assert (chosen[4].threads, chosen[4].onednn) == (1, False)
    assert (chosen[512].threads, chosen[512].onednn) == (threads, torch.backends.mkldnn.is_available())


def test_onednn_has_the_channels_last_from_16_images_on() -> None:
    def chosen(model: nn.Module, size: int, **settings: Any) -> bool:
        return backend.choose(model, noise(1)[0][0], size, **settings).channels_last

    assert not chosen(lenet(), 15)
    assert chosen(lenet(), 16) == torch.backends.mkldnn.is_available()
    assert not chosen(lenet(), 16, compiled=True)
    assert not chosen(models.MLP(input_shape=(1, 28, 28), num_classes=10), 512), "it has no channels"
    for name in (Viewing, ViewsInTraining, Asserts):
        assert not chosen(name(input_shape=(1, 28, 28), num_classes=10), 512)


class Viewing(models.LeNet):
    """Flattens as the tutorial's network does, which takes the channels first alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, self.fc1.in_features)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))  # type: ignore[no-any-return]


class ViewsInTraining(models.LeNet):
    """The same, but when it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.conv1(x).view(len(x), -1).mean() if self.training else 0)


class Asserts(models.LeNet):
    """Insists on the plain order."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv1(x).is_contiguous()
        return super().forward(x)


ORDERED = ("train.batch_size=16", "dataset.train_size=330", "train.epochs=2", "train.log_every=1")  # the last: of 10


def test_channels_last_gives_nearly_the_same_curve_and_a_view_trains_without(tmp_path: Path) -> None:
    for name in ("fmexp.models.LeNet", "test_backend.Viewing"):
        execute(small(*LIGHT, *ORDERED, f"model._target_={name}"), tmp_path / name)
    results = [json.loads((folder / "result.json").read_text()) for folder in sorted(tmp_path.iterdir())]
    assert [result["backend"]["channels_last"] for result in results] == [True, False]
    curves = [scalars(read_events(folder), "train/loss") for folder in sorted(tmp_path.iterdir())]
    assert len(curves[0]) == 42
    assert np.array(curves[0]) == pytest.approx(np.array(curves[1]), abs=1e-3)
    assert [value for _, value in curves[0]] != [value for _, value in curves[1]], "other kernels have other bits"


def test_a_run_with_channels_last_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*ORDERED, "train.checkpoint_every=1")
    execute(small(*settings), tmp_path / "whole")
    execute(small(*settings, *LIGHT), tmp_path / "light")
    assert_same_weights(tmp_path / "whole", tmp_path / "light")  # stages disturb nothing
    assert interrupt(small(*settings), tmp_path / "resumed", 30)["backend"]["channels_last"]
    with monkeypatch.context() as patch:  # what the checkpoint says counts, not today's rule
        patch.setattr(backend, "MANY_IMAGES", 1000)
        execute(small(*settings), tmp_path / "resumed")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
