"""What fidelity costs on one GPU: fidelity against throughput, and who is fastest at which context and batch."""

from matplotlib.lines import Line2D

from .. import latency
from ..style import GREY, WIDTHS, compensator_look, legend_below, looks, paper, plt, shown_name
from .common import log_if_wide
from .pareto import short_ticks

N_NAMED = 14


@paper
def draw(results, table, won, workload, style="double"):
    """table: tradeoffs.tradeoffs(); won: tradeoffs.winners()."""
    look = looks(results)
    single = style == "single"
    contexts, batches = list(dict.fromkeys(zip(won["context"], won["measured"]))), list(dict.fromkeys(won["batch"]))
    height = 2.6 if not single else 2.5 + 0.5 + 0.28 * len(contexts)
    figure, (left, right) = plt.subplots(
        2 if single else 1, 1 if single else 2, figsize=(WIDTHS[style], height), layout="constrained",
        **({"height_ratios": [2.5, 0.5 + 0.28 * len(contexts)]} if single else {"width_ratios": [1.15, 1]}))
    handles = _fidelity(left, results, table, look)
    name = latency.canonical(workload.gpu)
    left.set_xlabel(f"tokens per second (estimate), {name if name in latency.GPUS else 'GPU'} full of caches")
    _map(right, won, contexts, batches, look)
    legend_below(figure, handles, style)
    return figure


def _name(row):
    return f"{row['label']}+{row['compensator']}" if row["compensator"] else row["label"]


def _fidelity(ax, results, table, look):
    drawn = table[(table["tokens_per_s"] > 0) & table["fidelity"].notna()]
    named = drawn.assign(name=[_name(r) for r in drawn.to_dict("records")])
    on_front = list(dict.fromkeys(named.loc[named["front"], "name"]))
    plain = list(dict.fromkeys(named.loc[named["compensator"] == "", "name"]))
    known = list(dict.fromkeys([*on_front, *plain]))[:max(N_NAMED, len(on_front))]
    handles = []
    for name, line in named.groupby("name", sort=False):
        line = line.sort_values("tokens_per_s")
        row = line.iloc[0]
        mine = look[row["label"]]
        marker = compensator_look(row["compensator"])[1] if row["compensator"] else mine.marker
        shown = name in known
        style = {"color": mine.colour if shown else "#c4c4c4", "marker": marker,
                 "linestyle": ":" if mine.oracle else "--" if row["compensator"] else mine.line}
        ax.plot(line["tokens_per_s"], line["fidelity"], linewidth=0.8 if shown else 0.5, markersize=3.2 if shown else 2,
                markerfacecolor=mine.face if shown else "#c4c4c4", zorder=3 if shown else 1, **style)
        if shown:
            handles.append(Line2D([], [], markerfacecolor=mine.face, label=shown_name(name, row["foresight"]), **style))
    front = named[named["front"]]
    ax.plot(front["tokens_per_s"], front["fidelity"], linestyle="", marker="o", markersize=6.5, markerfacecolor="none",
            markeredgecolor="#222222", markeredgewidth=0.9, zorder=5)
    handles.insert(0, Line2D([], [], linestyle="", marker="o", markersize=6.5, markerfacecolor="none",
                             markeredgecolor="#222222", label="front of error, bytes and traffic"))
    if log_if_wide(named["tokens_per_s"], 8) == "log":
        ax.set_xscale("log")
        short_ticks(ax.xaxis)
    ax.set_ylabel("fidelity, 1 − mean error")
    return handles


def _map(ax, won, contexts, batches, look):
    """A table whose cells are coloured by their winner."""
    ax.set_xlim(-0.5, len(batches) - 0.5)
    ax.set_ylim(len(contexts) - 0.5, -0.5)
    for r in won.to_dict("records"):
        x, y = batches.index(r["batch"]), contexts.index((r["context"], r["measured"]))
        colour = look[r["label"]].colour if r["label"] else GREY
        ax.add_patch(plt.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, alpha=0.28, linewidth=0))
        text = (f"{_wrapped(_name(r))}\n{'at ' + r['budget'] if r['budget'] else 'all tokens'}" if r["label"]
                else "none fits\nor is good enough")
        ax.text(x, y, text, ha="center", va="center", fontsize=6)
    ax.set_xticks(range(len(batches)), [str(b) for b in batches])
    ax.set_yticks(range(len(contexts)), [f"{_short(c)}{'' if m else '*'}" for c, m in contexts])
    ax.grid(False)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xlabel("batch" + ("" if all(m for _, m in contexts) else "      * costs alone, fidelity as measured"))
    ax.set_ylabel("mean context, tokens")


def _wrapped(name, width=16):
    """A long name broken behind a + or a comma."""
    lines = [""]
    for piece in name.replace("+", "+\0").replace(",", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _short(n):
    return f"{n / 1024:.0f}k" if n >= 10000 or (n >= 1024 and n % 1024 == 0) else f"{n:.0f}"
