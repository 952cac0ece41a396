"""The league: methods ranked by error at equal tokens and at equal bytes."""

import numpy as np
import pandas as pd

from .. import league
from ..errors import Absent
from ..style import WIDTHS, compensator_look, looks, paper, plain_log, plt, shown_name
from .common import group_title, groups_present, log_axis, log_if_wide, require, rounded

NAME = "league"
TITLE = "League at equal size"
HOW_TO_READ = ("Methods from the lowest error at the top to the highest, all brought to one measured size by reading "
               "their own curves between budgets; bars are 95 % intervals; closed, at the right "
               "edge or on pointing, is the share of the way from the base to the best oracle that a method covers "
               "(above 1 it beats the oracle, below 0 it is worse than the base).")
BY_BUDGET = True
SEES_ALL_BUDGETS = True  # a curve is read between budgets
N_ROWS = 16  # of each panel of the static figure


def data(results, budget=None):
    """tokens, bytes: the rows of league.league(results, at=...) near this budget that have a number."""
    require(results, "error_output")
    budget = results.default_budget if budget is None else budget
    if not budget:
        raise Absent("no method of this run has a budget, so there is no size to compare at")
    out = {}
    for at in league.AT:
        if at == "bytes" and not results.has("bytes"):
            continue
        table = league.league(results, at, budget=budget)
        rows = table[(table["budget"] == budget) & table["error_output"].notna()]
        if len(rows):
            out[at] = rows.reset_index(drop=True)
    if not out:
        raise Absent(f"no method has an error and a size near budget {budget}")
    return out


def _panels(frames):
    """[(at, title, rows)]: groups at equal tokens, then at equal bytes; per-step selection, which is compared at equal
    bytes read whatever is asked for, once."""
    out = []
    for at, frame in frames.items():
        for group in groups_present(frame):
            rows = frame[frame["group"] == group]
            if group == "selection" and at == "bytes" and "tokens" in frames:
                continue
            size, unit = rows["at"].iloc[0], rows["unit"].iloc[0]
            shown = f"{size:.4g} tokens" if unit == "tokens" else \
                f"{size / 1024:.4g} KiB" + (" read" if unit == "bytes read" else "")
            out.append((at, f"{group_title(group)} at {shown}", rows))
    return out


def _look(look, row):
    label = row["label"].removesuffix(f"+{row['compensator']}") if row["compensator"] else row["label"]
    mine = look[label]
    marker = compensator_look(row["compensator"])[1] if row["compensator"] else mine.marker
    return mine, marker, "white" if row["compensator"] else mine.face


@paper
def draw(results, budget=None, style="double", frames=None):
    frames = frames or data(results, budget)
    look, panels = looks(results), _panels(frames)
    columns = [panels] if style == "single" else [c for c in ([p for p in panels if p[0] == at] for at in frames) if c]
    heights = [[0.68 + 0.15 * min(len(rows), N_ROWS) + 0.12 * (len(rows) > N_ROWS) for *_, rows in column]
               for column in columns]
    total = max(map(sum, heights))
    figure = plt.figure(figsize=(WIDTHS[style], total), layout="constrained")
    cells = figure.add_gridspec(1, len(columns))
    for column, mine, cell in zip(columns, heights, cells):
        rest = total - sum(mine)  # the shorter column ends in white
        lines = cell.subgridspec(len(mine) + (rest > 0), 1, height_ratios=[*mine, rest] if rest > 0 else mine)
        for i, (_, title, rows) in enumerate(column):
            _panel(figure.add_subplot(lines[i]), title, rows, look)
    return figure


