"""What a run found, for the first screen of its report: the best method of each group and budget at equal tokens, how
far the best oracle is, and what a correction gives back. The numbers are those of the league and of the table."""

import numpy as np
import pandas as pd

from .results import GROUPS


def best(league, compensated=False):
    """Frame with one row per group and budget of a league: who is first and what stands around it. Methods with a
    compensator from beside them take part if `compensated`.

    Columns: group, budget, unit, at (the size at which they are compared), label, error_output, low, high, n_methods
    (ranked), next, next_error, next_low, next_high, base, oracle, oracle_error, closed (share of the way from the base
    to the best oracle), note (the league's on the first), left_out (methods, as they are, without a number at this
    size).
    """
    rows = []
    asked = league[(league["budget"] != "") & (compensated | (league["compensator"] == ""))] if len(league) else league
    for (group, budget), here in asked.groupby(["group", "budget"], sort=False) if len(asked) else []:
        methods = here[here["foresight"] != "oracle"]
        ranked = methods[methods["error_output"].notna()].sort_values("error_output", kind="stable")
        if ranked.empty:
            continue
        first = ranked.iloc[0]
        second = ranked.iloc[1] if len(ranked) > 1 else {}
        oracle = here[here["label"] == first["oracle"]]
        rows.append({
            **first[["group", "budget", "unit", "at", "label", "error_output", "low", "high"]],
            "n_methods": len(ranked),
            "next": second.get("label", ""), "next_error": second.get("error_output", np.nan),
            "next_low": second.get("low", np.nan), "next_high": second.get("high", np.nan), "base": first["base"],
            "oracle": first["oracle"], "oracle_error": oracle["error_output"].iloc[0] if len(oracle) else np.nan,
            "closed": first["closed"], "note": first["note"],
            "left_out": list(methods.loc[methods["error_output"].isna() & (methods["compensator"] == ""), "label"])})
    return pd.DataFrame(rows)


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


def sentences(results, table, at_tokens, at_bytes, number, shown=str):
    """The findings at the run's default budget in words, from the frames of `best` at equal tokens and at equal bytes;
    `number` writes a number, `shown` a label."""
    out = []
    budget = results.default_budget
    for row in at_tokens[at_tokens["budget"] == budget].itertuples() if len(at_tokens) else []:
        text = _about_best(row, number, shown)
        same = at_bytes
        if len(same):
            same = same[(same["budget"] == budget) & (same["group"] == row.group)]
        if len(same) and row.unit == "tokens":
            other = same.iloc[0]
            text += (f" At equal bytes ({number(other['at'])} per KV head, the state of corrections charged) "
                     f"{'it is also' if other['label'] == row.label else 'it is'} {shown(other['label'])}, with "
                     f"{number(other['error_output'])}{_not_measured(other['left_out'], shown)}.")
        out.append(text)
    back = given_back(results, table, budget)
    for group, mine in back.groupby("group", sort=False) if len(back) else []:
        out.append(_about_correction(group, budget, mine, shown))
    out.append(_about_points(rests_on(results), results.block_steps))
    return out


def _about_best(row, number, shown):
    def between(low, high):
        return f" (95 % {number(low)} to {number(high)})" if np.isfinite(low) and low < high else ""

    text = f"{GROUPS.get(row.group, row.group)}, budget {row.budget}, compared at {number(row.at)} {row.unit}: "
    if row.n_methods == 1:
        text += f"{shown(row.label)} is the only method that reaches this size; its mean error_output is "
    else:
        text += f"{shown(row.label)} has the least error of {row.n_methods} methods, a mean error_output of "
    text += number(row.error_output) + between(row.low, row.high)
    if row.next:
        text += f"; next is {shown(row.next)} with {number(row.next_error)}{between(row.next_low, row.next_high)}"
        if row.next_error == row.error_output:
            text += ", which is the same"
        elif row.next_low <= row.high:
            text += ", and the intervals overlap: kvreplay compare tests the difference"
    text += "."
    state = [n for n in row.note.split("; ") if "keeps a state that tokens do not count" in n]
    if state:
        text += f" In {shown(row.label)}, {state[0].partition(':')[0]}."
    if row.oracle:
        text += f" The best oracle there, {shown(row.oracle)}, has {number(row.oracle_error)}"
        if np.isfinite(row.closed) and row.base != row.label:
            text += (f": of the way from {shown(row.base)} to it, {shown(row.label)} goes "
                     f"{100 * row.closed:.0f} %".replace("-", "−"))
        text += "."
    if row.left_out:
        n = len(row.left_out)
        text += f" {n} method{'' if n == 1 else 's'} not measured near this size: "
        text += f"{', '.join(map(shown, row.left_out))}."
    return text


def _not_measured(labels, shown):
    return f" ({', '.join(map(shown, labels))} not measured there)" if labels else ""


def _about_correction(group, budget, mine, shown):
    def share(v):
        return f"{100 * v:.0f} %".replace("-", "−")

    parts = []
    for row in mine.itertuples():
        one = row.n_methods == 1
        part = f"{row.compensator} {share(row.median)}" if one else \
            f"{row.compensator} {share(row.median)} ({share(row.lowest)} to {share(row.highest)})"
        if row.n_harmed and not one:
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
