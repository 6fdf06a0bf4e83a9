"""Stages: what each wrote, read back and compared with the data; and that none of them disturbs the training."""

import io
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray
from tools import assert_same_weights, read_events, scalars, small
from torch import Tensor, nn

import fmexp.stages.figures
from fmexp import compose, datasets, execute
from fmexp.config import Moment, conf_dir
from fmexp.datasets import Dataset, Split
from fmexp.engine.evaluation import Evaluation, evaluate
from fmexp.errors import ConfigError
from fmexp.models import LeNet
from fmexp.run import Run, eval_mode
from fmexp.stages import confusion_matrix, predictions

STAGES = sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml"))
MOMENTS = [moment.name for moment in Moment]
Bytes = NDArray[np.uint8]


def only(*names: str) -> list[str]:
    """Overrides that turn off all stages but those named."""
    return [f"stage.{name}.enabled=false" for name in STAGES if name not in names]


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


KEPT: dict[str, Evaluation] = {}


def keep(run: Run) -> None:
    """A stage of these tests: keep what the run's own evaluation says."""
    KEPT[str(run.output_dir)] = run.evaluation


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


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """120 steps with a running loss every 30, which is enough for probabilities of all sizes."""
    folder = tmp_path_factory.mktemp("seen") / "run"
    figures: dict[tuple[str, int], list[Drawn]] = {}

    def add_figure(run: Run, tag: str, figure: Figure) -> None:
        figures[tag, run.step] = Drawn.of(figure)
        fmexp.stages.figures.add_figure(run, tag, figure)

    with pytest.MonkeyPatch.context() as patch:
        for module in (confusion_matrix, predictions):
            patch.setattr(module, "add_figure", add_figure)
        cfg = small(
            "dataset.train_size=120", "dataset.test_size=60", "train.epochs=4", "train.log_every=30",
            "optimizer.lr=0.02", "+stage.keep={_target_:test_stages.keep,when:end}",
        )  # fmt: skip
        execute(cfg, folder)
    return Seen(folder, read_events(folder), KEPT[str(folder)], datasets.synthetic(120, 60, 28, 0), figures)


def final_model(folder: Path) -> nn.Module:
    model = LeNet(input_shape=(1, 28, 28), num_classes=10).eval()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model


def test_the_shared_run_is_worth_reading(seen: Seen) -> None:
    model = evaluate(final_model(seen.folder), seen.dataset, seen.dataset.test, device=torch.device("cpu"))
    assert torch.equal(model.labels, seen.dataset.test.labels)
    torch.testing.assert_close(seen.evaluation.probabilities, model.probabilities, rtol=0, atol=1e-5)
    assert torch.equal(seen.evaluation.labels, seen.dataset.test.labels)
    assert 0.3 < seen.evaluation.accuracy < 1
    assert seen.evaluation.probabilities.max() > 0.8


def test_tensorboard_which_sorts_by_name_shows_curves_before_pictures_and_single_points(seen: Seen) -> None:
    tags = seen.events.Tags()
    names = sorted([*tags["scalars"], *tags["images"]])
    groups = list(dict.fromkeys(name.split("/")[0] for name in names))
    assert groups == ["test", "train", "view", "wall_seconds", "within_class_accuracy"]
    assert groups[1] < "val" < groups[2], "a validation's curves belong to the others"
    assert names[:4] == ["test/accuracy", "test/accuracy/best", "test/loss", "train/loss"]
    assert names[4:7] == ["view/confusion_matrix", "view/images", "view/predictions"]


# image_grid


def test_image_grid_shows_training_images_to_the_byte(seen: Seen) -> None:
    (event,) = seen.events.Images("view/images")
    assert event.step == 0
    sheet = picture(event.encoded_image_string)
    assert sheet.shape == (32, 122, 3)
    found = [find(tile, seen.dataset.train) for tile in tiles(sheet, 28, 28, 2)]
    assert len(set(found)) == 4
    assert found != [0, 1, 2, 3]  # random ones


