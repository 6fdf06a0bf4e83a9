"""What is trained on: splits in memory or map-style, their batches, and how these are augmented."""

from fmexp.datasets import augment
from fmexp.datasets.catalog import GARMENTS, cifar10, fashion_mnist, kmnist, mnist, synthetic
from fmexp.datasets.dataset import SPLIT_NAMES, Dataset, Fit, MapStyle, Split, blank, check, labels, length, load
from fmexp.datasets.loader import Workers, batches, killed_worker, order
from fmexp.datasets.validation import relabelled, with_validation

__all__ = [
    "GARMENTS", "SPLIT_NAMES", "Dataset", "Fit", "MapStyle", "Split", "Workers", "augment", "batches", "blank",
    "check", "cifar10", "fashion_mnist", "killed_worker", "kmnist", "labels", "length", "load", "mnist", "order",
    "relabelled", "synthetic", "with_validation",
]  # fmt: skip
