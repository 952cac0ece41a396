"""League tables, fronts and latency on constructed numbers: power laws, whose interpolation is exact."""

import json

import exact_results
import numpy as np
import pytest
from exact_results import HEADS, STEPS, cell

from kvreplay_analysis import __main__ as program
from kvreplay_analysis import bootstrap, configurations, latency, league, load
from kvreplay_analysis.errors import Absent, UsageError

LAWS = {  # label: (factor, exponent, what it keeps of a budget)
    "streaming": (4.0, 0.5, 1.0), "h2o": (3.0, 0.6, 1.1), "tova": (2.0, 0.55, 0.9), "oracle_mass": (1.0, 0.6, 1.05),
    "lucky": (0.5, 0.7, 1.0), "worse": (9.0, 0.5, 1.0)}
BUDGETS = (32, 64, 128)


def error(label, size):
    factor, exponent, _ = LAWS[label]
    return factor * size ** -exponent


def law_cells(labels=tuple(LAWS), budgets=BUDGETS, layers=(0,), traces=("t",), slot=32.0, **more):
    out = []
    for label in labels:
        for b in budgets:
            size = b * LAWS[label][2]
            for n in layers:
                for t in traces:
                    out.append(cell(label, b, {"error_output": error(label, size), "resident": size, "attended": size,
                                               "bytes": size * slot, "bytes_read": size * slot}, layer=n, trace=t,
                                    foresight="oracle" if "oracle" in label else "none", **more))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cells = law_cells(layers=(0, 3), traces=("t", "u"))
    cells += [cell("full", "", {"error_output": 0.0, "resident": 144, "attended": 144, "bytes": 4608,
                                "bytes_read": 4608}, layer=n, trace=t) for n in (0, 3) for t in ("t", "u")]
    return load(exact_results.write(tmp_path_factory.mktemp("league") / "run", cells))


@pytest.fixture(scope="module")
def table(run):
    return league.league(run)


def test_power_laws_are_read_off_exactly(table):
    numbered = table[table["error_output"].notna() & (table["budget"] != "")]
    assert len(numbered) == len(LAWS) * len(BUDGETS)  # sizes were chosen that every method reaches
    for row in numbered.to_dict("records"):
        assert row["error_output"] == pytest.approx(error(row["label"], row["at"]), rel=1e-9)
        assert row["resident"] == pytest.approx(row["at"], rel=1e-9)
        assert row["bytes"] == pytest.approx(32 * row["at"], rel=1e-9)
        assert row["unit"] == "tokens" and row["group"] == "evictable"


def test_sizes_are_near_their_budgets_and_inside_every_curve(table):
    for budget, rows in table[table["budget"] != ""].groupby("budget"):
        size, = rows["at"].unique()
        assert int(budget) / 2 ** 0.5 <= size <= int(budget) * 2 ** 0.5
        assert all(32 * keeps * 0.99 <= size <= 128 * keeps * 1.01 for _, _, keeps in LAWS.values())


def test_ranks_leave_out_oracles_and_what_has_no_budget(table):
    for budget, rows in table[table["budget"] != ""].groupby("budget"):
        real = rows[rows["foresight"] != "oracle"].sort_values("error_output")
        assert list(real["rank"]) == [1, 2, 3, 4, 5]
        assert rows[rows["foresight"] == "oracle"]["rank"].isna().all()
        assert list(rows["error_output"]) == sorted(rows["error_output"])
    full = table[table["label"] == "full"]
    assert len(full) == 1 and full["rank"].isna().all() and full["bytes"].iloc[0] == 4608 and full["at"].iloc[0] == 144


def test_distance_closed(table):
    for row in table[table["budget"] != ""].to_dict("records"):
        base, oracle = error("streaming", row["at"]), error("oracle_mass", row["at"])
        assert (row["base"], row["oracle"]) == ("streaming", "oracle_mass")
        assert row["closed"] == pytest.approx((base - row["error_output"]) / (base - oracle), rel=1e-9, abs=1e-9)
    closed = table.set_index(["label", "budget"])["closed"]
    assert closed["streaming", "64"] == 0 and closed["oracle_mass", "64"] == 1  # exactly
    assert closed["lucky", "64"] > 1 and closed["worse", "64"] < 0              # nothing clipped


