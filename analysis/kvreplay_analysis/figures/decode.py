"""How the error grows along the decode."""

import numpy as np
import pandas as pd

from ..style import grid, legend_below, looks, paper, shown_name
from .common import (at_budget, axis_names, configurations, group_title, groups_present, handles, look_or_grey, named,
                     panel_layout, require, rounded)

NAME = "decode"
TITLE = "Error along the decode"
HOW_TO_READ = ("Mean error_output over heads and layers in each block of decode steps: a rising line means that the "
               "method loses more the longer it runs; a flat one that the prompt cut decides.")
BY_BUDGET = True


def data(results, budget=None):
    """blocks: label, block, step (middle of the block), n (head-steps), error_output."""
    results, budget = at_budget(results, budget)
    require(results, "error_output")
    rows = []
    for label, asked, mine in configurations(results):
        sums = {}
        for cell, values in mine.blocks("error_output").items():
            weight = mine.block_weights(cell)
            for b in range(values.shape[1]):
                counted = np.isfinite(values[:, b])
                total = sums.setdefault(b, np.zeros(3))
                total += (np.nansum(values[:, b]) * weight[b], counted.sum() * weight[b], 0)
                total[2] = max(total[2], b * mine.block_steps + weight[b] / 2)
        what = mine.cells.iloc[0]
        rows += [{"group": what["group"], "label": label, "budget": asked, "foresight": what["foresight"], "block": b,
                  "step": middle, "n": int(n), "error_output": total / n if n else np.nan}
                 for b, (total, n, middle) in sorted(sums.items())]
    return {"blocks": pd.DataFrame(rows)}


@paper
def draw(results, budget=None, style="double", frames=None):
    frame = (frames or data(results, budget))["blocks"]
    look, panels, names = looks(results), groups_present(frame), named(frame, "error_output")
    figure, axes = grid(len(panels), style, 1.9, sharey=True)
    for i, (group, ax) in enumerate(zip(panels, axes)):
        for label, line in frame[frame["group"] == group].groupby("label", sort=False):
            kwargs = look_or_grey(look, label, names)
            kwargs["markevery"] = max(1, len(line) // 10)
            ax.plot(line["step"], line["error_output"], **kwargs)
        ax.set_title(group_title(group))
        ax.set_xlabel("decode step")
        ax.set_xlim(left=0)
        if i % (3 if style == "double" else 1) == 0:
            ax.set_ylabel("error_output")
    for ax in axes:
        ax.set_ylim(bottom=0)
    legend_below(figure, handles(results, look, names, frame["label"].nunique()), style)
    return figure


def interactive(results, frames):
    frame = frames["blocks"]
    look, panels = looks(results), groups_present(frame)
    traces = []
    for i, group in enumerate(panels):
        x, y = axis_names(i)
        for label, line in frame[frame["group"] == group].groupby("label", sort=False):
            mine = look[label]
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": shown_name(label, line["foresight"].iloc[0]),
                "meta": label, "x": rounded(line["step"]), "y": rounded(line["error_output"]), "xaxis": x, "yaxis": y,
                "line": {"color": mine.colour, "width": 2, "dash": "dot" if mine.oracle else mine.plotly_dash},
                "marker": {"color": mine.colour, "symbol": mine.plotly_marker, "size": 6},
                "hovertemplate": "<b>%{fullData.name}</b><br>around step %{x:.0f}<br>error_output %{y:.4f}"
                                 "<extra></extra>"})
    layout = panel_layout([group_title(g) for g in panels],
                          {"title": {"text": "decode step"}, "rangemode": "tozero"},
                          {"title": {"text": "error_output"}, "rangemode": "tozero"})
    for i in range(1, len(panels)):
        layout[f"yaxis{i + 1}"]["matches"] = "y"
    return {"": {"data": traces, "layout": layout}}


def note(results, frames):
    return f"One point for each block of {results.block_steps} steps."
