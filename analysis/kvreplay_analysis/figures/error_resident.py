"""Error of the output against the tokens that were really resident."""

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from .. import bootstrap
from ..style import grid, legend_below, looks, paper, plain_log, shown_name
from ..tables import pooled
from .common import (axis_names, configurations, group_title, groups_present, handles, log_axis, log_if_wide, look_or_grey,
                     named, panel_layout, require, rounded)

NAME = "error_resident"
TITLE = "Error against resident tokens"
HOW_TO_READ = ("Each line is one method over its budgets, lower is better at the same memory: x is the mean number of "
               "tokens really resident per KV head (attended, where all stay resident), never the budget asked for; "
               "bands are 95 % intervals of a block bootstrap over the decode.")
BY_BUDGET = False


def data(results, budget=None):
    """lines: one row per configuration: tokens (resident; attended in the group `selection`), error_output, low, high.

    `budget` is not used: all are drawn.
    """
    require(results, "error_output")
    require(results, "resident")
    means = pooled(results.summary[results.summary["metric"].isin(["resident", "attended", "error_output"])],
                   ["label", "budget", "metric"])["mean"]
    rows = []
    for label, asked, mine in configurations(results):
        first = mine.cells.iloc[0]
        memory = _memory(first["group"])
        if (label, asked, memory) not in means.index or (label, asked, "error_output") not in means.index:
            continue
        _, low, high = bootstrap.interval(bootstrap.totals(mine, [("error_output", "")]), bootstrap.mean)
        rows.append({"group": first["group"], "label": label, "method": first["method"],
                     "foresight": first["foresight"], "budget": asked, "memory": memory,
                     "tokens": means[label, asked, memory], "error_output": means[label, asked, "error_output"], "low": low, "high": high})
    return {"lines": pd.DataFrame(rows)}


def _memory(group):
    """What a method's cost is at a step: resident tokens; where nothing leaves, those it attends."""
    return "attended" if group == "selection" else "resident"


def _zero(frame):
    """Labels whose error is 0 everywhere: a logarithmic axis cannot show them."""
    worst = frame.groupby("label")["error_output"].max()
    return list(worst[worst <= 0].index)


@paper
def draw(results, budget=None, style="double", frames=None):
    frame = (frames or data(results))["lines"]
    look, panels, names = looks(results), groups_present(frame), named(frame, "error_output")
    scale = log_if_wide(frame["error_output"])
    figure, axes = grid(len(panels), style, 2.0, sharey=True)
    for i, (group, ax) in enumerate(zip(panels, axes)):
        for label, line in frame[frame["group"] == group].groupby("label", sort=False):
            line = line.sort_values("tokens")
            kwargs = look_or_grey(look, label, names)
            ax.plot(line["tokens"], line["error_output"], **kwargs)
            if label not in names:
                continue
            band = np.isfinite(line["low"]) & np.isfinite(line["high"])
            if band.sum() > 1:
                ax.fill_between(line["tokens"][band], line["low"][band], line["high"][band], alpha=0.16, linewidth=0,
                                color=kwargs["color"], zorder=2)
            elif band.sum() == 1:
                at = line[band].iloc[0]
                ax.plot([at["tokens"]] * 2, [at["low"], at["high"]], color=kwargs["color"], alpha=0.5, zorder=2)
        ax.set_xscale("log", base=2)
        ax.set_yscale(scale)
        ax.set_title(group_title(group))
        ax.set_xlabel(f"mean {_memory(group)} tokens per KV head")
        if i % (3 if style == "double" else 1) == 0:
            ax.set_ylabel("mean error_output")
    for ax in axes:
        low, high = ax.get_xlim()
        if high < 4 * low:
            ax.set_xscale("linear")
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        if scale == "log":
            plain_log(ax.yaxis)
        else:
            ax.set_ylim(bottom=0)
    legend_below(figure, handles(results, look, names, frame["label"].nunique()), style)
    return figure


def interactive(results, frames):
    frame = frames["lines"]
    look, panels = looks(results), groups_present(frame)
    scale = log_if_wide(frame["error_output"])
    traces, seen = [], set()
    for i, group in enumerate(panels):
        x, y = axis_names(i)
        for label, line in frame[frame["group"] == group].groupby("label", sort=False):
            line = line.sort_values("tokens")
            mine, first = look[label], label not in seen
            seen.add(label)
            band = line[np.isfinite(line["low"]) & np.isfinite(line["high"])]
            if len(band) > 1:
                traces.append({
                    "type": "scatter", "mode": "lines", "line": {"width": 0}, "fill": "toself", "hoverinfo": "skip",
                    "x": rounded([*band["tokens"], *band["tokens"][::-1]]),
                    "y": rounded([*band["low"], *band["high"][::-1]]), "fillcolor": mine.colour + "2b",
                    "showlegend": False, "legendgroup": label, "meta": label, "xaxis": x, "yaxis": y})
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": shown_name(label, line["foresight"].iloc[0]),
                "meta": label, "legendgroup": label, "showlegend": first, "x": rounded(line["tokens"]),
                "y": rounded(line["error_output"]), "xaxis": x, "yaxis": y,
                "line": {"color": mine.colour, "dash": "dot" if mine.oracle else mine.plotly_dash, "width": 2},
                "marker": {"color": mine.colour, "symbol": mine.plotly_marker, "size": 8},
                "customdata": [[b or "no budget", low, high, _memory(group)] for b, low, high in
                               zip(line["budget"], rounded(line["low"], 4), rounded(line["high"], 4))],
                "hovertemplate": "<b>%{fullData.name}</b><br>asked budget %{customdata[0]}<br>%{customdata[3]} %{x:.1f}<br>"
                                 "error_output %{y:.4f}<br>95 %: %{customdata[1]} to %{customdata[2]}<extra></extra>"})
    layout = panel_layout([group_title(g) for g in panels],
                          {},
                          {**(log_axis(frame["error_output"]) if scale == "log" else {"rangemode": "tozero"}),
                           "title": {"text": "error_output"}})
    for i, group in enumerate(panels):
        tokens = frame[frame["group"] == group]["tokens"]
        layout["xaxis" if i == 0 else f"xaxis{i + 1}"].update(
            log_axis(tokens, base=2), title={"text": f"mean {_memory(group)} tokens"})
        if i > 0:
            layout[f"yaxis{i + 1}"]["matches"] = "y"
    return {"": {"data": traces, "layout": layout}}


def note(results, frames):
    frame = frames["lines"]
    zero = _zero(frame)
    parts = []
    if zero and log_if_wide(frame["error_output"]) == "log":
        parts.append(f"Error 0, so not on a logarithmic axis: {', '.join(zero)}.")
    no_band = frame[~np.isfinite(frame["low"])]
    if len(no_band):
        parts.append("No band where the decode is one block long or nothing was evicted.")
    n_blocks = int(np.ceil(results.cells["n_steps"] / results.block_steps).sum() /
                   max(1, len(results.cells)))
    if n_blocks < 10:
        parts.append(f"The decode has about {n_blocks} blocks of {results.block_steps} steps: take the bands as rough.")
    return " ".join(parts)