def test_another_base(run):
    closed = league.league(run, base="h2o").set_index(["label", "budget"])["closed"]
    assert closed["h2o", "64"] == 0 and closed["streaming", "64"] < 0
    with pytest.raises(UsageError, match="base h3o is not in .*did you mean h2o"):
        league.league(run, base="h3o")


def test_without_base_or_oracle_no_distance(tmp_path):
    alone = load(exact_results.write(tmp_path / "a", law_cells(("h2o", "oracle_mass"))))
    rows = league.league(alone)
    assert rows["closed"].isna().all() and rows["note"].str.contains("no base").all()
    rows = league.league(load(exact_results.write(tmp_path / "b", law_cells(("h2o", "streaming")))))
    assert rows["closed"].isna().all() and rows["note"].str.contains("no oracle").all()
    cells = law_cells(("streaming",)) + [{**c, "foresight": "oracle"} for c in law_cells(("worse",))]
    rows = league.league(load(exact_results.write(tmp_path / "c", cells)))
    assert rows["closed"].isna().all() and rows["note"].str.contains("worse is no better than streaming here").all()


def test_the_best_oracle_is_named(tmp_path):
    cells = law_cells(("streaming", "h2o", "oracle_mass"))
    cells += [{**c, "foresight": "oracle"} for c in law_cells(("lucky",))]
    rows = league.league(load(exact_results.write(tmp_path / "r", cells))).set_index(["label", "budget"])
    assert set(rows["oracle"]) == {"lucky"}
    assert rows.at[("lucky", "64"), "closed"] == 1 and rows.at[("oracle_mass", "64"), "closed"] < 1


def test_never_beyond_a_curve(tmp_path):
    """A method that keeps ten times as much has no number at the others' sizes, and one that is measured there has."""
    cells = law_cells(("streaming", "h2o"))
    cells += [cell("greedy", b, {"error_output": 0.1, "resident": 10 * b}) for b in BUDGETS]
    rows = league.league(load(exact_results.write(tmp_path / "r", cells)))
    greedy = rows[rows["label"] == "greedy"]
    assert greedy["error_output"].isna().all() and greedy["rank"].isna().all()
    assert list(greedy["note"]) == ["measured from 320 to 1280 tokens only; not extrapolated"] * 3
    assert rows[rows["label"] != "greedy"]["error_output"].notna().all()


def test_one_budget_compares_what_is_of_one_size(tmp_path):
    cells = [cell("a", 64, {"error_output": 0.2, "resident": 65}),
             cell("b", 64, {"error_output": 0.1, "resident": 65.3}),
             cell("c", 64, {"error_output": 0.3, "resident": 70})]
    rows = league.league(load(exact_results.write(tmp_path / "r", cells))).set_index("label")
    assert (rows.at["a", "rank"], rows.at["b", "rank"]) == (2, 1)
    assert rows.at["b", "resident"] == pytest.approx(65.3, rel=1e-12)
    assert np.isnan(rows.at["c", "error_output"])


def test_measured_sizes_are_the_tables_numbers(tmp_path):
    rng = np.random.default_rng(3)
    cells = [cell(label, b, {"error_output": rng.gamma(2, 1 / b, (HEADS, STEPS)), "resident": b + 1, "bytes": 32 * b})
             for label in ("h2o", "streaming") for b in BUDGETS]
    run = load(exact_results.write(tmp_path / "r", cells))
    rows = league.league(run).set_index(["label", "budget"])
    plain = configurations(run).set_index(["label", "budget"])
    for at, row in plain.iterrows():
        assert rows.at[at, "at"] == int(at[1]) + 1
        assert rows.at[at, "error_output"] == row["error_output"]
        assert rows.at[at, "low"] == pytest.approx(row["error_output_low"], rel=1e-8)
        assert rows.at[at, "high"] == pytest.approx(row["error_output_high"], rel=1e-8)
        assert rows.at[at, "note"].startswith(f"measured at budget {at[1]}")


