"""Comparisons against loops over heads and steps, and what cannot be paired."""

import json

import exact_results
import numpy as np
import pytest
from exact_results import HEADS, STEPS, cell

from kvreplay_analysis import __main__ as program
from kvreplay_analysis import bootstrap, compare, load
from kvreplay_analysis.errors import UsageError
from kvreplay_analysis.style import to_bytes

LAYERS, BUDGETS, TRACES = (0, 5), (16, 32), ("t", "u")
BLOCKS = [range(0, 64), range(64, 128), range(128, 160)]


def numbers(seed=1):
    """{(label, budget, layer, trace): (HEADS, STEPS)}"""
    rng = np.random.default_rng(seed)
    return {(label, b, n, t): rng.gamma(2, level, (HEADS, STEPS)) for label, level in (("h2o", 1.0), ("tova", 0.8))
            for b in BUDGETS for n in LAYERS for t in TRACES}


def written(folder, values, **more):
    cells = [cell(label, b, {"error_output": v, "error": v, "error_corrected.moments": 0.5 * v, "resident": b + 1},
                  layer=n, trace=t, method=f"{label}:window=4" if label == "h2o" else label, compensators="moments")
             for (label, b, n, t), v in values.items()]
    return load(exact_results.write(folder, cells, **more))


@pytest.fixture(scope="module")
def values():
    return numbers()


@pytest.fixture(scope="module")
def run(tmp_path_factory, values):
    return written(tmp_path_factory.mktemp("compare") / "run", values)


@pytest.fixture(scope="module")
def found(run):
    return compare.compare(run, run, "h2o", "tova")


def mean_of(values, label, budget, layers=LAYERS, traces=TRACES, heads=range(HEADS), steps=range(STEPS)):
    total = n = 0.0
    for layer in layers:
        for trace in traces:
            for head in heads:
                for step in steps:
                    total += values[label, budget, layer, trace][head, step]
                    n += 1
    return total / n


def check(row, values, **where):
    a, b = (mean_of(values, label, int(row["budget"]), **where) for label in ("h2o", "tova"))
    assert row["mean_a"] == pytest.approx(a, rel=1e-12)
    assert row["mean_b"] == pytest.approx(b, rel=1e-12)
    assert row["difference"] == pytest.approx(a - b, rel=1e-9)
    assert row["relative"] == pytest.approx((a - b) / b, rel=1e-9)


def interval_of(values, budget, layers=LAYERS, traces=TRACES, heads=range(HEADS)):
    """The paired interval, resample by resample, block by block."""
    draws = bootstrap._draws((len(BLOCKS),) * len(traces), bootstrap.N_RESAMPLES, bootstrap.SEED)
    sums = [[[sum(values[label, budget, n, t][h, s] for n in layers for h in heads for s in block)
              for label in ("h2o", "tova")] + [len(layers) * len(heads) * len(block)] for block in BLOCKS]
            for t in traces]
    resampled = []
    for r in range(bootstrap.N_RESAMPLES):
        a = b = n = 0.0
        for t in range(len(traces)):
            for k in range(len(BLOCKS)):
                times = draws[t][r, k]
                a, b, n = a + times * sums[t][k][0], b + times * sums[t][k][1], n + times * sums[t][k][2]
        resampled.append((a - b) / n)
    return np.quantile(resampled, [0.025, 0.975])


def test_rows_are_means_over_the_same_steps(found, values):
    assert list(found.rows["budget"]) == ["16", "32"]
    for row in found.rows.to_dict("records"):
        check(row, values)
        assert row["n"] == len(LAYERS) * len(TRACES) * HEADS * STEPS
        assert row["resident_a"] == row["resident_b"] == int(row["budget"]) + 1
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval_of(values, int(row["budget"]))), rel=1e-9)
        assert row["low"] < row["difference"] < row["high"]
        assert row["verdict"] == "B is lower"


