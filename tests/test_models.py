"""Models: sized from the images, logits for any data, and an error that names the sizes where an image is too small."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import timm as timm_library
import torch
from hydra.utils import instantiate
from tools import small
from torch import nn
from torchvision import models as tv_models

from fmexp import compose, execute
from fmexp.config import conf_dir
from fmexp.datasets import Dataset, Split
from fmexp.errors import ConfigError
from fmexp.models import MLP, ConvNet, LeNet, resnet18, timm, torchvision, unlike_pretraining

NAMES = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
GREY, COLOUR = (1, 28, 28), (3, 32, 32)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_lenet_is_the_tutorials() -> None:
    model = LeNet(input_shape=GREY, num_classes=10)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        "conv1.weight": (6, 1, 5, 5),
        "conv1.bias": (6,),
        "conv2.weight": (16, 6, 5, 5),
        "conv2.bias": (16,),
        "fc1.weight": (120, 16 * 4 * 4),
        "fc1.bias": (120,),
        "fc2.weight": (84, 120),
        "fc2.bias": (84,),
        "fc3.weight": (10, 84),
        "fc3.bias": (10,),
    }
    assert parameters(model) == 44_426


def test_lenet_computes_what_the_tutorials_layers_compute() -> None:
    torch.manual_seed(0)
    model, images = LeNet(input_shape=GREY, num_classes=10), torch.randn(3, *GREY)
    layers = nn.Sequential(
        model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), model.fc3,
    )  # fmt: skip
    assert torch.equal(model(images), layers(images))


def test_lenet_is_sized_from_the_images() -> None:
    model = LeNet(input_shape=COLOUR, num_classes=100)
    assert model.conv1.in_channels == 3
    assert model.fc1.in_features == 16 * 5 * 5
    assert model.fc3.out_features == 100
    wide = LeNet(input_shape=(2, 16, 40), num_classes=4)
    assert wide.fc1.in_features == 16 * 1 * 7
    assert wide(torch.zeros(5, 2, 16, 40)).shape == (5, 4)


def test_mlp_has_the_layers_asked_for() -> None:
    model = MLP(input_shape=(3, 4, 5), num_classes=7, hidden=[11, 13], dropout=0.25)
    linear = [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)]
    assert linear == [(60, 11), (11, 13), (13, 7)]
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.25, 0.25]
    assert isinstance(model[-1], nn.Linear)  # logits: neither cut off by ReLU nor dropped out
    plain = MLP(input_shape=(3, 4, 5), num_classes=7, hidden=[])
    assert [type(layer) for layer in plain] == [nn.Flatten, nn.Linear]


def test_convnet_has_two_convolutions_a_stage_and_halves_the_image_between() -> None:
    model = ConvNet(input_shape=(3, 28, 20), num_classes=7, widths=[4, 6])
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [(3, 4), (4, 4), (4, 6), (6, 6)]
    assert [name for name, _ in model.named_children()] == ["stage1", "stage2", "head"]
    images = torch.randn(2, 3, 28, 20)
    features = model.get_submodule("stage2")(model.get_submodule("stage1")(images))
    assert features.shape == (2, 6, 14, 10)
    assert features.min() == 0  # a ReLU is last
    head = model.get_submodule("head.2")
    assert torch.allclose(model(images), head(features.mean((2, 3))), atol=1e-6)


def test_convnet_takes_images_of_any_size() -> None:
    model = ConvNet(input_shape=(1, 1, 3), num_classes=4, widths=[2, 2, 2]).eval()
    assert model(torch.zeros(5, 1, 1, 3)).shape == (5, 4)


def test_convnet_does_the_work_that_its_yaml_says() -> None:
    model, work = ConvNet(input_shape=GREY, num_classes=10).eval(), 0

    def count(layer: nn.Module, _: object, outputs: torch.Tensor) -> None:
        nonlocal work
        work += outputs.numel() * layer.get_parameter("weight")[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model(torch.zeros(1, *GREY))
    said = re.search(r"([\d.]+) million weights, (\d+) million mult", (conf_dir() / "model/convnet.yaml").read_text())
    assert said
    assert (round(parameters(model) / 1e6, 1), round(work / 1e6)) == (float(said[1]), int(said[2]))


def test_resnet18_takes_the_images_channels() -> None:
    for channels in (1, 3, 4):
        model = resnet18(input_shape=(channels, 32, 32), num_classes=6)
        conv1 = model.get_submodule("conv1")
        assert isinstance(conv1, nn.Conv2d)
        assert conv1.weight.shape == (64, channels, 7, 7)
        assert (conv1.stride, conv1.padding, conv1.bias) == ((2, 2), (3, 3), None)
        assert model.get_parameter("fc.weight").shape == (6, 512)
    assert parameters(resnet18(input_shape=(3, 224, 224), num_classes=1000)) == 11_689_512  # torchvision's own number


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "classes"), [(GREY, 10), (COLOUR, 10), (COLOUR, 17)])
def test_every_model_gives_logits_for_any_data(name: str, shape: tuple[int, int, int], classes: int) -> None:
    torch.manual_seed(0)
    cfg = compose([f"model={name}"]).model
    model = instantiate(cfg, input_shape=shape, num_classes=classes, _convert_="all").eval()
    with torch.no_grad():
        logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert (logits.sum(1) - 1).abs().max() > 1e-3  # no softmax yet
    assert logits.min() < 0  # nor a ReLU


@pytest.mark.parametrize(("height", "width"), [(15, 28), (28, 15), (8, 8)])
def test_an_image_too_small_for_lenet_is_named(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"at least 16x16 pixels, not {height}x{width}"):
        LeNet(input_shape=(1, height, width), num_classes=10)
    assert LeNet(input_shape=(1, 16, 16), num_classes=10)(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_a_run_on_images_too_small_says_so_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\._target_=fmexp\.models\.LeNet .*at least 16x16 pixels, not 12x12"):
        execute(small("dataset.image_size=12"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Models of torchvision and timm, by their names

BY_NAME = {"torchvision": torchvision, "timm": timm}
SMALLEST = {"torchvision": "mobilenet_v3_small", "timm": "test_resnet"}


@pytest.mark.parametrize(
    ("library", "name", "shape"),
    [
        ("torchvision", "squeezenet1_1", (1, 32, 32)),
        ("torchvision", "shufflenet_v2_x0_5", (4, 33, 40)),
        ("torchvision", "vit_b_32", (1, 64, 64)),
        ("torchvision", "googlenet", (1, 32, 32)),
        ("timm", "vit_tiny_patch16_224", (1, 32, 48)),
        ("timm", "test_efficientnet.r160_in1k", (2, 28, 28)),
    ],
)
def test_a_model_by_its_name_takes_the_images(library: str, name: str, shape: tuple[int, int, int]) -> None:
    model = BY_NAME[library](input_shape=shape, num_classes=7, name=name)
    for mode in (True, False):
        assert model.train(mode)(torch.randn(4, *shape)).shape == (4, 7)


@pytest.mark.parametrize("library", BY_NAME)
def test_the_stem_of_a_resnet_keeps_the_resolution_of_small_images(library: str) -> None:
    for size, expected in ((63, 63), (64, 16)):
        model = BY_NAME[library](input_shape=(1, size, size), num_classes=3, name="resnet18")
        features: list[torch.Size] = []
        model.get_submodule("layer1").register_forward_hook(lambda *args, kept=features: kept.append(args[-1].shape))
        model.eval()(torch.zeros(1, 1, size, size))
        assert features[0][2:] == (expected, expected)


def test_dropout_reaches_timm() -> None:
    model = timm(input_shape=(1, 32, 32), num_classes=3, name="test_vit", drop_rate=0.3, drop_path_rate=0.2)
    rates = {getattr(module, "p", 0) or getattr(module, "drop_prob", 0) for module in model.modules()}
    assert {0.3, 0.2} <= {round(float(rate), 6) for rate in rates}


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """Weights for 1000 classes and colours, of each library, as if they had been downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = tv_models.get_model_weights(SMALLEST["torchvision"]).DEFAULT.url
    states = {
        "torchvision": tv_models.get_model(SMALLEST["torchvision"]).state_dict(),
        "timm": timm_library.create_model(SMALLEST["timm"]).state_dict(),
    }
    torch.save(states["torchvision"], tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(states["timm"]))
    return states


