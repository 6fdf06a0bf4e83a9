"""Speed without another result: each fast path beside the plain one, and what a run does not import."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tools import assert_same_weights, interrupt, read_events, scalars, small, weights
from torch import Tensor, nn

from fmexp import config, datasets, execute, models
from fmexp.engine import backend, optim, step
from fmexp.errors import ConfigError
from fmexp.stages import predictions

LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false")


def lenet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.LeNet(input_shape=(1, 28, 28), num_classes=10)


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 28, 28, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


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
    for images, labels in batches(5):
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
        curves.append([float(step.train_step(model, optimizer, *batch)) for batch in batches(20)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


# Kernels and threads


def test_native_and_onednn_kernels_give_nearly_the_same_curve() -> None:
    curves = []
    for onednn in (True, False):
        how = backend.Backend("cpu", 1, onednn, torch.__version__, "")
        with how.applied():
            model = lenet()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            curves.append([float(step.train_step(model, optimizer, *batch)) for batch in batches(20)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_the_kernels_and_threads_follow_from_the_work_a_batch() -> None:
    threads = torch.get_num_threads()
    chosen = {size: backend.choose(lenet(), batches(1)[0][0], size) for size in (4, 512)}
    assert (chosen[4].threads, chosen[4].onednn) == (1, False)
    assert (chosen[512].threads, chosen[512].onednn) == (threads, torch.backends.mkldnn.is_available())


def test_onednn_has_the_channels_last_from_16_images_on() -> None:
    def chosen(model: nn.Module, size: int, **settings: Any) -> bool:
        return backend.choose(model, batches(1)[0][0], size, **settings).channels_last

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
    for name in ("fmexp.models.LeNet", "test_fast.Viewing"):
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


def test_normalising_a_batch_gives_the_bits_of_normalising_everything() -> None:
    data = datasets.synthetic(64, 10, 28, 0)
    assert isinstance(data.train, datasets.Split)
    everything = data.train.images.float().div(255).sub(0.5).div(0.5)
    order = torch.randperm(64)
    for chosen in order.split(7):
        assert torch.equal(data.take(data.train, chosen)[0], everything[chosen])


@pytest.mark.parametrize("size", [28, 17])  # 17 x 17 pixels end in the midst of 64 bytes
@pytest.mark.parametrize("batch_size", [3, 4, 600])
def test_batches_are_the_same_and_as_aligned_wherever_one_begins(size: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1300, 1, size, size), generator=generator, dtype=torch.uint8)
    data = datasets.Dataset(
        datasets.Split(images, torch.arange(1300)), datasets.Split(images, torch.arange(1300)), "ab"
    )
    order = datasets.order(0, 0, 1300)
    for begin in (0, 5 * batch_size):
        expected = list(order[begin:].split(batch_size))
        made = list(datasets.batches(data, data.train, order[begin:], batch_size, device=torch.device("cpu")))
        assert len(made) == len(expected)
        for (pixels, labels), chosen in zip(made, expected, strict=True):
            assert torch.equal(labels, chosen)
            assert torch.equal(pixels, data.normalise(images[chosen]))
            assert pixels.data_ptr() % 64 == 0
            assert pixels.is_contiguous()
        shared = len(made) - len({pixels.untyped_storage().data_ptr() for pixels, _ in made})
        assert (shared > 0) == (size == 28 and batch_size < 600), "made together"


class Shifts(models.LeNet):
    """Changes its input in place, by something that is trained."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x += self.shift
        return super().forward(x)


def test_a_model_may_change_its_input_in_place(tmp_path: Path) -> None:
    execute(small(*LIGHT, "model._target_=test_fast.Shifts"), tmp_path)
    assert weights(tmp_path)["shift"] != 0


