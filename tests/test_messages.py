"""Each bad input ends with a message that names key, value and way out, exit status 1, no traceback and no file."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from program import PYTHON, Finished, call, environment, run
from tools import SMALL, write_idx_splits

from fmexp import cli
from fmexp.errors import FmexpError

FILES = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
NOT_IMPORTED = "Code of your own must be installed or on PYTHONPATH"
QUOTED = "for the shell and for Hydra: \"key='my value'\""

# What people write in YAML files of their own, and get wrong.
OWN_CONF = {
    "optimizer/typo": "defaults: [/schema/optimizer/sgd@_here_, _self_]\n_target_: torch.optim.SGD\nlrr: 0.1\n",
    "optimizer/word": "defaults: [/schema/optimizer/sgd@_here_, _self_]\n_target_: torch.optim.SGD\nlr: fast\n",
    "optimizer/negative": "defaults: [/schema/optimizer/sgd@_here_, _self_]\n_target_: torch.optim.SGD\nlr: -1\n",
    "optimizer/open": "_target_: torch.optim.SGD\nlr: ???\n",
    "optimizer/dangling": "_target_: torch.optim.SGD\nlr: ${trian.epochs}\n",
    "optimizer/steered": "defaults: [/schema/optimizer/sgd@_here_, _self_]\n_target_: torch.optim.SGD\nlr: ${minus}\n",
    "optimizer/untargeted": "lr: 0.1\n",
    "optimizer/broken": "_target_: torch.optim.SGD\n lr: 0.1\n",
    "optimizer/no_optimizer": "_target_: wrong.no_optimizer\n",
    "experiment/halves": "# @package _global_\ntrain: {epochs: 2.5}\n",
    "experiment/none": "# @package _global_\ntrain: {batch_size: 0}\n",
    "experiment/epochz": "# @package _global_\ntrain: {epochz: 3}\n",
    "experiment/focal": "# @package _global_\nlos: focal\n",
    "experiment/elsewhere": "# @package _global_\ndefaults:\n  - override /optimizer: adamm\n",
    "model/three": "_target_: wrong.Three\n",
    "model/function": "_target_: wrong.no_model\n",
    "model/raising": "_target_: wrong.Raising\n",
    "model/unable": "_target_: wrong.Unable\n",
    "dataset/list": "_target_: wrong.no_dataset\n",
    "loss/numbers_alone": "_target_: wrong.numbers_alone\n",
    "dataset/file": "_target_: numpy.load\nfile: arrays.npz\n",
    "stage/bare_on": "mine:\n  _target_: wrong.stage\n  on: end\n  size: 1\n",
    "stage/bare_on_in_schema":
        "defaults: [/schema/stage/plain@mine, _self_]\nmine:\n  _target_: fmexp.cli.main\n  on: end\n",
    "stage/noon": 'mine:\n  _target_: wrong.stage\n  when: noon\n  size: 1\n',
    "stage/onless": "mine:\n  _target_: wrong.stage\n  size: 1\n",
    "stage/nameless": '_target_: wrong.stage\nwhen: end\nsize: 1\n',
    "stage/unknown": 'mine:\n  _target_: wrong.stage\n  when: end\n  size: 1\n  colour: red\n',
    "stage/missing": 'mine:\n  _target_: wrong.stage\n  when: end\n',
    "stage/nowhere": 'mine:\n  _target_: wrong.nowhere\n  when: end\n',
}  # fmt: skip
OWN_CODE = '''"""Objects that are not what fmexp needs."""

from torch import nn


def numbers_alone(logits, labels):
    return logits[range(len(labels)), labels].mean()


def halved(images, labels, generator):
    return images[:, :, ::2], labels


class Three(nn.Module):
    def __init__(self, *, input_shape, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

    def forward(self, images):
        return self.layers(images)


class Raising(nn.Module):
    def __init__(self, *, input_shape, num_classes):
        raise RuntimeError("boom")


class Unable(nn.Module):
    def __init__(self, *, input_shape, num_classes):
        super().__init__()

    def forward(self, images):
        raise RuntimeError("bang")


def no_model(*, input_shape, num_classes):
    return [input_shape]


def no_dataset():
    return [1, 2]


def no_optimizer(params):
    return "adam"


def stage(run, *, size):
    pass
'''


@dataclass(frozen=True)
class Case:
    """Words of a command line, and what the message has to say."""

    words: tuple[str, ...]
    says: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def bad(words: str, *says: str) -> Case:
    return Case(tuple(words.split()), says)


# Found while the configuration is composed or checked.
COMPOSED = [
    bad("model=lennet", "model/lennet", "Did you mean model=lenet or model=convnet?",
        "The options of model are ", "lenet, mlp"),
    bad("+stage=mine", "stage/mine", "pr_curves, predictions, profile, projector"),
    bad("optimizer.lrr=0.1", "optimizer.lrr", "Did you mean optimizer.lr?", "lr, no_decay, layer_decay, mom",
        "+optimizer.lrr=0.1"),
    bad("optimizr=adam", "There is no key and no group optimizr. Did you mean optimizer?",
        "dataset, augment, model, loss, opt",
        "stage, experiment; the keys are seed, device, objective, resume, tags, note, weights, weights_strict, train"),
    bad("tags=baseline", "tags must be a list: write tags=[one,two]"),
    bad("tags=null", "tags must not be null"),
    bad("tags=[[a]]", "tags=[['a']] must be text of at most 100 letters"),
    bad("note=[a]", "note: Cannot convert 'list' to string"),
    bad("lr=0.1", "There is no key and no group lr. Did you mean optimizer.lr?"),
    bad("stage.pr_curvs.when=end", "There is no key stage.pr_curvs. Did you mean stage.pr_curves?"),
    bad("optimizer.lr=fast", "optimizer.lr=fast", "could not be converted to Float"),
    bad("optimizer.lr=-1", "optimizer.lr=-1.0 must be at least 0.0"),
    bad("optimizer.no_decay=[norms]", "optimizer.no_decay=['norms'] must be one of norm, bias"),
    bad("optimizer.layer_decay=0", "optimizer.layer_decay=0.0 must be above 0.0"),
    bad("optimizer.lr=nan", "optimizer.lr=nan must be a finite number"),
    bad("train.batch_size=0", "train.batch_size=0 must be at least 1"),
    bad("train.epochs=2.5", "train.epochs=2.5 must be a whole number, such as 3."),
    bad("train.epochs=1e1", "train.epochs=10.0 must be a whole number: write train.epochs=10."),
    bad("train.batch_size=8.0", "train.batch_size=8.0 must be a whole number: write train.batch_size=8."),
    bad("train.max_steps=1e3", "train.max_steps=1000.0 must be a whole number: write train.max_steps=1000."),
    bad("train.max_steps=ten", "train.max_steps=ten must be a whole number, such as 1."),
    bad("train.max_steps=inf", "train.max_steps=inf must be a whole number, such as 1."),
    bad("seed=null", "seed must not be null."),
    bad("schedule=cosine schedule.warmup_epochs=null", "schedule.warmup_epochs must not be null."),
    bad("seed=1.5", "seed=1.5 must be a whole number, such as 2."),
    bad("model=mlp model.hidden=[64,32.0]", "model.hidden[1]=32.0 must be a whole number: write model.hidden[1]=32."),
    bad("train.epochs=${optimizer.lr}", "train.epochs=0.001 must be a whole number, such as 1."),
    bad("--multirun train.epochs=2,1e1", "train.epochs=10.0 must be a whole number: write train.epochs=10."),
    bad("train.max_steps=0", "train.max_steps=0 must be at least 1"),
    bad("logging.max_queue=0", "logging.max_queue=0 must be at least 1"),
    bad("seed=-1", "seed=-1 must be at least 0"),
    bad("device=gpu", "device=gpu must be auto, cpu, mps, cuda or cuda:<number>"),
    bad("objective=test/acc", "objective=test/acc must be one of test/loss, test/accuracy, test/top5"),
    bad("stage.projector.when=noon", "stage.projector.when", "'noon'", "[start, log, epoch, end]"),
    bad("stage.profile.steps=0", "stage.profile.steps=0 must be at least 1"),
    bad("stage.image_grid.layout=grill", "stage.image_grid.layout=grill must be one of grid, images"),
    bad("--multirun seed=0,-1", "seed=-1 must be at least 0"),
    # Keys that nothing reads: Hydra takes them with a plus.
    bad("+train.label_smoothing=0.1", "There is no key train.label_smoothing.\ntrain has epochs, batch_size"),
    bad("++train.epoch=3", "There is no key train.epoch. Did you mean train.epochs?"),
    bad("+train.compile.mode=max", "train.compile={'mode': 'max'} must be one of auto, true, false"),
    bad("+sweep.dryrun=true", "There is no key sweep.dryrun. Did you mean sweep.dry_run?"),
    bad("+lossy=focal", "There is no key and no group lossy.", "experiment; the keys are"),
    bad("+bf16=true", "There is no key and no group bf16.\n"),
    bad("+trian.epochs=3", "There is no key and no group trian. Did you mean train?"),
    bad("+lr=0.1", "There is no key and no group lr. Did you mean optimizer.lr?"),
    bad("experiment=focal", "experiment/focal", "There is no key and no group los."),
    bad("--multirun +train.grad_clip=1,2", "There is no key train.grad_clip.\ntrain has"),
    bad("--multirun +bf16=true seed=1,2", "There is no key and no group bf16.\n"),
    bad("--multirun hydra/sweeper=optuna +bf16=true seed=interval(1,9)", "There is no key and no group bf16.\n"),
    bad("--multirun hydra/sweeper=optuna +trian.epochs=interval(1,9)", "There is no key and no group trian."),
    bad("--cfg=job --info=all", "Only one of", "--cfg, --info"),
    bad("--help model=lennet", "model/lennet", "Did you mean model=lenet or model=convnet?"),
    bad("optimizer=typo", "optimizer/typo", "There is no key optimizer.lrr. Did you mean optimizer.lr?"),
    bad("optimizer=word", "optimizer/word", "optimizer.lr: Value 'fast'", "could not be converted to Float"),
    bad("optimizer=negative", "optimizer.lr=-1.0 must be at least 0.0"),
    bad("optimizer=open", "optimizer.lr=??? is left open", "optimizer.lr=<value>"),
    bad("optimizer=dangling", "optimizer.lr: ", "'trian.epochs' not found"),
    bad("optimizer=steered +minus=-1", "optimizer.lr=-1.0 must be at least 0.0"),
    bad("optimizer=untargeted", "optimizer={'lr': 0.1} must be a mapping with _target_"),
    bad("optimizer=broken", "This is not YAML", "broken.yaml", "line 2"),
    bad("experiment=halves", "experiment/halves", "train.epochs=2.5 must be a whole number, such as 3."),
    bad("experiment=none", "train.batch_size=0 must be at least 1"),
    bad("experiment=epochz", "experiment/epochz", "There is no key train.epochz. Did you mean train.epochs?"),
    bad("experiment=elsewhere", "optimizer/adamm", "Did you mean optimizer=adam"),
    bad("+stage=bare_on", "stage.mine.on is stage.mine.when now", "start, log, epoch, end"),
    bad("+stage=bare_on_in_schema", "stage.mine.on is stage.mine.when now"),
    bad("stage.predictions.on=end", "stage.predictions.on is stage.predictions.when now"),
    bad("+stage=noon", "stage.mine.when=noon must be one of start, log, epoch, end"),
    bad("+stage=onless", "stage.mine.when is missing", "start, log, epoch, end"),
    bad("+stage=nameless", "stage._target_=wrong.stage must be a mapping with _target_ and when"),
    # Words as a shell leaves them of what was not quoted.
    bad("dataset.root=my folder", "folder cannot be read as key=value", "Write no space", QUOTED),
    bad("+stage=[mine, weights]", "+stage=[mine, cannot be read as key=value", "Write no space", QUOTED),
    bad("model=mlp model.hidden=[64, 32]", "model.hidden=[64, cannot be read as key=value", QUOTED),
    bad("optimizer.lr = 0.1", "optimizer.lr cannot be read as key=value", "Write no space beside =", QUOTED),
    bad("optimizer.lr=[0.1", "optimizer.lr=[0.1 cannot be read as key=value", QUOTED),
    bad("train.tag=it's", "train.tag=it's cannot be read as key=value", QUOTED),
    bad("hydra.run.dir=runs/lr=0.1", "hydra.run.dir=runs/lr=0.1 cannot be read as key=value", QUOTED),
    bad("optimizer.lr=0,1", "Ambiguous value for argument 'optimizer.lr=0,1'", "--multirun"),
    bad("seed=${nothere}", "seed: Interpolation key 'nothere' not found"),
    bad("hydra.run.dir=${nothere}", "hydra.run.dir: Interpolation key 'nothere' not found"),
    bad("~seed", "seed is missing: only a key that was added can be removed with ~"),
    bad("~train.epochs", "train.epochs: Train (DictConfig) does not support deletion"),
    bad("dataset=[1]", "Hydra cannot compose dataset=[1]: TypeError"),
    bad("hydra.verbose=1", "Hydra cannot compose hydra.verbose=1: AssertionError"),
    bad("hydra.run.dir=???", "hydra.run.dir is left open", "hydra.run.dir=<folder>"),
    bad("--multirun seed=1,2 hydra.sweep.dir=???", "hydra.sweep.dir is left open", "hydra.sweep.dir=<folder>"),
    bad("hydra.run.dir='a\\${b'", "a${b holds ${, which is taken for a key. Name another one."),
    bad("dataset.root='a\\${b}'", "dataset.root=a${b} holds ${, which is taken for a key. Name another."),
    bad("dataset.root='caf\udce9'", "dataset.root=caf\\udce9 is not UTF-8. Name another."),
    bad("--multirun seed=1,2 train.tag='caf\udce9'", "train.tag=caf\\udce9 is not UTF-8. Name another."),
    bad("hydra.run.dir=caf\udce9", "hydra.run.dir=caf\\udce9 is not UTF-8. Name another."),
    bad("hydra.run.dir='caf\udce9'", "hydra.run.dir: the folder ", "caf\\udce9 is not UTF-8. Name another one."),
    bad("--multirun hydra.sweep.dir='caf\udce9'", "hydra.sweep.dir: the folder ", "caf\\udce9 is not UTF-8. Name"),
    bad("hydra.mode=nonsense", "hydra.mode: Invalid value 'nonsense', expected one of [RUN, MULTIRUN]"),
    bad("hydra.output_subdir=../other", "hydra.output_subdir=../other must be null"),
    bad("hydra.job.chdir=true", "hydra.job.chdir must be false"),
    bad("sweep.dry_run=true", "sweep.dry_run=true lists the members of a sweep: write --multirun"),
    bad("optimizer=adam optimizer.betas=[0.9,0.9,0.9]", "optimizer.betas=[0.9, 0.9, 0.9] must be 2 numbers"),
    bad("train.compile=[]", "train.compile=[] must be one of auto, true, false"),
    bad("train.compile=1", "train.compile=1 must be one of auto, true, false"),
    bad("train.tag=test/loss", "train.tag=test/loss is taken by test/loss. Name another."),
    bad("train.tag=view/images", "train.tag=view/images is taken by stage.image_grid.tag."),
    bad("stage.image_grid.images=1" + 30 * "0", "stage.image_grid.images=1000", "must be a number of 64 bits"),
    bad(f"train.epochs={2**63}", f"train.epochs={2**63} must be a number of 64 bits, which end at 2**63"),
    bad("model=mlp model.hidden=[64,0]", "model.hidden=[64, 0] must be at least 1"),
    bad("augment=crop_flip augment.flip=2", "augment.flip=2.0 must be at most 1.0"),
    bad("augment=mixup augment.alpha=0", "augment.alpha=0.0 must be above 0.0"),
    bad("augment=chain augment.steps.crop_flip.padding=-1", "augment.steps.crop_flip.padding=-1 must be at least 0"),
    bad("--config-dir nothere", "nothere' not found"),
    bad("--config-dir not/here", "not/here' not found"),
    bad("--config-name nothere", "Cannot find primary config 'nothere'"),
]  # fmt: skip

# Found while the run is built, on small data.
BUILT = [
    bad("dataset.image_size=8", "model._target_=fmexp.models.LeNet cannot be built", "at least 16x16 pixels, not 8x8",
        "dataset synthetic gives images of 1x8x8 and 10 classes"),
    bad("model=three", "model._target_=wrong.Three returns (2, 3)", "(2, 10) are needed",
        "dataset synthetic gives images of 1x28x28 and 10 classes"),
    bad("model=function", "model._target_=wrong.no_model returned list where ", "Module is needed"),
    bad("dataset=list", "dataset._target_=wrong.no_dataset returned list where ", "dataset.Dataset is needed"),
    bad("optimizer=no_optimizer", "optimizer._target_=wrong.no_optimizer returned str where ", "Optimizer is needed"),
    bad("model._target_=nowhere.Net", "model._target_=nowhere.Net cannot be imported", "'nowhere'", NOT_IMPORTED),
    bad("model._target_=fmexp.models.LeNett", "model._target_=fmexp.models.LeNett cannot be imported", NOT_IMPORTED),
    bad("dataset._target_=nowhere.data", "dataset._target_=nowhere.data cannot be imported", NOT_IMPORTED),
    bad("optimizer._target_=torch.optim.Sgd", "optimizer._target_=torch.optim.Sgd cannot be imported", NOT_IMPORTED),
    bad("logging._target_=nowhere.Writer", "logging._target_=nowhere.Writer cannot be imported", NOT_IMPORTED),
    bad("stage.projector._target_=nowhere.look", "stage.projector._target_=nowhere.look cannot be imported"),
    bad("+stage=nowhere", "stage.mine._target_=wrong.nowhere cannot be imported", NOT_IMPORTED),
    bad("+stage=unknown", "stage.mine._target_=wrong.stage cannot be built", "argument 'colour'", "arguments are size"),
    bad("+stage=missing", "stage.mine._target_=wrong.stage cannot be built", "missing", "'size'", "arguments are size"),
    bad("+optimizer.foo=1", "optimizer._target_=torch.optim.SGD cannot be built", "'foo'", "arguments are lr, mom"),
    bad("train.freeze=[conv9]", "train.freeze: conv9 is no layer and no parameter", "Did you mean conv2 or conv1?",
        "Its layers are conv1, pool, conv2, fc1, fc2, fc3"),
    bad("model=torchvision model.name=resnt18", "model.name=resnt18 is no model of torchvision. Did you mean resnet18"),
    bad("model=timm model.name=resnt18", "model.name=resnt18 is no model of timm. Did you mean resnet18"),
    bad("+model.foo=1", "model._target_=fmexp.models.LeNet cannot be built", "'foo'", "those that fmexp gives"),
    bad("augment._target_=nowhere.blur", "augment._target_=nowhere.blur cannot be imported", NOT_IMPORTED),
    bad("+augment.foo=1", "augment._target_=fmexp.datasets.augment.none cannot be built", "'foo'", "those that fmexp"),
    bad("augment=chain +augment.steps.crop_flip.foo=1", "augment.steps.crop_flip._target_=fmexp.datasets.",
        "augment.crop_flip cannot be built", "'foo'", "Its arguments are padding, flip."),
    bad("augment=chain augment.order=[crop_flip,blur]", "augment.order has blur", "crop_flip, trivial_augment"),
    bad("augment._target_=wrong.halved", "augment._target_=wrong.halved makes images torch.float32 [4, 1, 14, 28] and "
        "labels torch.int64 [4] of images torch.uint8 [4, 1, 28, 28]",
        "labels are numbers [4] or probabilities [4, 10]"),
    bad("+logging.foo=1", "logging._target_=torch.utils.tensorboard.SummaryWriter cannot be built", "'foo'",
        "flush_secs, filename_suffix"),
]  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with conf/, full of mistakes, and with importable code."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in OWN_CONF.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "wrong.py").write_text(OWN_CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delenv("FMEXP_DATA", raising=False)
        yield folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder to be in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def assert_refused(done: Finished, says: tuple[str, ...]) -> None:
    """Check that a run said in a few lines what it has to, with no traceback, and failed."""
    assert done.status == 1
    for part in says:
        assert part in done.err
    assert "Traceback" not in done.out + done.err
    assert len(done.err.splitlines()) <= 12, done.err
    assert "HYDRA_FULL_ERROR" not in done.err


def assert_nothing_in(folder: Path) -> None:
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_mistake_in_the_configuration(case: Case, own: Path, here: Path) -> None:
    assert_refused(call("--config-dir", str(own / "conf"), *case.words, cwd=here), case.says)
    assert_nothing_in(here)


@pytest.mark.parametrize("word", ["lr=0.1", "train.epochz=3", "sweep.foo=1", "trian.epochs=3"])
def test_no_plus_is_recommended_where_nothing_reads_what_it_adds(word: str, here: Path) -> None:
    done = call(word, cwd=here)
    assert_refused(done, (f"Could not override '{word.partition('=')[0]}'", "There is no key"))
    assert "+" not in done.err
    assert "To append to your config use +hydra.foo=1" in call("hydra.foo=1", cwd=here).err


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_mistake_in_what_is_built(case: Case, own: Path, here: Path) -> None:
    small = SMALL if "dataset=list" not in case.words else ("device=cpu",)
    assert_refused(call("--config-dir", str(own / "conf"), *small, *case.words, cwd=here), case.says)
    assert_nothing_in(here)


@pytest.mark.parametrize(
    "case",
    [
        bad("model=raising", "model._target_=wrong.Raising cannot be built: boom"),
        bad(
            "augment=mixup loss=numbers_alone",
            "loss._target_=wrong.numbers_alone cannot be built",
            "mixup makes labels torch.float32 [4, 10].",
        ),
        bad("model=unable", "model._target_=wrong.Unable cannot take the images", "gives images of 1x28x28", "bang"),
    ],
    ids=str,
)
def test_traceback_is_offered_where_code_of_ones_own_raises(case: Case, own: Path, here: Path) -> None:
    done = call("--config-dir", str(own / "conf"), *SMALL, *case.words, cwd=here)
    said, _, hint = done.err.rpartition("\n\n")
    assert hint == "Set the environment variable HYDRA_FULL_ERROR=1 for the traceback.\n"
    assert_refused(Finished(done.status, done.out, said), case.says)
    assert_nothing_in(here)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("dataset.root=data dataset.download=false", "data/FashionMNIST/raw"),
        ("dataset=cifar10 dataset.root=data dataset.download=false", "data"),
        ("dataset=file", "arrays.npz"),
        ("dataset=synthetic hydra.run.dir=taken/below", "taken/below"),
    ],
)
def test_relative_paths_are_said_in_full(words: str, path: str, own: Path, here: Path) -> None:
    (here / "taken").touch()
    assert_refused(call("--config-dir", str(own / "conf"), *words.split(), cwd=here), (str(here / path),))
    assert [path.name for path in here.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("words", "unknown"),
    [("--lr=0.1", "--lr=0.1"), ("--epochs 3", "--epochs"), ("seed=1 --multirun model=lenet,mlp", "model=lenet,mlp")],
)
def test_flag_that_there_is_not_or_that_comes_late(words: str, unknown: str, here: Path) -> None:
    done = call(*words.split(), cwd=here)
    assert done.status == 2
    said, way_out = done.err.splitlines()[-2:]
    assert f"error: unrecognized arguments: {unknown}" in said
    assert way_out == "Flags such as --multirun come first. Settings follow, as key=value without dashes."
    assert_nothing_in(here)


@pytest.mark.parametrize("words", ["optimizer.lrr=0.1", "seed=-1", "model=lennet", "optimizer=broken"])
def test_full_error_is_the_exception_itself(words: str, own: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match=r"lrr|seed=-1|lennet|broken") as raised:
        call("--config-dir", str(own / "conf"), words, cwd=here)
    assert isinstance(raised.value, FmexpError) == (words == "seed=-1")
    assert_nothing_in(here)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_that_is_not_there(here: Path) -> None:
    done = call(*SMALL, "device=cuda", cwd=here)
    assert_refused(done, ("device=cuda: this machine has no CUDA device", "device=cpu", "device=auto"))
    assert_nothing_in(here)


def test_dataset_neither_on_disk_nor_to_be_downloaded(here: Path, tmp_path: Path, own: Path) -> None:
    root = tmp_path / "no data"
    done = call(f"dataset.root='{root}'", "dataset.download=false", cwd=here)
    assert_refused(
        done, (str(root / "FashionMNIST" / "raw"), FILES, "downloading is off", "dataset=synthetic needs no")
    )
    assert_nothing_in(here)
    assert not root.exists()


def test_dataset_whose_mirrors_cannot_be_reached(here: Path, tmp_path: Path, own: Path) -> None:
    root = tmp_path / "data"
    with socket.socket() as deaf:  # bound, so that nobody else takes the port, and not listening
        deaf.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        done = call(f"dataset.root={root}", f"dataset.mirrors=['{mirror}']", cwd=here)
    assert_refused(
        done,
        (
            f"train-images-idx3-ubyte.gz could not be downloaded to {root / 'FashionMNIST' / 'raw'}",
            f"{mirror}train-images-idx3-ubyte.gz: ",
            "refused",
            "dataset=synthetic needs no",
        ),
    )
    assert_nothing_in(here)
    assert [path.name for path in root.rglob("*") if path.is_file()] in ([], [".lock"])


@pytest.mark.parametrize("folder", ["taken", "taken/below"])
@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_folder_that_cannot_be_made(key: str, folder: str, here: Path) -> None:
    (here / "taken").write_text("a file, not a folder")
    sweep = ["--multirun", "seed=1,2"] if "sweep" in key else []
    done = call(*sweep, *SMALL, f"{key}={folder}", cwd=here)
    assert_refused(done, (folder, f"{key}=<folder>"))
    assert [path.name for path in here.iterdir()] == ["taken"]
    assert (here / "taken").read_text() == "a file, not a folder"


@pytest.fixture(scope="module")
def bound() -> tuple[str, ...]:
    """What comes before a command so that permissions hold for it, as they do not for root."""
    if os.geteuid() != 0:
        return ()
    words = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"for root no folder is closed, and setpriv does not change that here: {error}")
    return words


@pytest.fixture(params=["Permission denied", "Read-only file system"])
def closed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder to which nothing can be written, and why."""
    folder = tmp_path / "closed"
    folder.mkdir()
    if request.param == "Permission denied":
        (folder / "note").touch()
        folder.chmod(0o555)
        yield folder, request.param
        folder.chmod(0o755)
        return
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a read-only file system cannot be mounted here: {getattr(error, 'stderr', '') or error}")
    yield folder, request.param
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ("", "hydra.run.dir=<folder>"),
        ("hydra.run.dir={}/run", "hydra.run.dir=<folder>"),
        ("hydra.run.dir={}", "hydra.run.dir=<folder>"),
        ("--multirun seed=1,2", "hydra.sweep.dir=<folder>"),
        ("--multirun seed=1,2 hydra.sweep.dir={}", "hydra.sweep.dir=<folder>"),
        ("dataset=fashion_mnist dataset.root={} hydra.run.dir={}/../run", "dataset.root=<folder>"),
    ],
)
def test_folder_that_cannot_be_written(
    words: str, out: str, closed: tuple[Path, str], bound: tuple[str, ...], tmp_path: Path
) -> None:
    folder, reason = closed
    small = () if "fashion" in words else SMALL
    done = run(*words.replace("{}", str(folder)).split(), *small, cwd=folder, command=(*bound, *PYTHON))
    assert_refused(done, (reason, out))
    assert [path.name for path in tmp_path.iterdir()] == ["closed"]
    assert [path.name for path in folder.iterdir()] in (["note"], [])


