"""Writes a results folder from given numbers: one array (rows, steps) per metric of each cell."""

import json
from types import SimpleNamespace

import fake_results
import h5py
import numpy as np

STEPS, HEADS, KV_HEADS = 160, 4, 2


def cell(label, budget, values, layer=0, trace="t", method=None, group="evictable", foresight="none", compensators="",
         acting="", states=None):
    """values: {metric or metric.compensator: number, (rows,) or (rows, steps)}; a number holds everywhere. states: bytes
    of each compensator as the cell says them; None: as older versions, in run.json alone."""
    return dict(trace=trace, layer=layer, method=method or label, label=label, budget=str(budget),
                budget_tokens=int(budget) if str(budget).isdigit() else -1, foresight=foresight, group=group,
                compensators=compensators, compensator_acting=acting, n_heads=HEADS, n_kv_heads=KV_HEADS,
                group_size=HEADS // KV_HEADS, values=values, **({} if states is None else {"state_bytes": states}))


def write(folder, cells, traces=None, heads=None, run=None, n_steps=STEPS, prompt_len=64):
    """traces: {stem: content_hash}; heads: {(trace, layer): {name: (HEADS,)}}; run: more of run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    traces = traces or {t: f"hash of {t}" for t in dict.fromkeys(c["trace"] for c in cells)}
    rows, columns = [], []
    plan = SimpleNamespace(n_heads=HEADS, n_kv_heads=KV_HEADS, detail=())
    with h5py.File(folder / "results.h5", "w") as file:
        for i, given in enumerate(cells):
            what = {**given, "n_steps": n_steps, "prompt_len": prompt_len}
            values = {name: expand(name, v, n_steps) for name, v in what.pop("values").items()}
            fake_results._put(file, rows, plan, i, what, values)
            columns.append(what)
        group = file.create_group("cells")
        group.attrs["block_steps"] = 64
        for name in columns[0]:
            column = [c[name] for c in columns]
            if isinstance(column[0], str):
                group.create_dataset(name, data=column, dtype=h5py.string_dtype())
            else:
                group.create_dataset(name, data=np.array(column, np.int32))
        for (trace, layer), statistics in (heads or {}).items():
            for name, column in statistics.items():
                file[f"heads/{trace}/{layer:03d}/{name}"] = np.asarray(column, float)
    header = ("trace,layer,kv_head,q_head,method,label,budget,compensator,foresight,metric,n,n_skipped,"
              "mean,std,p50,p90,p99,max")
    (folder / "summary.csv").write_text("\n".join([header, *rows]) + "\n")
    about = [{"stem": t, "content_hash": h, "model_name": "made-up", "head_dim": 8, "v_head_dim": 8,
              "prompt_len": prompt_len, "n_tokens": prompt_len + n_steps,
              "state_bytes": {"mean": 68.0, "moments": 324.0}} for t, h in traces.items()]
    (folder / "run.json").write_text(json.dumps({"complete": True, "failed": [], "traces": about, "methods": [],
                                                 **(run or {})}))
    return folder


def expand(name, values, n_steps):
    rows = KV_HEADS if name.partition(".")[0] in KV else HEADS
    values = np.asarray(values, float)
    return np.array(np.broadcast_to(values[:, None] if values.ndim == 1 else values, (rows, n_steps)))


KV = ("resident", "attended", "bytes", "bytes_read")
fake_results.KV = list(dict.fromkeys([*fake_results.KV, *KV]))
