"""A complete run's model from its folder alone, with the names of the classes and what makes pictures its input.

In short:

    classifier = fmexp.load("runs/2026-01-31/12-00-00-000000")
    probabilities = classifier.predict(["shirt.jpg", "bag.png"])  # [2, K]
    classifier.classes[int(probabilities[0].argmax())]

It calls what the run's configuration names as its model: load the runs alone of people whose code you would run.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from fmexp import datasets, models, rng
from fmexp.build import build_model
from fmexp.config import schema, validate
from fmexp.datasets import pictures
from fmexp.engine import backend
from fmexp.engine.evaluation import BATCH, compute_logits
from fmexp.errors import ConfigError, DataError, FmexpError, first_line
from fmexp.process import available_cores
from fmexp.run import eval_mode
from fmexp.rundir import bounded, layout, results

Picture = Image.Image | str | os.PathLike[str]


@dataclass(frozen=True)
class Classifier:
    """The trained model of a run, and all that is needed to ask it about pictures.

    Attributes:
        model: in eval mode, on the device; it takes float32 [B, C, H, W], normalised, and returns logits [B, K].
        classes: the names of the K classes.
        dataset: of the run's, all but the images: input_shape, mean, std; its splits are a black image each.
        config: the run's configuration, resolved.
        backend: how the arithmetic is done: as in the run's own evaluations, so that the bits are those.
    """

    folder: Path
    model: nn.Module
    classes: list[str]
    dataset: datasets.Dataset
    config: dict[str, Any]
    device: torch.device
    backend: backend.Backend

    def preprocess(self, picture: Image.Image) -> Tensor:
        """A picture of any size and mode as the model takes it: float32 [C, H, W], normalised, on the CPU.

        It is turned as its camera was held, made grey or RGB, and brought to the size of the run's images as those
        were, or, where the run had arrays, squeezed into it.

        Raises:
            ConfigError: the run's images are neither grey nor RGB, so that no picture can be one.
        """
        upright = pictures.upright(picture)
        array = pictures.pixels(upright, self._channels, self.dataset.input_shape[1:], self.dataset.fit)
        return self.dataset.normalise(torch.from_numpy(array))

    def open(self, path: str | os.PathLike[str]) -> Tensor:
        """The picture of a file, as `preprocess` gives it.

        Raises:
            DataError: it cannot be read.
        """
        assert self._channels  # raises before the file could be blamed
        with pictures.opened(Path(path).absolute()) as picture:
            return self.preprocess(picture)

    @property
    def _channels(self) -> int:
        channels = self.dataset.input_shape[0]
        if channels not in (1, 3):
            raise ConfigError(
                f"The images of {self.folder} have {channels} channels, and a picture has 1 or 3. "
                "Give predict a tensor of images."
            )
        return channels

    def predict(self, images: Tensor | Picture | Iterable[Picture]) -> Tensor:
        """The probability of each class, float32 [N, K] on the CPU, for N images, which are computed in batches.

        Args:
            images: PIL images, paths of pictures, or both; or a tensor [N, C, H, W] of the run's shape, uint8, or
                float32 that is normalised already.

        Raises:
            DataError: a picture cannot be read; the message names it.
            ConfigError: the tensor has another shape or type.
        """
        found = list(self.probabilities(self._batches(images)))
        return torch.cat(found) if found else torch.empty(0, len(self.classes))

    @torch.no_grad()
    def probabilities(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same for one batch after another, float32 [B, C, H, W], such as `preprocess` makes.

        The probabilities are those of the run to the bit where the batches are: of evaluation.BATCH images, in its
        order, on its kind of device. Until it is read to its end the global random state is that of an evaluation.
        """
        seed = rng.derive_seed(int(self.config["seed"]), "evaluation")
        with eval_mode(self.model, seed), self.backend.applied():
            for images in batches:
                logits = compute_logits(self.model, images.to(self.device), self.backend.memory_format)
                yield F.softmax(logits, 1)

    def _batches(self, images: Tensor | Picture | Iterable[Picture]) -> Iterator[Tensor]:
        if isinstance(images, Tensor):
            shape, kinds = self.dataset.input_shape, (torch.uint8, torch.float32)
            if images.ndim != 4 or tuple(images.shape[1:]) != shape or images.dtype not in kinds:
                raise ConfigError(
                    f"predict was given {images.dtype} {list(images.shape)}; it takes uint8, or float32 that is "
                    f"normalised, {['N', *shape]}. PIL images and paths may be of any size."
                )
            yield from (self.dataset.ready(part.to(self.device)) for part in images.split(BATCH) if len(part))
            return
        rest = iter([images] if isinstance(images, Image.Image | str | os.PathLike) else images)
        while some := list(islice(rest, BATCH)):
            yield torch.stack([_raised(one) for one in pictures.attempt(self._ready, some)])

    def _ready(self, picture: Picture) -> Tensor:
        return self.preprocess(picture) if isinstance(picture, Image.Image) else self.open(picture)


