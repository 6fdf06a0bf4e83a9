"""conf/: every file of every group composes, says what it is, and trains; schemas, functions and help agree with it."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tools import read_events, scalars, small, write_cifar10, write_datasets
from torch.utils.tensorboard import SummaryWriter

import fmexp.sweep.launcher  # registers what recipes choose of hydra/sweeper
from fmexp import compose, config, datasets, execute
from fmexp.config import SCHEMAS, Config, Moment, composition, conf_dir, schema
from fmexp.engine.optim import GROUPED
from fmexp.errors import ConfigError
from fmexp.models import ConvNet

FILES = sorted(conf_dir().rglob("*.yaml"))
GROUPS: dict[str, list[str]] = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(conf_dir().iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
# Of these one chooses one option; of the stages one has any number, and a recipe is added to all of it.
OPTIONS = [(group, name) for group, names in GROUPS.items() if group not in ("stage", "experiment") for name in names]
# What a function is given by the run and not by YAML.
GIVEN = {
    "model": {"input_shape", "num_classes"}, "stage": {"run"}, "optimizer": {"params"}, "logging": {"log_dir"},
    "loss": {"logits", "labels"}, "schedule": {"step", "total", "steps_per_epoch", "lr", "maximised"},
    "augment": {"images", "labels", "generator", "num_classes"},
}  # fmt: skip
OF_EVERY_STAGE = {"enabled", "required", "when", "changes"}


def raw(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True, enum_to_str=True)


def smallest(cfg: DictConfig) -> DictConfig:
    """Two batches, no network, the processor, and every stage's failure the run's."""
    cfg.device, cfg.train.max_steps, cfg.train.batch_size = "cpu", 2, 4
    for key, value in {"download": False, "train_size": 24, "test_size": 12}.items():
        if key in cfg.dataset:
            cfg.dataset[key] = value
    if OmegaConf.is_missing(cfg.dataset, "root"):
        cfg.dataset.root = f"{os.environ['FMEXP_DATA']}/{cfg.dataset._target_.rpartition('.')[2]}"
    if cfg.weights:  # those of another recipe's run
        cfg.weights = f"{os.environ['FMEXP_DATA']}/model.pt"
    for stage in cfg.stage.values():
        stage.required = True
    return cfg


@pytest.fixture
def tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with some images in the format of each dataset that is read from files, where FMEXP_DATA says."""
    root = tmp_path / "data"
    write_datasets(root)
    write_cifar10(root, monkeypatch)
    torch.save(ConvNet(input_shape=(1, 28, 28), num_classes=10).state_dict(), root / "model.pt")
    monkeypatch.setenv("FMEXP_DATA", str(root))


def assert_two_batches(folder: Path, tag: str) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["steps"], result["failures"]) == ("complete", 2, {})
    points = scalars(read_events(folder), tag)
    assert points[-1] == (2, pytest.approx(result["metrics"][tag]))


# Every file


def test_there_is_something_to_walk() -> None:
    assert {"dataset", "model", "optimizer", "logging", "stage", "experiment"} <= GROUPS.keys()
    assert len(OPTIONS) >= 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(conf_dir())))
def test_every_file_says_first_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    sentence = re.fullmatch(r"# (\S.*[\w)]\.)", first)
    assert sentence, f"{path}: {first!r} is no sentence"
    assert len(sentence[1].split()) >= 4


@pytest.mark.parametrize(("group", "name"), OPTIONS)
@pytest.mark.usefixtures("tiny_data")
def test_every_option_trains_with_all_defaults(group: str, name: str, tmp_path: Path) -> None:
    cfg = smallest(compose([f"{group}={name}"]))
    written = raw(conf_dir() / group / f"{name}.yaml")
    if "_target_" in written:
        assert cfg[group]._target_ == written["_target_"]
    execute(cfg, tmp_path / "run")
    assert_two_batches(tmp_path / "run", "train/loss")
    kept = OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml")
    assert kept[group] == plain(cfg)[group]


@pytest.mark.parametrize("name", GROUPS["experiment"])
@pytest.mark.usefixtures("tiny_data")
def test_every_recipe_trains_and_its_values_win_but_for_the_command_line(name: str, tmp_path: Path) -> None:
    cfg = smallest(compose([f"experiment={name}", "optimizer.lr=0.0123"]))
    assert cfg.optimizer.lr == 0.0123
    composed = config.flat(plain(compose([f"experiment={name}"])))
    written = raw(conf_dir() / "experiment" / f"{name}.yaml")
    for entry in written.pop("defaults", []):
        for override, option in entry.items():  # override /model: mlp
            group = override.removeprefix("override /")
            if group in GROUPS and "_target_" in (chosen := raw(conf_dir() / group / f"{option}.yaml")):
                assert composed[f"{group}._target_"] == chosen["_target_"]
    for key in written.pop("hydra", {}).get("sweeper", {}).get("params", {}):
        assert key in composed or key in GROUPS, f"{key}, which the recipe sweeps, is not there"
    for key, value in config.flat(written).items():
        assert composed[key] == value, key
    execute(cfg, tmp_path / "run")
    assert_two_batches(tmp_path / "run", cfg.train.tag)


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_recipe_states_its_command(name: str) -> None:
    text = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
    assert re.search(rf"^#\s+python -m fmexp\b.* experiment={name}\b", text, re.MULTILINE)


