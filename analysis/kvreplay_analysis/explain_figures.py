"""The figures of the page of `kvreplay explain`: the frames of explain.py, drawn."""

import numpy as np
import pandas as pd

from . import explain as ka
from .errors import Absent
from .figures.common import axis_names, panel_layout, rounded
from .style import compensator_look, compensator_title, looks, shown_name

GREY, SPARE, WHISKER = "#8a8a8a", "#e8762d", "#777777"
DIFFERENCE = [[0, "#b35806"], [0.25, "#f1a340"], [0.5, "#f7f7f7"], [0.75, "#998ec3"], [1, "#542788"]]
RASTER_CELLS = 250_000  # of all rasters of a page together
N_OF_HEAD = 15          # tokens in the chart of one head


def shown(ex, label):
    return shown_name(label, ex.results.cells.set_index("label")["foresight"].loc[[label]].iloc[0])


def colours(ex):
    """{label: colour}; two methods of one colour are told apart here."""
    look = looks(ex.results)
    out = {label: look[label].colour for label in ex.labels}
    if len(set(out.values())) < len(out):
        out[ex.labels[1]] = SPARE if out[ex.labels[0]] != SPARE else "#0072b2"
    return out


def percent(x):
    return "–" if not np.isfinite(x) else f"{100 * x:.1f} %"


def visible(text):
    """A token's text on one line; spaces and breaks can be seen."""
    return str(text).replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def quoted(text):
    return f" “{visible(text)}”" if text else ""


class Figure:
    """frames(ex) -> {part: frame}, exactly what is drawn; draw(ex, frames) -> {variant: plotly figure as a dict}."""

    def __init__(self, section, name, title, how, frames, draw, note="", needs_two=False, per_head=False):
        self.section, self.name, self.title, self.how = section, name, title, how
        self.frames, self.draw, self.note, self.needs_two, self.per_head = frames, draw, note, needs_two, per_head

    def content(self, ex):
        try:
            frames = self.frames(ex)
            return {"variants": self.draw(ex, frames), "note": self.note,
                    "csv": {part: frame.to_csv(index=False, float_format="%.6g", lineterminator="\r\n")
                            for part, frame in frames.items()}}
        except Absent as reason:
            return {"absent": str(reason)}


def _interval(frame, mean, low, high):
    return {"type": "data", "symmetric": False, "array": rounded(frame[high] - frame[mean]),
            "arrayminus": rounded(frame[mean] - frame[low]), "thickness": 1.4, "width": 3, "color": WHISKER}


def _bars(name, x, y, colour, **more):
    return {"type": "bar", "name": name, "x": list(x), "y": rounded(y), "marker": {"color": colour}, **more}


def _draw_parts(ex, frames):
    frame, colour, data = frames["parts"], colours(ex), []
    what = [("error", "error"), ("error_parallel", "left if direction were right<br>(parallel part)"),
            ("error_orthogonal", "left if length were right<br>(orthogonal part)")]
    for p in frame.itertuples():
        one = pd.DataFrame([{"mean": getattr(p, m), "low": getattr(p, f"{m}_low"), "high": getattr(p, f"{m}_high")}
                            for m, _ in what])
        data.append(_bars(shown(ex, p.label), [t for _, t in what], one["mean"], colour[p.label], meta=p.label,
                          error_y=_interval(one, "mean", "low", "high"),
                          hovertemplate="%{x}: %{y:.4f}<extra>%{fullData.name}</extra>"))
        for m, title, axis in (("evicted_mass", "lost mass w_E", "2"), ("distance", "distance per lost mass", "3")):
            row = pd.DataFrame([{"mean": getattr(p, m), "low": getattr(p, f"{m}_low"), "high": getattr(p,
                                                                                                       f"{m}_high")}])
            data.append(_bars(shown(ex, p.label), [title], row["mean"], colour[p.label], meta=p.label,
                              showlegend=False, xaxis=f"x{axis}", yaxis=f"y{axis}",
                              error_y=_interval(row, "mean", "low", "high"),
                              hovertemplate="%{x}: %{y:.4f}<extra>%{fullData.name}</extra>"))
    y = {"rangemode": "tozero", "title": {"text": "mean, in lengths of f"}}
    layout = {"annotations": [], "barmode": "group", "hovermode": "closest", "legend": {"orientation": "h", "y": -0.22}}
    for i, (title, low, high) in enumerate((("error² = parallel² + orthogonal²", 0, 0.56), ("error = lost mass", 0.65,
                                                                                            0.79),
                                            ("× distance", 0.86, 1))):
        suffix = "" if i == 0 else str(i + 1)
        layout[f"xaxis{suffix}"] = {"domain": [low, high], "anchor": f"y{suffix}", "showgrid": False}
        layout[f"yaxis{suffix}"] = {**(y if i == 0 else {"rangemode": "tozero"}), "anchor": f"x{suffix}"}
        layout["annotations"].append({"text": f"<b>{title}</b>", "xref": "paper", "yref": "paper", "x": low, "y": 1.02,
                                      "xanchor": "left", "yanchor": "bottom", "showarrow": False})
    return {"": {"data": data, "layout": layout}}