def test_units(found, values):
    for row in found.by("layer").to_dict("records"):
        check(row, values, layers=[row["layer"]])
        assert row["low"] == pytest.approx(interval_of(values, int(row["budget"]), layers=[row["layer"]])[0], rel=1e-9)
    heads = found.by("head")
    assert len(heads) == len(BUDGETS) * len(LAYERS) * HEADS
    for row in heads.to_dict("records"):
        check(row, values, layers=[row["layer"]], heads=[row["head"]])
    steps = found.by("step")
    assert list(steps["step"]) == [0, 64, 128] * 2
    for row in steps.to_dict("records"):
        check(row, values, steps=range(row["step"], min(row["step"] + 64, STEPS)))
        assert np.isnan(row["low"])
    for row in found.by("trace").to_dict("records"):
        check(row, values, traces=[row["trace"]])
    one = heads.iloc[3]
    low, high = interval_of(values, 16, layers=[one["layer"]], heads=[one["head"]])
    assert (one["low"], one["high"]) == pytest.approx((low, high), rel=1e-9)


def test_wins_count_units(found):
    wins = found.wins().set_index(["budget", "by"])
    for (budget, level), row in wins.iterrows():
        units = found.by(level)
        units = units[units["budget"] == budget]
        assert row["units"] == len(units)
        assert row["a_lower"] == sum(d < 0 for d in units["difference"])
        assert row["b_lower"] == sum(d > 0 for d in units["difference"])
        assert row["a_lower"] + row["b_lower"] + row["equal"] == row["units"]
        assert row["b_surely"] == sum(x > 0 for x in units["low"])
        assert row["a_surely"] == sum(x < 0 for x in units["high"])
    assert wins.at[("16", "head"), "b_lower"] > 0


def test_swapping_negates(run, found):
    back = compare.compare(run, run, "tova", "h2o")
    np.testing.assert_allclose(back.rows["difference"], -found.rows["difference"], rtol=1e-12)
    np.testing.assert_allclose(back.rows["low"], -found.rows["high"], rtol=1e-9)
    np.testing.assert_allclose(back.rows["high"], -found.rows["low"], rtol=1e-9)
    assert list(back.rows["verdict"]) == ["A is lower"] * 2
    assert list(back.wins()["a_lower"]) == list(found.wins()["b_lower"])
    assert list(back.wins()["a_surely"]) == list(found.wins()["b_surely"])


def test_against_itself_is_nothing(run):
    for same in (compare.compare(run, run, "h2o", "h2o"), compare.compare(run, run)):
        assert (same.rows["difference"] == 0).all() and (same.rows[["low", "high", "relative"]] == 0).all(axis=None)
        assert set(same.rows["verdict"]) == {"identical"}
        assert same.cells["identical"].all() and (same.cells["apart"] == 0).all()
    assert (compare.compare(run, run, "h2o", "h2o").wins()[["a_lower", "b_lower"]] == 0).all(axis=None)


def test_no_significant_difference(tmp_path):
    """Two methods of the same distribution, and no more than chance between them."""
    rng = np.random.default_rng(5)
    values = {(label, 16, 0, "t"): rng.gamma(2, 1, (HEADS, STEPS)) for label in ("h2o", "tova")}
    row = compare.compare(*[written(tmp_path / "r", values)] * 2, "h2o", "tova").rows.iloc[0]
    assert row["low"] < 0 < row["high"] and row["verdict"] == "no significant difference"


def test_one_method_is_taken_for_both_and_known_by_either_name(run, found):
    assert set(compare.compare(run, run, "h2o").rows["label_b"]) == {"h2o"}
    by_canonical = compare.compare(run, run, "h2o:window=4", "tova")
    assert list(by_canonical.rows["difference"]) == list(found.rows["difference"])


def test_a_compensator_from_beside_the_method(run, values):
    rows = compare.compare(run, run, "tova+moments", "tova").rows
    assert list(rows["label_a"]) == ["tova+moments"] * 2
    for row in rows.to_dict("records"):
        assert row["mean_b"] == pytest.approx(mean_of(values, "tova", int(row["budget"])), rel=1e-12)
        assert row["relative"] == pytest.approx(-0.5, rel=1e-9)
        assert (row["relative_low"], row["relative_high"]) == pytest.approx((-0.5, -0.5), rel=1e-9)
    with pytest.raises(UsageError, match="only --metric error_output"):
        compare.compare(run, run, "tova+moments", "tova", metrics=["error"])