def test_files_that_cannot_be_read(here: Path, bound: tuple[str, ...], tmp_path: Path) -> None:
    write_idx_splits(tmp_path, "FashionMNIST")
    images = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    images.chmod(0o000)
    done = run(f"dataset.root={tmp_path}", cwd=here, command=(*bound, *PYTHON))
    assert_refused(done, (str(images), "Permission denied"))
    option = tmp_path / "conf" / "model" / "closed.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: wrong.Three\n")
    option.chmod(0o000)
    done = run("--config-dir", str(tmp_path / "conf"), "model=closed", cwd=here, command=(*bound, *PYTHON))
    assert_refused(done, (str(option), "Permission denied"))
    assert_nothing_in(here)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        ("hydra/launcher=slurm", "submitit"),
        ("hydra/sweeper=optuna optimizer.lr=interval(0.1,0.2)", "optuna"),
    ],
)
def test_package_that_is_not_installed(words: str, module: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # so that its import fails
    done = call("--multirun", *SMALL, *words.split(), "seed=1,2", cwd=here)
    assert_refused(done, (f"{words.split()[0]} needs {module}: pip install {module}\n",))
    assert_nothing_in(here)


@pytest.mark.parametrize("word", ["seed=-1", "dataset.image_size=8"])
@pytest.mark.parametrize("folder", [".", "mine", "mine/new/new", "new/new"])
def test_a_refusal_removes_the_folders_that_it_made_and_no_others(word: str, folder: str, here: Path) -> None:
    (here / "mine").mkdir()
    assert call(*SMALL, word, f"hydra.run.dir={folder}", cwd=here).status == 1
    assert [path.name for path in here.rglob("*")] == ["mine"]


def test_folders_that_held_something_stay(here: Path) -> None:
    (here / "runs").mkdir()
    (here / "runs" / "note").write_text("mine")
    assert call("seed=-1", cwd=here).status == 1
    assert [str(path.relative_to(here)) for path in here.rglob("*")] == ["runs", "runs/note"]


@pytest.mark.parametrize(
    "case",
    [
        bad("model=lennet", "Did you mean model=lenet or model=convnet?"),
        bad("optimizer.lrr=0.1", "Did you mean optimizer.lr?"),
        bad("optimizer.lr=-1", "optimizer.lr=-1.0 must be at least 0.0"),
        bad("train.epochs=1e1", "train.epochs=10.0 must be a whole number: write train.epochs=10."),
        bad("dataset.root=none dataset.download=false", "none/FashionMNIST/raw", FILES, "dataset=synthetic needs no"),
    ],
    ids=str,
)
def test_program_in_a_process_of_its_own(case: Case, here: Path) -> None:
    assert_refused(run(*case.words, cwd=here), case.says)
    assert_nothing_in(here)


@pytest.mark.parametrize("word", ["optimizer.lrr=0.1", "seed=-1"])
def test_full_error_gives_the_traceback(word: str, here: Path) -> None:
    done = run(word, cwd=here, env=environment(HYDRA_FULL_ERROR="1"))
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.err
    assert 'File "' in done.err
    assert word.partition("=")[0].rpartition(".")[2] in done.err.splitlines()[-1] + done.err.splitlines()[-3]
    assert_nothing_in(here)


def test_ctrl_c_before_a_run_has_begun_prints_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(cfg: object) -> None:
        raise KeyboardInterrupt  # which Python makes of the signal

    monkeypatch.setattr(cli, "check", interrupt)
    ended = call("dataset=synthetic", cwd=tmp_path)
    assert (ended.status, ended.out, ended.err) == (130, "", "")
    assert list(tmp_path.iterdir()) == []
