"""The models that YAML can name: f(*, input_shape=(channels, height, width), num_classes, ...) -> nn.Module.

Each takes float32 [B, C, H, W] and returns logits [B, num_classes].
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import ceil, prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fmexp.datasets import Dataset
from fmexp.errors import ConfigError, did_you_mean, first_line, similar

SMALL_IMAGE = 64  # pixels; from smaller ones the stem of a ResNet leaves next to nothing


class LeNet(nn.Module):
    """The tutorial's network: two 5x5 convolutions, each with 2x2 max-pooling, then three linear layers.

    Raises:
        ValueError: an image is smaller than 16x16, so that nothing is left after the second pooling.
    """

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, *size = input_shape
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        if min(height, width) < 1:
            raise ValueError(f"LeNet needs images of at least 16x16 pixels, not {size[0]}x{size[1]}")
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


class MLP(nn.Sequential):
    """Linear layers of the `hidden` sizes with ReLU (and dropout, a probability in [0, 1)) on the flattened image."""

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        sizes = [prod(input_shape), *hidden]
        for before, after in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(sizes[-1], num_classes))


class ConvNet(nn.Sequential):
    """Stages of two 3x3 convolutions each, with BatchNorm and ReLU, then the mean over the image and a linear layer.

    Args:
        widths: channels of each stage. Before each stage but the first, max-pooling halves height and width.
    """

    def __init__(
        self, *, input_shape: tuple[int, int, int], num_classes: int, widths: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        channels = input_shape[0]
        for number, width in enumerate(widths, 1):
            pool = [nn.MaxPool2d(2, ceil_mode=True)] if number > 1 else []  # leaves something of images of any size
            self.add_module(f"stage{number}", nn.Sequential(*pool, *_block(channels, width), *_block(width, width)))
            channels = width
        self.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)))


def _block(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def torchvision(
    *, input_shape: tuple[int, int, int], num_classes: int, name: str, pretrained: bool = False
) -> nn.Module:
    """A classifier of torchvision.models, adapted to the images' channels and to the classes; the last layer begins
    at random unless there are as many classes as in the pretraining.

    A ResNet keeps the resolution of images below 64 pixels in its stem, a ViT is made for the size of the images.

    Raises:
        ConfigError: there is no such model, or its weights cannot be had.
    """
    from torchvision import models as zoo

    _check_name(name, zoo.list_models(module=zoo), "torchvision")
    channels, *size = input_shape
    more: dict[str, Any] = {"image_size": size[0]} if name.startswith("vit_") and not pretrained else {}
    if name in ("googlenet", "inception_v3"):  # one output in training, too
        more = {"aux_logits": False, "init_weights": True, "transform_input": pretrained and channels == 3}
    model: nn.Module = zoo.get_model(name, num_classes=num_classes, **more)
    key, first = _first_convolution(model)
    if channels != first.in_channels:
        settings = {k: getattr(first, k) for k in ("kernel_size", "stride", "padding", "dilation")}
        adapted = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **settings)
        model.set_submodule(key, adapted)
    if isinstance(model, zoo.ResNet):
        _fit_stem(model, size)
    if pretrained and not _weights_come_later.get():
        with _downloads(name):
            trained = zoo.get_model(name, weights="DEFAULT").state_dict()
        weight, own = trained[f"{key}.weight"], model.state_dict()
        if channels != 3:  # as timm does: the sum for grey, else the colours in turn, so that the output keeps its size
            repeated = weight.repeat(1, ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)
            trained[f"{key}.weight"] = weight.sum(1, keepdim=True) if channels == 1 else repeated
        fitting = {k: value for k, value in trained.items() if k in own and value.shape == own[k].shape}
        model.load_state_dict(fitting, strict=False)
        seen = zoo.get_model_weights(name).DEFAULT.transforms()
        expected: Any = {"input_size": (3, *seen.crop_size * 2), "mean": seen.mean, "std": seen.std}
        model.pretrained_cfg = expected  # as timm names it
    return model


def timm(
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    name: str,
    pretrained: bool = False,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
) -> nn.Module:
    """A model of timm, which adapts it to the images' channels and size and to the classes; ResNets as `torchvision`.

    Raises:
        ConfigError: there is no such model, or its weights cannot be had, or timm is not installed.
    """
    try:
        import timm as zoo
    except ModuleNotFoundError:
        raise ConfigError("model=timm needs timm: pip install timm") from None
    from timm.models import ResNet, get_pretrained_cfg

    if not zoo.is_model(name):
        _check_name(name, zoo.list_models(), "timm")
    channels, *size = input_shape
    more: dict[str, Any] = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    if getattr(get_pretrained_cfg(name), "fixed_input_size", False):
        more["img_size"] = size
    wanted = pretrained and not _weights_come_later.get()
    with _downloads(name, wanted):
        model: nn.Module = zoo.create_model(name, wanted, num_classes=num_classes, in_chans=channels, **more)
    if isinstance(model, ResNet):
        _fit_stem(model, size)
    return model


def unlike_pretraining(model: nn.Module, dataset: Dataset, keys: Collection[str]) -> str:
    """What pretrained weights expect of the images and the dataset does not give, in words, and what to type; or "".

    Args:
        model: with timm's `pretrained_cfg`, of which `mean`, `std` and `input_size` are read.
        keys: those that the dataset's configuration has.
    """
    if not (cfg := getattr(model, "pretrained_cfg", None)):
        return ""
    channels, *size = dataset.input_shape

    def of_channels(values: Sequence[float]) -> list[float]:
        return [*values] if len(values) == channels else [round(sum(values) / len(values), 3)] * channels

    wanted, given = (
        {"mean": of_channels(mean), "std": of_channels(std), "image_size": [*sides]}
        for mean, std, sides in ((cfg["mean"], cfg["std"], cfg["input_size"][1:]), (dataset.mean, dataset.std, size))
    )
    other = [key for key in wanted if wanted[key] != given[key]]
    said = ", ".join(f"{key} {wanted[key]} where the dataset has {given[key]}" for key in other)
    wanted["image_size"] = wanted["image_size"][0]  # which is square
    typed = " ".join(f'"dataset.{key}={wanted[key]}"'.replace(" ", "") for key in other if key in keys)
    return f"the pretrained weights expect {said}" + f"; type {typed}" * bool(typed) if other else ""


def _check_name(name: str, names: Sequence[str], where: str) -> None:
    if name not in names:
        raise ConfigError(f"model.name={name} is no model of {where}.{did_you_mean(similar(name, names))}")


_weights_come_later = ContextVar("weights_come_later", default=False)


@contextmanager
def weights_come_later() -> Iterator[None]:
    """Within the block, build what `pretrained` names and download nothing: the weights are those of a run."""
    token = _weights_come_later.set(True)
    try:
        yield
    finally:
        _weights_come_later.reset(token)


@contextmanager
def _downloads(name: str, pretrained: bool = True) -> Iterator[None]:
    """Say what to do where the pretrained weights of a model cannot be had."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ConfigError(
            f"model.pretrained=true: the weights of {name} cannot be had: {first_line(error)}\n"
            "Without a network, copy a file of them to this machine: model.pretrained=false weights=<file>."
        ) from error


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _fit_stem(model: nn.Module, size: Sequence[int]) -> None:
    """Let the first layers of a ResNet keep the resolution of small images, with the same weights."""
    if max(size) < SMALL_IMAGE:
        _first_convolution(model)[1].stride = (1, 1)
        model.maxpool = nn.Identity()


def resnet18(*, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al., arXiv 1512.03385), untrained, for images of any number of channels."""
    from torchvision.models import resnet18 as torchvision_resnet18

    model: nn.Module = torchvision_resnet18(num_classes=num_classes)
    if input_shape[0] != 3:
        model.conv1 = nn.Conv2d(input_shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
    return model
