"""python -m fmexp.evaluate <run> [overrides]: a run's model on one of its splits or on other data, with any stages.

It writes into <run>/evaluate/<time>/, and leaves all else of the run as it is.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fmexp import config, messages, process
from fmexp.config import validate
from fmexp.config.objective import SPLITS
from fmexp.errors import ConfigError, FmexpError, printable
from fmexp.rundir import bounded, layout, results
from fmexp.tables import aligned

if TYPE_CHECKING:  # torch is imported once the words are known to be right
    from fmexp.datasets import Dataset
    from fmexp.run import Run

GROUPS = ("dataset", "logging")  # of which another option may be taken
MAY_DIFFER = (*GROUPS, "stage", "backend", "device", "train.num_workers")


def main() -> None:
    """Evaluate a run again: python -m fmexp.evaluate <run> [overrides]."""
    process.require_alone("fmexp.evaluate")
    arguments = _parser().parse_args()
    with messages.instead_of_tracebacks():
        folder, metrics = evaluate(arguments.run, arguments.overrides)
        print(aligned([(name, f"{value:.4f}") for name, value in metrics.items()]))
        print(printable(f"written to {folder}"))
        process.require_output()


def evaluate(run_folder: str | Path, overrides: list[str]) -> tuple[Path, dict[str, float]]:
    """Evaluate a run as the command line does; return the folder that was written, and the metrics by tag.

    A complete run has the weights of model.pt; one that was stopped those that it would keep, had it ended there.

    Raises:
        FmexpError: there is no run, or it has no weights; a word that cannot be used; data that do not fit.
    """
    content, known = results.read(run_folder).content, layout.read_config(Path(run_folder))
    words = [word.partition("=") for word in overrides]
    asked = {key: value for key, _, value in words if key in ("split", "mapping")}
    split, mapping = asked.get("split", "test"), _mapping(asked.get("mapping"))
    if split not in SPLITS:
        raise ConfigError(f"split={split} must be one of {', '.join(reversed(SPLITS))}.")
    others = {key: value for key, _, value in words if key not in asked}
    cfg = _configuration(known, others)
    if split == "val" and not cfg.train.validation:
        raise ConfigError("split=val: the run has no validation split, for train.validation=0.")
    with process.block_signals():  # a signal's exception in the midst of torch's import aborts the process
        from fmexp import models
        from fmexp.build import build, build_dataset
        from fmexp.loading import as_evaluated
        from fmexp.rundir import checkpoint
    state = None if content.get("status") == "complete" else checkpoint.load(Path(run_folder).absolute())
    dataset = build_dataset(cfg)
    if mapping or any(key.partition(".")[0] == "dataset" for key in others):
        dataset = _fitted(dataset, (state or content).get("dataset"), mapping)
    with models.weights_come_later():
        run = build(cfg, resumed=True, dataset=dataset)
    run.step = _load_weights(run, Path(run_folder).absolute(), content, state)
    run.evaluation_backend = as_evaluated(run.evaluation_backend, content.get("evaluation_backend"))
    named = {key.split(".")[1] for key in others if key.startswith("stage.")}
    run.stages = [stage for stage in run.stages if stage.when in ("epoch", "end") or stage.name in named]
    run.split = split
    run.output_dir = Path(run_folder).absolute() / "evaluate" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    _execute(run)
    layout.write_result(
        run.output_dir,
        {"status": "complete", "split": split, "overrides": overrides, "metrics": run.metrics, "steps": run.step,
         "failures": run.failures, "dataset": dataset.facts},
    )  # fmt: skip
    return run.output_dir, run.metrics


def _configuration(tree: Mapping[str, Any], words: Mapping[str, str]) -> DictConfig:
    """The run's configuration with what the words change: another option of a group, or keys as YAML has them."""
    for key in words:
        if not any(key == name or key.startswith(f"{name}.") for name in MAY_DIFFER):
            raise ConfigError(
                f"{key} cannot be changed: it is the run's. What can be: split, mapping, {', '.join(MAY_DIFFER)}."
            )
    if "${" in OmegaConf.to_yaml(OmegaConf.create(dict(tree))):
        raise FmexpError(f"{layout.CONFIG} of the run is damaged: it interpolates, and no run writes that.")
    composed = config.compose([f"{key}={words[key]}" for key in GROUPS if key in words])
    with validate.in_words():
        cfg: Any = OmegaConf.merge(OmegaConf.structured(config.Config), dict(tree))
        for group in (group for group in GROUPS if group in words):
            cfg[group] = composed[group]
        for name, stage in composed.stage.items():  # as the schemas have them, so that values are checked
            if name in cfg.stage or any(key.startswith(f"stage.{name}.") for key in words):
                cfg.stage[name] = OmegaConf.merge(stage, cfg.stage.get(name, {}))
    OmegaConf.set_struct(cfg, True)
    for key, value in ((key, value) for key, value in words.items() if key not in GROUPS):
        try:
            cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{key}={value}"]))
        except OmegaConfBaseException as error:
            raise ConfigError(messages.of_config(error)) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}={value} is no YAML: {error}") from error
    cfg.weights, cfg.train.ema, cfg.train.accumulate = None, None, 1  # of the training alone
    config.check(cfg)
    return cfg  # type: ignore[no-any-return]


