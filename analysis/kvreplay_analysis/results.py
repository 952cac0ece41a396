"""Reads a results folder: `load(DIR)` gives a Results, whose frames work as well in a notebook as in the report."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from .errors import Absent, ResultsError, UsageError, nearest

GROUPS = {"evictable": "Prompt evictable", "pinned": "Prompt pinned (pool=decode)", "selection": "Per-step selection"}

SUMMARY_TEXT = ["trace", "method", "label", "budget", "compensator", "foresight", "metric"]
SUMMARY_HEADS = ["kv_head", "q_head"]
SUMMARY_NUMBERS = ["mean", "std", "p50", "p90", "p99", "max"]
SUMMARY_COLUMNS = ["trace", "layer", "kv_head", "q_head", "method", "label", "budget", "compensator", "foresight",
                   "metric", "n", "n_skipped", *SUMMARY_NUMBERS]
CELL_COLUMNS = ["trace", "layer", "method", "label", "budget", "budget_tokens", "foresight", "group", "compensators",
                "compensator_acting", "n_steps", "prompt_len", "n_heads", "n_kv_heads", "group_size"]
NEWER_CELL_COLUMNS = ["state_bytes"]  # which results of older versions lack
HEAD_STATISTICS = ["sink", "local", "far", "entropy", "concentration"]


@dataclass(frozen=True)
class Results:
    """One run.

    run      what run.json says (provenance, traces, methods)
    summary  summary.csv; head columns are -1 where the row is of a higher level
    cells    one row per cell (a method at a budget on a layer of a trace); its index names /blocks and /steps
    """

    folder: Path
    run: dict
    summary: pd.DataFrame
    cells: pd.DataFrame
    block_steps: int
    kept_heads: dict = None  # {(trace, layer): bool (n_heads,)}; None: all heads
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _own(self):
        """What `once` has of exactly these cells: nothing of it is handed on to a Results with others."""
        return {}

    def once(self, key, make):
        """make(), computed at the first call for a key; figures and tables of one page need the same things."""
        if key not in self._own:
            self._own[key] = make()
        return self._own[key]

    @property
    def complete(self):
        return bool(self.run.get("complete", False))

    @cached_property
    def traces(self):
        """Names of the traces that have results, in the order of the run."""
        return list(dict.fromkeys(self.cells["trace"]))

    @cached_property
    def labels(self):
        """The methods as typed, in the order of the run."""
        return list(dict.fromkeys(self.cells["label"]))

    @cached_property
    def budgets(self):
        """Budgets as asked, smallest first; methods without one do not count."""
        asked = self.cells[self.cells["budget"] != ""]
        return list(asked.groupby("budget")["budget_tokens"].mean().sort_values(kind="stable").index)

    @cached_property
    def default_budget(self):
        """The budget that most methods share; of equals the one below the middle, where methods differ most."""
        asked = self.cells[self.cells["budget"] != ""]
        if asked.empty:
            return ""
        n_methods = asked.groupby("budget")["label"].nunique()
        shared = [b for b in self.budgets if n_methods[b] == n_methods.max()]
        return shared[(len(shared) - 1) // 2]

    @cached_property
    def compensators(self):
        """Compensators measured in this run, in order of their sophistication, then of the run."""
        seen = list(dict.fromkeys(c for text in self.cells["compensators"].unique() for c in parts(text)))
        known = ["none", "mean", "moments", "gaussian"]

        def order(c):
            name = c.split(":")[0]
            return known.index(name) if name in known else len(known), seen.index(c)

        return sorted(seen, key=order)

    @cached_property
    def heads(self):
        """Where each query head looks in the uncompressed cache: one row per trace, layer, kv_head and q_head, with
        sink, local, far, entropy and concentration (docs/results.md). Absent in results of older versions."""
        rows = []
        with self._file() as file:
            if "heads" not in file:
                raise Absent(f"{self.folder} does not say where its heads look: it was written by an older kvreplay, "
                             "run it again")
            cells = self.cells.drop_duplicates(["trace", "layer"])
            for trace, layer, group_size in zip(cells["trace"], cells["layer"], cells["group_size"]):
                at = f"heads/{_stored(trace)}/{layer:03d}"
                if at not in file:
                    raise ResultsError(f"{self.folder / 'results.h5'}: /{at} is missing")
                group = file[at]
                columns = {name: group[name][()] for name in HEAD_STATISTICS}
                q_head = np.arange(len(columns["sink"]))
                rows.append(pd.DataFrame({"trace": trace, "layer": int(layer), "kv_head": q_head // group_size,
                                          "q_head": q_head, **columns}))
        return pd.concat(rows, ignore_index=True)

    def only(self, trace=None, layer=None, budget=None, label=None, group=None, head_type=None):
        """The same run with fewer cells. Methods without a budget stay whatever budget is asked for. With head_type
        (sink, local, retrieval or diffuse, see taxonomy.py) rows of other heads are left out: of KV heads those that
        serve none of this type, and what is measured of a whole layer."""
        cells, summary = self.cells, self.summary
        for column, wanted in (("trace", trace), ("layer", layer), ("label", label), ("group", group)):
            if wanted is None:
                continue
            wanted = [wanted] if isinstance(wanted, (str, int, np.integer)) else list(wanted)
            present = list(dict.fromkeys(self.cells[column]))
            for w in wanted:
                if w not in present:
                    raise UsageError(f"{column} {w} is not in {self.folder}, which has "
                                     f"{', '.join(map(str, present))}{nearest(w, present)}")
            cells = cells[cells[column].isin(wanted)]
        if budget is not None:
            if budget != "" and budget not in self.budgets:
                raise UsageError(f"budget {budget} is not in {self.folder}, which has "
                                 f"{', '.join(self.budgets) or 'no budgets'}{nearest(budget, self.budgets)}")
            cells = cells[cells["budget"].isin([budget, ""])]
        if head_type is None and len(cells) == len(self.cells):
            return self
        key = ["trace", "layer", "label", "budget"]
        kept = pd.MultiIndex.from_frame(cells[key])
        summary = summary[pd.MultiIndex.from_frame(summary[key]).isin(kept)]
        fewer = replace(self, cells=cells, summary=summary)
        return fewer if head_type is None else fewer._of_type(head_type)

    def _of_type(self, head_type):
        from .taxonomy import TYPES, types

        if head_type not in TYPES:
            raise UsageError(f"head type {head_type} is none of {', '.join(TYPES)}{nearest(head_type, TYPES)}")
        found = types(self)
        mine = found[found["head_type"] == head_type]
        if mine.empty:
            raise Absent(f"no head of {self.folder} is of type {head_type}; there are "
                         f"{', '.join(t for t in TYPES if (found['head_type'] == t).any())}")
        kept = {at: np.asarray(rows["head_type"] == head_type) for at, rows in found.groupby(["trace", "layer"])}
        if self.kept_heads is not None:
            kept = {key: mask & self.kept_heads[key] for key, mask in kept.items()}
        summary, at = self.summary, ["trace", "layer", "q_head"]
        on_q = pd.MultiIndex.from_frame(summary[at]).isin(pd.MultiIndex.from_frame(mine[at]))
        at[-1] = "kv_head"
        on_kv = pd.MultiIndex.from_frame(summary[at]).isin(pd.MultiIndex.from_frame(mine[at]))
        return replace(self, summary=summary[on_q | (on_kv & (summary["q_head"] < 0))], kept_heads=kept)

    def with_cells(self, chosen):
        """The same run with the cells where `chosen` (bool, one per cell) holds; the summary stays whole."""
        return replace(self, cells=self.cells[np.asarray(chosen)])

    def has(self, metric, compensator=""):
        return (metric, compensator) in self._counted

    @cached_property
    def _counted(self):
        """{(metric, compensator)} of which anything counted."""
        rows = self.summary[self.summary["n"] > 0]
        return set(rows[["metric", "compensator"]].drop_duplicates().itertuples(index=False, name=None))

    def blocks(self, metric, compensator=""):
        """{cell: float64 (n_rows, n_blocks)} of means over blocks of steps; NaN where nothing counted."""
        return self._arrays("blocks", metric, compensator)

    def steps(self, metric, compensator=""):
        """{cell: float32 (n_rows, n_steps)}; empty unless the run was made with --detail steps."""
        return self._arrays("steps", metric, compensator)

    def block_weights(self, cell):
        """Steps in each block of a cell: block_steps, and what is left for the last. Shape (n_blocks,)."""
        n_steps = int(self.cells.at[cell, "n_steps"])
        begin = np.arange(0, n_steps, self.block_steps)
        return np.minimum(n_steps - begin, self.block_steps).astype(float)

    def block_frame(self, metric, compensator=""):
        """Tidy frame of the block means: one row per (cell, row, block), for notebooks."""
        parts = []
        for cell, values in self.blocks(metric, compensator).items():
            head, block = np.indices(values.shape)
            what = self.cells.loc[cell]
            parts.append(pd.DataFrame({
                "trace": what["trace"], "layer": what["layer"], "label": what["label"], "budget": what["budget"],
                "compensator": compensator, "head": head.ravel(), "block": block.ravel(),
                "step": block.ravel() * self.block_steps, metric: values.ravel()}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def evicted_at(self, cell):
        """int32 (n_sets, n_tokens): first decode step without the token, 0 = cut at the prompt, n_steps = never; None
        unless the run was made with --detail retained."""
        return self._read(f"evicted_at/{cell:06d}")

    def attended(self, cell):
        """bool (n_heads, n_steps, n_tokens): what per-step selection attended; None for other methods and unless the
        run was made with --detail retained."""
        packed = self._read(f"attended/{cell:06d}")
        if packed is None:
            return None
        n_tokens = self.evicted_at(cell).shape[1]
        return np.unpackbits(packed, axis=2, count=n_tokens, bitorder="little").astype(bool)

    def outputs(self, cell):
        """(steps, {name: float32 (n_heads, len(steps), v_head_dim)}) with f, f_R, f_E and f_E.COMPENSATOR, NaN where
        there is none; None unless the run was made with --detail outputs."""
        def read(group):
            steps = np.asarray(group.attrs["steps"])
            return steps, {name.replace("%2F", "/").replace("%25", "%"): _array(group, name) for name in group}

        return self._read(f"outputs/{cell:06d}", read)

    def of_cell(self, kind, cell, metric, compensator=""):
        """What blocks() or steps(), as `kind` says, have of one cell, None for nothing; keeps no more in memory."""
        name = _name(metric, compensator)
        arrays = self._cache.get((kind, name), {})
        if cell in arrays:
            values = arrays[cell]
        else:
            with self._file() as file:
                values = _array(file, f"{kind}/{cell:06d}/{name}")
        return values if values is None or self.kept_heads is None else self._masked(cell, values)

    def _arrays(self, kind, metric, compensator):
        name = _name(metric, compensator)
        arrays = self._cache.setdefault((kind, name), {})
        missing = [c for c in self.cells.index if c not in arrays]
        if missing:
            with self._file() as file:
                arrays.update({cell: _array(file, f"{kind}/{cell:06d}/{name}") for cell in missing})
        found = {c: arrays[c] for c in self.cells.index if arrays[c] is not None}
        return found if self.kept_heads is None else {c: self._masked(c, a) for c, a in found.items()}

    def _masked(self, cell, values):
        """Rows of heads that are left out become NaN: not counted, by whatever follows."""
        what = self.cells.loc[cell]
        heads = self.kept_heads[(what["trace"], what["layer"])]
        rows = (heads if len(values) == len(heads) else
                heads.reshape(len(values), -1).any(axis=1) if len(values) == what["n_kv_heads"] else [False])
        return np.where(np.reshape(rows, (-1, 1)), values, np.nan)

    def _read(self, at, read=lambda item: item[()]):
        with self._file() as file:
            item = file.get(at)
            return None if item is None else read(item)

    @contextmanager
    def opened(self):
        """results.h5 stays open inside this, for this Results and those made from it: many small reads are faster."""
        with self._file() as file:
            outer, self._cache["file"] = self._cache.get("file"), file
            try:
                yield
            finally:
                self._cache["file"] = outer

    @contextmanager
    def _file(self):
        path = self.folder / "results.h5"
        try:
            if self._cache.get("file"):
                yield self._cache["file"]
                return
            with h5py.File(path, "r") as file:
                yield file
        except OSError as error:
            raise ResultsError(f"{path} cannot be read: {_first_line(error)}") from error


def _array(group, at):
    """What group[at][()] is, None where there is nothing; for many small arrays in a third of the time."""
    try:
        data = h5py.h5d.open(group.id, at.encode())
    except KeyError:
        if at in group:
            raise
        return None
    out = np.empty(data.shape, data.dtype)
    data.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    return out


def _name(metric, compensator):
    return _stored(f"{metric}.{compensator}" if compensator else metric)


def _stored(name):
    """A name as it stands in the file, where "/" separates groups."""
    return name.replace("%", "%25").replace("/", "%2F")


def load(folder):
    """Reads DIR as `kvreplay run --out DIR` wrote it; ResultsError says in one sentence what is wrong with it."""
    folder = Path(folder)
    if not folder.exists():
        raise UsageError(f"{folder} does not exist; give the folder that `kvreplay run --out` wrote")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; give the folder that `kvreplay run --out` wrote")
    absent = [n for n in ("run.json", "summary.csv", "results.h5") if not (folder / n).is_file()]
    if absent:
        last = "; a run that ended has written run.json" if "run.json" in absent else ""
        raise UsageError(f"{folder} is not a results folder: it has no {' and no '.join(absent)}{last}")
    run = _read_run(folder / "run.json")
    cells, block_steps = _read_cells(folder / "results.h5")
    return Results(folder, run, _read_summary(folder / "summary.csv"), cells, block_steps)


def parts(text):
    """A comma list of parts; a piece with '=' and no ':' continues the element before it (a:x=1,y=2,b is a and b)."""
    out = []
    for piece in text.split(",") if text else []:
        if out and "=" in piece and ":" not in piece.split("=")[0]:
            out[-1] += "," + piece
        else:
            out.append(piece)
    return out


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_run(path):
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is not readable JSON: {_first_line(error)}") from error
    if not isinstance(run, dict):
        raise ResultsError(f"{path}: expected an object, found {type(run).__name__}")
    return run


def _read_summary(path):
    try:
        frame = pd.read_csv(path, dtype={c: str for c in SUMMARY_TEXT}, keep_default_na=False,
                            na_values={c: ["", "nan", "NaN", "-nan"] for c in [*SUMMARY_HEADS, *SUMMARY_NUMBERS]})
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is not readable CSV: {_first_line(error)}") from error
    lacking = [c for c in SUMMARY_COLUMNS if c not in frame.columns]
    if lacking:
        raise ResultsError(f"{path}: column {lacking[0]} is missing")
    try:
        frame[SUMMARY_HEADS] = frame[SUMMARY_HEADS].fillna(-1).astype(int)
        frame[["layer", "n", "n_skipped"]] = frame[["layer", "n", "n_skipped"]].astype(int)
        frame[SUMMARY_NUMBERS] = frame[SUMMARY_NUMBERS].astype(float)
    except (ValueError, TypeError) as error:
        raise ResultsError(f"{path} holds something that is not a number: {_first_line(error)}") from error
    return frame


def _read_cells(path):
    try:
        with h5py.File(path, "r") as file:
            if "cells" not in file:
                raise ResultsError(f"{path}: /cells is missing")
            group = file["cells"]
            block_steps = int(group.attrs.get("block_steps", file.attrs.get("block_steps", 64)))
            columns = {}
            for name in [*CELL_COLUMNS, *NEWER_CELL_COLUMNS]:
                if name not in group and name in NEWER_CELL_COLUMNS:
                    continue
                if name not in group:
                    raise ResultsError(f"{path}: /cells/{name} is missing")
                data = group[name]
                columns[name] = (data.asstr()[()].astype(object) if h5py.check_string_dtype(data.dtype)
                                 else data[()])
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {_first_line(error)}") from error
    lengths = {name: len(c) for name, c in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ResultsError(f"{path}: /cells columns differ in length: {lengths}")
    if not lengths["trace"]:
        raise ResultsError(f"{path} holds no cells: the run ended before the first one was done")
    return pd.DataFrame(columns).infer_objects(), block_steps
