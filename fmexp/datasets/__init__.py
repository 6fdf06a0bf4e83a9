"""What is trained on: splits in memory or map-style, and their batches."""

from fmexp.datasets.arrays import arrays
from fmexp.datasets.catalog import GARMENTS, cifar10, fashion_mnist, kmnist, mnist, synthetic
from fmexp.datasets.dataset import Dataset, MapStyle, Split, check, length, load
from fmexp.datasets.image_folder import image_folder
from fmexp.datasets.loader import batches, order

__all__ = [
    "GARMENTS", "Dataset", "MapStyle", "Split", "arrays", "batches", "check", "cifar10", "fashion_mnist",
    "image_folder", "kmnist", "length", "load", "mnist", "order", "synthetic",
]  # fmt: skip
