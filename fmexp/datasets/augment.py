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
        if name not in steps:
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
    inside = [
        (places >= first[:, None]) & (places < (first + length)[:, None])
        for places, first, length in zip(map(torch.arange, size), boxes[:2], boxes[2:], strict=True)
    ]
    kept = ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return images * kept.to(images.device, images.dtype), labels  # ten times as fast on a CPU as masked_fill


def _boxes(
    count: int, size: Sequence[int], p: float, scale: Sequence[float], ratio: Sequence[float], generator: Generator
) -> tuple[Tensor, ...]:
    """Top, left, height and width of what is erased, int64 [B]; the height is 0 where nothing is."""
    tries = torch.rand(2, 10, count, generator=generator, dtype=torch.float64)
    share, low, high = scale[0] + (scale[1] - scale[0]) * tries[0], math.log(ratio[0]), math.log(ratio[1])
    area, aspect = share * size[0] * size[1], (low + (high - low) * tries[1]).exp()
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < size[0]) & (widths < size[1])
    first = fits.byte().argmax(0, keepdim=True)
    height, width = (sides.gather(0, first)[0].long() for sides in (heights, widths))
    tops, lefts, chance = torch.rand(3, count, generator=generator, dtype=torch.float64)
    top, left = (tops * (size[0] - height + 1)).long(), (lefts * (size[1] - width + 1)).long()
    return top, left, height * (fits.any(0) & (chance < p)), width


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
