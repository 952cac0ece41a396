"""What an error costs: Pareto fronts in bytes and in estimated decode latency."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .. import latency, league
from ..errors import Absent
from ..style import compensator_look, grid, legend_below, looks, paper, plain_log, plotly_marker, shown_name
from .common import axis_names, log_axis, log_if_wide, panel_layout, require, rounded, shown_first

NAME = "pareto"
TITLE = "Error against bytes and decode latency"
HOW_TO_READ = ("Each point is a method at a budget; ringed points on the dark line form the Pareto front, where no "
               "other point is as small and as accurate: on the left in bytes per KV head, on the right in an estimate "
               f"of the attention's time per decode step on one {latency.DEFAULT} (roofline, lower bound).")
BY_BUDGET = False
N_NAMED = {"single": 10, "double": 16}
_COSTS = [("bytes", "front_bytes", "bytes per KV head"),
          ("latency_us", "front_latency", f"estimated µs per decode step, {latency.DEFAULT}")]


def data(results, budget=None):
    """points: label, method, compensator (measured beside the method, its state charged), group, foresight, budget,
    resident, bytes, bytes_read, latency_us, error_output, front_bytes, front_latency. `budget` is not used."""
    require(results, "error_output")
    if not results.has("bytes"):
        raise Absent("this run did not measure bytes: run again with --metrics all")
    frame = league.costs(results)
    frame["name"] = [f"{a}+{c}" if c else a for a, c in zip(frame["label"], frame["compensator"])]
    return {"points": frame}


def _panels(frame):
    return [c for c in _COSTS if frame[c[0]].notna().any()]


def _named(results, frame, style):
    """Names that the static figure has room for: those on a front, then others in the order of the run."""
    positive = frame[frame["error_output"] > 0]
    front = list(dict.fromkeys(positive.loc[positive["front_bytes"] | positive["front_latency"], "name"]))
    oracles = list(dict.fromkeys(positive.loc[positive["foresight"] == "oracle", "name"]))[:2]
    plain = shown_first(results, list(dict.fromkeys(positive["label"])))
    return list(dict.fromkeys([*front, *oracles, *plain]))[:max(N_NAMED[style], len(front) + len(oracles))]


def _style(look, row):
    mine = look[row["label"]]
    marker = compensator_look(row["compensator"])[1] if row["compensator"] else mine.marker
    return mine, marker


@paper
def draw(results, budget=None, style="double", frames=None):
    frame = (frames or data(results))["points"]
    look, names, panels = looks(results), _named(results, frame, style), _panels(frame)
    figure, axes = grid(len(panels), style, 2.5, sharey=True, max_columns=1 if style == "single" else 2)
    drawn = frame[frame["error_output"] > 0]
    scale = log_if_wide(drawn["error_output"])
    for ax, (cost, front, title) in zip(axes, panels):
        for name, line in drawn.groupby("name", sort=False):
            line = line.sort_values(cost)
            mine, marker = _style(look, line.iloc[0])
            known = name in names
            ax.plot(line[cost], line["error_output"], color=mine.colour if known else "#c4c4c4", marker=marker,
                    linestyle=":" if mine.oracle else "--" if line["compensator"].iloc[0] else mine.line,
                    linewidth=0.7 if known else 0.5, markersize=3.2 if known else 2,
                    markerfacecolor=mine.face if known else "#c4c4c4", zorder=3 if known else 1)
        best = drawn[drawn[front]].sort_values(cost)
        ax.plot(best[cost], best["error_output"], color="#222222", linewidth=1.4, zorder=4, drawstyle="steps-post")
        ax.plot(best[cost], best["error_output"], linestyle="", marker="o", markersize=6.5, markerfacecolor="none",
                markeredgecolor="#222222", markeredgewidth=0.9, zorder=5)
        exact = frame[(frame["error_output"] <= 0) & frame[front]]
        for x in exact[cost].head(1):
            ax.axvline(x, color="#777777", linestyle=(0, (2, 2)), linewidth=0.8, zorder=1)
            ax.annotate(f"error 0: {exact['name'].iloc[0]}", (x, 1), xycoords=("data", "axes fraction"), rotation=90,
                        xytext=(-2, -2), textcoords="offset points", ha="right", va="top", fontsize=6, color="#555555")
        ax.set_xscale("log")
        ax.set_yscale(scale)
        ax.set_xlabel(title)
        short_ticks(ax.xaxis)
        if scale == "log":
            plain_log(ax.yaxis)
        else:
            ax.set_ylim(bottom=0)
    for i, ax in enumerate(axes):
        if i == 0 or style == "single":
            ax.set_ylabel("mean error_output")
    handles = [Line2D([], [], color="#222222", marker="o", markersize=6.5, markerfacecolor="none", linewidth=1.4,
                      label="Pareto front")]
    for name in names:
        row = drawn[drawn["name"] == name].iloc[0]
        mine, marker = _style(look, row)
        handles.append(Line2D([], [], color=mine.colour, marker=marker, markerfacecolor=mine.face,
                              linestyle=":" if mine.oracle else "--" if row["compensator"] else mine.line,
                              label=shown_name(name, row["foresight"])))
    n_more = drawn["name"].nunique() - len(names)
    if n_more > 0:
        handles.append(Line2D([], [], color="#c4c4c4", linewidth=1, label=f"{n_more} more"))
    legend_below(figure, handles, style)
    return figure


def short_ticks(axis):
    """20k, 50k, 100k on a logarithmic axis."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high < 60 * low else (1, 3) if high < 900 * low else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=steps))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _short(value, _=None):
    """20000 -> 20k."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def interactive(results, frames):
    frame, look = frames["points"], looks(results)
    panels, traces, seen = _panels(frame), [], set()
    drawn = frame[frame["error_output"] > 0]
    for i, (cost, front, title) in enumerate(panels):
        x, y = axis_names(i)
        for name, line in drawn.groupby("name", sort=False):
            line = line.sort_values(cost)
            mine, marker = _style(look, line.iloc[0])
            compensator = line["compensator"].iloc[0]
            symbol = plotly_marker(marker) + ("-open" if compensator or mine.oracle else "")
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": shown_name(name, line["foresight"].iloc[0]),
                "meta": line["label"].iloc[0], "legendgroup": name, "showlegend": name not in seen and not compensator,
                "x": rounded(line[cost]), "y": rounded(line["error_output"]), "xaxis": x, "yaxis": y,
                "line": {"color": mine.colour, "width": 1 if compensator else 1.6,
                         "dash": "dot" if mine.oracle else "dash" if compensator else mine.plotly_dash},
                "marker": {"color": mine.colour, "symbol": symbol, "size": 6 if compensator else 8},
                "customdata": [[b or "no budget", f"{r:.1f}"] for b, r in zip(line["budget"], line["resident"])],
                "hovertemplate": f"<b>%{{fullData.name}}</b><br>asked budget %{{customdata[0]}}<br>{title} %{{x:.5~g}}"
                                 "<br>resident %{customdata[1]}<br>error_output %{y:.4f}<extra></extra>"})
            seen.add(name)
        best = drawn[drawn[front]].sort_values(cost)
        traces.append({"type": "scatter", "mode": "lines+markers", "name": "Pareto front", "legendgroup": "front",
                       "showlegend": i == 0, "x": rounded(best[cost]), "y": rounded(best["error_output"]), "xaxis": x,
                       "yaxis": y, "line": {"color": "#808080", "width": 2.5, "shape": "hv"}, "hoverinfo": "skip",
                       "marker": {"color": "#808080", "symbol": "circle-open", "size": 14, "line": {"width": 2}}})
    scale = log_if_wide(drawn["error_output"])
    layout = panel_layout([t for _, _, t in panels], {},
                          {**(log_axis(drawn["error_output"]) if scale == "log" else {"rangemode": "tozero"}),
                           "title": {"text": "error_output"}})
    for i, (cost, _, title) in enumerate(panels):
        layout["xaxis" if i == 0 else f"xaxis{i + 1}"].update(type="log", title={"text": title}, dtick="D2",
                                                             tickformat="~s" if cost == "bytes" else "~g")
        if i > 0:
            layout[f"yaxis{i + 1}"]["matches"] = "y"
    layout["annotations"] = []  # the axes say it
    return {"": {"data": traces, "layout": layout}}


def note(results, frames):
    frame = frames["points"]
    parts = []
    exact = list(dict.fromkeys(frame.loc[frame["error_output"] <= 0, "name"]))
    if exact:
        parts.append(f"Error 0, so not on a logarithmic axis: {', '.join(exact)}.")
    if (frame["compensator"] != "").any():
        parts.append("Names with +mean, +moments, ... are corrections measured beside a method, their state charged.")
    else:
        parts.append("No corrections beside methods are drawn: run.json does not say what their states weigh.")
    if frame["latency_us"].isna().all():
        parts.append("No latency: the run did not measure bytes_read and attended, or does not say head_dim.")
    else:
        gpu = latency.GPUS[latency.DEFAULT]
        parts.append(f"Latency is the larger of bytes read / {gpu.bandwidth / 1e12:g} TB/s and operations / "
                     f"{gpu.peak / 1e12:g} TFLOPS in each layer ({gpu.source}), summed over the {_n_layers(results)} "
                     "layers of the run, for one sequence; everything outside attention is left out.")
    return " ".join(parts)


def _n_layers(results):
    counts = results.cells.groupby("trace")["layer"].nunique()
    return str(counts.max()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
