"""predictions: what the model says of the current batch, drawn as the tutorial does."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tools
import torch
from matplotlib.figure import Figure
from stages_tools import Bytes, Drawn, Seen, final_model, picture
from torch import Tensor, nn

import fmexp.stages.figures
from fmexp import datasets
from fmexp.datasets import Dataset, Split
from fmexp.run import Run
from fmexp.stages import predictions

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


def test_a_mixtures_label_is_the_class_that_has_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one_hot = torch.eye(10)[[7, 0]]
    (drawn, _), (mixed, _) = (
        look(Knows([[0.0] * 9 + [1.0]] * 2), labels, 2, monkeypatch)  # type: ignore[arg-type]
        for labels in ([7, 0], (0.7 * one_hot + 0.3 * one_hot.roll(1, 0)).tolist())
    )
    assert [one.title for one in mixed] == [one.title for one in drawn]


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
        "import sys, tempfile; sys.path[:0] = sys.argv[1:]; from tools import small; from fmexp import execute\n"
        "execute(small('train.max_steps=4'), tempfile.mkdtemp())\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(Path(tools.__file__).parent), str(Path(fmexp.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "False"]