def _mapping(text: str | None) -> dict[str, str]:
    """mapping={theirs: ours} as a dict."""
    if text is None:
        return {}
    try:
        mapping = bounded.parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        mapping = None
    if not isinstance(mapping, dict):
        raise ConfigError(f"mapping={text} must be of the form '{{<class of the data>: <class of the run>, ...}}'.")
    return {str(theirs): str(ours) for theirs, ours in mapping.items()}


def _fitted(dataset: "Dataset", facts: Any, mapping: Mapping[str, str]) -> "Dataset":
    """Other data as the run's model takes it: its classes in the run's order, normalised as the run's images were."""
    from fmexp import datasets

    if not isinstance(facts, dict):
        raise FmexpError(
            "The run's folder does not say what its images were: neither result.json nor a checkpoint does."
        )
    ours = datasets.blank(facts)
    if dataset.input_shape != ours.input_shape:
        theirs = "x".join(map(str, dataset.input_shape))
        raise ConfigError(f"dataset: its images are {theirs}, and the run's {'x'.join(map(str, ours.input_shape))}.")
    names = [mapping.get(name, name) for name in dataset.classes]
    if unknown := [name for name in names if name not in ours.classes]:
        raise ConfigError(
            f"dataset: the run has no class {', '.join(unknown)}; its classes are {', '.join(ours.classes)}.\n"
            f"Say which they are: mapping='{{{unknown[0]}: {ours.classes[0]}, ...}}'."
        )
    numbers = [list(ours.classes).index(name) for name in names]
    splits: dict[str, Any] = {name: datasets.relabelled(split, numbers) for name, split in dataset.splits.items()}
    return replace(dataset, classes=ours.classes, mean=ours.mean, std=ours.std, **splits)


def _load_weights(run: "Run", folder: Path, content: Mapping[str, Any], state: Mapping[str, Any] | None) -> int:
    """Give the run's model its weights, of a stopped run those of its checkpoint's state; return how many batches they
    were trained on."""
    from fmexp.loading import load_weights

    if content.get("status") == "complete":
        load_weights(run.model, folder / layout.WEIGHTS)
        return int(content["steps"])
    if state is None:
        raise FmexpError(f"{folder} has no weights: it has not ended, and there is no checkpoint.")
    average = {name.removeprefix("module."): value for name, value in state["average"].items() if "." in name}
    run.model.load_state_dict(state["selection"]["weights"] or average or state["model"])
    return int(state["step"])


def _execute(run: "Run") -> None:
    """Write the metrics, and execute the stages."""
    from fmexp.rundir import tensorboard

    run.output_dir.mkdir(parents=True)
    with tensorboard.silent_writer():
        run.writer = tensorboard.open_writer(run.cfg.logging, run.output_dir, step=None)
        try:
            with run.backend.applied():
                if not math.isfinite(run.write_metrics().loss):
                    raise FmexpError("The loss is not a finite number: the weights are damaged, or the data.")
                for moment in config.Moment.__members__:
                    run.run_stages(moment)
        finally:
            run.writer.close()
            run.workers.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmexp.evaluate",
        description="Evaluate a run's model again and write metrics and stages into <run>/evaluate/<time>/. It calls "
        "the code that the run's configuration names: use the runs alone of people you trust.",
    )
    parser.add_argument("run", type=Path, help="its folder, such as runs/<date>/<time>")
    parser.add_argument("overrides", nargs="*", help="split=test (the default), val or train; dataset=<option> and "
                        "dataset.<key>, with mapping='{theirs: ours}' for classes of other names; "
                        "stage.<name>.enabled=true; device, backend.<key>, train.num_workers")  # fmt: skip
    return parser


if __name__ == "__main__":
    process.open_console()
    main()
