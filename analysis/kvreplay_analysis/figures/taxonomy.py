"""Which heads look where, and which methods serve them."""

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.lines import Line2D

from .. import taxonomy
from ..results import GROUPS
from ..style import WIDTHS, paper, plt, shown_name
from ..tables import pooled
from .common import about, at_budget, axis_names, panel_layout, require, rounded, shown_first

NAME = "taxonomy"
TITLE = "Types of heads"
HOW_TO_READ = ("Every query head by where it looks in the uncompressed cache: at the first tokens (sink), at the "
               "latest (local), at a few tokens far away (retrieval) or at many (diffuse); on the right each method's "
               "mean error_output over the heads of each type; lines part the prompt evictable, the prompt pinned and "
               "per-step selection, which do not compare at one budget.")
BY_BUDGET = True
N_METHODS = {"single": 12, "double": 20}
LOOKS = {"sink": ("#56b4e9", "s"), "local": ("#8f8f8f", "o"), "retrieval": ("#d55e00", "D"),
         "diffuse": ("#7566c9", "^")}


def data(results, budget=None):
    """heads: trace, layer, kv_head, q_head, sink, local, far, entropy, concentration (means over a model's traces),
    head_type. errors: label, foresight, head_type, n (head-steps), error_output at the budget."""
    results, budget = at_budget(results, budget)
    require(results, "error_output")
    heads = taxonomy.types(results)
    rows = taxonomy.with_types(results)
    means = pooled(rows[rows["metric"] == "error_output"], ["label", "head_type"]).reset_index()
    foresight = dict(zip(results.cells["label"], results.cells["foresight"]))
    means["foresight"] = means["label"].map(foresight)
    means = means.rename(columns={"mean": "error_output"})[["label", "foresight", "head_type", "n", "error_output"]]
    return {"heads": heads.drop(columns="model"), "errors": means}


def _map(heads):
    """(layers, heads) of positions in taxonomy.TYPES; the first trace's."""
    one = heads[heads["trace"] == heads["trace"].iloc[0]]
    codes = one.assign(code=one["head_type"].map(taxonomy.TYPES.index))
    return codes.pivot(index="layer", columns="q_head", values="code")


def _order(results, errors, n=None):
    """Labels that have an error somewhere, by group, the best mean of each first."""
    labels = [x for x, rows in errors.groupby("label", sort=False) if rows["error_output"].max() > 0]
    chosen = shown_first(results, labels, n)
    means = errors.groupby("label")["error_output"].mean()
    groups = {x: list(GROUPS).index(about(results, x)["group"]) for x in chosen}
    return sorted(chosen, key=lambda x: (groups[x], means[x], x))


@paper
def draw(results, budget=None, style="double", frames=None):
    frames = frames or data(results, budget)
    heads, errors = frames["heads"], frames["errors"]
    matrix, labels = _map(heads), _order(results, errors, N_METHODS[style])
    single = style == "single"
    tall = 0.55 + 0.14 * len(labels)
    low = min(3.0, 0.75 + 0.16 * max(4, len(matrix)))
    figure, axes = plt.subplots(2 if single else 1, 1 if single else 2, layout="constrained", squeeze=False,
                                figsize=(WIDTHS[style], low + tall if single else max(2.0, tall)),
                                **({"height_ratios": [low, tall]} if single else {"width_ratios": [1, 1.15]}))
    where, dots = axes.flat
    colours = ListedColormap([LOOKS[t][0] for t in taxonomy.TYPES]).with_extremes(bad="#f0f0f0")
    where.imshow(np.ma.masked_invalid(matrix.to_numpy(float)), aspect="auto", cmap=colours,
                 norm=BoundaryNorm(np.arange(-0.5, 4.5), 4), interpolation="nearest")
    where.grid(False)
    if matrix.size <= 400:  # a letter, so that a type is known without its colour
        for (i, j), code in np.ndenumerate(matrix.to_numpy(float)):
            if np.isfinite(code):
                kind = taxonomy.TYPES[int(code)]
                where.text(j, i, kind[0].upper(), ha="center", va="center", fontsize=5.5,
                           color="white" if kind in ("retrieval", "diffuse") else "#222222")
    every_row, every_column = -(-len(matrix) // 10), -(-matrix.shape[1] // 10)
    where.set_yticks(range(0, len(matrix), every_row), matrix.index[::every_row])
    where.set_xticks(range(0, matrix.shape[1], every_column), matrix.columns[::every_column])
    where.set_xlabel("query head")
    where.set_ylabel("layer")
    where.set_title("type of each head")
    at = {label: i for i, label in enumerate(labels)}
    shown = errors[errors["label"].isin(labels)]
    for label in labels:
        mine = shown[shown["label"] == label]["error_output"].dropna()
        if len(mine):
            dots.plot([mine.min(), mine.max()], [at[label]] * 2, color="#cccccc", linewidth=1, zorder=1)
    for kind in taxonomy.TYPES:
        rows = shown[shown["head_type"] == kind]
        dots.plot(rows["error_output"], [at[label] for label in rows["label"]], linestyle="", color=LOOKS[kind][0],
                  marker=LOOKS[kind][1], markersize=3.8, zorder=3)
    for above, below in zip(labels, labels[1:]):  # groups keep different amounts at one budget
        if about(results, above)["group"] != about(results, below)["group"]:
            dots.axhline(at[below] - 0.5, color="#555555", linewidth=0.6)
    dots.set_yticks(range(len(labels)), [shown_name(x, about(results, x)["foresight"]) for x in labels], fontsize=6.2)
    dots.set_ylim(len(labels) - 0.4, -0.6)
    dots.set_xlim(left=0)
    dots.set_xlabel("mean error_output")
    dots.set_title("error by type of head")
    counts = heads[heads["trace"] == heads["trace"].iloc[0]]["head_type"].value_counts()
    handles = [Line2D([], [], linestyle="", marker=LOOKS[t][1], color=LOOKS[t][0], label=f"{t} ({counts[t]})")
               for t in taxonomy.TYPES if t in counts]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handletextpad=0.2)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.25)
    return figure


