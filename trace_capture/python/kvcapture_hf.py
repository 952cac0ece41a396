"""Record a kvtrace while transformers generates, or from any other engine in Python.

    from kvcapture_hf import capture
    with capture(model, "t.h5", max_tokens=4096):
        model.generate(**inputs, max_new_tokens=512)

`capture` needs torch and transformers; `Trace`, which takes rows from any engine, needs numpy alone. Both write through
libkvt.so: $KVREPLAY_LIBKVT, else the newest build beside this file, else an installed one. docs/capture_abi.md has more.
"""

import ctypes
import json
import os
import sys
import time
import weakref
from pathlib import Path

__all__ = ["CaptureError", "Trace", "capture", "version"]

_AUTO = object()  # "find out yourself"


class CaptureError(RuntimeError):
    """What cannot be captured, in one sentence. `status` is libkvt's code (KVT_USAGE = 2, KVT_TRACE = 3, ...)."""

    def __init__(self, sentence, status=2):
        super().__init__(sentence)
        self.status = status


# --- the library -----------------------------------------------------------------------------------------------------

_KINDS = {"k": 0, "v": 1, "q": 2, "out": 3}
_DTYPES = {"float16": (0, 2), "bfloat16": (1, 2), "float32": (2, 4)}  # kvt_dtype and bytes, by numpy's and torch's names
_ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_DEVICE = 4  # KVT_DEVICE


class _Rows(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int32), ("data", ctypes.c_void_p), ("stride_head", ctypes.c_int64),
                ("stride_token", ctypes.c_int64), ("on_device", ctypes.c_int32), ("stream", ctypes.c_void_p)]


def _candidates():
    """Where libkvt.so may be, best first."""
    named = os.environ.get("KVREPLAY_LIBKVT")
    if named:
        return [named]
    here = Path(__file__).resolve()
    builds = [*here.parents[2].glob("build/trace_capture/libkvt.so"),
              *here.parents[2].glob("build/*/trace_capture/libkvt.so")]
    newest_first = sorted(builds, key=lambda path: path.stat().st_mtime, reverse=True)
    installed = here.parents[3:4]  # this file is PREFIX/share/kvreplay/python/kvcapture_hf.py
    return [*newest_first, *(path for prefix in installed for path in prefix.glob("lib*/**/libkvt.so")), "libkvt.so"]


_library = None


def _lib():
    global _library
    if _library is None:
        failures = []
        for path in _candidates():
            try:
                lib = ctypes.CDLL(str(path))
                break
            except OSError as error:
                failures.append(str(error))
        else:
            raise CaptureError("libkvt.so cannot be loaded; build the target kvt, or set KVREPLAY_LIBKVT to its path "
                               f"({'; '.join(failures)})")
        pointer = ctypes.c_void_p
        lib.kvt_open.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(pointer)]
        lib.kvt_append.argtypes = [pointer, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64,
                                   ctypes.POINTER(_Rows)]
        lib.kvt_commit.argtypes = [pointer, ctypes.c_int64, pointer, pointer]
        lib.kvt_close.argtypes = [pointer, ctypes.c_int32]
        for function in (lib.kvt_last_error, lib.kvt_version):
            function.restype = ctypes.c_char_p
        _library = lib
    return _library


def _check(status):
    if status != 0:
        raise CaptureError(_lib().kvt_last_error().decode(errors="replace"), status)


def version():
    """The version of libkvt."""
    return _lib().kvt_version().decode()