def test_metrics(run):
    everything = compare.compare(run, run, "h2o", "tova", metrics="all")
    assert everything.metrics == [("error_output", ""), ("error", ""), ("error_corrected", "moments"), ("resident", "")]
    named = compare.compare(run, run, "h2o", "tova", metrics=["error_corrected.moments"])
    assert named.metrics == [("error_corrected", "moments")]
    with pytest.raises(UsageError, match="metric error_outpt is in neither side.*did you mean error_output"):
        compare.compare(run, run, metrics=["error_outpt"])


def test_two_versions(tmp_path, run, values):
    """One head of one cell is 1 % off: that cell is named, the others are identical."""
    changed = {k: v.copy() for k, v in values.items()}
    changed["tova", 32, 5, "u"][2] *= 1.04
    other = written(tmp_path / "new", changed)
    versions = compare.compare(run, other)
    assert len(versions.cells) == 16 and versions.cells["identical"].sum() == 15
    worst = versions.worst()
    assert (worst["label_a"], worst["budget"], worst["trace"], worst["layer"]) == ("tova", "32", "u", 5)
    a = mean_of(values, "tova", 32, layers=[5], traces=["u"])
    b = mean_of(changed, "tova", 32, layers=[5], traces=["u"])
    assert worst["apart"] == pytest.approx((b - a) / b, rel=1e-9)
    said = dict(zip(zip(versions.rows["label_a"], versions.rows["budget"]), versions.rows["verdict"]))
    assert said["h2o", "16"] == said["tova", "16"] == "identical" != said["tova", "32"]


def test_rounding_is_not_a_difference(tmp_path, run, values):
    other = written(tmp_path / "new", {k: v * (1 + 3e-8) for k, v in values.items()})
    assert set(compare.compare(run, other).rows["verdict"]) == {"equal up to rounding"}


def test_apart():
    assert compare.apart(2.0, 1.0) == compare.apart(1.0, 2.0) == 0.5
    assert compare.apart(0.0, 0.0) == compare.apart(np.nan, np.nan) == 0
    assert compare.apart(0.0, np.nan) == float("inf") and compare.apart(0.0, 1.0) == 1


def test_tolerance_decides_the_exit_code(tmp_path, run, values, capsys):
    changed = {k: v * (1.02 if k == ("h2o", 16, 0, "t") else 1) for k, v in values.items()}
    other = str(written(tmp_path / "new", changed).folder)
    assert program.main(["compare", str(run.folder), other, "--tolerance", "0.03"]) == 0
    assert capsys.readouterr().err == ""
    assert program.main(["compare", str(run.folder), other, "--tolerance", "0.01"]) == 1
    said = capsys.readouterr().err
    assert "h2o at budget 16 on t layer 0" in said and "1 of 16 cells" in said and said.count("\n") == 1
    assert program.main(["compare", str(run.folder), other]) == 0
    assert program.main(["compare", str(run.folder), other, "--tolerance", "many"]) == 2


def test_a_method_without_a_budget_stands_against_all(tmp_path):
    cells = [cell("h2o", b, {"error_output": 1.0 / b, "resident": b}) for b in BUDGETS]
    cells.append(cell("full+kivi", "", {"error_output": 0.03, "resident": 144}))
    run = load(exact_results.write(tmp_path / "r", cells))
    there, back = compare.compare(run, run, "h2o", "full+kivi"), compare.compare(run, run, "full+kivi", "h2o")
    np.testing.assert_allclose(there.rows["difference"], [1 / 16 - 0.03, 1 / 32 - 0.03], rtol=1e-9)
    np.testing.assert_allclose(back.rows["difference"], -there.rows["difference"], rtol=1e-12)
    assert list(there.rows["budget"]) == list(back.rows["budget"]) == ["16", "32"]
    assert not any(names for sides in there.only.values() for names in sides)


def test_only_in_one_is_listed(tmp_path, run, values):
    fewer = {k: v for k, v in values.items() if k[0] == "h2o" and k[1] == 16 and k[2] == 0}
    listed = compare.compare(run, written(tmp_path / "r", fewer)).only
    assert listed["methods"] == (["tova"], []) and listed["budgets"] == (["32"], [])
    assert listed["layers"] == (["t:5", "u:5"], [])
    one_trace = {k: v for k, v in values.items() if k[3] == "t"}
    assert compare.compare(run, written(tmp_path / "s", one_trace)).only["traces"] == (["u"], [])


