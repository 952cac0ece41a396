"""Differences of a comparison: by budget, by layer and head, along the decode. Not a figure of one run, so it is not
among figures.ALL; `kvreplay compare --out FILE` draws it."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..compare import ROUNDING
from ..style import GREY, WIDTHS, paper, plt

N_ROWS = 40  # methods and budgets that the first panel has room for
A_LOWER, B_LOWER = "#0072b2", "#e8762d"


def _name(row, by_method):
    at = f"budget {row['budget']}" if row["budget"] else "no budget"
    return at if by_method else f"{row['label_a']}, {at}"


@paper
def draw(comparison, style="double"):
    """Of the first metric. The map and the lines along the decode are drawn where two methods are compared."""
    metric, compensator = comparison.metrics[0]
    rows = comparison.rows
    rows = rows[(rows["metric"] == metric) & (rows["compensator"] == compensator)]
    n_all = len(rows)
    if n_all > N_ROWS:
        keep = rows["relative"].abs().fillna(np.inf).sort_values(ascending=False, kind="stable").index[:N_ROWS]
        rows = rows.loc[sorted(keep)]
    full = comparison.by_method
    single = style == "single"
    heights = [0.55 + 0.19 * len(rows), 2.1, 1.9] if full else [0.75 + 0.15 * len(rows)]
    shape = (3 if single else 1, 1 if single else 3) if full else (1, 1)
    height = sum(heights) if single or not full else max(2.3, heights[0])
    figure, axes = plt.subplots(*shape, figsize=(WIDTHS[style], height), squeeze=False, layout="constrained",
                                **({"height_ratios": heights} if single and full else {}))
    axes = list(axes.flat)
    _by_budget(axes[0], rows, full)
    if n_all > N_ROWS:
        axes[0].set_title(f"the {N_ROWS} of {n_all} furthest apart")
    if full:
        budget = _middle(comparison)
        _by_head(figure, axes[1], comparison, budget, (metric, compensator))
        _by_step(axes[2], comparison, (metric, compensator))
    name = metric + (f".{compensator}" if compensator else "")
    title = f"{name}: A = {_short(comparison, 'a')}, B = {_short(comparison, 'b')}"
    figure.suptitle(title, fontsize=7.5, x=0.01, ha="left")
    return figure


def _short(comparison, side):
    pairing, results = comparison.pairings[0], getattr(comparison, side)
    folder = results.folder.resolve().name
    if not comparison.by_method:
        return folder
    label = pairing.label_a if side == "a" else pairing.label_b
    return label if comparison.a.folder == comparison.b.folder else f"{folder}:{label}"


def _middle(comparison):
    """The budget that the map shows: the one that most methods of A share, if it is compared."""
    budgets = list(dict.fromkeys(p.budget for p in comparison.pairings))
    return comparison.a.default_budget if comparison.a.default_budget in budgets else budgets[len(budgets) // 2]


def _by_budget(ax, rows, by_method):
    at = np.arange(len(rows))[::-1]
    for y, row in zip(at, rows.to_dict("records")):
        sure = (row["relative_low"] > 0 or row["relative_high"] < 0) and abs(row["relative"]) > ROUNDING
        colour = (A_LOWER if row["difference"] < 0 else B_LOWER) if sure else GREY
        if np.isfinite(row["relative_low"]):
            ax.plot([100 * row["relative_low"], 100 * row["relative_high"]], [y, y], color=colour, linewidth=1.4,
                    solid_capstyle="butt")
        ax.plot([100 * row["relative"]], [y], marker="o", color=colour, markerfacecolor=colour if sure else "white")
    ax.axvline(0, color="#333333", linewidth=0.7)
    ax.set_yticks(at, [_name(row, by_method) for row in rows.to_dict("records")])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_xlabel("(A − B) / B, %")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if rows["relative"].abs().max() <= ROUNDING:  # rounding is not drawn as if it were something
        ax.set_xlim(-0.01, 0.01)
    # Blue: A lower; orange: B lower; open grey: no significant difference. Said in words, not by colour alone.
    ax.set_title("left: A is lower, right: B is")


def _by_head(figure, ax, comparison, budget, metric):
    heads = comparison.by("head")
    heads = heads[(heads["budget"] == budget) & (heads["metric"] == metric[0]) & (heads["compensator"] == metric[1])]
    matrix = heads.pivot(index="layer", columns="head", values="difference")
    values = matrix.to_numpy(float)
    top = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 0
    colours = plt.get_cmap("PuOr_r").with_extremes(bad="#c4c4c4")
    image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=colours, vmin=-(top or 1), vmax=top or 1,
                      interpolation="nearest")
    ax.grid(False)
    every_row, every_column = -(-len(matrix) // 8), -(-matrix.shape[1] // 8)
    ax.set_yticks(range(0, len(matrix), every_row), matrix.index[::every_row])
    ax.set_xticks(range(0, matrix.shape[1], every_column), matrix.columns[::every_column])
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.set_title(f"A − B by head, budget {budget}" if budget else "A − B by head")
    figure.colorbar(image, ax=ax, pad=0.02, aspect=22)


def _by_step(ax, comparison, metric):
    steps = comparison.by("step")
    steps = steps[(steps["metric"] == metric[0]) & (steps["compensator"] == metric[1])]
    budgets = list(dict.fromkeys(steps["budget"]))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(budgets)))
    for budget, colour in zip(budgets, colours):
        line = steps[steps["budget"] == budget]
        ax.plot(line["step"] + comparison.a.block_steps / 2, line["difference"], color=colour, marker="o")
    ax.axhline(0, color="#333333", linewidth=0.7)
    ax.set_xlim(left=0)
    ends = [steps[steps["budget"] == budget].iloc[-1] for budget in budgets]
    for end, colour, y in zip(ends, colours, _apart([e["difference"] for e in ends], ax.get_ylim())):
        ax.annotate(end["budget"], (end["step"] + comparison.a.block_steps / 2, y), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=6, color=colour)
    ax.set_xlabel("decode step")
    ax.set_title("A − B by step" + (" and budget" if any(budgets) else ""))


def _apart(values, limits):
    """Heights of labels: those of the values, moved up where they would lie on each other."""
    least = 0.06 * (limits[1] - limits[0])
    out, last = list(values), -np.inf
    for i in np.argsort(values, kind="stable"):
        out[i] = last = max(values[i], last + least)
    return out