class Trace:
    """A trace file, written while its tokens come.

        with Trace("t.h5", meta) as trace:           # meta: docs/capture_abi.md lists its keys
            trace.append(layer, "k", first, keys)    # [heads, n, channels] of tokens first to first + n
            ...                                      # "v", "q", and "out" at the tokens meta["outputs"] names
            trace.commit(ids)                        # about once a second

    Rows are numpy arrays or torch tensors, on any device, in float16, bfloat16 or float32, with any strides. Leaving the
    block closes the trace: what was committed is kept.
    """

    def __init__(self, path, meta):
        self.path = os.fspath(path)
        self._model = dict(meta.get("model") or {})
        self._handle = ctypes.c_void_p()
        self._device_memory = True  # until the library says that it cannot read it
        self.n_committed = 0
        _check(_lib().kvt_open(os.fsencode(self.path), json.dumps(meta).encode(), ctypes.byref(self._handle)))

    def append(self, layer, kind, first, rows):
        if kind not in _KINDS:
            raise CaptureError(f"kind {kind!r} is unknown; allowed are {', '.join(_KINDS)}")
        expected = (self._model["n_kv_heads" if kind in "kv" else "n_heads"], None,
                    self._model["head_dim"] if kind in "kq" else self._model.get("v_head_dim", self._model["head_dim"]))
        shape = tuple(rows.shape)
        if len(shape) != 3 or shape[0] != expected[0] or shape[2] != expected[2]:
            raise CaptureError(f"layer {layer}, {kind}: rows have shape {shape}, but must be (heads, n, channels) = "
                               f"({expected[0]}, n, {expected[2]})")
        rows = self._readable(rows)
        status = self._append(layer, kind, first, rows)
        if status == _DEVICE and self._device_memory and _on_device(rows):
            self._device_memory = False
            status = self._append(layer, kind, first, self._readable(rows))
        _check(status)

    def _readable(self, rows):
        """In a type and memory that the library reads, channels side by side."""
        if hasattr(rows, "detach"):
            rows = rows.detach()
            if _on_device(rows) and not (rows.is_cuda and self._device_memory):
                rows = rows.cpu()
            if _type_name(rows) not in _DTYPES:
                rows = rows.float()
            return rows if rows.shape[-1] <= 1 or rows.stride(-1) == 1 else rows.contiguous()
        import numpy as np
        if _type_name(rows) not in _DTYPES:
            rows = np.asarray(rows, np.float32)
        return rows if rows.shape[-1] <= 1 or rows.strides[-1] == rows.itemsize else np.ascontiguousarray(rows)

    def _append(self, layer, kind, first, rows):
        dtype, size = _DTYPES[_type_name(rows)]
        struct = _Rows(dtype=dtype)
        if hasattr(rows, "data_ptr"):
            struct.data = rows.data_ptr()
            struct.stride_head, struct.stride_token = rows.stride(0) * size, rows.stride(1) * size
            if _on_device(rows):
                import torch
                struct.on_device, struct.stream = 1, torch.cuda.current_stream(rows.device).cuda_stream
        else:
            struct.data = rows.ctypes.data
            struct.stride_head, struct.stride_token = rows.strides[:2]
        return _lib().kvt_append(self._handle, layer, _KINDS[kind], first, rows.shape[1], ctypes.byref(struct))

    def commit(self, ids, logprobs=None):
        """The ids of the next tokens, all of whose rows were appended. They survive a crash from here on."""
        ids = [int(i) for i in ids]
        if logprobs is not None:
            logprobs = [float(value) for value in logprobs]
            if len(logprobs) != len(ids):
                raise CaptureError(f"{len(logprobs)} logprobs were given for {len(ids)} ids")
            logprobs = (ctypes.c_float * len(ids))(*logprobs)
        _check(_lib().kvt_commit(self._handle, len(ids), (ctypes.c_int32 * len(ids))(*ids), logprobs))
        self.n_committed += len(ids)

    def close(self, keep=True):
        """Gives the file its final name; keep=False removes it. A second call does nothing."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            _check(_lib().kvt_close(handle, int(keep)))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.close(keep=error is None or self.n_committed > 0)
        except CaptureError:
            if error is None:
                raise


def _type_name(array):
    return str(array.dtype).removeprefix("torch.")


def _on_device(rows):
    return hasattr(rows, "detach") and rows.device.type != "cpu"


# --- transformers ----------------------------------------------------------------------------------------------------

_LOGITS_AT_ONCE = 256  # rows of logits that become log-probabilities in one go
_COMMIT_SECONDS = 1.0
_COMPILED = ("a compiled model does not call back; capture it as it was before torch.compile, and pass "
             "disable_compile=True to generate()")
_HIDDEN = "the attention mask hides tokens (padding?), but a trace holds one sequence without gaps"
_recording = {}  # id of an attention module -> the capture that records it
_checked = weakref.WeakSet()  # models whose logits were compared


def _register():
    """Makes the attention functions known to transformers: "kvtrace" is sdpa, "kvtrace_eager" is the model's own."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise CaptureError("this transformers has no attention and mask interfaces; install 4.53 or later "
                           f"({error})") from error

    def through(delegate_of):
        def attention(module, query, key, value, attention_mask, *args, **kwargs):
            result = delegate_of(module)(module, query, key, value, attention_mask, *args, **kwargs)
            recorder = _recording.get(id(module))
            if recorder is not None:
                recorder._attended(module, query, key, value, attention_mask, result[0], kwargs)
            return result
        return attention

    def eager(module):
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            raise CaptureError(f"{type(module).__name__} caps its logits, and its module has no "
                               "eager_attention_forward to do so")
        return function

    AttentionInterface.register("kvtrace", through(lambda module: sdpa_attention_forward))
    AttentionInterface.register("kvtrace_eager", through(eager))
    AttentionMaskInterface.register("kvtrace", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("kvtrace_eager", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class capture:
    """Records the one sequence that `model` passes inside the block, as it enters attention.

    max_tokens    room for prompt and generated tokens; more is an error
    queries       "all", "decode" (of generated tokens only) or "window:N" (and of the last N of the prompt)
    dtype         "f16", "bf16", "f32"; None = the model's own
    layers        numbers of the layers to record; None = all that attend
    check_steps   tokens at which attention's own output is stored, so that `kvreplay verify` can prove the trace: the
                  last of the prompt, and steps spread over the rest
    spans         named token ranges: {"needle": (120, 134)}
    prompt_len    None = the length of the first pass
    rope          None = keys are not rotated; a dict as docs/capture_abi.md says; default: the model's own
    provenance    where model and text come from, and their licences

    The model runs with scaled dot-product attention, or with its own eager function where it caps its logits. An error
    inside the block keeps what was recorded, and goes on. What generate() samples last it never passes through the
    model, so the trace ends one token before its output does.
    """

    def __init__(self, model, path, max_tokens, queries="all", dtype=None, layers=None, check_steps=16, spans=None,
                 prompt_len=None, rope=_AUTO, provenance=""):
        self.model, self.path = model, os.fspath(path)
        self.max_tokens, self.queries, self.dtype = max_tokens, queries, dtype
        self.layers, self.check_steps, self.spans = layers, check_steps, spans
        self.prompt_len, self.rope, self.provenance = prompt_len, rope, provenance
        self.n_tokens = 0  # passed through the whole model
        self.trace = None
        self._undo = []  # what leaving the block takes back, last first

    # --- the block

    def __enter__(self):
        import torch
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise CaptureError(f"max_tokens is {self.max_tokens!r}, but must be 1 or more")
        if not isinstance(self.check_steps, int) or self.check_steps < 0:
            raise CaptureError(f"check_steps is {self.check_steps!r}, but must be 0 or more")
        _lib()
        config = self._config()
        _register()
        self._modules = [m for m in self.model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        if any(id(m) in _recording for m in self._modules):
            raise CaptureError("this model is being captured already")
        # Nothing of a pass is known until it is over: see _attended and _passed.
        self._pass = None
        self._ids, self._logprobs, self._last_logits, self._committed_at = [], [], None, time.monotonic()
        self._cut_back = False
        softcap = getattr(config, "attn_logit_softcapping", None)
        plain = "eager" if softcap else "sdpa"
        self._implementation = "kvtrace_eager" if softcap else "kvtrace"
        try:
            before = self.model.config._attn_implementation
            self._undo.append(lambda: self.model.set_attn_implementation(before))
            if self.model not in _checked:
                with torch.no_grad():
                    self._compare_logits(plain)
                _checked.add(self.model)
            self._switch(self._implementation)
            generation = getattr(self.model, "generation_config", None)
            if generation is not None and hasattr(generation, "disable_compile"):
                compiled = generation.disable_compile
                generation.disable_compile = True  # a compiled pass does not call back
                self._undo.append(lambda: setattr(generation, "disable_compile", compiled))
            for module in self._modules:
                _recording[id(module)] = self
            self._undo.append(lambda: [_recording.pop(id(module), None) for module in self._modules])
            self._undo.append(self.model.register_forward_pre_hook(self._passing, with_kwargs=True).remove)
            self._undo.append(self.model.register_forward_hook(self._passed, with_kwargs=True).remove)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, kind, error, traceback):
        self._restore()
        try:
            if self.trace is not None:
                if self._cut_back:
                    self.trace.close(keep=False)
                    return
                self._commit()
                self.trace.close(keep=error is None or self.trace.n_committed > 0)
            elif error is None:
                raise CaptureError("the model was not called inside the block, so there is nothing to keep")
        except BaseException as closing:
            if self.trace is not None:
                try:
                    self.trace.close(keep=True)
                except CaptureError:
                    pass
            if error is None:
                raise
            if hasattr(error, "add_note"):
                error.add_note(f"and the trace could not be closed: {closing}")

    def _restore(self):
        while self._undo:
            self._undo.pop()()

    def _switch(self, implementation):
        try:
            self.model.set_attn_implementation(implementation)
        except (ValueError, KeyError) as error:
            raise CaptureError(f"{type(self.model).__name__} does not run with {implementation} attention: "
                               f"{error}") from error
        if self.model.config._attn_implementation != implementation:
            raise CaptureError(f"{type(self.model).__name__} does not take its attention function from transformers' "
                               "AttentionInterface, so there is nothing to hook into; write through kvcapture_hf.Trace")

    def _config(self):
        """The configuration of a causal language model in evaluation mode."""
        config = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise CaptureError(f"{type(self.model).__name__} is an encoder-decoder model; only decoder-only models can "
                               "be captured")
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if text is not config:
            raise CaptureError(f"{type(self.model).__name__} holds several models; capture its language model alone")
        if hasattr(self.model, "_orig_mod") or getattr(self.model, "_compiled_call_impl", None) is not None:
            raise CaptureError(_COMPILED)
        if self.model.training:
            raise CaptureError("the model is in training mode, where dropout changes attention; call model.eval() first")
        if getattr(config, "kv_lora_rank", None):
            raise CaptureError(f"{type(self.model).__name__} has multi-head latent attention, whose rotation a trace "
                               "cannot describe")
        return config

    def _compare_logits(self, plain):
        """Hooking changes nothing: a prompt and two decode steps give the logits of plain attention."""
        import torch
        vocab = int(getattr(self.model.config, "vocab_size", 256))
        device = self.model.get_input_embeddings().weight.device
        ids = (torch.arange(8, device=device) * 7 + 3).remainder(vocab).unsqueeze(0)
        found = []
        for implementation in (plain, self._implementation):
            self._switch(implementation)
            one = self.model(input_ids=ids[:, :6], use_cache=True)
            two = self.model(input_ids=ids[:, 6:7], past_key_values=one.past_key_values, use_cache=True)
            three = self.model(input_ids=ids[:, 7:], past_key_values=two.past_key_values, use_cache=True)
            found.append(torch.cat([step.logits.float() for step in (one, two, three)], dim=1))
        if not torch.allclose(*found, rtol=1e-5, atol=1e-5):
            raise CaptureError(f"with its attention hooked, {type(self.model).__name__} gives logits that differ from "
                               f"plain {plain} by up to {(found[0] - found[1]).abs().max().item():.3g}, so a trace "
                               "would not be of this model")

    # --- one pass of the model: _passing, then _attended for each layer, then _passed

    def _passing(self, model, args, kwargs):
        import torch
        if torch.compiler.is_compiling():
            raise CaptureError(_COMPILED)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise CaptureError("the model was called with embeddings, but a trace needs the tokens' ids; call it with "
                               "input_ids")
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise CaptureError(f"input_ids have shape {tuple(ids.shape)}, but a trace holds one sequence: batch size 1, "
                               "no beams, one returned sequence")
        n = ids.shape[1]
        past = kwargs.get("past_key_values")
        cached = int(past.get_seq_length()) if past is not None else 0
        if cached != self.n_tokens:
            if cached == 0:
                raise CaptureError(f"a second sequence begins after {self.n_tokens} tokens, but a trace holds one; use "
                                   "one capture for each, and a key-value cache (use_cache=True)")
            self._cut_back = cached < self.n_tokens
            raise CaptureError(f"the cache holds {cached} tokens where {self.n_tokens} were recorded; a trace can follow "
                               "neither assisted decoding nor a cache that was filled outside the block")
        mask = kwargs.get("attention_mask")
        if getattr(mask, "ndim", 0) == 2 and not bool((mask != 0).all()):
            raise CaptureError(_HIDDEN)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.numel() == n:
            expected = torch.arange(self.n_tokens, self.n_tokens + n, device=positions.device)
            if not bool((positions.reshape(-1) == expected).all()):
                raise CaptureError(f"position_ids begin at {int(positions.reshape(-1)[0])} where token "
                                   f"{self.n_tokens} follows, but a trace has one position for each token, in order")
        if self.n_tokens + n > self.max_tokens:
            raise CaptureError(f"token {self.n_tokens + n - 1} has no room in a trace of max_tokens={self.max_tokens}")
        self._pass, self._masks = (ids.detach().reshape(-1), n, set()), set()

    def _attended(self, module, query, key, value, mask, out, kwargs):
        import torch
        if self._pass is None:
            raise CaptureError("attention was called outside a pass of the model that is captured; call the model "
                               "itself, as generate() does, and not a part of it")
        _, n, seen = self._pass
        layer = module.layer_idx
        refused = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
        if refused:
            raise CaptureError(f"layer {layer} attends with {refused[0]}, which a trace cannot describe")
        if query.shape[0] != 1 or query.shape[2] != n:
            raise CaptureError(f"layer {layer}: queries have shape {tuple(query.shape)} in a pass of {n} tokens")
        if self.trace is None:
            self._open(module, query, key, value, n, kwargs)
        if layer not in self._layers:
            return
        if layer in seen:
            raise CaptureError(f"layer {layer} attends twice in one pass, which a trace cannot describe")
        seen.add(layer)
        self._expect(layer, "attention scale", self._scale_of(module, query, kwargs), self._scale)
        self._expect(layer, "logit soft-cap", kwargs.get("softcap") or 0, self._softcap)
        if "sliding_window" in kwargs:
            self._expect(layer, "sliding window", kwargs["sliding_window"] or 0, self._windows[layer])
        if getattr(module, "is_causal", True) is False:
            raise CaptureError(f"layer {layer} attends in both directions, which a trace cannot describe")
        if mask is not None and mask.ndim == 4 and id(mask) not in self._masks:  # layers share them
            self._masks.add(id(mask))
            seen_by_last = mask[0, 0, -1] if mask.dtype == torch.bool else mask[0, 0, -1] == 0
            if int(seen_by_last.sum()) != min(self.n_tokens + n, self._windows[layer] or self.n_tokens + n):
                raise CaptureError(_HIDDEN)
        # Where the new rows are: a static cache hands over its whole room, all others end with them.
        first = self.n_tokens
        begin = first if key.shape[2] > first + n else key.shape[2] - n
        self.trace.append(layer, "k", first, key[0, :, begin:begin + n])
        self.trace.append(layer, "v", first, value[0, :, begin:begin + n])
        # Of queries and outputs only what the file stores, so that no more is copied from a device.
        begin = max(self._first_query - first, 0)
        if begin < n:
            self.trace.append(layer, "q", first + begin, query[0, :, begin:])
        stored = [token for token in self._outputs if first <= token < first + n]
        if stored:
            rows = out[0].transpose(0, 1)  # (n, n_heads, v_head_dim) before
            self.trace.append(layer, "out", stored[0], rows[:, stored[0] - first:stored[-1] + 1 - first])

    @staticmethod
    def _expect(layer, what, found, expected):
        if abs(found - expected) > 1e-9 * abs(expected):
            raise CaptureError(f"layer {layer} has the {what} {found}, where the trace says {expected}")

    @staticmethod
    def _scale_of(module, query, kwargs):
        scale = kwargs.get("scaling")
        return float(scale if scale is not None else query.shape[-1] ** -0.5)

    def _passed(self, model, args, kwargs, output):
        import torch
        ids, n, seen = self._pass
        self._pass = None
        missing = sorted(set(self._layers) - seen) if self.trace is not None else []
        if self.trace is None or missing:
            raise CaptureError("no layer of this model attends through the attention interface" if not missing else
                               f"layer {missing[0]} did not attend through the attention interface; leave it out with "
                               "layers=[...]")
        known = torch.full((n,), float("nan"), device=ids.device)  # logprob of each token
        logits = getattr(output, "logits", None)
        if self._last_logits is not None:
            known[:1] = self._log_probabilities(self._last_logits, ids[:1])
        if logits is not None and logits.dim() == 3 and logits.shape[1] == n > 1:
            known[1:] = self._log_probabilities(logits[0, :-1], ids[1:])
        self._last_logits = logits[0, -1:].detach().clone() if logits is not None and logits.dim() == 3 else None
        self._ids.append(ids)
        self._logprobs.append(known)
        prefill = self.n_tokens == 0
        self.n_tokens += n
        if prefill or time.monotonic() - self._committed_at > _COMMIT_SECONDS:
            self._commit()

    @staticmethod
    def _log_probabilities(logits, ids):
        import torch
        chosen = []
        for begin in range(0, ids.shape[0], _LOGITS_AT_ONCE):
            some = logits[begin:begin + _LOGITS_AT_ONCE].detach().float()
            wanted = ids[begin:begin + _LOGITS_AT_ONCE].to(some.device)
            chosen.append(some.log_softmax(-1).gather(1, wanted.unsqueeze(1)).squeeze(1))
        return torch.cat(chosen).to(ids.device)

    def _commit(self):
        import torch
        if self._ids:
            ids, logprobs = torch.cat(self._ids).tolist(), torch.cat(self._logprobs).tolist()
            self._ids, self._logprobs = [], []
            self.trace.commit(ids, logprobs)
        self._committed_at = time.monotonic()

    # --- what the file says about the model

    def _open(self, module, query, key, value, n, kwargs):
        config, prompt_len = self.model.config, self.prompt_len or n
        n_layers = int(config.num_hidden_layers)
        types, self._windows = _layer_types(config, n_layers)
        attend = [layer for layer in range(n_layers) if types[layer] in ("full_attention", "sliding_attention")]
        layers = attend if self.layers is None else sorted(self.layers)
        refused = [layer for layer in layers if layer not in attend]
        if refused:
            raise CaptureError(f"layer {refused[0]} cannot be recorded; the layers that can are "
                               f"{', '.join(map(str, attend)) or 'none'}")
        self._layers = set(layers)
        self._outputs = _check_tokens(prompt_len, self.max_tokens, self.check_steps)
        self._scale, self._softcap = self._scale_of(module, query, kwargs), float(kwargs.get("softcap") or 0)
        dtype = _type_name(key)
        element = self.dtype or _ELEMENTS.get(dtype)
        if element not in _ELEMENTS.values():
            raise CaptureError(f"dtype {element or dtype!r} cannot be stored; allowed are f16, bf16 and f32")
        meta = {
            "model": {"name": str(getattr(config, "_name_or_path", "") or type(self.model).__name__),
                      "architecture": type(self.model).__name__, "n_layers": n_layers, "n_heads": query.shape[1],
                      "n_kv_heads": key.shape[1], "head_dim": query.shape[3], "v_head_dim": value.shape[3],
                      "attention_scale": self._scale, "qk_norm": _has_qk_norm(module), "logit_softcap": self._softcap,
                      "sliding_window": self._windows, "dtype": _ELEMENTS.get(dtype, dtype),
                      "config_json": json.dumps(config.to_dict(), default=str, sort_keys=True)},
            "prompt_len": prompt_len, "capacity": self.max_tokens, "layers": layers, "element": element,
            "queries": self.queries, "outputs": self._outputs,
            "logprobs": True, "generator": self._generator(), "provenance": self.provenance,
            "spans": [{"name": name, "begin": begin, "end": end} for name, (begin, end) in (self.spans or {}).items()]}
        rope = self.rope
        if rope is _AUTO:
            rope = _rope_of(self.model, module, [types[layer] for layer in layers], self.max_tokens)
        if rope is not None:
            meta["rope"] = rope
        self.trace = Trace(self.path, meta)  # from here on queries is one of three
        window = {"all": prompt_len, "decode": 0}.get(self.queries)
        self._first_query = max(prompt_len - (int(self.queries[len("window:"):]) if window is None else window), 0)

    @staticmethod
    def _generator():
        import torch
        import transformers
        return {"tool": "kvcapture_hf.py", "version": version(), "transformers": transformers.__version__,
                "torch": torch.__version__, "argv": sys.argv}


def _layer_types(config, n_layers):
    """Each layer's type as transformers names it, and the window of each (0 = none)."""
    window = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * n_layers
    return list(types), [int(window) if kind == "sliding_attention" else 0 for kind in types]


def _has_qk_norm(module):
    names = {name for name, _ in module.named_children()}
    return bool(names & {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_norm", "query_layernorm", "key_layernorm"})


def _check_tokens(prompt_len, max_tokens, n):
    """The last token of the prompt, and steps spread over the room behind it up to its end."""
    rest = max_tokens - prompt_len
    return sorted({prompt_len - 1 + rest * i // max(n - 1, 1) for i in range(n)}) if n else []


def _rope_of(model, module, types, max_tokens):
    """The rotation as a trace describes it, compared with what the model itself does to a random row."""
    import torch
    found = [m for m in model.modules() if "Rotary" in type(m).__name__]
    if not found:
        return None
    rotary, hint = found[0], "; pass rope={...} as docs/capture_abi.md says, or layers=[...] of one kind"
    frequencies = [m.inv_freq.detach().cpu() for m in found if getattr(m, "inv_freq", None) is not None]
    if any(not torch.equal(one, frequencies[0]) for one in frequencies):
        raise CaptureError(f"{type(model).__name__} has several rotations, but a trace has one; choose layers=[...] that "
                           "share one, and pass it as rope={...}")
    prefix, arguments = "", {}
    if getattr(rotary, "inv_freq", None) is None:
        kinds = sorted(set(types))
        if len(kinds) != 1 or getattr(rotary, f"{kinds[0]}_inv_freq", None) is None:
            raise CaptureError(f"{type(model).__name__} has several rotations, one each for {' and '.join(kinds)} layers, "
                               f"but a trace has one{hint}")
        prefix, arguments = f"{kinds[0]}_", {"layer_type": kinds[0]}
    inv_freq = getattr(rotary, f"{prefix}inv_freq").detach().double().cpu()
    factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    parameters = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    if prefix:
        parameters = parameters.get(prefix.rstrip("_"), parameters)
    kind = parameters.get("rope_type", "default")
    theta = parameters.get("rope_theta", getattr(model.config, "rope_theta", 0)) or 0

    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    position, dim = 5, 2 * inv_freq.numel()
    device = next(model.parameters()).device
    row = torch.randn(1, 1, 1, dim, generator=torch.Generator().manual_seed(1)).to(device)
    try:
        cos, sin = rotary(row, torch.tensor([[position]], device=device), **arguments)
        turned = apply(row, row, cos, sin)[0].reshape(-1).double().cpu()
    except Exception as error:
        raise CaptureError(f"how {type(model).__name__} rotates its keys is not understood ({error}){hint}") from error
    row, angle = row.reshape(-1).double().cpu(), position * inv_freq
    for style in ("half", "interleaved"):
        a, b = (row.view(2, -1) if style == "half" else row.view(-1, 2).T)
        pair = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]) * factor
        expected = (pair if style == "half" else pair.T).reshape(-1)
        if torch.allclose(turned, expected, rtol=1e-3, atol=1e-3):
            changes = kind in ("dynamic", "longrope") and max_tokens > int(
                getattr(rotary, "original_max_seq_len", None) or model.config.max_position_embeddings)
            return {"style": style, "rotary_dim": dim, "inv_freq": inv_freq.tolist(), "attention_factor": factor,
                    "theta": float(theta), "scaling": "" if kind == "default" else json.dumps(parameters, default=str),
                    "invertible": not changes}
    raise CaptureError(f"how {type(model).__name__} rotates its keys is not understood{hint}")
