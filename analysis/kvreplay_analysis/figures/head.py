"""One query head along the decode: its errors, what it lost, and its worst steps."""

import numpy as np
import pandas as pd

from ..errors import Absent
from ..results import parts
from ..style import WIDTHS, compensator_look, compensator_title, legend_below, paper, plt, shown_name
from .common import about, chosen_head

NAME = "head"
TITLE = "One head along the decode"
HOW_TO_READ = ("Above, the error of one query head and what each correction leaves of it; below, how much attention its "
               "evicted tokens would have had and how differently they point: a peak where the mass is high is a token "
               "that was needed again, one where the cosine falls is a direction that was lost.")
BY_BUDGET = True
OF_A_HEAD = True
N_WORST = 6
METRICS = ("error_output", "evicted_mass", "cos_retained_evicted")


def columns(results, cell):
    """{column: (metric, compensator)} of what is shown of a head."""
    measured = parts(results.cells.at[cell, "compensators"])
    return {**{metric: (metric, "") for metric in METRICS},
            **{f"error_corrected.{c}": ("error_corrected", c) for c in results.compensators
               if c in measured and c != "none"}}


def arrays(results, cell, kind="blocks"):
    """{column: (n_heads, n_blocks or n_steps)} of a cell; only what the run has. Nothing more is kept in memory."""
    found = {name: results.of_cell(kind, cell, *of) for name, of in columns(results, cell).items()}
    return {name: values for name, values in found.items() if values is not None}


def middles(results, cell):
    """Decode step in the middle of each block of a cell, shape (n_blocks,)."""
    weights = results.block_weights(cell)
    return np.arange(len(weights)) * results.block_steps + weights / 2


def worst(results, cell, blocks=None, n=N_WORST):
    """(of, step (n_heads, n), {column: (n_heads, n)}): the steps of greatest error_output of every head, the worst
    first; with --detail steps single steps, else blocks by their first step. Steps that do not count are step −1."""
    steps = arrays(results, cell, "steps")
    of = "steps" if "error_output" in steps else "blocks"
    values = steps if of == "steps" else blocks or arrays(results, cell)
    error = values["error_output"].astype(float)
    n = min(n, error.shape[1])
    order = np.argsort(-np.where(np.isfinite(error), error, -np.inf), axis=1, kind="stable")[:, :n]
    picked = {name: np.take_along_axis(v.astype(float), order, axis=1) for name, v in values.items()}
    step = order * (1 if of == "steps" else results.block_steps)
    return of, np.where(np.isfinite(picked["error_output"]), step, -1), picked


def data(results, budget=None, layer=None, head=None):
    """curves: step (middle of the block) and a column per metric; worst: the steps of greatest error_output, or the
    blocks, named by their first step, where the run has no --detail steps. Both name label, budget, trace, layer and
    q_head."""
    cell, head = chosen_head(results, budget, layer, head)
    what = results.cells.loc[cell]
    where = {"label": what["label"], "budget": what["budget"], "trace": what["trace"], "layer": what["layer"],
             "q_head": head}
    blocks = arrays(results, cell)
    if "error_output" not in blocks:
        raise Absent("this run has no error_output: run again with --metrics all")
    curves = pd.DataFrame({**where, "step": middles(results, cell), **{name: v[head] for name, v in blocks.items()}})
    of, step, picked = worst(results, cell, blocks)
    bad = pd.DataFrame({**where, "of": of, "step": step[head], **{name: v[head] for name, v in picked.items()}})
    return {"curves": curves, "worst": bad[bad["step"] >= 0].reset_index(drop=True)}


@paper
def draw(results, budget=None, style="double", frames=None, layer=None, head=None):
    frames = frames or data(results, budget, layer, head)
    curves, bad = frames["curves"], frames["worst"]
    first = curves.iloc[0]
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTHS[style], 3.6), sharex=True, layout="constrained",
                                          height_ratios=[1.25, 1])
    above.plot(curves["step"], curves["error_output"], color="#555555", marker="o", label="error_output", zorder=3)
    for name in curves.columns:
        if name.startswith("error_corrected."):
            c = name.partition(".")[2]
            colour, marker = compensator_look(c)
            above.plot(curves["step"], curves[name], color=colour, marker=marker, label=f"with {compensator_title(c)}")
    single = len(bad) and bad["of"].iloc[0] == "steps"
    if single:
        above.plot(bad["step"], bad["error_output"], linestyle="", marker="x", color="#cc3355", markersize=4,
                   label="worst steps", zorder=4)
    above.set_ylabel("error")
    above.set_ylim(bottom=0)
    what = about(results, first["label"])
    title = f"{shown_name(first['label'], what['foresight'])}, layer {first['layer']}, query head {first['q_head']}"
    if first["budget"]:
        title += f", budget {first['budget']}"
    above.set_title(title if style == "double" else "\n".join(_in_two(title)))
    if "evicted_mass" in curves:
        below.plot(curves["step"], curves["evicted_mass"], color="#0072b2", marker="s", label="evicted_mass")
    if "cos_retained_evicted" in curves:
        below.plot(curves["step"], curves["cos_retained_evicted"], color="#e8762d", marker="D", linestyle="--",
                   label="cos_retained_evicted")
        below.axhline(0, color="#555555", linewidth=0.7)
    below.set_xlabel("decode step")
    below.set_xlim(left=0)
    below.set_ylabel("mass, cosine")
    handles = [*above.get_legend_handles_labels()[0], *below.get_legend_handles_labels()[0]]
    legend_below(figure, handles, style)
    return figure


def _in_two(title):
    cut = title.rfind(", layer")
    return [title[:cut], title[cut + 2:]]


def note(results, frames):
    return ""
