"""The tuner's statistics against slow, obvious numpy; its verdicts where the truth is known."""

import json
import math

import fake_results
import numpy as np
import pytest
from kvreplay_analysis import bootstrap, tune
from kvreplay_analysis.__main__ import main
from kvreplay_analysis.figures import tuned as tuned_figures

ALPHAS = ["0.5", "0.7", "0.9", "0.95"]
DEFAULT = "momentum"  # stands for alpha = 0.97
BEST = {0: 0.7, 4: 0.9}  # by layer


def label(alpha):
    return f"momentum:alpha={alpha}"


def method_of(text):
    return DEFAULT if text == "0.97" else label(text)


def make_steps(bowl, noise=0.01):
    """Values whose mean is a base that all methods share (by layer, head and step) and a bowl in alpha."""
    def steps(_, plan, cell, budget):
        shared = np.random.default_rng([cell["layer"], len(cell["trace"])])
        n_heads, n_steps = plan.n_heads, cell["n_steps"]
        base = 0.3 + 0.1 * np.repeat(shared.normal(size=(n_heads, -(-n_steps // 64))), 64, axis=1)[:, :n_steps]
        alpha = float(cell["label"].split("=")[-1]) if "=" in cell["label"] else 0.97
        own = np.random.default_rng([int(1000 * alpha), cell["layer"], budget])
        error = base + bowl(alpha, cell["layer"], np.arange(n_heads)[:, None]) + noise * own.normal(
            size=(n_heads, n_steps))
        mass = np.abs(error) * 0.5
        mass[:, :3] = np.nan  # a metric that leaves steps out
        size = 100.0 * budget * np.ones((plan.n_kv_heads, n_steps))
        return {"error_output": error, "evicted_mass": mass, "resident": size / 100, "attended": size / 100,
                "bytes": size}
    return steps


def write(folder, monkeypatch, bowl, objective=None, holdout=True, traces=(("story", "m", 64, 700),), budgets=(32, 64),
          chosen=None, noise=0.01, first_step=0):
    """A folder as `kvreplay tune` writes it, of a method whose truth is `bowl`."""
    monkeypatch.setattr(fake_results, "_steps", make_steps(bowl, noise))
    objective = objective or {"text": "error_output", "bytes": None, "from_steps": False, "per_head": True, "terms": [
        {"name": "error_output", "weight": 1.0, "metric": "error_output", "compensator": "", "statistic": "mean"}]}
    methods = [method_of(a) for a in ("0.97", *ALPHAS)]
    plan = fake_results.Plan(methods=[(m, m, "pinned", "none") for m in methods], budgets=list(budgets),
                             traces=list(traces), layers=[0, 4], n_heads=4, n_kv_heads=2, compensators=[],
                             detail=("steps",) if objective["from_steps"] else ())
    fake_results.write(folder / "train", plan)
    if holdout:
        fake_results.write(folder / "holdout", fake_results.Plan(**{**plan.__dict__, "traces": [
            ("another", "m", 64, 640)]}))
    chosen = chosen or {"global": 2, "layers": {"0": 2, "4": 3}, "heads": {"0": [2, 1], "4": [3, 2]}}
    at_bytes = objective["bytes"]
    cases = [[str(b) for b in budgets]] if at_bytes else [[str(b)] for b in budgets]
    names = {"global": methods[chosen["global"]], "layer": None, "head": None}
    if holdout:  # stand-ins that ran: what matters here is that the right rows are read
        names |= {"layer": methods[3], "head": methods[1]}
    spec = {"format": "kvreplay-tuned", "method": DEFAULT, "objective": objective, "params": [
        {"name": "alpha", "part": "momentum", "type": "real", "scale": "one_minus", "default": "0.97", "values": None,
         "lo": 0.5, "hi": 0.95, "grain": "head", "why": ""}],
        "candidates": [{"method": method_of(a), "values": [a], "round": int(a != "0.97")} for a in ("0.97", *ALPHAS)],
        "rounds": [], "left_out": [], "n_refused": 0, "refused": "", "traces": [t[0] for t in traces],
        "holdout": ["another"] if holdout else [], "holdout_from_step": first_step, "heads_share_budget": False,
        "tuned": [{"budgets": b, "default": DEFAULT, **names, "chosen": chosen,
                   **({"bytes": at_bytes, "n_not_reaching": 0} if at_bytes else {})} for b in cases]}
    (folder / "tuned.json").write_text(json.dumps(spec))
    return folder


def bowl(alpha, layer, head):
    return 4 * (alpha - BEST[layer]) ** 2


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    return tune.load(write(tmp_path, monkeypatch, bowl))


@pytest.mark.parametrize("statistic", ["mean", "std", "p50", "p90", "p99", "max"])
def test_a_resample_repeats_the_steps_of_its_blocks(statistic):
    rng = np.random.default_rng(1)
    values = rng.normal(5, 2, 150)
    values[rng.random(150) < 0.2] = np.nan
    block = np.arange(150) // 32
    counts = np.vstack([np.ones(5), rng.multinomial(5, np.full(5, 0.2), size=30)])
    found = tune.statistic_rows(values, block, counts, statistic)
    for c, (weighted, n) in zip(counts.astype(int), found.T):
        drawn = np.concatenate([np.tile(values[block == b], c[b]) for b in range(5)])
        drawn = drawn[np.isfinite(drawn)]
        slow = {"mean": np.mean, "std": np.std, "max": np.max}.get(
            statistic, lambda x: np.quantile(x, float(statistic[1:]) / 100))(drawn)
        assert n == len(drawn)
        assert weighted / n == pytest.approx(slow, rel=1e-12)


def test_the_estimate_is_the_pooled_mean_of_the_summary(tuned):
    found = tune.findings(tuned)
    for case in found["cases"]:
        for point in case["curve"]:
            rows = tuned.train.summary
            rows = rows[(rows["label"] == point["method"]) & (rows["budget"] == case["budgets"][0]) &
                        (rows["metric"] == "error_output")]
            assert point["value"] == pytest.approx((rows["n"] * rows["mean"]).sum() / rows["n"].sum(), rel=1e-12)


def slow_means(results, name, budget, choose=None, first_block=0):
    """(n_resamples + 1,) means of error_output by loops over the steps themselves; `choose` picks a label by layer and
    KV head."""
    n_blocks = [-(-int(n) // 64) - first_block for n in results.cells.drop_duplicates("trace")["n_steps"]]
    draws = bootstrap._draws(tuple(n_blocks), bootstrap.N_RESAMPLES, bootstrap.SEED)
    columns = [np.vstack([np.ones((1, b)), d]) for b, d in zip(n_blocks, draws)]
    sums, n = np.zeros(len(columns[0])), np.zeros(len(columns[0]))
    for t, trace in enumerate(results.traces):
        for layer in (0, 4):
            for q_head in range(4):
                wanted = choose(layer, q_head // 2) if choose else name
                cell = results.cells[(results.cells["label"] == wanted) & (results.cells["budget"] == budget) &
                                     (results.cells["layer"] == layer) & (results.cells["trace"] == trace)].index[0]
                means, weights = results.blocks("error_output")[cell][q_head], results.block_weights(cell)
                for b in range(n_blocks[t]):
                    sums += columns[t][:, b] * means[first_block + b] * weights[first_block + b]
                    n += columns[t][:, b] * weights[first_block + b]
    return sums / n


def test_gain_and_its_interval_are_those_of_a_paired_bootstrap_by_hand(tuned):
    case = tune.findings(tuned)["cases"][1]
    base, mine = (slow_means(tuned.holdout, m, "64") for m in (DEFAULT, label("0.7")))
    gain = case["gain"]
    assert case["gain_on"] == "holdout"
    assert gain["difference"] == pytest.approx(base[0] - mine[0], rel=1e-9)
    assert (gain["low"], gain["high"]) == pytest.approx(tuple(np.quantile((base - mine)[1:], [0.025, 0.975])), rel=1e-9)
    assert gain["relative"] == pytest.approx(1 - mine[0] / base[0], rel=1e-9)
    assert gain["significant"] and tune.verdict(gain) == "better than the default"
    # Pairing matters: the two together vary far less than each alone.
    assert gain["high"] - gain["low"] < 0.2 * np.ptp(np.quantile(base, [0.025, 0.975]))


def test_curve_bands_and_the_place_of_the_optimum_are_those_of_the_resamples(tuned):
    case = tune.findings(tuned)["cases"][0]
    columns = np.array([slow_means(tuned.train, method_of(a), "32") for a in ("0.97", *ALPHAS)])
    for point, mine in zip(case["curve"], columns):
        assert (point["low"], point["high"]) == pytest.approx(tuple(np.quantile(mine[1:], [0.025, 0.975])), rel=1e-9)
    alphas = np.array([0.97, 0.5, 0.7, 0.9, 0.95])
    winners = alphas[np.argmin(columns[:, 1:], axis=0)]
    assert case["optimum"]["interval"]["alpha"] == [
        float(q) for q in np.quantile(winners, [0.025, 0.975], method="inverted_cdf")]
    assert case["optimum"]["share"] == pytest.approx((winners == 0.7).mean())
    # Each layer's interval holds the value that was put into it.
    for layer in case["layers"]:
        low, high = layer["interval"]["alpha"]
        assert low <= BEST[layer["layer"]] <= high


def test_without_holdout_layers_and_heads_are_put_together_from_their_own_cells(tmp_path, monkeypatch):
    tuned = tune.load(write(tmp_path, monkeypatch, bowl, holdout=False))
    found = tune.findings(tuned)
    assert any("No trace was held out" in note and "optimistic" in note for note in found["notes"])
    case = found["cases"][0]
    assert case["gain_on"] == "train"
    base = slow_means(tuned.train, DEFAULT, "32")
    layer = slow_means(tuned.train, None, "32", lambda at, head: label({0: "0.7", 4: "0.9"}[at]))
    head = slow_means(tuned.train, None, "32", lambda at, h: label({(0, 0): "0.7", (0, 1): "0.5", (4, 0): "0.9",
                                                                   (4, 1): "0.7"}[at, h]))
    for grain, mine in (("layer", layer), ("head", head)):
        gain = case[grain]["over_default"]
        assert gain["difference"] == pytest.approx(base[0] - mine[0], rel=1e-9)
        assert (gain["low"], gain["high"]) == pytest.approx(tuple(np.quantile((base - mine)[1:], [0.025, 0.975])),
                                                            rel=1e-9)


def test_no_significant_difference_where_there_is_none(tmp_path, monkeypatch):
    """Every value is as good as the default: whatever was chosen, the interval of the held-out gain contains 0."""
    tuned = tune.load(write(tmp_path, monkeypatch, lambda alpha, layer, head: 0.0, noise=0.05))
    found = tune.findings(tuned)
    for case in found["cases"]:
        assert case["gain"]["low"] < 0 < case["gain"]["high"]
        assert tune.verdict(case["gain"]) == "no significant difference from the default"
    assert "no significant difference from the default" in tune.text(found)


def test_where_the_default_is_the_optimum_it_says_so(tmp_path, monkeypatch):
    chosen = {"global": 0, "layers": {"0": 0, "4": 0}, "heads": {"0": [0, 0], "4": [0, 0]}}
    tuned = tune.load(write(tmp_path, monkeypatch, lambda alpha, layer, head: (alpha - 0.97) ** 2, chosen=chosen))
    gain = tune.findings(tuned)["cases"][0]["gain"]
    assert gain["same"] and not gain["significant"] and gain["difference"] == 0
    assert tune.verdict(gain) == "is the default"


def test_several_traces_are_drawn_before_their_blocks(tmp_path, monkeypatch):
    tuned = tune.load(write(tmp_path, monkeypatch, bowl, traces=(("a", "m", 64, 320), ("bb", "m", 64, 704))))
    found = tune.findings(tuned)
    base = slow_means(tuned.train, DEFAULT, "32")
    point = found["cases"][0]["curve"][0]
    assert (point["value"], point["low"], point["high"]) == pytest.approx(
        (base[0], *np.quantile(base[1:], [0.025, 0.975])), rel=1e-9)
    assert any("2 traces" in note for note in found["notes"])


def test_quantiles_and_weights_come_from_the_steps(tmp_path, monkeypatch):
    terms = [{"name": "error_output:p90", "weight": 1.0, "metric": "error_output", "compensator": "",
              "statistic": "p90"},
             {"name": "evicted_mass", "weight": 0.5, "metric": "evicted_mass", "compensator": "", "statistic": "mean"}]
    tuned = tune.load(write(tmp_path, monkeypatch, bowl, objective={
        "text": "error_output:p90+0.5*evicted_mass", "bytes": None, "from_steps": True, "per_head": True,
        "terms": terms}))
    rows = tuned.train.summary
    rows = rows[(rows["label"] == label("0.7")) & (rows["budget"] == "64")]

    def pooled(metric, column):
        mine = rows[rows["metric"] == metric]
        return (mine["n"] * mine[column]).sum() / mine["n"].sum()

    point = tune.findings(tuned)["cases"][1]["curve"][2]
    assert point["value"] == pytest.approx(pooled("error_output", "p90") + 0.5 * pooled("evicted_mass", "mean"),
                                           rel=1e-6)
    assert point["low"] < point["value"] < point["high"]


def test_at_equal_bytes_values_lie_between_budgets_and_never_beyond(tmp_path, monkeypatch):
    sizes = np.array([[100.0, 100, 400], [400, 200, 100]])
    values = np.array([[1.0, 1, 3], [3, 3, 1]])
    assert tune.between_bytes(sizes, values, 200.0) == pytest.approx([2.0, 3.0, 2.0])
    assert np.isnan(tune.between_bytes(sizes, values, 99.0)).all()
    objective = {"text": "error_output@bytes=4525B", "bytes": 4525.483399593904, "from_steps": False, "per_head": True,
                 "terms": [{"name": "error_output", "weight": 1.0, "metric": "error_output", "compensator": "",
                            "statistic": "mean"}]}
    tuned = tune.load(write(tmp_path, monkeypatch, bowl, objective=objective))
    (case,) = tune.findings(tuned)["cases"]
    low, high = (slow_means(tuned.train, label("0.9"), b)[0] for b in ("32", "64"))
    assert case["curve"][3]["value"] == pytest.approx((low + high) / 2, rel=1e-9)  # halfway in the logarithm


def test_the_command_writes_the_same_bytes_twice_and_says_what_json_says(tmp_path, monkeypatch, capsys):
    write(tmp_path, monkeypatch, bowl)
    assert main(["tune", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    files = sorted((tmp_path / "figures").iterdir())
    assert [f.name for f in files] == [f"tune_{n}.svg" for n in ("curve", "heads", "layers")]
    before = {f: f.read_bytes() for f in [*files, tmp_path / "tune.json"]}
    assert main(["tune", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out == (tmp_path / "tune.json").read_text()
    assert {f: f.read_bytes() for f in before} == before
    found = json.loads((tmp_path / "tune.json").read_text())
    gain = found["cases"][0]["gain"]
    assert f"{100 * gain['relative']:+.2f} %" in text
    assert "better than the default" in text and "one trace" in text and "open-loop" in text
    # For a paper; what another format left is replaced.
    assert main(["tune", str(tmp_path), "--format", "pdf,png", "--style", "single"]) == 0
    assert sorted(f.name for f in (tmp_path / "figures").iterdir()) == [
        f"tune_{n}.{e}" for n in ("curve", "heads", "layers") for e in ("pdf", "png")]
    assert main(["tune", str(tmp_path), "--format", "pfd"]) == 2
    assert "did you mean pdf?" in capsys.readouterr().err
    # What is drawn is what the file says, also when it is read back.
    figure = tuned_figures.draw_curve(found)
    line = next(item for item in figure.axes[0].lines if len(item.get_xdata()) > 2)
    points = sorted((float(c["values"][0]), c["value"]) for c in found["cases"][0]["curve"])
    assert np.allclose(np.column_stack(line.get_data()), points)


def test_a_folder_that_is_none_is_a_sentence(tmp_path, capsys):
    assert main(["tune", str(tmp_path)]) == 2
    assert "tuned.json" in capsys.readouterr().err
    (tmp_path / "tuned.json").write_text("{")
    assert main(["tune", str(tmp_path)]) == 1
    assert "not readable JSON" in capsys.readouterr().err


def test_what_does_not_fit_the_held_out_traces_has_no_number_and_says_why(tmp_path, monkeypatch):
    tuned = tune.load(write(tmp_path, monkeypatch, bowl))
    for where in tuned.spec["tuned"]:
        where["global"] = "kept out"  # ran nowhere
    tuned.spec["holdout_left_out"] = [{"method": "kept out", "budget": "32", "why": "it protects too much"}]
    found = tune.findings(tuned)
    assert tune.verdict(found["cases"][0]["gain"]) == "no number"
    assert any("kept out was left out at budget 32, because it protects too much" in note for note in found["notes"])
    assert "nan" not in tune.text(found)


def test_one_block_has_no_interval(tmp_path, monkeypatch):
    tuned = tune.load(write(tmp_path, monkeypatch, bowl, holdout=False, traces=(("story", "m", 64, 50),)))
    case = tune.findings(tuned)["cases"][0]
    assert math.isnan(case["gain"]["low"])
    assert "no interval" in tune.verdict(case["gain"])
    assert math.isfinite(case["curve"][0]["value"])

def test_an_optimum_at_the_end_of_the_range_is_said_to_be(tmp_path, monkeypatch):
    chosen = {"global": 1, "layers": {"0": 1, "4": 1}, "heads": {"0": [1, 1], "4": [1, 1]}}
    tuned = tune.load(write(tmp_path, monkeypatch, lambda alpha, layer, head: alpha, chosen=chosen))
    found = tune.findings(tuned)
    assert found["cases"][0]["optimum"]["at_edge"] == ["alpha"]
    assert "alpha near an end of the range" in tune.text(found)


def test_places_are_even_on_the_scale():
    assert np.diff(tune.place([0.9, 0.99, 0.999], "one_minus")) == pytest.approx([math.log(10)] * 2)
    assert np.diff(tune.place([1, 10, 100], "log")) == pytest.approx([math.log(10)] * 2)
    assert np.diff(tune.place([0, 1, 3], "log")) == pytest.approx([math.log(2)] * 2)
    assert np.diff(tune.place([1, 2, 3], "lin")) == pytest.approx([1, 1])


def test_a_gain_that_costs_more_is_said_to(tuned):
    assert not any("equal cost" in note for note in tune.findings(tuned)["notes"])
    rows = tuned.holdout.summary
    more = (rows["label"] == label("0.7")) & (rows["metric"] == "attended") & (rows["budget"] == "64")
    rows.loc[more, "mean"] *= 1.5
    assert "At budget 64 the chosen method attends 96 tokens where the default attends 64: the gain is not at equal " \
        "cost." in tune.findings(tuned)["notes"]


def test_held_out_steps_are_the_later_ones_alone(tmp_path, monkeypatch):
    tuned = tune.load(write(tmp_path, monkeypatch, bowl, first_step=256))
    found = tune.findings(tuned)
    base, mine = (slow_means(tuned.holdout, m, "64", first_block=4) for m in (DEFAULT, label("0.7")))
    gain = found["cases"][1]["gain"]
    assert gain["difference"] == pytest.approx(base[0] - mine[0], rel=1e-9)
    assert (gain["low"], gain["high"]) == pytest.approx(tuple(np.quantile((base - mine)[1:], [0.025, 0.975])), rel=1e-9)
    assert any("6 decode blocks" in note for note in found["notes"])
    assert any("from decode step 256 on" in note for note in found["notes"])
    assert "held-out steps" in tune.text(found)