def test_image_grid_as_single_images(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    _, events = run_small(
        *only("image_grid"), "stage.image_grid.layout=images", "stage.image_grid.images=5", "stage.image_grid.tag=own"
    )
    (event,) = events.Tensors("own")
    assert event.step == 0
    assert events.SummaryMetadata("own").plugin_data.plugin_name == "images"
    width, height, *pictures = event.tensor_proto.string_val
    assert (width, height) == (b"28", b"28")
    split = datasets.synthetic(64, 40, 28, 0).train
    assert len({find(picture(png), split) for png in pictures}) == 5


def coloured(train_size: int, test_size: int, image_size: int, seed: int) -> Dataset:
    """Noise in three channels, wider than high, each channel with a normalisation of its own."""
    draw = torch.Generator().manual_seed(seed)
    splits = [
        Split(torch.randint(0, 256, (n, 3, 18, 24), dtype=torch.uint8, generator=draw), torch.arange(n) % 3)
        for n in (train_size, test_size)
    ]
    return Dataset(*splits, ("red", "green", "blue"), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def test_every_stage_takes_colours_and_oblong_images(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    folder, events = run_small("dataset._target_=test_stages.coloured", "model=mlp", "train.max_steps=4")
    split = coloured(64, 40, 28, 0).train
    (event,) = events.Images("view/images")
    assert len({find(tile, split) for tile in tiles(picture(event.encoded_image_string), 18, 24, 2)}) == 4
    vectors, classes, thumbnails = read_embedding(folder, 0)
    assert vectors.shape == (64, 3 * 18 * 24)
    for vector, name, thumbnail in zip(vectors, classes, thumbnails, strict=True):
        assert thumbnail.shape == (24, 24, 3)
        assert not thumbnail[18:].any()
        index = find(thumbnail[:18], split)
        np.testing.assert_allclose(vector * 255, split.images[index].flatten().numpy(), atol=1e-3)
        assert name == ("red", "green", "blue")[index % 3]
    assert {"red", "green", "blue"} <= set(events.Tags()["tensors"])


# model_graph


def test_model_graph_names_the_layers(seen: Seen) -> None:
    names = {node.name for node in seen.events.Graph().node}
    layers = {"/".join(name.split("/")[:3]) for name in names}
    for layer in ("Conv2d[conv1]", "Conv2d[conv2]", "Linear[fc1]", "Linear[fc2]", "Linear[fc3]"):
        assert {f"LeNet/{layer}/weight", f"LeNet/{layer}/bias"} <= layers
    assert any(name.startswith("LeNet/MaxPool2d[pool]/") for name in names)
    assert any(name.startswith("input/") for name in names)
    assert any(name.startswith("output/") for name in names)


class Untraceable(LeNet):
    """Refuses to be traced, as compiled models do."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("not this one\nfor many reasons")
        return super().forward(x)


def test_a_model_that_cannot_be_traced_is_a_warning(
    run_small: Callable[..., tuple[Path, EventAccumulator]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, events = run_small(*only("model_graph"), "model._target_=test_stages.Untraceable")
    assert not events.Tags()["graph"]
    (line,) = [line for line in (folder / "fmexp.log").read_text().splitlines() if "[WARNING]" in line]
    assert "graph is not written, for it cannot be traced: not this one" in line
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("complete", {})
    assert "No graph saved" not in capsys.readouterr().out


# projector


def read_embedding(folder: Path, step: int, tag: str = "default") -> tuple[NDArray[np.float64], list[str], list[Bytes]]:
    """The vectors, class names and thumbnails of the embedding that was written at a step."""
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (info,) = [info for info in config.embeddings if info.tensor_name == f"{tag}:{step:05}"]
    vectors = np.loadtxt(folder / info.tensor_path, delimiter="\t", ndmin=2)
    classes = (folder / info.metadata_path).read_text().splitlines()
    width, height = info.sprite.single_image_dim
    sheet = picture((folder / info.sprite.image_path).read_bytes())
    return vectors, classes, tiles(sheet, height, width, 0)[: len(vectors)]


def test_projector_shows_training_images_with_their_classes(seen: Seen) -> None:
    vectors, classes, thumbnails = read_embedding(seen.folder, 0)
    assert vectors.shape == (100, 784)
    assert len(classes) == len(thumbnails) == 100
    assert (vectors.min(), vectors.max()) == (0, 1)
    found = []
    for vector, name, thumbnail in zip(vectors, classes, thumbnails, strict=True):
        index = find(thumbnail, seen.dataset.train)
        np.testing.assert_allclose(vector, seen.dataset.train.images[index].flatten().double() / 255, atol=1e-7)
        assert name == seen.dataset.classes[int(seen.dataset.train.labels[index])]
        found.append(index)
    assert len(set(found)) == 100
    assert found != sorted(found)


def test_projector_embeds_the_activations_of_a_layer_at_every_moment_it_is_moved_to(
    run_small: Callable[..., tuple[Path, EventAccumulator]],
) -> None:
    folder, _ = run_small(
        *only("projector"), "stage.projector.features=fc2", "stage.projector.when=epoch", "stage.projector.images=30",
        "stage.projector.tag=fc2 of the model", "train.epochs=2", "optimizer.lr=0.01",
    )  # fmt: skip
    split = datasets.synthetic(64, 40, 28, 0).train
    model = final_model(folder)
    activations = {}
    for step in (16, 32):
        vectors, classes, thumbnails = read_embedding(folder, step, "fc2 of the model")
        assert vectors.shape == (30, 84)
        found = [find(thumbnail, split) for thumbnail in thumbnails]
        assert classes == [datasets.GARMENTS[int(split.labels[index])] for index in found]
        activations[step] = found, vectors
    found, vectors = activations[32]
    caught: list[Tensor] = []
    model.get_submodule("fc2").register_forward_hook(lambda module, inputs, output: caught.append(output))
    model(split.images[found].float() / 255 * 2 - 1)
    np.testing.assert_allclose(vectors, caught[0].detach().numpy(), atol=1e-5)
    assert found != activations[16][0]


def test_a_layer_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage\.projector\.features=fc9 .*conv1, pool, conv2, fc1, fc2, fc3"):
        execute(small(*only("projector"), "stage.projector.features=fc9"), tmp_path)


# predictions


def test_predictions_are_written_at_each_running_loss(seen: Seen) -> None:
    events = seen.events.Images("view/predictions")
    assert [event.step for event in events] == [30, 60, 90, 120]
    for event in events:
        assert picture(event.encoded_image_string).shape == (230, 700, 3)
    assert len({event.encoded_image_string for event in events}) == 4


def test_predictions_say_what_the_model_says_of_the_current_batch(seen: Seen) -> None:
    split, classes = seen.dataset.train, seen.dataset.classes
    batch = datasets.order(0, 3, 120)[-4:]  # the last batch of the fourth epoch
    with torch.no_grad():
        probabilities = final_model(seen.folder)(split.images[batch].float() / 255 * 2 - 1).softmax(1)
    figure = seen.figures["view/predictions", 120]
    for drawn, index, chances in zip(figure, batch.tolist(), probabilities, strict=True):
        guess, label = int(chances.argmax()), int(split.labels[index])
        form = re.fullmatch(r"(.+)\n(\d+\.\d)%\nlabel: (.+)", drawn.title)
        assert form
        assert (form[1], form[3]) == (classes[guess], classes[label])
        assert float(form[2]) == pytest.approx(100 * float(chances[guess]), abs=0.051)
        assert drawn.colour == ("green" if guess == label else "red")
        assert np.array_equal(np.rint(drawn.image * 255), split.images[index, 0].numpy())


class Knows(nn.Module):
    """Says of every image what it was told."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def look(
    model: nn.Module, labels: list[int], images: int, patch: pytest.MonkeyPatch, pixels: Tensor | None = None
) -> tuple[list[Drawn], Bytes]:
    """What `predictions` draws of a batch, black where no `pixels` are given: in the figure, and as a picture."""
    figures: list[list[Drawn]] = []
    pictures: list[Bytes] = []

    def add_figure(run: Run, tag: str, figure: Figure) -> None:
        figures.append(Drawn.of(figure))
        fmexp.stages.figures.add_figure(run, tag, figure)

    patch.setattr(predictions, "add_figure", add_figure)
    if pixels is None:
        pixels = torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8)
    split = Split(pixels, torch.tensor(labels))
    dataset = Dataset(split, split, datasets.GARMENTS)
    writer = SimpleNamespace(add_image=lambda tag, image, step, dataformats: pictures.append(image.copy()))
    batch = dataset.normalise(pixels), split.labels
    run = SimpleNamespace(dataset=dataset, model=model, batch=batch, step=7, writer=writer)
    predictions.predictions(run, tag="any", images=images)  # type: ignore[arg-type]
    return figures[0], pictures[0]


def test_titles_say_what_the_tutorials_say_green_if_right_and_red_if_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    sneaker = [0.127 / 9] * 7 + [0.873] + [0.127 / 9] * 2
    sure = [0.0] * 9 + [1.0]
    model, labels = Knows([sneaker, sneaker, sure]), [7, 0, 9]
    drawn, _ = look(model, labels, 4, monkeypatch)
    assert [(one.title, one.colour) for one in drawn] == [
        ("Sneaker\n87.3%\nlabel: Sneaker", "green"),
        ("Sneaker\n87.3%\nlabel: T-shirt/top", "red"),
        ("Ankle Boot\n100.0%\nlabel: Ankle Boot", "green"),
    ]  # a batch of three has no fourth image
    assert len(look(model, labels, 2, monkeypatch)[0]) == 2


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (10, [4, 4, 2])])
def test_predictions_stand_in_rows_of_four(count: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, sheet = look(Knows([[0.1] * 10] * count), [0] * count, count, monkeypatch)
    assert sheet.shape == (230 * len(rows), 700, 3)
    places = [(round(left * 4), round((1 - bottom) * len(rows))) for left, bottom, _, _ in (one.place for one in drawn)]
    assert places == [(column, row + 1) for row, length in enumerate(rows) for column in range(length)]
    for one in drawn:
        left, bottom, width, height = one.place
        assert 0 < left < left + width < 1
        assert 0 < bottom < bottom + height < 1
        assert width * 700 == pytest.approx(height * 230 * len(rows)) == pytest.approx(155)


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_are_as_light_and_dark_as_image_grid(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (5, channels, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn, sheet = look(Knows([[0.1] * 10] * 5), [0] * 5, 5, monkeypatch, pixels)
    for one, image in zip(drawn, pixels, strict=True):
        left, bottom, width, height = one.place
        middles = (np.arange(28) + 0.5) / 28
        rows = ((1 - bottom - height + middles * height) * len(sheet)).astype(int)
        columns = ((left + middles * width) * sheet.shape[1]).astype(int)
        seen = sheet[np.ix_(rows, columns)].astype(int)
        expected = image.expand(3, -1, -1).permute(1, 2, 0).numpy()  # image_grid writes these bytes
        inner = slice(1, -1)  # at the edge is the frame
        assert np.abs(seen - expected)[inner, inner].max() <= 1  # matplotlib rounds a shade


def test_no_figure_goes_through_pyplot() -> None:
    program = (
        "import sys, tempfile; sys.path[:0] = sys.argv[1:]; from conftest import small; from fmexp import execute\n"
        "execute(small('train.max_steps=4'), tempfile.mkdtemp())\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(Path(fmexp.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "False"]


# pr_curves


def pr_curve(events: EventAccumulator, tag: str) -> tuple[int, NDArray[np.float32]]:
    """The step of a curve, and its float32 [6, thresholds]: TP, FP, TN, FN, precision, recall."""
    (event,) = events.Tensors(tag)
    assert events.SummaryMetadata(tag).plugin_data.plugin_name == "pr_curves"
    return event.step, make_ndarray(event.tensor_proto)


def counts(probabilities: Tensor, truth: Tensor, thresholds: int) -> NDArray[np.float64]:
    """TP, FP, TN, FN [4, thresholds] by counting; positive is a probability of at least i / (thresholds - 1)."""
    scaled, actual = probabilities.numpy() * np.float32(thresholds - 1), truth.numpy()
    rows = []
    for i in range(thresholds):
        positive = scaled >= i
        rows.append([(positive & actual).sum(), (positive & ~actual).sum(), (~positive & ~actual).sum(),
                     (~positive & actual).sum()])  # fmt: skip
    return np.array(rows, np.float64).T


@pytest.mark.parametrize("index", range(10))
def test_pr_curves_follow_from_the_truth_and_the_probabilities(seen: Seen, index: int) -> None:
    step, curve = pr_curve(seen.events, datasets.GARMENTS[index])
    assert step == 120
    assert curve.shape == (6, 127)
    probabilities, truth = seen.evaluation.probabilities[:, index], seen.dataset.test.labels == index
    expected = counts(probabilities, truth, 127)
    assert np.array_equal(curve[:4], expected)
    found, false, _, missed = expected
    np.testing.assert_allclose(curve[4], found / np.maximum(found + false, 1), rtol=1e-6)
    np.testing.assert_allclose(curve[5], found / (found + missed), rtol=1e-6)
    # The exact curve has a point at every probability; TensorBoard's 127 lie on it.
    thresholds, precision, recall = seen.evaluation.precision_recall(index)
    for i in range(127):
        above = np.flatnonzero(thresholds.float().numpy() * np.float32(126) >= i)
        point = (float(precision[above[-1]]), float(recall[above[-1]])) if len(above) else (0, 0)
        assert (curve[4, i], curve[5, i]) == pytest.approx(point)


def test_pr_curves_are_drawn_of_the_truth_and_not_of_the_guesses(seen: Seen) -> None:
    guesses = seen.evaluation.probabilities.argmax(1)
    curves = [pr_curve(seen.events, name)[1] for name in datasets.GARMENTS]
    assert [curve[0, 0] for curve in curves] == [6] * 10  # all positives, of 60 balanced images
    assert guesses.bincount(minlength=10).tolist() != [6] * 10


def test_pr_curves_take_thresholds_weights_and_a_tag(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    folder, events = run_small(
        *only("pr_curves"), "stage.pr_curves.num_thresholds=11", "stage.pr_curves.weights=2.5",
        "stage.pr_curves.tag='curves/{class}'", "+stage.keep={_target_:test_stages.keep,when:end}",
    )  # fmt: skip
    labels = datasets.synthetic(64, 40, 28, 0).test.labels
    for index, name in enumerate(datasets.GARMENTS):
        _, curve = pr_curve(events, f"curves/{name}")
        assert curve.shape == (6, 11)
        expected = counts(KEPT[str(folder)].probabilities[:, index], labels == index, 11)
        assert np.array_equal(curve[:4], 2.5 * expected)


# per_class_accuracy and confusion_matrix


def numpy_confusion(seen: Seen) -> NDArray[np.int64]:
    table = np.zeros((10, 10), np.int64)
    guesses = seen.evaluation.probabilities.numpy().argmax(1)
    for label, guess in zip(seen.dataset.test.labels.tolist(), guesses.tolist(), strict=True):
        table[label, guess] += 1
    return table


def test_per_class_accuracy_is_in_scalars_and_in_the_log(seen: Seen) -> None:
    table = numpy_confusion(seen)
    log = (seen.folder / "fmexp.log").read_text()
    assert "accuracy of each class on the test split" in log
    for index, name in enumerate(datasets.GARMENTS):
        ((step, value),) = scalars(seen.events, f"within_class_accuracy/{name}")
        assert step == 120
        assert value == pytest.approx(table[index, index] / 6, abs=1e-7)
        assert f"\n  {name:<11} {table[index, index] / 6:7.1%}\n" in log
    assert table.trace() / 60 == pytest.approx(scalars(seen.events, "test/accuracy")[-1][1])


def test_confusion_matrix_shows_the_share_of_each_class(seen: Seen) -> None:
    table = numpy_confusion(seen)
    (event,) = seen.events.Images("view/confusion_matrix")
    assert event.step == 120
    assert picture(event.encoded_image_string).shape == (430, 700, 3)
    (drawn,) = seen.figures["view/confusion_matrix", 120]
    assert drawn.title == f"accuracy {table.trace() / 60:.1%}, 60 test images"
    assert drawn.texts == {
        (row, column): f"{100 * table[row, column] / 6:.0f}" for row, column in np.argwhere(table).tolist()
    }
    assert drawn.labels == ("predicted (% of the actual class)", "actual", list(datasets.GARMENTS))
    np.testing.assert_allclose(drawn.image, table / 6)


def matrix(counts: list[list[int]], names: Sequence[str], patch: pytest.MonkeyPatch) -> tuple[Figure, Bytes]:
    """The figure that `confusion_matrix` draws of these counts, and its picture."""
    found: list[tuple[Figure, Bytes]] = []

    def add_figure(run: Run, tag: str, figure: Figure) -> None:
        fmexp.stages.figures.add_figure(run, tag, figure)
        found.append((figure, pictures.pop()))

    pictures: list[Bytes] = []
    patch.setattr(confusion_matrix, "add_figure", add_figure)
    run = SimpleNamespace(
        evaluation=SimpleNamespace(confusion=torch.tensor(counts)), dataset=SimpleNamespace(classes=names), step=7,
        writer=SimpleNamespace(add_image=lambda tag, image, step, dataformats: pictures.append(image)),
    )  # fmt: skip
    confusion_matrix.confusion_matrix(run, tag="any")  # type: ignore[arg-type]
    return found[0]


def test_shares_say_0_or_100_only_where_none_or_all_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [[996, 4, 0], [3, 125, 872], [0, 0, 0]]
    figure, _ = matrix(counts, ["a", "b", "c"], monkeypatch)
    (drawn,) = Drawn.of(figure)
    assert drawn.texts == {(0, 0): ">99", (0, 1): "<1", (1, 0): "<1", (1, 1): "12", (1, 2): "87"}
    assert drawn.title == "accuracy 56.0%, 2,000 test images"
    assert matrix([[9999, 1], [0, 10000]], ["a", "b"], monkeypatch)[0].axes[0].get_title().startswith("accuracy >99.9%")
    assert Drawn.of(matrix([[5, 0], [0, 5]], ["a", "b"], monkeypatch)[0])[0].texts == {(0, 0): "100", (1, 1): "100"}
    colour_bar = figure.axes[1]
    assert [label.get_text() for label in colour_bar.get_yticklabels()] == ["0%", "50%", "100%"]


@pytest.mark.parametrize(
    ("classes", "size", "named", "numbered"),
    [(2, (430, 700), 2, True), (30, (860, 1400), 30, True), (100, (860, 1400), 34, False)],
)
def test_a_confusion_matrix_fits_a_screen_and_its_words_their_places(
    classes: int, size: tuple[int, int], named: int, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = (torch.eye(classes, dtype=torch.int64) * 95 + 1).tolist()
    names = [f"a rather long class name {index}" for index in range(classes)]
    figure, sheet = matrix(counts, names, monkeypatch)
    assert sheet.shape == (*size, 3)
    axes = figure.axes[0]
    assert len(axes.texts) == (classes**2 if numbered else 0)
    labels = axes.get_yticklabels()
    assert len({label.get_text() for label in labels}) == len(labels) == named  # cut, but not all to the same
    assert max(len(label.get_text()) for label in labels) == 16
    boxes = [label.get_window_extent() for label in (*labels, *axes.get_xticklabels(), axes.title, axes.xaxis.label)]
    assert all(box.x0 >= 0 and box.x1 <= size[1] and box.y0 >= 0 and box.y1 <= size[0] for box in boxes)
    edges = sorted((box.y0, box.y1) for box in boxes[:named])
    assert all(above[0] > below[1] - 3 for below, above in itertools.pairwise(edges))  # a letter's box has a margin
    widest = max((text.get_window_extent().width for text in axes.texts), default=0)
    assert widest < axes.get_window_extent().width / classes


# Every stage at every moment, and the weights after it


class Frail(nn.Sequential):
    """What is easily disturbed: Dropout draws random numbers, BatchNorm remembers each forward pass."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(input_shape[0], 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
            nn.Linear(4 * 8 * 8, num_classes),
        )  # fmt: skip


FRAIL = ("model._target_=test_stages.Frail", "dataset.train_size=16", "dataset.test_size=20", "train.log_every=2",
         "train.epochs=2")  # fmt: skip
STEPS = {"start": [0], "log": [2, 4, 6, 8], "epoch": [4, 8], "end": [8]}
Trace = set[tuple[str, int]]


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run the frail model with some overrides, each combination once; returns the folder."""

    @cache
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("frail")
        cfg = small(*FRAIL, *overrides)
        if "broken" in cfg.stage:
            cfg.stage.broken.required = False
        execute(cfg, folder)
        return folder

    return run


def alone(name: str, moment: str) -> list[str]:
    return [*only(name), f"stage.{name}.when={moment}"]


def traces(folder: Path) -> Iterator[tuple[str, int]]:
    """A (tag, step) for all that stands in a run's folder for TensorBoard; a graph has no step, but a number."""
    graphs = 0
    for path in folder.glob("events.out.tfevents.*"):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            yield from ((value.tag, event.step) for value in event.summary.value)
            if event.HasField("graph_def"):
                yield "graph", graphs
                graphs += 1
    yield from (("projector", int(path.parent.parent.name)) for path in folder.glob("[0-9]*/*/tensors.tsv"))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_writes_at_the_moment_it_is_moved_to_and_disturbs_nothing(
    name: str, moment: str, frail: Callable[..., Path]
) -> None:
    bare, folder = frail(*only()), frail(*alone(name, moment))
    own = set(traces(folder)) - set(traces(bare))
    assert own, f"{name} wrote nothing"
    if ("graph", 0) in own:
        assert len(own) == len(STEPS[moment])
    else:
        for tag in {tag for tag, _ in own}:
            assert sorted(step for other, step in own if other == tag) == STEPS[moment]
    assert_same_weights(folder, bare)


def test_a_stage_that_is_off_writes_nothing_and_all_together_disturb_nothing(frail: Callable[..., Path]) -> None:
    bare = set(traces(frail(*only())))
    assert {("train/loss", step) for step in STEPS["log"]} < bare
    own = {name: set(traces(frail(*alone(name, "log")))) - bare for name in STAGES}
    together = frail(*(f"stage.{name}.when=log" for name in STAGES))
    assert set(traces(together)) - bare == set().union(*own.values())
    assert sum(map(len, own.values())) == len(set().union(*own.values()))  # no two share a tag
    assert_same_weights(together, frail(*only()))
    assert_same_weights(frail(), frail(*only()))  # at their own moments


def test_one_stage_can_be_turned_off_among_others(frail: Callable[..., Path]) -> None:
    some = ["image_grid", "projector", "pr_curves", "per_class_accuracy"]
    bare, together = set(traces(frail(*only()))), set(traces(frail(*only(*some))))
    for name in some:
        moment = str(compose().stage[name].when.name)
        without = set(traces(frail(*only(*some), f"stage.{name}.enabled=false")))
        assert together - without == set(traces(frail(*alone(name, moment)))) - bare


def rude(run: Run) -> None:
    """A stage without manners."""
    torch.rand(3)
    np.random.rand(3)
    random.random()
    torch.manual_seed(99)
    run.model.train()
    images, labels = run.batch
    for _ in range(2):
        nn.functional.cross_entropy(run.model(images), labels).backward()
    assert all(parameter.grad is not None for parameter in run.model.parameters())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rude_stage_disturbs_nothing(moment: str, frail: Callable[..., Path]) -> None:
    folder = frail(*only(), f"+stage.rude={{_target_:test_stages.rude,when:{moment}}}")
    assert_same_weights(folder, frail(*only()))
    assert set(traces(folder)) - set(traces(frail(*only()))) == set()


def test_looking_leaves_everything_as_it_was() -> None:
    model = Frail(input_shape=(1, 28, 28), num_classes=3)
    model.train()
    model[1].eval()  # frozen
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients if gradient is not None]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False))
    drawn = []
    for _ in range(2):
        with eval_mode(model, 5):
            assert not any(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
            model.train()
            model(torch.randn(2, 1, 28, 28)).sum().backward()
    with pytest.raises(RuntimeError), eval_mode(model, 5):
        raise RuntimeError
    assert drawn[0] == drawn[1]  # its own numbers, the same each time
    assert [module.training for module in model] == [True, False, True, True, True, True]
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(value, gradient)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert (random.getstate(), repr(np.random.get_state(legacy=False))) == random_state[1:]


# Stages from outside, and stages that fail


def test_a_stage_of_ones_own_is_one_function_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_stage.py").write_text(
        '"""A stage from outside."""\n\n\ndef brightness(run, *, tag):\n'
        "    run.writer.add_scalar(tag, float(run.dataset.train.images.float().mean()), run.step)\n"
    )
    (tmp_path / "conf" / "stage").mkdir(parents=True)
    (tmp_path / "conf" / "stage" / "own.yaml").write_text(
        "# How bright the data are.\nown:\n  _target_: own_stage.brightness\n  when: log\n  tag: brightness\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["dataset=synthetic", "dataset.train_size=16", "dataset.test_size=10", "train.log_every=2", *only()]
    cfg = compose([*overrides, "device=cpu", "+stage=own", "stage.own.tag=mean"], config_dir=tmp_path / "conf")
    execute(cfg, tmp_path / "run")
    mean = float(datasets.synthetic(16, 10, 28, 0).train.images.double().mean())
    found = scalars(read_events(tmp_path / "run"), "mean")
    assert found == [(2, pytest.approx(mean)), (4, pytest.approx(mean))]


def broken(run: Run) -> None:
    run.scalar("written before", 1.0)
    raise ZeroDivisionError("what a stage can get wrong")


BROKEN = "+stage.broken={{_target_:test_stages.broken,when:{}}}"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stage_that_fails_is_named_and_ends_nothing(moment: str, frail: Callable[..., Path]) -> None:
    folder = frail(*only("per_class_accuracy"), BROKEN.format(moment))
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "complete"
    message = "ZeroDivisionError: what a stage can get wrong"
    assert result["failures"] == {"broken": f"step {STEPS[moment][-1]}: {message}"}
    log = (folder / "fmexp.log").read_text()
    for step in STEPS[moment]:
        assert f"stage broken failed at step {step}; the run goes on without it" in log
    assert log.count("Traceback (most recent call last)") == len(STEPS[moment])
    assert "in broken\n" in log
    last = log[log.rindex("accuracy of each class") :]
    assert f"stage broken failed, step {STEPS[moment][-1]}: {message}" in last
    # The stages after it were executed, and the training is what it was.
    assert len(scalars(read_events(folder), f"within_class_accuracy/{datasets.GARMENTS[0]}")) == 1
    assert_same_weights(folder, frail(*only()))


def test_a_required_stage_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="what a stage can get wrong"):
        execute(small(*FRAIL, *only(), BROKEN.format("epoch")), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("failed", 4)
    assert result["objective"] is None
    assert result["error"] == "ZeroDivisionError: what a stage can get wrong"
    assert "the run failed at step 4" in (tmp_path / "fmexp.log").read_text()
    assert not (tmp_path / "model.pt").exists()


def test_what_a_stage_shows_depends_on_the_seed_and_not_on_other_stages(frail: Callable[..., Path]) -> None:
    def shown(*overrides: str) -> bytes:
        (event,) = read_events(frail(*overrides)).Images("view/images")
        return bytes(event.encoded_image_string)

    assert shown() == shown(*alone("image_grid", "start"))
    assert shown() != shown(*alone("image_grid", "start"), "seed=1")
