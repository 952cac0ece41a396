"""What a correction from statistics of the evicted tokens gives back: exact against first and second order."""

import numpy as np
import pandas as pd

from .. import bootstrap
from ..errors import Absent
from ..style import (WIDTHS, compensator_look, compensator_title, paper, plain_log, plotly_marker, plt,
                     shown_name)
from .common import about, at_budget, by, configurations, log_axis, require, rounded, shown_first, thin

NAME = "correction"
TITLE = "Uncorrected against corrected error"
HOW_TO_READ = ("Points are means of 64 steps of one head: below the diagonal the correction helps, above it harms; lines "
               "are the share of the error that each correction removes in each layer (1 = all of it, below 0 = worse "
               "than plain eviction), with 95 % block-bootstrap intervals.")
BY_BUDGET = True
N_COLUMNS = {"single": 1, "double": 4}
N_POINTS = 600  # per method and compensator


def _wanted(results):
    return [c for c in results.compensators if c != "none" and results.has("error_corrected", c)]


def data(results, budget=None, n_points=N_POINTS):
    """points: label, compensator, trace, layer, head, block, error, error_corrected (thinned to n_points for each
    label and compensator); by_layer: label, compensator, layer, removed, low, high, from all blocks."""
    results, budget = at_budget(results, budget)
    require(results, "error")
    wanted = _wanted(results)
    if not wanted:
        raise Absent("no compensator was measured: run again with --compensators mean,moments,gaussian")
    error, corrected = results.blocks("error"), {c: results.blocks("error_corrected", c) for c in wanted}
    points, by_layer = [], []
    for label, asked, mine in configurations(results):
        places = list(zip(mine.cells.index, mine.cells["trace"], mine.cells["layer"]))
        weights = {cell: mine.block_weights(cell) for cell, _, _ in places}
        for c in wanted:
            here = [p for p in places if p[0] in error and p[0] in corrected[c]]
            some = _points(here, error, corrected[c], n_points)
            if some is None:
                continue
            points.append(some.assign(label=label, budget=asked, compensator=c))
            for layer in sorted({layer for _, _, layer in here}):
                sums = {}
                for cell, trace, at in here:
                    if at == layer:
                        bootstrap.add(sums, trace,
                                      bootstrap.block_sums([error[cell], corrected[c][cell]], weights[cell]))
                removed, low, high = bootstrap.interval(list(sums.values()), bootstrap.removed_share)
                by_layer.append({"label": label, "budget": asked, "compensator": c, "layer": layer,
                                 "removed": removed, "low": low, "high": high})
    if not points:
        raise Absent("nothing was evicted at this budget, so there is nothing to correct")
    columns = ["label", "budget", "compensator", "trace", "layer", "head", "block", "error", "error_corrected"]
    return {"points": pd.concat(points, ignore_index=True)[columns], "by_layer": pd.DataFrame(by_layer)}


def _points(places, error, corrected, n_points):
    """At most n_points blocks that have an error, as a frame; None where there is no such block."""
    if not places:
        return None
    of = np.concatenate([np.full(error[cell].size, i) for i, (cell, _, _) in enumerate(places)])
    place = np.concatenate([np.arange(error[cell].size) for cell, _, _ in places])
    x = np.concatenate([error[cell].ravel() for cell, _, _ in places])
    y = np.concatenate([corrected[cell].ravel() for cell, _, _ in places])
    keep = thin(np.flatnonzero((x > 0) & np.isfinite(y)), n_points)
    if not len(keep):
        return None
    of, place = of[keep], place[keep]
    n_blocks = np.array([error[cell].shape[1] for cell, _, _ in places])[of]
    return pd.DataFrame({"trace": [places[i][1] for i in of], "layer": [places[i][2] for i in of],
                         "head": place // n_blocks, "block": place % n_blocks, "error": x[keep],
                         "error_corrected": y[keep]})


@paper
def draw(results, budget=None, style="double", frames=None):
    frames = frames or data(results, budget)
    points, by_layer = frames["points"], frames["by_layer"]
    labels = shown_first(results, list(dict.fromkeys(points["label"])), N_COLUMNS[style])
    n = len(labels)
    width = WIDTHS[style] if style == "single" or n > 1 else WIDTHS["double"] * 0.5
    figure, axes = plt.subplots(2, n, figsize=(width, 4.1), squeeze=False, layout="constrained", sharey="row")
    shown = points[points["label"].isin(labels)]
    positive = shown[shown["error_corrected"] > 0]
    low = max(float(positive[["error", "error_corrected"]].quantile(0.002).min()), 1e-6) * 0.8
    high = float(shown[["error", "error_corrected"]].max().max()) * 1.25
    wanted = list(dict.fromkeys(points["compensator"]))
    floor = -1.0
    lines = []
    for column, label in enumerate(labels):
        above, below = axes[:, column]
        above.plot([low, high], [low, high], color="#555555", linewidth=0.7, zorder=1)
        for c in wanted:
            colour, marker = compensator_look(c)
            at = shown[(shown["label"] == label) & (shown["compensator"] == c)]
            above.plot(at["error"], at["error_corrected"].clip(lower=low), marker, markersize=1.9, alpha=0.5,
                       markeredgewidth=0, color=colour, zorder=2)
            share = by_layer[(by_layer["label"] == label) & (by_layer["compensator"] == c)].sort_values("layer")
            removed = share["removed"].clip(lower=floor)
            line, = below.plot(share["layer"], removed, color=colour, marker=marker, label=compensator_title(c))
            below.fill_between(share["layer"], share["low"].clip(lower=floor), share["high"].clip(lower=floor),
                               color=colour, alpha=0.18, linewidth=0)
            if column == 0:
                lines.append(line)
        above.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=label)
        above.set_xlabel("error, uncorrected")
        plain_log(above.xaxis)
        plain_log(above.yaxis)
        below.axhline(0, color="#555555", linewidth=0.7)
        below.set_xlabel("layer")
        layers = sorted(set(by_layer["layer"]))
        if len(layers) <= 8:
            below.set_xticks(layers)
        else:
            below.xaxis.get_major_locator().set_params(integer=True)
        if column == 0:
            above.set_ylabel("error_corrected")
            below.set_ylabel("share of the error removed")
    axes[1, 0].set_ylim(top=1.0)
    figure.legend(handles=lines, loc="outside lower center", ncols=1 if style == "single" else len(lines))
    return figure


