"""The structure of MomentKV's analysis on this run's data: error, direction and correction layer by layer.

The paper's own figures (arXiv 2606.01563, sections 2 and 3, and its figure 3; read off its plots where
the text has no number) stand beside them in panels of their own. They are of another model and other texts: they are
never pooled with this run's, and no axis holds both.
"""

from functools import cache

import numpy as np
import pandas as pd

from .. import bootstrap
from ..errors import Absent
from ..style import WIDTHS, compensator_look, compensator_title, paper, plotly_marker, plt, shown_name
from ..tables import pooled
from .common import about, at_budget, by, configurations, panel_layout, require, rounded

NAME = "layers"
TITLE = "Error, direction and correction by layer"
HOW_TO_READ = ("Left, the error of plain eviction in each layer at every budget; middle, how the evicted output points "
               "against the retained one (line: median, bands: 50 % and 90 % of the values; 0 is orthogonal); right, the "
               "share of the error that each correction gives back; below, the same as MomentKV's paper reports it, for "
               "another model.")
BY_BUDGET = True
SEES_ALL_BUDGETS = True
MEANS = ("error", "evicted_mass", "cos_retained_evicted")
QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
BUDGETS = [("#cc3355", "s"), ("#e8762d", "D"), ("#b58a00", "^"), ("#2c8f4f", "o"), ("#0072b2", "v"), ("#7f5fd0", "P"),
           ("#8a8a8a", "X"), ("#a08770", "h")]

PAPER_BUDGETS = {"64": ("#a0589a", "X"), "128": ("#6f8fa8", "p"), "1024": ("#8a8a8a", "h")}  # none of this run's

PAPER_TITLE = "MomentKV's paper (arXiv 2606.01563)"
PAPER_SETTING = "LLaMA-3-8B, H2O selection, N = 4096, L = 128 unless marked"
# Layers first to last, values low to high. A single number is low = high.
PAPER = pd.DataFrame(
    [("error", "64", 0, 0, 0.77, 0.77), ("error", "128", 0, 0, 0.65, 0.65), ("error", "128", 9, 22, 0.10, 0.13),
     ("error", "128", 29, 29, 0.33, 0.33), ("error", "1024", 0, 0, 0.28, 0.28), ("error", "1024", 1, 31, 0.0, 0.10),
     ("cos_retained_evicted", "128", 0, 31, -0.25, 0.25),
     ("evicted_mass", "128", 0, 0, 0.37, 0.37), ("evicted_mass", "128", 8, 24, 0.03, 0.05),
     ("evicted_mass", "128", 29, 29, 0.10, 0.10),
     *(("removed", "128", layer, layer, share, share) for layer, share in
       zip((0, 4, 8, 12, 16, 20, 24, 28, 31), (0.40, 0.42, 0.39, 0.37, 0.34, 0.32, 0.33, 0.36, 0.36))),
     ("cos_estimate", "128", 0, 0, 0.73, 0.73), ("cos_estimate", "128", 9, 25, 0.95, 0.98),
     ("mean of evicted_mass", "128", 0, 31, 0.075, 0.075), ("mean of cos_retained_evicted", "128", 0, 31, -0.011,
                                                            -0.011),
     ("mean of error", "128", 0, 31, 0.214, 0.214)],
    columns=["quantity", "budget", "first_layer", "last_layer", "low", "high"])
PAPER["source"] = [
    "arXiv 2606.01563, " + ("figure 3, Qasper, L = 128" if q in ("removed", "cos_estimate") else
                            f"LLaMA-3-8B, H2O, N = 4096, L = {b}" +
                            (", range that holds the layers' medians" if q == "cos_retained_evicted" else
                             ", most layers below" if (q, b, first) == ("error", "1024", 1) else ""))
    for q, b, first in zip(PAPER["quantity"], PAPER["budget"], PAPER["first_layer"])]


