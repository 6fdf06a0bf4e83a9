"""A sweep's picture: the objective against what varies, the best of it marked, and the learning curves.

A grid of up to four keys has its main key on x, a line for each value of the next, a column of panels for each of the
third and a row for each of the fourth. A search, or a larger grid, has a panel for each key. Members that differ in
their seed alone are one point with an error bar, one curve with a band. Matplotlib is imported when something is drawn.
"""

import io
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fmexp import config
from fmexp.config import maximised
from fmexp.rundir import layout
from fmexp.sweep.figure_data import Combination, Key, Picture, curve, plain, read
from fmexp.sweep.members import Member, folder_number

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # letters stay letters, to be edited and searched
    "svg.hashsalt": "fmexp",  # the same picture is the same file
}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito's
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
DPI = 200
CURVES = 5.0  # inches, of the learning curves with their legend
MOST_PANELS, MOST_LINES, MOST_SLICES = 12, 12, 8  # of keys with more values, each gets a panel of its own
MOST_NAMES = 8  # in a legend or at an axis


def render(root: Path, members: Sequence[Member]) -> tuple[bytes, bytes]:
    """A sweep's picture as PNG and as SVG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = draw(read(root, members))
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def draw(picture: Picture) -> Any:
    """The figure of a sweep."""
    from matplotlib.figure import Figure

    if not picture.combinations:
        figure = Figure(figsize=(6, 2))
        figure.text(0.5, 0.5, f"no member has a {picture.objective} yet", ha="center", va="center")
        return figure
    lines, columns, rows = [*picture.keys[1:4], *[None] * 3][:3]
    panels = _count(columns) * _count(rows)
    if picture.search or len(picture.keys) > 4 or panels > MOST_PANELS or _count(lines) > MOST_LINES:
        return _title(_draw_slices(picture), picture)
    width, height = 4.2 if panels == 1 else 2.9 * _count(columns), 3.6 if panels == 1 else 0.9 + 2.3 * _count(rows)
    figure = Figure(figsize=(width + CURVES, max(height, 3.6)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[width, CURVES])[0]
    axes = left.subplots(_count(rows), _count(columns), sharex=True, sharey=True, squeeze=False)
    for (row, column), axis in np.ndenumerate(axes):
        of_panel = {key.name: key.names[at] for key, at in ((columns, column), (rows, row)) if key}
        _draw_lines(axis, picture, of_panel)
        axis.set_title(", ".join(f"{name}={value}" for name, value in of_panel.items()), fontsize=9)
        axis.label_outer()
    if lines:
        axes[-1, -1].legend(title=lines.name)
    draw_curves(right.subplots(), picture)
    return _title(figure, picture)


def _draw_lines(axis: Any, picture: Picture, of_panel: dict[str, str]) -> None:
    """A panel of a grid: mean and spread over the main key, a line for each value of the second key."""
    shown = [one for one in picture.combinations if of_panel.items() <= one.values.items()]
    main, lines = [*picture.keys[:2], *[None] * 2][:2]
    names = lines.names if lines else [""]
    for number, name in enumerate(names):
        line = [one for one in shown if not lines or one.values[lines.name] == name]
        if main:
            line.sort(key=lambda one: main.places[one.values[main.name]])
        beside = (number - (len(names) - 1) / 2) * 0.5 / len(names) if main and not main.numeric else 0.0
        places = [(main.places[one.values[main.name]] if main else 0) + beside for one in line]
        color, joined = COLORS[number % len(COLORS)], "-" if main and main.numeric else ""
        if picture.seeds > 1:
            dots = [(place, m.objective) for place, one in zip(places, line, strict=True) for m in one.members]
            axis.plot(*zip(*dots, strict=True), ".", color=color, alpha=0.3, markersize=4, zorder=1) if dots else None
        axis.errorbar(places, [one.mean for one in line], [one.spread for one in line], fmt=f"o{joined}",
                      color=color, markersize=4, linewidth=1.3, capsize=3, label=name)  # fmt: skip
        for place, one in zip(places, line, strict=True):
            if one is picture.best and main:
                _mark_best(axis, place, one.mean)
        if main:
            left = [one for one in picture.pruned if of_panel.items() <= one.values.items()
                    and (not lines or one.values[lines.name] == name)]  # fmt: skip
            _mark_pruned(axis, [main.places[one.values[main.name]] + beside for one in left], left, color)
    axis.set_ylabel(picture.objective)
    if main:
        _label_axis(axis, main)
    else:
        axis.set_xlim(-0.5, 0.5)
        axis.set_xticks([0], [f"{picture.seeds} seeds" if picture.seeds > 1 else plain(picture.best.members[0].name)])


def _draw_slices(picture: Picture) -> Any:
    """A search's figure, or that of a grid with many keys: on top its history, below a panel for each key."""
    from matplotlib.figure import Figure

    keys = picture.keys[:MOST_SLICES]
    rows = math.ceil(len(keys) / 4)
    columns = math.ceil(len(keys) / rows)
    figure = Figure(figsize=(max(3.0 * columns, 9), 3.4 + 2.6 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.4, 2.6 * rows])[:, 0]
    names = [*(["history"] if picture.search else []), *(["importance"] if picture.importance else []), "curves"]
    upper = top.subplot_mosaic([names], width_ratios=[1 if name == "importance" else 2 for name in names])
    if picture.search:
        _draw_history(upper["history"], picture)
    if picture.importance:
        _draw_importance(upper["importance"], picture)
    draw_curves(upper["curves"], picture)
    axes = bottom.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        places = [key.places[one.values[key.name]] for one in picture.combinations]
        axis.plot(places, [one.mean for one in picture.combinations], "o", color=COLORS[0], alpha=0.5, markersize=4)
        _mark_pruned(axis, [key.places[one.values[key.name]] for one in picture.pruned], picture.pruned, COLORS[0])
        _mark_best(axis, key.places[picture.best.values[key.name]], picture.best.mean)
        _label_axis(axis, key)
        axis.margins(x=0.1)
    for axis in axes[:, 0]:
        axis.set_ylabel(picture.objective)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    return figure


