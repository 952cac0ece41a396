"""What a method's error comes from: lost mass or direction, which heads, steps and tokens, and what was needed again.

    import kvreplay_analysis as ka
    ex = ka.explain.load("out/explain/h2o_vs_momentkv_at_64")     # what `kvreplay explain` wrote
    ka.explain.parts(ex)          # frames: each function below gives one, with a column `label`
    ka.explain.top_tokens(ex)

Damage, regret, missed, age and lag are defined in docs/explain.md.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from . import bootstrap, results as _results
from .errors import Absent, ResultsError, UsageError
from .tables import pooled

HALVES = {"error": "plain eviction", "error_corrected": "corrected", "error_exact_mass": "with the true mass",
          "error_exact_direction": "with the true direction"}
N_CURVE = 1024  # points of a curve over steps


@dataclass(frozen=True)
class Explanation:
    """results: the folder's own results, with steps; said: explain.json; labels: the method and what it is against."""

    folder: Path
    results: _results.Results
    said: dict
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self):
        return [label for label in (self.said["method"], self.said.get("against")) if label]

    def of(self, label):
        """The results of one label alone."""
        return self.results.only(label=label)

    def only(self, results):
        """The same explanation over fewer cells."""
        return Explanation(self.folder, results, self.said, self._cache)

    def attribution(self, cell):
        """{name: array} of attribution.h5: kv_head, q_head (n_lanes); evicted_at, damage, regret, missed,
        first_missed, worst_step, worst_damage (n_lanes, n_tokens); step_missed, step_missed_mass (n_lanes, n_steps);
        culprit, culprit_damage (n_lanes, n_steps, n_culprits). q_head is -1 where a lane is a KV head's whole group."""
        if cell not in self._cache:
            with self._file() as file:
                group = file[f"cells/{cell:06d}"]
                arrays = {name: group[name][()] for name in group}
                n = int(file.attrs["n_culprits"])
            for name in ("culprit", "culprit_damage"):
                arrays[name] = arrays[name].reshape(len(arrays[name]), -1, n)
            self._cache[cell] = arrays
        return self._cache[cell]

    def tokens(self, trace):
        """id and text of every token of a trace; text is "" where the trace has none."""
        key = f"tokens of {trace}"
        if key not in self._cache:
            with self._file() as file:
                for group in file["tokens"].values():
                    if group.attrs["trace"] in (trace, trace.encode()):
                        ids = group["id"][()]
                        text = ([t.decode("utf-8", "replace") for t in group["piece"][()]] if "piece" in group
                                else [""] * len(ids))
                        self._cache[key] = pd.DataFrame({"id": ids, "text": text})
        return self._cache[key]

    def _file(self):
        return h5py.File(self.folder / "attribution.h5", "r")


def load(folder):
    """Reads what `kvreplay explain` wrote under DIR/explain."""
    folder = Path(folder)
    results = _results.load(folder)
    absent = [n for n in ("explain.json", "attribution.h5", "tokens.csv") if not (folder / n).is_file()]
    if absent:
        raise UsageError(f"{folder} is not an explanation: it has no {' and no '.join(absent)}")
    try:
        said = json.loads((folder / "explain.json").read_text(encoding="utf-8"))
        said["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{folder / 'explain.json'} is not what kvreplay explain writes: {error}") from error
    return Explanation(folder, results, said)


def listed_tokens(ex):
    """tokens.csv: the tokens of largest damage of every head, one row each, and a row without `token` for the rest."""
    return pd.read_csv(ex.folder / "tokens.csv", dtype={"trace": str, "method": str, "label": str, "budget": str,
                                                        "text": str}, keep_default_na=False,
                       na_values={c: [""] for c in ("q_head", "token", "id", "evicted_at", "age", "first_missed", "lag",
                                                    "worst_step", "worst_damage")})


