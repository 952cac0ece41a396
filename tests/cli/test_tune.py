"""kvreplay tune as a user runs it: what it refuses, what it leaves, and what run makes of it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from harness import KVREPLAY, assert_refused, final_files, kvreplay, make, pick, rows

ENVIRONMENT = {**os.environ, "KVREPLAY_PYTHON": sys.executable}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def traces(folder):
    shape = dict(n_tokens=448, n_heads=4, n_kv_heads=2, layers=(0, 1), sharp=2.0, prompt_len=64)
    return [make(folder / f"{name}.h5", seed=seed, **shape) for name, seed in (("a", 1), ("b", 2))]


def tune(*arguments, **more):
    return kvreplay("tune", *arguments, env=ENVIRONMENT, **more)


ALPHA = ("-m", "momentum:scope=kv_head", "--param", "alpha=0.3:0.99", "-b", "24,48", "--candidates", "8")


@pytest.fixture(scope="module")
def tuned(folder, traces):
    pytest.importorskip("matplotlib")
    done = tune(*ALPHA, "--traces", traces[0], "--holdout", traces[1], "--threads", 1, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    assert "Gain over the default, on held-out traces" in done.stdout
    assert "Values per layer and KV head against one value for all" in done.stdout
    return folder / "out"


def test_what_is_written(tuned):
    assert final_files(tuned) == ["figures", "holdout", "params", "train", "tune.json", "tuned.json"]
    assert not (tuned.parent / "out.part").exists()
    spec = json.loads((tuned / "tuned.json").read_text())
    assert len({r["label"] for r in rows(tuned / "train")}) == len(spec["candidates"]) == 9
    assert {r["trace"] for r in rows(tuned / "holdout")} == {"b"}


def test_params_from_gives_the_held_out_numbers_exactly(tuned, traces, folder):
    done = kvreplay("run", traces[1], "--params-from", tuned / "tuned.json", "-c", "none", "--metrics", "error_output",
                    "--out", folder / "again")
    assert done.returncode == 0, done.stderr
    spec = json.loads((tuned / "tuned.json").read_text())
    wanted = {(where[level], where["budgets"][0]) for where in spec["tuned"] for level in ("global", "layer", "head")}
    mine, theirs = rows(folder / "again"), rows(tuned / "holdout")
    assert {(r["label"], r["budget"]) for r in mine} == wanted
    theirs = [r for r in theirs if (r["label"], r["budget"]) in wanted]

    def key(r):
        return (r["layer"], r["label"], r["budget"], r["metric"], r["kv_head"], r["q_head"])

    assert sorted(mine, key=key) == sorted(theirs, key=key)
    tables = json.loads((folder / "again" / "run.json").read_text())["methods"]
    assert all(len(h) == 64 for m in tables for h in m["value_tables"].values())


def test_params_from_takes_other_methods_and_fewer_budgets(tuned, traces, folder):
    done = kvreplay("run", traces[1], "--params-from", tuned, "-b", "48", "-m", "h2o,momentum:scope=kv_head", "-c",
                    "none", "--metrics", "error_output", "--out", folder / "more")
    assert done.returncode == 0, done.stderr
    table = rows(folder / "more")
    assert {r["budget"] for r in table} == {"48"}
    assert {"h2o", "momentum:scope=kv_head"} < {r["label"] for r in table}
    assert_refused(kvreplay("run", traces[1], "--params-from", tuned, "-b", "99", "--out", folder / "none"), 2, "99",
                   "24, 48")
    assert_refused(kvreplay("run", traces[1], "--params-from", traces[0], "--out", folder / "none"), 2, "a.h5",
                   "tuned.json")
    assert_refused(kvreplay("run", traces[1], "--params-from", folder / "no.json", "--out", folder / "none"), 2,
                   "no.json")


def test_a_table_of_the_tuner_is_one_value_per_head(tuned, traces, folder):
    """The head method's rows are those of runs with each head's own value: nothing is mixed up between heads."""
    table = json.loads((tuned / "params/24-head-alpha.json").read_text())
    spec = json.loads((tuned / "tuned.json").read_text())
    head = next(w["head"] for w in spec["tuned"] if w["budgets"] == ["24"])
    held = rows(tuned / "holdout")
    for layer, values in table.items():
        for kv_head, alpha in enumerate(values):
            out = folder / f"one-{layer}-{kv_head}"
            done = kvreplay("run", traces[1], "-m", f"momentum:scope=kv_head,alpha={alpha}", "-b", "24", "-c", "none",
                            "--metrics", "error_output", "--out", out)
            assert done.returncode == 0, done.stderr
            assert pick(rows(out), "error_output", layer=layer, kv_head=kv_head) == \
                pick(held, "error_output", layer=layer, kv_head=kv_head, label=head, budget="24")


def test_the_default_is_among_the_candidates_and_no_gain_is_below_it_on_the_tuning_data(traces, folder):
    pytest.importorskip("matplotlib")
    done = tune(*ALPHA, "--traces", traces[0], "--out", folder / "alone", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("No trace was held out" in note for note in found["notes"])
    for case in found["cases"]:
        assert case["gain_on"] == "train"
        assert case["gain"]["difference"] >= 0
        assert case["layer"]["over_global"]["difference"] >= 0
        assert case["head"]["over_default"]["difference"] >= case["layer"]["over_default"]["difference"]
        assert case["gain"]["tuned"] == min(c["value"] for c in case["curve"])


def test_the_last_steps_can_be_held_out(traces, folder):
    pytest.importorskip("matplotlib")
    done = tune(*ALPHA, "--traces", traces[0], "--holdout-steps", "0.5", "--out", folder / "steps", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["holdout_from_step"] == 192
    assert {r["n"] + r["n_skipped"] for r in rows(folder / "steps" / "train")} == {192}
    assert {r["n"] + r["n_skipped"] for r in rows(folder / "steps" / "holdout")} == {384}
    # What was chosen does not know the later steps: the same as of the first half alone.
    done = tune(*ALPHA, "--traces", traces[0], "--max-steps", 192, "--out", folder / "half", "--json")
    assert [c["methods"]["global"] for c in json.loads(done.stdout)["cases"]] == \
        [c["methods"]["global"] for c in found["cases"]]


def test_several_parameters_lists_and_engine_keys(traces, folder):
    pytest.importorskip("matplotlib")
    done = tune("-m", "momentkv", "--param", "residual.window=1:16", "--param", "adakv.alpha=0:1", "--param",
                "evict=after_attention,before_attention", "-b", "32", "--candidates", "12", "--traces", traces[0],
                "--objective", "error_output+0.1*evicted_mass:p90", "--out", folder / "many", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {p["name"]: p["grain"] for p in found["params"]} == {"window": "head", "evict": "global", "alpha": "global"}
    assert any("engine key" in note or "choice" in note for note in found["notes"])
    values = found["cases"][0]["optimum"]["values"]
    head = json.loads((folder / "many" / "tuned.json").read_text())["tuned"][0]["head"]
    assert "window=@params/32-head-window.json" in head
    for name, default in (("alpha", "0.2"), ("evict", "before_attention")):  # one value for all, where it is not that
        assert (f"{name}={values[name]}" in head) or values[name] == default


@pytest.mark.parametrize("arguments, words", [
    (("-m", "moment-kv", "--param", "alpha=0.3:1.5"), ("alpha=1.5", "0 to 1")),
    (("-m", "moment-kv", "--param", "alhpa=0.3:0.5"), ("'alhpa'", "'alpha'")),
    (("-m", "momnt-kv", "--param", "alpha=0.3:0.5"), ("'momnt-kv'", "'moment-kv'")),
    (("-m", "moment-kv", "--param", "alpha=0.3:0.5", "--param", "alpha=0.3,0.5"), ("alpha", "twice")),
    (("-m", "moment-kv", "--param", "alpha=0.97"), ("alpha", "wider range")),
    (("-m", "moment-kv", "--param", "alpha=0.3:0.5", "--objective", "eror"), ("'eror'", "'error'")),
    (("-m", "moment-kv", "--param", "alpha=0.3:0.5", "--candidates", "0"), ("--candidates", "0")),
    (("-m", "moment-kv", "--param", "alpha=0.3:0.5", "--objective", "error@bytes=1KiB"), ("at least two",)),
    (("-m", "snapkv", "--param", "kernel=2,4"), ("kernel=4", "odd")),
    (("-m", "moment-kv", "--param", "alpha=0.3:0.5", "--holdout-steps", "1"), ("--holdout-steps", "below 1")),
    (("-m", "moment-kv", "--param", "alpha=0.3:0.5", "--holdout-steps", "0.95"), ("--holdout-steps", "384", "block")),
    (("-m", "moment-kv"), ("--param",)),
])
def test_refused_before_anything_is_made(traces, tmp_path, arguments, words):
    done = tune(*arguments, "-b", "24", "--traces", traces[0], "--out", tmp_path / "out")
    assert_refused(done, 2, *words)
    assert final_files(tmp_path) == []


def test_values_above_a_budget_are_left_out_and_counted(traces, tmp_path):
    pytest.importorskip("matplotlib")
    done = tune("-m", "h2o", "--param", "window=1:5000", "-b", "24", "--candidates", "8", "--traces", traces[0],
                "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "were left out" in done.stdout and "more than the budget of 24" in done.stdout


def test_traces_and_folders_that_do_not_go(traces, tmp_path, tuned):
    alpha = ("-m", "moment-kv", "--param", "alpha=0.3:0.5")
    assert_refused(tune(*alpha, "--traces", traces[0], "--out", tmp_path / "out"), 2, "--budget")
    assert_refused(tune(*alpha, "-b", "24", "--traces", tmp_path / "no.h5", "--out", tmp_path / "out"), 3, "no.h5")
    assert_refused(tune(*alpha, "-b", "24", "--traces", traces[0], "--holdout", traces[0], "--out", tmp_path / "out"),
                   2, "--holdout")
    assert_refused(tune(*alpha, "-b", "24", "--traces", traces[0], "--holdout", traces[1], "--holdout-steps", "0.5",
                        "--out", tmp_path / "out"), 2, "--holdout-steps", "exclude")
    assert_refused(tune(*alpha, "-b", "24", "--traces", traces[0], "--out", tuned), 2, "not empty", "--force")
    other = make(tmp_path / "c.h5", n_tokens=96, n_heads=2, n_kv_heads=1)
    assert_refused(tune(*alpha, "-b", "24", "--traces", traces[0], other, "--out", tmp_path / "out"), 2, "one model")
    assert final_files(tmp_path) == ["c.h5"]


def test_a_signal_leaves_nothing_behind(tmp_path):
    trace = make(tmp_path / "long.h5", n_tokens=4096, n_heads=4, n_kv_heads=2, layers=(0, 1, 2, 3), prompt_len=1024)
    process = subprocess.Popen([KVREPLAY, "tune", "-m", "moment-kv", "--param", "alpha=0.3:0.99", "-b", "64",
                                "--candidates", "64", "--traces", trace, "--threads", "1", "--out", tmp_path / "out"],
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert final_files(tmp_path) == ["long.h5"]