@pytest.mark.usefixtures("tiny_data")
def test_finetune_begins_from_a_run_of_augmented_and_keeps_its_first_stage(tmp_path: Path) -> None:
    """As their YAML says, word by word, but for the size."""
    said = (conf_dir() / "experiment" / "finetune.yaml").read_text()
    commands = re.findall(r"^#\s+python -m fmexp (experiment=\S+) (\S+=runs/clothes)\b", said, re.MULTILINE)
    assert [words[0] for words in commands[:2]] == ["experiment=augmented", "experiment=finetune"]
    first, cfg = compose(["experiment=augmented"]), compose([*commands[1]])
    assert cfg.weights == "runs/clothes"
    execute(smallest(first), tmp_path / "first")
    cfg = smallest(cfg)
    cfg.weights = str(tmp_path / "first")
    execute(cfg, tmp_path / "second")
    assert re.search(r"weights +(\d+) of the model's \1 keys fit", (tmp_path / "second" / "fmexp.log").read_text())
    before, after = (torch.load(tmp_path / run / "model.pt") for run in ("first", "second"))
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    assert same == {key for key in before if key.startswith("stage1.")}


def test_the_tutorials_recipe_has_the_tutorials_settings() -> None:
    cfg = compose(["experiment=tutorial"])
    assert (cfg.optimizer._target_, cfg.optimizer.lr, cfg.optimizer.momentum) == ("torch.optim.SGD", 0.001, 0.9)
    assert (cfg.train.epochs, cfg.train.batch_size, cfg.train.log_every) == (1, 4, 1000)
    tags = (cfg.train.tag, cfg.stage.image_grid.tag, cfg.stage.predictions.tag, cfg.stage.pr_curves.tag)
    assert tags == ("training loss", "four_fashion_mnist_images", "predictions vs. actuals", "{class}")
    assert (cfg.stage.image_grid.images, cfg.stage.projector.images, cfg.stage.predictions.images) == (4, 100, 4)


def test_every_stage_is_in_the_default_configuration_or_can_be_added() -> None:
    assert set(compose().stage) <= set(GROUPS["stage"])
    for name in GROUPS["stage"]:
        assert raw(conf_dir() / "stage" / f"{name}.yaml").keys() - {"defaults"} == {name}


# Schemas


def composed(group: str, name: str) -> DictConfig:
    """The node that an option gives."""
    default = group == "stage" and name in compose().stage
    cfg = compose([] if default else [f"{'+' * (group == 'stage')}{group}={name}"])
    node: DictConfig = cfg.stage[name] if group == "stage" else cfg[group]
    return node


WITH_TARGET = [*OPTIONS, *(("stage", name) for name in GROUPS["stage"])]


@pytest.mark.parametrize(("group", "name"), WITH_TARGET)
def test_an_options_keys_are_its_schemas_and_its_functions(group: str, name: str) -> None:
    node = composed(group, name)
    schema, keys = OmegaConf.get_type(node), set(node)
    if dataclasses.is_dataclass(schema):  # an option may do without
        assert schema in {node for path, node in SCHEMAS.items() if path.startswith(f"{group}/")}
        assert keys == {field.name for field in dataclasses.fields(schema)}
    assert OmegaConf.missing_keys(node) <= {"dataset.root"}  # where a person's own data is
    parameters = inspect.signature(get_object(node._target_)).parameters
    arguments = keys - {"_target_"} - (OF_EVERY_STAGE if group == "stage" else set())
    if group == "optimizer":  # torch's have more, for the machine and not for the method
        arguments -= set(GROUPED)
        assert arguments < parameters.keys()
    else:
        assert arguments == parameters.keys() - GIVEN.get(group, set())
    # What the YAML file does not set, the schema sets as the function would.
    path = conf_dir() / group / f"{name}.yaml"
    written = raw(path)[name] if group == "stage" else raw(path)
    for key in arguments - written.keys():
        default, value = parameters[key].default, plain(node)[key]
        if default is not inspect.Parameter.empty and name != "light":
            assert value == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize(("group", "name"), WITH_TARGET)
def test_a_key_that_does_not_exist_is_refused(group: str, name: str) -> None:
    key = f"stage.{name}" if group == "stage" else group
    choice = [f"{group}={name}"] if group != "stage" else [f"+stage={name}"] if name not in compose().stage else []
    with pytest.raises(Exception, match="unheard_of"):
        compose([*choice, f"{key}.unheard_of=1"])


