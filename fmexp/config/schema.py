"""The schemas: which keys a configuration has, of which type and in which range.

Hydra checks names and types against these dataclasses while it composes, command line and YAML alike.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from fmexp.config.location import conf_dir


class Moment(Enum):
    """When a stage is executed: before training, at each running loss, after each epoch, or at the end."""

    start = "start"
    log = "log"
    epoch = "epoch"
    end = "end"


def limited(default: Any, **limits: Any) -> Any:
    """A field whose value has limits: `least` and `most` (inclusive), `above` and `below` (exclusive), `one_of`.

    `word` is what a whole number within the limits may be replaced by, `length` how many values a list has, `longest`
    how many letters a text has at most.
    """
    return field(default=default, metadata=limits)


def listed(*default: Any, **limits: Any) -> Any:
    """A field that is a list; `limits`, as of `limited`, are those of each value."""
    return field(default_factory=lambda: list(default), metadata={"each": True, **limits})


@dataclass
class Train:
    epochs: int = limited(1, least=1)
    batch_size: int = limited(4, least=1)
    log_every: int = limited(1000, least=1)
    max_steps: int | None = limited(None, least=1)
    num_workers: Any = limited("auto", word="auto", least=0)
    validation: float = limited(0.0, least=0.0, below=1.0)
    keep: str = limited("best", one_of=("best", "last"))
    patience: int | None = limited(None, least=1)
    min_delta: float = limited(0.0, least=0.0)
    precision: Any = limited(32, one_of=(32, "bf16"))
    clip_grad: float | None = limited(None, above=0.0)
    accumulate: int = limited(1, least=1)
    ema: float | None = limited(None, above=0.0, below=1.0)
    compile: Any = limited("auto", one_of=("auto", True, False))
    checkpoint_every: int | None = limited(None, least=1)
    freeze: list[str] = listed()
    sync_batchnorm: bool = True
    tag: str = "train/loss"


@dataclass
class Backend:
    kernels: str = limited("auto", one_of=("auto", "onednn", "native"))
    threads: Any = limited("auto", word="auto", least=1, most=1024)  # with more, OpenMP ends the process


@dataclass
class Sweep:
    fail_fast: bool = False
    dry_run: bool = False


@dataclass
class Config:
    seed: int = limited(0, least=0, below=2**63)
    device: str = "auto"
    objective: str = "test/accuracy"
    resume: bool = True
    tags: list[str] = listed(longest=100)
    note: str | None = limited(None, longest=10_000)
    weights: str | None = None
    weights_strict: bool = False
    train: Train = field(default_factory=Train)
    backend: Backend = field(default_factory=Backend)
    sweep: Sweep = field(default_factory=Sweep)
    dataset: Any = MISSING
    augment: Any = MISSING
    model: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    logging: Any = MISSING
    stage: dict[str, Any] = field(default_factory=dict)


# What a key means is said once: in a comment at it in YAML, or else at its field here. docs/reference.py reads both.


@dataclass
class DownloadedDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    root: str = MISSING  # the folder of the files, as torchvision keeps them; FMEXP_DATA changes the default
    download: bool = True  # fetch the files where they are missing; false: say so and stop
    mirrors: list[str] = listed()  # where to fetch them from, tried in this order


@dataclass
class SyntheticDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    train_size: int = limited(12_000, least=1)  # training images
    test_size: int = limited(2_000, least=1)  # test images
    image_size: int = limited(28, least=8)  # height and width, in pixels
    seed: int = limited(0, least=0)  # of what is drawn; the run's own seed does not change it


@dataclass
class OwnDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    root: str = MISSING  # where the data is
    test_share: float = limited(0.2, above=0.0, below=1.0)  # of each class held out, where there is no test split
    split_seed: int = limited(0, least=0)  # of what is held out; the run's own seed does not change it
    mean: list[float] = listed(0.5)  # subtracted from the pixels, 0 to 1: one number, or one for each channel
    std: list[float] = listed(0.5)  # what the pixels are then divided by: one number, or one for each channel


@dataclass
class ImageFolder(OwnDataset):
    image_size: int | None = limited(None, least=1)
    resize: int | None = limited(None, least=1)
    crop: bool = True
    channels: int = limited(3, one_of=(1, 3))
    cache: str = limited("auto", one_of=("auto", "memory", "disk", "none"))
    cache_dir: str = "data/cache"


@dataclass
class Arrays(OwnDataset):
    classes: list[str] | None = None


@dataclass
class Augment:
    _target_: str = MISSING  # what changes a batch: the import path of a function, called with it and the keys below


@dataclass
class CropFlip(Augment):
    padding: int = limited(4, least=0)  # black pixels on each side, before the old size is cut out anywhere
    flip: float = limited(0.5, least=0.0, most=1.0)  # the share of images that are mirrored, left to right


@dataclass
class RandomErasing(Augment):
    p: float = limited(0.5, least=0.0, most=1.0)  # the share of images that lose a rectangle
    scale: tuple[float, float] = limited((0.02, 0.33), length=2, least=0.0, most=1.0)  # its area, as a share of theirs
    ratio: tuple[float, float] = limited((0.3, 3.3), length=2, above=0.0)  # its height / width


@dataclass
class Mixed(Augment):
    alpha: float = limited(1.0, above=0.0)  # of Beta(alpha, alpha): near 0 mostly one of the two, above 1 mostly halves


@dataclass
class Chain(Augment):
    order: list[str] = listed()  # the names of those that are applied, the first one first
    steps: dict[str, Any] = field(default_factory=dict)  # what may be named: each with its keys, as in its own YAML


@dataclass
class Model:
    _target_: str = MISSING  # what makes the model: the import path of a class or function, called with the keys below


@dataclass
class Torchvision(Model):
    name: str = MISSING  # which of torchvision's classifiers
    pretrained: bool = False  # begin from torchvision's weights, downloaded once; says where the data do not suit them


@dataclass
class Timm(Model):
    name: str = MISSING  # which of timm's models, such as vit_tiny_patch16_224
    pretrained: bool = False  # begin from timm's weights, downloaded once; says where the data do not suit them
    # the share of features that each training step leaves out before the classifier; null: the model's own
    drop_rate: float | None = limited(None, least=0.0, below=1.0)
    # the share of residual branches that each training step leaves out, in models that have them; null: the model's own
    drop_path_rate: float | None = limited(None, least=0.0, below=1.0)


@dataclass
class MLP(Model):
    hidden: list[int] = listed(256, 128, least=1)  # width of each hidden layer; []: one layer from pixels to classes
    dropout: float = limited(0.0, least=0.0, below=1.0)  # the share of hidden units that each training step leaves out


@dataclass
class ConvNet(Model):
    widths: list[int] = listed(32, 64, 128, least=1)  # channels of each stage; between two, height and width are halved


@dataclass
class Loss:
    _target_: str = MISSING  # the import path of a function, called with logits, labels and the keys below


@dataclass
class CrossEntropy(Loss):
    # this share of each label is spread over all classes
    label_smoothing: float = limited(0.0, least=0.0, below=1.0)
    # how much an image counts, by its label: null: all alike; balanced: all classes alike; or a number for each class
    class_weights: Any = None


@dataclass
class Focal(Loss):
    gamma: float = limited(2.0, least=0.0)  # how much less an image counts that is classified well; 0: cross-entropy
    # how much an image counts, by its label: null: all alike; balanced: all classes alike; or a number for each class
    class_weights: Any = None


@dataclass
class Binary(Loss):
    # this share of each label is spread over all classes
    label_smoothing: float = limited(0.0, least=0.0, below=1.0)


@dataclass
class Schedule:
    _target_: str = MISSING  # the import path of a function, called with the step, the run's length and the keys below


@dataclass
class Warmed(Schedule):
    warmup_epochs: float = limited(0.0, least=0.0)  # in which the rate rises from nearly 0; parts of one, too


@dataclass
class Falling(Warmed):
    floor: float = limited(0.0, least=0.0, most=1.0)  # the share of optimizer.lr that the rate does not fall below


@dataclass
class Steps(Falling):
    milestones: list[float] = listed(0.5, 0.75, least=0.0)  # in epochs, or where all are below 1 as shares of the run
    gamma: float = limited(0.1, least=0.0, most=1.0)  # what the rate is multiplied by at each


@dataclass
class OneCycle(Schedule):
    warmup_epochs: float | None = limited(None, least=0.0)  # of the way up, parts of one, too; null: 0.3 of the run
    floor: float = limited(0.0, least=0.0, most=1.0)  # the share of optimizer.lr that the rate does not fall below
    start: float = limited(0.04, least=0.0, most=1.0)  # the share of optimizer.lr that the way up begins with


@dataclass
class Plateau(Schedule):
    factor: float = limited(0.1, least=0.0, below=1.0)  # what the rate is multiplied by
    patience: int = limited(2, least=0)  # epochs without a better objective that are waited for
    cooldown: int = limited(0, least=0)  # epochs after a change in which nothing is counted
    min_lr: float = limited(0.0, least=0.0)  # the rate is not lowered below it


@dataclass
class Optimizer:
    _target_: str = MISSING  # the import path of the optimizer, called with the model's parameters and the keys below
    lr: float = limited(0.001, least=0.0)  # learning rate: how far a step goes
    # whose weights do not decay: bias, and norm, which is all else of one dimension or that the model itself names
    no_decay: list[str] = listed(one_of=("norm", "bias"))
    # each layer learns at this times the rate of the next one, and the last at lr; null: all at lr
    layer_decay: float | None = limited(None, above=0.0, most=1.0)


@dataclass
class SGD(Optimizer):
    momentum: float = limited(0.0, least=0.0)  # the share of the last step that this one keeps
    dampening: float = 0.0  # how much less the gradient counts beside the momentum
    weight_decay: float = limited(0.0, least=0.0)  # pulls weights to zero: this times the weight joins the gradient
    nesterov: bool = False  # take the gradient where momentum will lead; needs momentum above 0 and dampening 0


@dataclass
class Adam(Optimizer):
    # how slowly the running means of the gradient and of its square forget
    betas: tuple[float, float] = limited((0.9, 0.999), length=2, least=0.0, below=1.0)
    eps: float = limited(1e-8, least=0.0)  # added to what the step is divided by
    # pulls weights to zero: Adam adds it to the gradient, AdamW takes it from the weights themselves
    weight_decay: float = limited(0.0, least=0.0)
    amsgrad: bool = False  # divide by the largest mean square so far, not by the latest


@dataclass
class RMSprop(Optimizer):
    alpha: float = limited(0.99, least=0.0)  # how slowly the running mean of the squared gradient forgets
    eps: float = limited(1e-8, least=0.0)  # added to what the step is divided by
    weight_decay: float = limited(0.0, least=0.0)  # pulls weights to zero: this times the weight joins the gradient
    momentum: float = limited(0.0, least=0.0)  # the share of the last step that this one keeps
    centered: bool = False  # divide by the gradient's variance, not by its mean square


@dataclass
class Logging:
    _target_: str = MISSING  # the import path of the writer, called with the keys below and the run's folder
    comment: str = ""
    purge_step: int | None = limited(None, least=0)
    max_queue: int = limited(10, least=1)  # records that wait in memory before training waits for the disk
    flush_secs: int = limited(120, least=1)  # seconds between two writes to the disk
    filename_suffix: str = ""  # appended to the names of event files


@dataclass
class Stage:
    _target_: str = MISSING  # the import path of the stage's function, called with the run and the keys below
    enabled: bool = True  # false: leave the stage out
    when: Moment = MISSING  # the moment: before training, at each running loss, after each epoch, at the end
    required: bool = False  # true: a failure ends the run; false: it is logged, and the run goes on
    changes: bool = False  # true: it means to change weights or the optimizer; false: what it changes is put back


@dataclass
class TaggedStage(Stage):
    tag: str = MISSING  # the name in TensorBoard


@dataclass
class ImageGrid(TaggedStage):
    images: int = limited(4, least=1, most=1000)  # how many
    layout: str = limited("grid", one_of=("grid", "images"))
    augmented: bool = False


@dataclass
class Projector(TaggedStage):
    images: int = limited(100, least=1, most=10_000)  # how many points
    features: str | None = None


@dataclass
class Predictions(TaggedStage):
    images: int = limited(4, least=1, most=100)  # how many of the batch, from its first; at most train.batch_size


@dataclass
class Mistakes(TaggedStage):
    images: int = limited(8, least=1, most=100)


@dataclass
class PRCurves(TaggedStage):
    num_thresholds: int = limited(127, least=2, most=127)
    weights: float | None = limited(None, least=0.0)


@dataclass
class Learning(TaggedStage):
    histograms: bool = False


@dataclass
class Profile(TaggedStage):
    steps: int = limited(5, least=1, most=100)


SCHEMAS: dict[str, dict[str, type]] = {
    "dataset": {
        "downloaded": DownloadedDataset,
        "synthetic": SyntheticDataset,
        "image_folder": ImageFolder,
        "arrays": Arrays,
    },
    "augment": {
        "plain": Augment,
        "crop_flip": CropFlip,
        "random_erasing": RandomErasing,
        "mixed": Mixed,
        "chain": Chain,
    },
    "model": {"plain": Model, "mlp": MLP, "convnet": ConvNet, "torchvision": Torchvision, "timm": Timm},
    "loss": {"cross_entropy": CrossEntropy, "focal": Focal, "binary": Binary},
    "schedule": {
        "warmed": Warmed,
        "falling": Falling,
        "step": Steps,
        "one_cycle": OneCycle,
        "plateau": Plateau,
    },
    "optimizer": {"plain": Optimizer, "sgd": SGD, "adam": Adam, "rmsprop": RMSprop},
    "logging": {"tensorboard": Logging},
    "stage": {
        "plain": Stage,
        "tagged": TaggedStage,
        "image_grid": ImageGrid,
        "projector": Projector,
        "predictions": Predictions,
        "mistakes": Mistakes,
        "pr_curves": PRCurves,
        "learning": Learning,
        "profile": Profile,
    },
}


def register() -> None:
    """Put the schemas where YAML names them: `defaults: [/schema/optimizer/sgd@_here_, _self_]`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    stages = sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml"))
    store.store(group="schema", name="stages", node={"defaults": [f"/stage/{name}@stage" for name in stages]})
    for group, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=node)


register()
