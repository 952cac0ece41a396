"""What `kvreplay explain` refuses and how; that it says what it explains, and leaves nothing where it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from harness import KVREPLAY, assert_refused, final_files, good_run, kvreplay, kvtrace, make, rows


PYRAMID = "tova+pyramid:window=4,beta=2"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return make(tmp_path_factory.mktemp("traces") / "a.h5", layers=(0, 2), n_heads=4, n_kv_heads=2)


@pytest.fixture(scope="module")
def results(trace, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    good_run(trace, out, "-m", "h2o", "-m", "momentkv", "-m", "h2o:window=20", "-m", PYRAMID, "-m", "tova+zigzag",
             "-m", "full", "-b", "20,32,40")
    return out


@pytest.mark.parametrize("arguments, words", [
    (("--method", "h20"), ("--method", "'h20'", "'h2o'")),
    (("--method", "h2o", "--against", "moment"), ("--against", "'moment'", "'momentkv'")),
    (("--method", "h2o", "--against", "h2o"), ("'h2o'", "itself")),
    (("--method", "momentkv", "--against", "residual+adakv+moments"), ("itself",)),
    (("--method", "h2o", "--budget", "33"), ("--budget", "'33'", "'32'")),
    (("--method", "h2o", "--trace", "b"), ("--trace", "'b'", "'a'")),
    (("--method", "h2o", "--layers", "1"), ("--layers", "no layer 1", "0, 2")),
    (("--method", "h2o", "--layers", "x"), ("--layers", "'x'")),
    (("--method", "h2o", "--top", "0"), ("--top", "0")),
    (("--method", "h2o", "--threads", "9999"), ("--threads", "9999", "1024")),
    (("--method", "tova+zigzag", "--layers", "2"), ("--layers", "tova+zigzag")),
    (("--method", "h2o", "--memory", "1KiB"), ("--memory",)),
    ((), ("--method",)),
])
def test_refusals(results, arguments, words):
    before = final_files(results)
    assert_refused(kvreplay("explain", results, *arguments), 2, *words)
    assert final_files(results) == before


def test_folders_that_are_none(tmp_path, results):
    assert_refused(kvreplay("explain", tmp_path / "gone", "-m", "h2o"), 2, "does not exist")
    assert_refused(kvreplay("explain", tmp_path, "-m", "h2o"), 2, "run.json")
    assert_refused(kvreplay("explain", results / "run.json", "-m", "h2o"), 2, "is a file")
    (tmp_path / "run.json").write_text('{"traces": 3}')
    assert_refused(kvreplay("explain", tmp_path, "-m", "h2o"), 2, "run.json")


def test_files_in_the_way_stay(trace, tmp_path):
    out = tmp_path / "out"
    good_run(trace, out, "-m", "h2o", "-b", "20")
    (out / "explain").write_text("mine")
    assert_refused(kvreplay("explain", out, "-m", "h2o"), 2, "explain")
    assert (out / "explain").read_text() == "mine"
    (out / "explain").unlink()
    (out / "explain").mkdir()
    (out / "explain" / "h2o_at_20").write_text("mine")
    assert_refused(kvreplay("explain", out, "-m", "h2o"), 2, "h2o_at_20", "not a folder")
    assert (out / "explain" / "h2o_at_20").read_text() == "mine"


def test_trace_that_is_gone_or_another(trace, tmp_path):
    mine = tmp_path / "a.h5"
    shutil.copy(trace, mine)
    good_run(mine, tmp_path / "out", "-m", "h2o", "-b", "20")
    mine.unlink()
    assert_refused(kvreplay("explain", tmp_path / "out", "-m", "h2o"), 3, str(mine), "--traces-in")
    make(mine, layers=(0, 2), n_heads=4, n_kv_heads=2, seed=2)
    other = kvtrace.content_hash(str(mine))
    assert_refused(kvreplay("explain", tmp_path / "out", "-m", "h2o"), 3, str(mine), other,
                   kvtrace.content_hash(str(trace)))
    assert final_files(tmp_path / "out") == ["results.h5", "run.json", "summary.csv"]
    (tmp_path / "moved").mkdir()
    shutil.copy(trace, tmp_path / "moved" / "a.h5")
    # Python is asked for last: without one, the replay's own files are there.
    done = kvreplay("explain", tmp_path / "out", "-m", "h2o", "--traces-in", tmp_path / "moved",
                    env={"KVREPLAY_PYTHON": "/nowhere/python", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 1 and "/nowhere/python" in done.stderr
    folder = tmp_path / "out" / "explain" / "h2o_at_20"
    assert final_files(folder) == ["attribution.h5", "explain.json", "results.h5", "run.json", "summary.csv",
                                   "tokens.csv"]
    assert json.loads((folder / "explain.json").read_text())["budget"] == "20"


def replayed(results, *arguments):
    """The folder of a replay whose page nobody wrote."""
    before = set((results / "explain").iterdir()) if (results / "explain").exists() else set()
    kvreplay("explain", results, *arguments, env={"KVREPLAY_PYTHON": "/nowhere/python", "PATH": "/usr/bin:/bin"})
    new, = set((results / "explain").iterdir()) - before
    return new


def test_layers_of_several_traces(trace, tmp_path):
    one = make(tmp_path / "one.h5", layers=(0,), n_heads=4, n_kv_heads=2, seed=3)
    good_run([one, trace], tmp_path / "out", "-m", "tova+zigzag", "-b", "20")
    assert_refused(kvreplay("explain", tmp_path / "out", "-m", "tova+zigzag", "--layers", "0"), 2, "tova+zigzag")


def test_a_layer_alone_under_an_allocator_that_asks_for_no_other(results):
    def errors(folder, budget):
        return [(r["layer"], r["q_head"], r["mean"]) for r in rows(folder)
                if (r["label"], r["budget"], r["layer"], r["metric"]) == (PYRAMID, budget, "2", "error")]
    alone = replayed(results, "--method", PYRAMID, "--layers", "2", "--budget", "32")
    assert {r["layer"] for r in rows(alone)} == {"2"}
    assert errors(alone, "32") == errors(results, "32") != errors(results, "40")


def test_what_is_explained_by_default(results):
    """The middle budget; a canonical name finds what was typed; a cut run is replayed as it was cut."""
    folder = replayed(results, "-m", "residual+adakv+moments", "--against", "full")
    said = json.loads((folder / "explain.json").read_text())
    assert (folder.name, said["method"], said["against"]) == ("momentkv_vs_full_at_32", "momentkv", "full")


def test_shortened_and_shifted_runs_are_replayed_alike(trace, tmp_path):
    table = good_run(trace, tmp_path / "out", "-m", "h2o", "-b", "20", "--max-steps", "9", "--prompt-len", "40",
                     "--seed",
                     "5", "--layers", "2", "--metrics", "error,evicted_mass")
    folder = replayed(tmp_path / "out", "-m", "h2o")
    run = json.loads((folder / "run.json").read_text())
    assert (run["traces"][0]["n_tokens"], run["traces"][0]["prompt_len"], run["seed"]) == (49, 40, 5)
    with open(folder / "summary.csv") as file:
        mine = [line.split(",") for line in file if ",error," in line]
    assert [float(row[-6]) for row in mine] == pytest.approx([r["mean"] for r in table if r["metric"] == "error"],
                                                             rel=1e-5)


def test_a_replaced_explanation_keeps_nothing_of_the_earlier(results):
    folder = replayed(results, "-m", "h2o:window=20", "-b", "40")
    (folder / "explain.html").write_text("old")
    kvreplay("explain", results, "-m", "h2o:window=20", "-b", "40", env={"KVREPLAY_PYTHON": "/nowhere/python"})
    assert "explain.html" not in final_files(folder)


def test_a_table_that_changed_is_refused(trace, tmp_path):
    table = tmp_path / "alpha.json"
    table.write_text('{"0": 0.9, "2": 0.5}')
    method = f"momentum:alpha=@{table}"
    good_run(trace, tmp_path / "out", "-m", method, "-b", "20")
    table.write_text('{"0": 0.9, "2": 0.6}')
    assert_refused(kvreplay("explain", tmp_path / "out", "-m", method), 2, "alpha.json")


def test_tuned_methods_are_found_with_their_tables_and_budgets(trace, tmp_path):
    """`run --params-from` reads "@params/..." beside tuned.json, and gives each method budgets of its own."""
    (tmp_path / "tuned" / "params").mkdir(parents=True)
    table = tmp_path / "tuned" / "params" / "20-layer-alpha.json"
    table.write_text('{"0": 0.9, "2": 0.5}')
    by_layer, for_all = "momentum:alpha=@params/20-layer-alpha.json", "momentum:alpha=0.7"
    tuned = [{"budgets": ["20"], "global": for_all, "layer": by_layer, "head": None},
             {"budgets": ["28"], "global": for_all, "layer": None, "head": None}]
    (tmp_path / "tuned" / "tuned.json").write_text(json.dumps({"format": "kvreplay-tuned", "tuned": tuned}))
    out = tmp_path / "out"
    before = good_run(trace, out, "--params-from", tmp_path / "tuned")
    run = json.loads((out / "run.json").read_text())
    assert {m["label"]: m["budgets"] for m in run["methods"]} == {for_all: ["20", "28"], by_layer: ["20"]}
    assert run["table_files"] == {"params/20-layer-alpha.json": str(table)}
    assert_refused(kvreplay("explain", out, "-m", by_layer, "-b", "28"), 2, "--budget", "'28'", "'20'")
    folder = replayed(out, "-m", by_layer, "--against", for_all)
    assert folder.name == "momentum-alpha--params-20-layer-alpha.json_vs_momentum-alpha-0.7_at_20"
    again = json.loads((folder / "run.json").read_text())
    assert again["methods"][0]["value_tables"] == run["methods"][1]["value_tables"]
    then, now = ([r["mean"] for r in table if r["metric"] == "error" and r["label"] == by_layer]
                 for table in (before, rows(folder)))
    assert now == then
    table.write_text('{"0": 0.9, "2": 0.6}')
    assert_refused(kvreplay("explain", out, "-m", by_layer), 2, "20-layer-alpha.json")


def test_long_methods_have_short_folders(trace, tmp_path):
    rest = ",scope=kv_head,group=mean,interval=1,evict=before_attention,decode=evict,pool=all+kivi:bits=4,residual=32+"
    methods = ["h2o:window=10,sink=2" + rest + "moments", "h2o:window=10,sink=2" + rest + "gaussian"]
    good_run(trace, tmp_path / "out", "-m", methods[0], "-m", methods[1], "-b", "20")
    folder = replayed(tmp_path / "out", "-m", methods[0], "--against", methods[1])
    assert len(folder.name) < 220
    one, other = folder.name.removesuffix("_at_20").split("_vs_")
    assert one[:80] == other[:80] and one != other


def test_principal_planes_of_an_explanation(results, tmp_path):
    pytest.importorskip("matplotlib")
    folder = replayed(results, "-m", "momentkv", "-b", "20")
    done = kvreplay("figure", "pca", folder, "--out", tmp_path / "pca.svg",
                    env={**os.environ, "KVREPLAY_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pca.svg").exists()


def test_stopped_in_the_middle_leaves_what_was_there(tmp_path):
    mine = make(tmp_path / "a.h5", n_tokens=3000, n_heads=4, n_kv_heads=2, layers=(0, 1, 2))
    good_run(mine, tmp_path / "out", "-m", "h2o", "-b", "512", "-c", "none", "--metrics", "error", "--max-steps", "8")
    folder = replayed(tmp_path / "out", "-m", "h2o")
    whole = {name: (folder / name).read_bytes() for name in final_files(folder)}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    run["traces"][0]["n_tokens"] = 3000  # now there is enough to do
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    with subprocess.Popen([KVREPLAY, "explain", tmp_path / "out", "-m", "h2o", "-j", "1"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        draft = folder.parent / f"{folder.name}.part"
        end = time.monotonic() + 60
        while not draft.exists() and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.endswith("stopped before the end; nothing is written\n")
    assert {name: (folder / name).read_bytes() for name in final_files(folder)} == whole
    assert list(folder.parent.iterdir()) == [folder]