def test_intervals_between_budgets(tmp_path):
    """Block by block in plain loops: both budgets, base and oracle are drawn together."""
    rng = np.random.default_rng(4)
    values = {(label, b): rng.gamma(3, 1 / b ** 0.5, (HEADS, STEPS)) / (1 + (label == "oracle_mass"))
              for label in ("streaming", "h2o", "oracle_mass") for b in (32, 64)}
    keeps = {"streaming": 1.0, "h2o": 1.25, "oracle_mass": 1.0}
    cells = [cell(label, b, {"error_output": v, "resident": b * keeps[label]}, foresight="oracle" if "oracle" in label
                  else "none") for (label, b), v in values.items()]
    rows = league.league(load(exact_results.write(tmp_path / "r", cells))).set_index(["label", "budget"])
    row = rows.loc[("h2o", "64")]
    assert 40 < row["at"] <= 64 and row["note"].startswith("between budgets 32 and 64")
    draws, = bootstrap._draws((3,), bootstrap.N_RESAMPLES, bootstrap.SEED)
    blocks = [slice(0, 64), slice(64, 128), slice(128, 160)]

    def at_size(label, drawn):
        ends = []
        for b in (32, 64):
            total = sum(n * values[label, b][:, s].sum() for n, s in zip(drawn, blocks))
            ends.append(total / sum(n * HEADS * (s.stop - s.start) for n, s in zip(drawn, blocks)))
        weight = np.log(row["at"] / (32 * keeps[label])) / np.log(2)
        return np.exp((1 - weight) * np.log(ends[0]) + weight * np.log(ends[1]))

    errors, closed = [], []
    for drawn in draws:
        method, base, oracle = (at_size(label, drawn) for label in ("h2o", "streaming", "oracle_mass"))
        errors.append(method)
        closed.append((base - method) / (base - oracle))
    assert row["error_output"] == pytest.approx(at_size("h2o", [1, 1, 1]), rel=1e-8)
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(errors, [0.025, 0.975])), rel=1e-8)
    expected = tuple(np.quantile(closed, [0.025, 0.975]))
    assert (row["closed_low"], row["closed_high"]) == pytest.approx(expected, rel=1e-6)


def test_no_error_is_no_logarithm(tmp_path):
    """A curve that reaches 0 is read off in straight lines of the error there."""
    cells = [cell("a", b, {"error_output": e, "resident": b}) for b, e in ((32, 0.4), (64, 0.2), (128, 0.0))]
    cells += [cell("b", b, {"error_output": 0.3, "resident": b * 1.5}) for b in (32, 64, 128)]
    rows = league.league(load(exact_results.write(tmp_path / "r", cells)))
    for row in rows[(rows["label"] == "a")].to_dict("records"):
        if 64 < row["at"] < 128:
            weight = np.log(row["at"] / 64) / np.log(2)
            assert row["error_output"] == pytest.approx(0.2 * (1 - weight), rel=1e-9)
    assert ((rows["at"] > 64) & (rows["at"] < 128) & (rows["label"] == "a")).any()


