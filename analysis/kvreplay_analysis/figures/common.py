"""What several figures need: configurations in a fixed order, panels by group, thinning, plotly's vocabulary."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from ..errors import Absent, UsageError
from ..results import GROUPS
from ..style import deciding_part, shown_name

N_NAMED = 26  # methods a static figure can name; the rest is drawn in grey


def configurations(results):
    """[(label, budget, Results of that configuration)] in the order of the run."""
    cells = results.cells
    return results.once("configurations", lambda: [
        (label, budget, replace(results, cells=cells.loc[index]))
        for (label, budget), index in cells.groupby(["label", "budget"], sort=False).groups.items()])


def require(results, metric, compensator=""):
    if not results.has(metric, compensator):
        name = f"{metric} of {compensator}" if compensator else metric
        raise Absent(f"this run has no counted value of {name}: run again with --metrics all"
                     + (f" --compensators {compensator}" if compensator else "")
                     + ", or at a budget that evicts something")


def by(frame, column):
    """{value: its rows}, which is one pass over the frame where a mask for each value is many."""
    return dict(list(frame.groupby(column, sort=False)))


def at_budget(results, budget):
    """The run at one budget (with the methods that have none), and that budget."""
    budget = results.default_budget if budget is None else budget
    return results.once(("only", budget), lambda: results.only(budget=budget)), budget


def chosen_head(results, budget=None, layer=None, head=None, usable=lambda cell: True, why=""):
    """(cell, query head) that a figure of one head shows: the first method of `shown_first` that lost something, on the
    first trace, at the layer and head that were asked for, else where its mean error is greatest. Only cells that are
    `usable` count; Absent says `why` where there is none."""
    results, budget = at_budget(results, budget)
    require(results, "error_output")
    if layer is not None:
        results = results.only(layer=layer)
    pool = results.summary[(results.summary["metric"] == "error_output") & (results.summary["n"] > 0)]
    means = pool.groupby(["label", "trace", "layer", "q_head"])["mean"].mean().sort_index()
    lossy = [label for label in results.labels if means.get(label, pd.Series([0.0])).max() > 0]
    for label in shown_first(results, lossy or results.labels):
        cells = results.cells[results.cells["label"] == label]
        cells = cells[cells["trace"] == cells["trace"].iloc[0]]
        cells = cells[[bool(usable(cell)) for cell in cells.index]]
        if cells.empty:
            continue
        mine = means[label, cells["trace"].iloc[0]]
        mine = mine[mine.index.get_level_values("layer").isin(cells["layer"])]
        if head is None:
            at, head = mine.idxmax()
        else:
            n_heads = int(cells["n_heads"].iloc[0])
            if not 0 <= head < n_heads:
                raise UsageError(f"query head {head} is not in {results.folder}, whose layers have heads 0 to "
                                 f"{n_heads - 1}")
            at = mine.xs(head, level="q_head").idxmax()
        return int(cells.index[cells["layer"] == at][0]), int(head)
    raise Absent(why or "no method lost anything at this budget")


def about(results, label):
    """method, group and foresight of a label."""
    return results.once("about", lambda: results.cells.drop_duplicates("label").set_index("label")
                        [["method", "group", "foresight"]].to_dict("index"))[label]


_SHOWN_FIRST = ("h2o", "snapkv", "residual", "momentum", "tova", "keydiff")


def shown_first(results, labels, n=None):
    """The n methods that a static figure has room for: one of each kind that looks at attention or keys, then
    variants and baselines in the run's order, oracles last."""
    seen, keys = {}, {}
    for i, label in enumerate(labels):
        what = about(results, label)
        part = deciding_part(what["method"])
        seen[part] = seen.get(part, 0) + 1
        kind = _SHOWN_FIRST.index(part) if part in _SHOWN_FIRST else len(_SHOWN_FIRST)
        keys[label] = (what["foresight"] == "oracle", seen[part], kind, i)
    return sorted(labels, key=keys.get)[:n]


def groups_present(frame):
    return [g for g in GROUPS if (frame["group"] == g).any()] + \
           sorted(set(frame["group"]) - set(GROUPS))


def group_title(group):
    return GROUPS.get(group, group)


