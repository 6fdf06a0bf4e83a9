"""Building a run from a configuration, with a message for whatever cannot be built."""

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmexp import datasets, process, rng, weights
from fmexp.config import Moment, maximised
from fmexp.config.hydra_versions import instantiate
from fmexp.engine import backend, evaluation
from fmexp.engine.distributed import World
from fmexp.engine.freeze import freeze, train_mode
from fmexp.engine.loss import Loss, weights_of_classes
from fmexp.engine.optim import build_optimizer
from fmexp.engine.schedule import Following, Schedule, varies
from fmexp.errors import CodeError, ConfigError, FmexpError
from fmexp.run import Run, Stage, eval_mode, steps_per_epoch, total_steps


def build(
    cfg: DictConfig, *, resumed: bool = False, dataset: datasets.Dataset | None = None, world: World | None = None
) -> Run:
    """Build all that a run is made of, and touch no folder.

    Args:
        dataset: in place of what `cfg.dataset` names.
        resumed: a checkpoint has the weights, so that those of `cfg.weights` are not wanted; their file may be gone.
        world: the processes that train the run together.

    Raises:
        ConfigError, DataError: something cannot be built; the message names the key and the way out.
    """
    device = backend.find_device(cfg.device)
    if world and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", process.local_rank() % torch.cuda.device_count())  # Slurm may show each its own
    processes = world.size if world else 1
    if cfg.train.batch_size < processes:
        raise ConfigError(
            f"train.batch_size={cfg.train.batch_size} is the whole batch, and fewer images than the {processes} "
            f"processes that divide it. Take train.batch_size={processes} or more, or start fewer processes."
        )
    rng.seed_all(cfg.seed)
    stages = [_stage(name, node) for name, node in cfg.stage.items() if node.get("enabled", True)]
    stages.sort(key=lambda stage: list(Moment.__members__).index(stage.when))  # as the run comes to them
    _bound("logging", cfg.logging, cfg.logging, log_dir="", comment="", purge_step=None)
    dataset = dataset or build_dataset(cfg)
    with rng.fork(rng.derive_seed(cfg.seed, "batch")):
        dataset = dataset.to(device)
        loaded, labels = (part.to(device) for part in dataset.sample(cfg.train.batch_size, raw=True))
    images, augment = dataset.ready(loaded), _augment(cfg, len(dataset.classes))
    few, keys, steps = images[:2], cfg.backend, total_steps(cfg, dataset)
    compiled, share = cfg.train.compile if processes == 1 else False, -(-cfg.train.batch_size // processes)
    model = build_model(cfg, dataset, few)
    begun_from = weights.load(model, cfg.weights, strict=cfg.weights_strict) if cfg.weights and not resumed else ""
    frozen = freeze(model, cfg.train.freeze)
    with eval_mode(model, cfg.seed):
        _check_last_batch(cfg, model, images[:1], datasets.length(dataset.train), steps, processes)
        how = backend.choose(model, few, share, **keys, compiled=compiled, steps=steps, processes=processes)
        how_evaluated = backend.choose(model, few, evaluation.BATCH, **keys)
    if cfg.train.accumulate > (batches := steps_per_epoch(cfg, dataset)):
        asked = f"train.accumulate={cfg.train.accumulate}"
        raise ConfigError(f"{asked} is more than the {batches} batches of an epoch. Take at most {batches}.")
    with _building("optimizer", cfg.optimizer):
        optimizer = build_optimizer(cfg.optimizer, model, frozen)
    _check_kind("optimizer", cfg.optimizer, optimizer, Optimizer)
    loss, schedule = _loss(cfg, dataset, device), _schedule(cfg, dataset, optimizer, batches, steps)
    run = Run(cfg, device, dataset, model, optimizer, loss, schedule, _average(cfg, model), stages, augment,
              (images, labels), how, how_evaluated, world, begun_from=begun_from)  # fmt: skip
    if augment:
        run.batch = _augmented(run, loaded, labels)
    return run


def build_dataset(cfg: DictConfig) -> datasets.Dataset:
    """The dataset, checked, with its validation split. It changes the global random state.

    Raises:
        ConfigError, DataError: it cannot be built, or nothing can be trained on it.
    """
    with _building("dataset", cfg.dataset):
        dataset = datasets.load(cfg.dataset)
        _check_kind("dataset", cfg.dataset, dataset, datasets.Dataset)
        datasets.check(dataset)
        return datasets.with_validation(dataset, cfg.train.validation)


@contextmanager
def _building(key: str, node: DictConfig, given: str = "") -> Iterator[None]:
    """Raise FmexpError, with key and target, for what goes wrong within the block."""
    try:
        yield
    except FmexpError:
        raise
    except Exception as error:
        raise _unbuildable(key, node, error, given) from error


def _unbuildable(key: str, node: DictConfig, error: BaseException, given: str = "") -> FmexpError:
    """The message for a target that cannot be imported or called, from Hydra's chain of exceptions."""
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, FmexpError):
        return cause
    target, said = f"{key}._target_={node._target_}", str(cause) or type(cause).__name__
    if isinstance(cause, OSError) and isinstance(cause.filename, str):
        said = f"{cause.strerror}: {Path(cause.filename).absolute()}"
    hint = f"\n{given}." if given else ""
    if isinstance(cause, ImportError | InstantiationException):
        return ConfigError(f"{target} cannot be imported: {said}\nCode of your own must be installed or on PYTHONPATH.")
    if isinstance(cause, TypeError) and "argument" in said:
        with suppress(Exception):
            hint = f"\nIts arguments are {', '.join(_arguments(node)) or 'those that fmexp gives alone'}."
    typed = isinstance(cause, ValueError | OSError) or "argument" in said  # what Python raises for a value or a file
    return (ConfigError if typed else CodeError)(f"{target} cannot be built: {said}{hint}")