def data(results, budget=None):
    """error: label, budget, layer, n, error, low, high (all budgets); cos: label, budget, layer, of, n, p5 … p95;
    removed: label, budget, compensator, layer, error, error_corrected, removed, low, high; means: label, budget and the
    means of error, evicted_mass, cos_retained_evicted; the last three at one budget. paper: what the paper reports."""
    require(results, "error")
    everything, (results, budget) = results, at_budget(results, budget)
    error = everything.once("error by layer", lambda: pd.DataFrame(
        [{"label": label, "budget": asked, **row} for label, asked, mine in configurations(everything)
         for row in _by_layer(mine, [("error", "")], bootstrap.mean, "error")]))
    lossy = error.groupby("label")["error"].max() > 0
    error = error[error["label"].map(lossy)].reset_index(drop=True)
    if error.empty:
        raise Absent("nothing was evicted in this run")
    rows = results.summary
    of_run = pooled(rows[rows["metric"].isin(MEANS)], ["label", "budget", "metric"])["mean"].to_dict()
    cos, removed, means = [], [], []
    for label, asked, mine in configurations(results):
        if not lossy[label]:
            continue
        cos += [{"label": label, "budget": asked, **row} for row in _cosines(mine)]
        for c in mine.compensators:
            if c != "none":
                removed += [{"label": label, "budget": asked, "compensator": c, **row} for row in
                            _by_layer(mine, [("error", ""), ("error_corrected", c)], bootstrap.removed_share,
                                      "removed")]
        means.append({"label": label, "budget": asked, **{m: of_run.get((label, asked, m), np.nan) for m in MEANS}})
    columns = ["label", "budget", "layer", "of", "n", *QUANTILES]
    of_removed = ["label", "budget", "compensator", "layer", "n", "error", "error_corrected", "removed", "low", "high"]
    return {"error": error, "cos": pd.DataFrame(cos, columns=columns), "removed": pd.DataFrame(removed,
                                                                                               columns=of_removed),
            "means": pd.DataFrame(means), "paper": PAPER.copy()}


def _by_layer(mine, metrics, statistic, name):
    """Rows of a statistic with its interval for each layer of one configuration, traces pooled."""
    arrays = [mine.blocks(m, c) for m, c in metrics]
    per_layer = {}
    for cell, trace, layer in zip(mine.cells.index, mine.cells["trace"], mine.cells["layer"]):
        if all(cell in a for a in arrays):
            bootstrap.add(per_layer.setdefault(layer, {}), trace,
                          bootstrap.block_sums([a[cell] for a in arrays], mine.block_weights(cell)))
    for layer in sorted(per_layer):
        sums = list(per_layer[layer].values())
        estimate, low, high = bootstrap.interval(sums, statistic)
        all_of = sum(s.sum(axis=0) for s in sums)
        row = {"layer": layer, "n": int(all_of[-1]), name: estimate, "low": low, "high": high}
        if len(metrics) > 1:
            with np.errstate(invalid="ignore", divide="ignore"):
                row["error"], row["error_corrected"] = all_of[:2] / all_of[-1]
        yield row


def _cosines(mine):
    """Quantiles over heads, traces and time of each layer: of single steps where the run has them, else of blocks."""
    steps = mine.steps("cos_retained_evicted")
    arrays = steps if len(steps) == len(mine.cells) else mine.blocks("cos_retained_evicted")
    for layer, cells in sorted(mine.cells.groupby("layer").groups.items()):
        values = np.concatenate([arrays[c].ravel() for c in cells if c in arrays] or [np.array([])]).astype(float)
        values = values[np.isfinite(values)]
        if len(values):
            yield {"layer": layer, "of": "steps" if arrays is steps else "blocks", "n": len(values),
                   **dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()))))}


def order(results, frames):
    """Methods in the order the page offers them: h2o first, as the paper has it, then as the run has them."""
    labels = list(dict.fromkeys(frames["error"]["label"]))
    method = {label: about(results, label)["method"] for label in labels}
    return sorted(labels, key=lambda x: (method[x] != "h2o", about(results, x)["foresight"] == "oracle"))


