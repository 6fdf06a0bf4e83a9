"""The augmentations that YAML can name: f(images, labels, generator, ...) -> images, labels, a batch at a time.

Images are [B, C, H, W] on the run's device: uint8, or float32 where a map-style split gives them normalised already.
Black is 0, which in normalised images is the mean. Labels are int64 [B], or after mixup and cutmix float32 [B, K], the
probability of each class. All random numbers are of the generator, which is on the CPU, so that a GPU gets the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fmexp import rng
from fmexp.errors import ConfigError

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, Tensor, Generator], Batch]


def generator(seed: int, step: int) -> Generator:
    """The random numbers of a training step, which depend on nothing else: not on workers, and not on a stop."""
    return Generator().manual_seed(rng.derive_seed(seed, "augment", step))


def none(images: Tensor, labels: Tensor, generator: Generator) -> Batch:
    """The images as they are."""
    return images, labels


def chain(
    images: Tensor, labels: Tensor, generator: Generator, *, order: Sequence[str], steps: Mapping[str, Augment]
) -> Batch:
    """Those of `steps` that `order` names, one after another."""
    for name in order:
        if steps.get(name) is None:
            raise ConfigError(f"augment.order has {name}, which is none of augment.steps: {', '.join(steps)}.")
        images, labels = steps[name](images, labels, generator)
    return images, labels


def crop_flip(images: Tensor, labels: Tensor, generator: Generator, *, padding: int, flip: float) -> Batch:
    """Pad by `padding` black pixels on each side, cut out the old size anywhere, and mirror with probability `flip`.

    Each image has draws of its own. The same as torchvision's RandomCrop and RandomHorizontalFlip.
    """
    count, channels, height, width = images.shape
    tops, lefts, flips = (part[:, None].to(images.device) for part in _crops(count, padding, flip, generator))
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    columns = torch.where(flips, width - 1 - columns, columns) + lefts
    places = ((rows + tops) * (width + 2 * padding))[:, :, None] + columns[:, None]  # [B, H, W], in a padded channel
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, places.view(count, 1, -1).expand(-1, channels, -1)).view_as(images), labels


def _crops(count: int, padding: int, flip: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Top and left of each crop, int64 [B], and whether it is mirrored, bool [B]."""
    tops, lefts = torch.randint(2 * padding + 1, (2, count), generator=generator)
    return tops, lefts, torch.rand(count, generator=generator) < flip


def random_erasing(
    images: Tensor, labels: Tensor, generator: Generator, *, p: float, scale: Sequence[float], ratio: Sequence[float]
) -> Batch:
    """Blacken a rectangle of each image with probability `p` (Zhong et al., arXiv 1708.04896).

    Each image has draws of its own, as in torchvision's RandomErasing: an area, as a share of the image, within `scale`
    and height / width within `ratio`, the first of ten that fit.
    """
    size = images.shape[2:]
    boxes = _boxes(len(images), size, p, scale, ratio, generator)
    rows, columns = (
        ((places >= first[:, None]) & (places < (first + length)[:, None])).to(images.device, images.dtype)
        for places, first, length in zip(map(torch.arange, size), boxes[:2], boxes[2:], strict=True)
    )
    return images * (1 - rows[:, None, :, None] * columns[:, None, None]), labels  # faster than masked_fill


def _boxes(
    count: int, size: Sequence[int], p: float, scale: Sequence[float], ratio: Sequence[float], generator: Generator
) -> tuple[Tensor, ...]:
    """Top, left, height and width of what is erased, int64 [B]; the height is 0 where nothing is."""
    draws = torch.rand(23, count, generator=generator, dtype=torch.float64).numpy()  # which is faster with so few
    share, low, high = scale[0] + (scale[1] - scale[0]) * draws[:10], math.log(ratio[0]), math.log(ratio[1])
    area, aspect = share * size[0] * size[1], np.exp(low + (high - low) * draws[10:20])
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size[0]) & (widths < size[1])
    first = fits.argmax(0), np.arange(count)
    height, width = heights[first], widths[first]
    top, left = draws[20] * (size[0] - height + 1), draws[21] * (size[1] - width + 1)
    height = height * (fits[first] & (draws[22] < p))
    return tuple(torch.from_numpy(values.astype(np.int64)) for values in (top, left, height, width))


