"""Every stage at every moment: what it wrote, and that it disturbs nothing; own stages, and stages that fail."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from stages_tools import MOMENTS, STAGES, Seen, final_model, find, only, picture, read_embedding, tiles
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tools import assert_same_weights, read_events, scalars, small, weights
from torch import nn

from fmexp import compose, datasets, execute
from fmexp.datasets import Dataset, Split
from fmexp.engine.evaluation import evaluate
from fmexp.run import Run, eval_mode


def test_the_shared_run_is_worth_reading(seen: Seen) -> None:
    model = evaluate(final_model(seen.folder), seen.dataset, seen.dataset.test, device=torch.device("cpu"))
    assert torch.equal(model.labels, seen.dataset.test.labels)
    torch.testing.assert_close(seen.evaluation.probabilities, model.probabilities, rtol=0, atol=1e-5)
    assert torch.equal(seen.evaluation.labels, seen.dataset.test.labels)
    assert 0.3 < seen.evaluation.accuracy < 1
    assert seen.evaluation.probabilities.max() > 0.8


def test_tensorboard_which_sorts_by_name_shows_curves_before_pictures_and_single_points(seen: Seen) -> None:
    tags = seen.events.Tags()
    names = sorted([*tags["scalars"], *tags["images"]])
    groups = list(dict.fromkeys(name.split("/")[0] for name in names))
    assert groups == ["test", "train", "view", "wall_seconds", "within_class_accuracy"]
    assert groups[1] < "val" < groups[2], "a validation's curves belong to the others"
    assert names[:3] == ["test/accuracy", "test/accuracy/best", "test/loss"]
    assert names[3:6] == ["train/accuracy", "train/loss", "train/lr"]
    views = ["calibration", "confusion_matrix", "images", "mistakes", "predictions"]
    assert names[6:11] == [f"view/{name}" for name in views]


def coloured(train_size: int, test_size: int, image_size: int, seed: int) -> Dataset:
    """Noise in three channels, wider than high, each channel with a normalisation of its own."""
    draw = torch.Generator().manual_seed(seed)
    splits = [
        Split(torch.randint(0, 256, (n, 3, 18, 24), dtype=torch.uint8, generator=draw), torch.arange(n) % 3)
        for n in (train_size, test_size)
    ]
    return Dataset(*splits, ("red", "green", "blue"), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def test_every_stage_takes_colours_and_oblong_images(run_small: Callable[..., tuple[Path, EventAccumulator]]) -> None:
    folder, events = run_small("dataset._target_=test_stages.coloured", "model=mlp", "train.max_steps=4")
    split = coloured(64, 40, 28, 0).train
    (event,) = events.Images("view/images")
    assert len({find(tile, split) for tile in tiles(picture(event.encoded_image_string), 18, 24, 2)}) == 4
    vectors, classes, thumbnails = read_embedding(folder, 0)
    assert vectors.shape == (64, 3 * 18 * 24)
    for vector, name, thumbnail in zip(vectors, classes, thumbnails, strict=True):
        assert thumbnail.shape == (24, 24, 3)
        assert not thumbnail[18:].any()
        index = find(thumbnail[:18], split)
        np.testing.assert_allclose(vector * 255, split.images[index].flatten().numpy(), atol=1e-3)
        assert name == ("red", "green", "blue")[index % 3]
    assert {"red", "green", "blue"} <= set(events.Tags()["tensors"])


# projector


# Every stage at every moment, and the weights after it


class Frail(nn.Sequential):
    """What is easily disturbed: Dropout draws random numbers, BatchNorm remembers each forward pass."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(input_shape[0], 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
            nn.Linear(4 * 8 * 8, num_classes),
        )  # fmt: skip


FRAIL = ("model._target_=test_stages.Frail", "dataset.train_size=16", "dataset.test_size=20", "train.log_every=2",
         "train.epochs=2")  # fmt: skip

STEPS = {"start": [0], "log": [2, 4, 6, 8], "epoch": [4, 8], "end": [8]}


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run the frail model with some overrides, each combination once; returns the folder."""

    @cache
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("frail")
        cfg = small(*FRAIL, *overrides)
        if "broken" in cfg.stage:
            cfg.stage.broken.required = False
        execute(cfg, folder)
        return folder

    return run


def alone(name: str, moment: str) -> list[str]:
    return [*only(name), f"stage.{name}.enabled=true", f"stage.{name}.when={moment}"]


def traces(folder: Path) -> Iterator[tuple[str, int]]:
    """A (tag, step) for all that stands in a run's folder for TensorBoard; a graph has no step, but a number."""
    graphs = 0
    for path in folder.glob("events.out.tfevents.*"):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            yield from ((value.tag, event.step) for value in event.summary.value)
            if event.HasField("graph_def"):
                yield "graph", graphs
                graphs += 1
    yield from (("projector", int(path.parent.parent.name)) for path in folder.glob("[0-9]*/*/tensors.tsv"))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_writes_at_the_moment_it_is_moved_to_and_disturbs_nothing(
    name: str, moment: str, frail: Callable[..., Path]
) -> None:
    bare, folder = frail(*only()), frail(*alone(name, moment))
    own = set(traces(folder)) - set(traces(bare))
    assert own, f"{name} wrote nothing"
    if ("graph", 0) in own:
        assert len(own) == len(STEPS[moment])
    else:
        for tag in {tag for tag, _ in own}:
            assert sorted(step for other, step in own if other == tag) == STEPS[moment]
    assert_same_weights(folder, bare)


