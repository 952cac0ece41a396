"""Read and write kvreplay traces with h5py and numpy alone.

    import kvtrace
    kvtrace.write("t.h5", q=q, k=k, v=v, token_ids=ids, prompt_len=512, attention_scale=64 ** -0.5, rope_theta=1e4)
    trace = kvtrace.open("t.h5")
    keys = trace.k(layer=4)          # float32 [n_kv_heads, n_tokens, head_dim]

The format is docs/trace_format.md; `kvreplay verify` checks what was written.
"""

import datetime
import hashlib
import json
import os
import uuid as _uuid

import h5py
import numpy as np

__all__ = ["Trace", "open", "write", "add_scores", "content_hash", "evicted_at_from_kept", "write_evicted_at",
           "read_evicted_at"]

_LIBVER = ("v108", "v110")  # metadata with checksums, readable by every HDF5 since 1.8
_ELEMENTS = ("f16", "bf16", "f32")


# --- element types ---------------------------------------------------------------------------------------------------

def _bfloat16_type():
    """HDF5's true float type for bfloat16, which numpy lacks."""
    t = h5py.h5t.IEEE_F32LE.copy()
    t.set_fields(15, 7, 8, 0, 7)
    t.set_precision(16)
    t.set_size(2)
    t.set_ebias(127)
    return t


def _element(dataset):
    """'f16', 'bf16' or 'f32' of a dataset."""
    t = dataset.id.get_type()
    if isinstance(t, h5py.h5t.TypeFloatID):
        if t.get_size() == 2:
            return "bf16" if t.get_ebias() == 127 else "f16"
        if t.get_size() == 4:
            return "f32"
    raise ValueError(f"{dataset.name}: expected float16, bfloat16 or float32, found {dataset.dtype}")


def _to_bits(values):
    """float32 -> bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _read(dataset, rows=slice(None), head=None, raw=False):
    """Rows of a [heads, rows, width] dataset as float32, or as stored with `raw` (bfloat16 as uint16).

    HDF5 converts bfloat16 at some 40 MB/s, so its bits are read as they are and shifted here.
    """
    if _element(dataset) != "bf16":
        out = dataset[:, rows] if head is None else dataset[head, rows]
        return out if raw else out.astype(np.float32)
    heads = range(dataset.shape[0]) if head is None else [head]
    begin, end, _ = rows.indices(dataset.shape[1])
    shape = (len(heads), max(end - begin, 0)) + dataset.shape[2:]
    bits = np.empty(shape, np.uint16)
    if bits.size:
        space = dataset.id.get_space()
        space.select_hyperslab((heads[0], begin) + (0,) * (dataset.ndim - 2), shape)
        dataset.id.read(h5py.h5s.create_simple(shape), space, bits, mtype=dataset.id.get_type())
    bits = bits if head is None else bits[0]
    return bits if raw else (bits.astype(np.uint32) << 16).view(np.float32)


def _as_numpy(array):
    """numpy arrays as they are; torch tensors through float32, since numpy has no bfloat16."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()
    return np.asarray(array)


def _create(group, name, array, element):
    array = _as_numpy(array)
    if not np.isfinite(array).all():
        raise ValueError(f"{group.name}/{name}: expected finite values")
    if element == "bf16":
        bits = np.ascontiguousarray(_to_bits(array.astype(np.float32)))
        space = h5py.h5s.create_simple(bits.shape)
        dataset = h5py.h5d.create(group.id, name.encode(), _bfloat16_type(), space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=_bfloat16_type())
        return group[name]
    stored = array.astype({"f16": np.float16, "f32": np.float32}[element])
    if not np.isfinite(stored).all():
        raise ValueError(f"{group.name}/{name}: a value does not fit {element}; use bf16 or f32")
    return group.create_dataset(name, data=stored)


# --- reading ---------------------------------------------------------------------------------------------------------

