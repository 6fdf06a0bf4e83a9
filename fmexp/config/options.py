"""The schemas of what each group offers, by the names that YAML gives them: /schema/<group>/<name>.

What a key means is said once: in a comment at it in YAML, or else at its field here. docs/reference.py reads both.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import MISSING

from fmexp.config.schema import Moment, limited, listed

T = TypeVar("T")
SCHEMAS: dict[str, type] = {}  # by <group>/<name>


def schema(*names: str) -> Callable[[type[T]], type[T]]:
    """A dataclass that YAML finds by these names. It is only read: methods and a signature would cost 10 ms in all."""

    def named(cls: type[T]) -> type[T]:
        cls.__doc__ = cls.__doc__ or cls.__name__  # or else it is the signature
        made = dataclass(init=False, repr=False, eq=False)(cls)
        SCHEMAS.update(dict.fromkeys(names, made))
        return made

    return named


@schema("dataset/downloaded")
class DownloadedDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    root: str = MISSING  # the folder of the files, as torchvision keeps them; FMEXP_DATA changes the default
    download: bool = True  # fetch the files where they are missing; false: say so and stop
    mirrors: list[str] = listed()  # where to fetch them from, tried in this order


@schema("dataset/synthetic")
class SyntheticDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    train_size: int = limited(12_000, least=1)  # training images
    test_size: int = limited(2_000, least=1)  # test images
    image_size: int = limited(28, least=8)  # height and width, in pixels
    seed: int = limited(0, least=0)  # of what is drawn; the run's own seed does not change it


@schema()
class OwnDataset:
    _target_: str = MISSING  # what makes the dataset: the import path of a function, called with the keys below
    root: str = MISSING  # where the data is
    test_share: float = limited(0.2, above=0.0, below=1.0)  # of each class held out, where there is no test split
    split_seed: int = limited(0, least=0)  # of what is held out; the run's own seed does not change it
    mean: list[float] = listed(0.5)  # subtracted from the pixels, 0 to 1: one number, or one for each channel
    std: list[float] = listed(0.5)  # what the pixels are then divided by: one number, or one for each channel


@schema("dataset/image_folder")
class ImageFolder(OwnDataset):
    image_size: int | None = limited(None, least=1)
    resize: int | None = limited(None, least=1)
    crop: bool = True
    channels: int = limited(3, one_of=(1, 3))
    cache: str = limited("auto", one_of=("auto", "memory", "disk", "none"))
    cache_dir: str = "data/cache"


@schema("dataset/arrays")
class Arrays(OwnDataset):
    classes: list[str] | None = None


@schema("augment/plain")
class Augment:
    _target_: str = MISSING  # what changes a batch: the import path of a function, called with it and the keys below


@schema("augment/crop_flip")
class CropFlip(Augment):
    padding: int = limited(4, least=0)  # black pixels on each side, before the old size is cut out anywhere
    flip: float = limited(0.5, least=0.0, most=1.0)  # the share of images that are mirrored, left to right


@schema("augment/random_erasing")
class RandomErasing(Augment):
    p: float = limited(0.5, least=0.0, most=1.0)  # the share of images that lose a rectangle
    scale: tuple[float, float] = limited((0.02, 0.33), length=2, least=0.0, most=1.0)  # its area, as a share of theirs
    ratio: tuple[float, float] = limited((0.3, 3.3), length=2, above=0.0)  # its height / width


@schema("augment/mixed")
class Mixed(Augment):
    alpha: float = limited(1.0, above=0.0)  # of Beta(alpha, alpha): near 0 mostly one of the two, above 1 mostly halves


@schema("augment/chain")
class Chain(Augment):
    order: list[str] = listed()  # the names of those that are applied, the first one first
    steps: dict[str, Any] = field(default_factory=dict)  # what may be named: each with its keys, as in its own YAML


@schema("model/plain")
class Model:
    _target_: str = MISSING  # what makes the model: the import path of a class or function, called with the keys below


@schema("model/torchvision")
class Torchvision(Model):
    name: str = MISSING  # which of torchvision's classifiers
    pretrained: bool = False  # begin from torchvision's weights, downloaded once; says where the data do not suit them


@schema("model/timm")
class Timm(Model):
    name: str = MISSING  # which of timm's models, such as vit_tiny_patch16_224
    pretrained: bool = False  # begin from timm's weights, downloaded once; says where the data do not suit them
    # the share of features that each training step leaves out before the classifier; null: the model's own
    drop_rate: float | None = limited(None, least=0.0, below=1.0)
    # the share of residual branches that each training step leaves out, in models that have them; null: the model's own
    drop_path_rate: float | None = limited(None, least=0.0, below=1.0)


@schema("model/mlp")
class MLP(Model):
    hidden: list[int] = listed(256, 128, least=1)  # width of each hidden layer; []: one layer from pixels to classes
    dropout: float = limited(0.0, least=0.0, below=1.0)  # the share of hidden units that each training step leaves out


@schema("model/convnet")
class ConvNet(Model):
    widths: list[int] = listed(32, 64, 128, least=1)  # channels of each stage; between two, height and width are halved


@schema()
class Loss:
    _target_: str = MISSING  # the import path of a function, called with logits, labels and the keys below


@schema("loss/cross_entropy")
class CrossEntropy(Loss):
    # this share of each label is spread over all classes
    label_smoothing: float = limited(0.0, least=0.0, below=1.0)
    # how much an image counts, by its label: null: all alike; balanced: all classes alike; or a number for each class
    class_weights: Any = None


@schema("loss/focal")
class Focal(Loss):
    gamma: float = limited(2.0, least=0.0)  # how much less an image counts that is classified well; 0: cross-entropy
    # how much an image counts, by its label: null: all alike; balanced: all classes alike; or a number for each class
    class_weights: Any = None


@schema("loss/binary")
class Binary(Loss):
    # this share of each label is spread over all classes
    label_smoothing: float = limited(0.0, least=0.0, below=1.0)


@schema()
class Schedule:
    _target_: str = MISSING  # the import path of a function, called with the step, the run's length and the keys below


@schema("schedule/warmed")
class Warmed(Schedule):
    warmup_epochs: float = limited(0.0, least=0.0)  # in which the rate rises from nearly 0; parts of one, too


@schema("schedule/falling")
class Falling(Warmed):
    floor: float = limited(0.0, least=0.0, most=1.0)  # the share of optimizer.lr that the rate does not fall below


@schema("schedule/step")
class Steps(Falling):
    milestones: list[float] = listed(0.5, 0.75, least=0.0)  # in epochs, or where all are below 1 as shares of the run
    gamma: float = limited(0.1, least=0.0, most=1.0)  # what the rate is multiplied by at each


@schema("schedule/one_cycle")
class OneCycle(Schedule):
    warmup_epochs: float | None = limited(None, least=0.0)  # of the way up, parts of one, too; null: 0.3 of the run
    floor: float = limited(0.0, least=0.0, most=1.0)  # the share of optimizer.lr that the rate does not fall below
    start: float = limited(0.04, least=0.0, most=1.0)  # the share of optimizer.lr that the way up begins with


@schema("schedule/plateau")
class Plateau(Schedule):
    factor: float = limited(0.1, least=0.0, below=1.0)  # what the rate is multiplied by
    patience: int = limited(2, least=0)  # epochs without a better objective that are waited for
    cooldown: int = limited(0, least=0)  # epochs after a change in which nothing is counted
    min_lr: float = limited(0.0, least=0.0)  # the rate is not lowered below it


@schema("optimizer/plain")
class Optimizer:
    _target_: str = MISSING  # the import path of the optimizer, called with the model's parameters and the keys below
    lr: float = limited(0.001, least=0.0)  # learning rate: how far a step goes
    # whose weights do not decay: bias, and norm, which is all else of one dimension or that the model itself names
    no_decay: list[str] = listed(one_of=("norm", "bias"))
    # each layer learns at this times the rate of the next one, and the last at lr; null: all at lr
    layer_decay: float | None = limited(None, above=0.0, most=1.0)


@schema("optimizer/sgd")
class SGD(Optimizer):
    momentum: float = limited(0.0, least=0.0)  # the share of the last step that this one keeps
    dampening: float = 0.0  # how much less the gradient counts beside the momentum
    weight_decay: float = limited(0.0, least=0.0)  # pulls weights to zero: this times the weight joins the gradient
    nesterov: bool = False  # take the gradient where momentum will lead; needs momentum above 0 and dampening 0


@schema("optimizer/adam")
class Adam(Optimizer):
    # how slowly the running means of the gradient and of its square forget
    betas: tuple[float, float] = limited((0.9, 0.999), length=2, least=0.0, below=1.0)
    eps: float = limited(1e-8, least=0.0)  # added to what the step is divided by
    # pulls weights to zero: Adam adds it to the gradient, AdamW takes it from the weights themselves
    weight_decay: float = limited(0.0, least=0.0)
    amsgrad: bool = False  # divide by the largest mean square so far, not by the latest


@schema("optimizer/rmsprop")
class RMSprop(Optimizer):
    alpha: float = limited(0.99, least=0.0)  # how slowly the running mean of the squared gradient forgets
    eps: float = limited(1e-8, least=0.0)  # added to what the step is divided by
    weight_decay: float = limited(0.0, least=0.0)  # pulls weights to zero: this times the weight joins the gradient
    momentum: float = limited(0.0, least=0.0)  # the share of the last step that this one keeps
    centered: bool = False  # divide by the gradient's variance, not by its mean square


@schema("logging/tensorboard")
class Logging:
    _target_: str = MISSING  # the import path of the writer, called with the keys below and the run's folder
    comment: str = ""
    purge_step: int | None = limited(None, least=0)
    max_queue: int = limited(10, least=1)  # records that wait in memory before training waits for the disk
    flush_secs: int = limited(120, least=1)  # seconds between two writes to the disk
    filename_suffix: str = ""  # appended to the names of event files


@schema("stage/plain", "stage/model_graph")
class Stage:
    _target_: str = MISSING  # the import path of the stage's function, called with the run and the keys below
    enabled: bool = True  # false: leave the stage out
    when: Moment = MISSING  # the moment: before training, at each running loss, after each epoch, at the end
    required: bool = False  # true: a failure ends the run; false: it is logged, and the run goes on
    changes: bool = False  # true: it means to change weights or the optimizer; false: what it changes is put back


@schema("stage/tagged", "stage/calibration", "stage/confusion_matrix", "stage/per_class_accuracy")
class TaggedStage(Stage):
    tag: str = MISSING  # the name in TensorBoard


@schema("stage/image_grid")
class ImageGrid(TaggedStage):
    images: int = limited(4, least=1, most=1000)  # how many
    layout: str = limited("grid", one_of=("grid", "images"))
    augmented: bool = False


@schema("stage/projector")
class Projector(TaggedStage):
    images: int = limited(100, least=1, most=10_000)  # how many points
    features: str | None = None


@schema("stage/predictions")
class Predictions(TaggedStage):
    images: int = limited(4, least=1, most=100)  # how many of the batch, from its first; at most train.batch_size


@schema("stage/mistakes")
class Mistakes(TaggedStage):
    images: int = limited(8, least=1, most=100)


@schema("stage/pr_curves")
class PRCurves(TaggedStage):
    num_thresholds: int = limited(127, least=2, most=127)
    weights: float | None = limited(None, least=0.0)


@schema("stage/learning")
class Learning(TaggedStage):
    histograms: bool = False


@schema("stage/profile")
class Profile(TaggedStage):
    steps: int = limited(5, least=1, most=100)