def test_a_stage_that_is_off_writes_nothing_and_all_together_disturb_nothing(frail: Callable[..., Path]) -> None:
    bare = set(traces(frail(*only())))
    assert {("train/loss", step) for step in STEPS["log"]} < bare
    own = {name: set(traces(frail(*alone(name, "log")))) - bare for name in STAGES}
    together = frail(*only(*STAGES), *(f"stage.{name}.when=log" for name in STAGES))
    assert set(traces(together)) - bare == set().union(*own.values())
    assert sum(map(len, own.values())) == len(set().union(*own.values()))  # no two share a tag
    assert_same_weights(together, frail(*only()))
    assert_same_weights(frail(), frail(*only()))  # at their own moments


def test_one_stage_can_be_turned_off_among_others(frail: Callable[..., Path]) -> None:
    some = ["image_grid", "projector", "pr_curves", "per_class_accuracy"]
    bare, together = set(traces(frail(*only()))), set(traces(frail(*only(*some))))
    for name in some:
        moment = str(compose().stage[name].when.name)
        without = set(traces(frail(*only(*some), f"stage.{name}.enabled=false")))
        assert together - without == set(traces(frail(*alone(name, moment)))) - bare


def rude(run: Run) -> None:
    """A stage without manners."""
    torch.rand(3)
    np.random.rand(3)
    random.random()
    torch.manual_seed(99)
    run.model.train()
    images, labels = run.batch
    for _ in range(2):
        nn.functional.cross_entropy(run.model(images), labels).backward()
    assert all(parameter.grad is not None for parameter in run.model.parameters())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rude_stage_disturbs_nothing(moment: str, frail: Callable[..., Path]) -> None:
    folder = frail(*only(), f"+stage.rude={{_target_:test_stages.rude,when:{moment}}}")
    assert_same_weights(folder, frail(*only()))
    assert set(traces(folder)) - set(traces(frail(*only()))) == set()


def test_looking_leaves_everything_as_it_was() -> None:
    model = Frail(input_shape=(1, 28, 28), num_classes=3)
    model.train()
    model[1].eval()  # frozen
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients if gradient is not None]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False))
    drawn = []
    for _ in range(2):
        with eval_mode(model, 5):
            assert not any(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
            model.train()
            model(torch.randn(2, 1, 28, 28)).sum().backward()
    with pytest.raises(RuntimeError), eval_mode(model, 5):
        raise RuntimeError
    assert drawn[0] == drawn[1]  # its own numbers, the same each time
    assert [module.training for module in model] == [True, False, True, True, True, True]
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(value, gradient)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert (random.getstate(), repr(np.random.get_state(legacy=False))) == random_state[1:]


# Stages from outside, and stages that fail


def test_a_stage_of_ones_own_is_one_function_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_stage.py").write_text(
        '"""A stage from outside."""\n\n\ndef brightness(run, *, tag):\n'
        "    run.writer.add_scalar(tag, float(run.dataset.train.images.float().mean()), run.step)\n"
    )
    (tmp_path / "conf" / "stage").mkdir(parents=True)
    (tmp_path / "conf" / "stage" / "own.yaml").write_text(
        "# How bright the data are.\nown:\n  _target_: own_stage.brightness\n  when: log\n  tag: brightness\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["dataset=synthetic", "dataset.train_size=16", "dataset.test_size=10", "train.log_every=2", *only(),
                 "train.validation=0", "objective=test/accuracy"]  # fmt: skip
    cfg = compose([*overrides, "device=cpu", "+stage=own", "stage.own.tag=mean"], config_dir=tmp_path / "conf")
    execute(cfg, tmp_path / "run")
    mean = float(datasets.synthetic(16, 10, 28, 0).train.images.double().mean())
    found = scalars(read_events(tmp_path / "run"), "mean")
    assert found == [(2, pytest.approx(mean)), (4, pytest.approx(mean))]


