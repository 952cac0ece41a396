"""What a run found, for its first screen: the best method of each group and budget, how far the best oracle is, and
what a correction gives back. Everything is computed from the table of configurations and its blocks."""

import numpy as np
import pandas as pd

from . import bootstrap
from .results import GROUPS

MORE_TOKENS = 1.05  # a method that keeps more than this times its group's median is not compared at that budget


def best(results, table):
    """Frame with one row per group and budget: the method of least error_output and what stands around it.

    Columns: group, budget, label, error_output, low, high, tokens (resident; attended in the group `selection`),
    n_methods (compared), next, next_error, difference (next − best) with difference_low and _high (paired block
    bootstrap), oracle, oracle_error (the best oracle there), left_out (labels that keep more tokens than the others).
    """
    rows = []
    asked = table[(table["budget"] != "") & table["error_output"].notna()]
    for group in [g for g in GROUPS if (asked["group"] == g).any()]:
        for budget in [b for b in results.budgets if ((asked["group"] == group) & (asked["budget"] == b)).any()]:
            here = asked[(asked["group"] == group) & (asked["budget"] == budget)].copy()
            here["tokens"] = here["attended" if group == "selection" else "resident"]
            methods, oracles = here[here["foresight"] != "oracle"], here[here["foresight"] == "oracle"]
            more = methods["tokens"] > MORE_TOKENS * methods["tokens"].median()
            compared = methods[~more].sort_values("error_output", kind="stable")
            if compared.empty:
                continue
            first = compared.iloc[0]
            row = {"group": group, "budget": budget, "label": first["label"], "error_output": first["error_output"],
                   "low": first["error_output_low"], "high": first["error_output_high"], "tokens": first["tokens"],
                   "n_methods": len(compared), "left_out": list(methods[more]["label"]), "next": "",
                   "next_error": np.nan, "difference": np.nan, "difference_low": np.nan, "difference_high": np.nan,
                   "oracle": "", "oracle_error": np.nan}
            if len(compared) > 1:
                second = compared.iloc[1]
                row["next"], row["next_error"] = second["label"], second["error_output"]
                row["difference"], row["difference_low"], row["difference_high"] = difference(
                    results, first["label"], second["label"], budget)
            if len(oracles):
                oracle = oracles.sort_values("error_output", kind="stable").iloc[0]
                row["oracle"], row["oracle_error"] = oracle["label"], oracle["error_output"]
            rows.append(row)
    return pd.DataFrame(rows)


def difference(results, label, other, budget):
    """(estimate, low, high) of the error_output of `other` less that of `label` at a budget, on the same blocks."""
    def sums(name):
        cells = results.cells
        mine = results.with_cells((cells["label"] == name) & (cells["budget"] == budget))
        return bootstrap.totals(mine, [("error_output", "")])

    a, b = sums(label), sums(other)
    if len(a) != len(b) or any(len(x) != len(y) for x, y in zip(a, b)):
        return np.nan, np.nan, np.nan  # an unfinished run: they do not rest on the same traces
    return bootstrap.interval([np.hstack([x, y]) for x, y in zip(a, b)],
                              lambda s: bootstrap.mean(s[..., 2:]) - bootstrap.mean(s[..., :2]))


def given_back(results, table, budget):
    """Frame: for each group and compensator at a budget, the share 1 − error_corrected / error over its methods.

    Columns: group, compensator, n_methods, median, lowest, highest (over methods without foresight that lost
    something), label of the highest, n_harmed (below 0).
    """
    rows = []
    here = table[(table["budget"] == budget) & (table["foresight"] != "oracle") & (table["error"] > 0)]
    for group in [g for g in GROUPS if g != "selection" and (here["group"] == g).any()]:
        mine = here[here["group"] == group]
        for c in results.compensators:
            removed = (1 - mine[f"error_corrected.{c}"] / mine["error"]).dropna()
            if len(removed) and c != "none":
                rows.append({"group": group, "compensator": c, "n_methods": len(removed),
                             "median": removed.median(), "lowest": removed.min(), "highest": removed.max(),
                             "label": mine.loc[removed.idxmax(), "label"], "n_harmed": int((removed < 0).sum())})
    return pd.DataFrame(rows)


