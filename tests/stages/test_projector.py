"""projector: the embeddings, their classes and pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stages_tools import Seen, final_model, find, only, read_embedding
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tools import small
from torch import Tensor

from fmexp import datasets, execute
from fmexp.errors import ConfigError

# projector


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
