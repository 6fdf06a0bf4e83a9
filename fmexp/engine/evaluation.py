"""One pass over a split, kept: probabilities and labels, and the figures that follow from them."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmexp.datasets import Dataset, MapStyle, Split, Workers, batches, length
from fmexp.engine import metrics
from fmexp.engine.distributed import World

BATCH = 500  # images at once: large enough for full speed on a CPU, small enough for any memory


@dataclass(frozen=True)
class Evaluation:
    """What the model said of every image: softmax probabilities float32 [N, K] and the true labels int64 [N]."""

    probabilities: Tensor
    labels: Tensor
    loss: float

    @cached_property
    def guesses(self) -> Tensor:
        """The most probable class of each image, int64 [N]."""
        return self.probabilities.argmax(1)

    @cached_property
    def accuracy(self) -> float:
        """The share of images whose most probable class is the true one."""
        return int((self.guesses == self.labels).sum()) / len(self.labels)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The accuracy and all else of `fmexp.engine.metrics` that is defined for these images, by name."""
        return metrics.compute(self.probabilities, self.labels)

    @cached_property
    def confusion(self) -> Tensor:
        """How many images of class i (row) were taken for class j (column): int64 [K, K]."""
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.guesses
        return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)

    @cached_property
    def images_per_class(self) -> Tensor:
        """How many images are of each class, int64 [K]."""
        return torch.bincount(self.labels, minlength=self.probabilities.shape[1])

    @cached_property
    def per_class_accuracy(self) -> Tensor:
        """The accuracy within each class, float64 [K]; NaN for a class without images."""
        right = self.labels[self.guesses == self.labels].bincount(minlength=self.probabilities.shape[1])
        return right.double() / self.images_per_class

    def precision_recall(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Precision and recall of one class at every distinct probability, from high to low.

        An image is predicted positive where its probability >= threshold.

        Returns:
            thresholds, precision, recall: float64 [T] each, T the number of distinct probabilities. Recall is NaN for
            a class without images.
        """
        curve = metrics.by_threshold(self.probabilities[:, index].numpy(), (self.labels == index).numpy())
        thresholds, found, predicted = (torch.from_numpy(part).double() for part in curve)
        return thresholds, found / predicted, found / found[-1]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: Split | MapStyle,
    indices: Tensor | None = None,
    *,
    device: torch.device,
    workers: Workers | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    world: World | None = None,
) -> Evaluation:
    """Run the model (in the mode it is in) over a split of the dataset; the loss is the mean cross-entropy.

    Args:
        indices: of the images, int64 [N]; None: all.
        world: the processes that do so together, each for its share of the batches.
    """
    indices = torch.arange(length(split)) if indices is None else indices
    count = len(indices)
    places = torch.arange(count) if world is None else world.batches(count, BATCH)
    probabilities, labels = torch.zeros(count, len(dataset.classes)), torch.zeros(count, dtype=torch.int64)
    losses = torch.zeros(count, dtype=torch.float64)
    given = batches(dataset, split, indices[places], BATCH, device=device, workers=workers) if len(places) else ()
    for (images, targets), part in zip(given, places.split(BATCH), strict=False):
        logits, targets = compute_logits(model, images, memory_format), targets.cpu()
        probabilities[part], labels[part] = F.softmax(logits, 1), targets
        losses[part] = F.cross_entropy(logits.double(), targets, reduction="none")
    if world is not None:
        world.combine([probabilities, labels, losses])
    return Evaluation(probabilities, labels, float(losses.mean()))


def compute_logits(model: nn.Module, images: Tensor, memory_format: torch.memory_format) -> Tensor:
    """What a model says of images [B, C, H, W] on its device: logits float32 [B, K], on the CPU."""
    logits: Tensor = model(images.to(memory_format=memory_format))
    return logits.float().cpu()
