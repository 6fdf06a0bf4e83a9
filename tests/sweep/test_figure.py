"""What a sweep's picture shows, of members that were never trained."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.collections import PolyCollection
from sweep_tools import fabricate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmexp import sweep
from fmexp.sweep import figure as sweep_figure
from fmexp.sweep import figure_data

LRS = ("0.1", "0.01", "0.001")


def grid(root: Path, keys: dict[str, Any]) -> list[sweep.Member]:
    """A member for each combination; the best are those of the second value of each key."""
    root.mkdir(exist_ok=True)
    for number, places in enumerate(itertools.product(*(range(len(values)) for values in keys.values()))):
        overrides = {key: keys[key][place] for key, place in zip(keys, places, strict=True)}
        away = sum(abs(place - 1) for place, key in zip(places, keys, strict=True) if key != "seed")
        noise = 0.01 * math.sin(number)
        curve = [(step, 2.0 / step + noise) for step in (10, 20, 30)]
        fabricate(root, number, overrides, 0.9 - 0.1 * away + noise, curve)
    return sweep.read(root)


def drawn(root: Path, keys: dict[str, Any]) -> tuple[figure_data.Picture, Any]:
    picture = figure_data.read(root, grid(root, keys))
    return picture, sweep_figure.draw(picture)


def panel(figure: Any, label: str) -> Any:
    return next(axis for axis in figure.axes if axis.get_xlabel() == label)


def legend(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def best(axis: Any) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in axis.get_lines() if line.get_gid() == "best"]


def test_main_key_is_on_x_and_the_next_has_a_line_for_each_value_with_its_spread_over_seeds(tmp_path: Path) -> None:
    picture, figure = drawn(tmp_path, {"model": ("mlp", "lenet"), "optimizer.lr": LRS, "seed": (1, 2, 3)})
    axis, curves = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_xscale()) == ("optimizer.lr", "test/accuracy", "log")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert axis.get_legend().get_title().get_text() == "model"
    assert legend(axis) == ["mlp", "lenet"]
    objective = {(m.overrides["model"], m.overrides["optimizer.lr"], m.overrides["seed"]): m.objective
                 for m in picture.members}  # fmt: skip
    assert len(axis.containers) == 2
    for model, bars in zip(("mlp", "lenet"), axis.containers, strict=True):
        values = np.array([[objective[model, lr, str(seed)] for seed in (1, 2, 3)] for lr in LRS[::-1]])
        np.testing.assert_allclose(bars.lines[0].get_xdata(orig=False), [0.001, 0.01, 0.1])
        np.testing.assert_allclose(bars.lines[0].get_ydata(orig=False), values.mean(axis=1))
        lengths = [np.ptp(segment[:, 1]) for segment in bars.lines[2][0].get_segments()]
        np.testing.assert_allclose(lengths, 2 * values.std(axis=1, ddof=1))
    ((place, value),) = best(axis)
    means = {key[:2]: np.mean([objective[(*key[:2], str(seed))] for seed in (1, 2, 3)]) for key in objective}
    assert max(means, key=lambda key: means[key]) == ("lenet", str(place))
    assert value == pytest.approx(max(means.values()))
    title = figure.get_suptitle()
    assert title.startswith("test/accuracy of 18 members: fashion_mnist, SGD, mean and standard deviation over 3 seeds")
    assert f"best {value:.4f} ± " in title
    assert title.endswith("with model=lenet, optimizer.lr=0.01")
    assert len(curves.get_lines()) == 6
    assert len([band for band in curves.collections if isinstance(band, PolyCollection)]) == 6
    assert legend(curves) == ["0.001", "0.01", "0.1", "model=mlp", "model=lenet"]
    assert len({line.get_color() for line in curves.get_lines()}) == 3, "a color for each learning rate"


def test_learning_curves_are_means_over_seeds_with_a_band_of_their_spread(tmp_path: Path) -> None:
    picture, figure = drawn(tmp_path, {"seed": (1, 2, 3, 4)})
    axis, curves = figure.axes
    (line,), (band,) = curves.get_lines(), curves.collections
    values = np.array([[loss for _, loss in member.scalars["train/loss"]] for member in picture.members])
    np.testing.assert_allclose(line.get_xdata(), [10, 20, 30])
    np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0), rtol=1e-6)
    outline = band.get_paths()[0].vertices
    spread = values.std(axis=0, ddof=1)
    for step, low, high in zip((10, 20, 30), values.mean(axis=0) - spread, values.mean(axis=0) + spread, strict=True):
        at = outline[outline[:, 0] == step][:, 1]
        assert (at.min(), at.max()) == pytest.approx((low, high), rel=1e-6)
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["4 seeds"], "the seed has no axis"
    assert "seed" not in axis.get_xlabel()


def test_more_keys_are_panels_side_by_side_and_below_each_other(tmp_path: Path) -> None:
    keys = {"optimizer.lr": LRS, "train.batch_size": (16, 32, 64), "model": ("mlp", "lenet"), "optimizer": ("a", "b")}
    picture, figure = drawn(tmp_path, keys)
    assert [key.name for key in picture.keys] == ["optimizer.lr", "train.batch_size", "model", "optimizer"]
    *panels, curves = figure.axes
    assert [axis.get_title() for axis in panels] == [
        "model=mlp, optimizer=a", "model=lenet, optimizer=a", "model=mlp, optimizer=b", "model=lenet, optimizer=b"
    ]  # fmt: skip
    assert all(len(axis.containers) == 3 for axis in panels)
    assert [len(best(axis)) for axis in panels] == [0, 0, 0, 1], "in its panel alone"
    assert legend(panels[-1]) == ["16", "32", "64"]
    assert len(curves.get_lines()) == 36


def test_a_grid_of_five_keys_has_a_panel_for_each(tmp_path: Path) -> None:
    keys = dict.fromkeys("abcde", ("1", "2"))
    picture, figure = drawn(tmp_path, {**keys, "optimizer.lr": LRS})
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert labels == ["step", "optimizer.lr", *"abcde"]
    points = panel(figure, "b").get_lines()[0].get_xydata()
    assert sorted(map(tuple, points)) == sorted((float(m.overrides["b"]), m.objective) for m in picture.members)


def test_categories_are_side_by_side_and_not_joined(tmp_path: Path) -> None:
    _, figure = drawn(tmp_path, {"model": ("lenet", "mlp"), "optimizer": ("sgd", "adam")})
    axis = figure.axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["lenet", "mlp"]
    assert all(bars.lines[0].get_linestyle() == "None" for bars in axis.containers)
    assert legend(axis) == ["sgd", "adam"]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ((0.1, 0.03, 0.01, 0.003), True),
        ((16, 32, 64), True),
        ((0.001, 0.1), True),
        ((1, 2, 3), False),
        ((1, 5, 10), False),
        ((0.1, 0.2), False),
        (tuple(np.random.default_rng(0).uniform(0.0005, 0.5, 20)), False),
        (tuple(10 ** np.random.default_rng(0).uniform(-4, -1, 20)), True),
    ],
)
def test_an_axis_is_logarithmic_where_values_are_spread_by_factors(values: tuple[float, ...], log: bool) -> None:
    assert figure_data.spread_by_factors(values) is log
    assert figure_data.Key("key", list(map(str, values))).log is log
    assert not figure_data.Key("key", ["0", *map(str, values)]).log, "0 has no logarithm"


def test_a_loss_is_best_where_it_is_least_and_members_without_a_result_are_counted(tmp_path: Path) -> None:
    for number, loss in enumerate((0.5, 0.2, 0.4)):
        path = fabricate(tmp_path, number, {"optimizer.lr": LRS[number]}, loss)
        (path / ".hydra" / "config.yaml").write_text(
            (path / ".hydra" / "config.yaml").read_text().replace('"test/accuracy"', '"test/loss"')
        )
    fabricate(tmp_path, 3, {"optimizer.lr": "1"}, None, status="diverged")
    picture = figure_data.read(tmp_path, sweep.read(tmp_path))
    figure = sweep_figure.draw(picture)
    assert best(figure.axes[0]) == [(0.01, 0.2)]
    assert "test/loss of 3 members (1 more without a result)" in figure.get_suptitle()


def test_written_as_png_of_200_dpi_and_as_svg_and_the_same_each_time(tmp_path: Path) -> None:
    grid(tmp_path, {"optimizer.lr": LRS})
    sweep.conclude(tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in ("sweep.png", "sweep.svg")}
    height, width, _ = image.imread(tmp_path / "sweep.png").shape
    assert (width, height) == (1840, 720), "9.2 x 3.6 inches"
    assert b"<svg" in first["sweep.svg"]
    assert b"optimizer.lr=0.01</text>" in first["sweep.svg"], "letters that can be edited"
    events = EventAccumulator(str(tmp_path / "summary")).Reload()
    assert events.Images("sweep")[0].encoded_image_string == first["sweep.png"]
    sweep.conclude(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first


def test_a_sweep_without_a_result_has_a_picture_that_says_so(tmp_path: Path) -> None:
    fabricate(tmp_path, 0, {"optimizer.lr": "1"}, None, status="failed")
    figure = sweep_figure.draw(figure_data.read(tmp_path, sweep.read(tmp_path)))
    assert [text.get_text() for text in figure.texts] == ["no member has a test/accuracy yet"]


def test_a_search_shows_its_history_and_a_panel_for_each_key(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs Optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.create_study(study_name="fmexp", storage=storage, direction="maximize")
    random = np.random.default_rng(0)
    space = {"optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
             "+model.dropout": optuna.distributions.FloatDistribution(0.0, 0.5)}  # fmt: skip
    values = []
    for number in range(12):
        params = {"optimizer.lr": 10 ** random.uniform(-4, -1), "+model.dropout": 0.5 * random.uniform() ** 8 + 1e-6}
        values.append(0.9 - abs(math.log10(params["optimizer.lr"]) + 2) / 10)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=values[-1]))
        fabricate(tmp_path, number, params, values[-1])
    picture = figure_data.read(tmp_path, sweep.read(tmp_path))
    figure = sweep_figure.draw(picture)
    history = panel(figure, "trial")
    trials, so_far = history.get_lines()[:2]
    np.testing.assert_allclose(trials.get_ydata(), values)
    np.testing.assert_allclose(so_far.get_ydata(), np.maximum.accumulate(values))
    assert legend(history) == ["trial", "best so far"]
    assert best(history) == [(float(np.argmax(values)), max(values))]
    assert panel(figure, "optimizer.lr").get_xscale() == "log"
    assert panel(figure, "model.dropout").get_xscale() == "linear", "as it was searched, wherever its values lie"
    assert picture.importance["optimizer.lr"] > picture.importance["model.dropout"]
    bars = panel(figure, "importance (PED-ANOVA)").patches
    assert [bar.get_width() for bar in bars] == sorted(picture.importance.values())
