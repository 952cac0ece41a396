"""Is the order of methods the same everywhere? Kendall's tau between orders by layer, head type, budget and trace."""

import numpy as np
import pandas as pd

from . import taxonomy
from .errors import Absent, UsageError, nearest
from .tables import pooled

FACTORS = ("layer", "head_type", "budget", "trace")
LEAST = 3  # methods that an order rests on


def errors(results, factor, budget=None, group="evictable"):
    """Mean error_output of each method within each level of a factor: frame (level, label), levels in order.

    The methods are those of one group that have budgets, without oracles, at one budget (default: the one that most
    methods share; with factor budget: all that every method has). A method that lacks a level is left out.
    """
    if factor not in FACTORS:
        raise UsageError(f"factor {factor} is none of {', '.join(FACTORS)}{nearest(factor, FACTORS)}")
    cells = results.cells
    chosen = (cells["group"] == group) & (cells["foresight"] != "oracle") & (cells["budget"] != "")
    if factor != "budget":
        budget = results.default_budget if budget is None else budget
        chosen &= cells["budget"] == budget
    wanted = cells[chosen]
    rows = results.once(("errors", factor == "head_type"), lambda: _rows(results, factor))
    rows = rows[rows["label"].isin(wanted["label"].unique()) & rows["budget"].isin(wanted["budget"].unique())]
    if wanted["label"].nunique() < LEAST:
        raise Absent(f"an order needs {LEAST} methods, and at budget {budget} the run has "
                     f"{wanted['label'].nunique()} in this group" if factor != "budget" else
                     f"an order needs {LEAST} methods, and the run has {wanted['label'].nunique()} in this group")
    table = pooled(rows, [factor, "label"])["mean"].unstack("label")
    table = table.reindex(columns=list(dict.fromkeys(wanted["label"])))
    order = {"layer": sorted(table.index), "trace": [t for t in results.traces if t in table.index],
             "budget": [b for b in results.budgets if b in table.index],
             "head_type": [t for t in taxonomy.TYPES if t in table.index]}[factor]
    table = table.reindex(order).dropna(axis=1)
    if len(table) < 2:
        names = {"layer": "layer", "trace": "trace", "budget": "budget", "head_type": "type of head"}
        level = f" ({table.index[0]})" if len(table) else ""
        raise Absent(f"orders differ between two or more, and this run has one {names[factor]}{level}")
    if table.shape[1] < LEAST:
        raise Absent(f"an order needs {LEAST} methods, and {table.shape[1]} have every {factor.replace('_', ' ')}")
    return table


def _rows(results, factor):
    rows = taxonomy.with_types(results) if factor == "head_type" else results.summary
    return rows[rows["metric"] == "error_output"]


def taus(table):
    """Kendall's tau-b between the rows of errors(): frame (level, level); 1 = the same order, -1 = the reverse, about 0
    = unrelated. NaN where all methods of a level are equal."""
    values = table.to_numpy(float)
    first, second = np.triu_indices(values.shape[1], k=1)
    signs = np.sign(values[:, first] - values[:, second])  # (levels, pairs of methods); 0 where a pair is tied
    n_apart = (signs ** 2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = signs @ signs.T / np.sqrt(np.outer(n_apart, n_apart))
    return pd.DataFrame(out, index=table.index, columns=table.index)


def matrix(results, factor, budget=None, group="evictable"):
    """taus() of errors(): the matrix of a factor; Absent where it has one level or the group too few methods."""
    return taus(errors(results, factor, budget, group))
