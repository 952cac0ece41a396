"""Which positions a head kept, over the decode."""

import numpy as np
import pandas as pd

from ..errors import Absent
from ..style import WIDTHS, paper, plt, shown_name
from .common import about, at_budget, chosen_head, shown_first

NAME = "raster"
TITLE = "Retained positions along the decode"
HOW_TO_READ = ("Full colour is kept: each column is a moment of the decode, each row a stretch of token positions, and the shade "
               "the share of that stretch which the head's cache still holds (attends, in per-step selection); horizontal "
               "bars are tokens kept for long, a diagonal band is a recent window, and grey is not yet written.")
BY_BUDGET = True
OF_A_HEAD = True
N_TOKEN_BINS, N_STEP_BINS = 56, 64
N_PANELS = {"single": 2, "double": 6}
WHY = "this run does not say which tokens were kept: run again with --detail retained"


def set_of_head(results, cell, head, n_sets):
    """Row of /evicted_at that a query head's tokens are in: one set for a layer, a KV head or a query head."""
    group_size = int(results.cells.at[cell, "group_size"])
    n_heads = int(results.cells.at[cell, "n_heads"])
    return head if n_sets == n_heads else head // group_size if n_sets > 1 else 0


def edges(n, n_bins):
    """Edges of at most n_bins bins of whole positions, as even as can be; shape (n_bins + 1,)."""
    return np.unique(np.round(np.linspace(0, n, min(n, n_bins) + 1)).astype(int))


def retained(evicted_at, prompt_len, n_steps, n_token_bins=N_TOKEN_BINS, n_step_bins=N_STEP_BINS):
    """(token edges, step edges, share (n_sets, n_token_bins, n_step_bins)): of the (token, step) pairs of a bin whose
    token is written, the share that is retained; NaN where none is written.

    A token of position p is written at decode step max(0, p − prompt_len) and leaves at evicted_at (n_sets, n_tokens).
    """
    n_sets, n_tokens = evicted_at.shape
    tokens, steps = edges(n_tokens, n_token_bins), edges(n_steps, n_step_bins)
    born = np.clip(np.arange(n_tokens) - prompt_len, 0, n_steps)
    row = np.repeat(np.arange(len(tokens) - 1), np.diff(tokens)) * (n_steps + 1)

    def pairs(gone):
        """Of each bin, those from birth until `gone`: what comes and what goes at each step, summed up."""
        n_changes = (len(tokens) - 1) * (n_steps + 1)
        change = (np.bincount(row + born, minlength=n_changes) -
                  np.bincount(row + np.clip(gone, born, n_steps), minlength=n_changes))
        there = change.reshape(-1, n_steps + 1).cumsum(axis=1)[:, :-1]
        return np.add.reduceat(there, steps[:-1], axis=1)

    written = pairs(n_steps)
    share = np.full((n_sets, len(tokens) - 1, len(steps) - 1), np.nan)
    for s in range(n_sets):
        np.divide(pairs(evicted_at[s]), written, out=share[s], where=written > 0)
    return tokens, steps, share


def attended(bits, prompt_len, n_token_bins=N_TOKEN_BINS, n_step_bins=N_STEP_BINS):
    """The same of what per-step selection attends; bits: bool (n_heads, n_steps, n_tokens)."""
    n_heads, n_steps, n_tokens = bits.shape
    tokens, steps = edges(n_tokens, n_token_bins), edges(n_steps, n_step_bins)
    born = np.maximum(0, np.arange(n_tokens) - prompt_len)
    there = np.arange(n_steps)[:, None] >= born  # (n_steps, n_tokens)

    def binned(values):
        # Sums of whole rows: reduceat goes down each column.
        by_step = [values[..., a:b, :].sum(axis=-2, dtype=np.int32) for a, b in zip(steps, steps[1:])]
        return np.add.reduceat(np.stack(by_step, axis=-1), tokens[:-1], axis=-2)

    written = binned(there)
    share = np.full((n_heads, len(tokens) - 1, len(steps) - 1), np.nan)
    np.divide(binned(bits & there), written, out=share, where=written > 0)
    return tokens, steps, share