def _budgets(frame):
    return list(dict.fromkeys(frame["budget"]))


def budget_look(i):
    return BUDGETS[i % len(BUDGETS)]


def _summary(row):
    return (f"mean evicted mass {row['evicted_mass']:.3g}, mean cosine {row['cos_retained_evicted']:.3g}, "
            f"mean error {100 * row['error']:.3g} %").replace("-", "−")


@cache
def _paper_summary():
    def of(quantity):
        return PAPER.loc[PAPER["quantity"] == f"mean of {quantity}", "low"].iloc[0]

    return _summary({m: of(m) for m in ("evicted_mass", "cos_retained_evicted", "error")})


def _layer_ticks(ax, layers):
    if len(layers) <= 8:
        ax.set_xticks(layers)
    else:
        ax.xaxis.get_major_locator().set_params(integer=True)


@paper
def draw(results, budget=None, style="double", frames=None):
    frames = frames or data(results, budget)
    label = order(results, frames)[0]
    error, cos, removed = (frames[part][frames[part]["label"] == label] for part in ("error", "cos", "removed"))
    means = frames["means"][frames["means"]["label"] == label].iloc[0]
    double = style == "double"
    figure = plt.figure(figsize=(WIDTHS[style], 4.9 if double else 9.6), layout="constrained")
    if double:
        top, bottom = figure.subfigures(2, 1)
        ours, theirs = top.subplots(1, 3), bottom.subplots(1, 3)
    else:
        top, bottom = figure.subfigures(2, 1)
        ours, theirs = top.subplots(3, 1), bottom.subplots(3, 1)
    name = shown_name(label, about(results, label)["foresight"])
    at = f" at budget {means['budget']}" if means["budget"] else ""
    break_at, size = (": ", 7.5) if double else (":\n", 6.4)
    top.suptitle(f"This run, {name}{at}{break_at}{_summary(means)}", x=0.01, ha="left", fontsize=size)
    bottom.suptitle(f"{PAPER_TITLE}, {PAPER_SETTING}:\n{_paper_summary()}" if double else
                    f"{PAPER_TITLE},\n{PAPER_SETTING}:\n{_paper_summary()}", x=0.01, ha="left", fontsize=size)
    layers = sorted(set(error["layer"]))
    budgets = _budgets(error)
    for i, b in enumerate(budgets):
        line, (colour, marker) = error[error["budget"] == b], budget_look(i)
        ours[0].plot(line["layer"], line["error"], color=colour, marker=marker, label=f"budget {b}" if b else name)
        ours[0].fill_between(line["layer"], line["low"], line["high"], color=colour, alpha=0.16, linewidth=0)
    ours[0].set(title="error", ylim=(0, None))
    if len(cos):
        ours[1].fill_between(cos["layer"], cos["p5"], cos["p95"], color="#0072b2", alpha=0.15, linewidth=0)
        ours[1].fill_between(cos["layer"], cos["p25"], cos["p75"], color="#0072b2", alpha=0.3, linewidth=0)
        ours[1].plot(cos["layer"], cos["p50"], color="#0072b2", marker="o")
    for c, line in removed.groupby("compensator", sort=False):
        colour, marker = compensator_look(c)
        ours[2].plot(line["layer"], line["removed"].clip(lower=-1), color=colour, marker=marker,
                     label=compensator_title(c))
        ours[2].fill_between(line["layer"], line["low"].clip(lower=-1), line["high"].clip(lower=-1), color=colour,
                             alpha=0.18,
                             linewidth=0)
    for row in PAPER[PAPER["quantity"] == "error"].itertuples():
        _mark(theirs[0], row, *PAPER_BUDGETS[row.budget])
        if row.first_layer == row.last_layer:
            theirs[0].annotate(f"L = {row.budget}", (row.first_layer, row.low), (-5 if row.first_layer else 5, -2),
                               textcoords="offset points", fontsize=6.4, ha="right" if row.first_layer else "left")
    theirs[0].annotate("L = 128", (15.5, 0.145), ha="center", fontsize=6.4)
    theirs[0].annotate("L = 1024, most layers", (16, 0.04), ha="center", fontsize=6.4)
    theirs[0].set(title="error", ylim=(0, 0.85))
    row = next(PAPER[PAPER["quantity"] == "cos_retained_evicted"].itertuples())
    _mark(theirs[1], row, "#0072b2", "o")
    theirs[1].annotate("layers' medians lie in here", (15.5, 0.32), ha="center", fontsize=6.4)
    colour, marker = compensator_look("moments")
    share = PAPER[PAPER["quantity"] == "removed"]
    theirs[2].plot(share["first_layer"], share["low"], color=colour, marker=marker)
    theirs[2].annotate("figure 3: Qasper", (31, 0.05), ha="right", fontsize=6.4, color="#555555")
    for row_axes, x in ((ours, layers), (theirs, range(0, 32, 8))):
        row_axes[1].set(title="cos(f_R, f_E)", ylim=(-1, 1))
        row_axes[1].axhline(0, color="#555555", linewidth=0.7)
        row_axes[2].set(title="share of the error removed")
        row_axes[2].axhline(0, color="#555555", linewidth=0.7)
        for i, ax in enumerate(row_axes):
            _layer_ticks(ax, list(x))
            if double or i == 2:
                ax.set_xlabel("layer")
    theirs[2].set_ylim(0, 1)
    if removed["removed"].max() > 0:
        ours[2].set_ylim(min(0.0, 1.1 * max(-1.0, np.nanmin(removed["low"].fillna(0)))), 1)
    handles = [h for ax in (ours[0], ours[2]) for h in ax.get_legend_handles_labels()[0]]
    top.legend(handles=handles, loc="outside lower center", ncols=4 if double else 2, handlelength=2.4,
               columnspacing=1.2,
               **({} if double else {"fontsize": 6.2}))
    return figure


