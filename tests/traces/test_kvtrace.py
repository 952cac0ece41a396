"""Traces written by h5py and numpy alone are what TraceReader takes them for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "traces" / "python"))
import kvtrace  # noqa: E402

READ_TRACE = os.path.abspath(os.environ["KVREPLAY_READ_TRACE"]) if "KVREPLAY_READ_TRACE" in os.environ else None
needs_reader = pytest.mark.skipif(not READ_TRACE, reason="KVREPLAY_READ_TRACE names no built reader")


def read(path):
    done = subprocess.run([READ_TRACE, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def arrays(dtype=np.float32, n_heads=8, n_kv_heads=4, n=24, d=64, layers=(0, 7)):
    random = np.random.default_rng(1)
    make = lambda heads: {l: (random.integers(-64, 64, (heads, n, d)) / 16).astype(dtype) for l in layers}
    return make(n_heads), make(n_kv_heads), make(n_kv_heads)


@needs_reader
def test_the_example_of_the_format_page_is_accepted(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "trace_format.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    q, k, v = arrays(np.float16)
    monkeypatch.chdir(tmp_path)
    exec(example, {"q": q, "k": k, "v": v, "token_ids": np.arange(24), "prompt_len": 10})
    found = read("my_trace.h5")
    assert found["info"]["n_tokens"] == 24
    assert found["info"]["prompt_len"] == 10
    assert found["info"]["element"] == "f16"
    assert [layer["layer"] for layer in found["info"]["layers"]] == [0, 7]
    assert found["last_key"] == k[7][-1, -1].astype(float).tolist()
    assert found["failures"] == 0
    assert found["hash"] == kvtrace.content_hash("my_trace.h5")
    with kvtrace.open("my_trace.h5") as trace:
        assert np.array_equal(trace.q(7), q[7].astype(np.float32))


@needs_reader
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_everything_goes_through(tmp_path, dtype):
    q, k, v = arrays()
    path = tmp_path / "t.h5"
    queries = np.arange(5, 24)
    score = {layer: np.arange(4 * 24, dtype=np.float32).reshape(4, 24) for layer in (0, 7)}
    kvtrace.write(path, q={l: a[:, queries] for l, a in q.items()}, k=k, v=v, token_ids=np.arange(24), prompt_len=10,
                  attention_scale=0.125, n_layers=8, rope_theta=1e4, dtype=dtype, q_index=queries,
                  w_o={l: np.ones((6, 8 * 64)) for l in k}, scores={"mine": score}, spans=[("needle", 3, 5)],
                  logprob=-np.arange(24), pieces=[f"ä{i}" for i in range(24)], model_name="m", provenance="made up")
    found = read(path)
    assert found["failures"] == 0
    assert found["info"]["element"] == dtype
    assert found["info"]["layers"][0]["queries"] == "from token 5"
    assert found["info"]["layers"][0]["scores"] == ["mine"]
    assert found["info"]["layers"][0]["hidden"] == 6
    assert found["info"]["spans"] == [{"name": "needle", "begin": 3, "end": 5}]
    with kvtrace.open(path) as trace:
        assert found["hash"] == found["info"]["content_hash"] == kvtrace.content_hash(trace.file)
        assert trace.element() == dtype
        assert trace.prompt_len == 10
        for layer in (0, 7):
            assert np.array_equal(trace.k(layer), k[layer])  # multiples of 1/16 below 4 fit every type
            assert np.array_equal(trace.v(layer, 2), v[layer][2])
            assert np.array_equal(trace.q(layer, 5), q[layer][5, 5:])
            assert np.array_equal(trace.scores(layer, "mine"), score[layer])
            assert trace.w_o(layer).shape == (6, 512)
    kvtrace.add_scores(path, "other", {0: score[0]})
    again = read(path)
    assert again["failures"] == 0
    assert again["hash"] != found["hash"]


def test_bfloat16_is_rounded_to_even_and_is_a_true_hdf5_float(tmp_path):
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 3e38], np.float32).reshape(1, 6, 1)
    path = tmp_path / "t.h5"
    kvtrace.write(path, q={0: values}, k={0: values}, v={0: values}, token_ids=np.arange(6), prompt_len=1,
                  attention_scale=1.0, dtype="bf16")
    with kvtrace.open(path) as trace:
        fast = trace.k(0).reshape(-1)
        assert fast[1] == 1.0 and fast[2] == np.float32(1.015625)
        assert np.array_equal(fast, trace.group(0)["k"][:].astype(np.float32).reshape(-1))  # HDF5's own conversion
        committed = h5py.h5t.open(trace.file.id, b"types/bfloat16")
        assert committed.get_fields() == (15, 7, 8, 0, 7) and committed.get_ebias() == 127


@needs_reader
def test_a_flipped_bit_among_the_texts_of_a_file_is_a_sentence(tmp_path):
    """h5py keeps texts in a heap without checksum, whose sizes HDF5 1.10 takes on trust."""
    q, k, v = arrays(n_heads=2, n_kv_heads=1, d=4)
    kvtrace.write(tmp_path / "t.h5", q=q, k=k, v=v, token_ids=np.arange(24), prompt_len=10, attention_scale=0.1)
    data = (tmp_path / "t.h5").read_bytes()
    heap = data.index(b"GCOL")
    random = np.random.default_rng(2)
    codes = set()
    for at in heap + np.concatenate([np.arange(8, 40), random.integers(0, 600, 60)]):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        (tmp_path / "f.h5").write_bytes(flipped)
        done = subprocess.run([READ_TRACE, str(tmp_path / "f.h5")], capture_output=True, check=False)
        codes.add(done.returncode)
    assert codes == {0, 3}


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path):
    q, k, v = arrays()
    good = dict(q=q, k=k, v=v, token_ids=np.arange(24), prompt_len=10, attention_scale=0.1)
    bad_k = {l: a.copy() for l, a in k.items()}
    bad_k[7][0, 3, 1] = np.nan
    for change, message in (({"k": bad_k}, "finite"), ({"prompt_len": 25}, "prompt_len 25"), ({"dtype": "i8"}, "unknown"),
                            ({"v": {0: v[0]}}, "same layers"), ({"q_index": [1, 2]}, "expected shape")):
        with pytest.raises(ValueError, match=message):
            kvtrace.write(tmp_path / "t.h5", **{**good, **change})
        assert os.listdir(tmp_path) == []


def test_recorded_evictions(tmp_path):
    prompt_len, n_steps = 3, 4
    kept = np.ones((2, n_steps, 7), bool)
    kept[0, 0:, 1] = False   # cut at the prompt
    kept[0, 2:, 3] = False   # a decode token, evicted before step 2
    kept[1, 3:, 0] = False
    evicted_at = kvtrace.evicted_at_from_kept(kept, prompt_len)
    assert evicted_at.tolist() == [[4, 0, 4, 2, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4]]
    kvtrace.write_evicted_at(tmp_path / "e.h5", {4: evicted_at})
    assert np.array_equal(kvtrace.read_evicted_at(tmp_path / "e.h5")[4], evicted_at)
    with h5py.File(tmp_path / "e.h5") as f:
        assert f["evicted_at/L004"].dtype == np.int32
    kept[0, 3, 1] = True
    with pytest.raises(ValueError, match="token 1 of set 0 is back at step 3"):
        kvtrace.evicted_at_from_kept(kept, prompt_len)
