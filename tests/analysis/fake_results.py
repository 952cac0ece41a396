"""Writes a results folder in the form that `kvreplay run` writes, from a seeded random process.

For testing the report's arithmetic and layout only: the numbers are made up, and whoever reads them is warned by the
name of the model.
"""

import json
from dataclasses import dataclass, field

import h5py
import numpy as np

HEAD = ["error_output", "error", "evicted_mass", "cos_retained_evicted", "directional_mismatch"]
KV = ["resident", "attended", "bytes"]


@dataclass
class Plan:
    methods: list = field(default_factory=lambda: [
        # label, canonical method, group, foresight
        ("full", "full", "evictable", "none"), ("random", "random", "evictable", "none"),
        ("streaming", "streaming", "evictable", "none"), ("h2o", "h2o", "evictable", "none"),
        ("tova", "tova", "evictable", "none"), ("snapkv", "snapkv", "evictable", "none"),
        ("momentkv", "residual+adakv+moments", "evictable", "none"), ("residual", "residual", "evictable", "none"),
        ("h2o:window=16+adakv", "h2o:window=16+adakv", "evictable", "none"),
        ("oracle_mass", "oracle_mass", "evictable", "oracle"),
        ("momentum", "momentum", "pinned", "none"), ("moment-kv", "momentum:alpha=0.95", "pinned", "none"),
        ("h2o:pool=decode", "h2o:pool=decode", "pinned", "none"),
        ("residual:pool=decode", "residual:pool=decode", "pinned", "none"),
        ("full+quest:page=16", "full+quest:page=16", "selection", "none")])
    budgets: list = field(default_factory=lambda: [32, 64, 128, 256])
    traces: list = field(default_factory=lambda: [("story", "made-up-model", 512, 512)])  # name, model, prompt, steps
    layers: list = field(default_factory=lambda: [0, 4, 8, 11])
    n_heads: int = 8
    n_kv_heads: int = 4
    compensators: list = field(default_factory=lambda: ["mean", "moments", "gaussian"])
    detail: tuple = ()  # of steps, retained, outputs
    output_steps: tuple = (10, 100, 300)
    complete: bool = True
    seed: int = 3


