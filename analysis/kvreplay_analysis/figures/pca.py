"""Where the outputs point: full, retained and evicted output and the estimates of it, in the plane that holds most."""

import numpy as np
import pandas as pd

from ..errors import Absent, UsageError
from ..style import WIDTHS, compensator_look, paper, plt, shown_name
from .common import about, at_budget, chosen_head

NAME = "pca"
TITLE = "Outputs of one head in their principal plane"
HOW_TO_READ = ("Arrows from the origin are the full output f, what retained and evicted tokens alone would give (f_R, f_E) "
               "and each estimate of f_E, projected on the plane that holds most of their squared length: a correction is "
               "right where its arrow lies on f_E; angles and lengths in the table are the true ones, not those of the "
               "picture.")
BY_BUDGET = True
OF_A_HEAD = True
STEPS = True
WHY = "this run has no output vectors: run again with --detail outputs --steps LIST"
COLOURS = {"f": ("#555555", "o"), "f_R": ("#2c8f4f", "s"), "f_E": ("#cc3355", "D")}
ESTIMATES = ["mean", "moments", "gaussian"]
SHOWN = {"f": "f (full)", "f_R": "f_R (retained)", "f_E": "f_E (evicted)"}


def names(vectors):
    """f, f_R, f_E, then the estimates of f_E in the order of their sophistication."""
    def order(name):
        kind = name.partition(".")[2].split(":")[0]
        return ESTIMATES.index(kind) if kind in ESTIMATES else len(ESTIMATES), name

    known = [n for n in ("f", "f_R", "f_E") if n in vectors]
    return known + sorted((n for n in vectors if n not in known and n.partition(".")[2] != "none"), key=order)


def shown(name):
    return SHOWN.get(name) or f"estimate of {name.partition('.')[2]}"


def look(name):
    return COLOURS.get(name) or compensator_look(name.partition(".")[2])


def planes(vectors):
    """Principal planes of stacked vectors (..., n_vectors, v_head_dim), through the origin (nothing is centred, so that
    angles at the origin mean something). Vectors with NaN take no part.

    Returns coordinates (..., n_vectors, 2), and the explained share of the squared length (...). The first axis points
    to the side of the first vector, the second to that of the third.
    """
    x = np.where(np.isfinite(vectors), vectors, 0.0).astype(float)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    xy = np.matmul(x, np.swapaxes(vt[..., :2, :], -1, -2))
    if xy.shape[-1] < 2:
        xy = np.concatenate([xy, np.zeros_like(xy)], axis=-1)
    side = np.stack([xy[..., 0, 0], xy[..., min(2, x.shape[-2] - 1), 1]], axis=-1)
    xy = xy * np.where(side < 0, -1.0, 1.0)[..., None, :]
    total = (s ** 2).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return xy, (s[..., :2] ** 2).sum(axis=-1) / total


