"""Fidelity and its costs against numbers worked out by hand, on constructed results."""

import json
from dataclasses import replace

import exact_results
import numpy as np
import pandas as pd
import pytest
from exact_results import cell

from kvreplay_analysis import __main__ as program
from kvreplay_analysis import latency, load, tradeoffs
from kvreplay_analysis.errors import Absent, UsageError
from kvreplay_analysis.figures import tradeoffs as figure
from kvreplay_analysis.tradeoffs import Workload

GPU = "bandwidth=1e9,peak=1e12,memory=1e6"  # 1 byte a nanosecond
CONTEXT = 64 + 161 / 2  # mean length at a decode step
FULL = 32 * CONTEXT     # bytes: two heads of 8 numbers of 2 bytes

ERRORS = {("t", 0): [0.0, 0.1, 0.1, 0.2], ("t", 3): 0.3, ("u", 0): [0.2, 0.4, 0.4, 0.6], ("u", 3): 0.4}


def about(traces, **more):
    return {"traces": [{"stem": t, "element": "f16", "head_dim": 8, "v_head_dim": 8, "model_name": "made-up",
                        "state_bytes": {"mean": 64.0}, **more} for t in traces]}


def values(error, kept, read=None, attended=None, **more):
    return {"error_output": error, "resident": kept, "attended": kept if attended is None else attended,
            "bytes": 32 * kept, "bytes_read": 32 * kept if read is None else read, **more}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cells = []
    for (trace, layer), error in ERRORS.items():
        at = {"trace": trace, "layer": layer}
        cells += [
            cell("a", 32, values(error, 32, top1_agreement=0.75, top16_jaccard=0.5), **at),
            cell("b", 64, values(0.05, 64, **{"error_corrected.mean": 0.02}), compensators="mean", **at),
            cell("full", "", values(0.0, CONTEXT), **at),
            cell("oracle_mass", 32, values(0.1, 32), foresight="oracle", **at),
            cell("full+quest", 64, values(0.04, CONTEXT, read=32 * 64 + 400, attended=64), group="selection", **at),
            cell("h2o:pool=decode", 32, values(0.03, 96), group="pinned", **at)]
    return load(exact_results.write(tmp_path_factory.mktemp("tradeoffs") / "run", cells, run=about("tu")))


@pytest.fixture(scope="module")
def table(run):
    return tradeoffs.tradeoffs(run, Workload(gpu=GPU)).set_index(["label", "compensator"])


def test_quality(table):
    a = table.loc[("a", "")]
    assert a["fidelity"] == pytest.approx(0.7)            # traces: 0.8 and 0.6
    assert a["op"] == pytest.approx(0.5 ** 0.5)           # sqrt((0.64 + 0.36) / 2)
    assert a["og"] == pytest.approx(0.015 ** 0.5 / 0.7)   # layers of traces: 0.9, 0.7, 0.6, 0.6
    assert a["least"] == pytest.approx(0.6)
    assert a["geometric_mean"] == pytest.approx((0.9 * 0.7 * 0.6 * 0.6) ** 0.25)
    assert a["worst_decile"] == pytest.approx(0.4)        # one of 16 heads
    assert (a["top1_agreement"], a["top16_jaccard"]) == (0.75, 0.5)
    full = table.loc[("full", "")]
    assert (full["fidelity"], full["op"], full["og"], full["worst_decile"]) == (1, 1, 0, 1)
    assert table.at[("b", "mean"), "fidelity"] == pytest.approx(0.98)
    assert np.isnan(table.at[("b", ""), "top1_agreement"])


def test_worst_decile_is_a_tenth_of_the_heads_and_fidelity_not_below_zero(tmp_path):
    cells = [cell("a", 8, values([3.0, 0.5, 0.0, 0.0], 8), layer=n) for n in range(5)]
    run = load(exact_results.write(tmp_path / "r", cells, run=about("t")))
    cells = tradeoffs.fidelity_cells(run, "a", "8")
    assert sorted(cells["F"].unique()) == [0, 0.5, 1]
    got = tradeoffs.quality(cells)
    assert got["worst_decile"] == 0 and got["fidelity"] == pytest.approx(1 - 3.5 / 4)