class Trace:
    """One trace, open for reading. Arrays come as float32; `n_tokens` counts the valid tokens."""

    def __init__(self, path):
        self.file = h5py.File(path, "r", locking=False)
        f = self.file
        if f.attrs.get("format") not in ("kvtrace", b"kvtrace"):
            raise ValueError(f"{path}: this HDF5 file is not a trace")
        self.model = {name: _plain(value) for name, value in f["model"].attrs.items()}
        self.rope = ({name: _plain(value) for name, value in f["model/rope"].attrs.items()}
                     if "rope" in f["model"] else None)
        self.n_tokens = int(np.asarray(f["n_valid"][()]).reshape(-1)[0])
        self.token_ids = f["tokens/id"][: self.n_tokens].astype(np.int32)
        self.positions = f["tokens/position"][: self.n_tokens].astype(np.int32)
        self.phase = f["tokens/phase"][: self.n_tokens].astype(np.uint8)
        self.prompt_len = int(self.n_tokens if (self.phase == 0).all() else np.argmax(self.phase != 0))
        self.layers = sorted(int(name) for name in f["layers"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()

    def group(self, layer):
        return self.file[f"layers/{layer:03}"]

    def element(self):
        return _element(self.group(self.layers[0])["k"])

    def k(self, layer, kv_head=None):
        """[n_kv_heads, n_tokens, head_dim], or one head of it."""
        return _read(self.group(layer)["k"], slice(0, self.n_tokens), kv_head)

    def v(self, layer, kv_head=None):
        """[n_kv_heads, n_tokens, v_head_dim], or one head of it."""
        return _read(self.group(layer)["v"], slice(0, self.n_tokens), kv_head)

    def q_index(self, layer):
        """Tokens whose queries are stored, ascending."""
        return self._index(layer, "q", "q_index")

    def q(self, layer, head=None):
        """[n_heads, len(q_index), head_dim], or one head of it."""
        return _read(self.group(layer)["q"], slice(0, len(self.q_index(layer))), head)

    def out_index(self, layer):
        return self._index(layer, "out", "out_index")

    def out(self, layer, head=None):
        """The engine's own attention output [n_heads, len(out_index), v_head_dim]."""
        return _read(self.group(layer)["out"], slice(0, len(self.out_index(layer))), head)

    def w_o(self, layer):
        """[hidden, n_heads * v_head_dim], or None."""
        return _read(self.group(layer)["w_o"]) if "w_o" in self.group(layer) else None

    def score_names(self, layer):
        return sorted(self.group(layer)["scores"]) if "scores" in self.group(layer) else []

    def scores(self, layer, name):
        """[n_kv_heads, n_tokens]"""
        return _read(self.group(layer)["scores"][name], slice(0, self.n_tokens))

    def _index(self, layer, array, index):
        group = self.group(layer)
        if array not in group:
            return np.zeros(0, np.int32)
        all_rows = np.arange(self.n_tokens) if index not in group else group[index][:]
        return all_rows[all_rows < self.n_tokens].astype(np.int32)


def _plain(value):
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def open(path):  # noqa: A001  (kvtrace.open is the name people expect)
    """Opens a trace for reading; see Trace."""
    return Trace(path)


# --- writing ---------------------------------------------------------------------------------------------------------

def write(path, *, q, k, v, token_ids, prompt_len, attention_scale, n_layers=None, rope_theta=None, rope_style="half",
          inv_freq=None, rotary_dim=None, attention_factor=1.0, dtype=None, q_index=None, positions=None, out=None,
          out_index=None, w_o=None, scores=None, spans=None, logprob=None, pieces=None, sliding_window=None,
          logit_softcap=0.0, qk_norm=False, model_name="unknown", architecture="", config=None, provenance="",
          compress=False):
    """Writes one sequence. The file appears whole or not at all.

    q, k, v      {layer: array}: q [n_heads, n_queries, head_dim], k [n_kv_heads, n_tokens, head_dim],
                 v [n_kv_heads, n_tokens, v_head_dim], as they enter attention (after QK-norm and RoPE)
    dtype        "f16", "bf16" or "f32"; default: f32 for float32 and float64 arrays, bf16 for torch's, else f16
    q_index      tokens whose queries are given, where these are not all
    inv_freq     rotary frequencies; or rope_theta, from which they follow; neither: keys are not rotated
    out, w_o     {layer: array}: outputs [n_heads, len(out_index), v_head_dim]; [hidden, n_heads * v_head_dim]
    scores       {name: {layer: [n_kv_heads, n_tokens]}}: any external scorer, for `--method given:scores=NAME`
    spans        [(name, begin, end)]: half-open token ranges
    """
    layers = sorted(k)
    if not layers or sorted(v) != layers or sorted(q) != layers:
        raise ValueError("q, k and v must have the same layers, and at least one")
    first_k, first_v, first_q = (_as_numpy(a[layers[0]]) for a in (k, v, q))
    token_ids = np.asarray(token_ids, np.int32)
    n_tokens = len(token_ids)
    n_kv_heads, _, head_dim = first_k.shape
    n_heads, v_head_dim = first_q.shape[0], first_v.shape[2]
    n_queries = n_tokens if q_index is None else len(q_index)
    if not 1 <= prompt_len <= n_tokens:
        raise ValueError(f"prompt_len {prompt_len} must be from 1 to the {n_tokens} tokens")
    if dtype is None:
        source = str(getattr(k[layers[0]], "dtype", first_k.dtype))
        dtype = "bf16" if "bfloat16" in source else "f16" if source.endswith("float16") else "f32"
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype {dtype!r} is unknown; allowed are f16, bf16 and f32")
    n_layers = n_layers or layers[-1] + 1

    part = f"{path}.part"
    try:
        with h5py.File(part, "w", libver=_LIBVER) as f:
            f.attrs.update(format="kvtrace", format_version="1.0", uuid=str(_uuid.uuid4()), complete=1,
                           created_utc=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                           generator=json.dumps({"tool": "kvtrace.py"}), provenance=provenance)
            model = f.create_group("model")
            windows = np.zeros(n_layers, np.int32) if sliding_window is None else np.asarray(sliding_window, np.int32)
            model.attrs.update(name=model_name, architecture=architecture,
                               config_json="" if config is None else json.dumps(config), n_layers=n_layers,
                               n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim,
                               attention_scale=float(attention_scale), logit_softcap=float(logit_softcap),
                               qk_norm=int(qk_norm), dtype=dtype, sliding_window=windows)
            if inv_freq is not None or rope_theta is not None:
                rotary_dim = rotary_dim or (2 * len(inv_freq) if inv_freq is not None else head_dim)
                if inv_freq is None:
                    inv_freq = float(rope_theta) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
                model.create_group("rope").attrs.update(
                    style=rope_style, rotary_dim=rotary_dim, attention_factor=float(attention_factor),
                    theta=float(rope_theta or 0), invertible=1, inv_freq=np.asarray(inv_freq, np.float64))
            f.create_group("types")
            h5py.h5t.TypeID.commit(_bfloat16_type(), f["types"].id, b"bfloat16")
            tokens = f.create_group("tokens")
            tokens["id"] = token_ids
            tokens["position"] = np.asarray(np.arange(n_tokens) if positions is None else positions, np.int32)
            tokens["phase"] = (np.arange(n_tokens) >= prompt_len).astype(np.uint8)
            if logprob is not None:
                tokens["logprob"] = np.asarray(logprob, np.float32)
            if pieces is not None:
                tokens["piece"] = np.array([piece.encode() for piece in pieces])
            if spans:
                names, begins, ends = zip(*spans)
                tokens["spans/name"] = np.array([name.encode() for name in names])
                tokens["spans/begin"] = np.asarray(begins, np.int32)
                tokens["spans/end"] = np.asarray(ends, np.int32)
            f["n_valid"] = np.uint64(n_tokens)
            for layer in layers:
                group = f.create_group(f"layers/{layer:03}")
                expected = {"k": (n_kv_heads, n_tokens, head_dim), "v": (n_kv_heads, n_tokens, v_head_dim),
                            "q": (n_heads, n_queries, head_dim)}
                for name, arrays in (("k", k), ("v", v), ("q", q)):
                    if tuple(arrays[layer].shape) != expected[name]:
                        raise ValueError(f"{name}[{layer}]: expected shape {expected[name]}, "
                                         f"found {tuple(arrays[layer].shape)}")
                    _create(group, name, arrays[layer], dtype)
                if q_index is not None:
                    group["q_index"] = np.asarray(q_index, np.int32)
                if out is not None:
                    _create(group, "out", out[layer], dtype)
                    group["out_index"] = np.asarray(out_index, np.int32)
                if w_o is not None:
                    _create(group, "w_o", w_o[layer], dtype)
            for name, by_layer in (scores or {}).items():
                for layer, array in by_layer.items():
                    _create(f.require_group(f"layers/{layer:03}/scores"), name, array, "f32")
            f.attrs["content_hash"] = content_hash(f)
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


def add_scores(path, name, by_layer):
    """Adds (or replaces) external scores {layer: [n_kv_heads, n_tokens]} in an existing trace."""
    with h5py.File(path, "r+", libver=_LIBVER) as f:
        n_kv_heads, n_rows = int(f["model"].attrs["n_kv_heads"]), f["tokens/id"].shape[0]
        for layer, array in by_layer.items():
            array = _as_numpy(array)
            if array.shape != (n_kv_heads, n_rows):
                raise ValueError(f"scores of layer {layer}: expected shape {(n_kv_heads, n_rows)}, found {array.shape}")
            group = f[f"layers/{layer:03}"].require_group("scores")
            if name in group:
                del group[name]
            _create(group, name, array, "f32")
        f.attrs["content_hash"] = content_hash(f)


# --- hashes ----------------------------------------------------------------------------------------------------------

def content_hash(file):
    """The hash of docs/trace_format.md, "Hashes", of an open h5py.File or a path."""
    if not isinstance(file, h5py.File):
        with h5py.File(file, "r", locking=False) as f:
            return content_hash(f)
    lines = []

    def add(path, kind, shape, data):
        shape_text = "(" + ", ".join(str(n) for n in shape) + ")"
        lines.append(f"{path} {kind} {shape_text} {hashlib.sha256(data).hexdigest()}\n")

    def add_text(path, texts):
        add(path, "text", (), b"".join(texts))

    def text_bytes(value):
        return value.encode() if isinstance(value, str) else bytes(value)

    model, n = file["model"].attrs, int(np.asarray(file["n_valid"][()]).reshape(-1)[0])
    for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "v_head_dim"):
        add(f"model/{name}", "int64", (), np.int64(model[name]).tobytes())
    for name in ("attention_scale", "logit_softcap"):
        add(f"model/{name}", "float64", (), np.float64(model[name]).tobytes())
    windows = np.asarray(model["sliding_window"], np.int32)
    add("model/sliding_window", "int32", windows.shape, windows.tobytes())
    if "rope" in file["model"]:
        rope = file["model/rope"].attrs
        add_text("model/rope/style", [text_bytes(rope["style"])])
        add("model/rope/rotary_dim", "int64", (), np.int64(rope["rotary_dim"]).tobytes())
        add("model/rope/attention_factor", "float64", (), np.float64(rope.get("attention_factor", 1.0)).tobytes())
        add("model/rope/invertible", "int64", (), np.int64(rope.get("invertible", 1)).tobytes())
        inv_freq = np.asarray(rope["inv_freq"], np.float64)
        add("model/rope/inv_freq", "float64", inv_freq.shape, inv_freq.tobytes())
    tokens = file["tokens"]
    for name, kind in (("id", "int32"), ("position", "int32"), ("phase", "uint8"), ("logprob", "float32")):
        if name in tokens:
            add(f"tokens/{name}", kind, (n,), tokens[name][:n].astype(kind).tobytes())
    if "piece" in tokens:
        add_text("tokens/piece", [text_bytes(piece) + b"\0" for piece in tokens["piece"][:n]])
    if "spans" in tokens:
        spans = tokens["spans"]
        add_text("tokens/spans/name", [text_bytes(name) + b"\0" for name in spans["name"][:]])
        for name in ("begin", "end"):
            clipped = np.minimum(spans[name][:], n).astype(np.int32)
            add(f"tokens/spans/{name}", "int32", clipped.shape, clipped.tobytes())
    for layer in sorted(file["layers"], key=int):
        group = file["layers"][layer]
        path = f"layers/{int(layer):03}"

        def add_array(name, rows):
            dataset = group[name]
            data = _read(dataset, slice(0, rows), raw=True) if name != "w_o" else _read(dataset, raw=True)
            three = {2: (1,) + data.shape if name == "w_o" else data.shape + (1,), 3: data.shape}[data.ndim]
            add(f"{path}/{name}", _element(dataset), three, np.ascontiguousarray(data).tobytes())

        def index_of(name, array):
            index = group[name][:] if name in group else np.arange(group[array].shape[1])
            return index[index < n].astype(np.int32)

        add_array("k", n)
        add_array("v", n)
        for array, name in (("q", "q_index"), ("out", "out_index")):
            if array in group:
                index = index_of(name, array)
                add(f"{path}/{name}", "int32", index.shape, index.tobytes())
                add_array(array, len(index))
        if "w_o" in group:
            add_array("w_o", None)
        for name in sorted(group.get("scores", {})):
            add_array(f"scores/{name}", n)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


# --- recorded evictions ----------------------------------------------------------------------------------------------

def evicted_at_from_kept(kept, prompt_len):
    """From which tokens were there at each step to when each left.

    kept     bool [n_sets, n_steps, n_tokens]: at decode step i (the pass of token prompt_len + i), may this set's
             heads attend to the token? Later tokens are ignored.
    returns  int32 [n_sets, n_tokens]: the first decode step without the token; 0 = cut at the prompt, n_steps = never
    """
    kept = np.asarray(kept, bool)
    n_sets, n_steps, n_tokens = kept.shape
    if n_tokens != prompt_len + n_steps:
        raise ValueError(f"expected {prompt_len + n_steps} tokens (prompt_len + steps), found {n_tokens}")
    born = np.maximum(np.arange(n_tokens) - prompt_len, 0)  # first step at which the token can be attended
    alive = np.arange(n_steps)[:, None] >= born[None, :]    # [n_steps, n_tokens]
    gone = ~kept & alive
    evicted_at = np.where(gone.any(1), gone.argmax(1), n_steps).astype(np.int32)
    returned = kept & (np.arange(n_steps)[None, :, None] > evicted_at[:, None, :])
    if returned.any():
        s, i, t = np.argwhere(returned)[0]
        raise ValueError(f"token {t} of set {s} is back at step {i} after it was evicted; evictions are for good")
    return evicted_at


def write_evicted_at(path, by_layer):
    """Writes {layer: int32 [n_sets, n_tokens]} for `--method given:evicted_at=FILE`.

    n_sets is n_kv_heads, n_heads or 1: the scope in which the tokens were chosen.
    """
    part = f"{path}.part"
    with h5py.File(part, "w", libver=_LIBVER) as f:
        f.attrs.update(format="kvreplay-evicted-at", format_version="1.0")
        for layer, array in by_layer.items():
            array = np.asarray(array, np.int32)
            if array.ndim != 2 or (array < 0).any():
                raise ValueError(f"evicted_at of layer {layer}: expected steps from 0 in [n_sets, n_tokens], "
                                 f"found shape {array.shape}")
            f[f"evicted_at/L{layer:03}"] = array
    os.replace(part, path)


def read_evicted_at(path):
    """{layer: int32 [n_sets, n_tokens]}"""
    with h5py.File(path, "r", locking=False) as f:
        return {int(name[1:]): f["evicted_at"][name][:] for name in f["evicted_at"]}