def of_cell(results, cell):
    """What the figure shows of every head and stored step of a cell; None without --detail outputs.

    {"names": vectors, "steps": (n_chosen,), "xy": (n_heads, n_chosen, n_vectors, 2), "explained": (n_heads, n_chosen),
    "length", "in_plane" (share of a vector's squared length in the plane): (n_heads, n_chosen, n_vectors), "cos":
    (n_heads, n_chosen, n_vectors, 3) with f, f_R and f_E, "error" = ‖f − f_R‖ / ‖f‖ and "evicted_mass":
    (n_heads, n_chosen)}; NaN where a step has no f_R or no f_E.
    """
    found = results.outputs(cell)
    if found is None:
        return None
    steps, vectors = found
    if not all(n in vectors for n in ("f", "f_R", "f_E")) or not len(steps):
        return None
    order = names(vectors)
    x = np.stack([vectors[n] for n in order], axis=-2).astype(float)  # (n_heads, n_chosen, n_vectors, v_head_dim)
    there = np.isfinite(x).all(axis=-1)
    xy, explained = planes(x)
    length = np.linalg.norm(x, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cos = np.einsum("...id,...jd->...ij", x, x[..., :3, :]) / (length[..., :, None] * length[..., None, :3])
        in_plane = (xy ** 2).sum(axis=-1) / length ** 2
        lost, apart = x[..., 0, :] - x[..., 1, :], x[..., 2, :] - x[..., 1, :]
        error = np.linalg.norm(lost, axis=-1) / length[..., 0]
        mass = (lost * apart).sum(axis=-1) / (apart ** 2).sum(axis=-1)  # f − f_R = w_E (f_E − f_R)
    usable = there[..., :3].all(axis=-1)
    blank = ~(there & usable[..., None])
    for values in (xy, length, cos, in_plane):
        values[blank] = np.nan
    for values in (explained, error, mass):
        values[~usable] = np.nan
    return {"names": order, "steps": np.asarray(steps, int), "xy": xy, "explained": explained, "length": length,
            "in_plane": in_plane, "cos": cos, "error": error, "evicted_mass": mass}


def _usable(results, cell):
    found = of_cell(results, cell)
    return found is not None and np.isfinite(found["error"]).any()


def data(results, budget=None, layer=None, head=None, step=None):
    """vectors: for one method, layer, head and stored step (without `step`, the one of greatest error): vector, x, y,
    length, in_plane, cos_f, cos_f_R, cos_f_E; plane: explained, error, evicted_mass. Both name label, budget, trace,
    layer, q_head and step."""
    results, budget = at_budget(results, budget)
    cell, head = chosen_head(results, budget, layer, head, lambda c: _usable(results, c), WHY)
    found = of_cell(results, cell)
    steps = list(found["steps"])
    if step is None:
        error = found["error"][head]
        if not np.isfinite(error).any():
            raise Absent(f"query head {head} of layer {results.cells.at[cell, 'layer']} had evicted nothing at the steps "
                         f"that were stored ({', '.join(map(str, steps))})")
        i = int(np.nanargmax(error))
    elif step not in steps:
        raise UsageError(f"step {step} is not among those stored in {results.folder}, which are "
                         f"{', '.join(map(str, steps))}: run again with --detail outputs --steps {step}")
    else:
        i = steps.index(step)
        if not np.isfinite(found["error"][head, i]):
            raise Absent(f"query head {head} had evicted nothing at step {step}, so there is no f_E")
    what = results.cells.loc[cell]
    where = {"label": what["label"], "budget": what["budget"], "trace": what["trace"], "layer": what["layer"],
             "q_head": head, "step": steps[i]}
    xy, cos = found["xy"][head, i], found["cos"][head, i]
    vectors = pd.DataFrame({**where, "vector": found["names"], "x": xy[:, 0], "y": xy[:, 1],
                            "length": found["length"][head, i], "in_plane": found["in_plane"][head, i],
                            "cos_f": cos[:, 0], "cos_f_R": cos[:, 1], "cos_f_E": cos[:, 2]})
    plane = pd.DataFrame([{**where, "explained": found["explained"][head, i], "error": found["error"][head, i],
                           "evicted_mass": found["evicted_mass"][head, i]}])
    return {"vectors": vectors[vectors["length"].notna()].reset_index(drop=True), "plane": plane}


def degrees(cos):
    return np.degrees(np.arccos(np.clip(cos, -1, 1)))


@paper
def draw(results, budget=None, style="double", frames=None, layer=None, head=None, step=None):
    frames = frames or data(results, budget, layer, head, step)
    vectors, plane = frames["vectors"], frames["plane"].iloc[0]
    if style == "double":
        figure, (ax, side) = plt.subplots(1, 2, figsize=(WIDTHS[style], 2.9), layout="constrained",
                                          width_ratios=[1, 1.05])
    else:
        figure, (ax, side) = plt.subplots(2, 1, figsize=(WIDTHS[style], 4.4), layout="constrained",
                                          height_ratios=[1.7, 1])
    for row in vectors.itertuples():
        colour, marker = look(row.vector)
        true = row.vector in COLOURS
        ax.annotate("", (row.x, row.y), (0, 0),
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.5 if true else 1.0,
                                "linestyle": "-" if true else (0, (3, 1.5)), "shrinkA": 0, "shrinkB": 0})
        ax.plot(row.x, row.y, marker=marker, color=colour, linestyle="", markersize=4.5,
                markerfacecolor=colour if true else "none")
    ax.plot(0, 0, "+", color="#555555", markersize=5)
    ax.margins(0.12)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set(xlabel="first principal axis", ylabel="second principal axis")
    what = about(results, plane["label"])
    where = (f"layer {plane['layer']}, query head {plane['q_head']}, step {plane['step']}"
             + (f", budget {plane['budget']}" if plane["budget"] else ""))
    figure.suptitle(f"{shown_name(plane['label'], what['foresight'])}: {where}", x=0.01, ha="left",
                    fontsize=8 if style == "double" else 7, fontweight="bold")
    side.axis("off")
    lines = len(vectors)
    side.set(xlim=(0, 1), ylim=(-(lines + 2.6), 0.6))
    for x, text in ((0.58, "length"), (0.79, "to f_E"), (1.0, "to f_R")):
        side.text(x, 0, text, ha="right", fontsize=6.8, color="#555555")
    for i, row in enumerate(vectors.itertuples()):
        colour, marker = look(row.vector)
        true = row.vector in COLOURS
        y = -1 - i
        side.plot(0.015, y + 0.2, marker=marker, color=colour, markersize=4.5, linestyle="", clip_on=False,
                  markerfacecolor=colour if true else "none")
        side.text(0.05, y, shown(row.vector), fontsize=6.8)
        for x, text in ((0.58, f"{row.length:.3g}"), (0.79, f"{degrees(row.cos_f_E):.0f}°"),
                        (1.0, f"{degrees(row.cos_f_R):.0f}°")):
            side.text(x, y, text, ha="right", fontsize=6.8)
    side.text(0, -(lines + 1.4), f"The plane holds {plane['explained']:.1%} of the squared length.".replace("%", " %"),
              fontsize=6.8)
    side.text(0, -(lines + 2.3), f"error {plane['error']:.3g}, evicted mass {plane['evicted_mass']:.3g}", fontsize=6.8)
    return figure


def note(results, frames):
    return ""