def test_state_of_a_compensator_is_charged(tmp_path):
    """Moments of head_dim 8: 4 (64 + 16 + 1) bytes per KV head, once for each query head where each has its own set."""
    values = {"error_corrected.moments": 0.05, "bytes": 1000.0, "bytes_read": 1000.0, "resident": 30, "attended": 30,
              "error_output": 0.1}
    cells = [cell("h2o", b, {**values, "bytes": 1000.0 * b, "bytes_read": 1000.0 * b, "resident": b},
                  compensators="moments") for b in (1, 2)]
    cells += [cell("own", b, {**values, "bytes": 1000.0 * b, "bytes_read": 1000.0 * b, "resident": b},
                   compensators="moments", method="h2o:scope=query_head") for b in (1, 2)]
    cells += [cell("acting", b, {**values, "bytes": 1000.0 * b, "bytes_read": 1000.0 * b, "resident": b},
                   compensators="moments", acting="moments", method="h2o+moments") for b in (1, 2)]
    run = load(exact_results.write(tmp_path / "r", cells))
    found = {c.name: c for c in league.curves(run, "bytes")}
    assert list(found) == ["h2o", "h2o+moments", "own", "own+moments", "acting"]
    assert list(found["h2o+moments"].points["bytes"]) == [1324, 2324]
    assert list(found["own+moments"].points["bytes_read"]) == [1648, 2648]
    assert list(found["h2o+moments"].points["error_output"]) == pytest.approx([0.05, 0.05], rel=1e-12)
    assert list(found["h2o"].points["bytes"]) == [1000, 2000]
    plain, more = (found[n].points["latency_us"] for n in ("h2o", "h2o+moments"))
    np.testing.assert_allclose(more - plain, 1e6 * 2 * 324 / latency.GPUS["H100-SXM"].bandwidth, rtol=1e-9)
    assert [c.name for c in league.curves(run, "tokens")] == ["h2o", "own", "acting"]
    # A run that does not say what a state weighs has no such rows.
    silent = load(exact_results.write(tmp_path / "s", cells, run={"traces": [{"stem": "t", "head_dim": 8}]}))
    assert [c.name for c in league.curves(silent, "bytes")] == ["h2o", "own", "acting"]


def test_a_state_that_grows_with_the_budget_is_charged_as_it_was_kept(tmp_path):
    """Each cell says what it kept, mean over layers: not what a state weighs beside a set of one token."""
    cells = [cell("h2o", b, {"error_corrected.clusters": 0.05, "error_corrected.mean": 0.05, "bytes": 1000.0 * b,
                             "bytes_read": 1000.0 * b, "resident": b, "attended": b, "error_output": 0.1},
                  layer=layer, compensators="mean,clusters", states=f"68,{(100 + 20 * layer) * b}")
             for b in (1, 2) for layer in (0, 1)]
    found = {c.name: c.points for c in league.curves(load(exact_results.write(tmp_path / "r", cells)), "bytes")}
    assert list(found) == ["h2o", "h2o+mean", "h2o+clusters"]
    assert list(found["h2o+mean"]["bytes"]) == [1068, 2068]
    assert list(found["h2o+clusters"]["bytes"]) == [1110, 2220]
    assert list(found["h2o+clusters"]["bytes_read"]) == [1110, 2220]
    more = found["h2o+clusters"]["latency_us"] - found["h2o"]["latency_us"]
    np.testing.assert_allclose(more, 2e6 * 2 * np.array([110, 220]) / latency.GPUS["H100-SXM"].bandwidth, rtol=1e-9)


def test_a_correction_run_as_a_method_has_one_row(tmp_path):
    size = {b: {"bytes": 1000.0 * b, "bytes_read": 1000.0 * b, "resident": b, "attended": b} for b in (1, 2)}
    cells = [cell("h2o", b, {**size[b], "error_output": 0.1, "error_corrected.moments": 0.05}, compensators="moments")
             for b in size]
    cells += [cell("h2o+moments", b, {**size[b], "error_output": 0.05}, acting="moments") for b in size]
    found = league.curves(load(exact_results.write(tmp_path / "r", cells)), "bytes")
    assert [c.name for c in found] == ["h2o", "h2o+moments"]
    assert found[1].acting == "moments" and not found[1].compensator



