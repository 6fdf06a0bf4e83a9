"""Models: sized from the images, logits for any data, and an error that names the sizes where an image is too small."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from tools import small
from torch import nn

from fmexp import compose, execute
from fmexp.config import conf_dir
from fmexp.errors import ConfigError
from fmexp.models import MLP, LeNet, resnet18

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
