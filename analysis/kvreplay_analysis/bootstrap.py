"""Block bootstrap: confidence intervals for means over steps that are correlated in time and across heads.

A block of 64 steps is drawn as a whole and for all heads and layers together, so neither the correlation between
neighbouring steps nor that between heads makes an interval too narrow. With several traces the traces are drawn
first: then the interval speaks of other traces of this kind, not only of other steps of these.
"""

from functools import lru_cache

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
    for cell, trace in zip(results.cells.index, results.cells["trace"]):
        if all(cell in a for a in arrays):
            add(per_trace, trace, block_sums([a[cell] for a in arrays], results.block_weights(cell)))
    return list(per_trace.values())


def paired_totals(a, b, pairs, metric, against=None):
    """Additive sums per trace of two sides that were measured on the same steps: list of arrays (n_blocks, 3) with the
    sum of A, the sum of B and the head-steps counted, for `interval` with `difference` or `relative_difference`.

    a, b     Results; may be the same
    pairs    [(cell of a, cell of b)]: the cells that stand against each other; both of one trace
    metric   (metric, compensator) of A; `against` that of B, the same if it is not given

    Both sides are summed over the same head-blocks (those where both counted) and are drawn together, so what they
    share, such as a hard passage of the text, is in both and cancels.
    """
    left, right = a.blocks(*metric), b.blocks(*(against or metric))
    per_trace = {}
    for one, other in pairs:
        if one in left and other in right:
            add(per_trace, a.cells.at[one, "trace"],
                block_sums([left[one], right[other]], a.block_weights(one)))
    return list(per_trace.values())


def block_sums(values, weights):
    """(n_blocks, len(values) + 1): sums over heads of arrays (n_rows, n_blocks), weighted by steps; then the count."""
    counted = np.isfinite(values[0])
    for v in values[1:]:
        counted &= np.isfinite(v)
    sums = [np.where(counted, v, 0.0).sum(axis=0) for v in values]
    return np.column_stack([*sums, counted.sum(axis=0)]) * weights[:, None]


def add(per_trace, trace, sums):
    per_trace[trace] = per_trace[trace] + sums if trace in per_trace else sums


def mean(sums):
    """First metric's mean over all counted head-steps; sums (..., n_metrics + 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., -1]


def difference(sums):
    """Mean of the first less mean of the second, over the head-steps where both counted; sums (..., 3)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0] - sums[..., 1]) / sums[..., -1]


def relative_difference(sums):
    """The same as a share of the second's mean: -0.1 where the first is a tenth lower."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0] - sums[..., 1]) / sums[..., 1]


def removed_share(sums):
    """Share of the first metric (the error) that is gone in the second (the corrected error)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1.0 - sums[..., 1] / sums[..., 0]


@lru_cache(maxsize=64)
def _draws(n_blocks, n_resamples, seed):
    """How often each block is drawn: for each trace (n_resamples, its n_blocks). Depends on the shape alone, so that
    all methods of a run are resampled alike."""
    rng = np.random.default_rng(seed)
    n = len(n_blocks)
    drawn = rng.multinomial(n, np.full(n, 1.0 / n), size=n_resamples) if n > 1 else np.ones((n_resamples, 1), int)
    # A trace drawn twice has its blocks drawn twice, independently.
    return [rng.multinomial(drawn[:, t] * b, np.full(b, 1.0 / b)).astype(float) for t, b in enumerate(n_blocks)]


def interval(traces, statistic, level=LEVEL, n_resamples=N_RESAMPLES, seed=SEED):
    """(estimate, low, high) of a statistic of summed blocks; low and high are NaN where one block is all there is."""
    if not traces:
        return np.nan, np.nan, np.nan
    estimate = float(statistic(sum(t.sum(axis=0) for t in traces)))
    if len(traces) == 1 and len(traces[0]) < 2:
        return estimate, np.nan, np.nan
    counts = _draws(tuple(len(t) for t in traces), n_resamples, seed)
    sums = sum(c @ blocks for c, blocks in zip(counts, traces))
    values = statistic(sums)
    values = values[np.isfinite(values)]
    if not len(values):
        return estimate, np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return estimate, float(low), float(high)