def test_the_uncompressed_cache_is_all_of_itself(tmp_path):
    """Traces of other lengths: bytes are pooled over steps, so what they are a share of is too."""
    lengths = {"short": 64 + 161 / 2, "long": 64 + 481 / 2}
    cells = [cell(label, budget, values(error, kept or length), trace=trace) for trace, length in lengths.items()
             for label, budget, kept, error in (("full", "", None, 0.0), ("a", 32, 32, 0.1))]
    folder = exact_results.write(tmp_path / "r", cells[:2], run=about(["short", "long"]))
    other = exact_results.write(tmp_path / "s", cells[2:], run=about(["short", "long"]), n_steps=480)
    short, long = load(folder), load(other)
    both = replace(short, summary=pd.concat([short.summary, long.summary], ignore_index=True),
                   cells=pd.concat([short.cells, long.cells], ignore_index=True))
    mean = (160 * lengths["short"] + 480 * lengths["long"]) / 640
    assert tradeoffs.full_bytes(both) == pytest.approx(32 * mean)
    table = tradeoffs.tradeoffs(both, Workload(gpu=GPU), bands=False).set_index("label")
    assert table.at["full", "bytes_share"] == pytest.approx(1)
    assert table.at["a", "bytes_share"] == pytest.approx(32 / mean)


def test_time_energy_and_capacity(table):
    a = table.loc[("a", "")]
    # Two layers of two KV heads, 1024 bytes each: 4096 ns.
    assert a["tpot_us"] == pytest.approx(4.096)
    assert a["energy_mj"] == pytest.approx(4096 * 8 * 5.5e-12 * 1e3)
    assert a["max_batch"] == 244                                       # 1e6 // 4096
    assert a["tokens_per_s"] == pytest.approx(1e6 / 4.096)
    assert a["tokens_per_s_gb"] == pytest.approx(1e6 / 4.096 / (244 * 4096 / 1e9))
    assert a["bytes_share"] == pytest.approx(1024 / FULL)
    assert table.at[("full", ""), "bytes_share"] == pytest.approx(1)
    # A state of 64 bytes per KV head is kept and read.
    assert table.at[("b", "mean"), "tpot_us"] == pytest.approx(4 * (2048 + 64) / 1000)
    assert table.at[("b", "mean"), "bytes"] == 2112
    # Per-step selection reads less than it keeps.
    quest = table.loc[("full+quest", "")]
    assert quest["tpot_us"] == pytest.approx(4 * 2448 / 1000) and quest["max_batch"] == 1e6 // (4 * FULL)


@pytest.mark.parametrize("given, expected", [
    ({"batch": 8}, 8 * 4.096), ({"launch_us": 1.5}, 4.096 + 3), ({"model_layers": 4}, 8.192),
    ({"weights_gb": 1e-4}, 4.096 + 100), ({"batch": 8, "weights_gb": 1e-4, "model_layers": 6}, 24 * 4.096 + 100),
    # 2 operations of 8 + 8 numbers for 32 slots of 4 query heads, two layers, at 1e6 a second
    ({"gpu": "bandwidth=1e9,peak=1e6,memory=1e6"}, 2 * 4096)])
def test_workloads(run, given, expected):
    got = tradeoffs.tradeoffs(run, Workload(**{"gpu": GPU, **given}), bands=False)
    assert got.set_index("label").at["a", "tpot_us"] == pytest.approx(expected)


def test_energy_terms(run):
    w = Workload(gpu=GPU, batch=4, pj_per_bit=0, pj_per_flop=2, static_watts=3)
    got = tradeoffs.tradeoffs(run, w, bands=False).set_index("label").loc["a", "energy_mj"]
    operations, seconds = 4 * 2 * 4096, 4 * 4.096e-6
    assert got == pytest.approx(1e3 * (operations * 2e-12 + 3 * seconds) / 4)


