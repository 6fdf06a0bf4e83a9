"""Weights to begin from: of a run, of a file of PyTorch's, or of safetensors; what fits the model is taken."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmexp.errors import ConfigError, FmexpError, first_line
from fmexp.rundir import layout, results

NAMED = 6  # how many keys a message names


def load(model: nn.Module, path: str, *, strict: bool = False) -> str:
    """Load into a model what fits it, tensors of the same name and shape; returns in words what that was.

    Args:
        path: the folder of a complete run, or a file with a state_dict, of torch.save or of safetensors.
        strict: refuse a file that has not all of the model's keys in their shapes, or that has more.

    Raises:
        ConfigError: it cannot be read, or nothing in it fits, or, where `strict`, not all.
    """
    file, own = _file(Path(path).absolute()), model.state_dict()
    # What DistributedDataParallel and torch.compile put before the names.
    bare = {k if k in own else k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in _read(file).items()}
    fitting = {key: bare[key] for key in own if key in bare and _shape(bare[key]) == _shape(own[key])}
    left = [f"{key} ({_shape(bare[key]) if key in bare else 'not'} there, {_shape(value)} here)"
            for key, value in own.items() if key not in fitting]  # fmt: skip
    more = [key for key in bare if key not in own]
    said = f"{len(fitting)} of the model's {len(own)} keys fit those of {file}"
    said += f"; left as they were: {_listed(left)}" if left else ""
    said += f"; not in the model: {_listed(more)}" if more else ""
    if not fitting:
        raise ConfigError(f"weights={path}: {said}. They are of another model.")
    if strict and (left or more):
        raise ConfigError(f"weights={path}: {said}. weights_strict=false takes what fits.")
    model.load_state_dict(fitting, strict=False)
    return said


def _file(path: Path) -> Path:
    """The file that a path means: of a run's folder its model.pt."""
    if not path.is_dir():
        return path
    if layout.holds_run(path):
        try:
            results.read_complete(path)  # model.pt may be that of before it was trained further
        except FmexpError as error:
            raise ConfigError(f"weights={error} Or name a complete run, or a file.") from error
    elif not (path / layout.WEIGHTS).is_file():
        raise ConfigError(f"weights={path}: the folder has no model.pt. Name that of a complete run, or a file.")
    return path / layout.WEIGHTS


def _read(file: Path) -> dict[str, Any]:
    """The state_dict of a file, on the CPU; also one under the key "state_dict" or "model", as in checkpoints."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ConfigError(f"weights={file} needs safetensors: pip install safetensors") from None
    except Exception as error:  # whatever a damaged file makes them raise
        way_out = "A file of PyTorch's has to hold tensors alone, as of torch.save(model.state_dict(), file)."
        said = error.strerror if isinstance(error, OSError) and error.strerror else f"{first_line(error)}\n{way_out}"
        raise ConfigError(f"weights={file} cannot be read: {said}") from error
    for key in ("state_dict", "model"):
        held = held[key] if isinstance(held, dict) and isinstance(held.get(key), dict) else held
    if not isinstance(held, dict) or not any(isinstance(value, Tensor) for value in held.values()):
        raise ConfigError(f"weights={file} holds no state_dict: names with their tensors.")
    return held


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a number" if isinstance(value, Tensor) else type(value).__name__


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