def interactive(results, frames):
    out = {}
    points_of, shares_of = (by(frames[part], "label") for part in ("points", "by_layer"))
    for label in shown_first(results, list(points_of)):
        points, share = points_of[label], shares_of[label]
        lines = by(share, "compensator")
        ends = rounded([points[["error", "error_corrected"]].clip(lower=1e-6).min().min(),
                        points[["error", "error_corrected"]].max().max()])
        traces = [{"type": "scatter", "mode": "lines", "x": ends, "y": ends, "line": {"width": 1, "color": "#8a8a8a"},
                   "showlegend": False, "hoverinfo": "skip"}]
        for c, at in by(points, "compensator").items():
            colour, marker = compensator_look(c)
            symbol = plotly_marker(marker)
            line = lines[c].sort_values("layer")
            name = compensator_title(c)
            traces.append({
                "type": "scattergl" if len(at) > 4000 else "scatter", "mode": "markers", "name": name,
                "legendgroup": c, "showlegend": False, "x": rounded(at["error"], 4),
                "y": rounded(at["error_corrected"], 4),
                "marker": {"color": colour, "symbol": symbol, "size": 4, "opacity": 0.55},
                "text": [f"layer {a}, head {h}, block {b}" for a, h, b in zip(at["layer"], at["head"], at["block"])],
                "hovertemplate": f"<b>{name}</b><br>%{{text}}<br>error %{{x:.4f}}<br>corrected %{{y:.4f}}"
                                 "<extra></extra>"})
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": name, "legendgroup": c, "xaxis": "x2",
                "yaxis": "y2", "x": [int(v) for v in line["layer"]], "y": rounded(line["removed"]),
                "line": {"color": colour, "width": 2}, "marker": {"color": colour, "symbol": symbol, "size": 8},
                "error_y": {"type": "data", "symmetric": False, "color": colour, "thickness": 1,
                            "array": rounded(line["high"] - line["removed"]),
                            "arrayminus": rounded(line["removed"] - line["low"])},
                "hovertemplate": f"<b>{name}</b><br>layer %{{x}}<br>removes %{{y:.1%}}<extra></extra>"})
        out[label] = {"data": traces, "layout": {
            "hovermode": "closest", "legend": {"orientation": "h", "y": -0.22},
            "xaxis": {**log_axis(ends), "domain": [0, 0.44], "anchor": "y", "title": {"text": "error, uncorrected"}},
            "yaxis": {**log_axis(ends), "anchor": "x", "title": {"text": "error_corrected"}},
            "xaxis2": {"domain": [0.56, 1], "anchor": "y2", "title": {"text": "layer"}, "dtick": 1
                       if share["layer"].nunique() <= 12 else None},
            "yaxis2": {"anchor": "x2", "title": {"text": "share of the error removed"}, "zeroline": True,
                       "tickformat": ".0%"},
            "annotations": [
                {"text": f"<b>{t}</b>", "xref": "paper", "yref": "paper", "x": x, "y": 1.02, "xanchor": "left",
                 "yanchor": "bottom", "showarrow": False}
                for t, x in ((shown_name(label, about(results, label)["foresight"]), 0), ("by layer", 0.56))]}}
    return out


def note(results, frames):
    parts = []
    asked = list(results.compensators)
    for c, order in (("moments", "first-order"), ("gaussian", "second-order")):
        if c not in {name.split(":")[0] for name in frames["points"]["compensator"]}:
            parts.append(f"The {order} correction ({c}) was not measured in this run"
                         + (f" (measured: {', '.join(asked)})." if asked else "."))
    if (frames["by_layer"]["removed"] < -1).any():
        parts.append("The PDF and SVG cut the share at −1.")
    n_labels = frames["points"]["label"].nunique()
    if n_labels > N_COLUMNS["double"]:
        parts.append(f"The PDF and SVG show {N_COLUMNS['double']} of {n_labels} methods; "
                     "kvreplay figure correction DIR --method LABEL draws the others.")
    return " ".join(parts)