def difference_to(ex, original):
    """A sentence where the replay's means are not those of the run that is explained, else nothing."""
    key = ["trace", "layer", "kv_head", "q_head", "label", "budget"]
    both = [r.summary[r.summary["metric"].isin(["error", "evicted_mass"])].set_index([*key, "metric"])["mean"]
            for r in (ex.results, original)]
    both = pd.concat(both, axis=1, join="inner", keys=["now", "then"]).dropna()
    far = (both["now"] - both["then"]).abs() > 1e-6 * both["then"].abs() + 1e-9
    if not far.any():
        return ""
    worst = both[far].iloc[0]
    then, now = ([r.run.get(name) for name in ("version", "git")] for r in (original, ex.results))
    why = (f"it was made by version {then[0]} ({then[1]}), this by {now[0]} ({now[1]})" if then != now else
           "its trace, or a file that a method reads, has changed since")
    return (f"{int(far.sum())} of {len(both)} means differ from those of {original.folder}, for example "
            f"{both[far].index[0][-1]} {worst['now']:.6g} instead of {worst['then']:.6g}: {why}")


# --- sums over steps ----------------------------------------------------------------------------------------------

def step_totals(results, metrics):
    """As bootstrap.totals, but a step counts where all metrics count it: {trace: (n_blocks, len(metrics) + 1)}."""
    arrays = [results.steps(m, c) for m, c in metrics]
    per_trace = {}
    for cell, trace in zip(results.cells.index, results.cells["trace"]):
        if all(cell in a for a in arrays):
            bootstrap.add(per_trace, trace, _blocked([a[cell] for a in arrays], results.block_steps))
    return per_trace


def _blocked(arrays, block_steps):
    """(n_blocks, len(arrays) + 1): sums over heads and the steps of a block where all are numbers; then how many."""
    arrays = [np.asarray(a, dtype=float) for a in arrays]
    counted = np.all([np.isfinite(a) for a in arrays], axis=0)
    sums = np.column_stack([*(np.where(counted, a, 0.0).sum(axis=0) for a in arrays), counted.sum(axis=0)])
    return np.add.reduceat(sums, np.arange(0, len(sums), block_steps), axis=0)


def _estimate(per_trace, statistic):
    return bootstrap.interval(list(per_trace.values()), statistic)


def _ratio(i, j):
    def of(sums):
        return _quotient(sums[..., i], sums[..., j])

    return of