def test_a_renamed_trace_is_the_same(tmp_path, run, values):
    renamed = {(label, b, n, {"t": "x", "u": "u"}[t]): v for (label, b, n, t), v in values.items()}
    other = written(tmp_path / "r", renamed, traces={"x": "hash of t", "u": "hash of u"})
    assert len(compare.compare(run, other).cells) == 16
    assert compare.compare(run, other).cells["identical"].all()


def test_what_cannot_be_paired(tmp_path, run, values):
    with pytest.raises(UsageError, match="trace u has content_hash another in .* and hash of u in"):
        compare.compare(written(tmp_path / "a", values, traces={"t": "hash of t", "u": "another"}), run)
    short = {k: v[:, :100] for k, v in values.items()}
    with pytest.raises(UsageError, match="n_steps 160 .* and 100 in"):
        compare.compare(run, written(tmp_path / "b", short, n_steps=100))
    with pytest.raises(UsageError, match="prompt_len 64 .* and 32 in"):
        compare.compare(run, written(tmp_path / "c", values, prompt_len=32))
    elsewhere = {k[:3] + ("elsewhere",): v for k, v in values.items() if k[3] == "t"}
    with pytest.raises(UsageError, match="no trace in common: A has t, u, B has elsewhere"):
        compare.compare(run, written(tmp_path / "d", elsewhere))
    with pytest.raises(UsageError, match="method h2 is not in .*did you mean h2o"):
        compare.compare(run, run, "h2", "tova")
    with pytest.raises(UsageError, match="budget 64 is in neither side, which have 16, 32"):
        compare.compare(run, run, budget="64")
    with pytest.raises(UsageError, match="no cell in common"):
        compare.compare(written(tmp_path / "f", {k: v for k, v in values.items() if k[1] == 16}),
                        written(tmp_path / "g", {k: v for k, v in values.items() if k[1] == 32}))


def test_sides_are_split_behind_the_folder(tmp_path):
    (tmp_path / "out:2").mkdir()
    (tmp_path / "out").mkdir()
    assert compare.split(str(tmp_path / "out")) == (str(tmp_path / "out"), None)
    assert compare.split(f"{tmp_path}/out:h2o:window=4+adakv") == (f"{tmp_path}/out", "h2o:window=4+adakv")
    assert compare.split(f"{tmp_path}/out:2") == (f"{tmp_path}/out:2", None)
    assert compare.split("nowhere:h2o") == ("nowhere", "h2o")


def test_the_command(run, tmp_path, capsys):
    a = str(run.folder)
    assert program.main(["compare", f"{a}:h2o", f"{a}:tova", "--by", "layer", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = compare.compare(run, run, "h2o", "tova")
    assert [r["difference"] for r in told["rows"]] == list(found.rows["difference"])
    assert len(told["layer"]) == 4 and told["n_cells"] == 8 and told["only_in_a"]["methods"] == []
    out = tmp_path / "d.svg"
    assert program.main(["compare", f"{a}:h2o", f"{a}:tova", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "B is lower" in text and str(out) in text and out.read_bytes().startswith(b"<?xml")
    assert program.main(["compare", a, a, "--out", str(tmp_path / "d.jpg")]) == 2
    assert program.main(["compare", a, a, "--by", "heads"]) == 2
    assert "did you mean head?" in capsys.readouterr().err


def test_the_figure_draws_the_rows(run, found):
    from kvreplay_analysis.figures import compare as figure

    picture = figure.draw(found)
    points = [line.get_xdata()[0] for line in picture.axes[0].get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(points, 100 * found.rows["relative"])
    lines = [line.get_ydata() for line in picture.axes[2].get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(np.concatenate(lines), found.by("step")["difference"])
    assert to_bytes(figure.draw(found, "single"), "svg") == to_bytes(figure.draw(found, "single"), "svg")
    figure.draw(compare.compare(run, run))
