"""Random training images as people see them."""

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.image import metadata
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import make_grid

from fmexp.run import Run


def image_grid(run: Run, *, tag: str, images: int, layout: str) -> None:
    """Write `images` random training images in display range, as one grid or (layout "images") one picture each."""
    pixels = run.dataset.displayable(run.dataset.sample(images)[0])
    if layout == "images":
        _add_samples(run, tag, pixels)
    else:
        run.writer.add_image(tag, make_grid(pixels), run.step)


def _add_samples(run: Run, tag: str, pixels: Tensor) -> None:
    """Write float32 [N, C, H, W] in [0, 1] as N samples of one tag; the writer's own add_images makes a grid of them."""
    height, width = pixels.shape[2:]
    pictures = [encode_png(image).numpy().tobytes() for image in pixels.mul(255).round().to(torch.uint8)]
    tensor = TensorProto(dtype=DT_STRING, string_val=[str(width).encode(), str(height).encode(), *pictures])
    tensor.tensor_shape.dim.add(size=len(tensor.string_val))
    value = Summary.Value(tag=tag, tensor=tensor, metadata=metadata.create_summary_metadata(None, None))
    run.writer._get_file_writer().add_summary(Summary(value=[value]), run.step)
