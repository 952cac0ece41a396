"""What a run writes: the same bytes each time, rows that do not depend on company, files that agree with each other."""

import json

import h5py
import numpy as np
import pytest

from harness import arrays, assert_refused, good_run, kvreplay, kvtrace, pick, rows, run, write

METHODS = ["random", "streaming", "h2o", "tova", "snapkv:obs_window=4,decode=evict", "knorm", "keydiff", "momentum",
           "momentkv", "residual", "oracle_mass", "full+topk", "h2o:scope=query_head", "h2o+adakv",
           "streaming+kivi:residual=4,group=4"]
P, N = 90, 240
DETAIL = ("--detail", "steps,retained,outputs", "--steps", "0,5,149")


def text(column):
    return column.asstr()[:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def trace(folder):
    q, k, v = arrays(n_tokens=N, n_heads=8, n_kv_heads=2, head_dim=16, layers=(0, 1), sharp=2)
    w_o = {layer: np.random.default_rng(layer).standard_normal((24, 8 * 16)).astype(np.float32) for layer in (0, 1)}
    return write(folder / "t.h5", q, k, v, prompt_len=P, w_o=w_o, spans=[("needle", 3, 9), ("late", P + 10, P + 20)])


@pytest.fixture(scope="module")
def full(folder, trace):
    good_run(trace, folder / "full", *(f"--method={m}" for m in METHODS), "-b", "16,32", *DETAIL)
    return folder / "full"


def cells(results):
    c = results["cells"]
    return list(zip((f"{i:06}" for i in range(len(c["layer"]))), c["layer"][:], text(c["label"]), text(c["budget"])))


def test_summary_has_every_cell(full):
    table = rows(full)
    assert {(r["layer"], r["label"], r["budget"]) for r in table} \
        == {(str(layer), m, b) for layer in (0, 1) for m in METHODS for b in ("16", "32")}
    for row in table:
        assert row["trace"] == "t"
        assert row["foresight"] == ("oracle" if row["label"] in ("oracle_mass", "full+topk") else "none")
        assert (row["compensator"] != "") == (row["metric"] in (
            "error_corrected", "cos_estimate", "log_mass_ratio", "error_exact_mass", "error_exact_direction",
            "projected_error_corrected"))
        if row["q_head"]:
            assert int(row["kv_head"]) == int(row["q_head"]) // 4
        if row["metric"].startswith("projected_"):
            assert row["kv_head"] == row["q_head"] == ""
        if row["metric"] in ("evicted_mass", "error", "error_output", "error_corrected"):
            assert row["n"] == N - P and row["n_skipped"] == 0


def test_same_command_same_bytes(trace, full, folder):
    for name, threads in (("again", 1), ("two", 2)):
        good_run(trace, folder / name, *(f"--method={m}" for m in METHODS), "-b", "16,32", *DETAIL, threads=threads)
        assert (folder / name / "summary.csv").read_bytes() == (full / "summary.csv").read_bytes()
        assert (folder / name / "results.h5").read_bytes() == (full / "results.h5").read_bytes()
    good_run(trace, folder / "again", *(f"--method={m}" for m in METHODS), "-b", "16,32", *DETAIL, "--force")
    assert (folder / "again" / "results.h5").read_bytes() == (full / "results.h5").read_bytes()
    assert not list((folder / "again").glob("*.part"))


@pytest.mark.parametrize("method", METHODS)
def test_company_changes_nothing(trace, full, tmp_path, method):
    alone = good_run(trace, tmp_path / "alone", "-m", method, "-b", "32")
    assert alone == [row for row in rows(full) if row["label"] == method and row["budget"] == "32"]


def test_memory_changes_nothing(trace, full, tmp_path):
    good_run(trace, tmp_path / "small", *(f"--method={m}" for m in METHODS), "-b", "16,32", "--memory", "4MiB")
    assert (tmp_path / "small" / "summary.csv").read_bytes() == (full / "summary.csv").read_bytes()


def test_an_archive_replays_the_same(trace, full, tmp_path):
    (tmp_path / "a").mkdir()
    assert kvreplay("repack", trace, tmp_path / "a" / "t.h5", "--profile", "archive").returncode == 0
    table = good_run(tmp_path / "a" / "t.h5", tmp_path / "out", "-m", "h2o", "-b", "16")
    assert table == [row for row in rows(full) if row["label"] == "h2o" and row["budget"] == "16"]


def test_fewer_metrics_evict_the_same(trace, full, tmp_path):
    table = good_run(trace, tmp_path / "few", *(f"--method={m}" for m in METHODS), "-b", "16,32", "--metrics",
                     "error,evicted_mass", "--detail", "retained")
    key = ("layer", "kv_head", "q_head", "label", "budget", "metric")
    whole = {tuple(row[k] for k in key): row for row in rows(full)}
    compared = 0
    for row in table:
        if row["metric"] in ("error", "evicted_mass"):
            other = whole[tuple(row[k] for k in key)]
            for field in ("mean", "p50", "max"):
                assert row[field] == pytest.approx(other[field], rel=1e-5, abs=1e-9)
            compared += 1
    assert compared == 2 * 2 * 2 * 8 * len(METHODS)
    with h5py.File(full / "results.h5") as a, h5py.File(tmp_path / "few" / "results.h5") as b:
        for cell, _, label, _ in cells(a):
            assert np.array_equal(a["evicted_at"][cell][:], b["evicted_at"][cell][:]), label


def test_blocks_and_summary_are_means_of_steps(full):
    table = rows(full)
    with h5py.File(full / "results.h5") as f:
        for cell, layer, label, budget in cells(f):
            mine = [r for r in table if (r["layer"], r["label"], r["budget"]) == (str(layer), label, budget)]
            assert set(f["blocks"][cell]) == set(f["steps"][cell])
            for name in f["blocks"][cell]:
                blocks, steps = f["blocks"][cell][name][:], f["steps"][cell][name][:].astype(float)
                at = f["steps"][cell][name].attrs.get("steps", np.arange(steps.shape[1]))
                assert blocks.shape == (steps.shape[0], -(-(N - P) // 64))
                for b in range(blocks.shape[1]):
                    here = steps[:, at // 64 == b]
                    n = (~np.isnan(here)).sum(1)
                    mean = np.where(n > 0, np.nansum(here, 1) / np.maximum(n, 1), np.nan)
                    assert np.allclose(mean, blocks[:, b], rtol=1e-12, atol=0, equal_nan=True), (label, name)
                metric, _, compensator = name.partition(".")
                series = [r for r in mine if r["metric"] == metric and r["compensator"] == compensator]
                assert len(series) == len(steps), (label, name)
                for r, values in zip(series, steps):
                    counted = values[~np.isnan(values)]
                    assert (r["n"], r["n_skipped"]) == (len(counted), len(values) - len(counted))
                    if len(counted):
                        assert r["mean"] == pytest.approx(counted.mean(), rel=1e-7)
                        assert r["std"] == pytest.approx(counted.std(), rel=1e-6, abs=1e-12)
                        assert r["p90"] == pytest.approx(np.quantile(counted, 0.9), rel=1e-7)
                        assert r["max"] == pytest.approx(counted.max(), rel=1e-7)


def test_outputs_are_what_the_errors_say(full):
    at = [0, 5, N - P - 1]
    with h5py.File(full / "results.h5") as f:
        for cell, _, label, _ in cells(f):
            out, steps = f["outputs"][cell], f["steps"][cell]
            assert list(out.attrs["steps"]) == at
            whole, kept, lost = (out[name][:].astype(float) for name in ("f", "f_R", "f_E"))
            w = steps["evicted_mass"][:, at].astype(float)[:, :, None]
            error = np.linalg.norm(whole - kept, axis=2) / np.linalg.norm(whole, axis=2)
            assert np.allclose(error, steps["error"][:, at], rtol=1e-3, atol=1e-6), label
            assert np.allclose((1 - w) * kept + w * np.nan_to_num(lost), whole, rtol=1e-3, atol=1e-5), label


def test_steps_may_come_in_any_order_and_twice(trace, tmp_path):
    good_run(trace, tmp_path / "out", "-m", "h2o", "-b", "16", "--detail", "outputs,steps", "--steps", "7,3,7")
    with h5py.File(tmp_path / "out" / "results.h5") as f:
        out, at = f["outputs/000000"], f["outputs/000000"].attrs["steps"]
        assert set(at) == {3, 7}
        error = np.linalg.norm(out["f"][:] - out["f_R"][:], axis=2) / np.linalg.norm(out["f"][:], axis=2)
        assert np.allclose(error, f["steps/000000/error"][:][:, at], rtol=1e-3, atol=1e-6)


def test_retained_is_what_resident_says(full):
    with h5py.File(full / "results.h5") as f:
        for cell, _, label, _ in cells(f):
            at = f["evicted_at"][cell][:]
            assert at.min() >= 0 and at.max() <= N - P
            if label in ("h2o", "tova", "knorm", "streaming", "residual", "h2o+adakv"):
                born = np.maximum(np.arange(N) - P, 0)
                step = np.arange(N - P)[:, None]
                n = ((born <= step) & (step < at[:, None, :])).sum(2)  # [n_sets, n_steps]
                resident = f["steps"][cell]["resident"][:]
                assert np.array_equal(np.broadcast_to(n, resident.shape), resident), label


def test_recorded_evictions_replay_to_the_same_errors(trace, full, tmp_path):
    for method, given in (("h2o", "given:evicted_at={}"), ("tova", "given:evicted_at={},scope=layer"),
                          ("h2o:scope=query_head", "given:evicted_at={},scope=query_head")):
        with h5py.File(full / "results.h5") as f:
            recorded = {int(layer): f["evicted_at"][cell][:] for cell, layer, label, budget in cells(f)
                        if label == method and budget == "32"}
        path = tmp_path / f"{len(method)}.h5"
        kvtrace.write_evicted_at(path, recorded)
        table = good_run(trace, tmp_path / f"out{len(method)}", "-m", given.format(path))
        assert {row["budget"] for row in table} == {""}
        for metric in ("error", "evicted_mass", "cos_retained_evicted", "error_corrected"):
            mine, theirs = pick(table, metric), pick(rows(full), metric, label=method, budget="32")
            assert len(mine) == len(theirs) > 0
            assert np.allclose(mine, theirs, rtol=1e-6, atol=1e-9), (method, metric)


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.unlink(), ("does not exist",)),
    (lambda p: p.write_text("x"), ()),
    (lambda p: kvtrace.write_evicted_at(p, {0: np.zeros((2, N), np.int32)}), ("L001",)),
    (lambda p: kvtrace.write_evicted_at(p, {i: np.zeros((3, N), np.int32) for i in (0, 1)}), ("L000", f"(2, {N})", f"(3, {N})")),
    (lambda p: kvtrace.write_evicted_at(p, {i: np.zeros((2, N - 1), np.int32) for i in (0, 1)}), ("L000", f"(2, {N - 1})")),
    (lambda p: kvtrace.write_evicted_at(p, {i: np.full((2, N), N, np.int32) for i in (0, 1)}), ("L000", str(N))),
])
def test_recorded_evictions_that_are_none(trace, tmp_path, damage, words):
    path = tmp_path / "e.h5"
    kvtrace.write_evicted_at(path, {i: np.zeros((2, N), np.int32) for i in (0, 1)})
    damage(path)
    assert_refused(run(trace, tmp_path / "out", "-m", f"given:evicted_at={path}"), 3, "e.h5", *words)
    assert not (tmp_path / "out").exists()


def test_given_scores(tmp_path):
    q, k, v = arrays(n_tokens=60)
    wanted = np.zeros((1, 60), np.float32)
    wanted[0, [3, 7, 20]] = 1
    path = write(tmp_path / "s.h5", q, k, v, prompt_len=40, scores={"mine": {0: wanted}})
    good_run(path, tmp_path / "out", "-m", "given:scores=mine", "-b", "3", "--detail", "retained")
    with h5py.File(tmp_path / "out" / "results.h5") as f:
        # The last token leaves after the last step, and so was never missing.
        assert set(np.flatnonzero(f["evicted_at/000000"][0] == 20)) == {3, 7, 20, 59}


def test_spans(full):
    table = rows(full)
    assert {row["metric"] for row in table if row["metric"].startswith("retention")} == {"retention:needle", "retention:late"}
    # The latest tokens leave a span behind; the sinks (4) hold one token of the needle (3 to 8).
    streaming = dict(label="streaming", budget="16", layer=0, kv_head=0)
    assert pick(table, "retention:needle", "max", **streaming) == [pytest.approx(1 / 6)]
    assert set(pick(table, "retention:late", "max", **streaming)) == {1}


def test_spans_lose_mass(full):
    table = rows(full)
    for label in ("streaming", "h2o"):
        for q_head in range(4):
            at = dict(label=label, budget="16", layer=0, kv_head=0, q_head=q_head)
            lost, late = (pick(table, f"lost_mass:{name}", "mean", **at)[0] for name in ("needle", "late"))
            assert 0 < lost < pick(table, "evicted_mass", "mean", **at)[0] and 0 < late < 1


def test_diagnostics_are_asked_for(trace, full, tmp_path):
    assert not {row["metric"] for row in rows(full)} & {"future_missed_mass", "churn", "lost_importance"}
    table = good_run(trace, tmp_path / "out", "-m", "h2o", "full+topk:per=query_head", "-b", "16", "-c", "none",
                     "--metrics", "error,diagnostics", "--detail", "steps")
    at = dict(label="h2o", layer=0, kv_head=0, q_head=0)
    missed, = pick(table, "future_missed_mass", "mean", **at)
    assert 0 < missed < 1
    assert [(row["n"], row["n_skipped"]) for row in table if row["metric"] == "future_missed_mass" and
            row["label"] == "h2o"][0] == (N - P - 1, 1)  # nothing comes after the last step
    for name in ("top1_agreement", "top16_jaccard"):
        assert set(pick(table, name, "mean", label="full+topk:per=query_head")) == {1}
    with h5py.File(tmp_path / "out" / "results.h5") as f:
        assert list(f["steps/000000/lost_importance"].attrs["steps"]) == [N - P - 1]
        steps = f["steps/000000/churn"][0]
    assert np.isnan(steps[0]) and np.allclose(steps[1:], 1 / 17)  # every step drops one of the 17 that were attended


def test_projected_errors(trace, full):
    reader = kvtrace.open(trace)
    w_o = reader.w_o(0).astype(float)
    with h5py.File(full / "results.h5") as f:
        cell = next(c for c, layer, label, budget in cells(f) if (layer, label, budget) == (0, "h2o", "16"))
        whole, kept = (f["outputs"][cell][name][:].astype(float) for name in ("f", "f_R"))
        at = f["outputs"][cell].attrs["steps"]
        measured = f["steps"][cell]["projected_error"][0, at]
    flat = lambda x: x.transpose(1, 0, 2).reshape(len(at), -1)  # heads side by side
    error = np.linalg.norm((flat(whole) - flat(kept)) @ w_o.T, axis=1) / np.linalg.norm(flat(whole) @ w_o.T, axis=1)
    assert np.allclose(error, measured, rtol=1e-4)


def test_run_json(trace, full):
    j = json.loads((full / "run.json").read_text())
    assert j["complete"] is True and j["failed"] == [] and j["seed"] == 0 and j["threads"] == 1
    assert [m["label"] for m in j["methods"]] == METHODS
    assert j["traces"][0]["content_hash"] == kvtrace.content_hash(str(trace))
    assert "open-loop" in j["open_loop"]
    assert j["methods"][METHODS.index("momentkv")]["preset"] == "momentkv"
    assert [m["class"] for m in j["methods"]] == ["correction" if m == "momentkv" else "selection" if "topk" in m else
                                                  "encoding" if "kivi" in m else "eviction" for m in METHODS]


def test_commas_in_labels(trace, tmp_path):
    table = good_run(trace, tmp_path / "out", "-m", "h2o:sink=2,window=4,tova", "-b", "16", "--metrics", "error")
    assert {(row["label"], row["method"]) for row in table} == {("h2o:sink=2,window=4", "h2o:sink=2,window=4"), ("tova", "tova")}


def test_seeds(trace, tmp_path):
    runs = [good_run(trace, tmp_path / str(i), "-m", "random", "-b", "16", "--seed", seed, "--metrics", "error")
            for i, seed in enumerate((1, 1, 2))]
    assert runs[0] == runs[1] != runs[2]
