"""How differently the evicted tokens point: the distribution of the directional mismatch."""

import numpy as np
import pandas as pd

from ..style import grid, legend_below, looks, paper, shown_name
from .common import (at_budget, axis_names, configurations, group_title, groups_present, handles, look_or_grey, named,
                     panel_layout, require, rounded)

NAME = "mismatch"
TITLE = "Directional mismatch of retained and evicted outputs"
HOW_TO_READ = ("Cumulative distribution over heads, layers and time of 1 − cos(f_R, f_E): at 0 the evicted tokens "
               "would have added only length, at 1 (dashed) they are orthogonal to what was kept, which no choice of "
               "weights on the kept tokens can restore; a curve further right means more lost direction.")
BY_BUDGET = True
N_QUANTILES = 401


def data(results, budget=None):
    """ecdf: label, fraction, directional_mismatch: the quantile function over every step where the run has
    --detail steps, else over means of 64 steps; and n, the number of values behind the curve."""
    results, budget = at_budget(results, budget)
    require(results, "directional_mismatch")
    rows = []
    for label, asked, mine in configurations(results):
        by_step = mine.steps("directional_mismatch")
        arrays = by_step if len(by_step) == len(mine.cells) else mine.blocks("directional_mismatch")
        if not arrays:
            continue
        values = np.concatenate([a.ravel() for a in arrays.values()]).astype(float)
        values = np.sort(values[np.isfinite(values)])
        if not len(values):
            continue
        fraction = np.linspace(0, 1, min(N_QUANTILES, max(2, len(values))))
        what = mine.cells.iloc[0]
        rows.append(pd.DataFrame({
            "group": what["group"], "label": label, "budget": asked, "foresight": what["foresight"],
            "of": "steps" if arrays is by_step else "blocks", "n": len(values), "fraction": fraction,
            "directional_mismatch": np.quantile(values, fraction)}))
    return {"ecdf": pd.concat(rows, ignore_index=True)}


@paper
def draw(results, budget=None, style="double", frames=None):
    frame = (frames or data(results, budget))["ecdf"]
    look, panels, names = looks(results), groups_present(frame), named(frame, "directional_mismatch")
    figure, axes = grid(len(panels), style, 1.9, sharey=True, sharex=True)
    for i, (group, ax) in enumerate(zip(panels, axes)):
        ax.axvline(1, color="#555555", linewidth=0.7, linestyle="--")
        for label, line in frame[frame["group"] == group].groupby("label", sort=False):
            kwargs = look_or_grey(look, label, names)
            kwargs["markevery"] = (len(line) // 8 + hash_offset(label) % max(1, len(line) // 8), max(1, len(line) // 4))
            ax.plot(line["directional_mismatch"], line["fraction"], **kwargs)
        ax.set_title(group_title(group))
        ax.set_xlabel("1 − cos(f_R, f_E)")
        ax.set_ylim(0, 1)
        if i % (3 if style == "double" else 1) == 0:
            ax.set_ylabel("share of values below")
    legend_below(figure, handles(results, look, names, frame["label"].nunique()), style)
    return figure


def hash_offset(label):
    import zlib

    return zlib.crc32(label.encode())


def interactive(results, frames):
    frame = frames["ecdf"]
    look, panels = looks(results), groups_present(frame)
    traces = []
    for i, group in enumerate(panels):
        x, y = axis_names(i)
        for label, line in frame[frame["group"] == group].groupby("label", sort=False):
            mine = look[label]
            line = line.iloc[:: max(1, len(line) // 120)]
            traces.append({
                "type": "scatter", "mode": "lines", "name": shown_name(label, line["foresight"].iloc[0]), "meta": label,
                "x": rounded(line["directional_mismatch"], 4), "y": rounded(line["fraction"], 4), "xaxis": x,
                "yaxis": y, "line": {"color": mine.colour, "width": 2,
                                     "dash": "dot" if mine.oracle else mine.plotly_dash},
                "hovertemplate": "<b>%{fullData.name}</b><br>%{y:.0%} of values below %{x:.3f}<extra></extra>"})
    layout = panel_layout([group_title(g) for g in panels],
                          {"title": {"text": "1 − cos(f_R, f_E)"}},
                          {"title": {"text": "share of values below"}, "range": [0, 1]})
    for i in range(1, len(panels)):
        layout[f"xaxis{i + 1}"]["matches"] = "x"
    layout["shapes"] = [{"type": "line", "xref": axis_names(i)[0], "yref": axis_names(i)[1], "x0": 1, "x1": 1, "y0": 0,
                         "y1": 1, "line": {"color": "#8a8a8a", "width": 1, "dash": "dash"}} for i in range(len(panels))]
    return {"": {"data": traces, "layout": layout}}


def note(results, frames):
    of = set(frames["ecdf"]["of"])
    return ("Distribution over steps." if of == {"steps"} else
            f"Distribution over means of {results.block_steps} steps; run with --detail steps for single steps.")
