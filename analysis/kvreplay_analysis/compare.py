"""Two results, or two methods, side by side: paired differences with their intervals.

    import kvreplay_analysis as ka
    out = ka.load("out")
    c = ka.compare.compare(out, out, "h2o", "tova")     # two methods of one run
    c.rows                                              # one row per budget and metric
    c.by("layer")                                       # the same for each layer; head, step, trace
    ka.compare.compare(ka.load("old"), ka.load("new")).cells   # two versions of the tool

A cell of A stands against the cell of B of the same trace (by its content), layer and budget; a head's block of steps
against the same block of the same head. What is in one side alone is listed and left out.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from . import bootstrap
from .errors import Absent, UsageError, nearest
from .results import load

LEVELS = ("layer", "head", "step", "trace")
ROUNDING = 1e-5  # relative: what masses and errors are right to (docs/metrics.md)


def split(text):
    """(folder, method or None) of A[:METHOD]: at the first ':' that follows an existing folder."""
    if Path(text).is_dir() or ":" not in text:
        return text, None
    ends = [i for i, c in enumerate(text) if c == ":"]
    at = next((i for i in ends if Path(text[:i]).is_dir()), ends[0])
    return text[:at], text[at + 1:] or None


def named(a, b):
    """compare() of two sides as they are typed on the command line, A[:METHOD] and B[:METHOD]: its first arguments."""
    (folder_a, method_a), (folder_b, method_b) = split(a), split(b)
    one = load(folder_a)
    other = one if folder_a == folder_b else load(folder_b)
    return one, other, method_a, method_b


@dataclass(frozen=True)
class Pairing:
    """One method at one budget on either side."""

    label_a: str
    method_a: str
    label_b: str
    method_b: str
    budget: str
    cells: list                # [(cell of A, cell of B)], one per trace and layer
    correct_a: str = ""        # compensator whose correction stands for the side's output; "": the method as it is
    correct_b: str = ""


@dataclass(frozen=True)
class Comparison:
    """`rows`, `cells` and by(LEVEL) are frames of differences A - B. Units are the metric's."""

    a: object
    b: object
    title_a: str
    title_b: str
    by_method: bool            # two methods were named; False: every method that both have
    metrics: list              # [(metric, compensator)]
    pairings: list
    only: dict                 # {what: (in A alone, in B alone)}
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def rows(self):
        """One row per method, budget and metric.

        method_a, label_a, method_b, label_b, budget, metric, compensator; n (head-steps that count on both sides),
        mean_a, mean_b, difference, low, high (95 % of the paired difference), relative and its interval (as a share
        of B's mean), verdict, identical (every block of every head is the same number), resident_a, resident_b (mean
        tokens; attended, where all stay resident).
        """
        out = []
        for pairing, metric in self._each():
            arrays = self._arrays(pairing, metric)
            if not arrays:
                continue
            row = {**_about(pairing, metric), **_difference(_totals(arrays))}
            row["identical"] = all(np.array_equal(x, y, equal_nan=True) for _, _, x, y, _ in arrays)
            row["resident_a"], row["resident_b"] = (self._tokens(side, pairing) for side in "ab")
            row["verdict"] = verdict(row)
            out.append(row)
        return pd.DataFrame(out)

    @cached_property
    def cells(self):
        """One row per pair of cells and metric: trace, layer, mean_a, mean_b, apart (|A - B| over the larger of both;
        inf where one side alone counts), identical. What --tolerance is held against."""
        out = []
        for pairing, metric in self._each():
            for trace, layer, x, y, weights in self._arrays(pairing, metric):
                mean_a, mean_b = _mean(x, weights), _mean(y, weights)
                out.append({**_about(pairing, metric), "trace": trace, "layer": layer, "mean_a": mean_a,
                            "mean_b": mean_b, "apart": apart(mean_a, mean_b),
                            "identical": np.array_equal(x, y, equal_nan=True)})
        return pd.DataFrame(out)

    def by(self, level):
        """One row per method, budget, metric and unit of a level: layer; head (layer and head); step (a block of
        decode steps, named by its first); trace. Single blocks have no interval."""
        if level not in LEVELS:
            raise UsageError(f"--by {level} is none of {', '.join(LEVELS)}{nearest(level, LEVELS)}")
        if level not in self._cache:
            self._cache[level] = pd.DataFrame(
                [{**_about(pairing, metric), **unit, **_difference(totals, interval=level != "step")}
                 for pairing, metric in self._each()
                 for unit, totals in self._units(level, self._arrays(pairing, metric))])
        return self._cache[level]

    def wins(self):
        """How many layers, heads, blocks of steps and traces are on whose side: method, budget, metric, by, units,
        a_lower, b_lower, equal; a_surely and b_surely count those whose interval leaves out 0."""
        out = []
        keys = list(_about(self.pairings[0], self.metrics[0]))
        for level in LEVELS:
            units = self.by(level)
            for key, mine in units.groupby(keys, sort=False) if len(units) else ():
                difference = mine["difference"].dropna()
                out.append({**dict(zip(keys, key)), "by": level, "units": len(difference),
                            "a_lower": int((difference < 0).sum()), "b_lower": int((difference > 0).sum()),
                            "equal": int((difference == 0).sum()), "a_surely": int((mine["high"] < 0).sum()),
                            "b_surely": int((mine["low"] > 0).sum())})
        return pd.DataFrame(out)

    def worst(self):
        """The cell whose means are furthest apart."""
        return self.cells.loc[self.cells["apart"].idxmax()]

    def _each(self):
        return [(pairing, metric) for pairing in self.pairings for metric in self.metrics]

    def _arrays(self, pairing, metric):
        """[(trace, layer, A (n_rows, n_blocks), B the same, weights (n_blocks,))] of the cells where both have it."""
        left = self.a.blocks(*_read_as(metric, pairing.correct_a))
        right = self.b.blocks(*_read_as(metric, pairing.correct_b))
        return [(self.a.cells.at[i, "trace"], int(self.a.cells.at[i, "layer"]), left[i], right[j],
                 self.a.block_weights(i)) for i, j in pairing.cells if i in left and j in right]

    def _units(self, level, arrays):
        """[({column: value}, totals per trace)] of a level's units."""
        if level == "trace":
            names = list(dict.fromkeys(t for t, *_ in arrays))
            return [({"trace": t}, _totals([x for x in arrays if x[0] == t])) for t in names]
        layers = sorted({layer for _, layer, *_ in arrays})
        if level == "layer":
            return [({"layer": n}, _totals([x for x in arrays if x[1] == n])) for n in layers]
        if level == "head":
            return [({"layer": n, "head": h}, _totals([(t, m, x[h:h + 1], y[h:h + 1], w) for t, m, x, y, w in arrays
                                                       if m == n and h < len(x)]))
                    for n in layers for h in range(max(len(x) for _, m, x, _, _ in arrays if m == n))]
        n_blocks = max((x.shape[1] for _, _, x, _, _ in arrays), default=0)
        return [({"step": b * self.a.block_steps},
                 _totals([(t, n, x[:, b:b + 1], y[:, b:b + 1], w[b:b + 1]) for t, n, x, y, w in arrays
                          if b < x.shape[1]])) for b in range(n_blocks)]

    def _tokens(self, side, pairing):
        results = self.a if side == "a" else self.b
        cells = [pair["ab".index(side)] for pair in pairing.cells]
        selection = results.cells.at[cells[0], "group"] == "selection"
        blocks = results.blocks("attended" if selection else "resident")
        total = count = 0.0
        for cell in cells:
            if cell in blocks:
                weights = results.block_weights(cell)
                total += (blocks[cell] * weights).sum()
                count += weights.sum() * len(blocks[cell])
        return total / count if count else np.nan