def test_front_needs_more_than_the_tolerance():
    error, size, read = [0.5, 0.2, 0.21, 0.1, np.nan], [1, 2, 2, 3, 1], [1, 2, 1.9, 3, 1]
    assert list(tradeoffs.dominated(error, np.zeros(5), size, read)) == [False, False, False, False, True]
    # The second reads more than the third and is better by 0.01: a tie within 0.05, but not dominated.
    assert list(tradeoffs.dominated(error, np.full(5, 0.05), size, read)) == [False, False, False, False, True]
    assert list(tradeoffs.dominated([0.2, 0.19], [0, 0], [1, 1])) == [True, False]
    assert list(tradeoffs.dominated([0.2, 0.19], [0.05, 0.05], [1, 1])) == [False, False]
    assert list(tradeoffs.dominated([0.2, 0.2], [0.05, 0.05], [1, 2])) == [False, True]


def test_hypervolume():
    assert tradeoffs.hypervolume([0.5, 0.2], [0.25, 0.5]) == pytest.approx(0.75 * 0.5 + 0.5 * 0.3)
    assert tradeoffs.hypervolume([0.5, 0.6, 1.5], [0.25, 0.5, 0.1]) == pytest.approx(0.375)  # nothing gained
    assert tradeoffs.hypervolume([0.0], [1.0]) == 0 and tradeoffs.hypervolume([np.nan], [0.5]) == 0


def test_hypervolume_and_front_in_the_table(table):
    share = 2048 / FULL
    assert table.at[("b", ""), "hypervolume"] == pytest.approx((1 - share) * 0.95)
    assert not table.at[("oracle_mass", ""), "front"]  # oracles are on no front
    assert table.at[("full", ""), "front"] and table.at[("a", ""), "front"]
    assert table.at[("b", ""), "front"] and table.at[("b", "mean"), "front"]
    assert not table.at[("h2o:pool=decode", ""), "front"]  # b+mean is better and smaller


def test_winners(run):
    won = tradeoffs.winners(run, Workload(gpu=GPU), batches=(1, 60, 200), least=0.9)
    assert list(won["context"]) == [CONTEXT] * 3 and won["measured"].all()
    # a is faster and not good enough; of the others b keeps least; 8192 bytes a sequence fit 122 times.
    assert list(won["label"]) == ["b", "b", ""]
    assert won["tokens_per_s"].iloc[0] == pytest.approx(1e6 / 8.192)
    assert list(won["n_fitting"]) == [5, 3, 0]
    won = tradeoffs.winners(run, Workload(gpu=GPU), batches=(200,), least=0.5)
    assert list(won["label"]) == ["a"]
    assert set(tradeoffs.winners(run, Workload(gpu=GPU), (1,), least=0.999)["label"]) == {"full"}
    # Weights leave less room and are read for all.
    won = tradeoffs.winners(run, Workload(gpu=GPU, weights_gb=9e-4), batches=(8, 16), least=0.9)
    assert list(won["label"]) == ["b", ""]
    assert won["tokens_per_s"].iloc[0] == pytest.approx(8e6 / (8 * 8.192 + 900))