def _mark(ax, row, colour, marker):
    """A reported value: a point, or a box over layers and values."""
    if row.first_layer == row.last_layer:
        ax.plot(row.first_layer, row.low, color=colour, marker=marker, linestyle="", markersize=4.5)
    else:
        ax.fill_between([row.first_layer, row.last_layer], row.low, row.high, color=colour, alpha=0.35, linewidth=0)


def interactive(results, frames):
    out = {}
    of_label = {part: by(frames[part], "label") for part in ("error", "cos", "removed", "means")}
    for label in order(results, frames):
        error, cos, removed, means = (rows.get(label, frames[part].iloc[:0]) for part, rows in of_label.items())
        foresight = about(results, label)["foresight"]
        traces = []
        for i, (b, line) in enumerate(by(error, "budget").items()):
            colour, marker = budget_look(i)
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": f"budget {b}" if b else label,
                "x": [int(v) for v in line["layer"]], "y": rounded(line["error"]), "line": {"color": colour,
                                                                                            "width": 2},
                "marker": {"color": colour, "symbol": plotly_marker(marker), "size": 8},
                "error_y": {"type": "data", "symmetric": False, "color": colour, "thickness": 1,
                            "array": rounded(line["high"] - line["error"]),
                            "arrayminus": rounded(line["error"] - line["low"])},
                "hovertemplate": "<b>%{fullData.name}</b><br>layer %{x}<br>error %{y:.4f}<extra></extra>"})
        x = [int(v) for v in cos["layer"]]
        for low, high, colour, name in (("p5", "p95", "#0072b226", "90 % of the cosines"),
                                        ("p25", "p75", "#0072b24d", "50 % of the cosines")):
            traces.append({"type": "scatter", "mode": "lines", "line": {"width": 0}, "fill": "toself",
                           "fillcolor": colour,
                           "name": name, "hoverinfo": "skip", "x": x + x[::-1],
                           "y": rounded([*cos[low], *cos[high][::-1]]), "xaxis": "x2", "yaxis": "y2"})
        traces.append({"type": "scatter", "mode": "lines+markers", "name": "median cosine", "x": x,
                       "y": rounded(cos["p50"]),
                       "xaxis": "x2", "yaxis": "y2", "line": {"color": "#3a8fd0", "width": 2}, "marker": {"size": 8},
                       "customdata": [rounded(row) for row in cos[list(QUANTILES)].to_numpy()],
                       "hovertemplate": "layer %{x}<br>median %{y:.3f}<br>50 %: %{customdata[1]} to %{customdata[3]}<br>"
                                        "90 %: %{customdata[0]} to %{customdata[4]}<extra></extra>"})
        for c, line in removed.groupby("compensator", sort=False):
            colour, marker = compensator_look(c)
            name = compensator_title(c)
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": name, "xaxis": "x3", "yaxis": "y3",
                "x": [int(v) for v in line["layer"]], "y": rounded(line["removed"]), "line": {"color": colour,
                                                                                              "width": 2},
                "marker": {"color": colour, "symbol": plotly_marker(marker), "size": 8},
                "error_y": {"type": "data", "symmetric": False, "color": colour, "thickness": 1,
                            "array": rounded(line["high"] - line["removed"]),
                            "arrayminus": rounded(line["removed"] - line["low"])},
                "customdata": [rounded(r, 4) for r in line[["error", "error_corrected"]].to_numpy()],
                "hovertemplate": f"<b>{name}</b><br>layer %{{x}}<br>removes %{{y:.1%}}<br>error %{{customdata[0]}} before, "
                                 "%{customdata[1]} after<extra></extra>"})
        traces += _paper_traces()
        out[label] = {"data": traces, "layout": _layout(shown_name(label, foresight), error, means)}
    return out