def rests_on(results):
    """What the means of one configuration rest on: steps, layers, heads, traces and blocks of the run."""
    cells = results.cells
    first = cells.drop_duplicates(["trace", "layer"])
    by_trace = cells.drop_duplicates("trace")
    n_blocks = int(np.ceil(by_trace["n_steps"] / results.block_steps).sum())
    return {"n_traces": len(by_trace), "n_steps": int(by_trace["n_steps"].sum()), "n_layers": cells["layer"].nunique(),
            "n_heads": int(first["n_heads"].max()), "n_head_steps": int((first["n_steps"] * first["n_heads"]).sum()),
            "n_blocks": n_blocks}


def sentences(results, table, found, number, shown=str):
    """The findings at the run's default budget in words; `number` writes a number, `shown` a label."""
    out = []
    budget = results.default_budget
    for row in found[found["budget"] == budget].itertuples() if len(found) else []:
        out.append(_about_best(row, number, shown))
    back = given_back(results, table, budget)
    for group, mine in back.groupby("group", sort=False) if len(back) else []:
        out.append(_about_correction(group, budget, mine, shown))
    out.append(_about_points(rests_on(results), results.block_steps))
    return out


def _about_best(row, number, shown):
    group = GROUPS[row.group]
    text = f"{group}, budget {row.budget}: "
    if row.n_methods == 1:
        text += f"{shown(row.label)} is the only method, with a mean error_output of {number(row.error_output)}"
    else:
        text += (f"{shown(row.label)} has the least error of {row.n_methods} methods, "
                 f"a mean error_output of {number(row.error_output)}")
    if np.isfinite(row.low) and row.low < row.high:
        text += f" (95 % {number(row.low)} to {number(row.high)})"
    text += f" at {number(row.tokens)} {'attended' if row.group == 'selection' else 'resident'} tokens"
    if row.next:
        text += f"; next is {shown(row.next)} with {number(row.next_error)}"
        if np.isfinite(row.difference_low):
            span = f"95 % {number(row.difference_low)} to {number(row.difference_high)}"
            text += (f", {number(row.difference)} more ({span})" if row.difference_low > 0 else
                     f", no significant difference ({span})")
    text += "."
    if row.oracle:
        if row.oracle_error <= 0:
            text += f" The best oracle, {shown(row.oracle)}, has none."
        elif row.oracle_error < row.error_output:
            text += (f" The best oracle, {shown(row.oracle)}, has {number(row.oracle_error)}: the method's error is "
                     f"{number(row.error_output / row.oracle_error)} times as large.")
        else:
            text += (f" The best oracle, {shown(row.oracle)}, has {number(row.oracle_error)}, which is not less: it "
                     "knows what selection could, and returns no corrected output.")
    if row.left_out:
        text += (f" Left out there, keeping over 5 % more tokens than the others' median: "
                 f"{', '.join(shown(x) for x in row.left_out)}.")
    return text


def _about_correction(group, budget, mine, shown):
    def share(v):
        return f"{100 * v:.0f} %".replace("-", "−")

    parts = []
    for row in mine.itertuples():
        one = row.n_methods == 1
        part = f"{row.compensator} {share(row.median)}" if one else \
            f"{row.compensator} {share(row.median)} ({share(row.lowest)} to {share(row.highest)})"
        if row.n_harmed:
            part += f", harming {row.n_harmed}"
        parts.append(part)
    n = mine["n_methods"].max()
    of = f"in the median of {n} methods" if n > 1 else f"of {shown(mine['label'].iloc[0])}"
    return (f"{GROUPS[group]}, budget {budget}: of the error of plain eviction, a correction gives back {of}: "
            f"{'; '.join(parts)}.")


def _about_points(on, block_steps):
    def count(n, what):
        return f"{n:,} {what}{'' if n == 1 else 's'}".replace(",", "\u2009")

    text = (f"Each mean rests on up to {count(on['n_head_steps'], 'head-step')} "
            f"({count(on['n_steps'], 'decode step')} of {count(on['n_traces'], 'trace')}, "
            f"{count(on['n_layers'], 'layer')}, {count(on['n_heads'], 'query head')}), ")
    if on["n_blocks"] == 1:
        return text + f"which are one block of {block_steps} steps: there are no intervals."
    text += f"each interval on {count(on['n_blocks'], 'block')} of {block_steps} steps"
    return text + (": take the intervals as rough." if on["n_blocks"] < 10 else ".")