def test_longer_contexts_cost_what_grows(run):
    steps = latency.step_costs(run)

    def at(label, factor):
        c = {"budget": "", "group": "evictable", "compensator": "", "label": label, "resident": 64, "bytes": 2048}
        c.update({"b": {"budget": "64"}, "half": {"budget": "50%"}, "bytes": {"budget": "2KiB"},
                  "full+quest": {"budget": "64", "group": "selection", "resident": CONTEXT, "bytes": FULL},
                  "h2o:pool=decode": {"budget": "32", "group": "pinned", "resident": 96, "bytes": 3072}}.get(label, {}))
        known = label if label in run.labels else "b"
        kept, read, attended = tradeoffs.at_context(c, steps[steps["label"] == known], factor, 64)
        return kept, float(read.mean()), float(attended.mean())

    assert at("b", 10) == (2048, 2048, 64)                       # 64 tokens, however long the context
    assert at("bytes", 10) == (2048, 2048, 64)                   # and so do bytes
    assert at("half", 10) == (20480, 20480, 640)                 # half of it
    kept, read, attended = at("full+quest", 10)                  # all is kept; what is read to choose grows
    assert (kept, read, attended) == (pytest.approx(10 * FULL), pytest.approx(2048 + 4000), 64)
    assert at("h2o:pool=decode", 10) == (3072 + 32 * 576, 3072 + 32 * 576, 96 + 576)  # the prompt grows
    own = {"budget": "32", "group": "pinned", "resident": 192, "bytes": 6144}  # two sets of 96, each with the prompt
    more = tradeoffs.at_context(own, steps[steps["label"] == "h2o:pool=decode"], 10, 64)
    assert (more[0], float(more[2].mean())) == (6144 + 2 * 32 * 576, 96 + 576)
    won = tradeoffs.winners(run, Workload(gpu="h100"), batches=(1,), contexts=(10 * CONTEXT,), least=0.999)
    assert list(won["measured"]) == [True, False]
    assert won["tokens_per_s"].iloc[0] == pytest.approx(10 * won["tokens_per_s"].iloc[1])


def test_gpus():
    assert latency.gpu_named("h100") is latency.GPUS["H100-SXM"] and latency.canonical("rtx") == "RTX-4090"
    g = latency.gpu_named(GPU)
    assert (g.bandwidth, g.peak, g.memory) == (1e9, 1e12, 1e6)
    for name, why in (("V100", "is none of A100"), ("bandwidth=1e9", "lacks memory, peak"), ("", "is none of"),
                      ("bandwidth=1e9,peak=-1,memory=2", "positive number"), ("H", "is none of"),
                      ("bandwidth=1e9,peak=x,memory=2", "'peak=x'"), ("speed=1", "positive number is missing")):
        with pytest.raises(UsageError, match=why):
            latency.gpu_named(name)
    assert all(g.memory > 1e10 and g.source for g in latency.GPUS.values())


def test_constants_are_said():
    text = Workload(gpu="h200", launch_us=5).constants()
    for part in ("H200: 4.8 TB/s", "989.4 TFLOPS", "141 GB", "datasheet", "5.5 pJ/bit", "launch 5 us", "batch 1",
                 "left out at 0: weights, arithmetic's energy, static power"):
        assert part in text
    with pytest.raises(UsageError, match="batch 0"):
        Workload(batch=0)


def test_spans_and_eviction_bias(tmp_path):
    def spans(budget, keep_x, keep_y, kept, lost_x, lost_y):
        return cell("h2o", budget, {**values(0.2, kept), "retention:x": keep_x, "retention:y": keep_y,
                                    "lost_mass:x": lost_x, "lost_mass:y": lost_y, "evicted_mass": 0.4})

    cells = [spans(32, 0.2, 0.5, 0.25 * CONTEXT, 0.1, 0.3), spans(64, 0.4, 0.9, 0.5 * CONTEXT, 0.1, 0.1),
             spans(96, 0.8, 0.9, 0.75 * CONTEXT, 0.0, 0.1)]
    run = load(exact_results.write(tmp_path / "r", cells, run=about("t")))
    frame = tradeoffs.spans(run).set_index(["budget", "span"])
    row = frame.loc[("32", "y")]
    assert (row["keep"], row["lost_mass"]) == (0.5, pytest.approx(0.3))
    assert (row["overall"], row["span_share"]) == (pytest.approx(0.25), pytest.approx(0.75))
    bias = tradeoffs.eviction_bias(run).iloc[0]
    assert (bias["first"], bias["second"]) == ("x", "y")
    assert (bias["eb_32"], bias["eb_64"], bias["eb_96"]) == (pytest.approx(0.3), pytest.approx(0.5), pytest.approx(0.1))
    assert (bias["low_ratio"], bias["high_ratio"]) == (pytest.approx(0.25), pytest.approx(0.75))
    assert bias["area"] == pytest.approx((0.25 * 0.3 + 0.25 * 0.4) / 0.5)  # trapezia over the ratios, per ratio
    assert tradeoffs.eviction_bias(run, "y", "x").iloc[0]["eb_32"] == pytest.approx(-0.3)
    # Two heads of a group with a set each: twice the slots, the same share of the tokens.
    own = [{**c, "values": {**c["values"], "resident": 2 * c["values"]["resident"]}} for c in cells]
    twice = tradeoffs.spans(load(exact_results.write(tmp_path / "own", own, run=about("t"))))
    assert list(twice["overall"]) == pytest.approx(list(frame["overall"]))
    with pytest.raises(UsageError, match="span z is none of x, y"):
        tradeoffs.eviction_bias(run, "z")


