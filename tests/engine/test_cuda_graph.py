"""The training step as a graph: with recorder.CpuGraph in place of CUDA's, on an empty CUDA device, and on a real one.

Whatever is captured must end with the bits of the plain step, or not be captured.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra.utils
import pytest
import torch
import torch.nn.functional as F
from recorder import CpuGraph
from tools import assert_same_weights, interrupt, read_events, scalars, small, weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmexp import compose, datasets, execute, models, trainer
from fmexp.datasets import dataset
from fmexp.engine import cuda_graph, optim, step
from fmexp.run import Run

LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false")
MLP = ("model=mlp", "model.dropout=0.3", "optimizer=adam")


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CpuGraph]:
    """Let the runs from here on be captured by the graph that this returns, or by a given one (None: by none)."""

    def use(given: CpuGraph | None = None) -> CpuGraph | None:
        monkeypatch.setattr(trainer, "find_recorder", lambda run: given)
        return given

    return use


@pytest.fixture
def both(tmp_path: Path, graph: Callable[..., Any]) -> Callable[..., CpuGraph]:
    """Execute a run plainly and by a graph, into the folders plain and graph, which must hold the same weights."""

    def execute_both(*overrides: str, recorder: CpuGraph | None = None) -> CpuGraph:
        recorder = recorder or CpuGraph()
        for name, given in (("plain", None), ("graph", recorder)):
            graph(given)
            execute(small(*overrides), tmp_path / name)
        assert_same_weights(tmp_path / "plain", tmp_path / "graph")
        return recorder

    return execute_both


def lines(folder: Path, level: str) -> list[str]:
    """What the capture said in a run's log at a level."""
    return [
        line
        for line in (folder / "fmexp.log").read_text().splitlines()
        if f"[fmexp.engine.cuda_graph][{level}]" in line
    ]


# Captured