def _draw_history(axis: Any, picture: Picture) -> None:
    """The objective of each trial, and the best so far."""
    scored = [member for member in picture.members if not math.isnan(member.objective)]
    numbers, values = [folder_number(m.folder)[0] for m in scored], [m.objective for m in scored]
    best = list(accumulate(values, max if maximised(picture.objective) else min))
    axis.plot(numbers, values, "o", color=COLORS[0], alpha=0.5, markersize=4, label="trial")
    axis.step(numbers, best, where="post", color=COLORS[5], linewidth=1.3, label="best so far")
    _mark_best(axis, numbers[values.index(best[-1])], best[-1])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("trial")
    axis.set_ylabel(picture.objective)
    axis.legend()


def _draw_importance(axis: Any, picture: Picture) -> None:
    names = sorted(picture.importance, key=lambda name: picture.importance[name])
    axis.barh(names, [picture.importance[name] for name in names], color=COLORS[0], height=0.6)
    axis.set_xlim(0, 1)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("importance (PED-ANOVA)")


def draw_curves(axis: Any, picture: Picture) -> None:
    """The learning curves, colored by the main key; over seeds their mean, and a band of their spread."""
    main, second = [*picture.keys[:2], *[None] * 2][:2]
    colors = dict(zip(main.names, _colors(main), strict=True)) if main else {}
    dashed = second if second and len(picture.keys) == 2 and len(second.names) <= len(DASHES) else None
    faint = len(picture.combinations) > 30
    ends = []
    for one in picture.pruned:
        steps, mean, _ = curve(one, picture.tag)
        axis.plot(steps, mean, color="0.7", linewidth=0.6, zorder=1)
    for one in picture.combinations:
        steps, mean, spread = curve(one, picture.tag)
        if not len(steps):
            continue
        color = colors[one.values[main.name]] if main else COLORS[0]
        dash = DASHES[dashed.names.index(one.values[dashed.name])] if dashed else "-"
        axis.plot(steps, mean, dash, color=color, linewidth=0.8 if faint else 1.2, alpha=0.6 if faint else 1)
        if len(one.members) > 1:
            axis.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        ends += [float(mean.min()), float(mean.max())]
    if ends and 0 < 20 * min(ends) < max(ends):
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7 * min(ends))  # a band may reach below 0
    axis.set_xlabel("step")
    axis.set_ylabel(plain(picture.tag))
    if main:
        _name_colors(axis, main, dashed)