def mixup(images: Tensor, labels: Tensor, generator: Generator, *, alpha: float, num_classes: int) -> Batch:
    """Mix each image with the one before it in the batch: share * this + (1 - share) * that, labels likewise
    (Zhang et al., arXiv 1710.09412). One share, of Beta(alpha, alpha), for the batch. Images become float32."""
    share = _share(alpha, generator)
    return _mixed(images.float(), share), _mixed(_probabilities(labels, num_classes), share)


def cutmix(images: Tensor, labels: Tensor, generator: Generator, *, alpha: float, num_classes: int) -> Batch:
    """Put a rectangle of the image before it in the batch into each image; labels are mixed by the pixels' shares
    (Yun et al., arXiv 1905.04899). One rectangle for the batch, of 1 - Beta(alpha, alpha) of the area."""
    top, bottom, left, right = _cut(images.shape[2:], alpha, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
    return mixed, _mixed(_probabilities(labels, num_classes), share)


def _cut(size: Sequence[int], alpha: float, generator: Generator) -> tuple[int, ...]:
    """Top, bottom, left and right of a rectangle around any pixel, without what is outside of the image."""
    half, cut = 0.5 * math.sqrt(1 - _share(alpha, generator)), []
    for side in size:
        middle = int(torch.randint(side, (), generator=generator))
        cut += [max(middle - int(half * side), 0), min(middle + int(half * side), side)]
    return tuple(cut)


def _share(alpha: float, generator: Generator) -> float:
    """A draw from Beta(alpha, alpha): NumPy's, for torch's takes no generator."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator))).beta(alpha, alpha)


def _mixed(values: Tensor, share: float) -> Tensor:
    return values.roll(1, 0).mul_(1 - share).add_(values.mul(share))  # in the order of torchvision's MixUp


def _probabilities(labels: Tensor, num_classes: int) -> Tensor:
    return labels if labels.is_floating_point() else F.one_hot(labels, num_classes).float()


def trivial_augment(images: Tensor, labels: Tensor, generator: Generator) -> Batch:
    """Change each image by an operation and a strength of its own (Mueller and Hutter, arXiv 2103.10158).

    Operations and strengths are those of torchvision's TrivialAugmentWide, and so are the bytes. Images that have drawn
    the same operation are changed together, whatever the strength.

    Raises:
        ConfigError: the images are not uint8 of 1 or 3 channels, of 3x3 pixels at least.
    """
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 3:
        raise ConfigError(
            f"augment: trivial_augment needs images torch.uint8 [B, 1 or 3, H, W], not {images.dtype} "
            f"{list(images.shape)}. In a chain it stands before mixup."
        )
    names, strengths = _trivial(len(images), generator)
    changed, kinds = images.clone(), ["Moved" if name in _MOVES else name for name in names]
    for kind in sorted({*kinds} - {"Identity"}):
        places = [index for index, other in enumerate(kinds) if other == kind]
        by, chosen = [strengths[index] for index in places], torch.tensor(places, device=images.device)
        group = images.index_select(0, chosen)
        if kind == "Moved":
            group = _moved(group, [names[index] for index in places], by)
        else:
            group = _recoloured(group, kind, torch.tensor(by, device=images.device))
        changed.index_copy_(0, chosen, group)
    return changed, labels


# The strengths of each operation, from the first of 31 to the last; those of _SIGNED are as often below 0.
_STRENGTHS = {
    "Identity": (0.0, 0.0), "ShearX": (0.0, 0.99), "ShearY": (0.0, 0.99), "TranslateX": (0.0, 32.0),
    "TranslateY": (0.0, 32.0), "Rotate": (0.0, 135.0), "Brightness": (0.0, 0.99), "Color": (0.0, 0.99),
    "Contrast": (0.0, 0.99), "Sharpness": (0.0, 0.99), "Posterize": (8.0, 2.0), "Solarize": (1.0, 0.0),
    "AutoContrast": (0.0, 0.0), "Equalize": (0.0, 0.0),
}  # fmt: skip
_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_SIGNED = (*_MOVES, "Brightness", "Color", "Contrast", "Sharpness")


def _trivial(count: int, generator: Generator) -> tuple[list[str], list[float]]:
    """The operation of each image, and its strength, a float32."""
    draws = torch.rand(3, count, generator=generator).tolist()
    names = [list(_STRENGTHS)[int(draw * len(_STRENGTHS))] for draw in draws[0]]
    strengths = []
    for name, place, sign in zip(names, *draws[1:], strict=True):
        first, last = _STRENGTHS[name]
        strength = first + (last - first) * int(place * 31) / 30
        strength = round(strength) if name == "Posterize" else strength
        strengths.append(-strength if name in _SIGNED and sign < 0.5 else strength)
    return names, torch.tensor(strengths).tolist()


def _moved(images: Tensor, names: list[str], strengths: list[float]) -> Tensor:
    """Each image sheared, translated or rotated, black where nothing was, to the nearest pixel."""
    height, width = images.shape[2:]
    sources = [_source(name, by, height, width) for name, by in zip(names, strengths, strict=True)]
    matrix = torch.tensor(sources).view(-1, 2, 3).transpose(1, 2) / torch.tensor([0.5 * width, 0.5 * height])
    columns, rows = (torch.linspace((1 - side) * 0.5, (side - 1) * 0.5, side) for side in (width, height))
    places = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width), torch.ones(height, width)], -1)
    # bmm, as torchvision: one larger product would be faster and has other last bits.
    grid = places.view(1, -1, 3).expand(len(images), -1, -1).bmm(matrix).view(-1, height, width, 2)
    return F.grid_sample(images.float(), grid.to(images.device), mode="nearest", align_corners=False).byte()


def _source(name: str, by: float, height: int, width: int) -> tuple[float, ...]:
    """From where a pixel comes, seen from the middle: a, b, c and d, e, f of (a x + b y + c, d x + e y + f)."""
    cos, sin = math.cos(math.radians(by)), math.sin(math.radians(by))
    return {
        "ShearX": (1, by, by * height / 2, 0, 1, 0),  # from the top
        "ShearY": (1, 0, 0, by, 1, by * width / 2),  # from the left
        "TranslateX": (1, 0, -int(by), 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -int(by)),
        "Rotate": (cos, -sin, 0, sin, cos, 0),
    }[name]


def _recoloured(images: Tensor, name: str, strengths: Tensor) -> Tensor:
    """Images changed by one of the other operations, by their strengths, float32 [B].

    What torchvision adds with one rounding, a number times a tensor, is float64 here, for each image has its number.
    """
    from torchvision.transforms.v2 import functional as torchvision  # takes a second

    wide = torch.float32 if images.is_mps else torch.float64  # which MPS does not have
    by = strengths[:, None, None, None].to(wide)
    if name in ("AutoContrast", "Equalize"):
        function = torchvision.autocontrast if name == "AutoContrast" else torchvision.equalize
        return function(images)  # type: ignore[no-any-return]
    if name == "Posterize":
        return images & (256 - 2 ** (8 - by.long())).byte()
    if name == "Solarize":
        return torch.where(images >= (255 * by).float(), 255 - images, images)
    if name == "Sharpness":  # but for the edge, which has no neighbours on one side
        inner = images[:, :, 1:-1, 1:-1].to(wide)
        smooth = (F.avg_pool2d(images.to(wide), 3, 1, divisor_override=1) + 4 * inner).div_(13).round_()
        sharper = images.clone()
        sharper[:, :, 1:-1, 1:-1] = (inner - (smooth - inner) * by).float().clamp_(0, 255).byte()
        return sharper
    grey = torchvision.rgb_to_grayscale(images).float() if images.shape[1] == 3 else images.float()
    other = {"Brightness": torch.zeros_like(by), "Color": grey, "Contrast": grey.mean((1, 2, 3), keepdim=True)}[name]
    if name == "Color" and images.shape[1] == 1:
        return images
    return (images * (1 + by).float()).to(wide).sub_(other * by).float().clamp_(0, 255).byte()
