"""Where the error is: a heat map over layers and query heads."""

import numpy as np
import pandas as pd

from ..style import WIDTHS, paper, plt, shown_name
from .common import about, at_budget, require, rounded, shown_first

NAME = "heads"
TITLE = "Error by layer and head"
HOW_TO_READ = ("Each square is the mean error_output of one query head of one layer: bright rows are layers, bright "
               "columns heads that this method serves badly, and a grey square was not counted; all methods share one "
               "colour scale.")
BY_BUDGET = True
N_PANELS = {"single": 2, "double": 6}


def data(results, budget=None):
    """heads: label, layer, q_head, error_output: the mean over the counted steps of all traces."""
    results, budget = at_budget(results, budget)
    require(results, "error_output")
    rows = results.summary[(results.summary["metric"] == "error_output") & (results.summary["q_head"] >= 0)]
    rows = rows.assign(_sum=np.where(rows["n"] > 0, rows["n"] * rows["mean"], 0.0))
    out = rows.groupby(["label", "budget", "layer", "q_head"], sort=False)[["n", "_sum"]].sum().reset_index()
    out["error_output"] = (out["_sum"] / out["n"]).where(out["n"] > 0)
    order = {label: i for i, label in enumerate(results.labels)}
    out = out.sort_values(["label", "layer", "q_head"], key=lambda c: c.map(order) if c.name == "label" else c)
    return {"heads": out[["label", "budget", "layer", "q_head", "n", "error_output"]].reset_index(drop=True)}


def _matrix(frame, label):
    """(layers, heads) of one method; layers in ascending order, gaps left out."""
    return frame[frame["label"] == label].pivot(index="layer", columns="q_head", values="error_output")


def _chosen(results, frame, n):
    labels = [label for label in dict.fromkeys(frame["label"])
              if frame.loc[frame["label"] == label, "error_output"].max() > 0]

    chosen = shown_first(results, labels, n)
    return chosen or list(dict.fromkeys(frame["label"]))[:1]


@paper
def draw(results, budget=None, style="double", frames=None):
    frame = (frames or data(results, budget))["heads"]
    labels = _chosen(results, frame, N_PANELS[style])
    columns = min(len(labels), 3 if style == "double" else 1)
    rows = -(-len(labels) // columns)
    n_layers = frame["layer"].nunique()
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTHS[style], rows * min(3.2, 0.75 + 0.16 * max(4, n_layers))),
                                squeeze=False, layout="constrained", sharex=True, sharey=True)
    top = frame[frame["label"].isin(labels)]["error_output"].max()
    colours = plt.get_cmap("cividis").with_extremes(bad="#c4c4c4")
    for i, ax in enumerate(axes.flat):
        if i >= len(labels):
            ax.set_visible(False)
            continue
        matrix = _matrix(frame, labels[i])
        image = ax.imshow(np.ma.masked_invalid(matrix.to_numpy(dtype=float)), aspect="auto", cmap=colours, vmin=0,
                          vmax=top if top > 0 else 1, interpolation="nearest")
        ax.grid(False)
        ax.set_title(shown_name(labels[i], about(results, labels[i])["foresight"]))
        every_row, every_column = max(1, len(matrix) // 8), max(1, matrix.shape[1] // 8)
        ax.set_yticks(range(0, len(matrix), every_row), matrix.index[::every_row])
        ax.set_xticks(range(0, matrix.shape[1], every_column), matrix.columns[::every_column])
        if i % columns == 0:
            ax.set_ylabel("layer")
        if i + columns >= len(labels):
            ax.set_xlabel("query head")
            ax.tick_params(labelbottom=True)
    figure.colorbar(image, ax=axes, label="error_output", shrink=0.9, pad=0.015, aspect=30 if rows > 1 else 15)
    return figure


def interactive(results, frames):
    frame = frames["heads"]
    top = float(np.nanmax(frame["error_output"])) if frame["error_output"].notna().any() else 1.0
    out = {}
    for label in shown_first(results, list(dict.fromkeys(frame["label"]))):
        matrix = _matrix(frame, label)
        out[label] = {"data": [{
            "type": "heatmap", "z": [rounded(row) for row in matrix.to_numpy(dtype=float)],
            "x": [str(c) for c in matrix.columns], "y": [str(r) for r in matrix.index], "colorscale": "Cividis",
            "zmin": 0, "zmax": top or 1, "colorbar": {"title": {"text": "error_output"}}, "xgap": 1, "ygap": 1,
            "hovertemplate": "layer %{y}, query head %{x}<br>error_output %{z:.4f}<extra></extra>"}],
            "layout": {"xaxis": {"title": {"text": "query head"}, "type": "category", "showgrid": False},
                       "yaxis": {"title": {"text": "layer"}, "type": "category", "autorange": "reversed",
                                 "showgrid": False},
                       "annotations": [{"text": f"<b>{shown_name(label, about(results, label)['foresight'])}</b>",
                                        "xref": "paper", "yref": "paper", "x": 0, "y": 1.02, "xanchor": "left",
                                        "yanchor": "bottom", "showarrow": False}]}}
    return out


def note(results, frames):
    n_labels = frames["heads"]["label"].nunique()
    if n_labels > N_PANELS["double"]:
        return (f"The PDF and SVG show {N_PANELS['double']} of {n_labels} methods; "
                "kvreplay figure heads DIR --method LABEL draws the others.")
    return ""
