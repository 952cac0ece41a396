"""What the page holds of single heads: curves, worst steps, retained positions and principal planes.

A run of a hundred configurations on a large model has more of this than a page should weigh, so configurations are
embedded in the order in which they are looked at first, for as long as there is room; the page says what was left out.
"""

import numpy as np

from .figures import head, pca, raster
from .figures.common import rounded, shown_first

CURVES = 0.6   # of the room, for curves, before anything else has any
DIGITS = 3     # of a number, all significant
N_POINTS = 32  # points of a curve at most; neighbouring blocks are averaged where there are more
KINDS = {"head": "curves", "pca": "principal planes", "raster": "retained positions"}


def order(results):
    """[(trace, label, budget)]: configurations as they are wanted first: those at the default budget, then at others by
    their distance from it, the methods as figures show them."""
    budgets = results.budgets
    middle = budgets.index(results.default_budget) if budgets else 0
    near = sorted(budgets, key=lambda b: abs(budgets.index(b) - middle))
    labels = shown_first(results, results.labels)
    known = set(results.cells[["trace", "label", "budget"]].drop_duplicates().itertuples(index=False, name=None))
    wanted = [(t, label, b) for b in [*near[:1], "", *near[1:]] for label in labels for t in results.traces]
    return [w for w in wanted if w in known]


def pack(results, packed, room):
    """({key: blob}, kinds that did not all fit) with at most `room` bytes of blobs.

    Keys are KIND/TRACE/LABEL/BUDGET; `packed` turns a value into a blob. Curves come first: they may fill CURVES of the
    room before the other kinds share what is left, and have what these leave over.
    """
    of = {"head": _head, "raster": _raster, "pca": _pca}
    wanted = {kind: order(results) for kind in of}
    by_layer = results.cells.sort_values("layer", kind="stable")
    cells = by_layer.groupby(["trace", "label", "budget"]).groups
    blobs = {}
    for kind, part in (("head", CURVES), ("raster", 0.5), ("pca", 1.0), ("head", 1.0), ("raster", 1.0)):
        mine = part * room
        while wanted[kind]:
            value = of[kind](results, cells[wanted[kind][0]])
            blob = packed(value) if value is not None else ""
            if len(blob) > mine:
                break
            configuration = wanted[kind].pop(0)
            if blob:
                blobs["/".join((kind, *configuration))] = blob
                mine -= len(blob)
                room -= len(blob)
    return blobs, {kind for kind, rest in wanted.items() if rest}


def _head(results, cells):
    """Curves of all layers and heads of a configuration (its cells by layer), as lists [layer][head][point], and its
    worst steps where it has steps; the worst points of a curve are seen from the curve."""
    layers, curves, bad, step = [], {}, {}, None
    for cell in cells:
        blocks = head.arrays(results, cell)
        if "error_output" not in blocks:
            continue
        weights = results.block_weights(cell)
        layers.append(int(results.cells.at[cell, "layer"]))
        merge = -(-len(weights) // N_POINTS)
        begin = np.arange(0, len(weights), merge)
        for name, values in blocks.items():
            curves.setdefault(name, {})[len(layers) - 1] = _nested(_merged(values, weights, begin))
        if step is None:
            first = begin * results.block_steps
            step = rounded(first + np.add.reduceat(weights, begin) / 2)
            begins = first.tolist()
        of, steps, picked = head.worst(results, cell, blocks)
        for name, values in {"step": steps, **picked}.items() if of == "steps" else []:
            bad.setdefault(name, {})[len(layers) - 1] = values.tolist() if name == "step" else _nested(values)
    if not layers:
        return None

    def by_layer(columns):
        return {name: [found.get(i) for i in range(len(layers))] for name, found in columns.items()}

    return {"layers": layers, "step": step, "begin": begins, "curves": by_layer(curves), "worst": by_layer(bad),
            "block_steps": merge * results.block_steps}


def _merged(values, weights, begin):
    """Means over groups of neighbouring blocks, weighted by their steps: (n_heads, n_blocks) to (n_heads, len(begin))."""
    if len(begin) == len(weights):
        return values
    counted = np.isfinite(values) * weights
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.add.reduceat(np.where(np.isfinite(values), values, 0.0) * weights, begin, axis=1) /
                np.add.reduceat(counted, begin, axis=1))


def _raster(results, cells):
    """Share retained, in per cent, as lists [layer][set][token bin][step bin]; −1 where no token is written."""
    layers, share, tokens, steps, sets = [], [], None, None, []
    for cell in cells:
        found = raster.of_cell(results, cell)
        if found is None:
            continue
        tokens, steps, values = found
        layers.append(int(results.cells.at[cell, "layer"]))
        share.append(np.where(np.isfinite(values), np.round(100 * np.nan_to_num(values)), -1).astype(int).tolist())
        n_heads = int(results.cells.at[cell, "n_heads"])
        sets.append([int(raster.set_of_head(results, cell, h, len(values))) for h in range(n_heads)])
    if not layers:
        return None
    return {"layers": layers, "sets": sets, "tokens": tokens.tolist(), "steps": steps.tolist(), "share": share}


def _pca(results, cells):
    """Coordinates, true lengths and angles of the output vectors, as lists [layer][head][step][...]."""
    out = {"layers": [], "names": None, "steps": None}
    parts = ("xy", "length", "in_plane", "angle", "explained", "error", "evicted_mass")
    out.update({part: [] for part in parts})
    for cell in cells:
        found = pca.of_cell(results, cell)
        if found is None or not np.isfinite(found["error"]).any():
            continue
        out["layers"].append(int(results.cells.at[cell, "layer"]))
        found["angle"] = pca.degrees(found["cos"][..., 1:])  # to f_R and f_E; a rounded cosine would lose small ones
        out["names"], out["steps"] = found["names"], found["steps"].tolist()
        for part in parts:
            out[part].append(_nested(found[part]))
    if not out["layers"]:
        return None
    out["shown"] = [pca.shown(n) for n in out["names"]]
    out["looks"] = [pca.look(n)[0] for n in out["names"]]
    return out


def _nested(values):
    """Lists of rounded numbers in the shape of an array, None where there is no number."""
    flat = np.array(rounded(values, DIGITS), dtype=object)
    return flat.reshape(np.shape(values)).tolist()


def sentence(results, blobs, full):
    """What of it the page holds, in words; '' where everything is there."""
    if not full:
        return ""
    parts = [f"the {what} of {sum(key.startswith(kind + '/') for key in blobs)}" for kind, what in KINDS.items()
             if kind in full]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return (f"To stay small, this page holds {text} of the {len(order(results))} configurations (methods, budgets and "
            "traces), those at the default budget first; kvreplay figure head, raster or pca DIR --method LABEL "
            "--budget B --layer L --head H draws any.")
