"""mistakes: which images are chosen, and what is said of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from stages_tools import Bytes, Drawn, Seen, catch, picture
from torch import Tensor

from fmexp.datasets import Dataset, Split
from fmexp.engine.evaluation import Evaluation
from fmexp.stages import mistakes

NAMES = "cat", "dog", "owl"


class Mapped(torch.utils.data.Dataset[Any]):
    """A split as map-style data, of bytes or of normalised float32."""

    def __init__(self, split: Split, dataset: Dataset | None = None) -> None:
        self.split, self.dataset = split, dataset

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.split.images[index]
        return self.dataset.normalise(image[None])[0] if self.dataset else image, int(self.split.labels[index])


def look(
    dataset: Dataset, evaluation: Evaluation, images: int, patch: pytest.MonkeyPatch, split: str = "test"
) -> tuple[Figure, list[Drawn], Bytes]:
    """The figure that `mistakes` draws of an evaluation, what stands in it, and its picture."""
    figures, pictures, writer = catch(mistakes, patch)
    run = SimpleNamespace(
        dataset=dataset, evaluation=evaluation, step=7, writer=writer, split=split, split_name=f"{split} split's"
    )
    mistakes.mistakes(run, tag="any", images=images)  # type: ignore[arg-type]
    return figures[0], Drawn.of(figures[0]), pictures[0]


def test_the_surest_mistakes_of_a_run_come_first(seen: Seen) -> None:
    (event,) = seen.events.Images("view/mistakes")
    assert event.step == 120
    split, classes = seen.dataset.test, seen.dataset.classes
    wrong = []
    for index, (chances, label) in enumerate(
        zip(seen.evaluation.probabilities.tolist(), split.labels.tolist(), strict=True)
    ):
        guess = chances.index(max(chances))
        if guess != label:
            wrong.append((-chances[guess], index, guess, label))
    assert len(wrong) > 8
    figure = seen.figures["view/mistakes", 120]
    assert picture(event.encoded_image_string).shape == (460, 700, 3)
    for drawn, (chance, index, guess, label) in zip(figure, sorted(wrong)[:8], strict=True):
        assert drawn.title == f"{classes[guess]}\n{-chance:.1%}\nlabel: {classes[label]}"
        assert drawn.colour == "red"
        assert np.array_equal(np.rint(drawn.image * 255), split.images[index, 0].numpy())


# Images 1, 3, 4 and 5 are wrong, 4 as surely as 1.
CHANCES = torch.tensor([[1, 0, 0], [0.25, 0.75, 0], [0, 0, 1], [0, 0.125, 0.875], [0.75, 0, 0.25], [0.5, 0.5, 0]])
LABELS = torch.tensor([0, 0, 2, 0, 2, 1])
SUREST = [3, 1, 4, 5]
TITLES = ["owl\n87.5%\nlabel: cat", "dog\n75.0%\nlabel: cat", "cat\n75.0%\nlabel: owl", "cat\n50.0%\nlabel: dog"]


@pytest.mark.parametrize("count", [1, 3, 4, 100])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["memory", "bytes", "normalised"])
def test_the_images_are_the_evaluated_ones(
    kind: str, channels: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    test = Split(torch.randint(0, 256, (6, channels, 9, 7), dtype=torch.uint8, generator=draw), LABELS)
    train = Split(255 - test.images, LABELS)  # other images, which are not meant
    dataset = Dataset(train, test, NAMES, (0.4,) * channels, (0.3,) * channels)
    if kind != "memory":
        parts = (Mapped(split, dataset if kind == "normalised" else None) for split in (train, test))
        dataset = Dataset(*parts, NAMES, dataset.mean, dataset.std)
    _, drawn, _ = look(dataset, Evaluation(CHANCES, LABELS, 0.0), count, monkeypatch)
    assert [one.title for one in drawn] == TITLES[:count]
    for one, index in zip(drawn, SUREST, strict=False):
        expected = test.images[index].permute(1, 2, 0).squeeze(-1).numpy()
        assert np.array_equal(np.rint(one.image * 255), expected)


def test_during_training_they_are_of_the_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    val = Split(torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 9, 7), LABELS)
    other = Split(255 - val.images, LABELS)
    _, drawn, _ = look(Dataset(other, other, NAMES, val=val), Evaluation(CHANCES, LABELS, 0.0), 4, monkeypatch, "val")
    assert [int(np.rint(one.image * 255).max()) for one in drawn] == SUREST


def test_without_a_mistake_the_picture_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.zeros(6, 1, 9, 7, dtype=torch.uint8), LABELS)
    right = Evaluation(torch.eye(3)[LABELS], LABELS, 0.0)
    figure, drawn, sheet = look(Dataset(split, split, NAMES), right, 8, monkeypatch)
    assert [text.get_text() for text in figure.texts] == ["no mistake in 6 test split's images"]
    assert drawn == []
    assert sheet.min() < 100
