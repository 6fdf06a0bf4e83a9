"""Random training images as points in the embedding projector."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fmexp.errors import ConfigError
from fmexp.run import Run


def projector(run: Run, *, tag: str, images: int, features: str | None) -> None:
    """Write `images` random training images as vectors, with their class names and thumbnails.

    The vectors are the pixels (float32 [N, C*H*W]), or the activations of the model's layer `features`, flattened.
    """
    pixels, labels = run.dataset.sample(images)
    thumbnails = run.dataset.displayable(pixels)
    height, width = thumbnails.shape[2:]
    side = max(height, width)  # TensorBoard takes square thumbnails alone
    run.writer.add_embedding(
        thumbnails.flatten(1) if features is None else _activations(run, pixels.to(run.device), features),
        metadata=[run.dataset.classes[label] for label in labels.tolist()],
        label_img=F.pad(thumbnails, (0, side - width, 0, side - height)),
        global_step=run.step,
        tag=tag,
    )


def _activations(run: Run, pixels: Tensor, features: str) -> Tensor:
    layers = dict(run.model.named_modules())
    if features not in layers:
        names = ", ".join(name for name in layers if name)
        raise ConfigError(f"stage.projector.features={features} is no layer of the model. There are: {names}.")
    caught: list[Tensor] = []
    hook = layers[features].register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        with torch.no_grad():
            run.model(pixels)
    finally:
        hook.remove()
    return caught[0].flatten(1).cpu()