def test_a_reused_figure_draws_the_pixels_of_a_fresh_one(run_small: Callable[..., Any]) -> None:
    predictions._blank.cache_clear()
    only = [f"stage.{name}.enabled=false" for name in small().stage if name != "predictions"]
    _, reused = run_small(*only, name="reused")  # 4 figures, of which the first one is fresh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "_blank", predictions._blank.__wrapped__)
        _, fresh = run_small(*only, name="fresh")
    tag = "view/predictions"
    pictures = [image.encoded_image_string for image in reused.Images(tag)]
    assert len(pictures) == 4
    assert pictures == [image.encoded_image_string for image in fresh.Images(tag)]
    assert len(set(pictures)) == 4


# What is imported


def test_a_run_imports_neither_dynamo_nor_torchvision_nor_pyplot(tmp_path: Path) -> None:
    overrides = ["dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "device=cpu",
                 "train.log_every=4", "train.checkpoint_every=4"]  # fmt: skip
    program = (
        f"import sys; from fmexp import compose, execute; execute(compose({overrides}), {str(tmp_path / 'run')!r});"
        "print([name for name in ('torch._dynamo', 'torchvision', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["failures"] == {}


# Compiling


def test_auto_compiles_only_where_many_small_batches_are_to_come() -> None:
    images = batches(1)[0][0]

    def compiled(size: int, steps: int, setting: bool | str = "auto") -> bool:
        return backend.choose(lenet(), images, size, compiled=setting, steps=steps).compiled

    assert not compiled(4, backend.MANY_BATCHES - 1)
    assert compiled(4, backend.MANY_BATCHES)
    assert not compiled(512, backend.MANY_BATCHES)
    assert compiled(512, 1, True)
    assert not compiled(4, backend.MANY_BATCHES, False)


@pytest.mark.parametrize("value", ["sometimes", "3"])
def test_compile_takes_auto_true_and_false_alone(value: str) -> None:
    with pytest.raises(ConfigError, match=f"train.compile={value} must be one of auto, true, false"):
        config.check(small(f"train.compile={value}"))


class Unwilling(models.LeNet):
    """A model that breaks under torch.compile, after it has counted and drawn."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if torch.compiler.is_compiling():
            torch.rand(1)
            raise RuntimeError("not with me")
        return super().forward(x)


def test_a_model_that_breaks_under_the_compiler_is_trained_without(tmp_path: Path) -> None:
    for value in ("true", "false"):
        execute(small(*LIGHT, "model._target_=test_fast.Unwilling", f"train.compile={value}"), tmp_path / value)
    assert_same_weights(tmp_path / "true", tmp_path / "false")
    (line,) = [line for line in (tmp_path / "true" / "fmexp.log").read_text().splitlines() if "[WARNING]" in line]
    assert "cannot be compiled" in line
    assert not json.loads((tmp_path / "true" / "result.json").read_text())["backend"]["compiled"]


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_is_close_to_a_plain_one_and_resumes_to_the_bit(tmp_path: Path) -> None:
    # 16 batches an epoch and one of 2 images, dropout, and a stop in the second epoch
    settings = ("model=mlp", "model.dropout=0.3", "optimizer=adam", "dataset.train_size=66", "train.epochs=2")
    compiled = (*settings, "train.compile=true", "train.checkpoint_every=1")
    execute(small(*compiled), tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["backend"]["compiled"]
    execute(small(*compiled, *LIGHT), tmp_path / "light")
    assert_same_weights(tmp_path / "whole", tmp_path / "light")  # stages disturb nothing
    interrupt(small(*compiled), tmp_path / "resumed", 20)
    torch._dynamo.reset()
    execute(small(*compiled), tmp_path / "resumed")
    assert "going on from the checkpoint at step 20" in (tmp_path / "resumed" / "fmexp.log").read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    plain = (*LIGHT, "train.log_every=1", "dataset.train_size=66")
    for value in ("true", "false"):
        execute(small(*plain, f"train.compile={value}"), tmp_path / f"lenet {value}")
    curves = [scalars(read_events(tmp_path / f"lenet {value}"), "train/loss") for value in ("true", "false")]
    assert len(curves[0]) == 17
    assert np.array(curves[0]) == pytest.approx(np.array(curves[1]), abs=1e-4)