def compare(a, b, method_a=None, method_b=None, metrics=("error_output",), budget=None, trace=None):
    """Pairs two Results. Without methods every method that both have stands against itself, known by its canonical
    name; a method that is given for one side alone is taken for both. `method_a` and `method_b` are labels or
    canonical names, or such a name with +C added, where compensator C was measured beside the method.

    metrics   names, as error_output or error_corrected.moments; "all": every one that both have
    budget    only this budget (or several), as it was asked; trace: only this trace (or several), by A's names
    """
    chosen_a, correct_a = _chosen(a, method_a or method_b)
    chosen_b, correct_b = _chosen(b, method_b or method_a)
    traces, only_traces = _same_traces(a, b, trace)
    if budget is not None:
        budget = [budget] if isinstance(budget, str) else list(budget)
        known = list(dict.fromkeys([*a.budgets, *b.budgets]))
        for x in budget:
            if x not in known:
                raise UsageError(f"budget {x} is in neither side, which have {', '.join(known) or 'no budgets'}"
                                 f"{nearest(x, known)}")
    left, right = _by_key(a, chosen_a, traces, budget), _by_key(b, chosen_b, {t: t for t in traces.values()}, budget)
    two = chosen_a is not None
    pairings = {}
    for (method, layer, trace_, asked), i in left.items():
        for j, asked_b in _opposite(right, None if two else method, layer, traces[trace_], asked):
            x, y = a.cells.loc[i], b.cells.loc[j]
            key = (x["method"], y["method"], asked or asked_b)
            if key not in pairings:
                pairings[key] = Pairing(_with(x["label"], correct_a), _with(x["method"], correct_a),
                                        _with(y["label"], correct_b), _with(y["method"], correct_b),
                                        asked or asked_b, [], correct_a, correct_b)
            pairings[key].cells.append((i, j))
    titles = [str(r.folder) + (f":{_with(m, c)}" if m else "")
              for r, m, c in ((a, chosen_a, correct_a), (b, chosen_b, correct_b))]
    if not traces:
        raise UsageError(f"{titles[0]} and {titles[1]} have no trace in common: A has {', '.join(a.traces)}, "
                         f"B has {', '.join(b.traces)}")
    if not pairings:
        raise UsageError(f"{titles[0]} and {titles[1]} have no cell in common: A has "
                         f"{_content(a, chosen_a)}, B has {_content(b, chosen_b)}")
    return Comparison(a, b, *titles, two, _metrics(a, b, metrics, correct_a or correct_b), list(pairings.values()),
                      {"traces": only_traces, **_only(a, b, two, traces, left, right)})