def write(folder, plan=None):
    plan = plan or Plan()
    rng = np.random.default_rng(plan.seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows, cells = [], []
    with h5py.File(folder / "results.h5", "w") as file:
        for trace, _, prompt_len, n_steps in plan.traces:
            for label, method, group, foresight in plan.methods:
                asked = [None] if label == "full" else plan.budgets
                for budget in asked:
                    for layer in plan.layers:
                        cell = dict(trace=trace, layer=layer, method=method, label=label,
                                    budget="" if budget is None else str(budget), budget_tokens=budget or -1,
                                    foresight=foresight, group=group,
                                    compensators="" if budget is None else ",".join(plan.compensators),
                                    compensator_acting="moments" if method.endswith("+moments") else "",
                                    n_steps=n_steps, prompt_len=prompt_len, n_heads=plan.n_heads,
                                    n_kv_heads=plan.n_kv_heads, group_size=plan.n_heads // plan.n_kv_heads)
                        values = _steps(rng, plan, cell, budget)
                        _put(file, rows, plan, len(cells), cell, values)
                        _put_details(file, plan, len(cells), cell)
                        cells.append(cell)
        where = np.random.default_rng(plan.seed + 1)  # of its own, so that the cells' numbers stay what they are
        for trace, *_ in plan.traces:
            for layer in plan.layers:
                sink, local, far = where.dirichlet((1, 1, 1), plan.n_heads).T
                for name, column in (("sink", sink), ("local", local), ("far", far),
                                     ("entropy", where.uniform(0, 1, plan.n_heads)),
                                     ("concentration", where.uniform(0, 0.8, plan.n_heads))):
                    file[f"heads/{trace}/{layer:03d}/{name}"] = column
        group = file.create_group("cells")
        group.attrs["block_steps"] = 64
        for name in cells[0] if cells else []:
            column = [c[name] for c in cells]
            if isinstance(column[0], str):
                group.create_dataset(name, data=column, dtype=h5py.string_dtype())
            else:
                group.create_dataset(name, data=np.array(column, np.int32))
    header = ("trace,layer,kv_head,q_head,method,label,budget,compensator,foresight,metric,n,n_skipped,"
              "mean,std,p50,p90,p99,max")
    (folder / "summary.csv").write_text("\n".join([header, *rows]) + "\n")
    run = {
        "version": "0.1.0", "git": "0" * 12, "build_flags": "-O3", "argv": ["kvreplay", "run", "story.h5"],
        "host": "a <host> & co", "threads": 2, "seed": 0, "complete": plan.complete, "wall_s": 12.5,
        "started_utc": "2026-01-01T00:00:00Z",
        "traces": [{"path": f"{t}.h5", "stem": t, "name": m, "content_hash": "f" * 16, "model_name": m,
                    "architecture": "llama", "provenance": "made up by the tests", "n_tokens": p + s, "prompt_len": p,
                    "element": "float16", "head_dim": 64, "layers": plan.layers,
                    "layers_skipped": [{"layer": 12, "reason": "sliding window 256 is shorter than the trace"}]}
                   for t, m, p, s in plan.traces],
        "methods": [{"label": a, "method": m, "group": g, "foresight": f, "paper": "2306.14048", "deviation": ""}
                    for a, m, g, f in plan.methods],
        "budgets": [str(b) for b in plan.budgets], "metrics": HEAD + KV, "compensators": plan.compensators,
        "open_loop": "Queries come from the uncompressed run, so errors do not compound across layers and steps."}
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    return folder


def _steps(rng, plan, cell, budget):
    """{metric or metric.compensator: (rows, n_steps)} with NaN where a step does not count."""
    n_heads, n_kv, n_steps = plan.n_heads, plan.n_kv_heads, cell["n_steps"]
    if budget is None:
        zero = np.zeros((n_heads, n_steps))
        return {"error_output": zero, "error": zero, "evicted_mass": zero,
                "cos_retained_evicted": np.full_like(zero, np.nan), "directional_mismatch": np.full_like(zero, np.nan),
                "resident": np.broadcast_to(cell["prompt_len"] + np.arange(n_steps) + 1.0, (n_kv, n_steps)),
                "bytes": np.broadcast_to(256.0 * (cell["prompt_len"] + np.arange(n_steps)), (n_kv, n_steps))}
    quality = {"random": 1.6, "streaming": 1.4, "h2o": 1.0, "tova": 0.9, "snapkv": 1.1, "momentkv": 0.8,
               "residual": 0.82, "oracle_mass": 0.4}.get(cell["label"], 0.7 + 0.03 * (len(cell["label"]) % 9))
    depth = 1.0 if cell["layer"] == 0 else 0.45
    level = quality * depth * 0.35 * (32 / budget) ** 0.5
    walk = np.cumsum(rng.normal(0, 0.02, (n_heads, n_steps)), axis=1)
    mass = np.clip(level * np.exp(rng.normal(0, 0.3, (n_heads, 1)) + walk), 1e-7, 0.98)
    empty = np.zeros((n_heads, n_steps), bool)
    if cell["group"] == "pinned":
        empty[:, :budget] = True
    mass[empty] = 0.0
    cosine = np.clip(0.2 + rng.normal(0, 0.25, mass.shape) + 0.02 * cell["layer"], -1, 1)
    cosine[mass < 1e-6] = np.nan
    error = np.where(empty, 0.0, mass * np.exp(rng.normal(0.4, 0.15, mass.shape)))
    out = {"evicted_mass": mass, "error": error, "cos_retained_evicted": cosine, "directional_mismatch": 1 - cosine}
    for c, left in zip(plan.compensators, (0.85, 0.6, 0.52)):
        out[f"error_corrected.{c}"] = error * left * np.exp(rng.normal(0, 0.12, mass.shape))
    out["error_output"] = out["error_corrected.moments"] if cell["compensator_acting"] else error
    resident = np.full((n_kv, n_steps), float(budget))
    if cell["group"] == "pinned":
        resident = cell["prompt_len"] + np.minimum(np.arange(n_steps) + 1.0, budget) + np.zeros((n_kv, 1))
    elif cell["group"] == "selection":
        resident = cell["prompt_len"] + np.arange(n_steps) + 1.0 + np.zeros((n_kv, 1))
    out["resident"], out["attended"], out["bytes"] = resident, resident + 1, resident * 256
    return out


def _put(file, rows, plan, index, cell, values):
    group_size = plan.n_heads // plan.n_kv_heads
    for name, steps in values.items():
        steps = np.asarray(steps, float)
        metric, _, compensator = name.partition(".")
        n_steps = steps.shape[1]
        begin = np.arange(0, n_steps, 64)
        counted = np.isfinite(steps)
        n = np.add.reduceat(counted, begin, axis=1)
        with np.errstate(invalid="ignore"):
            blocks = np.add.reduceat(np.where(counted, steps, 0.0), begin, axis=1) / np.where(n > 0, n, np.nan)
        file[f"blocks/{index:06d}/{name}"] = blocks
        if "steps" in plan.detail:
            file[f"steps/{index:06d}/{name}"] = steps.astype(np.float32)
        whole = _stats(steps.T) if counted.all() else None
        for r in range(steps.shape[0]):
            n_counted = int(counted[r].sum())
            kv, q = (r, "") if metric in KV else (r // group_size, r)
            stats = whole[:, r] if whole is not None else _stats(steps[r][counted[r]]) if n_counted else [np.nan] * 6
            text = [cell["trace"], cell["layer"], kv, q, cell["method"], cell["label"], cell["budget"], compensator,
                    cell["foresight"], metric, n_counted, n_steps - n_counted,
                    *("" if np.isnan(s) else repr(float(s)) for s in stats)]
            rows.append(",".join(f'"{t}"' if "," in str(t) else str(t) for t in text))


def _stats(x):
    """mean, std, p50, p90, p99, max over the first axis."""
    return np.array([x.mean(axis=0), x.std(axis=0), *np.quantile(x, [0.5, 0.9, 0.99], axis=0), x.max(axis=0)])


def _put_details(file, plan, index, cell):
    """What --detail retained and outputs add: eviction times, attended bits, output vectors that obey the identity."""
    rng = np.random.default_rng([plan.seed, index])
    n_steps, prompt_len, budget = cell["n_steps"], cell["prompt_len"], cell["budget_tokens"]
    n_heads, n_tokens = plan.n_heads, prompt_len + n_steps
    if "retained" in plan.detail:
        born = np.maximum(0, np.arange(n_tokens) - prompt_len)
        out = np.full((plan.n_kv_heads, n_tokens), n_steps, np.int32)
        if budget > 0 and cell["group"] != "selection":
            life = rng.geometric(1.0 / budget, out.shape)
            out = np.minimum(born + life, n_steps).astype(np.int32)
            out[:, :prompt_len] = (n_steps if cell["group"] == "pinned" else
                                   np.where(rng.random((plan.n_kv_heads, prompt_len)) < budget / prompt_len, n_steps,
                                            0))
        file[f"evicted_at/{index:06d}"] = out
        if cell["group"] == "selection":
            bits = rng.random((n_heads, n_steps, n_tokens)) < budget / n_tokens
            bits &= np.arange(n_steps)[:, None] >= born
            file[f"attended/{index:06d}"] = np.packbits(bits, axis=2, bitorder="little")
    if "outputs" in plan.detail:
        steps = np.array([s for s in plan.output_steps if s < n_steps], np.int32)
        shape = (n_heads, len(steps), 16)
        f_r, f_e = rng.normal(size=shape), 2 * rng.normal(size=shape)
        w = rng.uniform(0.05, 0.4, shape[:2])[..., None]
        lost = budget > 0 and (cell["group"] != "pinned" or steps >= budget)
        lost = np.broadcast_to(np.asarray(lost).reshape(1, -1, 1), (n_heads, len(steps), 1))
        vectors = {"f": np.where(lost, (1 - w) * f_r + w * f_e, f_r), "f_R": f_r, "f_E": np.where(lost, f_e, np.nan)}
        for c in plan.compensators if budget > 0 else []:
            vectors[f"f_E.{c}"] = np.where(lost, f_e + rng.normal(0, 0.5, shape), np.nan)
        group = file.create_group(f"outputs/{index:06d}")
        group.attrs["steps"] = steps
        for name, values in vectors.items():
            group[name.replace("%", "%25").replace("/", "%2F")] = values.astype(np.float32)
