"""The explanation of a real replay: its numbers against numpy in float64 and against the files, and its page."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from harness import KVREPLAY, arrays, good_run, kvreplay, write  # noqa: E402
from test_report import CHROMIUM, needs_browser, opened  # noqa: E402

from kvreplay_analysis import explain, explain_page, load  # noqa: E402
from kvreplay_analysis.errors import Absent  # noqa: E402

if not os.path.exists(KVREPLAY):
    pytest.skip(f"{KVREPLAY} is not built, or KVREPLAY_BINARY does not name it", allow_module_level=True)

P, N, GROUP, TOP = 70, 300, 2, 20
METHODS = ["h2o:sink=2", "momentkv", "h2o:scope=query_head", "momentum", "full+quest:page=8", "full",
           "full+kivi:residual=32"]
PIECES = [["word", " the", "\n", "\"quo,ted\"", "<b>&amp;", "é"][i % 6] for i in range(N)]


def environment():
    return {**os.environ, "KVREPLAY_PYTHON": sys.executable}


def explained(folder, *arguments, **more):
    return kvreplay("explain", folder, *arguments, env=environment(), **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    q, k, v = arrays(n_tokens=N, n_heads=4, n_kv_heads=2, head_dim=16, layers=(0, 3), sharp=2.5, seed=11)
    for layer in v:
        v[layer] += 0.7
    trace = write(folder / "t.h5", q, k, v, prompt_len=P, spans=[("needle", 5, 12), ("late", P + 20, P + 60)],
                  pieces=PIECES)
    good_run(trace, folder / "out", *(f"--method={m}" for m in METHODS), "-b", "12,24,48")
    return {"folder": folder / "out", "q": q, "k": k, "v": v}


@pytest.fixture(scope="module")
def ex(run):
    done = explained(run["folder"], "--method", "h2o:sink=2", "--against", "momentkv", "--top", TOP)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    page = Path(done.stdout.strip().splitlines()[-1])
    assert page == run["folder"] / "explain" / "h2o-sink-2_vs_momentkv_at_24" / "explain.html"
    return explain.load(page.parent)


def other(run, method, *arguments):
    done = explained(run["folder"], "--method", method, *arguments)
    assert done.returncode == 0, done.stderr
    return explain.load(Path(done.stdout.strip().splitlines()[-1]).parent)


def cells(ex):
    return [(w.Index, w.label, w.layer) for w in ex.results.cells.itertuples()]


def slow_damage(run, layer, kv_head, evicted_at):
    """Per token, summed over the group: damage, regret, (n_steps) damage; in float64 from the definitions."""
    damage, regret, by_step = np.zeros(N), np.zeros(N), np.zeros(N - P)
    v = run["v"][layer][kv_head].astype(float)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for step in range(N - P):
            seen = P + step + 1
            logits = run["k"][layer][kv_head, :seen].astype(float) @ run["q"][layer][head, P + step].astype(float) / 4
            w = np.exp(logits - logits.max())
            w /= w.sum()
            gone = evicted_at[:seen] <= step
            f, kept = w @ v[:seen], w[~gone] @ v[:seen][~gone] / w[~gone].sum()
            if not gone.any():
                continue
            u = (f - kept) / np.linalg.norm(f - kept) / np.linalg.norm(f)
            d = np.where(gone, w * ((v[:seen] - kept) @ u), 0)
            damage[:seen] += d
            regret[:seen] += np.where(gone, w, 0)
            by_step[step] += d.sum()
    return damage, regret, by_step


def test_damage_is_that_of_the_definition_and_adds_up_to_the_error(run, ex):
    for cell, _, layer in cells(ex):
        a = ex.attribution(cell)
        error, mass = (ex.results.steps(m)[cell].astype(float) for m in ("error", "evicted_mass"))
        np.testing.assert_array_equal(a["evicted_at"], ex.results.evicted_at(cell))
        for h in range(2):
            damage, regret, by_step = slow_damage(run, layer, h, a["evicted_at"][h])
            heads = slice(h * GROUP, (h + 1) * GROUP)
            np.testing.assert_allclose(a["damage"][h], damage, rtol=2e-4, atol=2e-6)
            np.testing.assert_allclose(a["regret"][h], regret, rtol=1e-5, atol=1e-8)
            np.testing.assert_allclose(by_step, error[heads].sum(axis=0), rtol=1e-5)
            assert a["damage"][h].sum() == pytest.approx(error[heads].sum(), rel=1e-5)
            assert a["regret"][h].sum() == pytest.approx(mass[heads].sum(), rel=1e-5)


def test_tokens_csv_is_the_attribution(run, ex):
    with open(ex.folder / "tokens.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {r["label"] for r in rows} == {"h2o:sink=2", "momentkv"}
    for cell, label, layer in cells(ex):
        a = ex.attribution(cell)
        for h in range(2):
            mine = [r for r in rows if (r["label"], r["layer"], r["kv_head"]) == (label, str(layer), str(h))]
            listed, rest = [r for r in mine if r["token"]], [r for r in mine if not r["token"]]
            assert len(listed) == TOP and len(rest) == 1
            assert int(rest[0]["n"]) == (a["regret"][h] > 0).sum() - TOP
            assert sum(float(r["damage"]) for r in mine) == pytest.approx(a["damage"][h].sum(), rel=1e-8)
            assert sum(float(r["regret"]) for r in mine) == pytest.approx(a["regret"][h].sum(), rel=1e-8)
            worst = np.argsort(-a["damage"][h], kind="stable")[:TOP]
            assert [int(r["token"]) for r in listed] == list(worst)
            for r in listed:
                t = int(r["token"])
                assert r["text"] == PIECES[t] and int(r["id"]) == t and r["q_head"] == ""
                assert float(r["damage"]) == pytest.approx(a["damage"][h, t], rel=1e-8)
                assert int(r["age"]) == P + int(r["evicted_at"]) - t
                assert int(r["missed"]) == a["missed"][h, t]
                if r["first_missed"]:
                    assert int(r["lag"]) == int(r["first_missed"]) - int(r["evicted_at"]) >= 0
    frame = explain.listed_tokens(ex)
    assert len(frame) == len(rows) and frame["damage"].sum() == pytest.approx(sum(float(r["damage"]) for r in rows))


def test_replay_gives_the_numbers_of_the_run(run, ex):
    original = load(run["folder"])
    assert explain.difference_to(ex, original) == ""
    key = ["layer", "kv_head", "q_head", "label", "budget", "metric", "compensator"]
    then = original.summary.set_index(key)["mean"]
    now = ex.results.summary.set_index(key)["mean"]
    assert now.equals(then.loc[now.index])
    changed = original.summary.assign(mean=original.summary["mean"] * 1.001)
    import dataclasses
    assert "instead of" in explain.difference_to(ex, dataclasses.replace(original, summary=changed))


def summary_mean(ex, label, metric, compensator="", **more):
    n = total = 0.0
    with open(ex.folder / "summary.csv", newline="") as file:
        for r in csv.DictReader(file):
            if (r["label"], r["metric"], r["compensator"]) == (label, metric, compensator) and r["mean"] and \
                    all(r[k] == str(v) for k, v in more.items()):
                n += int(r["n"])
                total += int(r["n"]) * float(r["mean"])
    return total / n


def test_table_of_numbers_is_summary_csv(ex):
    table = explain_page.numbers(ex).set_index(["metric", "compensator"])
    assert len(table) > 15
    for (metric, c), row in table.iterrows():
        for label in ex.labels:
            assert row[label] == pytest.approx(summary_mean(ex, label, metric, c), rel=1e-12), (metric, c)


def test_parts_and_halves_are_means_of_steps(ex):
    parts, halves = explain.parts(ex).set_index("label"), explain.halves(ex).set_index(["label", "compensator",
                                                                                        "quantity"])
    for label in ex.labels:
        steps = {m: np.concatenate([a.ravel() for a in ex.of(label).steps(m).values()]).astype(float)
                 for m in ("error", "evicted_mass", "error_parallel", "error_orthogonal")}
        there = np.isfinite(steps["error_parallel"])
        p = parts.loc[label]
        assert p["n"] == there.sum()
        for m, values in steps.items():
            assert p[m] == pytest.approx(values[there].mean(), rel=1e-12)
        assert p["distance"] == pytest.approx(steps["error"][there].sum() / steps["evicted_mass"][there].sum(),
                                              rel=1e-12)
        assert p["orthogonal_share"] == pytest.approx((steps["error_orthogonal"][there] ** 2).sum() /
                                                      (steps["error"][there] ** 2).sum(), rel=1e-4)
        assert p["error_low"] < p["error"] < p["error_high"]
        for c in ("mean", "moments", "gaussian"):
            corrected, mass, direction = (np.concatenate([a.ravel() for a in ex.of(label).steps(m, c).values()])
                                          for m in ("error_corrected", "error_exact_mass", "error_exact_direction"))
            both = np.isfinite(corrected) & np.isfinite(mass) & np.isfinite(direction) & np.isfinite(steps["error"])
            for m, values in (("error_corrected", corrected), ("error_exact_mass", mass), ("error_exact_direction",
                                                                                           direction)):
                row = halves.loc[(label, c, m)]
                assert row["mean"] == pytest.approx(values[both].astype(float).mean(), rel=1e-12)
                left = values[both].astype(float).sum() / steps["error"][both].sum()
                assert row["removed"] == pytest.approx(1 - left, rel=1e-9)
            assert row["acting"] == (label == "momentkv" and c == "moments")


def test_evictions_ages_and_lags(ex):
    frame = explain.evictions(ex)
    expected = sum((ex.results.evicted_at(c) < N - P).sum() for c, _, _ in cells(ex))
    assert len(frame) == expected
    row = frame[(frame["label"] == "momentkv") & ~frame["at_prompt"]].iloc[7]
    assert row["age"] == P + row["evicted_at"] - row["token"]
    for binned, column in ((explain.ages(ex, frame), "age"), (explain.lags(ex, frame), "lag")):
        assert binned.groupby("label")["share"].sum().to_numpy() == pytest.approx(1)
        assert binned["n"].sum() == len(frame)
        mine = binned[(binned["label"] == "h2o:sink=2") & (binned["when"] == "during the decode")]
        values = frame[(frame["label"] == "h2o:sink=2") & ~frame["at_prompt"]][column]
        assert mine[mine[column] == "4–7"]["n"].sum() == values.between(4, 7).sum()
        assert mine[mine[column] == "never"]["n"].sum() == values.isna().sum()


@pytest.mark.parametrize("values, names", [
    ([0, 1, 2, 3, 4, 7, 8], ["0", "1", "2–3", "4–7", "8–15"]), ([0], ["0"]), ([], ["0"])])
def test_doubling_bins(values, names):
    index, got = explain.doubling_bins(values)
    assert got == names and list(index) == [{0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 7: 3, 8: 4}[v] for v in values]


def test_missed_tokens_are_those_that_a_cache_of_the_same_size_would_have_held(run, ex):
    cell, _, layer = cells(ex)[0]
    a, h, step = ex.attribution(cell), 1, 113
    seen = P + step + 1
    w = np.zeros(seen)
    for head in range(h * GROUP, (h + 1) * GROUP):
        logits = run["k"][layer][h, :seen].astype(float) @ run["q"][layer][head, P + step].astype(float) / 4
        x = np.exp(logits - logits.max())
        w += x / x.sum() / GROUP
    gone = a["evicted_at"][h, :seen] <= step
    best = np.argsort(-w)[:(~gone).sum()]
    assert a["step_missed"][h, step] == gone[best].sum() > 0
    assert a["step_missed_mass"][h, step] == pytest.approx(w[best][gone[best]].sum(), rel=1e-5)


def test_span_bias(ex):
    frame = explain.span_bias(ex).set_index(["label", "span"])
    for label in ex.labels:
        assert frame.at[(label, "needle"), "retention"] == pytest.approx(
            summary_mean(ex, label, "retention:needle"), rel=1e-6)
        share = []
        for cell, mine, _ in cells(ex):
            if mine == label:
                at = ex.results.evicted_at(cell)
                for step in range(N - P):
                    share.append((at[:, :P + step + 1] > step).mean())
        assert frame.at[(label, "needle"), "overall"] == pytest.approx(np.mean(share), rel=1e-9)
        row = frame.loc[(label, "needle")]
        assert row["bias"] == pytest.approx(row["retention"] - row["overall"])
        assert row["low"] <= row["bias"] <= row["high"]


def test_raster_is_the_share_of_pairs_kept(ex):
    cell = cells(ex)[0][0]
    lanes, shares, rows, columns = explain.raster(ex, cell, 13, 17)
    at = ex.results.evicted_at(cell)
    for lane in range(2):
        for i, j in ((0, 0), (3, 8), (6, 16), (12, 16), (12, 0)):
            pairs = [(t, s) for t in range(rows[i], rows[i + 1]) for s in range(columns[j], columns[j + 1])
                     if t <= P + s]
            if not pairs:
                assert np.isnan(shares[lane, i, j])
                continue
            # A token that leaves before its own step has been attended never.
            expected = np.mean([s < at[lane, t] and s >= max(0, t - P) for t, s in pairs])
            # `could` counts steps from max(0, t - P) on, which are those with t <= P + s.
            assert shares[lane, i, j] == pytest.approx(expected, abs=1e-12)


def test_paired_differences_and_factors(ex):
    rows = explain.paired(ex).set_index(["metric", "layer"])
    a, b = (ex.of(label).steps("error_output") for label in ex.labels)
    of_a, of_b = (np.concatenate([x[c].ravel() for c in sorted(x)]).astype(float) for x in (a, b))
    r = rows.loc[("error_output", "all")]
    assert r["difference"] == pytest.approx((of_a - of_b).mean(), rel=1e-9)
    assert r["wins"] == pytest.approx((of_a < of_b).mean()) and r["losses"] == pytest.approx((of_a > of_b).mean())
    assert r["low"] < r["difference"] < r["high"] and r["n"] == len(of_a)
    assert set(rows.loc["error"].index) == {"all", 0, 3}
    f = explain.factors(ex).set_index("factor")["ratio"]
    assert f["error"] == pytest.approx(f["evicted_mass"] * f["distance"], rel=1e-12)
    a, b = (summary_mean(ex, label, "error") for label in ex.labels)
    assert f["error"] == pytest.approx(a / b, rel=1e-6)


def test_heads_and_steps_are_those_of_the_files(ex):
    heads = explain.by_head(ex)
    assert len(heads) == 2 * 2 * 4
    for p in heads.itertuples():
        for m in ("error", "error_output", "evicted_mass"):
            expected = summary_mean(ex, p.label, m, layer=p.layer, q_head=p.q_head)
            assert getattr(p, m) == pytest.approx(expected, rel=1e-12)
    line = explain.over_steps(ex)
    mine = line[line["label"] == "momentkv"]
    expected = np.mean([a.astype(float) for a in ex.of("momentkv").steps("error_output").values()], axis=(0, 1))
    np.testing.assert_allclose(mine["error_output"], expected, rtol=1e-12)
    worst = explain.worst_steps(ex)
    first = worst[worst["label"] == "h2o:sink=2"].iloc[0]
    error = np.mean([a.astype(float) for a in ex.of("h2o:sink=2").steps("error").values()], axis=(0, 1))
    assert first["step"] == error.argmax() and first["error"] == pytest.approx(error.max(), rel=1e-12)
    assert 0 < sum(c["share"] for c in first["culprits"]) < 1.5
    assert all(c["text"] == PIECES[c["token"]] for c in first["culprits"])


def test_tokens_share_the_damage(ex):
    frame = explain.all_tokens(ex)
    assert frame.groupby("label")["share"].sum().to_numpy() == pytest.approx(1)
    assert frame[frame["label"] == "momentkv"]["damage"].sum() == pytest.approx(
        sum(np.nansum(a.astype(float)) for a in ex.of("momentkv").steps("error").values()), rel=1e-5)
    top = explain.top_tokens(ex, 5, frame)
    assert list(top.groupby("label", sort=False).size()) == [5, 5] and list(dict.fromkeys(top["label"])) == ex.labels
    assert top["damage"].iloc[0] == frame[frame["label"] == ex.labels[0]]["damage"].max()


def test_long_decodes_are_thinned_by_means():
    values = {0: np.arange(10.0)[None, :].repeat(3, 0)}
    np.testing.assert_array_equal(explain._mean_over_cells(values, 4), [1.5, 5.5, 8.5])


def test_spread_bins(ex):
    frame = explain.spread_bins(ex, n_bins=4)
    mine = ex.of("momentkv")
    row = frame[(frame["label"] == "momentkv") & (frame["compensator"] == "moments")].iloc[-1]
    x, e, c = (np.concatenate([b.ravel() for b in blocks.values()]) for blocks in (
        mine.blocks("logit_variance"), mine.blocks("error"), mine.blocks("error_corrected", "moments")))
    weights = np.tile(mine.block_weights(mine.cells.index[0]), len(x) // 4)
    inside = (x >= row["low_edge"]) & (x <= row["high_edge"])
    assert row["n"] == inside.sum() > 2
    assert row["removed"] == pytest.approx(1 - (c * weights)[inside].sum() / (e * weights)[inside].sum(), rel=1e-9)


def test_query_head_sets_are_lanes_of_their_own(run):
    ex = other(run, "h2o:scope=query_head", "--against", "h2o:sink=2")
    cell = int(ex.of("h2o:scope=query_head").cells.index[0])
    a, error = ex.attribution(cell), ex.results.steps("error")[cell].astype(float)
    assert list(a["q_head"]) == [0, 1, 2, 3] and list(a["kv_head"]) == [0, 0, 1, 1]
    np.testing.assert_allclose(a["damage"].sum(axis=1), error.sum(axis=1), rtol=1e-5)
    explain_page.page(ex)


@pytest.mark.parametrize("method", ["full+quest:page=8", "momentum", "full", "full+kivi:residual=32"])
def test_other_kinds_of_methods(run, method, tmp_path):
    """Readers, pinned prompts, and methods that lose nothing: what cannot be shown is a sentence."""
    ex = other(run, method)
    for cell, _, _ in cells(ex):
        a, error = ex.attribution(cell), np.nan_to_num(ex.results.steps("error")[cell]).astype(float)
        np.testing.assert_allclose(a["damage"].sum(), error.sum(), rtol=1e-5, atol=1e-9)
    said = explain_page.findings(ex)
    if method in ("full", "full+kivi:residual=32"):
        assert len(said) == 1 and said[0].startswith("Nothing is lost")
        with pytest.raises(Absent, match="nothing"):
            explain.evictions(ex)
    page = explain_page.write(ex, tmp_path / "page.html")
    if CHROMIUM and method in ("full", "full+quest:page=8"):
        console, document = opened(page)
        assert console == [] and 'data-ready="yes"' in document
        assert ("Not drawn: nothing is lost here" in document) == (method == "full")


def test_json_has_no_nan(run):
    done = explained(run["folder"], "--method", "momentkv", "--budget", "12", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout, parse_constant=lambda c: pytest.fail(c))
    assert said["method"] == "momentkv" and said["budget"] == "12" and said["against"] is None
    assert {r["quantity"] for r in said["halves"]} == set(explain.HALVES)
    assert len(said["tokens"]) == 25


def test_one_block_has_no_interval_and_says_nothing_of_significance(run, tmp_path):
    good_run(run["folder"].parent / "t.h5", tmp_path / "out", "-m", "h2o", "-m", "momentkv", "-b", "12", "--max-steps",
             "50")
    done = explained(tmp_path / "out", "-m", "h2o", "--against", "momentkv")
    assert done.returncode == 0, done.stderr
    said, = [line for line in done.stdout.splitlines() if line.startswith("h2o against momentkv")]
    assert "too few steps for an interval" in said and "significant" not in said


def test_nothing_lost_on_both_sides_warns_of_nothing(run, tmp_path):
    good_run(run["folder"].parent / "t.h5", tmp_path / "out", "-m", "h2o", "-m", "momentkv", "-b", "500")
    done = explained(tmp_path / "out", "-m", "h2o", "--against", "momentkv", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [f["ratio"] for f in json.loads(done.stdout)["factors"]] == [None] * 3


def test_another_trace_under_the_same_hash_is_not_laid_on_the_version(run, ex):
    other_numbers = load(run["folder"])
    other_numbers.summary.loc[other_numbers.summary["metric"] == "error", "mean"] *= 1.01
    said = explain.difference_to(ex, other_numbers)
    assert "has changed since" in said and "version" not in said
    other_numbers.run["git"] = "before"
    assert "made by version" in explain.difference_to(ex, other_numbers)


@pytest.fixture(scope="module")
def written(run, ex):
    return explain_page.write(ex, None, load(run["folder"]))


def test_page_is_self_contained_and_escapes(written):
    text = written.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", text)
    assert "@import" not in text and "url(" not in text
    assert "<b>&amp;</td>" not in text and "&lt;b&gt;&amp;amp;" in text
    assert written.stat().st_size < 4_000_000


def test_same_explanation_same_page(run, ex):
    assert explain_page.page(ex) == explain_page.page(explain.load(ex.folder))


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_opens_with_a_clean_console(written, theme):
    console, document = opened(written, f"?theme={theme}")
    assert console == []
    assert 'data-ready="yes"' in document and f'data-theme="{theme}"' in document
    assert document.count('class="main-svg"') >= 12
    for section in ("Lost mass or lost direction", "Where and which tokens", "When it left and was needed", "One head"):
        assert section in document


@needs_browser
def test_choosing_a_head_moves_all_its_figures(written, ex, tmp_path):
    """By the list, as the keyboard does, and by the map; the numbers drawn are those of the frames."""
    script = """<script>addEventListener("load", async () => {
      const ready = async () => { while (document.documentElement.dataset.ready !== "yes" ||
        !document.querySelector("#figure-head_tokens .plot").data) { await new Promise((r) => setTimeout(r, 50)); } };
      await ready();
      const head = document.getElementById("head");
      const name = "layer 3, KV head 1";
      head.value = name;
      head.dispatchEvent(new Event("change"));
      await new Promise((r) => setTimeout(r, 300));
      const chosen = [...document.querySelectorAll("figure[data-per-head] .variant select")].map((s) => s.value);
      const bars = document.querySelector("#figure-head_tokens .plot").data[0];
      const map = document.querySelector("#figure-heads .plot");
      map.emit("plotly_click", {points: [{customdata: map.data[0].customdata[0][0]}]});
      await new Promise((r) => setTimeout(r, 300));
      document.title = JSON.stringify({chosen, top: bars.x[bars.x.length - 1], clicked: head.value,
        halves: document.querySelector("#figure-halves .plot").data.length});
    });</script></body>"""
    page = tmp_path / "driven.html"
    page.write_text(written.read_text().replace("</body>", script))
    console, document = opened(page)
    assert console == []
    said = json.loads(re.search(r"<title>(.*?)</title>", document)[1].replace("&quot;", '"'))
    cell = next(c for c, label, layer in cells(ex) if (label, layer) == ("h2o:sink=2", 3))
    damage = ex.attribution(cell)["damage"][1]
    assert said["chosen"] == ["layer 3, KV head 1"] * 3
    assert said["top"] == pytest.approx(100 * damage.max() / damage.sum(), rel=1e-4)
    assert said["clicked"] == "layer 0, KV head 0"
    assert said["halves"] == 8