def load(run_folder: str | Path, device: str = "cpu") -> Classifier:
    """Load the model of a complete run from its folder, which may have been moved; its dataset is not needed.

    The model is built by calling what the run's configuration names, which may be anybody's code: load the runs alone
    of people whose code you would run. The weights are read as data.

    Args:
        device: auto, cpu, cuda, cuda:1, mps. On the CPU of the run's machine the results are the run's to the bit.

    Raises:
        FmexpError: there is no run, or it has no trained weights, or its files are damaged or do not fit each other.
        ConfigError: the model cannot be built, such as where code of one's own is not on PYTHONPATH; no such device.
    """
    run = results.read_complete(run_folder)
    validate.check_device(device)
    place = backend.find_device(device)
    folder = run.folder.absolute()
    dataset, tree = _dataset(folder, run.content), layout.read_config(folder)
    cfg = _model_config(folder, tree)
    few = dataset.normalise(torch.zeros(2, *dataset.input_shape, dtype=torch.uint8)).to(place)
    with rng.fork(0), models.weights_come_later():
        model = build_model(cfg, dataset, few)
        with eval_mode(model, 0):
            how = backend.choose(model, few, BATCH, **cfg.backend)
    load_weights(model, folder / layout.WEIGHTS)
    how = as_evaluated(how, run.content.get("evaluation_backend"))
    return Classifier(folder, model.eval(), [*dataset.classes], dataset, tree, place, how)


def _dataset(folder: Path, content: dict[str, Any]) -> datasets.Dataset:
    """What result.json keeps of the run's dataset, as one without images."""
    file = folder / layout.RESULT
    if "dataset" not in content:
        raise FmexpError(f"{file} does not say what the images were: an earlier fmexp has written it. Train again.")
    try:
        return datasets.blank(content["dataset"])
    except Exception as error:  # whatever values of wrong types make it raise
        raise FmexpError(f"{file} is damaged: its dataset: {type(error).__name__}: {first_line(error)}") from error


def _model_config(folder: Path, tree: dict[str, Any]) -> DictConfig:
    """Of a run's configuration what its model is built of. Nothing in it is resolved."""
    try:
        cfg = OmegaConf.create({key: tree[key] for key in ("seed", "dataset", "model")})
        if "${" in OmegaConf.to_yaml(cfg):
            raise ValueError("it interpolates, and no run writes that")
        for key in ("dataset", "model"):
            validate.check_target(key, cfg[key])
        if type(cfg.seed) is not int:
            raise ValueError(f"seed={cfg.seed}")
        cfg.backend = OmegaConf.merge(OmegaConf.structured(schema.Backend), tree["backend"])
        validate.check_limits(cfg.backend, "backend")
    except Exception as error:  # whatever values of wrong types make OmegaConf raise
        raise FmexpError(f"{folder / layout.CONFIG} is damaged: {first_line(error)}") from error
    return cfg


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a model.pt.

    Raises:
        FmexpError: it cannot be read, or is of another model.
    """
    try:
        with bounded.open_regular(file) as opened:
            state = torch.load(opened, map_location="cpu", weights_only=True)
    except FmexpError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        raise FmexpError(
            f"{file} cannot be read: {first_line(error)}\nIt is damaged, or no file of a run. Copy it again, or train "
            "again in another folder."
        ) from error
    try:
        model.load_state_dict(state)
    except Exception as error:  # for keys and shapes a RuntimeError, for anything else what they are
        raise FmexpError(
            f"{file} does not fit the model of {layout.CONFIG} and the classes of {layout.RESULT}: {error}\n"
            "The files are of different runs, or code of your own has changed since."
        ) from error


def as_evaluated(how: backend.Backend, recorded: Any) -> backend.Backend:
    """The backend of the run's own evaluations, where it was on this kind of device and had no more cores."""
    if not isinstance(recorded, dict) or recorded.get("device") != how.device:
        return how
    threads = recorded.get("threads")
    if type(threads) is not int or not 1 <= threads <= max(available_cores(), how.threads):
        threads = how.threads
    onednn, channels_last = (bool(recorded.get(key, getattr(how, key))) for key in ("onednn", "channels_last"))
    return replace(how, threads=threads, onednn=onednn, channels_last=channels_last)


def _raised(one: Tensor | DataError) -> Tensor:
    if isinstance(one, DataError):
        raise one
    return one
