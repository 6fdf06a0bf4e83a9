"""What the tests of stages share: what they keep of the run that all of them read, and pictures read back."""

import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import nn

from fmexp.config import Moment, conf_dir
from fmexp.datasets import Dataset, Split
from fmexp.engine.evaluation import Evaluation
from fmexp.models import LeNet
from fmexp.run import Run
from fmexp.stages import figures

STAGES = sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml"))

MOMENTS = [moment.name for moment in Moment]

Bytes = NDArray[np.uint8]


def catch(stage: ModuleType, patch: pytest.MonkeyPatch) -> tuple[list[Figure], list[Bytes], SimpleNamespace]:
    """The figures that a stage is about to draw, their pictures, and the writer that it has to be given."""
    drawn: list[Figure] = []
    pictures: list[Bytes] = []

    def add_figure(run: Run, tag: str, figure: Figure) -> None:
        drawn.append(figure)
        figures.add_figure(run, tag, figure)

    patch.setattr(stage, "add_figure", add_figure)
    writer = SimpleNamespace(add_image=lambda tag, image, step, dataformats: pictures.append(image.copy()))
    return drawn, pictures, writer


def only(*names: str) -> list[str]:
    """Overrides that turn on the stages named, and off all others."""
    return [f"stage.{name}.enabled={str(name in names).lower()}" for name in STAGES]


def picture(png: bytes) -> Bytes:
    """The bytes [H, W, 3] of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def tiles(sheet: Bytes, height: int, width: int, padding: int) -> list[Bytes]:
    """The pictures on a sheet, row by row."""
    rows = range(padding, sheet.shape[0] - height + 1, height + padding)
    columns = range(padding, sheet.shape[1] - width + 1, width + padding)
    return [sheet[y : y + height, x : x + width] for y in rows for x in columns]


def find(tile: Bytes, split: Split) -> int:
    """The index of the image that a picture shows, to the byte; there must be exactly one."""
    images = split.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    found = np.flatnonzero((images == tile).all((1, 2, 3)))
    assert len(found) == 1
    return int(found[0])


# A run that all the tests of single stages read
@dataclass
class Drawn:
    """What stood in one of a figure's axes when the figure was handed over."""

    title: str
    colour: str
    image: NDArray[np.float64]
    place: tuple[float, float, float, float]  # left, bottom, width and height, as shares of the figure
    texts: dict[tuple[int, int], str]  # (row, column) -> text
    labels: tuple[str, str, list[str]]  # of the x and of the y axis, and the names along the latter

    @staticmethod
    def of(figure: Figure) -> "list[Drawn]":
        drawn = []
        for axes in figure.axes:
            if not axes.images:  # a colour bar
                continue
            (image,) = axes.images
            places = [(text, text.get_position()) for text in axes.texts]
            names = [label.get_text() for label in axes.get_yticklabels()]
            drawn.append(
                Drawn(
                    axes.get_title(), str(axes.title.get_color()), np.array(image.get_array(), np.float64),
                    axes.get_position(original=True).bounds,
                    {(int(row), int(column)): text.get_text() for text, (column, row) in places},
                    (axes.get_xlabel(), axes.get_ylabel(), names),
                )
            )  # fmt: skip
        return drawn


@dataclass
class Seen:
    folder: Path
    events: EventAccumulator
    evaluation: Evaluation
    dataset: Dataset
    figures: dict[tuple[str, int], list[Drawn]]


def final_model(folder: Path) -> nn.Module:
    model = LeNet(input_shape=(1, 28, 28), num_classes=10).eval()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model


# per_class_accuracy and confusion_matrix
def numpy_confusion(seen: Seen) -> NDArray[np.int64]:
    table = np.zeros((10, 10), np.int64)
    guesses = seen.evaluation.probabilities.numpy().argmax(1)
    for label, guess in zip(seen.dataset.test.labels.tolist(), guesses.tolist(), strict=True):
        table[label, guess] += 1
    return table


def read_embedding(folder: Path, step: int, tag: str = "default") -> tuple[NDArray[np.float64], list[str], list[Bytes]]:
    """The vectors, class names and thumbnails of the embedding that was written at a step."""
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (info,) = [info for info in config.embeddings if info.tensor_name == f"{tag}:{step:05}"]
    vectors = np.loadtxt(folder / info.tensor_path, delimiter="\t", ndmin=2)
    classes = (folder / info.metadata_path).read_text().splitlines()
    width, height = info.sprite.single_image_dim
    sheet = picture((folder / info.sprite.image_path).read_bytes())
    return vectors, classes, tiles(sheet, height, width, 0)[: len(vectors)]