_HALF_LOOK = {"error": ("#b9b9b9", ""), "error_corrected": ("#0072b2", ""), "error_exact_mass": ("#56b4e9", "/"),
              "error_exact_direction": ("#e8762d", "\\")}
_HALF_TITLE = {"error": "plain eviction", "error_corrected": "corrected",
               "error_exact_mass": "true mass: direction's error is left",
               "error_exact_direction": "true direction: mass's error is left"}


def _draw_halves(ex, frames):
    frame, data = frames["halves"], []
    labels = [label for label in ex.labels if (frame["label"] == label).any()]
    for i, label in enumerate(labels):
        x, y = axis_names(i)
        mine = frame[frame["label"] == label]
        for quantity, (colour, pattern) in _HALF_LOOK.items():
            rows = mine[mine["quantity"] == quantity]
            data.append({**_bars(_HALF_TITLE[quantity], [compensator_title(c) + (" *" if a else "") for c, a in
                                                         zip(rows["compensator"], rows["acting"])],
                                 rows["mean"], colour), "xaxis": x, "yaxis": y, "showlegend": i == 0,
                         "legendgroup": quantity, "marker": {"color": colour, "pattern": {"shape": pattern}},
                         "error_y": _interval(rows, "mean", "low", "high"),
                         "customdata": rounded(rows["removed"]),
                         "hovertemplate": "%{x}<br>%{y:.4f}, %{customdata:.1%} of the plain error removed"
                                          "<extra>%{fullData.name}</extra>"})
    layout = panel_layout([shown(ex, label) for label in labels], {"showgrid": False},
                          {"title": {"text": "mean error"}, "rangemode": "tozero"})
    for i in range(1, len(labels)):
        layout[f"yaxis{i + 1}"]["matches"] = "y"
    layout["barmode"] = "group"
    return {"": {"data": data, "layout": layout}}


def _matrix(frame, label, column):
    mine = frame[frame["label"] == label]
    return mine.pivot(index="layer", columns="q_head", values=column)


def _draw_heads(ex, frames):
    frame, out = frames["heads"], {}
    group = int(ex.results.cells["group_size"].iloc[0])
    for column, title in (("error_output", "error_output"), ("error", "error"), ("evicted_mass", "evicted_mass")):
        matrices = {label: _matrix(frame, label, column) for label in ex.labels}
        top = max(float(np.nanmax(m.to_numpy())) for m in matrices.values()) or 1.0
        titles = [shown(ex, label) for label in matrices]
        data = []
        for i, (label, m) in enumerate(matrices.items()):
            data.append(_heat(m, group, i, f"{title} %{{z:.4f}}", colorscale="Cividis", zmin=0, zmax=top,
                              showscale=i == 0, colorbar={"title": {"text": title}, "x": 1.01}))
        if len(ex.labels) == 2:
            a, b = matrices.values()
            far = float(np.nanmax(np.abs((a - b).to_numpy()))) or 1.0
            titles.append(f"{ex.labels[0]} − {ex.labels[1]}")
            data.append(_heat(a - b, group, 2, "difference %{z:+.4f}", colorscale=DIFFERENCE, zmid=0, zmin=-far,
                              zmax=far,
                              colorbar={"title": {"text": "difference"}, "x": 1.1}))
        layout = panel_layout(titles, {"title": {"text": "query head"}, "type": "category", "showgrid": False},
                              {"title": {"text": "layer"}, "type": "category", "autorange": "reversed",
                               "showgrid": False}, gap=0.06)
        layout["margin"] = {"r": 190}
        out[title] = {"data": data, "layout": layout}
    return out


