"""Figures that are used again draw what fresh ones draw."""

from collections.abc import Callable
from typing import Any

import pytest
from tools import small

from fmexp.stages import figures


def test_a_reused_figure_draws_the_pixels_of_a_fresh_one(run_small: Callable[..., Any]) -> None:
    figures._blank.cache_clear()
    only = [f"stage.{name}.enabled=false" for name in small().stage if name != "predictions"]
    _, reused = run_small(*only, name="reused")  # 4 figures, of which the first one is fresh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_blank", figures._blank.__wrapped__)
        _, fresh = run_small(*only, name="fresh")
    tag = "view/predictions"
    pictures = [image.encoded_image_string for image in reused.Images(tag)]
    assert len(pictures) == 4
    assert pictures == [image.encoded_image_string for image in fresh.Images(tag)]
    assert len(set(pictures)) == 4