def _arguments(node: DictConfig) -> list[str]:
    """The names of a target's arguments, but for those that fmexp gives it."""
    ours = ("run", "params", "input_shape", "num_classes", "log_dir", "logits", "labels", "step", "total",
            "steps_per_epoch", "maximised", "images", "generator")  # fmt: skip
    return [name for name in inspect.signature(hydra.utils.get_method(node._target_)).parameters if name not in ours]


def _bound(key: str, node: DictConfig, arguments: Any, *given: Any, **known: Any) -> partial[Any]:
    """The target of `node` with its arguments, after a check that it can be imported and takes them."""
    with _building(key, node):
        function: partial[Any] = instantiate(arguments, _partial_=True)
        inspect.signature(function.func).bind(*given, *function.args, **{**function.keywords, **known})
        return function


def _plain(function: partial[Any]) -> partial[Any]:
    """The same, for what each step calls: a partial of Hydra's checks its target at each call, which costs 0.1 ms."""
    return partial(function.func, *function.args, **function.keywords)


def _stage(name: str, node: DictConfig) -> Stage:
    arguments = {k: v for k, v in node.items() if k not in ("enabled", "required", "when", "changes")}
    function = _bound(f"stage.{name}", node, arguments, None)
    required, changes = (bool(node.get(switch, False)) for switch in ("required", "changes"))
    return Stage(name, str(getattr(node.when, "name", node.when)), required, changes, function)


def _augment(cfg: DictConfig, classes: int) -> datasets.augment.Augment | None:
    """What changes a batch, told how many classes there are where it asks; None for `none`, which so costs nothing."""
    arguments: Any = OmegaConf.to_container(cfg.augment, resolve=True)
    for step in _steps(arguments, dict).values():
        step["_partial_"] = True
    with _building("augment", cfg.augment):
        function: partial[Any] = instantiate(arguments, _partial_=True)
    for key, part in {"augment": function, **_steps(function.keywords, partial)}.items():
        with _building(key, OmegaConf.select(cfg, key)):
            signature = inspect.signature(part.func)
            part.keywords.update({"num_classes": classes} if "num_classes" in signature.parameters else {})
            signature.bind(None, None, None, **part.keywords)
    if isinstance(steps := function.keywords.get("steps"), dict):
        plain = {name: _plain(step) if isinstance(step, partial) else step for name, step in steps.items()}
        function.keywords["steps"] = plain
    return None if function.func is datasets.augment.none else _plain(function)