def test_without_spans(run):
    with pytest.raises(Absent, match="have no spans"):
        tradeoffs.spans(run)


def test_command(run, capsys, tmp_path):
    assert program.main(["tradeoffs", str(run.folder), f"--gpu={GPU}", "--batches=1,8", "--contexts=1k",
                         f"--out={tmp_path / 'f.svg'}"]) == 0
    out = capsys.readouterr().out
    for text in ("given by the user", "a at 32", "Per-step selection", "h2o:pool=decode at 32",
                 "oracle_mass at 32 (oracle)", "Fastest with fidelity of at least 0.9", "1024 (costs alone)", "b at 64",
                 "left out at 0"):
        assert text in out
    assert (tmp_path / "f.svg").read_bytes().startswith(b"<?xml")
    assert program.main(["tradeoffs", str(run.folder), "--json", "--budget=32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {c["budget"] for c in told["configurations"]} == {"32", ""} and "H100-SXM" in told["constants"]
    assert list(told["configurations"][0]) == tradeoffs.COLUMNS and told["winners"][0]["measured"] is True
    assert program.main(["tradeoffs", str(run.folder), "--csv"]) == 0
    assert capsys.readouterr().out.startswith("label,compensator,group")


@pytest.mark.parametrize("wrong, why", [
    ("--gpu=V100", "GPU V100 is none of"), ("--batch=0", "batch 0"), ("--batch=x", "--batch x is not a whole number"),
    ("--launch-us=-1", "--launch-us -1 is not a number"), ("--batches=1,x", "--batches x"),
    ("--batches=0", "--batches 0"), ("--contexts=0", "--contexts 0"), ("--least-fidelity=2", "not between 0 and 1"),
    ("--budget=7", "budget 7 is not in"),
    ("--out=f.jpg", "--out: the ending jpg"), ("--style=wide", "--style wide"), ("--trace=v", "trace v is not in")])
def test_wrong_arguments(run, capsys, wrong, why):
    assert program.main(["tradeoffs", str(run.folder), wrong]) == 2
    assert why in capsys.readouterr().err


def test_a_run_that_does_not_say_what_a_token_weighs(tmp_path, capsys):
    cells = [cell("a", 32, values(0.2, 32))]
    run = load(exact_results.write(tmp_path / "r", cells, run={"traces": [{"stem": "t"}]}))
    row = tradeoffs.tradeoffs(run, Workload(gpu=GPU)).iloc[0]
    assert row["fidelity"] == pytest.approx(0.8) and np.isnan(row["bytes_share"]) and row["hypervolume"] == 0
    assert np.isnan(row["tpot_us"])
    assert program.main(["tradeoffs", str(run.folder)]) == 0
    assert "a at 32" in capsys.readouterr().out


def test_figure_names_winners(run):
    w = Workload(gpu=GPU)
    won = tradeoffs.winners(run, w, (1, 200), (20000,))
    drawn = figure.draw(run, tradeoffs.tradeoffs(run, w), won, w, "single")
    texts = [t.get_text() for t in drawn.axes[1].texts]
    assert "b\nat 64" in texts and "none fits\nor is good enough" in texts and len(texts) == 4