def test_selection_is_compared_by_bytes_read(tmp_path):
    cells = [cell(label, b, {"error_output": e / b, "resident": 144, "attended": b, "bytes": 4608, "bytes_read": r * b},
                  group="selection", method=f"full+{label}")
             for label, e, r in (("quest", 1, 40.0), ("topk", 0.9, 60.0)) for b in BUDGETS]
    for at in league.AT:
        rows = league.league(load(exact_results.write(tmp_path / at, cells)), at)
        assert set(rows["unit"]) == {"bytes read"} and set(rows["group"]) == {"selection"}
        for row in rows[rows["error_output"].notna()].to_dict("records"):
            assert row["bytes_read"] == pytest.approx(row["at"])
            assert row["error_output"] == pytest.approx({"quest": 40, "topk": 54}[row["label"]] / row["at"], rel=1e-9)
        # Though topk has the lower error at one budget.
        assert rows.set_index(["label", "budget"]).at[("quest", "64"), "rank"] == 1


def test_groups_are_kept_apart_and_the_base_is_the_groups(tmp_path):
    cells = law_cells(("streaming", "h2o"))
    cells += [{**c, "label": c["label"] + ":pool=decode", "method": c["label"] + ":pool=decode", "group": "pinned"}
              for c in law_cells(("streaming", "tova", "oracle_mass"))]
    rows = league.league(load(exact_results.write(tmp_path / "r", cells)))
    pinned = rows[rows["group"] == "pinned"]
    assert set(pinned["base"]) == {"streaming:pool=decode"} and set(pinned["oracle"]) == {"oracle_mass:pool=decode"}
    assert rows[rows["group"] == "evictable"]["closed"].isna().all()
    named = league.league(load(tmp_path / "r"), base="streaming")
    assert set(named.loc[named["group"] == "pinned", "base"]) == {"streaming:pool=decode"}


def test_only_layers_that_all_methods_have(tmp_path):
    """After an interruption: the layer that one method lacks would be compared with others' easier ones."""
    cells = law_cells(("streaming", "h2o"), layers=(0,))
    cells += [{**c, "values": {**c["values"], "error_output": 50.0}} for c in law_cells(("streaming",), layers=(1,))]
    run = load(exact_results.write(tmp_path / "r", cells))
    assert league.shared_cells(run)[1] == 3
    rows = league.league(run)
    for row in rows.to_dict("records"):
        assert row["error_output"] == pytest.approx(error(row["label"], row["at"]), rel=1e-9)
    apart = load(exact_results.write(tmp_path / "s", law_cells(("streaming",), layers=(0,)) +
                                     law_cells(("h2o",), layers=(1,))))
    with pytest.raises(Absent, match="no layer of .* has results of all methods"):
        league.league(apart)


def test_one_budget_of_the_table(run, table):
    some = league.league(run, budget="64")
    rest = table[table["budget"].isin(["64", ""])].reset_index(drop=True)
    assert some.equals(rest)
    with pytest.raises(UsageError, match="budget 65 is not in"):
        league.league(run, budget="65")


def test_without_bytes_no_table_of_bytes(tmp_path):
    run = load(exact_results.write(tmp_path / "r", [cell("h2o", 8, {"error_output": 0.1, "resident": 9})]))
    assert len(league.league(run)) == 1
    with pytest.raises(Absent, match="did not measure bytes"):
        league.league(run, "bytes")


def test_front_against_all_pairs():
    rng = np.random.default_rng(8)
    size = rng.integers(1, 12, 60).astype(float)
    error = 12 - size + rng.integers(0, 4, 60)
    size[3], error[7] = np.nan, np.nan
    front = league.pareto(size, error)
    for i in range(60):
        beaten = any(size[j] <= size[i] and error[j] <= error[i] and (size[j] < size[i] or error[j] < error[i])
                     for j in range(60))
        assert front[i] == (not beaten and np.isfinite(size[i]) and np.isfinite(error[i]))
    assert 2 <= front.sum() < 30


