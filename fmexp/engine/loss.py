"""What loss YAML names: `f(logits, labels, ...) -> scalar`; logits [B, K], labels int64 [B] or probabilities [B, K].

Evaluation reports plain cross-entropy, whatever the loss.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmexp.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy.

    Args:
        label_smoothing: this share of each label is spread over all classes.
        class_weights: [K]; an image counts by the weight of its label, smoothed or not. torch's own function would
            weigh each class of the smoothed label, which pulls all predictions to the heavy classes (pytorch#104776).
    """
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return _weighted(losses, labels, class_weights)


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy in which what is right already counts less: times (1 - p) ** gamma (Lin et al. 2017)."""
    log_p = F.log_softmax(logits, 1)
    terms = -((1 - log_p.exp()) ** gamma) * log_p
    losses = (terms * labels).sum(1) if labels.is_floating_point() else terms.gather(1, labels[:, None])[:, 0]
    return losses.mean() if class_weights is None else _weighted(losses, labels, class_weights)


def binary(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """One sigmoid a class: the mean over images and classes (Wightman et al. 2021)."""
    classes = logits.shape[1]
    wanted = labels if labels.is_floating_point() else F.one_hot(labels, classes)
    wanted = (wanted * (1 - label_smoothing) + label_smoothing / classes).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def weights_of_classes(wanted: str | Sequence[float], labels: Tensor | None, classes: int) -> Tensor:
    """`loss.class_weights` as a tensor float32 [K].

    Args:
        wanted: a number for each class, or "balanced": each class has the same share of the loss.
        labels: of the training split, int64 [N]; None where the dataset does not say them.

    Raises:
        ConfigError: these are no weights for so many classes.
    """
    if wanted == "balanced":
        if labels is None:
            raise ConfigError(
                "loss.class_weights=balanced needs to know the labels, and this map-style dataset has no `targets`. "
                "Give it the list of its labels, or write a weight for each class."
            )
        counts = torch.bincount(labels.cpu(), minlength=classes)
        return len(labels) / (classes * counts.clamp(min=1).float())
    weights = [w for w in wanted if type(w) in (int, float) and w >= 0] if isinstance(wanted, list) else []
    if len(weights) != classes or len(wanted) != classes or not any(weights):
        raise ConfigError(
            f"loss.class_weights={wanted} must be null, balanced or {classes} numbers, one for each class, "
            "none of them negative."
        )
    return torch.tensor(weights, dtype=torch.float32)


def _weighted(losses: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """The mean of losses [B], each counting by the weight of its label."""
    class_weights = class_weights.to(losses.dtype)
    weights = labels.to(losses.dtype) @ class_weights if labels.is_floating_point() else class_weights[labels]
    return (losses * weights).sum() / weights.sum().clamp(min=1e-12)  # a batch in which nothing counts has a loss of 0
