"""Who is best at equal memory: league tables, the share of the way to the best oracle, Pareto fronts.

Methods keep different amounts at one budget (they round, allocate and carry state), so they are compared where they
have been brought to the same measured size: a method's error is read off its curve over its budgets, by straight lines
in the logarithms of size and error, and never beyond its first and last budget.
"""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from . import bootstrap, latency
from .errors import Absent, UsageError, nearest
from .results import GROUPS, parts
from .tables import pooled, pooled_over_traces

AT = ("tokens", "bytes")
SAME = 0.01  # sizes that differ by no more than this share are the same size
BASES = ("streaming", "random")
METRICS = ["resident", "attended", "bytes", "bytes_read", "error_output"]
# What a method does beside choosing what stays, as run.json says it for each: how its best are named.
CLASSES = {"eviction": "eviction", "merging": "merging", "encoding": "encoding", "correction": "correction",
           "selection": "selection per step"}


@dataclass(eq=False)
class Curve:
    """A method (with a compensator from beside it, or as it is) over its budgets, from the smallest size to the
    largest: frame columns budget, size, error_output, resident, bytes, bytes_read, latency_us. `sums[budget]` is
    {trace: (n_blocks, 2)}: sum of the error and head-steps. `sizes` is {budget: size} of all budgets, those too that
    came to the size of another (64 and 12.5% of a prompt of 512 tokens) and are no point of their own."""

    label: str
    method: str
    group: str
    foresight: str
    compensator: str  # measured beside the method; "": as it is
    acting: str       # in the method's own text
    points: pd.DataFrame
    sizes: dict = field(default_factory=dict)
    sums: dict = field(default_factory=dict)

    @property
    def name(self):
        return f"{self.label}+{self.compensator}" if self.compensator else self.label

    @cached_property
    def columns(self):
        return {name: self.points[name].to_numpy() for name in self.points}

    @property
    def span(self):
        return float(self.columns["size"][0]), float(self.columns["size"][-1])

    def reaches(self, size):
        low, high = self.span
        return low * (1 - SAME) <= size <= high * (1 + SAME)

    def between(self, size):
        """(position of the point below, of the point above, weight of the latter)."""
        sizes = self.columns["size"]
        size = float(np.clip(size, sizes[0], sizes[-1]))
        right = int(np.searchsorted(sizes, size))
        if sizes[right] <= size * (1 + 1e-12):
            return right, right, 0.0
        left = right - 1
        return left, right, float(np.log(size / sizes[left]) / np.log(sizes[right] / sizes[left]))