@cache
def _paper_traces():
    """The reported values in the second row of panels."""
    traces = []
    for row in PAPER[PAPER["quantity"].isin(["error", "cos_retained_evicted"])].itertuples():
        at = ("x4", "y4") if row.quantity == "error" else ("x5", "y5")
        colour, marker = PAPER_BUDGETS[row.budget] if row.quantity == "error" else ("#0072b2", "o")
        common = {"type": "scatter", "xaxis": at[0], "yaxis": at[1], "showlegend": False, "hoverinfo": "text",
                  "text": f"paper, L = {row.budget}, layers {row.first_layer} to {row.last_layer}: {row.low:g} to {row.high:g}"
                  if row.first_layer < row.last_layer else f"paper, L = {row.budget}, layer {row.first_layer}: {row.low:g}"}
        if row.first_layer == row.last_layer:
            traces.append({**common, "mode": "markers", "x": [row.first_layer], "y": [row.low],
                           "marker": {"color": colour, "symbol": plotly_marker(marker), "size": 9}})
        else:
            traces.append({**common, "mode": "lines", "fill": "toself", "fillcolor": colour + "55", "hoveron": "fills",
                           "line": {"width": 0, "color": colour}, "x": [row.first_layer, row.last_layer, row.last_layer,
                                                                        row.first_layer],
                           "y": [row.low, row.low, row.high, row.high]})
    share = PAPER[PAPER["quantity"] == "removed"]
    colour, marker = compensator_look("moments")
    traces.append({"type": "scatter", "mode": "lines+markers", "xaxis": "x6", "yaxis": "y6", "showlegend": False,
                   "x": [int(v) for v in share["first_layer"]], "y": rounded(share["low"]),
                   "line": {"color": colour, "width": 2}, "marker": {"color": colour, "symbol": plotly_marker(marker),
                                                                     "size": 8},
                   "hovertemplate": "paper, figure 3<br>layer %{x}<br>removes %{y:.0%}<extra></extra>"})
    return traces


