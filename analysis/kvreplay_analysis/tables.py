"""One row per configuration (a method at a budget): the numbers of the report's tables."""

from dataclasses import replace

import numpy as np
import pandas as pd

from . import bootstrap

# Column of the table -> metric it is the mean of.
COLUMNS = {"resident": "resident", "attended": "attended", "bytes": "bytes", "error_output": "error_output", "error": "error",
           "evicted_mass": "evicted_mass", "cos_retained_evicted": "cos_retained_evicted"}


def pooled(summary, by):
    """Means over all counted steps: sum(n * mean) / sum(n) within each group of rows. Skipped steps are added up."""
    rows = summary.assign(_sum=np.where(summary["n"] > 0, summary["n"] * summary["mean"], 0.0))
    out = rows.groupby(by, sort=False)[["n", "n_skipped", "_sum"]].sum()
    out["mean"] = (out["_sum"] / out["n"]).where(out["n"] > 0)
    return out.drop(columns="_sum")


def pooled_over_traces(results, by_trace):
    """Mean of a number of each trace (Series or dict), weighed as what is measured of KV heads is: by decode steps and
    layers."""
    weights = results.once("trace_weights", lambda: _trace_weights(results))
    return float((weights * [by_trace.get(trace, np.nan) for trace in weights.index]).sum(skipna=False) / weights.sum())


def _trace_weights(results):
    what = results.cells.drop_duplicates(["trace", "layer"])
    return (what["n_steps"] * what["n_kv_heads"]).groupby(what["trace"]).sum()


def configurations(results, bands=True):
    """The table: one row per (label, budget), in the order of the run.

    Columns: label, method, group, foresight, budget, compensator_acting, the means of COLUMNS,
    `error_corrected.C` for every compensator C, error_output_low and _high (95 % block bootstrap), n (head-steps
    counted for error_output), n_skipped (the same, left out) and n_skipped_cos (left out of cos_retained_evicted).
    """
    means = pooled(results.summary, ["label", "budget", "metric", "compensator"])
    first = results.cells.drop_duplicates(["label", "budget"])
    indices = results.cells.groupby(["label", "budget"]).groups
    rows = []
    for what in first.itertuples():
        row = {"label": what.label, "method": what.method, "group": what.group, "foresight": what.foresight,
               "budget": what.budget, "compensator_acting": what.compensator_acting}

        def get(metric, column, compensator="", key=(what.label, what.budget)):
            at = (*key, metric, compensator)
            return means.at[at, column] if at in means.index else np.nan

        for column, metric in COLUMNS.items():
            row[column] = get(metric, "mean")
        for c in results.compensators:
            row[f"error_corrected.{c}"] = get("error_corrected", "mean", c)
        if bands:
            mine = replace(results, cells=results.cells.loc[indices[what.label, what.budget]])
            _, row["error_output_low"], row["error_output_high"] = bootstrap.interval(
                bootstrap.totals(mine, [("error_output", "")]), bootstrap.mean)
        row["n"] = get("error_output", "n")
        row["n_skipped"] = get("error_output", "n_skipped")
        row["n_skipped_cos"] = get("cos_retained_evicted", "n_skipped")
        rows.append(row)
    return pd.DataFrame(rows)


def not_pinned(results):
    """Labels in the evictable group whose selector has no run at pool=decode, where others have one."""
    def selector(method):
        return method.split("/")[-1].split("+")[0].split(":")[0]

    cells = results.cells.drop_duplicates("label")
    pinned = {selector(m) for m in cells.loc[cells["group"] == "pinned", "method"]}
    if not pinned:
        return []
    loose = cells[(cells["group"] == "evictable") & (cells["budget"] != "")]
    return [w.label for w in loose.itertuples() if selector(w.method) not in pinned]