def _steps(arguments: dict[str, Any], kind: type) -> dict[str, Any]:
    """What a chain may name, by its key: those of its arguments' `steps` that are of a kind."""
    steps = arguments.get("steps")
    named = steps.items() if isinstance(steps, dict) else ()
    return {f"augment.steps.{name}": step for name, step in named if isinstance(step, kind)}


def _augmented(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A first batch, augmented, after a check that the model and the loss can take what comes of it."""
    name, classes = f"augment._target_={run.cfg.augment._target_}", len(run.dataset.classes)
    allowed = [len(images)], [len(images), classes]  # numbers, or probabilities
    try:
        with rng.fork(run.cfg.seed):
            pixels, targets = run.augmented(images, labels, 0)
    except FmexpError:
        raise
    except Exception as error:
        raise CodeError(f"{name} cannot take a batch, {images.dtype} {list(images.shape)}: {error}") from error
    kept = pixels.shape == images.shape and pixels.dtype == torch.float32  # which bytes are once they are normalised
    if not kept or list(targets.shape) != allowed[targets.is_floating_point()]:
        raise ConfigError(
            f"{name} makes images {pixels.dtype} {list(pixels.shape)} and labels {targets.dtype} "
            f"{list(targets.shape)} of images {images.dtype} {list(images.shape)}: images keep their shape, float32 "
            f"stays so, and labels are numbers {allowed[0]} or probabilities {allowed[1]}."
        )
    with _building("loss", run.cfg.loss, f"{name} makes labels {targets.dtype} {list(targets.shape)}"):
        run.loss(torch.zeros(len(images), classes, device=run.device), targets)
    return pixels, targets


def _loss(cfg: DictConfig, dataset: datasets.Dataset, device: torch.device) -> Loss:
    """The loss, which has been seen to take a batch of logits."""
    arguments, classes = dict(cfg.loss), len(dataset.classes)
    wanted = arguments.pop("class_weights", None)
    loss = _plain(_bound("loss", cfg.loss, arguments, None, None))
    if wanted is not None:
        plain: Any = OmegaConf.to_object(wanted) if OmegaConf.is_config(wanted) else wanted
        class_weights = weights_of_classes(plain, datasets.labels(dataset.train), classes)
        loss = partial(loss, class_weights=class_weights.to(device))
    with _building("loss", cfg.loss):
        value = loss(torch.zeros(2, classes, device=device), torch.zeros(2, dtype=torch.int64, device=device))
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError(f"it returns {tuple(value.shape) if isinstance(value, Tensor) else value!r}, no scalar")
    return loss


def _schedule(cfg: DictConfig, dataset: datasets.Dataset, optimizer: Optimizer, batches: int, steps: int) -> Schedule:
    """The schedule; what it asks for of these it is given: batches an epoch, the rate, which objective is better."""
    node, rate = cfg.schedule, optimizer.param_groups[0].get("lr")
    known = {"steps_per_epoch": batches, "lr": rate or 1.0, "maximised": maximised(cfg.objective)}
    with _building("schedule", node):
        target = hydra.utils.get_object(node._target_)
        asked = {name: known[name] for name in inspect.signature(target).parameters if name in known}
    made = inspect.isclass(target)  # and so has a state, as Plateau
    function = _bound("schedule", node, node, *(() if made else (0, 1)), **asked)
    function = partial(_plain(function), **asked)
    with _building("schedule", node):
        schedule: Schedule = function() if made else function
        for step in (0, steps // 2, steps - 1):
            float(schedule(step, steps))
    if isinstance(schedule, Following) and dataset.val is not None and cfg.objective.startswith("test/"):
        raise ConfigError(
            f"schedule._target_={node._target_} follows objective={cfg.objective}, which is measured once, at the end. "
            "Take objective=val/accuracy."
        )
    if rate is None and varies(schedule):
        raise ConfigError(
            f"schedule._target_={node._target_} changes the learning rate, and optimizer._target_="
            f"{cfg.optimizer._target_} has none. Take schedule=constant."
        )
    return schedule


def _average(cfg: DictConfig, model: nn.Module) -> AveragedModel | None:
    """The running average of the weights and buffers, as train.ema asks for it."""
    if cfg.train.ema is None:
        return None
    try:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.train.ema), use_buffers=True)
    except Exception as error:  # whatever copying a model raises
        raise ConfigError(f"train.ema={cfg.train.ema}: the model cannot be copied: {error}") from error


def build_model(cfg: DictConfig, dataset: datasets.Dataset, images: Tensor) -> nn.Module:
    """The model, on the device of some images, which it has been seen to take. It changes the global random state.

    Args:
        cfg: of which `model`, `dataset` and `seed` are read.

    Raises:
        ConfigError: it cannot be built, or cannot take the images.
    """
    shape, classes, node = dataset.input_shape, len(dataset.classes), cfg.model
    given = f"dataset {target(cfg.dataset)} gives images of {'x'.join(map(str, shape))} and {classes} classes"
    rng.seed_all(cfg.seed)  # so that the weights do not depend on how the data was made
    with _building("model", node, given):
        model: nn.Module = instantiate(node, input_shape=shape, num_classes=classes)
    _check_kind("model", node, model, nn.Module)
    model.to(images.device)
    if _lazy(model):
        model.eval()  # the first images draw the weights, from where the drawing of the other layers ended
        _check_model(node, model, images, classes, given)
        model.train()
    if lazy := _lazy(model):
        raise ConfigError(
            f"model._target_={node._target_} leaves {', '.join(lazy)} out in eval mode, so that no image tells their "
            "shape. A layer that is not lazy has it from the beginning."
        )
    with eval_mode(model, cfg.seed):
        _check_model(node, model, images, classes, given)
    return model


def _check_kind(key: str, node: DictConfig, made: object, kind: type) -> None:
    if not isinstance(made, kind):
        needed = f"{kind.__module__}.{kind.__qualname__}"
        raise ConfigError(f"{key}._target_={node._target_} returned {type(made).__name__} where {needed} is needed.")


def _check_model(node: DictConfig, model: nn.Module, images: Tensor, classes: int, given: str) -> None:
    try:
        with torch.no_grad():
            shape = tuple(model(images).shape)
    except Exception as error:
        raise CodeError(f"model._target_={node._target_} cannot take the images: {given}. {error}") from error
    if shape != (len(images), classes):
        raise ConfigError(
            f"model._target_={node._target_} returns {shape} for {len(images)} images where logits "
            f"({len(images)}, {classes}) are needed: {given}."
        )


def _lazy(model: nn.Module) -> list[str]:
    """The parameters and buffers that have no shape before the model has seen images."""
    return [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]


def _check_last_batch(cfg: DictConfig, model: nn.Module, image: Tensor, count: int, steps: int, processes: int) -> None:
    """Raise ConfigError where a batch of one image is left, and the model cannot be trained on one (BatchNorm); or one
    of so few that one of several processes, whose statistics are its own, has one."""
    size, left = cfg.train.batch_size, count % cfg.train.batch_size
    few = 1 if cfg.train.sync_batchnorm else 2 * processes - 1
    if size > few and (not 0 < left <= few or steps * size < count):
        return
    train_mode(model, cfg.train.freeze)
    try:
        with torch.no_grad():
            model(image)
    except ValueError as error:
        other = next(one for one in itertools.count(max(size, few) + 1) if not 0 < count % one <= few)
        shared = "" if few == 1 else f", of which with train.sync_batchnorm=false one of {processes} processes has one"
        raise ConfigError(
            f"train.batch_size={size} leaves {'one' if few == 1 else left or size} of {count:,} images as the last "
            f"batch of an epoch{shared}, and "
            f"model._target_={cfg.model._target_} cannot be trained on one: {error}. "
            f"Take another size, such as train.batch_size={other}."
        ) from error
    finally:
        model.eval()


def target(node: DictConfig) -> str:
    """The last word of what a part of the configuration names, such as LeNet."""
    return str(node._target_).rpartition(".")[2]