@pytest.mark.parametrize("library", BY_NAME)
@pytest.mark.parametrize(("channels", "classes"), [(3, 1000), (1, 10), (4, 1000)])
def test_pretrained_weights_are_adapted(
    library: str, channels: int, classes: int, downloaded: dict[str, dict[str, torch.Tensor]]
) -> None:
    shape = (channels, 32, 32)
    model = BY_NAME[library](input_shape=shape, num_classes=classes, name=SMALLEST[library], pretrained=True)
    trained, state = downloaded[library], model.state_dict()
    first = next(name for name, value in trained.items() if value.dim() == 4)
    head = {"torchvision": "classifier.3", "timm": "fc"}[library]
    expected = ({first} if channels != 3 else set()) | (
        {f"{head}.weight", f"{head}.bias"} if classes != 1000 else set()
    )
    assert {name for name, value in state.items() if not torch.equal(value, trained[name])} == expected
    given = {1: trained[first].sum(1, keepdim=True), 3: trained[first], 4: trained[first][:, [0, 1, 2, 0]] * 0.75}
    assert torch.allclose(state[first], given[channels])


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("torchvision", "mean [0.449] where the dataset has [0.5], std [0.226] where the dataset has [0.5], image_size "
         '[224, 224] where the dataset has [28, 28]; type "dataset.image_size=224"'),
        ("timm", 'image_size [160, 160] where the dataset has [28, 28]; type "dataset.image_size=160"'),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("downloaded")