def _layout(name, error, means):
    layout = panel_layout(["error", "cos(f_R, f_E)", "share of the error removed"] * 2, {}, {}, gap=0.08)
    layout["annotations"] = []
    width, gap = (1 - 2 * 0.08) / 3, 0.08
    for i in range(6):
        suffix = "" if i == 0 else str(i + 1)
        left, top = (i % 3) * (width + gap), i < 3
        layout[f"xaxis{suffix}"] = {"anchor": f"y{suffix}", "domain": [round(left, 4), round(left + width, 4)],
                                    "title": {"text": "layer"}}
        layout[f"yaxis{suffix}"] = {"anchor": f"x{suffix}", "domain": [0.6, 0.92] if top else [0.0, 0.32]}
        layout["annotations"].append({
            "text": ("<b>error</b>", "<b>cos(f_R, f_E)</b>", "<b>share of the error removed</b>")[i % 3],
            "xref": "paper",
            "yref": "paper", "x": left, "y": 0.93 if top else 0.33, "xanchor": "left", "yanchor": "bottom",
            "showarrow": False})
    layers = sorted(set(error["layer"]))
    for suffix in ("", "2", "3"):
        if len(layers) <= 12:
            layout[f"xaxis{suffix}"].update(tickmode="array", tickvals=[int(v) for v in layers])
    layout["yaxis"]["rangemode"] = layout["yaxis4"]["rangemode"] = "tozero"
    for suffix in ("2", "5"):
        layout[f"yaxis{suffix}"].update(range=[-1.05, 1.05], zeroline=True)
    for suffix in ("3", "6"):
        layout[f"yaxis{suffix}"].update(tickformat=".0%", zeroline=True)
    layout["yaxis6"]["range"] = [0, 1]
    heads = [(f"<b>This run, {name}</b>" + (f", budget {means.iloc[0]['budget']}:<br>{_summary(means.iloc[0])}"
                                            if len(means) and means.iloc[0]["budget"] else ""), 1.0),
             (f"<b>{PAPER_TITLE}</b>, {PAPER_SETTING}:<br>{_paper_summary()}", 0.40)]
    for row in PAPER[(PAPER["quantity"] == "error")].itertuples():
        layout["annotations"].append({
            "text": f"L = {row.budget}", "xref": "x4", "yref": "y4", "showarrow": False, "font": {"size": 10},
            "x": (row.first_layer + row.last_layer) / 2, "y": row.high, "xanchor": "left" if row.last_layer == 0 else
            "right" if row.first_layer == 29 else "center", "yanchor": "bottom" if row.first_layer == 9 else
            "top" if row.first_layer == 1 else "middle", "xshift": 8 if row.last_layer == 0 else
            -8 if row.first_layer == 29 else 0})
    layout["annotations"].append({"text": "the layers' medians lie in here", "xref": "x5", "yref": "y5", "x": 15.5,
                                  "y": 0.27,
                                  "showarrow": False, "font": {"size": 10}, "yanchor": "bottom"})
    layout["annotations"] += [{"text": text, "xref": "paper", "yref": "paper", "x": 0, "y": y, "xanchor": "left",
                               "align": "left", "yanchor": "bottom", "showarrow": False} for text, y in heads]
    layout["legend"]["y"] = -0.16
    layout["height"] = 760
    return layout


def note(results, frames):
    of = set(frames["cos"]["of"])
    text = ("Cosines of single steps." if of == {"steps"} else
            f"Cosines of means over {results.block_steps} steps; run with --detail steps for single steps." if of else "")
    return (f"{text} The paper's values are those it reports or that can be read off its plots ({PAPER_SETTING}; the share "
            "removed is its figure 3, Qasper), with its own selection and another model: compare shapes, not numbers. "
            f"Its estimate of f_E has a mean cosine with f_E of about 0.92 (0.73 in layer 0, 0.95 to 0.98 in layers 9 to "
            "25).").strip()