def test_latency_is_the_roofline(run):
    """Against the two quotients, layer by layer."""
    gpu = latency.GPUS["A100-80GB"]
    us = latency.decode_us(latency.step_costs(run), "A100-80GB")
    for label in ("h2o", "tova"):
        size = 64 * LAWS[label][2]
        n_bytes, operations = 2 * size * 32, 2 * 2 * 2 * size * (8 + 8)  # 2 KV heads, groups of 2, head_dim 8
        expected = 2 * max(n_bytes / 2.039e12, operations / 312e12) * 1e6  # 2 layers
        assert us[label, "64"] == pytest.approx(expected, rel=1e-12)
    heavy = latency.attention_us(10.0, 1000.0, 4, 16, 128, 128, gpu)
    assert heavy == pytest.approx(1e6 * 4 * (2 * 1000 * 16 * 256) / 312e12)  # computing takes longer than reading
    with pytest.raises(UsageError, match="GPU B100-80GB is none of .*did you mean A100-80GB"):
        latency.gpu_named("B100-80GB")


def test_costs_and_fronts_of_a_run(run):
    frame = league.costs(run)
    real = frame[frame["foresight"] != "oracle"]
    assert not frame.loc[frame["foresight"] == "oracle", ["front_bytes", "front_latency"]].any(axis=None)
    for row in real.to_dict("records"):
        beaten = ((real["bytes"] <= row["bytes"]) & (real["error_output"] <= row["error_output"]) &
                  ((real["bytes"] < row["bytes"]) | (real["error_output"] < row["error_output"]))).any()
        assert row["front_bytes"] == (not beaten)
    assert frame[frame["label"] == "full"]["front_bytes"].all()