def named(frame, value):
    """Labels a static figure names: all, or the N_NAMED with the lowest mean of a column, oracles included."""
    order = list(dict.fromkeys(frame["label"]))
    if len(order) <= N_NAMED:
        return order
    best = frame.groupby("label")[value].mean().sort_values(kind="stable").index[:N_NAMED]
    return [label for label in order if label in set(best)]


def look_or_grey(looks, label, names):
    """Keyword arguments of a line for a label: its own look, or thin grey where it is not named."""
    if label not in names:
        return {"color": "#c4c4c4", "linestyle": "-", "linewidth": 0.6, "marker": "", "zorder": 1}
    look = looks[label]
    return {"color": look.colour, "linestyle": look.line if not look.oracle else ":", "marker": look.marker,
            "markerfacecolor": look.face, "markeredgewidth": 0.9, "zorder": 3}


def handles(results, looks, names, n_all, lines=True):
    """Legend entries for the named methods, and one for the grey rest."""
    foresight = dict(zip(results.cells["label"], results.cells["foresight"]))
    out = []
    for label in names:
        kwargs = look_or_grey(looks, label, names)
        if not lines:
            kwargs["linestyle"] = ""
        out.append(Line2D([], [], label=shown_name(label, foresight[label]), **kwargs))
    if n_all > len(names):
        out.append(Line2D([], [], color="#c4c4c4", linewidth=1, label=f"{n_all - len(names)} more"))
    return out


def thin(rows, n, seed=1):
    """At most n rows of a frame or array, always the same ones, in their order."""
    if len(rows) <= n:
        return rows
    keep = np.sort(np.random.default_rng(seed).choice(len(rows), n, replace=False))
    return rows.iloc[keep] if hasattr(rows, "iloc") else rows[keep]


# --- plotly -------------------------------------------------------------------------------------------------------

def rounded(values, digits=5):
    """Numbers for the page: significant digits, None where there is no number."""
    values = np.asarray(values, dtype=float).ravel()
    text = f"%.{digits}g " * len(values) % tuple(values.tolist())  # all at once: a page has a million numbers
    return [v if math.isfinite(v) else None for v in map(float, text.split())]


def axis_names(i):
    """('x2', 'y2') for the second panel; the first is ('x', 'y')."""
    return ("x", "y") if i == 0 else (f"x{i + 1}", f"y{i + 1}")


def panel_layout(titles, x, y, gap=0.09):
    """Layout with one pair of axes for each title, side by side. x and y are axis settings shared by all."""
    n = len(titles)
    width = (1 - gap * (n - 1)) / n
    layout = {"annotations": [], "hovermode": "closest", "legend": {"orientation": "h", "y": -0.22}}
    for i, title in enumerate(titles):
        suffix = "" if i == 0 else str(i + 1)
        left = i * (width + gap)
        layout[f"xaxis{suffix}"] = {**x, "domain": [round(left, 4), round(left + width, 4)], "anchor": f"y{suffix}"}
        layout[f"yaxis{suffix}"] = {**y, "anchor": f"x{suffix}"}
        if i > 0:
            layout[f"yaxis{suffix}"].pop("title", None)
        layout["annotations"].append({"text": f"<b>{title}</b>", "xref": "paper", "yref": "paper", "x": left, "y": 1.02,
                                      "xanchor": "left", "yanchor": "bottom", "showarrow": False})
    return layout


def log_axis(values, base=10):
    """Settings of a logarithmic axis whose ticks are whole numbers for reading: 0.2, 0.5, 1, or powers of two."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return {"type": "log"}
    low, high = values.min(), values.max()
    if base == 2:
        if high < 4 * low:
            return {"type": "linear"}
        ticks = [2.0 ** e for e in range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 2)]
    else:
        decades = math.log10(high / low)
        steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
        ticks = [s * 10.0 ** e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
                 for s in steps]
    return {"type": "log", "tickmode": "array", "tickvals": [float(f"{t:.3g}") if t < 1000 else t for t in ticks],
            "ticktext": [f"{t:.6g}" for t in ticks]}


def log_if_wide(values, ratio=30):
    """'log' where positive values span more than a factor, else 'linear'."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    return "log" if len(values) and values.max() > ratio * values.min() else "linear"
