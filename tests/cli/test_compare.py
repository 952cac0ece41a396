"""Where heads look, from a trace to results.h5, against numpy; and the commands that compare, as a user calls them."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from harness import KVREPLAY, arrays, assert_refused, good_run, kvreplay, make, write

P, N, LAYERS = 70, 210, (0, 3)
PYTHON = {**os.environ, "KVREPLAY_PYTHON": os.environ.get("KVREPLAY_PYTHON", sys.executable)}


@pytest.fixture(scope="module")
def qkv():
    return arrays(n_tokens=N, n_heads=4, n_kv_heads=2, head_dim=16, layers=LAYERS, sharp=3)


@pytest.fixture(scope="module")
def out(tmp_path_factory, qkv):
    folder = tmp_path_factory.mktemp("compare")
    write(folder / "t.h5", *qkv, prompt_len=P)
    good_run(folder / "t.h5", folder / "out", "-m", "h2o", "-m", "streaming", "-m", "full", "-b", "16,32",
             "--compensators", "mean,moments")
    return folder / "out"


def looks(q, k, heads_per_kv):
    """{name: (n_heads,)} by the definitions, in float64."""
    sums = {name: np.zeros(len(q)) for name in ("sink", "local", "far", "entropy", "concentration")}
    steps = [i * (N - P) // 64 - 1 for i in range(1, 65)]
    for h in range(len(q)):
        for step in steps:
            now = P + step
            logits = k[h // heads_per_kv, :now + 1].astype(float) @ q[h, now].astype(float) / 4
            a = np.exp(logits - logits.max())
            a /= a.sum()
            far = np.sort(a[4:now + 1 - 32])[::-1]
            sums["sink"][h] += a[:4].sum()
            sums["local"][h] += a[now + 1 - 32:].sum()
            sums["far"][h] += far.sum()
            sums["entropy"][h] += -(a * np.log(a)).sum() / np.log(now + 1)
            sums["concentration"][h] += far[:max(1, len(far) // 100)].sum() / far.sum()
    return {name: s / 64 for name, s in sums.items()}


def test_heads_against_numpy(out, qkv):
    q, k, _ = qkv
    with h5py.File(out / "results.h5") as file:
        assert list(file["heads"]) == ["t"] and list(file["heads/t"]) == ["000", "003"]
        for layer in LAYERS:
            expected = looks(q[layer], k[layer], 2)
            found = file[f"heads/t/{layer:03}"]
            assert set(found) == set(expected)
            for name in expected:
                assert found[name].dtype == np.float64
                np.testing.assert_allclose(found[name][()], expected[name], rtol=1e-5)


def test_heads_depend_on_the_trace_alone(out, tmp_path):
    good_run(out.parent / "t.h5", tmp_path / "other", "-m", "tova", "-b", "8", "--metrics", "error", threads=3)
    with h5py.File(out / "results.h5") as a, h5py.File(tmp_path / "other" / "results.h5") as b:
        for layer in LAYERS:
            for name in a[f"heads/t/{layer:03}"]:
                np.testing.assert_array_equal(a[f"heads/t/{layer:03}/{name}"][()], b[f"heads/t/{layer:03}/{name}"][()])


def test_results_say_what_states_weigh(out):
    trace, = json.loads((out / "run.json").read_text())["traces"]
    assert (trace["head_dim"], trace["v_head_dim"]) == (16, 16)
    mean, moments = 4 * (16 + 16 + 1), 4 * (16 * 16 + 16 + 16 + 1)
    with h5py.File(out / "results.h5") as file:
        assert set(file["cells/state_bytes"].asstr()[()]) == {f"{mean},{moments}"}


def test_bytes_hold_states(out, tmp_path):
    """States that grow with the budget, or that every query head of a group has, are within a budget in bytes; it may
    hold one token more during a step, the current one."""
    slot = 4 * (16 + 16)
    for name, sets in (("h2o+clusters:validate=0", 1), ("h2o:scope=query_head+moments", 2),
                       ("h2o:scope=query_head+clusters:validate=0", 2)):
        folder = tmp_path / name.replace(":", "_")
        rows = good_run(out.parent / "t.h5", folder, "-m", name, "-b", "8KiB", "-c", "none", "--metrics",
                        "bytes,resident")
        kept, resident = ({(r["layer"], r["kv_head"]): float(r["max"]) for r in rows if r["metric"] == metric}
                          for metric in ("bytes", "resident"))
        with h5py.File(folder / "results.h5") as file:
            states = dict(zip(map(str, file["cells/layer"][()]), map(float, file["cells/state_bytes"].asstr()[()])))
        for (layer, head), n in kept.items():
            assert 8192 - sets * (slot + 132) < n <= 8192 + sets * slot
            assert n == resident[layer, head] * slot + states[layer] and states[layer] > 0


def test_commands(out, tmp_path):
    done = kvreplay("compare", f"{out}:h2o", f"{out}:streaming", "--by", "layer", "--json", env=PYTHON)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = json.loads(done.stdout)
    assert [r["budget"] for r in told["rows"]] == ["16", "32"] and len(told["layer"]) == 4
    done = kvreplay("compare", out, out, "--metric", "all", "--tolerance", "0", "--out", tmp_path / "d.svg", env=PYTHON)
    assert done.returncode == 0 and (tmp_path / "d.svg").stat().st_size > 1000, done.stderr
    for at in ("tokens", "bytes"):
        done = kvreplay("league", out, "--at", at, "--csv", env=PYTHON)
        assert done.returncode == 0 and done.stdout.startswith("group,unit,budget,at,rank,label,"), done.stderr
        assert ("h2o+moments" in done.stdout) == (at == "bytes")
    done = kvreplay("league", out, "--best", "--json", env=PYTHON)
    assert done.returncode == 0, done.stderr
    assert {(r["class"], r["label"].split("+")[0]) for r in json.loads(done.stdout)} >= {("eviction", "h2o")}


def test_tradeoffs(out, tmp_path):
    done = kvreplay("tradeoffs", out, "--gpu", "h100", "--batches", "1,4", "--contexts", "8k", "--out",
                    tmp_path / "t.pdf", "--json", env=PYTHON)
    assert done.returncode == 0 and (tmp_path / "t.pdf").stat().st_size > 1000, done.stderr
    told = json.loads(done.stdout)
    full = next(c for c in told["configurations"] if c["label"] == "full")
    # 16 + 16 numbers of 4 bytes for each of P + 1 to N tokens, of two KV heads in two layers
    bytes_read = 2 * 2 * 128 * (P + (N - P + 1) / 2)
    assert full["fidelity"] == 1 and full["bytes_share"] == pytest.approx(1, rel=1e-6)
    assert full["tpot_us"] == pytest.approx(1e6 * bytes_read / 3.35e12, rel=1e-6)
    assert full["max_batch"] == 80e9 // bytes_read
    assert [(w["batch"], w["measured"]) for w in told["winners"]] == [(1, True), (4, True), (1, False), (4, False)]
    done = kvreplay("tradeoffs", out, "--gpu", "h10", env=PYTHON)
    assert done.returncode == 0 and "H100-SXM: 3.35 TB/s" in done.stdout, done.stderr
    done = kvreplay("tradeoffs", out, "--gpu", "v100", env=PYTHON)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("kvreplay tradeoffs: GPU v100")


def refused(done, *words):
    """One sentence of the Python package, which names the command too."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("kvreplay compare: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def test_what_is_refused(out, tmp_path):
    for arguments, words in (((f"{out}:h2", f"{out}:streaming"), ("h2 is not in", "did you mean h2o?")),
                             ((out, tmp_path / "nowhere"), ("does not exist",)),
                             ((out, out, "--by", "heads"), ("--by heads", "did you mean head?")),
                             ((out, out, "--tolerance=-1"), ("--tolerance -1",))):
        refused(kvreplay("compare", *arguments, env=PYTHON), *words)
    make(tmp_path / "t.h5", n_tokens=N, n_heads=4, n_kv_heads=2, head_dim=16, layers=LAYERS, prompt_len=P, seed=9)
    good_run(tmp_path / "t.h5", tmp_path / "other", "-m", "h2o", "-b", "16")
    refused(kvreplay("compare", out, tmp_path / "other", env=PYTHON), "trace t has content_hash")
    assert_refused(kvreplay("compare", out), 2, "B is required")


def test_a_reader_that_leaves_is_no_error(out):
    done = subprocess.run(["bash", "-c", '"$0" tradeoffs "$1" --json | head -c 1', KVREPLAY, out], env=PYTHON, text=True,
                          capture_output=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{", "")


def test_files_beside_the_user_are_not_imported(out, tmp_path):
    (tmp_path / "copy.py").write_text("raise SystemExit('imported')\n")
    done = kvreplay("league", out, cwd=tmp_path, env=PYTHON)
    assert done.returncode == 0 and "imported" not in done.stderr, done.stderr