def apart(x, y):
    """|x - y| over the larger of |x| and |y|; 0 where both are equal or neither counts, inf where one alone does."""
    if x == y or (np.isnan(x) and np.isnan(y)):
        return 0.0
    return float("inf") if np.isnan(x) or np.isnan(y) else abs(x - y) / max(abs(x), abs(y))


def verdict(row):
    """A row's result in words."""
    if row["identical"]:
        return "identical"
    if abs(row["relative"]) <= ROUNDING:
        return "equal up to rounding"
    if not np.isfinite(row["low"]):
        return "no interval: one block of steps"
    if row["low"] <= 0 <= row["high"]:
        return "no significant difference"
    return "A is lower" if row["difference"] < 0 else "B is lower"


def _with(text, compensator):
    return f"{text}+{compensator}" if text and compensator else text


def _about(pairing, metric):
    return {"label_a": pairing.label_a, "method_a": pairing.method_a, "label_b": pairing.label_b,
            "method_b": pairing.method_b, "budget": pairing.budget, "metric": metric[0], "compensator": metric[1]}


def _read_as(metric, compensator):
    """A side with a compensator from beside it: its correction is its output."""
    return ("error_corrected", compensator) if compensator else metric


def _mean(values, weights):
    counted = np.isfinite(values)
    n = (counted * weights).sum()
    return float((np.where(counted, values, 0) * weights).sum() / n) if n else np.nan


