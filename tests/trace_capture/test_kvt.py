"""libkvt through ctypes and numpy alone: kvcapture_hf.Trace, which needs neither torch nor transformers."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "traces" / "python"), str(ROOT / "trace_capture" / "python")]
import kvtrace  # noqa: E402  h5py's own HDF5 library is loaded beside libkvt's
from kvcapture_hf import CaptureError, Trace, version  # noqa: E402

KVREPLAY = os.environ.get("KVREPLAY_BINARY")
N_HEADS, N_KV_HEADS, HEAD_DIM, V_HEAD_DIM, PROMPT, TOKENS = 4, 2, 16, 8, 20, 48


def meta(**changes):
    model = {"name": "numpy", "n_layers": 6, "n_heads": N_HEADS, "n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM,
             "v_head_dim": V_HEAD_DIM, "attention_scale": HEAD_DIM ** -0.5}
    return {"model": model, "prompt_len": PROMPT, "capacity": TOKENS, "layers": [1, 4], "element": "f32",
            "outputs": [PROMPT - 1, TOKENS - 1], **changes}


@pytest.fixture(scope="module")
def rows():
    """{layer: {kind: float32 [heads, TOKENS, channels]}} of causal attention."""
    random = np.random.default_rng(5)
    made = {}
    for layer in (1, 4):
        q = random.standard_normal((N_HEADS, TOKENS, HEAD_DIM)).astype(np.float32)
        k = random.standard_normal((N_KV_HEADS, TOKENS, HEAD_DIM)).astype(np.float32)
        v = random.standard_normal((N_KV_HEADS, TOKENS, V_HEAD_DIM)).astype(np.float32)
        kk, vv = (np.repeat(a.astype(np.float64), N_HEADS // N_KV_HEADS, axis=0) for a in (k, v))
        logits = q.astype(np.float64) @ kk.transpose(0, 2, 1) * HEAD_DIM ** -0.5
        logits[:, ~np.tri(TOKENS, dtype=bool)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ vv
        made[layer] = {"k": k, "v": v, "q": q, "out": out.astype(np.float32)}
    return made


def write(trace, rows, begin, end):
    for layer, kinds in rows.items():
        for kind, array in kinds.items():
            trace.append(layer, kind, begin, array[:, begin:end])
    trace.commit(range(begin, end))


def kvreplay(*arguments):
    if not KVREPLAY:
        pytest.skip("KVREPLAY_BINARY names no built kvreplay")
    return subprocess.run([KVREPLAY, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
def test_a_trace_is_what_was_handed_over(tmp_path, rows, element):
    path = tmp_path / "t.h5"
    with Trace(path, meta(element=element, spans=[{"name": "needle", "begin": 2, "end": 5}])) as trace:
        write(trace, rows, 0, PROMPT)
        for token in range(PROMPT, TOKENS):
            write(trace, rows, token, token + 1)
        assert trace.n_committed == TOKENS
    with kvtrace.open(path) as read:
        assert (read.n_tokens, read.prompt_len, read.layers, read.element()) == (TOKENS, PROMPT, [1, 4], element)
        assert read.token_ids.tolist() == list(range(TOKENS))
        for layer, kinds in rows.items():
            for kind in "kvq":
                stored = {"f16": lambda a: a.astype(np.float16).astype(np.float32), "f32": lambda a: a,
                          "bf16": lambda a: (kvtrace._to_bits(a).astype(np.uint32) << 16).view(np.float32)}[element]
                assert np.array_equal(getattr(read, kind)(layer), stored(kinds[kind])), (layer, kind)
    verified = kvreplay("verify", path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.count("proved") == 2


def test_any_numpy_layout_and_type(tmp_path, rows):
    source = rows[1]["k"]  # (heads, tokens, channels)
    wide = np.full((N_KV_HEADS, TOKENS + 3, 2 * HEAD_DIM), np.nan, np.float32)
    wide[:, 1:TOKENS + 1, :HEAD_DIM] = source
    packed = np.zeros((TOKENS, 3, N_KV_HEADS, HEAD_DIM), np.float32)  # fused projections, token by token
    packed[:, 1] = source.transpose(1, 0, 2)
    layouts = {
        "contiguous": source,
        "a slice of a wider cache": wide[:, 1:TOKENS + 1, :HEAD_DIM],
        "token by token": packed[:, 1].transpose(1, 0, 2),
        "channels apart": np.asfortranarray(source),
        "backwards": source[::-1, ::-1].copy()[::-1, ::-1],
        "float64": source.astype(np.float64),
        "read only": np.frombuffer(source.tobytes(), np.float32).reshape(source.shape),
    }
    for name, array in layouts.items():
        path = tmp_path / f"{name}.h5"
        with Trace(path, meta(layers=[1], outputs=[], queries="decode")) as trace:
            trace.append(1, "k", 0, array)
            trace.append(1, "q", PROMPT, rows[1]["q"][:, PROMPT:].astype(np.float64))
            trace.append(1, "v", 0, rows[1]["v"])
            trace.commit(range(TOKENS))
        with kvtrace.open(path) as read:
            assert np.array_equal(read.k(1), source), name
            assert np.array_equal(read.q(1), rows[1]["q"][:, PROMPT:])
    halves = {"float16": source.astype(np.float16)}
    with Trace(tmp_path / "half.h5", meta(layers=[1], outputs=[], queries="window:0", capacity=PROMPT)) as trace:
        trace.append(1, "k", 0, halves["float16"][:, :PROMPT])
        trace.append(1, "v", 0, rows[1]["v"][:, :PROMPT])
        trace.commit(range(PROMPT), logprobs=None)
    with kvtrace.open(tmp_path / "half.h5") as read:
        assert np.array_equal(read.k(1), halves["float16"][:, :PROMPT].astype(np.float32))


def test_refusals(tmp_path, rows):
    path = tmp_path / "t.h5"
    with pytest.raises(CaptureError, match='the nearest is capacity') as refused:
        Trace(path, meta(kapacity=3))
    assert refused.value.status == 2
    with pytest.raises(CaptureError, match="No such file") as refused:
        Trace(tmp_path / "no" / "t.h5", meta())
    assert refused.value.status == 3
    trace = Trace(path, meta(element="f16"))
    with pytest.raises(CaptureError, match=r"rows have shape \(4, 48, 16\), but must be .* = \(2, n, 16\)"):
        trace.append(1, "k", 0, rows[1]["q"])
    with pytest.raises(CaptureError, match=r"but must be .* = \(2, n, 8\)"):
        trace.append(1, "v", 0, rows[1]["k"])
    with pytest.raises(CaptureError, match="kind 'keys' is unknown; allowed are k, v, q, out"):
        trace.append(1, "keys", 0, rows[1]["k"])
    with pytest.raises(CaptureError, match="layer 2 is not in this trace"):
        trace.append(2, "k", 0, rows[1]["k"])
    large = rows[1]["k"].copy()
    large[1, 7, 3] = 1e5
    with pytest.raises(CaptureError, match="layer 1, k: token 7, head 1, channel 3 is 100000, which f16 cannot hold"):
        trace.append(1, "k", 0, large)
    large[1, 7, 3] = np.nan
    with pytest.raises(CaptureError, match="must be finite"):
        trace.append(1, "k", 0, large)
    with pytest.raises(CaptureError, match="layer 1 has no k of token 0 yet"):
        trace.commit([1])
    with pytest.raises(CaptureError, match="2 logprobs were given for 1 ids"):
        trace.commit([1], [-1.0, -2.0])
    write(trace, rows, 0, 10)
    with pytest.raises(CaptureError, match='say "logprobs": true'):
        trace.commit([], [])
    trace.close()
    trace.close()
    with pytest.raises(CaptureError, match="NULL"):
        trace.append(1, "k", 10, rows[1]["k"][:, 10:])
    assert kvtrace.open(path).n_tokens == 10
    assert version().count(".") == 2


def test_an_error_in_the_block_keeps_what_was_committed(tmp_path, rows):
    with pytest.raises(ZeroDivisionError):
        with Trace(tmp_path / "kept.h5", meta()) as trace:
            write(trace, rows, 0, 30)
            1 / 0
    assert kvtrace.open(tmp_path / "kept.h5").n_tokens == 30
    with pytest.raises(ZeroDivisionError):
        with Trace(tmp_path / "nothing.h5", meta()):
            1 / 0
    with pytest.raises(CaptureError, match="no token was committed"):
        with Trace(tmp_path / "nothing.h5", meta()):
            pass
    trace = Trace(tmp_path / "nothing.h5", meta())
    write(trace, rows, 0, 30)
    trace.close(keep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.h5"]


def test_a_killed_process_leaves_what_it_committed(tmp_path, rows):
    path = tmp_path / "t.h5"
    np.savez(tmp_path / "rows.npz", **{f"{kind}{layer}": a for layer, kinds in rows.items() for kind, a in kinds.items()})
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(ROOT / 'trace_capture' / 'python'), str(ROOT / 'tests' / 'trace_capture')]!r}
import json, numpy as np
from kvcapture_hf import Trace
rows = np.load({str(tmp_path / 'rows.npz')!r})
trace = Trace({str(path)!r}, json.loads({json.dumps(meta())!r}))
def append(begin, end):
    for name in rows:
        trace.append(int(name[-1]), name[:-1], begin, rows[name][:, begin:end])
append(0, 30)
trace.commit(range(30))
append(30, 40)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not path.exists()
    with kvtrace.open(f"{path}.part") as read:
        assert read.n_tokens == 30
        assert np.array_equal(read.k(4), rows[4]["k"][:, :30])
    recovered = kvreplay("recover", f"{path}.part", path)
    assert recovered.returncode == 0, recovered.stderr
    assert kvreplay("verify", path).returncode == 0
    assert kvtrace.open(path).n_tokens == 30


def test_threads_write_one_trace(tmp_path, rows):
    path, failures = tmp_path / "t.h5", []
    trace = Trace(path, meta())

    def work(layer, kind):
        try:
            for token in range(0, TOKENS, 4):
                trace.append(layer, kind, token, rows[layer][kind][:, token:token + 4])
        except CaptureError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(layer, kind)) for layer in rows for kind in rows[layer]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    trace.commit(range(TOKENS))
    trace.close()
    with kvtrace.open(path) as read:
        assert all(np.array_equal(getattr(read, kind)(layer), rows[layer][kind]) for layer in rows for kind in "kvq")


class Tensor:
    """What Trace asks of a torch tensor, around a numpy array that it says is in a device's memory."""

    def __init__(self, array, device):
        self.array, self.shape, self.dtype = array, array.shape, f"torch.{array.dtype}"
        self.device, self.is_cuda = SimpleNamespace(type=device), device == "cuda"

    def detach(self):
        return self

    def stride(self, axis):
        return self.array.strides[axis] // self.array.itemsize

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return Tensor(self.array, "cpu")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_rows_on_a_device_that_the_library_cannot_read_go_through_the_host(tmp_path, rows, monkeypatch, device):
    streams = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(
        current_stream=lambda of: streams.append(of) or SimpleNamespace(cuda_stream=0))))
    path = tmp_path / "t.h5"
    with Trace(path, meta()) as trace:
        for layer, kinds in rows.items():
            for kind, array in kinds.items():
                trace.append(layer, kind, 0, Tensor(array, device))
        trace.commit(range(TOKENS))
    assert len(streams) == (device == "cuda")  # asked once, and then copied at once
    with kvtrace.open(path) as read:
        assert all(np.array_equal(getattr(read, kind)(layer), rows[layer][kind]) for layer in rows for kind in "kvq")


def test_the_library_that_is_named_is_loaded(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'trace_capture' / 'python')!r}); import kvcapture_hf as k; "
    environment = {**os.environ, "KVREPLAY_LIBKVT": str(tmp_path / "none.so")}
    done = subprocess.run([sys.executable, "-c", script + "k.version()"], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    assert "build the target kvt, or set KVREPLAY_LIBKVT to its path" in done.stderr
