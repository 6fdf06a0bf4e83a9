"""Random training images as people see them."""

from torchvision.utils import make_grid

from fmexp.run import Run


def image_grid(run: Run, *, tag: str, images: int, layout: str) -> None:
    """Write `images` random training images in display range, as one grid or (layout "images") one picture each."""
    pixels = run.dataset.displayable(run.dataset.sample(images)[0])
    if layout == "images":
        run.writer.add_images(tag, pixels, run.step, dataformats="NCHW")
    else:
        run.writer.add_image(tag, make_grid(pixels), run.step)