def along(below, above, weight):
    """Between two numbers on a straight line in logarithms; straight in the numbers where one is not positive."""
    below, above = np.asarray(below, float), np.asarray(above, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        in_logs = np.exp((1 - weight) * np.log(below) + weight * np.log(above))
    exact = np.where(weight == 0, below, above) if weight in (0, 1) else in_logs
    return np.where((below > 0) & (above > 0), exact, (1 - weight) * below + weight * above)


def curves(results, at="tokens", compensated=None, gpu=latency.DEFAULT):
    """[Curve] of every method of a run, pooled over its traces and layers. `compensated` adds one for each compensator
    measured beside a method, its state charged (default: at equal bytes, where run.json says what a state weighs)."""
    if at not in AT:
        raise UsageError(f"--at {at} is none of {', '.join(AT)}{nearest(at, AT)}")
    compensated = at == "bytes" if compensated is None else compensated
    return results.once(("curves", at, compensated, gpu), lambda: _curves(results, at, compensated, gpu))


def _curves(results, at, compensated, gpu):
    results, _ = shared_cells(results)
    rows = results.summary[results.summary["metric"].isin([*METRICS, "error_corrected"])]
    means = pooled(rows, ["label", "budget", "metric", "compensator"])["mean"].to_dict()
    us = _latencies(results, results.compensators if compensated else [], gpu)
    labels = set(results.cells["label"])
    out = []
    for label, cells in results.cells.groupby("label", sort=False):
        what = cells.iloc[0]
        variants = [""]
        if compensated and _may_be_compensated(what):
            # Run as a method of its own, a correction has its row there, under the same name.
            variants += [c for c in results.compensators if c in parts(what["compensators"])
                         and f"{label}+{c}" not in labels and state_bytes(results, c, label)]
        for c in variants:
            points = []
            for budget in dict.fromkeys(cells["budget"]):
                point = {m: means.get((label, budget, m, ""), np.nan) for m in METRICS}
                if c:
                    point["error_output"] = means.get((label, budget, "error_corrected", c), np.nan)
                    extra = state_at(results, c, label, budget)
                    point["bytes"] += extra
                    point["bytes_read"] += extra
                point["size"] = point[_size(what["group"], at)]
                points.append({"budget": budget, **point, "latency_us": us[c].get((label, budget), np.nan)})
            points = sorted((p for p in points if not np.isnan(p["size"]) and not np.isnan(p["error_output"])),
                            key=lambda p: p["size"])
            # Budgets beyond what there is to keep have one size: the first of them says it all.
            kept = {}
            for p in points:
                kept.setdefault(p["size"], p)
            if kept:
                out.append(Curve(label, what["method"], what["group"], what["foresight"], c, what["compensator_acting"],
                                 pd.DataFrame(list(kept.values())), {p["budget"]: float(p["size"]) for p in points}))
    if not out:
        raise Absent(f"this run did not measure {at if at == 'bytes' else 'resident'} or error_output, so methods "
                     "cannot be brought to one size: run again with --metrics all")
    _add_sums(results, out)
    return out


def _latencies(results, compensators, gpu):
    """{compensator: {(label, budget): microseconds}}; "" is every method as it is."""
    costs = latency.step_costs(results)
    extra = {c: {(label, *at): n for label in results.labels for at, n in state_bytes(results, c, label).items()}
             for c in compensators}
    return {c: latency.decode_us(costs, gpu, extra.get(c)).to_dict() for c in ["", *compensators]}


def shared_cells(results):
    """(the run on those layers of traces where every method has every budget, cells left out): after an interruption
    methods would otherwise be compared on different layers."""
    cells = results.cells
    n = cells.drop_duplicates(["label", "budget"]).shape[0]
    count = cells.drop_duplicates(["trace", "layer", "label", "budget"]).groupby(["trace", "layer"])["label"].size()
    whole = set(count[count == n].index)
    if not whole:
        raise Absent(f"no layer of {results.folder} has results of all methods, so they cannot be ranked: a part of "
                     "the run failed or was interrupted")
    chosen = [(t, n) in whole for t, n in zip(cells["trace"], cells["layer"])]
    if all(chosen):
        return results, 0
    summary = results.summary
    summary = summary[[(t, n) in whole for t, n in zip(summary["trace"], summary["layer"])]]
    return replace(results, cells=cells[chosen], summary=summary), len(cells) - sum(chosen)


def state_bytes(results, compensator, label):
    """{(budget, trace): bytes per KV head that a compensator keeps beside this method, mean over layers}; {} where the
    results do not say."""
    return results.once("state_bytes", lambda: _states(results)).get((compensator, label), {})


def state_at(results, compensator, label, budget):
    """The same at one budget, pooled over traces as bytes are."""
    states = state_bytes(results, compensator, label)
    return pooled_over_traces(results, {t: x for (b, t), x in states.items() if b == budget})


def _states(results):
    """{(compensator, label): {(budget, trace): bytes}}"""
    cells = results.cells
    if "state_bytes" not in cells:
        return _states_of_old(results)
    found = {}
    for c in cells.to_dict("records"):
        for compensator, each in zip(parts(c["compensators"]), c["state_bytes"].split(",")):
            of_cell = found.setdefault((compensator, c["label"]), {})
            of_cell.setdefault((c["budget"], c["trace"]), []).append(float(each))
    return {key: {at: float(np.mean(x)) for at, x in states.items()} for key, states in found.items()}


def _states_of_old(results):
    """The same from run.json, where older versions say what one set's state weighs."""
    by_stem = {t.get("stem"): t.get("state_bytes") or {} for t in results.run.get("traces", []) if isinstance(t, dict)}
    found = {}
    for c in results.cells.to_dict("records"):
        n_sets = c["group_size"] if re.search(r"scope=query_head(?=[,+/]|$)", c["method"]) else 1
        for compensator, each in by_stem.get(c["trace"], {}).items():
            found.setdefault((compensator, c["label"]), {})[c["budget"], c["trace"]] = float(each) * n_sets
    return found


def league(results, at="tokens", base=None, compensated=None, gpu=latency.DEFAULT, bands=True, budget=None):
    """The table: methods ranked by error at equal size, once for each budget of each group.

    at    tokens: equal resident tokens; bytes: equal bytes per KV head. Per-step selection keeps everything and is
          compared at equal bytes read in a step, in its own group, whatever `at` says
    base  what a method is an improvement over (label or canonical name; default: streaming, else random, of the group)
    budget   only near this one (or several), as it was asked; methods without a budget stay

    One row for each curve and budget: group, unit (what is equal), budget (as asked, near which the comparison is
    drawn), at (the size), rank (1 is best; oracles and sizes without a number have none), label, method, compensator
    (measured beside the method, its state charged), foresight, error_output with low and high (95 %), resident, bytes,
    bytes_read, latency_us (estimated, see latency.py), base, oracle (the best of the group at this size), closed =
    (base - method) / (base - oracle) with closed_low and closed_high, note. A method without budgets, as the
    uncompressed cache, has one row at its own size, with an empty budget and no rank.
    """
    if base is not None and base not in set(results.cells["label"]) | set(results.cells["method"]):
        raise UsageError(f"base {base} is not in {results.folder}, which has {', '.join(results.labels)}"
                         f"{nearest(base, results.labels)}")
    budgets = [budget] if isinstance(budget, str) else results.budgets if budget is None else list(budget)
    for b in budgets:
        if b not in results.budgets:
            raise UsageError(f"budget {b} is not in {results.folder}, which has "
                             f"{', '.join(results.budgets) or 'no budgets'}{nearest(b, results.budgets)}")
    found = curves(results, at, compensated, gpu)
    groups = [g for g in [*GROUPS, *sorted({c.group for c in found} - set(GROUPS))] if any(c.group == g for c in found)]
    rows = []
    for group in groups:
        mine = [c for c in found if c.group == group]
        budgeted = [c for c in mine if any(c.points["budget"] != "")]
        chosen_base = _base(budgeted, base)
        unit = _unit(group, at)
        for near, size in references(budgeted, results.budgets):
            if near in budgets:
                rows += results.once(("league", at, base, compensated, gpu, bands, group, near), lambda: _at(
                    budgeted, group, unit, near, size, chosen_base, bands))
        for c in mine:
            if c not in budgeted:
                rows.append({**_head(c, group, unit), "budget": "", "at": float(c.points["size"].iloc[0]),
                             **_numbers(c, c.span[0], bands), "note": "no budget: at its own size"})
    table = pd.DataFrame(rows)
    ranked = table["error_output"].notna() & (table["foresight"] != "oracle") & (table["budget"] != "")
    table["rank"] = table[ranked].groupby(["group", "budget"])["error_output"].rank(method="min").astype("Int64")
    order = {(g, b): i for i, (g, b) in enumerate(dict.fromkeys(zip(table["group"], table["budget"])))}
    table["_order"] = [order[key] for key in zip(table["group"], table["budget"])]
    table = table.sort_values(["_order", "error_output"], kind="stable", na_position="last")
    return table[["group", "unit", "budget", "at", "rank", "label", "method", "compensator", "foresight",
                  "error_output", "low", "high", "resident", "bytes", "bytes_read", "latency_us", "base", "oracle",
                  "closed", "closed_low", "closed_high", "note"]].reset_index(drop=True)


def best(results, at="tokens", base=None, gpu=latency.DEFAULT, bands=True, budget=None):
    """The best of each class (CLASSES) near each budget of each group, with its distance to the best oracle: rows of
    the league with a column `class` in front and, behind, oracle_error (of the group's best oracle at this size),
    distance = error_output - oracle_error and times_oracle = error_output / oracle_error, each NaN without an oracle.
    Corrections measured beside a method count as corrections; what carries no budget is in no class."""
    table = league(results, at, base, compensated=True, gpu=gpu, bands=bands, budget=budget)
    table.insert(0, "class", classes(results, table))
    oracles = table[(table["foresight"] == "oracle") & table["error_output"].notna()]
    least = oracles.groupby(["group", "budget"])["error_output"].min().to_dict()
    named = oracles.loc[oracles.groupby(["group", "budget"])["error_output"].idxmin()]
    names = {(o.group, o.budget): o.label for o in named.itertuples()}
    ranked = table[table["rank"].notna()]
    where = list(dict.fromkeys(zip(ranked["group"], ranked["budget"])))
    rows = ranked.loc[ranked.groupby(["group", "budget", "class"])["error_output"].idxmin()]
    order = [(where.index((group, budget)), list(CLASSES).index(kind))
             for group, budget, kind in zip(rows["group"], rows["budget"], rows["class"])]
    rows = rows.iloc[sorted(range(len(rows)), key=order.__getitem__)]
    at_size = list(zip(rows["group"], rows["budget"]))
    rows = rows.assign(oracle=[names.get(k, "") for k in at_size], oracle_error=[least.get(k, np.nan) for k in at_size])
    rows["distance"] = rows["error_output"] - rows["oracle_error"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rows["times_oracle"] = rows["error_output"] / rows["oracle_error"]
    return rows.reset_index(drop=True)


def classes(results, table):
    """The class of each row of a league, from what run.json says of its method; a correction measured beside a method
    is one whatever the method is."""
    said = {m.get("label"): m.get("class") for m in results.run.get("methods", []) if isinstance(m, dict)}
    acting = results.cells.drop_duplicates("label").set_index("label")["compensator_acting"].to_dict()

    def of(row):
        own = row["label"].removesuffix(f"+{row['compensator']}") if row["compensator"] else row["label"]
        if row["compensator"] or acting.get(own):
            return "correction"
        if said.get(own) in CLASSES:
            return said[own]
        # Results of older versions: they had one encoder and no merging.
        return ("selection" if row["group"] == "selection" else
                "encoding" if re.search(r"\+kivi(?=[:+]|$)", row["method"]) else "eviction")

    return [of(row) for row in table.to_dict("records")]


def references(group, budgets):
    """[(budget, size)]: the size near each budget at which methods are compared. Near means no nearer to another
    budget; of these sizes the one that most curves reach, and of these the one closest to the methods' median."""
    middles = {}
    for budget in budgets:
        sizes = [c.sizes[budget] for c in group if not c.compensator and budget in c.sizes]
        if sizes:
            middles[budget] = float(np.median(sizes))
    spans = np.array([c.span for c in group]).reshape(-1, 2)
    lowest, highest = spans[:, 0] * (1 - SAME), spans[:, 1] * (1 + SAME)
    out = []
    for budget in sorted(middles, key=middles.get):
        middle = middles[budget]
        down = max((m / middle for m in middles.values() if m < middle), default=0.25)
        up = min((m / middle for m in middles.values() if m > middle), default=4.0)
        low, high = middle * down ** 0.5, middle * up ** 0.5
        sizes = [middle, *(end for end in spans.ravel().tolist() if low <= end <= high)]
        out.append((budget, max(sizes, key=lambda s: (np.sum((lowest <= s) & (s <= highest)),
                                                      -abs(np.log(s / middle))))))
    return out


def pareto(size, error):
    """bool (n,): whether no other point is at most as large and at most as wrong, and one of the two less."""
    size, error = np.asarray(size, float), np.asarray(error, float)
    front = np.zeros(len(size), bool)
    counted = np.isfinite(size) & np.isfinite(error)
    best = np.inf
    order = [i for i in np.lexsort((error, size)) if counted[i]]
    for i in order:
        if error[i] < best:
            front[i], best, at = True, error[i], size[i]
        elif front.any() and error[i] == best and size[i] == at:
            front[i] = True  # the same point twice
    return front


def costs(results, gpu=latency.DEFAULT):
    """What every configuration costs: label, method, compensator, group, foresight, budget, resident, bytes,
    bytes_read, latency_us, error_output, and whether it is on the front of error against bytes (front_bytes) and
    against latency (front_latency). Oracles are on no front. Groups are not kept apart: bytes are bytes."""
    rows = []
    for c in curves(results, "bytes", gpu=gpu):
        for point in c.points.drop(columns="size").to_dict("records"):
            rows.append({"label": c.label, "method": c.method, "compensator": c.compensator, "group": c.group,
                         "foresight": c.foresight, **point})
    frame = pd.DataFrame(rows)
    real = (frame["foresight"] != "oracle").to_numpy()
    for name, cost in (("front_bytes", "bytes"), ("front_latency", "latency_us")):
        frame[name] = False
        frame.loc[real, name] = pareto(frame.loc[real, cost], frame.loc[real, "error_output"])
    return frame


def _size(group, at):
    return "bytes_read" if group == "selection" else "resident" if at == "tokens" else "bytes"


def _unit(group, at):
    return {"bytes_read": "bytes read", "resident": "tokens", "bytes": "bytes"}[_size(group, at)]


def _may_be_compensated(what):
    """A compensator beside a reader has nothing to correct, and beside another one that acts is another method's."""
    return (what["group"] != "selection" and what["budget"] != "" and not what["compensator_acting"]
            and what["foresight"] != "oracle")


def _add_sums(results, found):
    wanted = {c.compensator for c in found}
    blocks = {c: results.blocks("error_corrected", c) if c else results.blocks("error_output") for c in wanted}
    curves_at = {}
    for c in found:
        for budget in c.points["budget"]:
            curves_at.setdefault((c.label, budget), []).append(c)
    for (label, budget), cells in results.cells.groupby(["label", "budget"], sort=False):
        for c in curves_at.get((label, budget), []):
            per_trace = {}
            for cell, trace in zip(cells.index, cells["trace"]):
                if cell in blocks[c.compensator]:
                    bootstrap.add(per_trace, trace, bootstrap.block_sums([blocks[c.compensator][cell]],
                                                                         results.block_weights(cell)))
            c.sums[budget] = per_trace


def _base(group, base):
    """The curve of a group that others are an improvement over; None where there is none."""
    plain = [c for c in group if not c.compensator and c.foresight != "oracle"]

    def without_pool(method):
        return re.sub(r"[:,]pool=decode(?=[,+/]|$)", "", method)

    if base is not None:
        named = next((c for c in plain if base in (c.label, c.method)), None)
        return named or next((c for c in plain if without_pool(c.method) == without_pool(base)), None)
    for name in BASES:
        found = next((c for c in plain if without_pool(c.method) == name), None)
        if found:
            return found
    return None


def _head(c, group, unit):
    return {"group": group, "unit": unit, "label": c.name, "method": c.method, "compensator": c.compensator,
            "foresight": c.foresight, "base": "", "oracle": "", "closed": np.nan, "closed_low": np.nan,
            "closed_high": np.nan}


def _interval(parts, statistic):
    """95 % of a statistic of the interpolated errors of several (curve, size), all drawn together."""
    ends = [(c, *c.between(size)) for c, size in parts]
    budgets = [(c, c.columns["budget"][i]) for c, below, above, _ in ends for i in (below, above)]
    names = set.intersection(*(set(c.sums[b]) for c, b in budgets))
    first, budget = budgets[0]
    traces = [np.column_stack([c.sums[b][t] for c, b in budgets]) for t in first.sums[budget] if t in names]

    def errors(sums):
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums[..., 0::2] / sums[..., 1::2]
        return [along(means[..., 2 * i], means[..., 2 * i + 1], weight) for i, (*_, weight) in enumerate(ends)]

    return bootstrap.interval(traces, lambda sums: statistic(*errors(sums)))[1:]


def _numbers(c, size, bands=True):
    below, above, weight = c.between(size)
    out = {name: float(along(c.columns[name][below], c.columns[name][above], weight))
           for name in ("error_output", "resident", "bytes", "bytes_read", "latency_us")}
    out["low"], out["high"] = _interval([(c, size)], lambda e: e) if bands else (np.nan, np.nan)
    return out


def _at(group, name, unit, budget, size, base, bands):
    """Rows of one group at one size."""
    rows = []
    there = [c for c in group if c.reaches(size)]
    numbers = {id(c): _numbers(c, size, bands) for c in there}
    oracles = [c for c in there if c.foresight == "oracle"]
    oracle = min(oracles, key=lambda c: numbers[id(c)]["error_output"], default=None)
    for c in group:
        row = {**_head(c, name, unit), "budget": budget, "at": size}
        if c not in there:
            low, high = c.span
            row.update({n: np.nan for n in ("error_output", "low", "high", "resident", "bytes", "bytes_read",
                                            "latency_us")})
            row["note"] = f"measured from {low:.4g} to {high:.4g} {unit} only; not extrapolated"
            rows.append(row)
            continue
        row.update(numbers[id(c)])
        row["base"], row["oracle"] = base.name if base else "", oracle.name if oracle else ""
        below, above, _ = c.between(size)
        asked = [budget if c.sizes.get(budget) == s else b for b, s in zip(c.columns["budget"], c.columns["size"])]
        notes = [f"measured at budget {asked[below]}" if below == above
                 else f"between budgets {asked[below]} and {asked[above]}"]
        if (c.acting or c.compensator) and unit == "tokens":
            notes.append(f"{c.acting or c.compensator} keeps a state that tokens do not count: see bytes")
        if base is None or oracle is None:
            lacks = "oracle" if base else f"base ({' or '.join(BASES)})"
            notes.append(f"no distance closed: the group has no {lacks}")
        elif base not in there:
            notes.append(f"no distance closed: {base.name} does not reach this size")
        else:
            span = numbers[id(base)]["error_output"] - numbers[id(oracle)]["error_output"]
            if span > 0:
                row["closed"] = (numbers[id(base)]["error_output"] - row["error_output"]) / span
                if bands:
                    found = _interval([(c, size), (base, size), (oracle, size)], _closed)
                    row["closed_low"], row["closed_high"] = found
            else:
                notes.append(f"no distance closed: {oracle.name} is no better than {base.name} here")
        row["note"] = "; ".join(notes)
        rows.append(row)
    return rows


def _closed(method, base, oracle):
    with np.errstate(invalid="ignore", divide="ignore"):
        return (base - method) / (base - oracle)
