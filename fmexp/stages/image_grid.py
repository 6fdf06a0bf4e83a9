"""Random training images as people see them."""

import io
import math

import torch.nn.functional as F
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.image import metadata
from torch import Tensor

from fmexp.run import Run


def image_grid(run: Run, *, tag: str, images: int, layout: str, augmented: bool) -> None:
    """Write `images` random training images in display range, as one grid or (layout "images") one picture each;
    `augmented`: as a batch of them is at the current step."""
    chosen, labels = run.dataset.sample(images, raw=augmented)
    if augmented:
        chosen, _ = run.augmented(chosen.to(run.device), labels.to(run.device), run.step)
    pixels = run.dataset.displayable(chosen)
    if layout == "images":
        _add_samples(run, tag, pixels)
    else:
        run.writer.add_image(tag, _grid(pixels), run.step)


def _grid(pixels: Tensor, columns: int = 8, border: int = 2) -> Tensor:
    """[N, C, H, W] -> [C, height, width], as torchvision's make_grid does, which takes a second or two to import."""
    count, channels = pixels.shape[:2]
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    cells = F.pad(pixels, (border, 0, border, 0, 0, 0, 0, rows * columns - count))
    height, width = cells.shape[2:]
    tiles = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return F.pad(tiles.reshape(channels, rows * height, columns * width), (0, border, 0, border))


def _add_samples(run: Run, tag: str, pixels: Tensor) -> None:
    """Write float32 [N, C, H, W] in [0, 1] as N samples of one tag, where the writer's add_images makes a grid."""
    height, width = pixels.shape[2:]
    pictures = [_png(image) for image in pixels]
    tensor = TensorProto(dtype=DT_STRING, string_val=[str(width).encode(), str(height).encode(), *pictures])
    tensor.tensor_shape.dim.add(size=len(tensor.string_val))
    value = Summary.Value(tag=tag, tensor=tensor, metadata=metadata.create_summary_metadata(None, None))
    run.writer._get_file_writer().add_summary(Summary(value=[value]), run.step)


def _png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    bytes_ = pixels.mul(255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    Image.fromarray(bytes_).save(file, "PNG")
    return file.getvalue()
