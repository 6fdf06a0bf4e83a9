"""What the tests share: short runs on small drawn data, and reading back what they wrote."""

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, open_dict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.datasets import CIFAR10

from fmexp import compose, execute
from fmexp.datasets import Dataset
from fmexp.engine.evaluation import Evaluation
from fmexp.models import LeNet
from fmexp.run import Run
from fmexp.trainer import Trainer

SMALL = ("dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "train.log_every=4", "device=cpu",
         "train.validation=0", "objective=test/accuracy")  # fmt: skip


def small(*overrides: str) -> DictConfig:
    """A configuration of 16 batches on drawn data; every stage's failure ends the run."""
    cfg = compose([*SMALL, *overrides])
    for stage in cfg.stage.values():
        with open_dict(stage):
            stage.required = True
    return cfg


KEPT: dict[str, tuple[Evaluation, Dataset]] = {}  # by the folder in which the run wrote
KEEP = "+stage.keep={_target_:tools.keep,when:end}"


def keep(run: Run) -> None:
    """A stage: keep what the run's own evaluation says, and of which data."""
    KEPT[str(run.output_dir)] = run.evaluation, run.dataset


def result(folder: Path) -> dict[str, Any]:
    """What a run's result.json says."""
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def read_events(folder: Path) -> EventAccumulator:
    """All that a run wrote for TensorBoard, nothing sampled away."""
    everything = {"scalars": 0, "images": 0, "tensors": 0, "histograms": 0, "graph": True}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def scalars(accumulator: Any, tag: str) -> list[tuple[int, float]]:
    """The (step, value) of every point of a scalar."""
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write an unpacked IDX file of bytes, as MNIST's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_idx_splits(root: Path, name: str) -> dict[str, NDArray[np.uint8]]:
    """Write a small dataset of 24 + 12 random images of 28x28 where torchvision keeps `name` under `root`.

    Returns:
        the arrays by file name, such as train-images-idx3-ubyte.
    """
    rng = np.random.default_rng(len(name))
    arrays = {}
    for split, count in (("train", 24), ("t10k", 12)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for file, array in arrays.items():
        write_idx(root / name / "raw" / file, array)
    return arrays


def write_datasets(root: Path, classes: int = 2) -> None:
    """Write some images under `root` in the format of each dataset that is read from files, but for CIFAR-10; arrays
    and pictures in folders of the names of their functions."""
    for name in ("FashionMNIST", "MNIST", "KMNIST"):
        write_idx_splits(root, name)
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 3), np.uint8), np.arange(60) % classes
    (root / "arrays").mkdir()
    for name, array in (("images", images), ("labels", labels)):
        np.save(root / "arrays" / f"{name}.npy", array)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / "image_folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "image_folder" / str(label) / f"{number}.png")


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[NDArray[np.uint8], list[int]]:
    """Write 5 x 4 + 8 random images in CIFAR-10's unpacked form under `root`, and let torchvision expect these files.

    Returns:
        images [28, 3, 32, 32] and labels, the training ones first.
    """
    rng = np.random.default_rng(10)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    parts = []
    for name, count in [*((f"data_batch_{number}", 4) for number in range(1, 6)), ("test_batch", 8)]:
        content = {"data": rng.integers(0, 256, (count, 3072), np.uint8), "labels": rng.integers(0, 10, count).tolist()}
        parts.append((write(name, content), content))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", [entry for entry, _ in parts[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [entry for entry, _ in parts[5:]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    images = np.concatenate([content["data"] for _, content in parts]).reshape(-1, 3, 32, 32)
    return images, [label for _, content in parts for label in content["labels"]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's model.pt."""
    state: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return state


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Compare the bits of every tensor of two runs' model.pt."""
    state, expected = weights(ours), weights(theirs)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name


def lenet(seed: int = 0) -> nn.Module:
    """LeNet for images of 1x28x28 and 10 classes."""
    torch.manual_seed(seed)
    return LeNet(input_shape=(1, 28, 28), num_classes=10)


def noise(count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of `size` images of 1x28x28 with labels of 10 classes, all random."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 28, 28, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


class Interrupted(Exception):
    pass


def interrupt(cfg: DictConfig, folder: Path, step: int) -> dict[str, Any]:
    """Execute a run in a folder until it has done a step; returns its result, which is removed."""
    after_step = Trainer.after_step

    def and_stop(self: Trainer, loss: torch.Tensor) -> None:
        after_step(self, loss)
        if self.run.step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "after_step", and_stop)
        with pytest.raises(Interrupted):
            execute(cfg, folder)
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return result