@pytest.mark.parametrize("part", ["", "train.", "sweep."])
def test_a_key_that_nothing_reads_is_refused(part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"There is no key .*unheard_of\.\n(The groups are|{part[:-1]} has) "):
        compose([f"+{part}unheard_of=1"])
    cfg = compose(["dataset=synthetic"])
    OmegaConf.update(cfg, f"{part}unheard_of", 1, force_add=True)
    with pytest.raises(ConfigError, match="unheard_of"):
        execute(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_part_takes_and_what_another_value_reads_is_free() -> None:
    words = ("+optimizer.maximize=true", "+stage.mine._target_=builtins.print", "+stage.mine.when=end", "+rate=0.5")
    cfg = compose([*words, "optimizer.lr=${rate}", "+train.mine=3", "train.epochs=${train.mine}"])
    config.check(cfg)
    assert (cfg.optimizer.maximize, cfg.optimizer.lr, cfg.train.epochs) == (True, 0.5, 3)


def test_every_part_whose_keys_are_fixed_is_a_dataclass() -> None:
    parts = {"": Config, "train": schema.Train, "sweep": schema.Sweep}
    assert parts.keys() <= config.closed().keys()
    for part, kind in parts.items():
        assert config.closed()[part] == [field.name for field in dataclasses.fields(kind)]


def test_every_schema_is_used() -> None:
    used = {OmegaConf.get_type(composed(group, name)) for group, name in WITH_TARGET} - {dict}
    assert used == set(SCHEMAS.values())


def test_the_configurations_dataclass_and_its_yaml_agree() -> None:
    groups = {"dataset", "augment", "model", "loss", "optimizer", "schedule", "logging", "stage"}
    defaults = plain(OmegaConf.structured(Config(**dict.fromkeys(groups - {"stage"}))))
    written = raw(conf_dir() / "config.yaml")
    assert defaults.keys() - groups == written.keys() - {"defaults", "hydra"}
    for key in defaults.keys() - groups:
        assert written[key] == defaults[key], key


def test_the_moments_are_those_that_files_and_help_name() -> None:
    assert [moment.value for moment in Moment] == ["start", "log", "epoch", "end"]
    assert "when=start|log|epoch|end" in raw(conf_dir() / "hydra" / "help" / "fmexp.yaml")["template"]


# Help


def test_help_marks_what_is_chosen() -> None:
    listed = composition.listed_options(
        {"model": "mlp", "experiment": None, "stage@stage": "mine", "hydra/help": "fmexp"}
    )
    assert [line.split()[:3] for line in listed.splitlines() if re.match(" {2}[a-z]", line)] == [
        ["experiment", "augmented,", "fast,"], ["model", "mlp", "(chosen),"],
    ]  # fmt: skip


# Logging


class Recorder(SummaryWriter):
    """Keeps the arguments that it was made with."""

    arguments: dict[str, Any]

    def __init__(self, **arguments: Any) -> None:
        Recorder.arguments = arguments
        super().__init__(**arguments)


def session_starts(folder: Path) -> list[int]:
    """The steps of the marks by which a SummaryWriter tells TensorBoard what to forget."""
    (path,) = folder.glob("events.out.tfevents.*")
    events = [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]
    return [event.step for event in events if event.HasField("session_log")]


def test_logging_arguments_reach_the_summary_writer(tmp_path: Path) -> None:
    cfg = small(
        "logging._target_=test_conf.Recorder", "logging.max_queue=3", "logging.flush_secs=77",
        "logging.filename_suffix=.mine", "logging.purge_step=5", "train.max_steps=2",
    )  # fmt: skip
    execute(cfg, tmp_path / "run")
    folder = tmp_path / "run"
    assert Path(Recorder.arguments.pop("log_dir")) == folder
    expected = {"max_queue": 3, "flush_secs": 77, "filename_suffix": ".mine", "purge_step": 5, "comment": ""}
    assert Recorder.arguments == expected
    assert all(path.name.endswith(".mine") for path in folder.glob("events*"))
    assert session_starts(folder) == [5]


def test_a_new_run_tells_tensorboard_to_forget_whatever_was_there(tmp_path: Path) -> None:
    execute(small("train.max_steps=2", "logging=light"), tmp_path)
    assert session_starts(tmp_path) == [0]


def test_light_logging_leaves_scalars_alone(tmp_path: Path) -> None:
    execute(small("train.max_steps=4", "logging=light"), tmp_path)
    tags = read_events(tmp_path).Tags()
    assert {"train/loss", "test/loss", "test/accuracy", "within_class_accuracy/Bag"} <= set(tags["scalars"])
    assert (tags["images"], tags["graph"]) == ([], False)
    assert not {"view/images", *datasets.GARMENTS} & set(tags["tensors"])
    assert not list(tmp_path.rglob("*.tsv"))


def test_the_comment_is_part_of_a_runs_folder(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fmexp", "dataset=synthetic", "dataset.train_size=8", "dataset.test_size=8",
        "train.validation=0", "objective=test/accuracy", "device=cpu", "logging=light", "logging.comment=_a-note",
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(fmexp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
    (result,) = tmp_path.glob("runs/*/*/result.json")
    assert re.fullmatch(r"\d\d-\d\d-\d\d-\d{6}_a-note", result.parent.name)
    assert json.loads(result.read_text())["steps"] == 2
    assert torch.load(result.parent / "model.pt", weights_only=True)