def interactive(results, frames):
    heads, errors = frames["heads"], frames["errors"]
    out = {}
    for trace, one in heads.groupby("trace", sort=False):
        codes = one.assign(code=one["head_type"].map(taxonomy.TYPES.index))
        matrix = codes.pivot(index="layer", columns="q_head", values="code")
        told = {(r.layer, r.q_head): r for r in one.itertuples()}
        text = [[[told[n, h].head_type, *rounded([getattr(told[n, h], c) for c in taxonomy.HEAD_STATISTICS], 3)]
                 if (n, h) in told else None for h in matrix.columns] for n in matrix.index]
        scale = [[edge, LOOKS[t][0]] for i, t in enumerate(taxonomy.TYPES) for edge in (i / 4, (i + 1) / 4)]
        x, y = axis_names(0)
        traces = [{"type": "heatmap", "z": [rounded(row) for row in matrix.to_numpy(float)], "zmin": -0.5, "zmax": 3.5,
                   "x": [str(c) for c in matrix.columns], "y": [str(r) for r in matrix.index], "colorscale": scale,
                   "showscale": False, "xgap": 1, "ygap": 1, "xaxis": x, "yaxis": y, "customdata": text,
                   "hovertemplate": "layer %{y}, query head %{x}: <b>%{customdata[0]}</b><br>sink %{customdata[1]}, "
                                    "local %{customdata[2]}, far %{customdata[3]}<br>entropy %{customdata[4]}, "
                                    "concentration %{customdata[5]}<extra></extra>"}]
        x, y = axis_names(1)
        names = {x: shown_name(x, about(results, x)["foresight"]) for x in _order(results, errors)}
        for kind in taxonomy.TYPES:
            rows = errors[(errors["head_type"] == kind) & errors["label"].isin(names)]
            if rows.empty:
                continue
            rows = rows.set_index("label").reindex([n for n in names if n in set(rows["label"])])
            traces.append({"type": "scatter", "mode": "markers", "name": kind, "x": rounded(rows["error_output"]),
                           "y": [names[n] for n in rows.index], "xaxis": x, "yaxis": y,
                           "marker": {"color": LOOKS[kind][0], "size": 9,
                                      "symbol": {"s": "square", "o": "circle", "D": "diamond", "^": "triangle-up"}[
                                          LOOKS[kind][1]]},
                           "hovertemplate": f"<b>%{{y}}</b><br>{kind} heads: error_output %{{x:.4f}}<extra></extra>"})
        layout = panel_layout(["type of each head", "error by type of head"], {}, {}, gap=0.2)
        layout["xaxis"].update(title={"text": "query head"}, type="category", showgrid=False)
        layout["yaxis"].update(title={"text": "layer"}, type="category", autorange="reversed", showgrid=False)
        layout["xaxis2"].update(title={"text": "error_output"}, rangemode="tozero")
        layout["yaxis2"].update(type="category", autorange="reversed", automargin=True, dtick=1)
        layout["height"] = max(420, 150 + 20 * len(names))
        out["" if heads["trace"].nunique() == 1 else trace] = {"data": traces, "layout": layout}
        if heads["trace"].nunique() > 1 and _alike(heads):
            return {"": out[trace]}
    return out


def _alike(heads):
    """All traces are of one model, whose heads have one type each."""
    return heads.groupby(["layer", "q_head"])["head_type"].nunique().max() == 1


def note(results, frames):
    counts = frames["heads"].drop_duplicates(["layer", "q_head"])["head_type"].value_counts()
    return (", ".join(f"{counts.get(t, 0)} {t}" for t in taxonomy.TYPES) + f" of {int(counts.sum())} heads. A type "
            f"describes this text: far attention from {taxonomy.FAR:g} on is looking far, and of that "
            f"{taxonomy.CONCENTRATION:g} on the largest hundredth of the tokens is retrieval (docs/compare.md).")