def _heat(matrix, group, panel, hover, **more):
    x, y = axis_names(panel)
    where = [[[int(layer), int(head) // group] for head in matrix.columns] for layer in matrix.index]
    return {"type": "heatmap", "z": [rounded(row) for row in matrix.to_numpy(dtype=float)],
            "x": [str(c) for c in matrix.columns], "y": [str(r) for r in matrix.index], "customdata": where, "xaxis": x,
            "yaxis": y, "xgap": 1, "ygap": 1,
            "hovertemplate": f"layer %{{y}}, query head %{{x}}<br>{hover}<extra></extra>",
            **more}


def _one_trace(ex, frame):
    """[(panel title, rows)], a panel for each trace."""
    traces = list(dict.fromkeys(frame["trace"]))
    return [(trace, frame[frame["trace"] == trace]) for trace in traces]


def _draw_steps(ex, frames):
    colour, out = colours(ex), {}
    for trace, frame in _one_trace(ex, frames["steps"]):
        worst = frames["worst"][frames["worst"]["trace"] == trace]
        data = []
        for label in ex.labels:
            rows = frame[frame["label"] == label]
            line = {"type": "scatter", "mode": "lines", "name": f"{shown(ex, label)}: error", "meta": label,
                    "x": rows["step"].tolist(), "y": rounded(rows["error"]),
                    "line": {"color": colour[label], "width": 1.6},
                    "hovertemplate": "step %{x}: %{y:.4f}<extra>%{fullData.name}</extra>"}
            data.append(line)
            if not np.allclose(rows["error"], rows["error_output"], equal_nan=True):
                data.append({**line, "name": f"{shown(ex, label)}: error_output", "y": rounded(rows["error_output"]),
                             "line": {"color": colour[label], "width": 1.6, "dash": "dot"}})
            marks = worst[worst["label"] == label]
            data.append({"type": "scatter", "mode": "markers", "name": f"{shown(ex, label)}: worst steps",
                         "meta": label, "x": marks["step"].tolist(), "y": rounded(marks["error"]),
                         "text": marks["culprits"].tolist(),
                         "marker": {"color": colour[label], "size": 9, "symbol": "circle-open", "line": {"width": 2}},
                         "hovertemplate": "step %{x}: %{y:.4f}<br>%{text}<extra>%{fullData.name}</extra>"})
        out[trace] = {"data": data, "layout": {
            "xaxis": {"title": {"text": "decode step"}},
            "yaxis": {"title": {"text": "mean over heads and layers"}, "rangemode": "tozero"},
            "hovermode": "closest", "legend": {"orientation": "h", "y": -0.22}}}
    return out if len(out) > 1 else {"": next(iter(out.values()))}


def _frames_steps(ex):
    worst = ka.worst_steps(ex)
    worst["culprits"] = ["<br>".join(f"token {c['token']}{quoted(c['text'])}: {percent(c['share'])}" for c in row)
                         for row in worst["culprits"]]
    return {"steps": ka.over_steps(ex), "worst": worst}


def _draw_tokens(ex, frames):
    colour, out = colours(ex), {}
    for trace, frame in _one_trace(ex, frames["tokens"]):
        prompt_len = int(ex.results.cells.loc[ex.results.cells["trace"] == trace, "prompt_len"].iloc[0])
        there = [label for label in ex.labels if (frame["label"] == label).any()]
        data = []
        for i, label in enumerate(there):
            rows = frame[(frame["label"] == label) & (frame["regret"] > 0)]
            x, y = axis_names(i)
            data.append({"type": "bar", "name": shown(ex, label), "meta": label, "x": rows["token"].tolist(),
                         "y": rounded(100 * rows["share"]), "xaxis": x, "yaxis": y, "marker": {"color": colour[label],
                                                                                              "line": {"width": 0}},
                         "width": 1, "text": [f"{visible(t.text) or 'id ' + str(t.id)}<br>{t.lanes} heads evicted it, "
                                              f"missed in {t.missed} head-steps" for t in rows.itertuples()],
                         "textposition": "none",
                         "hovertemplate": "token %{x}: %{y:.2f} % of the damage<br>%{text}<extra></extra>"})
        layout = panel_layout([shown(ex, label) for label in there], {"title": {"text": "position of the token"}},
                              {"title": {"text": "share of all damage (%)"}})
        for i in range(1, len(there)):
            layout[f"xaxis{i + 1}"]["matches"], layout[f"yaxis{i + 1}"]["matches"] = "x", "y"
        layout["shapes"] = [{"type": "line", "xref": axis_names(i)[0], "yref": f"{axis_names(i)[1]} domain",
                             "x0": prompt_len, "x1": prompt_len, "y0": 0, "y1": 1,
                             "line": {"color": GREY, "width": 1, "dash": "dash"}} for i in range(len(there))]
        layout["bargap"] = 0
        out[trace] = {"data": data, "layout": layout}
    return out if len(out) > 1 else {"": next(iter(out.values()))}


def _draw_spread(ex, frames):
    out, marks = {}, {label: symbol for label, symbol in zip(ex.labels, ("circle", "square"))}
    for spread, frame in frames.items():
        labels = [label for label in ex.labels if (frame["label"] == label).any()]
        data = []
        for i, label in enumerate(labels):
            x, y = axis_names(i)
            for c in dict.fromkeys(frame["compensator"]):
                rows = frame[(frame["label"] == label) & (frame["compensator"] == c)]
                data.append({"type": "scatter", "mode": "lines+markers", "name": compensator_title(c), "legendgroup": c,
                             "showlegend": i == 0, "x": rounded(rows["spread"]), "y": rounded(rows["removed"]),
                             "xaxis": x, "yaxis": y,
                             "error_y": _interval(rows, "removed", "removed_low", "removed_high"),
                             "line": {"color": compensator_look(c)[0], "width": 2},
                             "marker": {"symbol": marks[label], "size": 7}, "customdata": rows["n"].tolist(),
                             "hovertemplate": "mean " + spread + " %{x:.3g}: %{y:.1%} of the error removed"
                                              "<br>%{customdata} blocks<extra>%{fullData.name}</extra>"})
        layout = panel_layout([shown(ex, label) for label in labels],
                              {"title": {"text": f"{spread} (mean of the bin)"}},
                              {"title": {"text": "share of the error removed"}, "tickformat": ".0%"})
        for i in range(1, len(labels)):
            layout[f"yaxis{i + 1}"]["matches"] = "y"
        out[spread] = {"data": data, "layout": layout}
    return out


def _binned_figure(ex, frame, column, x_title):
    colour, data = colours(ex), []
    order = list(dict.fromkeys(frame.sort_values("bin", kind="stable")[column]))
    whens = [w for w in ("cut at the prompt", "during the decode") if (frame["when"] == w).any()]
    for label in ex.labels:
        for when in whens:
            rows = frame[(frame["label"] == label) & (frame["when"] == when)]
            data.append({**_bars(f"{shown(ex, label)}: {when}", rows[column], rows["share"], colour[label]),
                         "meta": label, "offsetgroup": label, "legendgroup": label,
                         "marker": {"color": colour[label], "pattern": {"shape": "/" if when == whens[0] and
                                                                        len(whens) > 1 else ""}},
                         "customdata": [[n, round(share, 5)] for n, share in zip(rows["n"], rows["share"])],
                         "hovertemplate": "%{x}: %{customdata[1]:.1%} of the evictions (%{customdata[0]})"
                                          "<extra>%{fullData.name}</extra>"})
    return {"": {"data": _stacked(data), "layout": {
        "barmode": "group", "hovermode": "closest", "legend": {"orientation": "h", "y": -0.22},
        "xaxis": {"title": {"text": x_title}, "type": "category", "categoryorder": "array", "categoryarray": order},
        "yaxis": {"title": {"text": "share of the evictions"}, "tickformat": ".0%"}}}}


def _stacked(data):
    """Bars of one offset group stand on each other: plotly needs their base."""
    base = {}
    for bars in data:
        own = base.setdefault(bars["offsetgroup"], {})
        bars["base"] = [round(own.get(x, 0.0), 6) for x in bars["x"]]
        for x, y in zip(bars["x"], bars["y"]):
            own[x] = own.get(x, 0.0) + (y or 0.0)
    return data


def _draw_ages(ex, frames):
    return _binned_figure(ex, frames["ages"], "age", "age at eviction (positions)")


def _draw_lags(ex, frames):
    return _binned_figure(ex, frames["lags"], "lag", "decode steps until it was needed again")


def _draw_regret(ex, frames):
    colour, out = colours(ex), {}
    for trace, frame in _one_trace(ex, frames["regret"]):
        data = []
        for label in ex.labels:
            rows = frame[frame["label"] == label]
            for column, dash, title in (("evicted_mass", "solid", "on all evicted tokens"),
                                        ("missed_mass", "dot", "on missed tokens")):
                data.append({"type": "scatter", "mode": "lines", "name": f"{shown(ex, label)}: {title}", "meta": label,
                             "x": rows["step"].tolist(), "y": rounded(rows[column]),
                             "customdata": rounded(rows["missed"]),
                             "line": {"color": colour[label], "width": 1.8, "dash": dash},
                             "hovertemplate": "step %{x}: %{y:.4f}<br>%{customdata:.1f} tokens missed per head"
                                              "<extra>%{fullData.name}</extra>"})
        out[trace] = {"data": data, "layout": {
            "xaxis": {"title": {"text": "decode step"}},
            "yaxis": {"title": {"text": "attention, mean over heads and layers"}, "rangemode": "tozero"},
            "hovermode": "closest", "legend": {"orientation": "h", "y": -0.22}}}
    return out if len(out) > 1 else {"": next(iter(out.values()))}


def _draw_spans(ex, frames):
    frame, colour = frames["spans"], colours(ex)
    data = []
    for label in ex.labels:
        rows = frame[frame["label"] == label]
        data.append(_bars(shown(ex, label), rows["span"], rows["bias"], colour[label], meta=label,
                          error_y=_interval(rows, "bias", "low", "high"),
                          customdata=[rounded(r) for r in rows[["retention", "overall"]].to_numpy()],
                          hovertemplate="%{x}: %{customdata[0]:.1%} retained, %{customdata[1]:.1%} of all tokens"
                                        "<br>bias %{y:+.1%}<extra>%{fullData.name}</extra>"))
    return {"": {"data": data, "layout": {"barmode": "group", "hovermode": "closest", "yaxis": {
        "title": {"text": "retention of the span − of all tokens"}, "tickformat": "+.0%"},
        "xaxis": {"title": {"text": "span"}, "type": "category"}, "legend": {"orientation": "h", "y": -0.22}}}}


def _wins_frames(ex):
    return {"paired": ka.paired(ex)}


def _draw_wins(ex, frames):
    out, colour = {}, colours(ex)
    for metric, rows in frames["paired"].groupby("metric", sort=False):
        x = [str(layer) if layer == "all" else f"layer {layer}" for layer in rows["layer"]]
        layout = panel_layout([f"{ex.labels[0]} − {ex.labels[1]}, {metric}", "share of head-steps that each wins"],
                              {"type": "category", "showgrid": False}, {"title": {"text": "difference of means"}})
        layout["yaxis2"].update(tickformat=".0%", range=[0, 1])
        layout["barmode"] = "stack"
        data = [{"type": "scatter", "mode": "markers", "name": "difference", "showlegend": False, "x": x,
                 "y": rounded(rows["difference"]), "error_y": _interval(rows, "difference", "low", "high"),
                 "marker": {"size": 9, "color": [colour[ex.labels[1 if d > 0 else 0]] for d in rows["difference"]]},
                 "hovertemplate": "%{x}: %{y:+.4f}<extra></extra>"}]
        for label, column in zip(ex.labels, ("wins", "losses")):
            data.append(_bars(f"{shown(ex, label)} is better", x, rows[column], colour[label], xaxis="x2", yaxis="y2",
                              hovertemplate="%{x}: %{y:.1%}<extra>%{fullData.name}</extra>"))
        layout["shapes"] = [{"type": "line", "xref": "x domain", "yref": "y", "x0": 0, "x1": 1, "y0": 0, "y1": 0,
                             "line": {"color": GREY, "width": 1}}]
        out[metric] = {"data": data, "layout": layout}
    return out


# One head: variants in order of damage, so that the page opens on the worst.

def heads_listed(ex):
    """[(name, trace, layer, kv_head)], most damage first (of the first label)."""
    rows = []
    several = len(ex.results.traces) > 1
    for what in ex.of(ex.labels[0]).cells.itertuples():
        a = ex.attribution(what.Index)
        for h in range(what.n_kv_heads):
            name = f"layer {what.layer}, KV head {h}"
            rows.append((-a["damage"][a["kv_head"] == h].sum(), f"{what.trace}: {name}" if several else name,
                         what.trace, what.layer, h))
    return [row[1:] for row in sorted(rows, key=lambda r: r[0])]


def _cell(ex, label, trace, layer):
    cells = ex.results.cells
    found = cells[(cells["label"] == label) & (cells["trace"] == trace) & (cells["layer"] == layer)]
    return int(found.index[0])


def _raster_frames(ex):
    listed = heads_listed(ex)
    per = RASTER_CELLS / (len(listed) * len(ex.labels))
    n_columns = int(np.clip(np.sqrt(2 * per), 24, 96))
    rasters, frames = {}, []
    for label in ex.labels:
        for what in ex.of(label).cells.itertuples():
            lanes, shares, rows, columns = ka.raster(ex, what.Index, n_columns // 2, n_columns)
            for h in range(what.n_kv_heads):
                share = shares[(lanes["kv_head"] == h).to_numpy()].mean(axis=0)
                rasters[label, what.trace, what.layer, h] = share, rows, columns
                i, j = np.nonzero(np.isfinite(share))
                frames.append(pd.DataFrame({"label": label, "trace": what.trace, "layer": what.layer, "kv_head": h,
                                            "position": rows[i], "position_end": rows[i + 1] - 1, "step": columns[j],
                                            "step_end": columns[j + 1] - 1,
                                            "share_retained": np.round(share[i, j], 4)}))
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs["rasters"], frame.attrs["listed"] = rasters, listed
    return {"raster": frame}


def _draw_raster(ex, frames):
    out, attrs = {}, frames["raster"].attrs
    titles = [shown(ex, label) for label in ex.labels]
    for name, trace, layer, h in attrs["listed"]:
        data = []
        for i, label in enumerate(ex.labels):
            share, rows, columns = attrs["rasters"][label, trace, layer, h]
            x, y = axis_names(i)
            data.append({"type": "heatmap", "z": [rounded(r, 3) for r in share], "x": columns.tolist(),
                         "y": rows.tolist(),
                         "xaxis": x, "yaxis": y, "zmin": 0, "zmax": 1, "colorscale": "Cividis", "showscale": i == 0,
                         "colorbar": {"title": {"text": "share kept"}, "tickformat": ".0%"},
                         "hovertemplate": "step %{x:.0f}, position %{y:.0f}: %{z:.0%} kept<extra></extra>"})
        layout = panel_layout(titles, {"title": {"text": "decode step"}, "showgrid": False},
                              {"title": {"text": "position of the token"}, "showgrid": False})
        for i in range(1, len(titles)):
            layout[f"xaxis{i + 1}"]["matches"], layout[f"yaxis{i + 1}"]["matches"] = "x", "y"
        out[name] = {"data": data, "layout": layout}
    return out


def _head_steps_frames(ex):
    frames = []
    for name, trace, layer, h in heads_listed(ex):
        for label in ex.labels:
            cell = _cell(ex, label, trace, layer)
            group = int(ex.results.cells.at[cell, "group_size"])
            heads = slice(h * group, (h + 1) * group)
            mine = ex.results.with_cells(ex.results.cells.index == cell)
            n_steps = int(ex.results.cells.at[cell, "n_steps"])
            width = -(-n_steps // 256)
            columns = {m: ka._mean_over_cells({cell: mine.steps(m)[cell][heads]}, width)
                       for m in ("error_output", "error", "evicted_mass")}
            frames.append(pd.DataFrame({"head": name, "label": label, "trace": trace, "layer": layer, "kv_head": h,
                                        "step": np.arange(-(-n_steps // width)) * width, "n_steps": width, **columns}))
    return {"head_steps": pd.concat(frames, ignore_index=True)}


def _draw_head_steps(ex, frames):
    colour, out = colours(ex), {}
    for name, frame in frames["head_steps"].groupby("head", sort=False):
        data = []
        for label, rows in frame.groupby("label", sort=False):
            for metric, dash in (("error_output", "solid"), ("evicted_mass", "dot")):
                data.append({"type": "scatter", "mode": "lines", "name": f"{shown(ex, label)}: {metric}", "meta": label,
                             "x": rows["step"].tolist(), "y": rounded(rows[metric], 4),
                             "line": {"color": colour[label], "width": 1.8, "dash": dash},
                             "hovertemplate": "step %{x}: %{y:.4f}<extra>%{fullData.name}</extra>"})
        out[name] = {"data": data, "layout": {"xaxis": {"title": {"text": "decode step"}}, "hovermode": "closest",
                                              "yaxis": {"title": {"text": "mean over the head's queries"},
                                                        "rangemode": "tozero"},
                                              "legend": {"orientation": "h", "y": -0.22}}}
    return out


def _head_tokens_frames(ex):
    frames = []
    for name, trace, layer, h in heads_listed(ex):
        tokens = ex.tokens(trace)
        for label in ex.labels:
            cell = _cell(ex, label, trace, layer)
            a = ex.attribution(cell)
            lanes = a["kv_head"] == h
            damage = a["damage"][lanes].sum(axis=0)
            most = np.argsort(-damage, kind="stable")[:N_OF_HEAD]
            most = most[damage[most] > 0]
            n_steps, prompt_len = (int(ex.results.cells.at[cell, c]) for c in ("n_steps", "prompt_len"))
            at = a["evicted_at"][lanes].min(axis=0)[most]
            frames.append(pd.DataFrame({
                "head": name, "label": label, "trace": trace, "layer": layer, "kv_head": h, "token": most,
                "id": tokens["id"].to_numpy()[most], "text": tokens["text"].to_numpy()[most], "damage": damage[most],
                "share": damage[most] / damage.sum() if len(most) else [],
                "regret": a["regret"][lanes].sum(axis=0)[most],
                "missed": a["missed"][lanes].sum(axis=0)[most],
                "evicted_at": np.where(at < n_steps, at, np.nan), "age": np.where(at < n_steps, prompt_len + at - most,
                                                                                  np.nan)}))
    frame = pd.concat(frames, ignore_index=True)
    if frame.empty:
        raise Absent("no evicted token did any damage")
    return {"head_tokens": frame}


def _draw_head_tokens(ex, frames):
    colour, out = colours(ex), {}
    for name, frame in frames["head_tokens"].groupby("head", sort=False):
        there = [label for label in ex.labels if (frame["label"] == label).any()]
        data = []
        for i, label in enumerate(there):
            x, y = axis_names(i)
            rows = frame[frame["label"] == label].iloc[::-1]
            hover = [f"evicted at step {_whole(t.evicted_at)}, age {_whole(t.age)}<br>missed in {t.missed} steps, "
                     f"regret {t.regret:.3g}" for t in rows.itertuples()]
            data.append({"type": "bar", "orientation": "h", "name": shown(ex, label), "meta": label,
                         "x": rounded(100 * rows["share"]), "xaxis": x, "yaxis": y, "showlegend": False,
                         "y": [f"{t.token}{quoted(t.text) or f' (id {t.id})'}" for t in rows.itertuples()],
                         "marker": {"color": colour[label]}, "text": hover, "textposition": "none",
                         "hovertemplate": "%{y}: %{x:.1f} % of the head's damage<br>%{text}<extra></extra>"})
        layout = panel_layout([shown(ex, label) for label in there],
                              {"title": {"text": "share of the head's damage (%)"}, "rangemode": "tozero"},
                              {"type": "category", "showgrid": False}, gap=0.22)
        out[name] = {"data": data, "layout": layout}
    return out


def _whole(x):
    return "–" if not np.isfinite(x) else f"{x:.0f}"


ERROR, WHERE = "Lost mass or lost direction", "Where and which tokens"
WHEN, HEAD = "When it left and was needed", "One head"
FIGURES = [
    Figure(ERROR, "parts", "Lost mass and lost direction",
           "The error is the long side of a right triangle. The parallel part lies along the retained output: a longer "
           "or shorter one would repair it. The orthogonal part is lost direction, which no rescaling brings back. The "
           "error is also a product: the lost mass, times how far away what was lost points, in lengths of f. Bars are "
           "means over the same steps, with 95 % intervals.",
           lambda ex: {"parts": ka.parts(ex)}, _draw_parts),
    Figure(ERROR, "halves", "What the correction gives back, and which half of it falls short",
           "A correction is a mass times a direction. Left to right: no correction; the correction; its direction "
           "with the true mass, so that what is left is the direction's error; its mass with the true direction, so "
           "that what is left is the mass's error. * marks the method's own compensator.",
           lambda ex: {"halves": ka.halves(ex)}, _draw_halves, "All bars of a group count the same steps."),
    Figure(ERROR, "spread", "Correction quality against the spread of the evicted logits",
           "Each point is an eighth of all blocks of 64 steps of a head: further right the evicted logits spread "
           "more, and a first-order estimate of their mass should be worse; below 0 the correction does harm.",
           lambda ex: {s: ka.spread_bins(ex, s) for s in ("logit_variance", "logit_spread")}, _draw_spread,
           "95 % intervals by block bootstrap."),
    Figure(WHERE, "heads", "Error by layer and head",
           "One square is one query head of one layer, brighter is worse; select a square to see that head below. In "
           "the difference, orange is where the first method is better and purple where it is worse.",
           lambda ex: {"heads": ka.by_head(ex)}, _draw_heads),
    Figure(WHERE, "steps", "Error along the decode, with the worst steps",
           "Rings mark the eight steps of largest error; hover one for the evicted tokens that did most of it.",
           _frames_steps, _draw_steps),
    Figure(WHERE, "tokens", "Damage by token",
           "The height of a bar is the share of all damage that comes from the eviction of this token, over all "
           "heads, layers and steps; below 0 its absence makes up for that of others. The dashed line is the end of "
           "the prompt.",
           lambda ex: {"tokens": ka.all_tokens(ex)}, _draw_tokens),
    Figure(WHERE, "wins", "Who wins where",
           "Left the difference of the means of the same steps with its 95 % interval, in the colour of the better "
           "method; right the share of head-steps that each wins.",
           _wins_frames, _draw_wins, needs_two=True),
    Figure(WHEN, "ages", "Age at eviction",
           "How many positions old tokens are when they leave; hatched are those cut at the prompt's end.",
           lambda ex: {"ages": ka.ages(ex)}, _draw_ages),
    Figure(WHEN, "lags", "When evicted tokens were needed again",
           "Steps from the eviction to the first step at which the token's attention is among the |R| largest: a "
           "cache of the same size would have held it. A short lag is a token that left just too early; “never” was a "
           "good eviction.",
           lambda ex: {"lags": ka.lags(ex)}, _draw_lags),
    Figure(WHEN, "regret", "Regret over time",
           "The attention that evicted tokens would have had at a step (solid), and the part of it on tokens that a "
           "cache of the same size would have held (dotted): what a better choice could have saved.",
           lambda ex: {"regret": ka.regret_over_steps(ex)}, _draw_regret),
    Figure(WHEN, "spans", "Eviction bias by span",
           "Retention of a named span minus that of all tokens: below 0 the method evicts this kind of text more "
           "than others.",
           lambda ex: {"spans": ka.span_bias(ex)}, _draw_spans),
    Figure(HEAD, "raster", "What is kept over time",
           "Each row is a range of positions, each column a range of steps; bright is kept, dark is evicted, empty is "
           "not there yet. A square is the share of its (token, step) pairs that were kept.",
           _raster_frames, _draw_raster, per_head=True),
    Figure(HEAD, "head_steps", "Error and lost mass of this head",
           "Solid the error of what the method returns, dotted the lost mass; where the error is large without much "
           "lost mass, the lost direction is to blame.",
           _head_steps_frames, _draw_head_steps, per_head=True),
    Figure(HEAD, "head_tokens", "Evicted tokens that did most damage in this head",
           "Longest bar first; hover for when the token left, how old it was and how often it was missed.",
           _head_tokens_frames, _draw_head_tokens, per_head=True),
]
