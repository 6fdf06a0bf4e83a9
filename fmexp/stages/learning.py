"""How each layer learns: weights, gradients, and what the last update did to them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fmexp.run import Run, reads_last_update
from fmexp.stages.figures import TAGS


class _Part(NamedTuple):
    """A parameter of a layer, and what the last update had of it."""

    name: str
    weight: Tensor
    gradient: Tensor
    change: Tensor


@reads_last_update
def learning(run: Run, *, tag: str, histograms: bool) -> None:
    """Write scalars for each layer, of all its trained parameters together, at the last update:

    - <tag>_norm/<layer>: the norm of its weights, as they are now;
    - <tag>_grad_norm/<layer>: that of its gradient as the optimizer took it, accumulated and clipped;
    - <tag>_update_ratio/<layer>: that of the change of its weights / that of the weights; none where these are 0.

    Before the first update there are weights alone. With more than 100 layers: those with the most weights.
    """
    assert run.last_update is not None
    made = run.last_update.made
    for layer, parts in _largest(_layers(run)).items():
        norm = _norm(part.weight for part in parts)
        run.writer.add_scalar(f"{tag}_norm/{layer}", norm, run.step)
        if made:
            run.writer.add_scalar(f"{tag}_grad_norm/{layer}", _norm(part.gradient for part in parts), run.step)
        if made and norm:
            ratio = _norm(part.change for part in parts) / norm
            run.writer.add_scalar(f"{tag}_update_ratio/{layer}", ratio, run.step)
        for part in parts if histograms else ():
            _add_histogram(run, f"{tag}_histogram/{part.name}", part.weight)
            if made:
                _add_histogram(run, f"{tag}_grad_histogram/{part.name}", part.gradient)


def _layers(run: Run) -> dict[str, list[_Part]]:
    """The trained parameters by the module that has them; those of the model itself by their own names."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    last, layers = run.last_update, dict[str, list[_Part]]()
    assert last is not None
    for weight, gradient, change in zip(last.parameters, last.gradients, last.changes, strict=True):
        if name := names.get(id(weight)):
            part = _Part(name, weight.detach(), gradient, change)
            layers.setdefault(name.rpartition(".")[0] or name, []).append(part)
    return layers


def _largest(layers: dict[str, list[_Part]]) -> dict[str, list[_Part]]:
    """The TAGS layers with the most weights, the first ones where equal, in their order."""
    sizes = {layer: sum(part.weight.numel() for part in parts) for layer, parts in layers.items()}
    shown = set(sorted(layers, key=lambda layer: -sizes[layer])[:TAGS])
    return {layer: parts for layer, parts in layers.items() if layer in shown}


def _norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all the numbers of some tensors."""
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])))


def _add_histogram(run: Run, tag: str, tensor: Tensor) -> None:
    values = tensor[tensor.isfinite()]  # NumPy has no bins for others
    if len(values):
        run.writer.add_histogram(tag, values, run.step)
