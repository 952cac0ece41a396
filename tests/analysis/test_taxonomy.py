"""Types of heads: rules on constructed attention, and results split by them against loops."""

import csv

import exact_results
import numpy as np
import pandas as pd
import pytest
from exact_results import HEADS, STEPS, cell

from kvreplay_analysis import bootstrap, configurations, figures, league, load, taxonomy
from kvreplay_analysis.errors import Absent, UsageError

SINK = dict(sink=0.7, local=0.2, far=0.1, entropy=0.3, concentration=0.9)
LOCAL = dict(sink=0.1, local=0.8, far=0.1, entropy=0.3, concentration=0.9)
RETRIEVAL = dict(sink=0.2, local=0.2, far=0.6, entropy=0.4, concentration=0.8)
DIFFUSE = dict(sink=0.02, local=0.08, far=0.9, entropy=0.95, concentration=0.05)


def heads(*rows):
    return {name: [r[name] for r in rows] for name in SINK}


def statistics_of(attention):
    """One row of attention over positions, by the definitions (docs/metrics.md)."""
    a = np.asarray(attention, float) / np.sum(attention)
    far = np.sort(a[4:-32])[::-1]
    entropy = -sum(x * np.log(x) for x in a if x > 0) / np.log(len(a))
    return {"sink": a[:4].sum(), "local": a[-32:].sum(), "far": far.sum(), "entropy": entropy,
            "concentration": far[:max(1, len(far) // 100)].sum() / far.sum()}


def test_constructed_attention():
    n = 1000
    sink, local, retrieval, diffuse = (np.full(n, 1e-6) for _ in range(4))
    sink[0] = local[-3] = 1.0
    retrieval[[50, 300]], retrieval[-1] = 1.0, 0.5
    diffuse[:] = 1.0
    frame = pd.DataFrame([statistics_of(a) for a in (sink, local, retrieval, diffuse)])
    assert list(taxonomy.classify(frame)) == ["sink", "local", "retrieval", "diffuse"]


def test_thresholds_are_parameters_and_edges_belong_to_the_far_side():
    frame = pd.DataFrame([{**DIFFUSE, "far": 0.3, "concentration": 0.4}, {**LOCAL, "sink": 0.8}])
    assert list(taxonomy.classify(frame)) == ["retrieval", "sink"]  # from the threshold on; equal shares: sink
    assert list(taxonomy.classify(frame, far=0.31)) == ["local", "sink"]
    assert list(taxonomy.classify(frame, concentration=0.41)) == ["diffuse", "sink"]
    nothing_far = pd.DataFrame([{**LOCAL, "far": 0.0, "concentration": np.nan}])
    assert list(taxonomy.classify(nothing_far)) == ["local"]


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(2)
    return {(label, b, n): rng.gamma(2, 1 / b, (HEADS, STEPS)) for label in ("streaming", "h2o", "oracle_mass")
            for b in (16, 32) for n in (0, 3)}


@pytest.fixture(scope="module")
def run(tmp_path_factory, values):
    cells = [cell(label, b, {"error_output": v, "error": v, "resident": b + 1, "bytes": 32 * b}, layer=n,
                  foresight="oracle" if "oracle" in label else "none") for (label, b, n), v in values.items()]
    where = {("t", 0): heads(SINK, LOCAL, RETRIEVAL, DIFFUSE), ("t", 3): heads(RETRIEVAL, RETRIEVAL, LOCAL, LOCAL)}
    return load(exact_results.write(tmp_path_factory.mktemp("taxonomy") / "run", cells, heads=where))


def test_heads_of_a_run(run):
    frame = run.heads
    assert list(frame.columns) == ["trace", "layer", "kv_head", "q_head", *SINK]
    assert list(frame["kv_head"]) == [0, 0, 1, 1] * 2
    assert frame.loc[2, "concentration"] == 0.8 and frame.loc[2, "layer"] == 0
    assert list(taxonomy.types(run)["head_type"]) == ["sink", "local", "retrieval", "diffuse", "retrieval", "retrieval",
                                                      "local", "local"]


KEPT = {"sink": [(0, 0)], "local": [(0, 1), (3, 2), (3, 3)], "retrieval": [(0, 2), (3, 0), (3, 1)], "diffuse": [(0, 3)]}


@pytest.mark.parametrize("head_type", taxonomy.TYPES)
def test_every_number_can_be_split(run, values, head_type):
    """The table, its interval and the blocks, from the heads of this type alone."""
    split = run.only(head_type=head_type)
    table = configurations(split).set_index(["label", "budget"])
    for label in ("h2o", "streaming"):
        for b in (16, 32):
            mine = [values[label, b, n][h] for n, h in KEPT[head_type]]
            row = table.loc[(label, str(b))]
            assert row["error_output"] == pytest.approx(np.mean(mine), rel=1e-12)
            assert row["n"] == len(mine) * STEPS and row["resident"] == b + 1
            cells = split.only(label=label, budget=str(b))
            estimate, low, high = bootstrap.interval(bootstrap.totals(cells, [("error_output", "")]), bootstrap.mean)
            assert estimate == pytest.approx(np.mean(mine), rel=1e-12)
            assert (row["error_output_low"], row["error_output_high"]) == (low, high)
    for cell_, blocks in split.blocks("error_output").items():
        layer = split.cells.at[cell_, "layer"]
        kept = [h for n, h in KEPT[head_type] if n == layer]
        assert [h for h in range(HEADS) if np.isfinite(blocks[h]).all()] == kept
    for cell_, blocks in split.blocks("resident").items():  # a KV head counts if any of its query heads does
        layer = split.cells.at[cell_, "layer"]
        assert [g for g in range(2) if np.isfinite(blocks[g]).all()] == sorted({h // 2 for n, h in KEPT[head_type]
                                                                               if n == layer})
    assert np.isfinite(run.blocks("error_output")[0]).all()  # the whole run is as it was


def test_league_of_a_type(run, values):
    rows = league.league(run.only(head_type="local")).set_index(["label", "budget"])
    mine = [values["h2o", 16, n][h] for n, h in KEPT["local"]]
    assert rows.at[("h2o", "16"), "error_output"] == pytest.approx(np.mean(mine), rel=1e-12)


def test_splits_of_splits(run):
    one = run.only(layer=0).only(head_type="local")
    assert len(one.cells) == 6
    assert set(zip(one.summary["layer"], one.summary["q_head"])) == {(0, 1), (0, -1)}
    assert len(run.only(head_type="local").only(budget="16").summary) < len(run.only(head_type="local").summary)


def test_wrong_and_missing_types(run, tmp_path):
    with pytest.raises(UsageError, match="head type retreival is none of .*did you mean retrieval"):
        run.only(head_type="retreival")
    old = load(exact_results.write(tmp_path / "old", [cell("h2o", 8, {"error_output": 0.1})]))
    for ask in (lambda: old.heads, lambda: old.only(head_type="sink"), lambda: figures.taxonomy.data(old)):
        with pytest.raises(Absent, match="does not say where its heads look.*run it again"):
            ask()
    only_local = load(exact_results.write(tmp_path / "l", [cell("h2o", 8, {"error_output": 0.1})],
                                          heads={("t", 0): heads(LOCAL, LOCAL, LOCAL, LOCAL)}))
    with pytest.raises(Absent, match="no head of .* is of type sink; there are local"):
        only_local.only(head_type="sink")


def test_traces_of_a_model_share_types(tmp_path):
    """A head that looks far in one text and near in another has the type of the mean."""
    near, far = {**LOCAL, "far": 0.05, "concentration": 0.1}, {**DIFFUSE, "far": 0.8}
    cells = [cell("h2o", 8, {"error_output": 0.1}, trace=t) for t in ("t", "u")]
    where = {("t", 0): heads(near, far, near, far), ("u", 0): heads(far, far, near, near)}
    run = load(exact_results.write(tmp_path / "r", cells, heads=where))
    found = taxonomy.types(run)
    assert found["far"].iloc[0] == pytest.approx((0.05 + 0.8) / 2)
    assert list(found["head_type"]) == ["diffuse", "diffuse", "local", "diffuse"] * 2
    assert list(taxonomy.types(run.only(trace="t"))["head_type"]) == ["local", "diffuse", "local", "diffuse"]
    other = load(exact_results.write(tmp_path / "s", cells, heads=where, run={"traces": [
        {"stem": "t", "model_name": "one"}, {"stem": "u", "model_name": "another"}]}))
    assert list(taxonomy.types(other)["head_type"]) == ["local", "diffuse", "local", "diffuse",
                                                        "diffuse", "diffuse", "local", "local"]


def test_summary_with_types(run):
    rows = taxonomy.with_types(run)
    assert (rows["q_head"] >= 0).all() and len(rows) == (run.summary["q_head"] >= 0).sum()
    assert set(rows.loc[(rows["layer"] == 3) & (rows["q_head"] == 2), "head_type"]) == {"local"}


def test_figure_shows_types_and_errors(run, values):
    frames = figures.taxonomy.data(run, "32")
    errors = frames["errors"].set_index(["label", "head_type"])["error_output"]
    with open(run.folder / "summary.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "error_output" and r["label"] == "h2o"
                and r["budget"] == "32"]
    for kind in taxonomy.TYPES:
        mine = [float(r["mean"]) for r in rows if (int(r["layer"]), int(r["q_head"])) in KEPT[kind]]
        assert errors["h2o", kind] == pytest.approx(np.mean(mine), rel=1e-12)
    picture = figures.taxonomy.draw(run, "32", frames=frames)
    shown = np.array(picture.axes[0].images[0].get_array())
    assert [[taxonomy.TYPES[int(c)] for c in row] for row in shown] == [
        ["sink", "local", "retrieval", "diffuse"], ["retrieval", "retrieval", "local", "local"]]
    drawn = {round(x, 12) for line in picture.axes[1].get_lines() for x in np.atleast_1d(line.get_xdata())}
    assert {round(x, 12) for x in errors} <= drawn