def _name_colors(axis: Any, main: Key, dashed: Key | None) -> None:
    """Say which color is which value of the main key, and which dashes are which of the second."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    if main.numeric and len(main.names) > MOST_NAMES:
        axis.figure.colorbar(ScalarMappable(_norm(main), _colormap()), ax=axis, label=main.name)
    named = [] if main.numeric and len(main.names) > MOST_NAMES else list(zip(main.names, _colors(main), strict=True))
    handles = [Line2D([], [], color=color, label=name[:20]) for name, color in named[:MOST_NAMES]]
    if dashed:
        handles += [
            Line2D([], [], color="0.3", linestyle=dash, label=f"{dashed.name}={name[:20]}")
            for name, dash in zip(dashed.names, DASHES, strict=False)
        ]
    if handles:  # beside the curves, which leave no room among them
        title = main.name if named else None
        axis.legend(handles=handles, title=title, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _mark_best(axis: Any, place: float, value: float) -> None:
    axis.plot([place], [value], "*", color="#D55E00", markeredgecolor="black", markersize=10, zorder=5, gid="best")


def _mark_pruned(axis: Any, places: Sequence[float], pruned: Sequence[Combination], color: str) -> None:
    """What the members had that a halving sweep left behind, where it did so."""
    values = [one.mean for one in pruned]
    axis.plot(places, values, "x", color=color, alpha=0.5, markersize=4, zorder=1, gid="pruned") if values else None


def _title(figure: Any, picture: Picture) -> Any:
    """Say what was trained, how many members there are, and which is the best."""
    chosen = config.hparams(layout.read_config(picture.members[0].folder))
    varied = {key.name for key in picture.keys}
    fixed = [plain(chosen[name]) for name in ("model", "dataset", "optimizer") if name in chosen.keys() - varied]
    scored = sum(len(one.members) for one in picture.combinations)
    count = f"{scored} trials" if picture.search else f"{scored} members"
    if without := len(picture.members) - scored:
        left = f"{len(picture.pruned)} more pruned: x, at their last rung" if picture.pruned else ""
        nothing = without - len(picture.pruned)
        count += f" ({', '.join(filter(None, [left, f'{nothing} more without a result' * (nothing > 0)]))})"
    over = f", mean and standard deviation over {picture.seeds} seeds" if picture.seeds > 1 else ""
    where = ", ".join(f"{name}={value}" for name, value in picture.best.values.items())
    best = f"best {picture.best.said} with {where}" if where else picture.best.said
    figure.suptitle(f"{picture.objective} of {count}: {', '.join(fixed)}{over}\n{best}", fontsize=9)
    return figure


def _label_axis(axis: Any, key: Key) -> None:
    """Give a panel a key as its x axis."""
    axis.set_xlabel(key.name)
    if key.log:
        axis.set_xscale("log")
    places = list(key.places.values())
    if key.numeric:
        scaled = [math.log(place) for place in places] if key.log else places
        apart = 0.08 * (scaled[-1] - scaled[0])
        if len(places) <= MOST_NAMES and all(after - before > apart for before, after in pairwise(scaled)):
            axis.set_xticks(places, key.names)
            axis.minorticks_off()
        return
    step = math.ceil(len(key.names) / (2 * MOST_NAMES)) or 1
    rotation = 30 if sum(map(len, key.names)) > 30 else 0
    axis.set_xticks(places[::step], [name[:20] for name in key.names[::step]], rotation=rotation)
    axis.set_xlim(-0.5, len(places) - 0.5)


def _colors(key: Key) -> list[Any]:
    """A color for each value: along a scale for numbers."""
    from matplotlib.colors import to_hex

    if not key.numeric or len(key.names) < 3:
        return [COLORS[number % len(COLORS)] for number in range(len(key.names))]
    return [to_hex(color) for color in _colormap()(_norm(key)(list(key.places.values())))]


def _norm(key: Key) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if key.log else Normalize)(min(key.places.values()), max(key.places.values()))


def _colormap() -> Any:
    """Viridis without its yellow, which white paper swallows."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))


def _count(key: Key | None) -> int:
    return len(key.names) if key else 1