def broken(run: Run) -> None:
    run.scalar("written before", 1.0)
    raise ZeroDivisionError("what a stage can get wrong")


BROKEN = "+stage.broken={{_target_:test_stages.broken,when:{}}}"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stage_that_fails_is_named_and_ends_nothing(moment: str, frail: Callable[..., Path]) -> None:
    folder = frail(*only("per_class_accuracy"), BROKEN.format(moment))
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "complete"
    message = "ZeroDivisionError: what a stage can get wrong"
    assert result["failures"] == {"broken": f"step {STEPS[moment][-1]}: {message}"}
    log = (folder / "fmexp.log").read_text()
    for step in STEPS[moment]:
        assert f"stage broken failed at step {step}; the run goes on without it" in log
    assert log.count("Traceback (most recent call last)") == len(STEPS[moment])
    assert "in broken\n" in log
    last = log[log.rindex("accuracy of each class") :]
    assert f"stage broken failed, step {STEPS[moment][-1]}: {message}" in last
    # The stages after it were executed, and the training is what it was.
    assert len(scalars(read_events(folder), f"within_class_accuracy/{datasets.GARMENTS[0]}")) == 1
    assert_same_weights(folder, frail(*only()))


def test_a_required_stage_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="what a stage can get wrong"):
        execute(small(*FRAIL, *only(), BROKEN.format("epoch")), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("failed", 4)
    assert result["objective"] is None
    assert result["error"] == "ZeroDivisionError: what a stage can get wrong"
    assert "the run failed at step 4" in (tmp_path / "fmexp.log").read_text()
    assert not (tmp_path / "model.pt").exists()


def test_what_a_stage_shows_depends_on_the_seed_and_not_on_other_stages(frail: Callable[..., Path]) -> None:
    def shown(*overrides: str) -> bytes:
        (event,) = read_events(frail(*overrides)).Images("view/images")
        return bytes(event.encoded_image_string)

    assert shown() == shown(*alone("image_grid", "start"))
    assert shown() != shown(*alone("image_grid", "start"), "seed=1")


# Stages that change what is trained


def change(run: Run, *, what: str) -> None:
    """A stage that changes something, in place or by putting another in its place."""
    weight = run.model.get_parameter("5.weight")
    group = run.optimizer.param_groups[0]
    with torch.no_grad():
        if what == "weight":
            weight.mul_(1.5)
        elif what == "data":
            weight.data = weight.data + 1
        elif what == "layer":
            run.model[5] = nn.Linear(256, 10)  # type: ignore[operator]
    if what == "rate":
        group["lr"] *= 2
    elif what == "frozen":
        weight.requires_grad_(requires_grad=False)
    elif what == "momentum":
        run.optimizer.state.clear()
    elif what == "grad mode":
        torch.set_grad_enabled(False)


CHANGES = {
    "weight": "5.weight", "data": "5.weight", "layer": "5.weight, 5.bias", "rate": "the optimizer",
    "frozen": "requires_grad of 5.weight", "momentum": "the optimizer", "grad mode": "the grad mode",
}  # fmt: skip
CHANGE = "+stage.change={{_target_:test_stages.change,when:log,what:'{}'{}}}"


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_stage_changes_is_put_back_and_warned_of_once(what: str, frail: Callable[..., Path]) -> None:
    folder = frail(*only(), CHANGE.format(what, ""))
    assert_same_weights(folder, frail(*only()))
    assert set(traces(folder)) == set(traces(frail(*only())))
    warned = [line for line in (folder / "fmexp.log").read_text().splitlines() if "WARNING" in line]
    (said,) = (line.partition("stage change changed ")[2] for line in warned)
    assert said == f"{CHANGES[what]}, and each time this is put back: `changes: true` in its YAML lets it stay"


@pytest.mark.parametrize("what", ["weight", "data", "rate", "frozen", "momentum"])
def test_what_a_stage_says_that_it_changes_stays(what: str, frail: Callable[..., Path]) -> None:
    folder = frail(*only(), CHANGE.format(what, ",changes:true"))
    assert not torch.equal(weights(folder)["5.weight"], weights(frail(*only()))["5.weight"])
    assert "WARNING" not in (folder / "fmexp.log").read_text()


def test_an_evaluation_after_a_stage_that_changes_weights_is_of_the_new_ones(frail: Callable[..., Path]) -> None:
    change = CHANGE.format("weight", ",changes:true").replace("when:log", "when:end")
    folder = frail(*only("per_class_accuracy"), change, "+stage.late={_target_:test_stages.late,when:end}")
    events = read_events(folder)
    ((_, loss),), (*_, (_, before)) = scalars(events, "late"), scalars(events, "test/loss")
    assert loss != before


def late(run: Run) -> None:
    run.scalar("late", run.evaluation.loss)