def _quotient(a, b):
    """a / b without a warning where it is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return a / b


# --- the frames ---------------------------------------------------------------------------------------------------

def headline(ex):
    """Means as in summary.csv, pooled over heads, layers and traces: label, metric, compensator, mean, n, n_skipped."""
    means = pooled(ex.results.summary, ["label", "metric", "compensator"]).reset_index()
    means = means[means["label"].isin(ex.labels)]
    order = {label: i for i, label in enumerate(ex.labels)}
    return means.sort_values("label", key=lambda s: s.map(order), kind="stable").reset_index(drop=True)


def parts(ex):
    """Lost mass and direction: one row per label, over the steps that hold at least 1e-6 of evicted mass.

    error                 mean of ‖f − f_R‖ / ‖f‖
    evicted_mass          mean of w_E
    distance              Σ error / Σ evicted_mass: how far f_E lies from f_R, in lengths of f, per unit of lost mass
    error_parallel, error_orthogonal   means of the two sides of the right triangle that `error` is the third of
    orthogonal_share      Σ error_orthogonal² / Σ error²: what no rescaling of f_R repairs; parallel_share is the rest
    each with _low and _high; n head-steps
    """
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        steps = step_totals(mine, [(m, "") for m in ("error", "evicted_mass", "error_parallel", "error_orthogonal")])
        if not steps or not sum(t[:, -1].sum() for t in steps.values()):
            continue
        row = {"label": label, "n": int(sum(t[:, -1].sum() for t in steps.values()))}
        squares = {}
        arrays = [mine.steps(m) for m in ("error_parallel", "error_orthogonal")]
        for cell, trace in zip(mine.cells.index, mine.cells["trace"]):
            if all(cell in a for a in arrays):
                parallel, orthogonal = (np.square(a[cell].astype(float)) for a in arrays)
                bootstrap.add(squares, trace, _blocked([orthogonal, parallel + orthogonal], mine.block_steps))
        for name, totals, statistic in (
                ("error", steps, _ratio(0, -1)), ("evicted_mass", steps, _ratio(1, -1)),
                ("distance", steps, _ratio(0, 1)),
                ("error_parallel", steps, _ratio(2, -1)), ("error_orthogonal", steps, _ratio(3, -1)),
                ("orthogonal_share", squares, _ratio(0, 1))):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = _estimate(totals, statistic)
        row["parallel_share"] = 1 - row["orthogonal_share"]
        rows.append(row)
    if not rows:
        raise Absent("nothing is lost here: no step holds 1e-6 of evicted mass, so there is no error to explain")
    return pd.DataFrame(rows)


def halves(ex):
    """What the correction gives back: label, compensator, acting, quantity (see HALVES), mean, low, high, removed,
    removed_low, removed_high (share of the plain error that is gone), n. All quantities over the same steps."""
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        acting = set(mine.cells["compensator_acting"])
        for c in mine.compensators:
            metrics = [("error", ""), *((m, c) for m in list(HALVES)[1:])]
            totals = step_totals(mine, metrics)
            if not totals or not sum(t[:, -1].sum() for t in totals.values()):
                continue
            for i, (metric, _) in enumerate(metrics):
                mean, low, high = _estimate(totals, _ratio(i, -1))
                removed = _estimate(totals, lambda s, i=i: 1 - _ratio(i, 0)(s))
                rows.append({"label": label, "compensator": c, "acting": c in acting, "quantity": metric,
                             "mean": mean, "low": low, "high": high, "removed": removed[0], "removed_low": removed[1],
                             "removed_high": removed[2], "n": int(sum(t[:, -1].sum() for t in totals.values()))})
    if not rows:
        raise Absent("no compensator was measured beside these methods where they had evicted something")
    return pd.DataFrame(rows)


def by_head(ex):
    """Means as in summary.csv, pooled over traces: label, layer, kv_head, q_head, and a column for each of error,
    error_output and evicted_mass."""
    key = ["label", "layer", "kv_head", "q_head"]
    rows = ex.results.summary
    rows = rows[rows["metric"].isin(["error", "error_output", "evicted_mass"]) & rows["label"].isin(ex.labels)]
    means = pooled(rows, [*key, "metric"])["mean"].unstack("metric")
    return means.reset_index().rename_axis(None, axis=1)


def over_steps(ex):
    """label, trace, step, n_steps, error, error_output, evicted_mass: means over heads and layers at a step (over
    n_steps of them from `step` on where the decode is long)."""
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        for trace in mine.traces:
            here = mine.only(trace=trace)
            width = -(-int(here.cells["n_steps"].iloc[0]) // N_CURVE)
            columns = {m: _mean_over_cells(here.steps(m), width) for m in ("error", "error_output", "evicted_mass")}
            n = len(columns["error"])
            rows.append(pd.DataFrame({"label": label, "trace": trace, "step": np.arange(n) * width, "n_steps": width,
                                      **columns}))
    return pd.concat(rows, ignore_index=True)


def _mean_over_cells(arrays, width=1):
    """Mean over heads and cells of arrays (n_heads, n_steps), by step or by `width` of them."""
    counted = sum(np.isfinite(a).sum(axis=0) for a in arrays.values())
    total = sum(np.nansum(a.astype(float), axis=0) for a in arrays.values())
    begin = np.arange(0, len(total), width)
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(total, begin) / np.add.reduceat(counted, begin)


def worst_steps(ex, n=8):
    """The steps of largest mean error over heads and layers, largest first: label, trace, step, error, culprits (the
    tokens that did most, with the share of the step's error that they explain; from the five that each head keeps)."""
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        for trace in mine.traces:
            here = mine.only(trace=trace)
            errors = here.steps("error")
            mean = _mean_over_cells(errors)
            total = sum(np.nansum(a.astype(float), axis=0) for a in errors.values())
            for step in np.argsort(-np.nan_to_num(mean), kind="stable")[:n]:
                if not mean[step] > 0:
                    continue
                blamed = {}
                for cell in here.cells.index:
                    a = ex.attribution(cell)
                    for token, damage in zip(a["culprit"][:, step].ravel(), a["culprit_damage"][:, step].ravel()):
                        if token >= 0:
                            blamed[int(token)] = blamed.get(int(token), 0.0) + float(damage)
                most = sorted(blamed.items(), key=lambda kv: (-kv[1], kv[0]))[:5]
                rows.append({"label": label, "trace": trace, "step": int(step), "error": float(mean[step]),
                             "culprits": [{"token": t, "share": d / total[step], "text": _text(ex, trace, t)}
                                          for t, d in most]})
    return pd.DataFrame(rows, columns=["label", "trace", "step", "error", "culprits"])


def _text(ex, trace, token):
    return ex.tokens(trace)["text"].iat[token]


def all_tokens(ex):
    """Every token of every trace, summed over layers and heads: label, trace, token, id, text, damage, share (of all
    damage of the label in the trace), regret, lanes (heads that evicted it), missed (head-steps)."""
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        for trace in mine.traces:
            sums = {}
            for cell in mine.only(trace=trace).cells.index:
                a = ex.attribution(cell)
                for name, values in (("damage", a["damage"]), ("regret", a["regret"]), ("missed", a["missed"]),
                                     ("lanes", a["regret"] > 0)):
                    sums[name] = sums.get(name, 0) + values.sum(axis=0)
            tokens = ex.tokens(trace)
            frame = pd.DataFrame({"label": label, "trace": trace, "token": np.arange(len(tokens)), "id": tokens["id"],
                                  "text": tokens["text"], **sums})
            total = frame["damage"].sum()
            frame.insert(6, "share", frame["damage"] / total if total else np.nan)
            rows.append(frame)
    return pd.concat(rows, ignore_index=True)


def top_tokens(ex, n=25, frame=None):
    """The n tokens of largest damage of every label and trace, of all_tokens."""
    frame = all_tokens(ex) if frame is None else frame
    frame = frame[frame["damage"] > 0].sort_values("damage", ascending=False, kind="stable")
    order = {label: i for i, label in enumerate(ex.labels)}
    frame = frame.groupby(["label", "trace"], sort=False).head(n)
    return frame.sort_values("label", key=lambda s: s.map(order), kind="stable").reset_index(drop=True)


def spread_bins(ex, spread="logit_variance", n_bins=8):
    """Correction quality against how far the evicted logits spread: blocks of 64 steps of a head, in bins of equal
    numbers. label, compensator, low_edge, high_edge, spread (mean), removed, removed_low, removed_high, n (blocks)."""
    rows = []
    xs = [x[np.isfinite(x)] for label in ex.labels for x in ex.of(label).blocks(spread).values()]
    if not xs or not sum(len(x) for x in xs):
        raise Absent(f"{spread} has no counted value: nothing was evicted")
    edges = np.unique(np.quantile(np.concatenate(xs), np.linspace(0, 1, n_bins + 1)))
    if len(edges) < 2:
        edges = np.array([edges[0], edges[0]])
    for label in ex.labels:
        mine = ex.of(label)
        x, plain = mine.blocks(spread), mine.blocks("error")
        for c in mine.compensators:
            corrected = mine.blocks("error_corrected", c)
            for i, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
                per_trace, n, sum_x = {}, 0, 0.0
                for cell, trace in zip(mine.cells.index, mine.cells["trace"]):
                    if cell not in corrected or cell not in x:
                        continue
                    inside = (x[cell] >= low) & ((x[cell] < high) | ((i == len(edges) - 2) & (x[cell] <= high)))
                    inside &= np.isfinite(plain[cell]) & np.isfinite(corrected[cell])
                    values = [np.where(inside, v, np.nan) for v in (plain[cell], corrected[cell])]
                    bootstrap.add(per_trace, trace, bootstrap.block_sums(values, mine.block_weights(cell)))
                    n += int(inside.sum())
                    sum_x += float(x[cell][inside].sum())
                if n:
                    removed, lo, hi = _estimate(per_trace, bootstrap.removed_share)
                    rows.append({"label": label, "compensator": c, "low_edge": low, "high_edge": high,
                                 "spread": sum_x / n, "removed": removed, "removed_low": lo, "removed_high": hi,
                                 "n": n})
    if not rows:
        raise Absent("no compensator was measured beside these methods where they had evicted something")
    return pd.DataFrame(rows)


def evictions(ex):
    """Every eviction: label, trace, layer, kv_head, q_head, token, evicted_at, age, lag (NaN: never needed again),
    missed, steps_without, regret, at_prompt. age: positions between the token and the first query that misses
    it; lag: decode steps from then to the first step that misses it among its largest weights."""
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        for what in mine.cells.itertuples():
            a = ex.attribution(what.Index)
            lane, token = np.nonzero(a["evicted_at"] < what.n_steps)
            at, first = a["evicted_at"][lane, token], a["first_missed"][lane, token]
            rows.append(pd.DataFrame({
                "label": label, "trace": what.trace, "layer": what.layer, "kv_head": a["kv_head"][lane],
                "q_head": a["q_head"][lane], "token": token, "evicted_at": at, "age": what.prompt_len + at - token,
                "lag": np.where(first >= 0, (first - at).astype(float), np.nan), "missed": a["missed"][lane, token],
                "steps_without": what.n_steps - at, "regret": a["regret"][lane, token],
                "at_prompt": (at == 0) & (token < what.prompt_len)}))
    frame = pd.concat(rows, ignore_index=True)
    if frame.empty:
        raise Absent("nothing was evicted: there is no age and no lag")
    return frame


def doubling_bins(values):
    """Index of the bin 0, 1, 2 to 3, 4 to 7, ... of whole numbers, and the bins' names."""
    values = np.asarray(values, dtype=int)
    index = np.where(values > 0, np.floor(np.log2(np.maximum(values, 1))).astype(int) + 1, 0)
    n = int(index.max(initial=0)) + 1
    names = ["0", "1"] + [f"{2 ** i}–{2 ** (i + 1) - 1}" for i in range(1, n)]
    return index, names[:n]


def ages(ex, frame=None):
    """label, when (`cut at the prompt` or `during the decode`), bin, age, n, share (of the label's evictions)."""
    return _binned(evictions(ex) if frame is None else frame, "age")


def lags(ex, frame=None):
    """label, when, bin, lag, n, share: when an evicted token was needed again; the last bin is `never`."""
    return _binned(evictions(ex) if frame is None else frame, "lag")


def _binned(frame, column):
    values = frame[column].to_numpy(dtype=float)
    there = np.isfinite(values)
    index = np.full(len(values), -1)
    index[there], names = doubling_bins(values[there])
    names = names + ["never"]
    index[~there] = len(names) - 1
    out = frame.assign(bin=index, when=np.where(frame["at_prompt"], "cut at the prompt", "during the decode"))
    n_of = out.groupby("label").size()
    out = out.groupby(["label", "when", "bin"], sort=False).size().rename("n").reset_index()
    out[column] = [names[b] for b in out["bin"]]
    out["share"] = out["n"] / out["label"].map(n_of)
    return out.sort_values(["label", "when", "bin"], kind="stable").reset_index(drop=True)


def regret_over_steps(ex):
    """label, trace, step, n_steps, evicted_mass, missed_mass, missed: means over heads and layers. missed_mass is the
    part of the evicted mass that lay on missed tokens, missed their number per head."""
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        for trace in mine.traces:
            here = mine.only(trace=trace)
            width = -(-int(here.cells["n_steps"].iloc[0]) // N_CURVE)
            found = {cell: ex.attribution(cell) for cell in here.cells.index}
            columns = {"evicted_mass": here.steps("evicted_mass"),
                       "missed_mass": {c: a["step_missed_mass"] for c, a in found.items()},
                       "missed": {c: a["step_missed"] for c, a in found.items()}}
            columns = {name: _mean_over_cells(arrays, width) for name, arrays in columns.items()}
            rows.append(pd.DataFrame({"label": label, "trace": trace,
                                      "step": np.arange(len(columns["missed"])) * width, "n_steps": width, **columns}))
    return pd.concat(rows, ignore_index=True)


def span_bias(ex):
    """Eviction bias of every span: label, span, retention (mean over heads and steps, as in summary.csv), overall
    (share of all tokens so far that are resident, over the same heads and steps), bias = retention − overall, low,
    high."""
    names = sorted(m for m in ex.results.summary["metric"].unique() if m.startswith("retention:"))
    if not names:
        raise Absent("no trace here has spans: capture with --spans to mark an instruction, a needle or a document")
    rows = []
    for label in ex.labels:
        mine = ex.of(label)
        for name in names:
            per_trace = {}
            arrays = mine.steps(name)
            for what in mine.cells.itertuples():
                if what.Index in arrays:
                    inside = arrays[what.Index].astype(float)
                    overall = _retained_share(ex, what)
                    bootstrap.add(per_trace, what.trace, _blocked([inside, overall], mine.block_steps))
            if not per_trace:
                continue
            retention, overall = (_estimate(per_trace, _ratio(i, -1))[0] for i in (0, 1))
            bias, low, high = _estimate(per_trace, lambda s: (s[..., 0] - s[..., 1]) / s[..., -1])
            rows.append({"label": label, "span": name.removeprefix("retention:"), "retention": retention,
                         "overall": overall, "bias": bias, "low": low, "high": high})
    return pd.DataFrame(rows)


def _retained_share(ex, what):
    """(n_kv_heads, n_steps): share of the tokens so far that are resident."""
    a = ex.attribution(what.Index)
    at = np.minimum(a["evicted_at"], what.n_steps)
    born = np.maximum(np.arange(at.shape[1]) - what.prompt_len, 0)
    share = np.empty((len(at), what.n_steps))
    so_far = what.prompt_len + np.arange(what.n_steps) + 1
    for lane, row in enumerate(at):
        change = np.bincount(born, minlength=what.n_steps + 1) - np.bincount(np.maximum(row, born),
                                                                             minlength=what.n_steps + 1)
        share[lane] = np.cumsum(change)[:what.n_steps] / so_far
    return np.stack([share[a["kv_head"] == h].mean(axis=0) for h in range(what.n_kv_heads)])


def raster(ex, cell, n_rows=48, n_columns=96):
    """Which positions are kept when: (lanes, share, position edges, step edges). share (n_lanes, n_rows, n_columns) is
    kept (token, step) pairs over those there could be, NaN where no token of the bin is there yet; with a reader what
    it attends, mean over the heads."""
    what = ex.results.cells.loc[cell]
    a = ex.attribution(cell)
    n_steps, n_tokens = int(what["n_steps"]), a["evicted_at"].shape[1]
    rows = np.unique(np.linspace(0, n_tokens, min(n_rows, n_tokens) + 1).astype(int))
    columns = np.unique(np.linspace(0, n_steps, min(n_columns, n_steps) + 1).astype(int))
    born = np.maximum(np.arange(n_tokens) - int(what["prompt_len"]), 0)
    could = np.clip(columns[None, 1:] - np.maximum(born[:, None], columns[None, :-1]), 0, None)
    could = np.add.reduceat(could, rows[:-1], axis=0)
    attended = ex.results.attended(cell)
    shares = []
    for lane in range(len(a["kv_head"])):
        if attended is None:
            at = np.minimum(a["evicted_at"][lane], n_steps)[:, None]
            kept = np.clip(np.minimum(at, columns[None, 1:]) - np.maximum(born[:, None], columns[None, :-1]), 0, None)
        else:
            heads = ([int(a["q_head"][lane])] if a["q_head"][lane] >= 0 else
                     np.arange(int(what["group_size"])) + int(a["kv_head"][lane]) * int(what["group_size"]))
            kept = np.add.reduceat(attended[heads].mean(axis=0).T, columns[:-1], axis=1)  # (n_tokens, n_columns)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares.append(np.add.reduceat(kept, rows[:-1], axis=0) / could)
    lanes = pd.DataFrame({"kv_head": a["kv_head"], "q_head": a["q_head"]})
    return lanes, np.stack(shares), rows, columns


# --- two methods --------------------------------------------------------------------------------------------------

def paired(ex, metrics=("error_output", "error", "evicted_mass")):
    """The method against the other, over the steps that both count: metric, layer ("all" or its number), a, b,
    difference = a − b, low, high, wins (share of head-steps where a is lower), losses, n."""
    a, b = (ex.of(label) for label in _two(ex))
    rows = []
    for metric in metrics:
        mine, theirs = a.steps(metric), b.steps(metric)
        other = {(w.trace, w.layer): w.Index for w in b.cells.itertuples()}
        sums = {}
        for what in a.cells.itertuples():
            cell = other.get((what.trace, what.layer))
            if cell not in theirs or what.Index not in mine:
                continue
            x, y = mine[what.Index].astype(float), theirs[cell].astype(float)
            counted = np.isfinite(x) & np.isfinite(y)
            values = [np.where(counted, v, np.nan) for v in (x, y, (x < y).astype(float), (x > y).astype(float))]
            blocks = _blocked(values, a.block_steps)
            for key in ("all", what.layer):
                bootstrap.add(sums.setdefault(key, {}), what.trace, blocks)
        for key, per_trace in sums.items():
            difference, low, high = _estimate(per_trace, lambda s: (s[..., 0] - s[..., 1]) / s[..., -1])
            of_a, of_b, wins, losses = (_estimate(per_trace, _ratio(i, -1))[0] for i in range(4))
            rows.append({"metric": metric, "layer": key, "a": of_a, "b": of_b, "difference": difference, "low": low,
                         "high": high, "wins": wins, "losses": losses,
                         "n": int(sum(t[:, -1].sum() for t in per_trace.values()))})
    return pd.DataFrame(rows)


def factors(ex):
    """Why the plain errors of the two differ: error = lost mass x distance, so the ratio of errors is the product of
    two ratios. factor (`error`, `evicted_mass`, `distance`), ratio = method / other, low, high."""
    a, b = (ex.of(label) for label in _two(ex))
    metrics = [("error", ""), ("evicted_mass", "")]
    mine, theirs = step_totals(a, metrics), step_totals(b, metrics)
    both = {t: np.hstack([mine[t], theirs[t]]) for t in mine if t in theirs}  # columns: error, mass, n of each
    rows = []
    for name, statistic in (("error", lambda s: _quotient(_ratio(0, 2)(s), _ratio(3, 5)(s))),
                            ("evicted_mass", lambda s: _quotient(_ratio(1, 2)(s), _ratio(4, 5)(s))),
                            ("distance", lambda s: _quotient(_ratio(0, 1)(s), _ratio(3, 4)(s)))):
        ratio, low, high = _estimate(both, statistic)
        rows.append({"factor": name, "ratio": ratio, "low": low, "high": high})
    return pd.DataFrame(rows)


def _two(ex):
    if len(ex.labels) < 2:
        raise Absent("one method is explained here: give another one with --against to compare them")
    return ex.labels
