"""How long the attention of one decode step would take on a GPU: an estimate from what it reads and computes.

A layer takes the larger of bytes / bandwidth and operations / peak (the roofline); layers follow each other. That is a
lower bound: launches, softmax, selection, eviction and everything outside attention are not in it, one sequence is
decoded alone, and the layers are those of the run.
"""

from dataclasses import dataclass

import numpy as np

from .errors import UsageError, nearest
from .tables import pooled

DEFAULT = "H100-SXM"


@dataclass(frozen=True)
class Gpu:
    bandwidth: float  # bytes per second
    peak: float       # operations per second: dense 16-bit tensor cores with float32 accumulation
    memory: float     # bytes
    source: str


GPUS = {
    "A100-80GB": Gpu(2.039e12, 312e12, 80e9, "NVIDIA A100 datasheet, 80GB SXM"),
    "H100-SXM": Gpu(3.35e12, 989.4e12, 80e9, "NVIDIA H100 datasheet, SXM5; half of the figure given with sparsity"),
    "H200": Gpu(4.8e12, 989.4e12, 141e9, "NVIDIA H200 datasheet, SXM; half of the figure given with sparsity"),
    "RTX-4090": Gpu(1.008e12, 165.2e12, 24e9, "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090"),
}


def gpu_named(name):
    """One of GPUS (h100 will do for H100-SXM), or numbers: bandwidth=3.35e12,peak=989e12,memory=80e9."""
    if name in GPUS:
        return GPUS[name]
    if "=" in name:
        return _gpu_of(name)
    found = [g for g in GPUS if g.lower().startswith(name.lower())] if name else []
    if len(found) != 1:
        raise UsageError(f"GPU {name} is none of {', '.join(GPUS)}{nearest(name, GPUS)}; or give its numbers, as "
                         "bandwidth=3.35e12,peak=989e12,memory=80e9")
    return GPUS[found[0]]


def canonical(name):
    """The name of a GPU as the table has it; numbers as they were given."""
    device = gpu_named(name)
    return next((known for known, g in GPUS.items() if g is device), name)


def _gpu_of(text):
    numbers = {}
    for piece in text.split(","):
        key, _, value = piece.partition("=")
        try:
            numbers[key] = float(value)
        except ValueError:
            numbers[key] = np.nan
        if key not in ("bandwidth", "peak", "memory") or not 0 < numbers[key] < np.inf:
            raise UsageError(f"--gpu: in '{piece}' a positive number is missing; write bandwidth=BYTES_PER_SECOND,"
                             "peak=OPERATIONS_PER_SECOND,memory=BYTES")
    if set(numbers) != {"bandwidth", "peak", "memory"}:
        raise UsageError(f"--gpu {text} lacks {', '.join(sorted({'bandwidth', 'peak', 'memory'} - set(numbers)))}")
    return Gpu(**numbers, source="given by the user")


def attention_us(bytes_read, attended, n_kv_heads, group_size, head_dim, v_head_dim, gpu):
    """Microseconds of one layer's attention at one step. bytes_read and attended are of one KV head: of its slots, each
    of the group's query heads multiplies a key and a value, two operations a number."""
    operations = 2.0 * attended * group_size * (head_dim + v_head_dim)
    return 1e6 * n_kv_heads * np.maximum(bytes_read / gpu.bandwidth, operations / gpu.peak)


def shapes(results):
    """{trace: (head_dim, v_head_dim)} as run.json says; traces without are left out."""
    return {t["stem"]: (t["head_dim"], t.get("v_head_dim", t["head_dim"])) for t in results.run.get("traces", [])
            if isinstance(t, dict) and isinstance(t.get("head_dim"), int)}


def step_costs(results):
    """One row per label, budget, trace and layer: what a mean decode step reads of a KV head (bytes_read), the slots it
    attends, and the layer's shape. NaN where the run did not measure one, or does not say head_dim."""
    rows = results.summary[results.summary["metric"].isin(["bytes_read", "attended"])]
    means = pooled(rows, ["label", "budget", "trace", "layer", "metric"])["mean"].unstack("metric")
    frame = means.reindex(columns=["bytes_read", "attended"]).reset_index()
    heads = results.cells.drop_duplicates("trace").set_index("trace")
    known = shapes(results)
    for column in ("n_kv_heads", "group_size"):
        frame[column] = frame["trace"].map(heads[column]).astype(float)
    for i, column in enumerate(("head_dim", "v_head_dim")):
        frame[column] = frame["trace"].map({t: dims[i] for t, dims in known.items()}).astype(float)
    return frame


def decode_us(costs, gpu=DEFAULT, extra_bytes=None):
    """Series over (label, budget): microseconds of a mean decode step, summed over the layers of the run, mean over
    its traces.

    costs         step_costs() of a run, or some of its rows
    extra_bytes   {(label, budget, trace): bytes per KV head} read besides, as a compensator's state
    """
    device = gpu_named(gpu)
    extra = 0.0
    if extra_bytes:
        extra = [extra_bytes.get(at, 0.0) for at in zip(costs["label"], costs["budget"], costs["trace"])]
    us = attention_us(costs["bytes_read"] + extra, costs["attended"], costs["n_kv_heads"], costs["group_size"],
                      costs["head_dim"], costs["v_head_dim"], device)
    per_trace = costs.assign(us=us).groupby(["label", "budget", "trace"], sort=False)["us"].sum(min_count=1)
    return per_trace.groupby(["label", "budget"], sort=False).mean()