def test_the_command(run, table, capsys):
    folder = str(run.folder)
    assert program.main(["league", folder, "--budget", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = table[table["budget"].isin(["64", ""])]
    assert [r["label"] for r in told] == list(rows["label"])
    assert [r["error_output"] for r in told] == list(rows["error_output"])
    assert program.main(["league", folder, "--at", "bytes"]) == 0
    assert "closed" in capsys.readouterr().out
    assert program.main(["league", folder, "--csv"]) == 0
    assert capsys.readouterr().out.count("\n") == len(table) + 1
    for wrong in (["--at", "token"], ["--budget", "63"], ["--gpu", "B200"], ["--json", "--csv"], ["--head-type", "x"]):
        assert program.main(["league", folder, *wrong]) == 2, wrong


def test_figures_draw_the_tables(run, table):
    from kvreplay_analysis import figures

    frames = figures.league.data(run, "64")
    shown = frames["tokens"]
    assert list(shown["error_output"]) == list(table.loc[table["budget"] == "64", "error_output"])
    picture = figures.league.draw(run, "64", frames=frames)
    lines = [line for line in picture.axes[0].get_lines() if line.get_marker() not in ("", "None", None)]
    points = [line.get_xdata()[0] for line in lines]
    np.testing.assert_allclose(points, shown["error_output"])
    frames = figures.pareto.data(run)
    picture = figures.pareto.draw(run, frames=frames)
    drawn = {tuple(np.round(line.get_ydata(), 12)) for line in picture.axes[0].get_lines()}
    for _, line in frames["points"][frames["points"]["error_output"] > 0].groupby("name"):
        assert tuple(np.round(line.sort_values("bytes")["error_output"], 12)) in drawn


def test_budgets_that_come_to_one_size_have_the_same_rows(tmp_path):
    """64 tokens are 12.5% of a prompt of 512: both budgets are ranked, at the same size and alike."""
    def written(name, budgets):
        cells = [cell(label, b, {"error_output": error(label, size), "resident": size, "attended": size,
                                 "bytes": 32.0 * size, "bytes_read": 32.0 * size},
                      foresight="oracle" if "oracle" in label else "none")
                 for label in ("streaming", "h2o", "oracle_mass") for b, size in budgets.items()]
        return load(exact_results.write(tmp_path / name, cells))

    twice = written("twice", {"12.5%": 64, "64": 64, "25%": 128})
    found = league.league(twice)
    columns = ["label", "at", "rank", "error_output", "closed"]
    one, other = (found[found["budget"] == b][columns].reset_index(drop=True) for b in ("12.5%", "64"))
    assert len(one) == 3 and one.equals(other)
    assert league.league(twice, budget="64")["label"].tolist() == one["label"].tolist()
    single = league.league(written("once", {"64": 64, "25%": 128}), budget="64")
    assert single[columns].equals(one)


# ---- the best of each class ----
@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    """h2o and tova evict, lucky merges, worse corrects; tova and streaming also have a correction beside them."""
    beside = {"error_corrected.mean": 0.25}
    corrected = ("streaming", "tova")
    cells = [{**c, "values": {**c["values"], **(beside if c["label"] in corrected else {})},
              "compensators": "mean" if c["label"] in corrected else "",
              "compensator_acting": "moments" if c["label"] == "worse" else ""} for c in law_cells()]
    cells += [cell("full+quest", b, {"error_output": 1 / b, "resident": 144, "attended": b, "bytes": 4608,
                                     "bytes_read": 32 * b + 100}, group="selection") for b in BUDGETS]
    said = {"streaming": "eviction", "h2o": "eviction", "tova": "eviction", "lucky": "merging", "worse": "correction",
            "oracle_mass": "eviction", "full+quest": "selection"}
    run = {"methods": [{"label": k, "method": k, "class": v} for k, v in said.items()]}
    return load(exact_results.write(tmp_path_factory.mktemp("classes") / "run", cells, run=run))


def test_the_best_of_each_class_and_its_distance(of_classes):
    found = league.best(of_classes)
    rows = found[found["group"] == "evictable"].set_index(["budget", "class"])
    assert list(dict.fromkeys(found["group"])) == ["evictable", "selection"]
    assert list(dict.fromkeys(found.loc[found["group"] == "evictable", "budget"])) == ["32", "64", "128"]
    for budget in ("32", "64", "128"):
        size = rows.at[(budget, "eviction"), "at"]
        # 3 x^-0.6 of h2o against 2 x^-0.55 of tova: tova is below up to x = 1.5^20.
        assert list(rows.loc[budget]["label"]) == ["tova", "lucky", rows.at[(budget, "correction"), "label"]]
        for kind, label in (("eviction", "tova"), ("merging", "lucky")):
            row = rows.loc[(budget, kind)]
            assert row["oracle"] == "oracle_mass" and row["oracle_error"] == pytest.approx(error("oracle_mass", size))
            assert row["distance"] == pytest.approx(error(label, size) - error("oracle_mass", size))
            assert row["times_oracle"] == pytest.approx(error(label, size) / error("oracle_mass", size))
        # The best of worse, which acts with a correction, and of those measured beside streaming and tova.
        assert rows.at[(budget, "correction"), "error_output"] == pytest.approx(min(0.25, error("worse", size)))
    quest = found[found["group"] == "selection"]
    assert set(quest["class"]) == {"selection"} and quest["distance"].isna().all() and len(quest) == 3
    assert (quest["oracle"] == "").all()


def test_classes_of_older_results(tmp_path):
    cells = law_cells(("streaming", "h2o")) + [
        {**c, "label": "h2o+kivi", "method": "h2o+kivi:bits=2"} for c in law_cells(("tova",))]
    found = league.best(load(exact_results.write(tmp_path / "r", cells)))
    assert set(zip(found["class"], found["label"])) == {("eviction", "h2o"), ("encoding", "h2o+kivi")}


def test_the_best_on_the_command_line(of_classes, capsys):
    assert program.main(["league", str(of_classes.folder), "--best", "--budget=64"]) == 0
    out = capsys.readouterr().out
    assert "the best of each class" in out
    lines = [line for line in out.splitlines() if line.startswith("64 ")]
    assert [next(k for k in league.CLASSES if k in line) for line in lines] == ["eviction", "merging", "correction",
                                                                                "selection"]
    assert "tova" in lines[0] and "lucky" in lines[1] and "oracle_mass" in lines[0]
    assert program.main(["league", str(of_classes.folder), "--best", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told[0]["class"] == "eviction" and told[0]["label"] == "tova" and "times_oracle" in told[0]
    assert program.main(["league", str(of_classes.folder)]) == 0
    both = capsys.readouterr().out
    assert both.index("mean error_output at equal size") < both.index("the best of each class")