def _totals(arrays):
    per_trace = {}
    for trace, _, x, y, weights in arrays:
        bootstrap.add(per_trace, trace, bootstrap.block_sums([x, y], weights))
    return list(per_trace.values())


def _difference(totals, interval=True):
    """n, means, difference and intervals of sums per trace (n_blocks, 3)."""
    sums = sum(t.sum(axis=0) for t in totals) if totals else np.zeros(3)
    n = sums[-1]
    out = {"n": int(round(n)), "mean_a": sums[0] / n if n else np.nan, "mean_b": sums[1] / n if n else np.nan}
    nothing = (np.nan, np.nan)
    out["difference"] = float(bootstrap.difference(sums))
    out["relative"] = 0.0 if sums[0] == sums[1] and n else float(bootstrap.relative_difference(sums))
    for name, statistic in (("", bootstrap.difference), ("relative_", bootstrap.relative_difference)):
        found = bootstrap.interval(totals, statistic)[1:] if interval else nothing
        out[f"{name}low"], out[f"{name}high"] = found
    if out["low"] == out["high"] == 0:  # also where both are 0 and there is no ratio
        out["relative_low"] = out["relative_high"] = 0.0
    return out


def _chosen(results, method):
    """(label, compensator from beside it) of a method that is typed as its label or its canonical name."""
    if method is None:
        return None, ""
    first = results.cells.drop_duplicates("label")
    names = dict(zip([*first["method"], *first["label"]], [*first["label"], *first["label"]]))
    if method in names:
        return names[method], ""
    beside = dict(zip(first["label"], first["compensators"]))
    acting = dict(zip(first["label"], first["compensator_acting"]))
    for c in results.compensators:
        plain = method.removesuffix(f"+{c}")
        if plain != method and plain in names and not acting[names[plain]] and c in beside[names[plain]]:
            return names[plain], c
    raise UsageError(f"method {method} is not in {results.folder}, which has {', '.join(results.labels)}"
                     f"{nearest(method, list(names))}")


def _same_traces(a, b, wanted):
    """({trace of A: the same in B}, (in A alone, in B alone)). Known by content; by name where a hash is missing.
    UsageError where a name means two different traces, or where the steps of one do not correspond."""
    about = [{t.get("stem"): t for t in r.run.get("traces", []) if isinstance(t, dict)} for r in (a, b)]
    hashes = [{t: about[i].get(t, {}).get("content_hash") or "" for t in r.traces} for i, r in enumerate((a, b))]
    if wanted is not None:
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        for t in wanted:
            if t not in a.traces:
                raise UsageError(f"trace {t} is not in {a.folder}, which has {', '.join(a.traces)}"
                                 f"{nearest(t, a.traces)}")
    same = {}
    for t in wanted or a.traces:
        mine = hashes[0][t]
        if t in hashes[1]:
            other = hashes[1][t]
            if mine and other and mine != other:
                raise UsageError(f"trace {t} has content_hash {mine} in {a.folder} and {other} in {b.folder}: two "
                                 "traces of one name, whose steps cannot be paired")
            same[t] = t
        else:
            twin = next((u for u, h in hashes[1].items() if h and h == mine), None)
            if twin is not None:
                same[t] = twin
    for t, u in same.items():
        x, y = (r.cells[r.cells["trace"] == n].iloc[0] for r, n in ((a, t), (b, u)))
        for column in ("prompt_len", "n_steps", "n_heads", "n_kv_heads"):
            if x[column] != y[column]:
                raise UsageError(f"trace {t} was run with {column} {x[column]} in {a.folder} and {y[column]} in "
                                 f"{b.folder}, so its steps do not correspond; run both alike")
    if a.block_steps != b.block_steps:
        raise UsageError(f"{a.folder} has blocks of {a.block_steps} steps and {b.folder} of {b.block_steps}; "
                         "they cannot be paired")
    alone = [t for t in wanted or a.traces if t not in same], \
            [u for u in b.traces if u not in same.values() and wanted is None]
    return same, alone


