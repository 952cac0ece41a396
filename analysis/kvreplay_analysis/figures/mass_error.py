"""Lost mass against error: is it how much was evicted, or which direction was lost?"""

import numpy as np
import pandas as pd

from ..errors import Absent
from ..style import grid, legend_below, looks, paper, plain_log, shown_name
from .common import (at_budget, axis_names, group_title, groups_present, handles, log_axis, named, panel_layout, require,
                     rounded, thin)

NAME = "mass_error"
TITLE = "Evicted mass against error"
HOW_TO_READ = ("Each point is one query head of one layer, averaged over the decode: on the line "
               "error = evicted mass; above (below) it the lost difference ‖f_E − f_R‖ is longer (shorter) than the "
               "output, so that equal masses cost more (less).")
BY_BUDGET = True
N_POINTS = 4000


def data(results, budget=None, n_points=N_POINTS):
    """heads: label, trace, layer, kv_head, q_head, evicted_mass, error: means as in summary.csv (thinned evenly to
    n_points in all; heads that lost nothing are left out)."""
    results, budget = at_budget(results, budget)
    require(results, "evicted_mass")
    require(results, "error")
    key = ["label", "budget", "trace", "layer", "kv_head", "q_head"]
    rows = results.summary[results.summary["metric"].isin(["evicted_mass", "error"])]
    wide = rows.pivot_table(index=key, columns="metric", values="mean", sort=False, observed=True).reset_index()
    wide = wide[(wide["evicted_mass"] > 0) & (wide["error"] > 0)]
    if wide.empty:
        raise Absent("nothing was evicted at this budget")
    first = results.cells.drop_duplicates("label").set_index("label")
    wide.insert(0, "group", wide["label"].map(first["group"]))
    wide["foresight"] = wide["label"].map(first["foresight"])
    wide.columns.name = None
    each = max(8, n_points // wide["label"].nunique())
    parts = [thin(part, each) for _, part in wide.groupby("label", sort=False)]
    order = [label for label in results.labels if label in set(wide["label"])]
    parts.sort(key=lambda part: order.index(part["label"].iloc[0]))
    return {"heads": pd.concat(parts, ignore_index=True)}


@paper
def draw(results, budget=None, style="double", frames=None):
    frame = (frames or data(results, budget))["heads"]
    look, panels, names = looks(results), groups_present(frame), named(frame, "error")
    figure, axes = grid(len(panels), style, 2.1, sharey=True, sharex=True)
    ends = np.array([frame["evicted_mass"].min() * 0.8, min(1.0, frame["evicted_mass"].max() * 1.1)])
    for i, (group, ax) in enumerate(zip(panels, axes)):
        ax.plot(ends, ends, color="#555555", linewidth=0.7, zorder=1)
        for label, part in frame[frame["group"] == group].groupby("label", sort=False):
            mine = look[label]
            known = label in names
            ax.plot(part["evicted_mass"], part["error"], linestyle="", marker=mine.marker if known else ".",
                    markersize=3.0, color=mine.colour if known else "#c4c4c4", alpha=0.75,
                    markerfacecolor=mine.face if known else "#c4c4c4", markeredgewidth=0.6, zorder=2 + known)
        ax.set(xscale="log", yscale="log", title=group_title(group), xlabel="evicted_mass  Z_E / Z")
        if i % (3 if style == "double" else 1) == 0:
            ax.set_ylabel("error  ‖f − f_R‖ / ‖f‖")
    for ax in axes:
        plain_log(ax.xaxis)
        plain_log(ax.yaxis)
    legend_below(figure, handles(results, look, names, frame["label"].nunique(), lines=False), style)
    return figure


def interactive(results, frames):
    frame = frames["heads"]
    look, panels = looks(results), groups_present(frame)
    ends = rounded([frame["evicted_mass"].min(), frame["evicted_mass"].max()])
    traces = []
    for i, group in enumerate(panels):
        x, y = axis_names(i)
        traces.append({"type": "scatter", "mode": "lines", "x": ends, "y": ends, "xaxis": x, "yaxis": y,
                       "line": {"color": "#8a8a8a", "width": 1}, "showlegend": False, "hoverinfo": "skip"})
        for label, part in frame[frame["group"] == group].groupby("label", sort=False):
            mine = look[label]
            traces.append({
                "type": "scatter", "mode": "markers", "name": shown_name(label, part["foresight"].iloc[0]),
                "meta": label, "x": rounded(part["evicted_mass"], 4), "y": rounded(part["error"], 4), "xaxis": x,
                "yaxis": y, "marker": {"color": mine.colour, "symbol": mine.plotly_marker, "size": 6, "opacity": 0.75},
                "text": [f"{t}, layer {a}, query head {h}" for t, a, h in
                         zip(part["trace"], part["layer"], part["q_head"])],
                "hovertemplate": "<b>%{fullData.name}</b><br>%{text}<br>evicted mass %{x:.4f}<br>error %{y:.4f}"
                                 "<extra></extra>"})
    layout = panel_layout([group_title(g) for g in panels],
                          {**log_axis(frame["evicted_mass"]), "title": {"text": "evicted_mass"}},
                          {**log_axis(frame["error"]), "title": {"text": "error"}})
    for i in range(1, len(panels)):
        layout[f"xaxis{i + 1}"]["matches"], layout[f"yaxis{i + 1}"]["matches"] = "x", "y"
    return {"": {"data": traces, "layout": layout}}


def note(results, frames):
    left = [label for label in results.labels if label not in set(frames["heads"]["label"])]
    return f"Not drawn, having evicted nothing: {', '.join(left)}." if left else ""
