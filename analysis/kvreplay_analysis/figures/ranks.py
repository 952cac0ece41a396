"""Is the order of methods the same everywhere? Kendall's tau between layers, head types, budgets and traces."""

import numpy as np

from .. import ranks
from ..errors import Absent
from ..results import GROUPS
from ..style import WIDTHS, paper, plt
from .common import group_title, rounded

NAME = "ranks"
TITLE = "Stability of the order of methods"
HOW_TO_READ = ("Each square is Kendall's tau between the orders of the methods (by mean error_output) in two layers, "
               "types of heads, budgets or traces: 1 is the same order, 0 none in common, -1 the reverse; low squares "
               "mean that the best method depends on where one looks.")
BY_BUDGET = True
SEES_ALL_BUDGETS = True  # they are one of the factors
N_NUMBERED = 14  # levels up to which squares carry their number
_GROUPS = {"evictable": "prompt evictable", "pinned": "prompt pinned", "selection": "per-step selection"}
_NAMES = {"layer": "layer", "head_type": "head type", "budget": "budget", "trace": "trace"}


def data(results, budget=None):
    """FACTOR: group, level_a, level_b, tau, n_methods; for each factor with several levels. FACTOR_errors: group,
    level, label, error_output, rank: the orders themselves. At one budget, except for the factor budget."""
    import pandas as pd

    out, reasons = {}, {}
    for factor in ranks.FACTORS:
        tables = {}
        for group in GROUPS:
            try:
                tables[group] = ranks.errors(results, factor, budget, group)
            except Absent as reason:
                reasons.setdefault(factor, str(reason))
        if not tables:
            continue
        pairs, orders = [], []
        for group, table in tables.items():
            tau = ranks.taus(table)
            pairs += [{"group": group, "level_a": str(a), "level_b": str(b), "tau": tau.at[a, b],
                       "n_methods": table.shape[1]} for a in tau.index for b in tau.columns]
            order = table.rank(axis=1, method="average")
            orders += [{"group": group, "level": str(n), "label": label, "error_output": table.at[n, label],
                        "rank": order.at[n, label]} for n in table.index for label in table.columns]
        out[factor], out[f"{factor}_errors"] = pd.DataFrame(pairs), pd.DataFrame(orders)
    if not out:
        raise Absent("no order to compare: " + "; ".join(f"{_NAMES[f]}: {r}" for f, r in reasons.items()))
    return out


def _panels(frames):
    """[(factor, group, n_methods, tau (levels, levels), names)], groups with most methods first."""
    out = []
    for factor in ranks.FACTORS:
        if factor in frames:
            for group, rows in frames[factor].groupby("group", sort=False):
                names = list(dict.fromkeys(rows["level_a"]))
                out.append((factor, group, int(rows["n_methods"].iloc[0]),
                            rows["tau"].to_numpy(float).reshape(len(names), -1), names))
    return out


@paper
def draw(results, budget=None, style="double", frames=None):
    panels = _panels(frames or data(results, budget))
    columns = min(len(panels), 1 if style == "single" else 2 if len(panels) == 4 else 3)
    n_lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(n_lines, columns, figsize=(WIDTHS[style], 2.3 * n_lines + 0.1), squeeze=False,
                                layout="constrained")
    image = None
    for i, ax in enumerate(axes.flat):
        if i >= len(panels):
            ax.set_visible(False)
            continue
        factor, group, n_methods, tau, names = panels[i]
        image = ax.imshow(np.ma.masked_invalid(tau), cmap=plt.get_cmap("PuOr").with_extremes(bad="#c4c4c4"), vmin=-1,
                          vmax=1, interpolation="nearest")
        ax.grid(False)
        every = -(-len(names) // N_NUMBERED)
        shown = [_short(n) for n in names]
        long = max(len(n) for n in shown) > 5
        ax.set_xticks(range(0, len(names), every), shown[::every], rotation=35 if long else 0,
                      ha="right" if long else "center", rotation_mode="anchor" if long else "default")
        ax.set_yticks(range(0, len(names), every), shown[::every])
        ax.set_title(f"by {_NAMES[factor]}, {n_methods} methods\n{_GROUPS.get(group, group)}", fontsize=6.8)
        if len(names) <= N_NUMBERED:
            for a in range(len(names)):
                for b in range(len(names)):
                    if np.isfinite(tau[a, b]):
                        ax.text(b, a, f"{tau[a, b]:.2f}", ha="center", va="center",
                                fontsize=6.4 if len(names) < 9 else 4.6,
                                color="white" if abs(tau[a, b]) > 0.55 else "#222222")
    figure.colorbar(image, ax=axes, label="Kendall's tau-b", shrink=0.8 if n_lines > 1 else 0.9, pad=0.015,
                    aspect=30 if n_lines > 1 else 18)
    return figure


def _short(name):
    return name if len(name) <= 18 else name[:17] + "…"


def interactive(results, frames):
    out = {}
    for factor, group, n_methods, tau, names in _panels(frames):
        title = f"by {_NAMES[factor]}, {group_title(group)}"
        orders = frames[f"{factor}_errors"]
        orders = orders[orders["group"] == group]
        best = {n: ", ".join(orders[orders["level"] == n].sort_values("error_output", kind="stable")["label"].head(3))
                for n in names}
        text = [["" if not np.isfinite(t) else f"{t:.2f}" for t in row] for row in tau]
        out[title] = {"data": [{
            "type": "heatmap", "z": [rounded(row, 4) for row in tau], "x": names, "y": names, "zmin": -1, "zmax": 1,
            "colorscale": [[0, "#7f3b08"], [0.25, "#e0913b"], [0.5, "#f3f1ee"], [0.75, "#9a8fc0"], [1, "#2d004b"]],
            "text": text, "texttemplate": "%{text}" if len(names) <= N_NUMBERED else "", "xgap": 1, "ygap": 1,
            "customdata": [[[best[a], best[b]] for b in names] for a in names],
            "colorbar": {"title": {"text": "tau-b"}},
            "hovertemplate": f"{_NAMES[factor]} %{{y}} and %{{x}}: tau %{{z:.2f}}<br>"
                             "best in %{y}: %{customdata[0]}<br>best in %{x}: %{customdata[1]}<extra></extra>"}],
            "layout": {"xaxis": {"type": "category", "showgrid": False, "constrain": "domain",
                                 "title": {"text": f"{_NAMES[factor]} ({n_methods} methods)"}},
                       "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "automargin": True}}}
    return out


def note(results, frames):
    absent = [f for f in ranks.FACTORS if f not in frames]
    parts = ["Oracles and methods without a budget are left out; orders are at equal budgets as they were asked."]
    for factor in absent:
        try:
            ranks.errors(results, factor)
        except Absent as reason:
            parts.append(f"Not by {_NAMES[factor]}: {reason}.")
    return " ".join(parts)