def test_data_that_do_not_suit_pretrained_weights_are_said(library: str, said: str, tmp_path: Path) -> None:
    chosen = (f"model={library}", f"model.name={SMALLEST[library]}", "model.pretrained=true")
    execute(small("logging=light", "train.max_steps=1", *chosen), tmp_path)
    assert f"the pretrained weights expect {said}\n" in (tmp_path / "fmexp.log").read_text()


def test_what_pretrained_weights_expect_is_compared_channel_by_channel() -> None:
    photo = Split(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    data, model = Dataset(photo, photo, ["a"], mean=(0.4, 0.5, 0.6), std=(0.5,)), nn.Identity()
    assert unlike_pretraining(model, data, ()) == ""
    cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.5, 0.5, 0.5), "input_size": (3, 8, 8)}
    model.pretrained_cfg = cfg
    assert unlike_pretraining(model, data, ("mean", "std")) == ""
    said = unlike_pretraining(model, dataclasses.replace(data, mean=(0.5,)), ("mean", "std"))
    assert said.endswith('where the dataset has [0.5, 0.5, 0.5]; type "dataset.mean=[0.4,0.5,0.6]"')


@pytest.mark.parametrize("library", BY_NAME)
def test_weights_that_cannot_be_downloaded_are_said(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ConfigError, match=r"pretrained=true: .* cannot be had: no network here\n.* weights=<file>"):
        BY_NAME[library](input_shape=GREY, num_classes=10, name=SMALLEST[library], pretrained=True)


def test_a_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="model=timm needs timm: pip install timm"):
        timm(input_shape=GREY, num_classes=10, name="resnet18")


class Fixed(nn.Module):
    """A model for 784 pixels and 10 classes, whatever it is told."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1))  # type: ignore[no-any-return]


class Headless(Fixed):
    """Returns the features in place of logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model._target_=test_models.Fixed", "dataset.image_size=20"], "cannot take the images.*1x20x20.*10 classes"),
        (["model._target_=test_models.Headless"], r"returns \(2, 784\) for 2 images where logits \(2, 10\).*1x28x28"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_named_with_the_sizes(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        execute(small(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
