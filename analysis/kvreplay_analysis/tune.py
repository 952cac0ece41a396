"""What `kvreplay tune` found, and how sure it is: curves, optima and gains with intervals from one paired bootstrap.

    import kvreplay_analysis as ka
    tuned = ka.tune.load("OUT")          # a folder that `kvreplay tune --out OUT` wrote
    found = ka.tune.findings(tuned)      # what tune.json says, as dicts
    ka.tune.curve(found)                 # tidy frame: one row per budget and candidate

Every method is resampled with the same draws (traces, then blocks within each; blocks alone where there is one
trace), so a difference of two methods is paired: what both share, such as a hard passage, cancels.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import bootstrap
from .errors import ResultsError, UsageError
from .results import Results, _name
from .results import load as load_results
from .tables import pooled

ALL = "all"  # the region of all layers and heads
N_RESAMPLES_QUANTILES = 400  # quantiles are sorted anew in every resample
NEAR_EDGE = 0.03  # of a range on its scale: an optimum closer to the end may lie beyond it
COSTS = ("bytes", "attended")
SAME_COST = 0.02  # relative: more than this is said
GRAINS = ("global", "layer", "head")


@dataclass(frozen=True)
class Tuned:
    """spec: tuned.json. train: all candidates on the traces tuned on. holdout: the chosen on others, or None."""

    folder: Path
    spec: dict
    train: Results
    holdout: Results | None


def load(folder):
    """Reads OUT as `kvreplay tune --out OUT` wrote it."""
    folder = Path(folder)
    path = folder / "tuned.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no tuned.json; give the folder that `kvreplay tune --out` wrote")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(spec, dict) or spec.get("format") != "kvreplay-tuned":
        raise ResultsError(f"{path} is not what `kvreplay tune` writes")
    holdout = load_results(folder / "holdout") if (folder / "holdout" / "run.json").is_file() else None
    return Tuned(folder, spec, load_results(folder / "train"), holdout)


# --- one objective, resampled ---------------------------------------------------------------------------------------

class Resampled:
    """The objective of a run's methods in every resample. Column 0 of every array is the run itself.

    counts      per trace (n_resamples + 1, n_blocks): how often each block is drawn; the first row is ones
    first_step  earlier decode steps do not count: their blocks are never drawn
    """

    def __init__(self, results, objective, first_step=0):
        self.results, self.objective = results, objective
        self.terms = list(objective["terms"])
        if objective["bytes"]:
            self.terms.append({"metric": "bytes", "compensator": "", "statistic": "mean", "weight": 0.0})
        first = results.cells.drop_duplicates("trace")
        self.traces = list(first["trace"])
        before = first_step // results.block_steps
        n_blocks = tuple(-(-int(n) // results.block_steps) - before for n in first["n_steps"])
        self.n_blocks = sum(n_blocks)
        quantiles = any(t["statistic"] in ("p50", "p90", "p99") for t in self.terms)
        n = N_RESAMPLES_QUANTILES if quantiles else bootstrap.N_RESAMPLES
        drawn = bootstrap._draws(n_blocks, bootstrap.N_RESAMPLES, bootstrap.SEED)
        if self.n_blocks < 2:  # nothing to draw from: the estimate stands alone
            drawn = [np.empty((0, b)) for b in n_blocks]
        self.counts = {t: np.pad(np.vstack([np.ones((1, b)), c[:n]]), ((0, 0), (before, 0)))
                       for t, b, c in zip(self.traces, n_blocks, drawn)}
        self.n_columns = 1 + min(n, len(drawn[0]))
        cells = results.cells
        groups = cells.groupby(["label", "budget"], sort=False).groups
        self.cells_of = {key: list(index) for key, index in groups.items()}
        self.layers = sorted(set(cells["layer"]))
        self.n_kv_heads = int(cells["n_kv_heads"].max())

    def sums(self, label, budget, heads=False):
        """{region: (n_terms, 2, n_columns)} of n * statistic and n, summed over heads and traces.

        Regions are "all", every layer, and with `heads` every (layer, kv_head); None where the method did not run.
        """
        cells = self.cells_of.get((label, budget))
        if cells is None:
            return None
        out = {}

        def add(region, t, pair):
            if region not in out:
                out[region] = np.zeros((len(self.terms), 2, self.n_columns))
            out[region][t] += pair

        for t, term in enumerate(self.terms):
            for cell in cells:
                what = self.results.cells.loc[cell]
                rows = self._rows(cell, what, term)
                if rows is None:
                    continue
                layer = int(what["layer"])
                add(ALL, t, rows.sum(axis=1))
                add(layer, t, rows.sum(axis=1))
                if heads and rows.shape[1] % self.n_kv_heads == 0:
                    by_head = rows.reshape(2, self.n_kv_heads, -1, self.n_columns).sum(axis=2)
                    for h in range(self.n_kv_heads):
                        add((layer, h), t, by_head[:, h])
        return out

    def value(self, by_budget):
        """(n_columns,) of the objective from sums of one region, one array per budget (one, unless at equal bytes)."""
        values, sizes = [], []
        for sums in by_budget:
            if sums is None:
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                each = np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)
            weights = np.array([t["weight"] for t in self.objective["terms"]])
            values.append(weights @ each[:len(weights)])
            sizes.append(each[-1])
        if not values:
            return np.full(self.n_columns, np.nan)
        if not self.objective["bytes"]:
            return values[0]
        return between_bytes(np.array(sizes), np.array(values), self.objective["bytes"])

    def _rows(self, cell, what, term):
        """(2, n_rows, n_columns): n * statistic and n of each head in every resample; None where there are none."""
        counts = self.counts[what["trace"]]
        if not self.objective["from_steps"] or term["metric"] == "bytes":
            blocks = self.results.blocks(term["metric"], term["compensator"]).get(cell)
            if blocks is None:
                return None
            weights = np.where(np.isfinite(blocks), self.results.block_weights(cell), 0.0)
            return np.array([np.where(weights > 0, blocks, 0.0) * weights, weights]) @ counts.T
        steps = self.results.steps(term["metric"], term["compensator"]).get(cell)
        if steps is None:
            return None
        at = self.results._read(f"steps/{cell:06d}/{_name(term['metric'], term['compensator'])}",
                                lambda item: item.attrs.get("steps"))
        at = np.arange(steps.shape[1]) if at is None else np.asarray(at)
        return np.stack([statistic_rows(row.astype(float), at // self.results.block_steps, counts, term["statistic"])
                         for row in steps], axis=1)


def statistic_rows(values, block, counts, statistic):
    """(2, n_columns): n * statistic and n of one head's steps, each step drawn as often as its block.

    values, block   (n_steps,) numbers, NaN where a step does not count, and the block each belongs to
    counts          (n_columns, n_blocks)
    """
    counted = np.isfinite(values)
    x, block = values[counted], block[counted]
    n_blocks = counts.shape[1]
    per_block = np.bincount(block, minlength=n_blocks).astype(float)
    n = counts @ per_block
    with np.errstate(invalid="ignore", divide="ignore"):
        if statistic == "mean":
            out = counts @ np.bincount(block, x, n_blocks) / n
        elif statistic == "std":
            shifted = x - (x.mean() if len(x) else 0.0)
            first, second = (counts @ np.bincount(block, shifted ** k, n_blocks) / n for k in (1, 2))
            out = np.sqrt(np.maximum(second - first ** 2, 0.0))
        elif statistic == "max":
            top = np.full(n_blocks, -np.inf)
            np.maximum.at(top, block, x)
            out = np.where(counts > 0, top, -np.inf).max(axis=1)
        else:
            out = _quantiles(x, block, counts, int(statistic[1:]) / 100)
    return np.array([np.where(n > 0, n * out, 0.0), n])


def _quantiles(x, block, counts, share):
    """(n_columns,) quantiles, linear between neighbours, of x with every value repeated as often as its block."""
    order = np.argsort(x, kind="stable")
    x, times = x[order], counts[:, block[order]]
    upto = np.cumsum(times, axis=1)
    if not len(x):
        return np.full(len(counts), np.nan)
    at = share * np.maximum(upto[:, -1] - 1, 0)
    low = np.floor(at)

    def value(rank):
        return x[np.minimum((upto <= rank[:, None]).sum(axis=1), len(x) - 1)]

    return value(low) + (at - low) * (value(np.minimum(low + 1, np.maximum(upto[:, -1] - 1, 0))) - value(low))


def between_bytes(sizes, values, wanted):
    """(n_columns,): values at `wanted` bytes, linear in log bytes; NaN beyond. sizes, values (n_budgets, n_columns)."""
    order = np.argsort(sizes, axis=0, kind="stable")
    sizes, values = np.take_along_axis(sizes, order, 0), np.take_along_axis(values, order, 0)
    out = np.full(sizes.shape[1], np.nan)
    for low in range(len(sizes)):
        exact = sizes[low] == wanted
        out[exact] = values[low][exact]
        if low + 1 < len(sizes):
            inside = (sizes[low] < wanted) & (wanted < sizes[low + 1])
            with np.errstate(invalid="ignore", divide="ignore"):
                share = np.log(wanted / sizes[low]) / np.log(sizes[low + 1] / sizes[low])
            out[inside] = (values[low] + share * (values[low + 1] - values[low]))[inside]
    return out


# --- what is found --------------------------------------------------------------------------------------------------

def band(columns, level=bootstrap.LEVEL):
    """(estimate, low, high) of an array whose first column is the run itself and the others its resamples."""
    drawn = columns[1:][np.isfinite(columns[1:])]
    if not len(drawn):
        return float(columns[0]), math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(columns[0]), float(low), float(high)


def gain(base, tuned):
    """What `tuned` takes off the objective of `base`, both (n_columns,) under the same draws; positive is better."""
    difference, low, high = band(base - tuned)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = band(np.where(base > 0, 1 - tuned / base, np.nan))
    return {"base": float(base[0]), "tuned": float(tuned[0]), "difference": difference, "low": low, "high": high,
            "relative": share[0], "relative_low": share[1], "relative_high": share[2],
            "same": bool(np.array_equal(base, tuned, equal_nan=True)),
            "significant": bool(low > 0 or high < 0)}


def verdict(found, against="the default"):
    """A gain in words."""
    if math.isnan(found["difference"]):
        return "no number"
    if found["same"]:
        return f"is {against}" if against == "the default" else f"no other than {against}"
    if math.isnan(found["low"]):
        return "no interval: one block of steps is all there is"
    if not found["significant"]:
        return f"no significant difference from {against}"
    return f"better than {against}" if found["difference"] > 0 else f"worse than {against}"


def number(text):
    """A value's text as a number; NaN where it is a choice, a percentage or a table."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def place(values, scale):
    """Values on a parameter's scale: where even steps lie."""
    x = np.asarray(values, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        if scale == "one_minus":
            return -np.log1p(-x)
        if scale == "log":
            return np.log(x) if np.all(x[np.isfinite(x)] > 0) else np.log1p(x)
    return x


def findings(tuned):
    """What there is to say, as plain dicts and lists: see docs/tune.md for the keys."""
    spec = tuned.spec
    train = Resampled(tuned.train, spec["objective"])
    held = Resampled(tuned.holdout, spec["objective"], spec["holdout_from_step"]) if tuned.holdout else None
    cases = [_case(spec, where, train, held) for where in spec["tuned"]]
    notes = _notes(spec, train, held) + [note for case in cases for note in _cost_notes(case)]
    return {"format": "kvreplay-tune", "method": spec["method"], "objective": spec["objective"]["text"],
            "params": spec["params"], "n_candidates": len(spec["candidates"]) - 1,
            "n_left_out": len(spec["left_out"]), "n_refused": spec["n_refused"], "rounds": spec["rounds"],
            "traces": spec["traces"], "holdout": spec["holdout"],
            "holdout_from_step": spec["holdout_from_step"], "notes": notes, "cases": cases}


def _budgets(where):
    return where["budgets"] or [""]


def _notes(spec, train, held):
    """Sentences that the numbers must not be read without."""
    def over(resampled, what):
        if len(resampled.traces) > 1:
            return (f"{what}: intervals are over {len(resampled.traces)} traces and the blocks of steps within each"
                    + ("; so few traces say little about others." if len(resampled.traces) < 5 else "."))
        if resampled.n_blocks < 2:
            return f"{what}: one trace of one block of decode steps, so there are no intervals."
        rough = "; with so few blocks they are rough" if resampled.n_blocks < 10 else ""
        return (f"{what}: one trace, so intervals are over its {resampled.n_blocks} decode blocks of "
                f"{resampled.results.block_steps} steps and speak of other steps of this text, not of other "
                f"texts{rough}.")

    notes = [over(train, "Tuning")]
    if held:
        notes.append(over(held, "Held out"))
        lacking = [str(layer) for layer in train.layers if layer not in held.layers]
        if lacking:
            notes.append(f"Held-out gains are of layers {', '.join(map(str, held.layers))} alone: the held-out traces "
                         f"do not all have {', '.join(lacking)}.")
        if spec["holdout_from_step"]:
            notes.append(f"Held out are later steps of the texts that were tuned on, from decode step "
                         f"{spec['holdout_from_step']} on: other texts may differ more.")
    else:
        notes.append("No trace was held out: gains are on the data that the values were chosen on, which is "
                     "optimistic; add --holdout with other traces for numbers to cite.")
    notes += [p["why"][0].upper() + p["why"][1:] + "." for p in spec["params"] if p["why"]]
    if spec["heads_share_budget"]:
        notes.append("The heads of a layer share its budget, so values per head were chosen as if the others kept "
                     "theirs; " + ("the held-out gain says what that is worth." if held else
                                   "their gain is put together in the same way, and only held-out traces can tell it."))
    if spec["left_out"]:
        notes.append(f"{len(spec['left_out'])} of the candidates' runs were left out, the first because "
                     f"{spec['left_out'][0]['why']}.")
    if spec.get("holdout_left_out"):
        notes += [f"On held-out traces {left['method']} was left out at budget {left['budget']}, because "
                  f"{left['why']}: there are no held-out numbers for it." for left in spec["holdout_left_out"]]
    if spec["n_refused"]:
        notes.append(f"{spec['n_refused']} values are not allowed and were left out: {spec['refused']}.")
    notes += [f"At {where['bytes']:.0f} bytes, {where['n_not_reaching']} candidates have no budgets on both sides and "
              "were left out." for where in spec["tuned"] if where.get("n_not_reaching")]
    return notes


def _cost(where, results):
    """{metric: [the method as it is, the chosen]}: what they measured of the cache, means over KV heads and steps."""
    rows = results.summary[results.summary["metric"].isin(COSTS) & results.summary["budget"].isin(_budgets(where))]
    means = pooled(rows, ["label", "metric"])["mean"]
    return {metric: [float(means.get((where[m], metric), math.nan)) for m in ("default", "global")]
            for metric in COSTS}


def _cost_notes(case):
    """Where the chosen method keeps or attends more than the default, the gain is not at equal cost."""
    out = []
    for metric, (base, mine) in case["cost"].items() if not case["bytes"] else ():
        if mine > (1 + SAME_COST) * base:
            what = {"bytes": "keeps {:.0f} bytes per KV head where the default keeps {:.0f}",
                    "attended": "attends {:.0f} tokens where the default attends {:.0f}"}[metric]
            where = f"At budget {case_name(case)} the" if case["budgets"] else "The"
            out.append(f"{where} chosen method {what.format(mine, base)}: the gain is not at "
                       "equal cost.")
    return out


def _case(spec, where, train, held):
    """One budget (or all of them, at equal bytes)."""
    budgets, candidates, params = _budgets(where), spec["candidates"], spec["params"]
    chosen = where["chosen"]
    everything, layers = [], {layer: [] for layer in train.layers}
    for c in candidates:
        sums = [train.sums(c["method"], b) for b in budgets]

        def region(name, sums=sums):
            return train.value([s.get(name) if s else None for s in sums])

        everything.append(region(ALL))
        for layer in train.layers:
            layers[layer].append(region(layer))
    everything = np.array(everything)
    best = chosen["global"]
    out = {"budgets": where["budgets"], "bytes": where.get("bytes"),
           "methods": {g: where[g] for g in ("default", *GRAINS)},
           "curve": [{"method": c["method"], "values": c["values"], "round": c["round"],
                      **dict(zip(("value", "low", "high"), band(columns)))}
                     for c, columns in zip(candidates, everything)],
           "optimum": _optimum(params, candidates, everything, best, range(len(candidates))),
           "train_gain": gain(everything[0], everything[best]),
           "cost": _cost(where, (held or train).results)}
    measured = _measured(where, held) if held else _in_sample(where, train, spec)
    out["gain_on"] = "holdout" if held else "train"
    out["gain"] = gain(measured["default"][ALL], measured["global"][ALL])
    for grain in ("layer", "head"):
        if grain not in measured:
            out[grain] = None
            continue
        mine = measured[grain]
        out[grain] = {"over_default": gain(measured["default"][ALL], mine[ALL]),
                      "over_global": gain(measured["global"][ALL], mine[ALL]),
                      "by_layer": [{"layer": layer, **gain(measured["global"][layer], mine[layer])}
                                   for layer in mine if isinstance(layer, int)]}
    if "layers" in chosen:
        allowed = _expressible(params, candidates, best)
        out["layers"] = [{"layer": int(layer),
                          **_optimum(params, candidates, np.array(layers[int(layer)]), c, allowed)}
                         for layer, c in chosen["layers"].items()]
    if "heads" in chosen:
        out["heads"] = [{"layer": int(layer), "kv_head": h,
                         "values": dict(zip(_names(params), candidates[c]["values"]))}
                        for layer, of in chosen["heads"].items() for h, c in enumerate(of)]
    return out


def _names(params):
    return [p["name"] for p in params]


def _expressible(params, candidates, best):
    """Candidates that a layer may take: plain numbers where a parameter follows layers, the global value elsewhere."""
    def fits(p, value, chosen):
        return value == chosen if p["grain"] == "global" else not math.isnan(number(value))

    return [i for i, c in enumerate(candidates)
            if all(fits(p, v, g) for p, v, g in zip(params, c["values"], candidates[best]["values"]))]


def _optimum(params, candidates, columns, best, allowed):
    """The chosen candidate and where the smallest value lies in 95 % of the resamples; columns (n_candidates, ...)."""
    allowed = list(allowed)
    drawn = columns[allowed][:, 1:]
    drawn = drawn[:, np.isfinite(drawn).any(axis=0)]
    out = {"candidate": int(best), "method": candidates[best]["method"],
           "values": dict(zip(_names(params), candidates[best]["values"])), "interval": {}, "share": math.nan,
           "at_edge": []}
    winners = np.array(allowed)[np.nanargmin(drawn, axis=0)] if drawn.shape[1] else np.array([], int)
    if len(winners):
        out["share"] = float((winners == best).mean())
    for i, p in enumerate(params):
        numbers = np.array([number(c["values"][i]) for c in candidates])
        won = numbers[winners] if len(winners) else np.array([])
        if len(won) and np.isfinite(won).all():
            low, high = np.quantile(won, [0.025, 0.975], method="inverted_cdf")
            out["interval"][p["name"]] = [float(low), float(high)]
        elif len(won):
            names, n = np.unique([candidates[w]["values"][i] for w in winners], return_counts=True)
            out["interval"][p["name"]] = {str(name): float(k / len(winners)) for name, k in zip(names, n)}
        mine = number(candidates[best]["values"][i])
        if p["lo"] is not None and not math.isnan(mine):
            low, high, at = place([p["lo"], p["hi"], mine], p["scale"])
            if low <= at <= high and min(at - low, high - at) < NEAR_EDGE * (high - low):
                out["at_edge"].append(p["name"])
    return out


def _measured(where, held):
    """{default, global, layer, head: {region: columns}} as they ran on the held-out traces."""
    out = {}
    for grain in ("default", *GRAINS):
        if where[grain] is None:
            continue
        sums = [held.sums(where[grain], b) for b in _budgets(where)]
        out[grain] = {region: held.value([s.get(region) if s else None for s in sums])
                      for region in (ALL, *held.layers)}
    return out


def _in_sample(where, train, spec):
    """The same on the training traces, put together from the candidates' own cells: every layer (head) takes those of
    the candidate it chose. Exact where heads do not share a budget."""
    candidates, chosen, budgets = spec["candidates"], where["chosen"], _budgets(where)
    choice = {"default": lambda layer, head: 0, "global": lambda layer, head: chosen["global"]}
    if "layers" in chosen:
        choice["layer"] = lambda layer, head: chosen["layers"][str(layer)]
    if "heads" in chosen:
        choice["head"] = lambda layer, head: chosen["heads"][str(layer)][head]
    sums = {}

    def of(candidate, b):
        if (candidate, b) not in sums:
            sums[candidate, b] = train.sums(candidates[candidate]["method"], b, heads="heads" in chosen)
        return sums[candidate, b]

    out = {}
    for grain, choose in choice.items():
        regions = {}
        for layer in train.layers:
            parts = []  # per budget: the layer's sums
            for b in budgets:
                pieces = [of(choose(layer, h), b) for h in (range(train.n_kv_heads) if grain == "head" else [None])]
                keys = [(layer, h) for h in range(train.n_kv_heads)] if grain == "head" else [layer]
                parts.append(None if any(p is None for p in pieces) else sum(p[k] for p, k in zip(pieces, keys)))
            regions[layer] = parts
        total = [None if any(regions[layer][i] is None for layer in train.layers) else
                 sum(regions[layer][i] for layer in train.layers) for i in range(len(budgets))]
        out[grain] = {ALL: train.value(total), **{layer: train.value(parts) for layer, parts in regions.items()}}
    return out


# --- tables ---------------------------------------------------------------------------------------------------------

def case_name(case):
    return f"{case['bytes']:.0f} bytes" if case["bytes"] else case["budgets"][0] if case["budgets"] else "no budget"


def curve(found):
    """One row per case and candidate: case, method, one column per parameter (as text), value, low, high."""
    names = _names(found["params"])
    return pd.DataFrame([{"case": case_name(case), "method": c["method"], **dict(zip(names, c["values"])),
                          "value": c["value"], "low": c["low"], "high": c["high"], "round": c["round"]}
                         for case in found["cases"] for c in case["curve"]])


def per_layer(found):
    """One row per case, layer and parameter: value, low and high of the optimum's place."""
    rows = []
    for case in found["cases"]:
        for layer in case.get("layers", []):
            for name, value in layer["values"].items():
                interval = layer["interval"].get(name)
                low, high = interval if isinstance(interval, list) else (math.nan, math.nan)
                rows.append({"case": case_name(case), "layer": layer["layer"], "param": name, "value": value,
                             "low": low, "high": high})
    return pd.DataFrame(rows, columns=["case", "layer", "param", "value", "low", "high"])


def per_head(found):
    """One row per case, layer, KV head and parameter: the value that makes the head's objective smallest."""
    rows = [{"case": case_name(case), "layer": h["layer"], "kv_head": h["kv_head"], "param": name, "value": value}
            for case in found["cases"] for h in case.get("heads", []) for name, value in h["values"].items()]
    return pd.DataFrame(rows, columns=["case", "layer", "kv_head", "param", "value"])


def short(x):
    return "" if x is None or (isinstance(x, float) and math.isnan(x)) else f"{x:.4g}"


def _interval(low, high):
    return "" if math.isnan(low) else f"{short(low)} to {short(high)}"


def _place(case, name):
    interval = case["optimum"]["interval"].get(name)
    if isinstance(interval, list):
        return _interval(*interval)
    return ", ".join(f"{k} {100 * v:.0f} %" for k, v in (interval or {}).items())


def _change(g):
    if math.isnan(g["difference"]):
        return ""
    return f"{100 * g['relative']:+.2f} %" if not math.isnan(g["relative"]) else f"{g['difference']:+.4g}"


def _change_interval(g):
    if math.isnan(g["low"]):
        return ""
    if math.isnan(g["relative_low"]):
        return f"{g['low']:+.4g} to {g['high']:+.4g}"
    return f"{100 * g['relative_low']:+.2f} to {100 * g['relative_high']:+.2f} %"


def text(found):
    """The findings for a terminal."""
    names = _names(found["params"])
    first = found["holdout_from_step"]
    on = "held-out steps" if first else "held-out traces" if found["holdout"] else "the tuning data"
    lines = [f"{found['method']}: {', '.join(names)} among {found['n_candidates']} candidates and the default; the "
             f"smaller {found['objective']}, the better",
             f"tuned on {', '.join(found['traces'])}" + (
                 f" before decode step {first}, held out from there on" if first else
                 f"; held out {', '.join(found['holdout'])}" if found["holdout"] else ""), "",
             f"Gain over the default, on {on}"]
    header = ["budget", *(h for n in names for h in (n, "95 % of optima")), "default", "tuned", "gain", "95 %", ""]
    rows = []
    for case in found["cases"]:
        g, edges = case["gain"], case["optimum"]["at_edge"]
        rows.append([case_name(case), *(v for n in names for v in (case["optimum"]["values"][n], _place(case, n))),
                     short(g["base"]), short(g["tuned"]), _change(g), _change_interval(g),
                     verdict(g) + (f"; {', '.join(edges)} near an end of the range" if edges else "")])
    lines += _aligned(header, rows)
    for grain, words in (("layer", "per layer"), ("head", "per layer and KV head")):
        if all(case[grain] is None for case in found["cases"]):
            continue
        lines += ["", f"Values {words} against one value for all, on {on}"]
        lines += _aligned(["budget", "one value", words, "gain", "95 %", ""],
                          [[case_name(case), short(g["base"]), short(g["tuned"]), _change(g), _change_interval(g),
                            verdict(g, "one value for all")]
                           for case in found["cases"] if case[grain] for g in [case[grain]["over_global"]]])
    return "\n".join([*lines, "", *found["notes"], "Replay is open-loop: errors do not compound across layers and "
                                                   "steps."])


def _aligned(header, rows):
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    return ["  " + "  ".join(str(v).ljust(w) for v, w in zip(r, widths)).rstrip() for r in [header, *rows]]


def as_json(found):
    """The findings as JSON: numbers that are none become null."""
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, list):
            return [plain(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n"