def _by_key(results, label, traces, budgets):
    """{(method, layer, trace, budget): cell}; a method without a budget stays whatever budget is asked for."""
    cells = results.cells[results.cells["trace"].isin(list(traces))]
    if label is not None:
        cells = cells[cells["label"] == label]
    if budgets is not None:
        cells = cells[cells["budget"].isin([*budgets, ""])]
    return {(c.method, c.layer, c.trace, c.budget): c.Index for c in cells.itertuples()}


def _opposite(right, method, layer, trace, budget):
    """[(cell, budget)] of B for a cell of A. A method without a budget stands against every budget of the other."""
    if method is not None:
        cell = right.get((method, layer, trace, budget))
        return [] if cell is None else [(cell, budget)]
    return [(cell, asked) for (_, m, t, asked), cell in right.items()
            if (m, t) == (layer, trace) and (asked == budget or "" in (asked, budget))]


def _only(a, b, two, traces, left, right):
    """What the other side lacks, by name: methods, budgets, layers."""
    def sets(keys, translate):
        methods = list(dict.fromkeys(k[0] for k in keys))
        budgets = list(dict.fromkeys(k[3] for k in keys if k[3]))
        layers = list(dict.fromkeys((translate.get(k[2], k[2]), int(k[1])) for k in keys))
        return {"methods": [] if two else methods, "budgets": budgets, "layers": layers}

    mine, other = sets(left, traces), sets(right, {})
    if two and (not mine["budgets"] or not other["budgets"]):
        mine["budgets"] = other["budgets"] = []  # one side has no budget and stands against all
    one_trace = len(traces) == 1

    def names(what, values):
        if what != "layers":
            return values
        return [str(layer) if one_trace else f"{trace}:{layer}" for trace, layer in values]

    return {what: (names(what, [x for x in mine[what] if x not in other[what]]),
                   names(what, [x for x in other[what] if x not in mine[what]])) for what in mine}


def _content(results, label):
    shown = results.only(label=label) if label else results
    layers = ", ".join(map(str, sorted(set(shown.cells["layer"]))))
    return (f"{label or ', '.join(shown.labels[:6])} at {', '.join(shown.budgets) or 'no budget'} on "
            f"{', '.join(shown.traces)} layers {layers}")


def _metrics(a, b, asked, corrected):
    """[(metric, compensator)] that both sides have."""
    have = [list(dict.fromkeys(zip(r.summary.loc[r.summary["n"] > 0, "metric"],
                                   r.summary.loc[r.summary["n"] > 0, "compensator"]))) for r in (a, b)]
    both = [m for m in have[0] if m in have[1]]
    asked = [asked] if isinstance(asked, str) else list(asked)
    if asked == ["all"]:
        chosen = both
    else:
        chosen = []
        for name in asked:
            metric, _, compensator = name.partition(".")
            found = [m for m in both if m[0] == metric and compensator in ("", m[1])]
            if not found:
                known = list(dict.fromkeys([*(m for m, _ in both), *(f"{m}.{c}" for m, c in both if c)]))
                sides = [s for s, h in (("A", have[0]), ("B", have[1]))
                         if any(m == metric and compensator in ("", c) for m, c in h)]
                where = f"is in {sides[0]} alone" if sides else "is in neither side"
                raise UsageError(f"metric {name} {where}; both have {', '.join(known)}{nearest(name, known)}")
            chosen += [m for m in found if m not in chosen]
    if corrected and chosen != [("error_output", "")]:
        raise UsageError(f"a method with +{corrected} from beside it has an output alone: only --metric error_output "
                         "can be compared")
    if not chosen:
        raise Absent("the two sides have no metric in common that counted anything")
    return chosen