def of_cell(results, cell):
    """(token edges, step edges, share (n_sets, ...)) of a cell, None without --detail retained."""
    evicted_at = results.evicted_at(cell)
    if evicted_at is None:
        return None
    prompt_len, n_steps = (int(results.cells.at[cell, c]) for c in ("prompt_len", "n_steps"))
    bits = results.attended(cell)
    return attended(bits, prompt_len) if bits is not None else retained(evicted_at, prompt_len, n_steps)


def data(results, budget=None, layer=None, head=None, n_methods=None):
    """share: label, budget, trace, layer, q_head, token, token_end, step, step_end, retained: one row per bin, for each
    method (at most n_methods) at one layer and head; `retained` is empty where no token of the bin is written."""
    results, budget = at_budget(results, budget)
    cell, head = chosen_head(results, budget, layer, head, lambda c: results.evicted_at(c) is not None, WHY)
    at = results.cells.loc[cell]
    beside = results.cells[(results.cells["trace"] == at["trace"]) & (results.cells["layer"] == at["layer"])]
    of_label = dict(zip(beside["label"], beside.index))
    frames = []
    # Methods with a budget come first: one that keeps everything has nothing to show.
    asked = set(beside.loc[beside["budget"] != "", "label"]) or set(of_label)
    for label in shown_first(results, [x for x in of_label if x in asked], n_methods):
        found = of_cell(results, of_label[label])
        if found is None:
            continue
        tokens, steps, share = found
        mine = share[set_of_head(results, of_label[label], head, len(share))]
        row, column = np.indices(mine.shape)
        frames.append(pd.DataFrame({
            "label": label, "budget": beside.at[of_label[label], "budget"], "trace": at["trace"], "layer": at["layer"],
            "q_head": head, "token": tokens[row.ravel()], "token_end": tokens[row.ravel() + 1],
            "step": steps[column.ravel()], "step_end": steps[column.ravel() + 1], "retained": mine.ravel()}))
    if not frames:
        raise Absent(WHY)
    return {"share": pd.concat(frames, ignore_index=True)}


@paper
def draw(results, budget=None, style="double", frames=None, layer=None, head=None):
    frame = (frames or data(results, budget, layer, head, N_PANELS[style]))["share"]
    labels = list(dict.fromkeys(frame["label"]))[:N_PANELS[style]]
    n_columns = min(len(labels), 3 if style == "double" else 1)
    n_rows = -(-len(labels) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns,
                                figsize=(WIDTHS[style] if n_columns > 1 or style == "single" else 4.2,
                                                            0.45 + 1.75 * n_rows),
                                squeeze=False, layout="constrained", sharex=True, sharey=True)
    colours = plt.get_cmap("Blues").with_extremes(bad="#e3e3e3")
    for i, ax in enumerate(axes.flat):
        if i >= len(labels):
            ax.set_visible(False)
            continue
        mine = frame[frame["label"] == labels[i]]
        matrix = mine.pivot(index="token", columns="step", values="retained").to_numpy(dtype=float)
        tokens = [*sorted(set(mine["token"])), mine["token_end"].max()]
        steps = [*sorted(set(mine["step"])), mine["step_end"].max()]
        image = ax.pcolormesh(steps, tokens, np.ma.masked_invalid(matrix), cmap=colours, vmin=0, vmax=1,
                              rasterized=True)
        ax.set_facecolor("#e3e3e3")
        ax.grid(False)
        ax.set_title(shown_name(labels[i], about(results, labels[i])["foresight"]))
        if i % n_columns == 0:
            ax.set_ylabel("token position")
        if i + n_columns >= len(labels):
            ax.set_xlabel("decode step")
            ax.tick_params(labelbottom=True)
    first = frame.iloc[0]
    figure.suptitle(f"layer {first['layer']}, query head {first['q_head']}"
                    + (f", budget {first['budget']}" if first["budget"] else ""), x=0.01, ha="left", fontsize=7.5)
    figure.colorbar(image, ax=axes, label="share retained", shrink=0.9, pad=0.015, aspect=25)
    return figure


def note(results, frames):
    return ""
