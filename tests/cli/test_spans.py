"""Named spans: allocators that protect them, tables of heads that copy from them, and what is refused without them."""

import json

import harness
import numpy as np
import pytest

SPANS = {"spans": [("system", 0, 6), ("needle", 20, 30), ("question", 50, 64)]}


def trace(path, **options):
    q, k, v = harness.arrays(n_heads=4, n_kv_heads=2, layers=(0, 2))
    ids = np.arange(96) % 7
    first = next(iter(k))
    harness.kvtrace.write(str(path), q=q, k=k, v=v, token_ids=ids, prompt_len=64, dtype="f32",
                          attention_scale=k[first].shape[2] ** -0.5, rope_theta=1e4, **options)
    return path


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_spans_are_needed_and_named(tmp_path):
    plain, spans = trace(tmp_path / "plain.h5"), trace(tmp_path / "spans.h5", **SPANS)
    out = tmp_path / "out"
    refused(harness.run(plain, out, "-m", "h2o+fair", "-b", 8), "h2o+fair", "named spans", "none")
    refused(harness.run(spans, out, "-m", "h2o+whitelist:spans=sistem", "-b", 8), "'sistem'", "system, needle, question")
    refused(harness.run(spans, out, "-m", "h2o+whitelist:spans=system:needle", "-b", 15), "16 tokens", "budget of 15")
    refused(harness.kvreplay("headscores", plain, "--out", out), "named spans", "none")
    refused(harness.kvreplay("headscores", spans, "--span", "x", "--out", out), "'x'")
    assert not out.exists()


def spans_of(path):
    return [(s["name"], s["begin"], s["end"]) for s in json.loads(harness.kvreplay("info", path, "--json").stdout)["spans"]]


def test_a_trace_gets_spans_by_name(tmp_path):
    path, named = trace(tmp_path / "t.h5", **SPANS), tmp_path / "named.h5"
    result = harness.kvreplay("repack", "--span", "a=b=3:5", path, "--span", "needle=0:64", named, "--profile", "archive")
    assert result.returncode == 0, result.stderr
    assert spans_of(named) == [("system", 0, 6), ("needle", 0, 64), ("question", 50, 64), ("a=b", 3, 5)]
    assert harness.kvreplay("verify", named).returncode == 0
    for bad, words in (("needle", "NAME=BEGIN:END"), ("=0:5", "NAME=BEGIN:END"), ("x=1:2:3", "NAME=BEGIN:END"),
                       ("x=1.5:2", "NAME=BEGIN:END"), ("x=5:5", "before its end"), ("x=90:97", "96 tokens"),
                       ("x=-1:4", "before its end"), ("x=0:99999999999", "NAME=BEGIN:END")):
        refused(harness.kvreplay("repack", path, tmp_path / "no.h5", "--profile", "working", "--span", bad), words)
    assert not (tmp_path / "no.h5").exists()


def test_an_import_gets_spans_by_name(tmp_path):
    q, k, v = harness.arrays(n_heads=4, n_kv_heads=2, layers=(0,))
    np.savez(tmp_path / "in.npz", token_ids=np.arange(96, dtype=np.int32), q0=q[0], k0=k[0], v0=v[0])
    options = ["--prompt-len", 64, "--attention-scale", 0.25]
    result = harness.kvreplay("import", tmp_path / "in.npz", tmp_path / "t.h5", *options, "--span", "needle=20:30")
    assert result.returncode == 0, result.stderr
    assert spans_of(tmp_path / "t.h5") == [("needle", 20, 30)]
    # Of the tokens that are imported.
    refused(harness.kvreplay("import", tmp_path / "in.npz", tmp_path / "no.h5", *options, "--tokens", 80, "--span",
                             "x=70:96"), "80 tokens")


def test_whitelisted_spans_stay_and_fair_ones_keep_their_share(tmp_path):
    path = trace(tmp_path / "t.h5", **SPANS)
    result = harness.run(path, tmp_path / "out", "-b", 16, "-m", "h2o+whitelist:spans=system:needle",
                         "-m", "streaming:sink=0+fair", "-m", "streaming:sink=0")
    assert result.returncode == 0, result.stderr
    kept = {}
    for row in harness.csv.DictReader(open(tmp_path / "out" / "summary.csv")):
        if row["metric"].startswith("retention:"):
            kept.setdefault((row["method"].split("+")[-1], row["metric"]), []).append(float(row["max"]))
    assert set(kept["whitelist:spans=system:needle", "retention:system"]) == {1}
    assert set(kept["whitelist:spans=system:needle", "retention:needle"]) == {1}
    assert min(kept["fair", "retention:system"]) > 0
    assert max(kept["streaming:sink=0", "retention:system"]) == 0


@pytest.mark.parametrize("options", [[], ["--hard"], ["--group", "max"]])
def test_head_scores_are_tables_for_allocators(tmp_path, options):
    path = trace(tmp_path / "t.h5", **SPANS)
    result = harness.kvreplay("headscores", path, "--span", "needle", "--out", tmp_path / "heads", *options)
    assert result.returncode == 0, result.stderr
    tables = {name: json.loads((tmp_path / "heads" / f"{name}.json").read_text())
              for name in ("surface", "logic", "ignore")}
    for table in tables.values():
        assert list(table) == ["0", "2"] and all(len(row) == 2 for row in table.values())
    if "max" not in options:
        for layer in ("0", "2"):
            assert np.allclose(sum(np.array(table[layer]) for table in tables.values()), 1)
    refused(harness.kvreplay("headscores", path, "--out", tmp_path / "heads"), "--force")
    files = f"surface=@{tmp_path}/heads/surface.json,logic=@{tmp_path}/heads/logic.json"
    result = harness.run(path, tmp_path / "out", "-b", 16, "-m", f"surfacelogic-like:{files},obs_window=4",
                         "-m", f"h2o+surface_logic:{files},placebo=2",
                         "-m", f"h2o+headkv:scores=@{tmp_path}/heads/surface.json,window=4")
    assert result.returncode == 0, result.stderr
    refused(harness.run(path, tmp_path / "more", "-b", 16, "-m", f"tova+surface_logic:{files}"), "scope=layer")
