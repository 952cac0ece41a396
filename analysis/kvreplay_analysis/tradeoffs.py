"""What fidelity costs: quality beside bytes, estimated latency, energy and capacity, for one GPU.

After EffiVLM-Bench (arXiv:2506.00479: performance, generalisation, loyalty) and qMeter (arXiv:2508.16712: performance,
energy and quality together, over workloads), as far as a recorded trace can say it. docs/tradeoffs.md has the formulas.
"""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from . import bootstrap, latency, league
from .errors import Absent, UsageError
from .tables import pooled, pooled_over_traces

ELEMENT_BYTES = {"f32": 4, "float32": 4, "f16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}
COLUMNS = ["label", "compensator", "group", "foresight", "budget", "fidelity", "op", "og", "worst_decile", "least",
           "geometric_mean", "top1_agreement", "top16_jaccard", "error_output", "low", "high", "resident", "bytes",
           "bytes_share", "bytes_read", "tpot_us", "energy_mj", "max_batch", "tokens_per_s", "tokens_per_s_gb", "front",
           "hypervolume"]


@dataclass(frozen=True)
class Workload:
    """How a step is costed. Every number is the user's; the defaults leave out what no source states."""

    gpu: str = latency.DEFAULT
    batch: int = 1
    launch_us: float = 0.0     # per layer and step: to be calibrated on the machine
    pj_per_bit: float = 5.5    # of memory traffic: the middle of the 4 to 7 pJ/bit that is said of HBM
    pj_per_flop: float = 0.0   # of an operation; 0 leaves arithmetic out
    static_watts: float = 0.0  # drawn whatever is done; 0 leaves it out
    weights_gb: float = 0.0    # read once per step for the whole batch, and taken from the memory
    model_layers: int = 0      # layers that the model has; 0: those of the run alone

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "gpu":
                latency.gpu_named(value)
            elif not 0 <= value < float("inf") or (f.name == "batch" and value < 1):
                raise UsageError(f"{f.name} {value} is not a number of at least {int(f.name == 'batch')}")

    def constants(self):
        """The sentence that goes with every number made from them."""
        g = latency.gpu_named(self.gpu)
        left_out = [name for name, x in (("launches", self.launch_us), ("weights", self.weights_gb),
                                         ("arithmetic's energy", self.pj_per_flop),
                                         ("static power", self.static_watts)) if x == 0]
        layers = f"{self.model_layers} layers" if self.model_layers else "the layers of the run"
        out = (f"{latency.canonical(self.gpu)}: {g.bandwidth / 1e12:g} TB/s, {g.peak / 1e12:g} TFLOPS, "
               f"{g.memory / 1e9:g} GB ({g.source}); batch {self.batch}, {layers}, launch {self.launch_us:g} us a layer, weights {self.weights_gb:g} GB; "
               f"{self.pj_per_bit:g} pJ/bit read, {self.pj_per_flop:g} pJ/operation, {self.static_watts:g} W static")
        return out + (f"; left out at 0: {', '.join(left_out)}" if left_out else "")


def step_time(bytes_read, operations, n_layers, weights, gpu, batch=1, launch_us=0.0):
    """Microseconds of a decode step of a batch, by layer: the larger of what is read over the bandwidth and what is
    computed over the peak, plus a launch. bytes_read and operations are of one sequence and one layer; weights, in
    bytes, of the whole model, are read once."""
    layer = np.maximum(batch * bytes_read / gpu.bandwidth, batch * operations / gpu.peak)
    return 1e6 * (n_layers * layer + weights / gpu.bandwidth) + n_layers * launch_us


def step_energy(bytes_read, operations, time_us, w):
    """Millijoules of one step of the whole batch; bytes and operations are those of the batch and of all layers."""
    moved = 8e-12 * w.pj_per_bit * bytes_read + 1e-12 * w.pj_per_flop * operations  # joules
    return 1e3 * moved + 1e-3 * w.static_watts * time_us


def capacity(bytes_per_sequence, memory, weights=0.0):
    """Sequences whose caches fit in the memory beside the weights."""
    free = memory - weights
    return np.where(np.asarray(bytes_per_sequence) > 0,
                    np.floor(np.maximum(free, 0) / np.maximum(bytes_per_sequence, 1e-300)), np.inf)


def fidelity_cells(results, label, budget, compensator=""):
    """F = 1 - mean error_output, not below 0, of each trace, layer and query head: frame trace, layer, q_head, F. With
    a compensator that was measured beside the method, of error_corrected."""
    def grouped():
        rows = results.summary
        rows = rows[rows["metric"].isin(["error_output", "error_corrected"]) & (rows["n"] > 0)]
        cells = rows[["trace", "layer", "q_head", "n"]].assign(error=rows["mean"], F=(1 - rows["mean"]).clip(lower=0))
        return dict(list(cells.groupby([rows["label"], rows["budget"], rows["compensator"]], sort=False)))

    found = results.once("fidelity_cells", grouped).get((label, budget, compensator))
    return pd.DataFrame(columns=["trace", "layer", "q_head", "n", "error", "F"]) if found is None else found


def quality(cells):
    """fidelity and its spread, from fidelity_cells:

    fidelity        mean of F over traces (F of a trace: 1 - its mean error, not below 0)
    op              root of the mean of F^2 over traces: EffiVLM-Bench's performance; kind to what is uneven
    og              standard deviation over mean of F over (trace, layer): its generalisation; 0 is best
    worst_decile    mean F of the worst tenth of the heads of all layers and traces (at least one)
    least, geometric_mean   over (trace, layer): what a root mean square hides
    """
    if cells.empty:
        return dict.fromkeys(["fidelity", "op", "og", "worst_decile", "least", "geometric_mean"], np.nan)

    def f_of(by):
        sums = cells.assign(sum=cells["n"] * cells["error"]).groupby(by, sort=False)[["sum", "n"]].sum()
        return np.clip(1 - (sums["sum"] / sums["n"]).to_numpy(), 0, None)

    traces, layers = f_of(["trace"]), f_of(["trace", "layer"])
    heads = np.sort(cells["F"].to_numpy())
    mean = layers.mean()
    with np.errstate(divide="ignore"):
        geometric = float(np.exp(np.log(layers).mean()))
    return {"fidelity": float(traces.mean()), "op": float(np.sqrt((traces ** 2).mean())),
            "og": float(layers.std() / mean) if mean > 0 else np.nan,
            "worst_decile": float(heads[:max(1, len(heads) // 10)].mean()), "least": float(layers.min()),
            "geometric_mean": geometric}


def contexts_of(results):
    """Series by trace: tokens that the uncompressed cache has at a mean decode step."""
    what = results.cells.drop_duplicates("trace").set_index("trace")
    return what["prompt_len"] + (what["n_steps"] + 1) / 2


def full_bytes(results):
    """Bytes per KV head that the uncompressed cache has at a mean decode step of all traces; NaN where run.json does
    not say what a token weighs."""
    known = {t.get("stem"): t for t in results.run.get("traces", []) if isinstance(t, dict)}

    def slot(trace):
        t = known.get(trace, {})
        each = ELEMENT_BYTES.get(t.get("element"))
        if each is None or not isinstance(t.get("head_dim"), int):
            return np.nan
        return each * (t["head_dim"] + t.get("v_head_dim", t["head_dim"]))

    lengths = contexts_of(results)
    return pooled_over_traces(results, lengths * [slot(t) for t in lengths.index])


def dominated(error, tolerance, *costs):
    """bool (n,): whether some other point is better in error by more than the tolerance and no worse in any cost, or
    no worse in error and in every cost and better in one cost. Points without a number are dominated."""
    error, tolerance = np.asarray(error, float), np.nan_to_num(np.asarray(tolerance, float))
    costs = np.array([np.asarray(c, float) for c in costs])  # (n_costs, n)
    counted = np.isfinite(error) & np.isfinite(costs).all(axis=0)
    out = ~counted
    for i in np.flatnonzero(counted):
        cheap = counted & (costs <= costs[:, [i]]).all(axis=0)
        cheaper = (costs < costs[:, [i]]).any(axis=0)
        out[i] = bool((cheap & ((error < error[i] - tolerance[i]) | ((error <= error[i]) & cheaper))).any())
    return out


def hypervolume(error, size):
    """Area of error below 1 and size below 1 (a share of the full cache) that points leave behind them: 0 is nothing
    gained, 1 would be no error at no bytes."""
    points = sorted((s, e) for s, e in zip(size, error) if np.isfinite(s) and np.isfinite(e) and s < 1 and e < 1)
    area, best = 0.0, 1.0
    for s, e in points:
        if e < best:
            area += (1 - s) * (best - e)
            best = e
    return area


def tradeoffs(results, workload=Workload(), bands=True):
    """One row for every configuration, in the columns COLUMNS:

    fidelity ... geometric_mean   quality()
    top1_agreement, top16_jaccard loyalty to the full cache's attention, where the run measured it
    bytes, bytes_share            kept per KV head; of what the uncompressed cache keeps
    bytes_read                    per KV head and step
    tpot_us, energy_mj            of one step of the whole batch; energy of one token of one sequence
    max_batch, tokens_per_s, tokens_per_s_gb   sequences that fit, and what a full memory decodes, per GB of caches too
    front       on the front of error, bytes kept and bytes read: nothing is better by more than half the interval of
                its error without costing more. Oracles are on no front
    hypervolume of the method's points in error and bytes_share
    """
    costs = league.costs(results, workload.gpu)
    steps = _steps(results)
    gpu, full = latency.gpu_named(workload.gpu), full_bytes(results)
    loyal = pooled(results.summary[results.summary["metric"].isin(["top1_agreement", "top16_jaccard"])],
                   ["label", "budget", "metric"])["mean"].to_dict()
    rows = []
    for c in costs.to_dict("records"):
        cost = _cost(steps[c["label"], c["budget"]], c["bytes"], _state(results, c), workload, gpu)
        low, high = _band(results, c) if bands else (np.nan, np.nan)
        rows.append({**{k: c[k] for k in ("label", "compensator", "group", "foresight", "budget", "error_output",
                                          "resident", "bytes", "bytes_read")},
                     **quality(fidelity_cells(results, c["label"], c["budget"], c["compensator"])),
                     "top1_agreement": loyal.get((c["label"], c["budget"], "top1_agreement"), np.nan),
                     "top16_jaccard": loyal.get((c["label"], c["budget"], "top16_jaccard"), np.nan),
                     "low": low, "high": high, "bytes_share": c["bytes"] / full, **cost})
    frame = pd.DataFrame(rows)
    frame["front"] = False
    real = frame["foresight"] != "oracle"
    part = frame[real]
    half = (part["high"] - part["low"]) / 2
    frame.loc[real, "front"] = ~dominated(part["error_output"], half, part["bytes"], part["bytes_read"])
    volumes = {key: hypervolume(g["error_output"], g["bytes_share"])
               for key, g in frame.groupby(["label", "compensator"], sort=False)}
    frame["hypervolume"] = [volumes[key] for key in zip(frame["label"], frame["compensator"])]
    return frame[COLUMNS]


def _steps(results):
    """{(label, budget): its rows of step_costs}."""
    return dict(list(latency.step_costs(results).groupby(["label", "budget"], sort=False)))


def _state(results, c):
    """Bytes per KV head that a compensator from beside the method keeps and reads."""
    if not c["compensator"]:
        return 0.0
    return league.state_at(results, c["compensator"], c["label"], c["budget"])


def _cost(steps, kept, state, w, gpu):
    """Time, energy and capacity of one configuration, mean over its traces. steps: its rows of step_costs."""
    per_trace = []
    for _, rows in steps.groupby("trace", sort=False):
        heads = rows["n_kv_heads"]
        read = (heads * (rows["bytes_read"] + state)).to_numpy()
        operations = (2.0 * rows["attended"] * heads * rows["group_size"] *
                      (rows["head_dim"] + rows["v_head_dim"])).to_numpy()
        n_layers = w.model_layers or len(rows)
        scale = n_layers / len(rows)  # a layer of the run stands for as many of the model
        weights = 1e9 * w.weights_gb
        held = kept * float(heads.iloc[0]) * n_layers

        def time(batch, read=read, operations=operations, scale=scale, weights=weights):
            return (sum(step_time(r, o, scale, 0.0, gpu, batch, w.launch_us) for r, o in zip(read, operations)) +
                    1e6 * weights / gpu.bandwidth)

        us = time(w.batch)
        energy = step_energy(w.batch * scale * read.sum() + weights, w.batch * scale * operations.sum(), us, w)
        most = float(capacity(held, gpu.memory, weights))
        rate = most / time(most) * 1e6 if 0 < most < np.inf else 0.0
        per_trace.append({"tpot_us": us, "energy_mj": energy / w.batch, "max_batch": most, "tokens_per_s": rate,
                          "tokens_per_s_gb": rate / (most * held / 1e9) if rate > 0 else 0.0})
    return pd.DataFrame(per_trace).mean().to_dict() if per_trace else dict.fromkeys(
        ["tpot_us", "energy_mj", "max_batch", "tokens_per_s", "tokens_per_s_gb"], np.nan)


def _band(results, c):
    mine = results.with_cells((results.cells["label"] == c["label"]) & (results.cells["budget"] == c["budget"]))
    metric = ("error_corrected", c["compensator"]) if c["compensator"] else ("error_output", "")
    return bootstrap.interval(bootstrap.totals(mine, [metric]), bootstrap.mean)[1:]


def winners(results, workload=Workload(), batches=(1, 8, 64), contexts=(), least=0.9):
    """Who decodes fastest where: one row per context and batch with the configuration of the most tokens per second
    among those whose fidelity is at least `least` and whose caches fit; the uncompressed cache counts. Columns context,
    measured (False: a context that was asked for), batch, label, compensator, budget, fidelity, tokens_per_s, and
    n_fitting, the configurations that were good enough and fit.

    Contexts are those of the run's traces, by their mean length. At others costs alone are carried over, with the
    fidelity as it was measured, which is kinder to a budget in tokens the longer the context: what a method keeps grows
    with the context, except slots of a budget in tokens or bytes (a pinned prompt grows, so does what a selection keeps and
    reads to choose).
    """
    from dataclasses import replace as changed

    if not 0 <= least <= 1:
        raise UsageError(f"a fidelity of {least} is not between 0 and 1")
    lengths = contexts_of(results)
    places = [(length, True, results.only(trace=list(lengths.index[lengths == length])))
              for length in sorted(set(lengths))]
    places += [(float(n), False, results) for n in contexts]
    out = []
    for context, measured, scope in places:
        costs = league.costs(scope, workload.gpu)
        costs = costs[costs["foresight"] != "oracle"]
        steps, gpu = _steps(scope), latency.gpu_named(workload.gpu)
        length = pooled_over_traces(scope, contexts_of(scope))
        prompt = pooled_over_traces(scope, scope.cells.drop_duplicates("trace").set_index("trace")["prompt_len"])
        good = [{**c, "fidelity": quality(fidelity_cells(scope, c["label"], c["budget"], c["compensator"]))["fidelity"]}
                for c in costs.to_dict("records")]
        good = [c for c in good if c["fidelity"] >= least]
        for batch in batches:
            best, n = None, 0
            for c in good:
                mine = steps[c["label"], c["budget"]]
                kept, read, attended = at_context(c, mine, 1.0 if measured else context / length, prompt)
                mine = mine.assign(bytes_read=read, attended=attended)
                w = changed(workload, batch=int(batch))
                cost = _cost(mine, kept, _state(scope, c), w, gpu)
                if not cost["max_batch"] >= batch:
                    continue
                n += 1
                rate = 1e6 * batch / cost["tpot_us"]
                if best is None or rate > best[0]:
                    best = rate, c
            rate, won = best or (np.nan, {"label": "", "compensator": "", "budget": "", "fidelity": np.nan})
            out.append({"context": context, "measured": measured, "batch": int(batch),
                        **{name: won[name] for name in ("label", "compensator", "budget", "fidelity")},
                        "tokens_per_s": rate, "n_fitting": n})
    return pd.DataFrame(out)


def at_context(c, steps, factor, prompt):
    """(bytes kept, bytes read by row of steps, slots attended by row) of a configuration in a context `factor` times
    as long."""
    read, attended = steps["bytes_read"], steps["attended"]
    fixed = c["budget"].isdigit() or c["budget"].endswith("B")  # else a share of the prompt, or nothing ever leaves
    if factor == 1 or not fixed:
        return c["bytes"] * factor, read * factor, attended * factor
    slot = c["bytes"] / c["resident"]
    if c["group"] == "selection":
        chosen = np.minimum(read, attended * slot)
        return c["bytes"] * factor, chosen + (read - chosen) * factor, attended
    if c["group"] == "pinned":
        more = prompt * (factor - 1)
        n_sets = np.round(c["resident"] / attended.mean())  # each holds the prompt; heads attend their own
        return c["bytes"] + slot * n_sets * more, read + slot * n_sets * more, attended + more
    return c["bytes"], read, attended


def spans(results):
    """What each span of the traces keeps and loses: one row per configuration and span with keep (share of its tokens
    resident), overall (share of all tokens), lost_mass (share of all attention that goes to its evicted tokens) and
    span_share (lost_mass over evicted_mass). Absent where no trace has spans."""
    rows = results.summary
    names = [m.removeprefix("retention:") for m in dict.fromkeys(rows["metric"]) if m.startswith("retention:")]
    if not names:
        raise Absent("the traces of this run have no spans: name ranges of tokens when capturing (--spans)")
    wanted = [f"{kind}:{n}" for n in names for kind in ("retention", "lost_mass")] + ["evicted_mass", "resident", "attended"]
    means = pooled(rows[rows["metric"].isin(wanted)], ["label", "budget", "metric"])["mean"].to_dict()
    length = pooled_over_traces(results, contexts_of(results))
    out = []
    for what in results.cells.drop_duplicates(["label", "budget"]).itertuples():
        # Of one set: where query heads have sets of their own, `resident` adds them up. What a reader attends is fewer.
        of_set = "resident" if what.group == "selection" else "attended"

        def get(metric, key=(what.label, what.budget)):
            return means.get((*key, metric), np.nan)

        for n in names:
            lost, evicted = get(f"lost_mass:{n}"), get("evicted_mass")
            out.append({"label": what.label, "budget": what.budget, "span": n, "keep": get(f"retention:{n}"),
                        "overall": get(of_set) / length, "lost_mass": lost,
                        "span_share": lost / evicted if evicted > 0 else np.nan})
    return pd.DataFrame(out)


def eviction_bias(results, first=None, second=None):
    """How unevenly two spans are evicted (arXiv:2510.00231): EB = keep of the second - keep of the first at each
    compression ratio, and the area under it. Default: the run's first two spans. Frame: label, first, second, area,
    low_ratio, high_ratio (between which it was measured; the area is divided by their distance) and EB at each
    budget."""
    frame = spans(results)
    names = list(dict.fromkeys(frame["span"]))
    if len(names) < 2:
        raise Absent(f"a bias is between two spans, and the traces have one, {names[0]}")
    first, second = first or names[0], second or next(n for n in names if n != (first or names[0]))
    for n in (first, second):
        if n not in names:
            raise UsageError(f"span {n} is none of {', '.join(names)}")
    out = []
    for label, rows in frame.groupby("label", sort=False):
        table = rows.pivot_table(index="budget", columns="span", values=["keep", "overall"], sort=False)
        ratio = 1 - table["overall"][first].to_numpy()
        bias = (table["keep"][second] - table["keep"][first]).to_numpy()
        order = np.argsort(ratio)
        ratio, bias = ratio[order], bias[order]
        width = ratio[-1] - ratio[0]
        area = float((np.diff(ratio) * (bias[1:] + bias[:-1]) / 2).sum() / width) if width > 0 else float(bias.mean())
        out.append({"label": label, "first": first, "second": second, "area": area, "low_ratio": float(ratio[0]),
                    "high_ratio": float(ratio[-1]),
                    **{f"eb_{b}": float(x) for b, x in zip(table.index[order], bias)}})
    return pd.DataFrame(out)