@pytest.mark.parametrize(
    "settings",
    [
        (),
        MLP,
        ("model=mlp", "optimizer=rmsprop", "optimizer.momentum=0.5"),
        ("model=mlp", "optimizer=adamw", "optimizer.weight_decay=0.1"),
        ("model._target_=test_cuda_graph.Normed", "train.batch_size=8"),
        ("model=mlp", "augment=chain", "augment.order=[crop_flip,mixup]"),  # labels are probabilities
    ],
)
def test_a_captured_run_is_the_plain_one_to_the_bit(
    both: Callable[..., CpuGraph], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    recorder = both(*settings, "dataset.train_size=66", "train.epochs=2", "train.log_every=3")
    ran = [read_events(tmp_path / name) for name in ("plain", "graph")]
    for tag in ("train/loss", "test/loss", "test/accuracy"):
        assert scalars(ran[0], tag) == scalars(ran[1], tag)
    figures = [[image.encoded_image_string for image in one.Images("view/predictions")] for one in ran]
    assert figures[0] == figures[1], "run.batch is the batch"
    whole = 66 // small(*settings).train.batch_size * 2
    assert (recorder.recorded, recorder.replays) == (1, whole - cuda_graph.WARM_UP)
    assert lines(tmp_path / "graph", "INFO") != []
    assert lines(tmp_path / "graph", "WARNING") == []


def test_labels_that_are_probabilities_in_some_batches_alone(both: Callable[..., CpuGraph], tmp_path: Path) -> None:
    """Ten images of ten classes, for numbers [10] would be copied into probabilities [10, 10] without a word."""
    recorder = both(*MLP, "augment._target_=test_cuda_graph.mix_often", "train.batch_size=10", "train.epochs=9")
    ran = [read_events(tmp_path / name) for name in ("plain", "graph")]
    assert scalars(ran[0], "train/loss") == scalars(ran[1], "train/loss")
    assert 0 < recorder.replays < 54 - cuda_graph.WARM_UP


def mix_often(images: Tensor, labels: Tensor, generator: torch.Generator, *, num_classes: int) -> tuple[Tensor, Tensor]:
    if torch.rand((), generator=generator) < 0.5:
        return images, labels
    return datasets.augment.mixup(images, labels, generator, alpha=1.0, num_classes=num_classes)


class Normed(nn.Sequential):
    """With statistics of batches, which are buffers, and random numbers."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        size = input_shape[0] * input_shape[1] * input_shape[2]
        parts = nn.Linear(size, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_classes)
        super().__init__(nn.Flatten(), *parts)


@pytest.mark.parametrize("stop", [2, 5, 20])
def test_a_captured_run_resumes_to_the_bit(graph: Callable[..., CpuGraph], tmp_path: Path, stop: int) -> None:
    settings = (*LIGHT, *MLP, "dataset.train_size=66", "train.epochs=2", "train.checkpoint_every=1")
    graph(CpuGraph())
    execute(small(*settings), tmp_path / "whole")
    interrupt(small(*settings), tmp_path / "resumed", stop)
    recorder = graph(CpuGraph())
    execute(small(*settings), tmp_path / "resumed")
    assert f"going on from the checkpoint at step {stop}" in (tmp_path / "resumed" / "fmexp.log").read_text()
    assert recorder.replays > 0
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_a_replay_gives_stages_the_last_update_of_a_plain_step(both: Callable[..., CpuGraph], tmp_path: Path) -> None:
    """Also after the last batch of an epoch, which is smaller and taken plainly."""
    on = ("stage.learning.enabled=true", "train.clip_grad=0.5")
    recorder = both(*LIGHT, *MLP, *on, "dataset.train_size=66", "train.epochs=2", "train.log_every=1")
    assert (recorder.recorded, recorder.replays) == (1, 32 - cuda_graph.WARM_UP)
    ran = [read_events(tmp_path / name) for name in ("plain", "graph")]
    tags = [tag for tag in ran[0].Tags()["scalars"] if tag.startswith("weights_")]
    assert len(tags) == 9
    for tag in tags:
        assert len({value for _, value in scalars(ran[0], tag)}) > 30
        assert scalars(ran[0], tag) == scalars(ran[1], tag), tag


def test_what_a_stage_may_keep_of_a_batch_is_not_overwritten(graph: Callable[..., CpuGraph], tmp_path: Path) -> None:
    graph(CpuGraph())
    kept.clear()
    execute(small(*LIGHT, "train.log_every=1", "+stage.keep={_target_:test_cuda_graph.keep,when:log}"), tmp_path)
    assert len(kept) == 16
    for images, labels, copies in kept:
        assert torch.equal(images, copies[0])
        assert torch.equal(labels, copies[1])


kept: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]] = []


def keep(run: Run) -> None:
    images, labels = run.batch
    kept.append((images, labels, (images.clone(), labels.clone())))


# Captured again


def halve(run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] /= 2


def freeze(run: Run) -> None:
    next(run.model.parameters()).requires_grad_(requires_grad=False)


def forget(run: Run) -> None:
    run.optimizer.state.clear()


def replace(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("change", ["halve", "freeze", "forget", "replace", "loosen"])
def test_what_a_stage_changes_is_captured_again(both: Callable[..., CpuGraph], tmp_path: Path, change: str) -> None:
    stage = f"+stage.change={{_target_:test_cuda_graph.{change},when:log,changes:true}}"
    recorder = both(*LIGHT, *MLP, stage, "train.log_every=16", "train.epochs=2")
    assert recorder.recorded == 2
    assert len(lines(tmp_path / "graph", "INFO")) == 2


class Cached(Normed):
    """Keeps a tensor that is not a buffer, and makes it again for another size of batch."""

    cache = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None or len(self.cache) != len(x):
            self.cache = torch.linspace(0.5, 1, len(x), device=x.device)[:, None, None, None]
        return super().forward(x * self.cache)


def test_a_tensor_that_another_batch_size_replaces_is_captured_again(both: Callable[..., CpuGraph]) -> None:
    recorder = both(*LIGHT, "model._target_=test_cuda_graph.Cached", "dataset.train_size=66", "train.epochs=3")
    assert recorder.recorded == 3  # the evaluation after each epoch has another one


class Averages(Normed):
    """Keeps a mean that is not a buffer, in place; it is looked at in the evaluation."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mean = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.to(x.device)
        if self.training:
            self.mean.mul_(0.5).add_(x.detach().mean())
            return super().forward(x)
        return super().forward(x + self.mean)


def test_a_tensor_that_is_neither_parameter_nor_buffer_goes_on_too(
    both: Callable[..., CpuGraph], tmp_path: Path
) -> None:
    assert both("model._target_=test_cuda_graph.Averages", "train.epochs=2").replays == 32 - cuda_graph.WARM_UP
    losses = [scalars(read_events(tmp_path / name), "test/loss") for name in ("plain", "graph")]
    assert losses[0] == losses[1]


def test_a_setting_that_changes_once_an_epoch_is_captured_each_time(both: Callable[..., CpuGraph]) -> None:
    stage = "+stage.change={_target_:test_cuda_graph.halve,when:epoch,changes:true}"
    assert both(*LIGHT, stage, "train.epochs=6").recorded == 6


def test_a_setting_that_changes_all_the_time_is_captured_ever_more_rarely(both: Callable[..., CpuGraph]) -> None:
    stage = "+stage.change={_target_:test_cuda_graph.halve,when:log,changes:true}"
    recorder = both(*LIGHT, stage, "train.log_every=1", "train.epochs=4")
    # 64 steps: a capture after 3 plain ones, and after 6, 12 and 24 more, each used for none
    assert recorder.recorded == 4


def loosen(run: Run) -> None:
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.6


def spy(run: Run) -> None:
    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        spied.append(module.training)

    layer = next(run.model.children())
    if not layer._forward_hooks:
        layer.register_forward_hook(note)


spied: list[bool] = []


def test_a_hook_that_a_stage_adds_is_called_at_every_step_from_then_on(
    graph: Callable[..., CpuGraph], tmp_path: Path
) -> None:
    for name, given in (("plain", None), ("graph", CpuGraph())):
        graph(given)
        spied.clear()
        stage = "+stage.spy={_target_:test_cuda_graph.spy,when:log}"
        execute(small(*LIGHT, stage, "train.log_every=8", "train.epochs=2"), tmp_path / name)
        assert spied.count(True) == 32 - 8, name
    assert len(lines(tmp_path / "graph", "INFO")) == 1
    (line,) = lines(tmp_path / "graph", "WARNING")
    assert line.endswith("the model has hooks")
    assert_same_weights(tmp_path / "plain", tmp_path / "graph")


# Not captured


PYTHON = "it changes what Python keeps, or draws random numbers there"


class Reads(models.LeNet):
    """Decides by a value of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if self.training and x.mean().item() > -0.5 else x)


class Counts(models.LeNet):
    """Decides by a number of Python."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x * (1 + self.calls / 10))


class Lists(Counts):
    """The same within a list."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += self.training
        return models.LeNet.forward(self, x * (1 + self.seen[0] / 10))


class Rebinds(Counts):
    """The same with a tensor that is another one after each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mean = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return models.LeNet.forward(self, x + self.mean)


class OwnDraws(Counts):
    """Decides by random numbers of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.random = random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        return models.LeNet.forward(self, -x if self.training and self.random.random() < 0.5 else x)


class Draws(models.LeNet):
    """Decides by a random number of Python."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + random.random()) if self.training else x)


class Hooked(models.LeNet):
    """Has a hook, which is Python."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fc1.register_forward_hook(lambda module, inputs, output: output * 0.5)


class PythonAdam(torch.optim.Optimizer):
    """Keeps its count of steps in Python, as many optimizers of papers do."""

    def __init__(self, params: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                parameter.sub_(parameter.grad, alpha=group["lr"] / state["step"])


class Counting(torch.optim.SGD):
    """Decides by a number of its own, as Lookahead does."""

    def __init__(self, params: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps % 3:
            step.inspect.unwrap(torch.optim.SGD.step)(self)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("model._target_=test_cuda_graph.Reads",), "operation not permitted when stream is capturing"),
        (("model._target_=test_cuda_graph.Counts",), PYTHON),
        (("model._target_=test_cuda_graph.Lists",), PYTHON),
        (("model._target_=test_cuda_graph.Rebinds",), PYTHON),
        (("model._target_=test_cuda_graph.OwnDraws",), PYTHON),
        (("optimizer=custom", "optimizer._target_=test_cuda_graph.Counting"), PYTHON),
        (("model._target_=test_cuda_graph.Draws",), PYTHON),
        (("model._target_=test_cuda_graph.Hooked",), "the optimizer or the model has hooks"),
        (("optimizer=custom", "optimizer._target_=test_cuda_graph.PythonAdam"), PYTHON),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_trained_plainly_and_that_is_said(
    both: Callable[..., CpuGraph], tmp_path: Path, settings: tuple[str, ...], reason: str
) -> None:
    recorder = both(*LIGHT, *settings)
    assert recorder.replays == 0
    (line,) = lines(tmp_path / "graph", "WARNING")
    assert line.endswith(f"the training step cannot be a CUDA graph and is taken kernel by kernel: {reason}")


class Endless(models.LeNet):
    """Keeps a list that holds itself, of which no copy can be made here."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.endless: list[Any] = []
        self.endless.append(self.endless)


def test_a_model_that_cannot_be_looked_through_is_trained_plainly(
    both: Callable[..., CpuGraph], tmp_path: Path
) -> None:
    assert both(*LIGHT, "model._target_=test_cuda_graph.Endless").recorded == 0
    (line,) = lines(tmp_path / "graph", "WARNING")
    assert "maximum recursion depth" in line


def obscure(run: Run) -> None:
    run.model.endless = [lambda: None, (part for part in ())]


def test_what_a_stage_adds_and_cannot_be_compared_is_trained_plainly_from_then_on(
    both: Callable[..., CpuGraph], tmp_path: Path
) -> None:
    stage = "+stage.obscure={_target_:test_cuda_graph.obscure,when:log}"
    assert both(*LIGHT, stage, "train.log_every=8", "train.epochs=2").recorded == 1
    (line,) = lines(tmp_path / "graph", "WARNING")
    assert "cannot pickle 'generator' object" in line


@pytest.mark.parametrize("missing", ["first", "last"])
def test_a_graph_that_does_not_do_what_the_step_does_is_not_used(
    both: Callable[..., CpuGraph], tmp_path: Path, missing: str
) -> None:
    class Incomplete(CpuGraph):
        def replay(self) -> None:
            updates = [place for place, (func, *_) in enumerate(self.operations) if "fused" in str(func)]
            del self.operations[updates[-1] if missing == "last" else 0]
            super().replay()

    recorder = both(*LIGHT, "optimizer=adam", recorder=Incomplete())
    assert recorder.replays == 1
    (line,) = lines(tmp_path / "graph", "WARNING")
    assert line.endswith("a replay does not give the bits of the plain step")


# Where


@pytest.mark.parametrize(
    ("device", "setting", "in_memory", "used"),
    [
        ("cuda", "auto", True, True),
        ("cuda:1", "true", True, True),
        ("cuda", "false", True, False),
        ("cuda", "auto", False, False),
        ("cpu", "auto", True, False),
        ("mps", "auto", True, False),
    ],
)
def test_a_graph_is_for_cuda_with_its_data_there_and_compile_not_false(
    monkeypatch: pytest.MonkeyPatch, device: str, setting: str, in_memory: bool, used: bool
) -> None:
    monkeypatch.setattr(trainer, "CudaRecorder", lambda where: ("graph", where))
    data = datasets.synthetic(4, 4)
    split = data.train if in_memory else torch.utils.data.TensorDataset(torch.zeros(4, 1, 28, 28), torch.zeros(4))
    run: Any = SimpleNamespace(
        device=torch.device(device),
        dataset=SimpleNamespace(train=split),
        cfg=small(f"train.compile={setting}"),
        world=None,
    )
    assert trainer.find_recorder(run) == (("graph", torch.device(device)) if used else None)


class Elsewhere(TorchDispatchMode):
    """Notes every operation that touches another place than the CUDA device: none of them can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        without_shapes = func is torch.ops.aten._fused_sgd_.default  # changes in place; torch cannot do it on nothing
        result = None if without_shapes else func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("model", ["lenet", "mlp", "resnet18"])
def test_the_step_of_every_model_and_optimizer_stays_on_a_cuda_device(model: str, optimizer: str) -> None:
    """With tensors that are on CUDA and hold nothing: torch checks devices and shapes. It has no backward there."""
    cfg = compose([f"model={model}", f"optimizer={optimizer}"])
    dataset._per_channel.cache_clear()
    try:
        with FakeTensorMode(), torch.device("cuda"):
            net = hydra.utils.instantiate(cfg.model, input_shape=(3, 32, 32), num_classes=10)
            split = datasets.Split(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
            data = datasets.Dataset(split, split, ["class"] * 10, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
            with Elsewhere():  # its first steps are on numbers of its own
                chosen, update = torch.arange(4), optim.build_optimizer(cfg.optimizer, net)
            for _ in range(2):  # in the first one constants are copied there
                with Elsewhere() as elsewhere:
                    images, labels = data.take(split, chosen)
                    loss = F.cross_entropy(net(images), labels)
                    for parameter in net.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                    with torch.no_grad():
                        step.update(update)
            assert loss.device.type == "cuda"
            assert elsewhere.seen == []
            assert update.state
            groups = update.param_groups
            assert all(group.get("fused") or group.get("capturable") for group in groups)
            assert all(group.get("capturable", True) for group in groups), "else torch refuses the capture"
    finally:
        dataset._per_channel.cache_clear()


def test_a_checkpoint_of_another_device_takes_this_ones_form_of_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RMSprop on CUDA is capturable, and on the CPU must not be."""
    settings = (*LIGHT, "optimizer=rmsprop", "train.checkpoint_every=1")
    execute(small(*settings), tmp_path / "whole")
    with monkeypatch.context() as patch:
        original = torch.optim.RMSprop.state_dict

        def state_dict(self: torch.optim.Optimizer) -> dict[str, Any]:
            state: dict[str, Any] = original(self)
            return {**state, "param_groups": [{**group, "capturable": True} for group in state["param_groups"]]}

        patch.setattr(torch.optim.RMSprop, "state_dict", state_dict)
        interrupt(small(*settings), tmp_path / "resumed", 5)
    execute(small(*settings), tmp_path / "resumed")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


# On CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("model", ["lenet", "mlp", "resnet18"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_on_cuda_a_captured_run_is_the_plain_one_to_the_bit(tmp_path: Path, model: str, optimizer: str) -> None:
    settings = ("device=cuda", f"model={model}", f"optimizer={optimizer}", "dataset.train_size=66", "train.epochs=2")
    for name, value in (("plain", "false"), ("graph", "auto")):
        execute(small(*settings, f"train.compile={value}"), tmp_path / name)
    assert len(lines(tmp_path / "graph", "INFO")) == 1
    assert_same_weights(tmp_path / "plain", tmp_path / "graph")
    assert all(tensor.device.type == "cpu" for tensor in weights(tmp_path / "graph").values())
    assert json.loads((tmp_path / "graph" / "result.json").read_text())["failures"] == {}


@needs_cuda
def test_on_cuda_a_captured_run_resumes_to_the_bit(tmp_path: Path) -> None:
    settings = (*LIGHT, *MLP, "device=cuda", "train.epochs=2", "train.checkpoint_every=1")
    execute(small(*settings), tmp_path / "whole")
    interrupt(small(*settings), tmp_path / "resumed", 20)
    execute(small(*settings), tmp_path / "resumed")
    assert [len(lines(tmp_path / name, "INFO")) for name in ("whole", "resumed")] == [1, 2]
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


@needs_cuda
@pytest.mark.parametrize("model", ["Reads", "Counts", "Cached", "Averages"])
def test_on_cuda_what_is_captured_again_or_refused_is_the_plain_run_too(tmp_path: Path, model: str) -> None:
    settings = (*LIGHT, "device=cuda", f"model._target_=test_cuda_graph.{model}", "train.epochs=2")
    for name, value in (("plain", "false"), ("graph", "auto")):
        execute(small(*settings, "dataset.train_size=66", f"train.compile={value}"), tmp_path / name)
    assert_same_weights(tmp_path / "plain", tmp_path / "graph")


@needs_cuda
def test_on_cuda_images_are_normalised_to_the_bits_of_the_cpu() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    split = datasets.Split(images, torch.zeros(2, dtype=torch.int64))
    for mean, std in (((0.5,), (0.5,)), ((0.1307,), (0.3081,)), ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))):
        data = datasets.Dataset(split, split, ["a", "b"], mean, std)
        assert torch.equal(data.normalise(images.cuda()).cpu(), data.normalise(images))
