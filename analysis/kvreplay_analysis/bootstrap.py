"""Block bootstrap: confidence intervals for means over steps that are correlated in time and across heads.

A block of 64 steps is drawn as a whole and for all heads and layers together, so neither the correlation between
neighbouring steps nor that between heads makes an interval too narrow. With several traces the traces are drawn
first: then the interval speaks of other traces of this kind, not only of other steps of these.
"""

import numpy as np

SEED = 20
N_RESAMPLES = 2000
LEVEL = 0.95


def totals(results, metrics):
    """Additive sums per trace: list of arrays (n_blocks, len(metrics) + 1), the last column counting head-steps.

    `metrics` is a list of (metric, compensator). A head's block counts where all of them are there, so that ratios
    compare like with like.
    """
    arrays = [results.blocks(m, c) for m, c in metrics]
    per_trace = {}
    for cell in results.cells.index:
        if any(cell not in a for a in arrays):
            continue
        values = np.stack([a[cell] for a in arrays], axis=-1)  # (n_rows, n_blocks, n_metrics)
        weight = results.block_weights(cell)[None, :] * np.isfinite(values).all(axis=-1)  # (n_rows, n_blocks)
        sums = np.empty((values.shape[1], len(metrics) + 1))
        sums[:, :-1] = np.einsum("rb,rbm->bm", weight, np.where(weight[..., None] > 0, values, 0.0))
        sums[:, -1] = weight.sum(axis=0)
        trace = results.cells.at[cell, "trace"]
        if trace in per_trace:
            per_trace[trace] += sums
        else:
            per_trace[trace] = sums
    return list(per_trace.values())


def mean(sums):
    """First metric's mean over all counted head-steps; sums (..., n_metrics + 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., -1]


def removed_share(sums):
    """Share of the first metric (the error) that is gone in the second (the corrected error)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1.0 - sums[..., 1] / sums[..., 0]


def interval(traces, statistic, level=LEVEL, n_resamples=N_RESAMPLES, seed=SEED):
    """(estimate, low, high) of a statistic of summed blocks; low and high are NaN where one block is all there is."""
    if not traces:
        return np.nan, np.nan, np.nan
    estimate = float(statistic(sum(t.sum(axis=0) for t in traces)))
    if len(traces) == 1 and len(traces[0]) < 2:
        return estimate, np.nan, np.nan
    rng = np.random.default_rng(seed)
    n = len(traces)
    drawn = rng.multinomial(n, np.full(n, 1.0 / n), size=n_resamples) if n > 1 else np.ones((n_resamples, 1), int)
    sums = 0.0
    for t, blocks in enumerate(traces):
        n_blocks = len(blocks)
        # A trace drawn twice has its blocks drawn twice, independently.
        counts = rng.multinomial(drawn[:, t] * n_blocks, np.full(n_blocks, 1.0 / n_blocks))
        sums = sums + counts @ blocks
    values = statistic(sums)
    values = values[np.isfinite(values)]
    if not len(values):
        return estimate, np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return estimate, float(low), float(high)
