"""Figures of what `kvreplay tune` found: curves, the optimum of each layer, the optimum of each KV head.

They take the dict of `tune.findings` (or tune.json read back) and not a run, so they stand beside the report's figures
and not among them.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..errors import Absent
from ..style import FORMATS, WIDTHS, grid, legend_below, paper, plt, to_bytes
from ..tune import case_name, number, per_head, per_layer

CURVE, TUNED, BASE = "#0072b2", "#cc3355", "#555555"
HOW_TO_READ = {
    "tune_curve": "Objective against the parameter, one panel per budget, lower is better. Bands are 95 % intervals of "
                  "each point; a difference of two points is surer than the bands look, because they share the text. "
                  "The red line is the chosen value, the red area where 95 % of the resampled optima lie, the dashed "
                  "line the method as it is.",
    "tune_layers": "The best value of each layer with the range of 95 % of its resampled optima; the dashed line is "
                   "the one best value for all layers. Ranges that hold the line give no reason for a value per layer.",
    "tune_heads": "The best value of each KV head of each layer on the training traces.",
}


def _cases(found):
    return [case_name(c) for c in found["cases"]]


def _title(case):
    return case if " " in case else f"budget {case}"


def _points(case, i):
    """The candidates of one case with a number for parameter i, ascending: x, value, low, high."""
    rows = [(number(c["values"][i]), c["value"], c["low"], c["high"]) for c in case["curve"]]
    rows = [[math.nan if v is None else v for v in row] for row in rows]
    return np.array(sorted(r for r in rows if math.isfinite(r[0]) and math.isfinite(r[1]))).reshape(-1, 4)


def _scale(axis, scale, low, high):
    """A logarithmic axis, one of 1 - x for decays, or a plain one; ticks are values that people write."""
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    if scale == "one_minus" and high < 1:
        set_scale("function", functions=(lambda x: -np.log(np.maximum(1 - np.asarray(x, float), 1e-12)),
                                         lambda y: 1 - np.exp(-np.asarray(y, float))))
        choices = [0, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999]
    elif scale == "log" and low > 0:
        set_scale("log")
        choices = [m * 10.0 ** e for e in range(-6, 7) for m in (1, 2, 5)]
        if low >= 1 and high / low >= 4:
            choices = [2.0 ** e for e in range(24)]
    elif scale == "log":
        set_scale("function", functions=(lambda x: np.log1p(np.maximum(np.asarray(x, float), -0.999)),
                                         lambda y: np.expm1(np.asarray(y, float))))
        choices = [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095]
    else:
        return
    ticks = [t for t in choices if low - 1e-12 <= t <= high + 1e-12]
    while len(ticks) > 8:
        ticks = ticks[::2]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _limits(axis, values):
    low, high = float(np.min(values)), float(np.max(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


@paper
def draw_curve(found, style="double", param=None):
    """One panel per case. With several parameters: points against one of them, whatever the others are."""
    names = [p["name"] for p in found["params"]]
    i = names.index(param) if param else 0
    p = found["params"][i]
    if not any(len(_points(c, i)) > 1 for c in found["cases"]):
        raise Absent(f"{p['name']} takes no numbers, so there is no curve to draw; the table has its values")
    cases = found["cases"]
    figure, axes = grid(len(cases), style, 1.9, max_columns=1 if style == "single" else 2 if len(cases) == 4 else 3)
    for case, ax in zip(cases, axes):
        points = _points(case, i)
        if not len(points):
            ax.set_title(f"{_title(case_name(case))}: no value")
            continue
        low, high = _limits(ax, points[:, 0])
        _scale(ax.xaxis, p["scale"], low, high)
        if len(names) == 1:
            ax.fill_between(points[:, 0], points[:, 2], points[:, 3], color=CURVE, alpha=0.18, linewidth=0)
            ax.plot(points[:, 0], points[:, 1], color=CURVE, marker="o", markersize=2.6)
        else:
            ax.plot(points[:, 0], points[:, 1], color=CURVE, marker="o", markersize=2.6, linestyle="", alpha=0.6)
        base = case["curve"][0]
        if base["value"] is not None:
            ax.axhline(base["value"], color=BASE, linestyle="--", linewidth=0.9)
        at = number(case["optimum"]["values"][p["name"]])
        interval = case["optimum"]["interval"].get(p["name"])
        if isinstance(interval, list):
            ax.axvspan(*interval, color=TUNED, alpha=0.12, linewidth=0)
        if math.isfinite(at):
            ax.axvline(at, color=TUNED, linewidth=1.0)
        ax.set_xlim(low, high)
        ax.set_title(_title(case_name(case)))
        ax.set_xlabel(p["name"])
    for k, ax in enumerate(axes):
        if k == 0 or ax.get_subplotspec().is_first_col():
            ax.set_ylabel(_objective(found))
    legend_below(figure, [
        Line2D([], [], color=CURVE, marker="o", markersize=2.6, linestyle="-" if len(names) == 1 else "",
               label="candidates, 95 % band" if len(names) == 1 else "candidates"),
        Line2D([], [], color=BASE, linestyle="--", linewidth=0.9, label="the method as it is"),
        Line2D([], [], color=TUNED, label="chosen"),
        Patch(color=TUNED, alpha=0.12, linewidth=0, label="95 % of resampled optima")], style)
    return figure


def _objective(found):
    return found["objective"] if len(found["objective"]) <= 34 else "objective"


@paper
def draw_layers(found, style="double", param=None):
    """The optimum of each layer, one panel per case."""
    p, frame = _chosen(found, per_layer(found), param)
    cases = [c for c in found["cases"] if (frame["case"] == case_name(c)).any()]
    figure, axes = grid(len(cases), style, 1.8, max_columns=1 if style == "single" else 2 if len(cases) == 4 else 3,
                        sharey=True)
    every = np.concatenate([frame[["value", "low", "high"]].to_numpy(float).ravel(),
                            [number(c["optimum"]["values"][p["name"]]) for c in cases]])
    low, high = _limits(None, every[np.isfinite(every)])
    for case, ax in zip(cases, axes):
        mine = frame[frame["case"] == case_name(case)].reset_index(drop=True)
        _scale(ax.yaxis, p["scale"], low, high)
        ax.vlines(mine.index, mine["low"], mine["high"], color=CURVE, alpha=0.35, linewidth=3.5)
        ax.plot(mine.index, mine["value"], color=CURVE, marker="o", linestyle="")
        at = number(case["optimum"]["values"][p["name"]])
        if math.isfinite(at):
            ax.axhline(at, color=TUNED, linestyle="--", linewidth=1.0)
        step = max(1, len(mine) // 8)
        ax.set_xticks(range(0, len(mine), step), mine["layer"][::step])
        ax.set_xlim(-0.6, len(mine) - 0.4)
        ax.set_title(_title(case_name(case)))
        ax.set_xlabel("layer")
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"best {p['name']}")
    for ax in axes:  # a twentieth of room, on the scale
        transform = ax.yaxis.get_transform()
        bottom, top = transform.transform(np.array([low, high]))
        room = 0.05 * (top - bottom)
        ax.set_ylim(*transform.inverted().transform(np.array([bottom - room, top + room])))
    legend_below(figure, [Line2D([], [], color=CURVE, marker="o", linestyle="", label="best of the layer"),
                          Line2D([], [], color=CURVE, alpha=0.35, linewidth=3.5, label="95 % of resampled optima"),
                          Line2D([], [], color=TUNED, linestyle="--", label="one value for all")], style)
    return figure


def _chosen(found, frame, param):
    """The parameter to draw (the first that has numbers) and its rows."""
    if frame.empty:
        raise Absent("no parameter was tuned per layer or head: " +
                     "; ".join(p["why"] for p in found["params"] if p["why"]))
    frame = frame.assign(value=[number(v) for v in frame["value"]])
    names = [p["name"] for p in found["params"]
             if np.isfinite(frame.loc[frame["param"] == p["name"], "value"]).all() and p["grain"] != "global"]
    name = param or (names[0] if names else None)
    if name not in names:
        raise Absent(f"{name} takes one value for all layers")
    return next(p for p in found["params"] if p["name"] == name), frame[frame["param"] == name]


@paper
def draw_heads(found, style="double", param=None):
    """The optimum of each KV head of each layer, one panel per case."""
    p, frame = _chosen(found, per_head(found), param)
    cases = [c for c in _cases(found) if (frame["case"] == c).any()]
    n_layers = frame["layer"].nunique()
    columns = 1 if style == "single" else 2 if len(cases) == 4 else min(len(cases), 3)
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", sharex=True, sharey=True,
                                figsize=(WIDTHS[style], rows * min(3.4, 0.9 + 0.17 * max(4, n_layers))))
    low, high = _limits(None, frame["value"])
    norm = plt.matplotlib.colors.FuncNorm(_functions(p["scale"], low, high), vmin=low, vmax=high)
    for k, ax in enumerate(axes.flat):
        if k >= len(cases):
            ax.set_visible(False)
            continue
        matrix = frame[frame["case"] == cases[k]].pivot(index="layer", columns="kv_head", values="value")
        image = ax.imshow(matrix.to_numpy(float), aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
        ax.grid(False)
        every_row, every_column = max(1, len(matrix) // 8), max(1, matrix.shape[1] // 8)
        ax.set_yticks(range(0, len(matrix), every_row), matrix.index[::every_row])
        ax.set_xticks(range(0, matrix.shape[1], every_column), matrix.columns[::every_column])
        if matrix.size <= 64:
            for (r, c), value in np.ndenumerate(matrix.to_numpy(float)):
                dark = norm(value) < 0.5
                ax.text(c, r, f"{value:.3g}", ha="center", va="center", fontsize=5.8,
                        color="white" if dark else "black")
        ax.set_title(_title(cases[k]))
        if k + columns >= len(cases):
            ax.set_xlabel("KV head")
            ax.tick_params(labelbottom=True)
        if k % columns == 0:
            ax.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, label=f"best {p['name']}", shrink=0.9, pad=0.015)
    forward, inverse = _functions(p["scale"], low, high)
    ticks = inverse(np.linspace(*forward(np.array([low, high])), 5))
    bar.set_ticks(ticks, labels=[f"{t:.3g}" for t in ticks])
    bar.ax.minorticks_off()
    return figure


def _functions(scale, low, high):
    if scale == "one_minus" and high < 1:
        return (lambda x: -np.log(np.maximum(1 - np.asarray(x, float), 1e-12)), lambda y: 1 - np.exp(-np.asarray(y)))
    if scale == "log" and low > 0:
        return (lambda x: np.log(np.maximum(np.asarray(x, float), 1e-300))), (lambda y: np.exp(np.asarray(y, float)))
    return (lambda x: np.asarray(x, float)), (lambda y: np.asarray(y, float))


def write(found, folder, formats=("svg",), style="double"):
    """FOLDER/figures/tune_*.FORMAT, one set per parameter; those that this tuning cannot have are left out, and what
    an earlier call left is replaced."""
    from ..report import write_whole

    folder = Path(folder) / "figures"
    folder.mkdir(exist_ok=True)
    names = [p["name"] for p in found["params"]]
    written = []
    for base, draw in (("tune_curve", draw_curve), ("tune_layers", draw_layers), ("tune_heads", draw_heads)):
        for name in names:
            stem = base if len(names) == 1 else f"{base}-{name}"
            for format in FORMATS:
                (folder / f"{stem}.{format}").unlink(missing_ok=True)
            try:
                picture = draw(found, style, name)
            except Absent:
                continue
            for format in formats:
                write_whole(folder / f"{stem}.{format}", to_bytes(picture, format))
                written.append(folder / f"{stem}.{format}")
            plt.close(picture)
    return written
