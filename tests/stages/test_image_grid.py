"""image_grid: the training images to the byte."""

from collections.abc import Callable
from pathlib import Path

from stages_tools import Seen, find, only, picture, tiles
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmexp import datasets
from fmexp.datasets import Split

# image_grid


def test_image_grid_shows_training_images_to_the_byte(seen: Seen) -> None:
    (event,) = seen.events.Images("view/images")
    assert event.step == 0
    sheet = picture(event.encoded_image_string)
    assert sheet.shape == (32, 122, 3)
    found = [find(tile, seen.dataset.train) for tile in tiles(sheet, 28, 28, 2)]
    assert len(set(found)) == 4
    assert found != [0, 1, 2, 3]  # random ones


def test_image_grid_shows_what_the_model_sees(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    mirrored = ("augment=crop_flip", "augment.padding=0", "augment.flip=1", "stage.image_grid.images=5")
    for augmented in ("true", "false"):
        _, events = run_small(*only("image_grid"), *mirrored, f"stage.image_grid.augmented={augmented}", name=augmented)
        split = datasets.synthetic(64, 40, 28, 0).train
        shown = Split(split.images.flip(-1) if augmented == "true" else split.images, split.labels)
        (event,) = events.Images("view/images")
        assert len({find(tile, shown) for tile in tiles(picture(event.encoded_image_string), 28, 28, 2)}) == 5


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