def _panel(ax, title, rows, look):
    shown = rows.head(N_ROWS)
    for y, row in enumerate(shown.to_dict("records")):
        mine, marker, face = _look(look, row)
        if np.isfinite(row["low"]):
            ax.plot([row["low"], row["high"]], [y, y], color=mine.colour, linewidth=1.2, solid_capstyle="butt")
        ax.plot([row["error_output"]], [y], marker=marker, color=mine.colour, markerfacecolor=face, markersize=3.8)
        if np.isfinite(row["closed"]):
            ax.annotate(f"{row['closed']:.2f}", (1, y), xycoords=("axes fraction", "data"), xytext=(3, 0),
                        textcoords="offset points", fontsize=6, va="center",
                        color="#333333" if row["closed"] >= 0 else "#b03a2e")
    ax.set_yticks(range(len(shown)), [_ranked(r) for r in shown.to_dict("records")], fontsize=6.2)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    if log_if_wide(shown["error_output"], 8) == "log" and (shown["error_output"] > 0).all():
        ax.set_xscale("log")
        plain_log(ax.xaxis)
    else:
        ax.set_xlim(left=0)
    more = f"\nbest {len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""
    # From the right, over the names: the layout makes room for a title's height, not for its width.
    ax.set_title(title.replace(" (pool=decode)", "") + more, loc="right", fontsize=7, multialignment="right")
    ax.set_xlabel("mean error_output")
    if np.isfinite(shown["closed"]).any():
        ax.annotate("closed", (1, 0), xycoords="axes fraction", xytext=(3, -9), textcoords="offset points", fontsize=6,
                    color="#333333", annotation_clip=False)


def _ranked(row):
    return ("" if pd.isna(row["rank"]) else f"{row['rank']}  ") + shown_name(row["label"], row["foresight"])


def interactive(results, frames):
    look, out = looks(results), {}
    for _, title, rows in _panels(frames):
        traces = []
        for row in rows.to_dict("records"):
            mine, _, face = _look(look, row)
            low, high = (abs(row[end] - row["error_output"]) if np.isfinite(row[end]) else 0.0
                         for end in ("low", "high"))
            traces.append({
                "type": "scatter", "mode": "markers", "name": _ranked(row), "showlegend": False,
                "meta": row["label"].removesuffix(f"+{row['compensator']}") if row["compensator"] else row["label"],
                "x": rounded([row["error_output"]]), "y": [_ranked(row)],
                "error_x": {"type": "data", "symmetric": False, "array": rounded([high]), "arrayminus": rounded([low]),
                            "color": mine.colour, "thickness": 1.5, "width": 0},
                "marker": {"color": mine.colour, "size": 9,
                           "symbol": mine.plotly_marker + ("-open" if face == "white" else "")},
                "customdata": [[rounded([row["closed"]], 3)[0], *rounded([row["resident"], row["bytes"]], 6),
                                row["note"]]],
                "hovertemplate": "<b>%{y}</b><br>error_output %{x:.4f}<br>closed %{customdata[0]}<br>resident "
                                 "%{customdata[1]} tokens, %{customdata[2]} bytes<br>%{customdata[3]}<extra></extra>"})
        scale = log_if_wide(rows["error_output"], 8)
        axis = log_axis(rows["error_output"]) if scale == "log" else {"rangemode": "tozero"}
        closed = rows[rows["closed"].notna()]
        base = f" (base {closed['base'].iloc[0]}, oracle {closed['oracle'].iloc[0]})" if len(closed) else ""
        out[title] = {"data": traces, "layout": {
            "xaxis": {**axis, "title": {"text": "error_output" + base}},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "dtick": 1},
            "height": max(320, 130 + 22 * len(rows)), "hovermode": "closest"}}
    return out


def note(results, frames):
    parts = []
    for frame in frames.values():
        for group in groups_present(frame):
            rows = frame[(frame["group"] == group) & frame["closed"].notna()]
            if len(rows):
                text = f"base {rows['base'].iloc[0]}, oracle {rows['oracle'].iloc[0]}"
                parts.append(f"{group_title(group)}: {text}.")
    return " ".join(dict.fromkeys(parts)) or "No distance closed: it needs a base (streaming or random) and an oracle."
