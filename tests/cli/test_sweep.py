"""Sweeps: the numbers of a run, each measured once, whatever was killed, added, damaged or shared in between."""

import csv
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import time

import numpy as np
import pytest

from harness import KVREPLAY, ROOT, assert_refused, files_up_to, kvreplay, make, rows, run

SAMPLES = ROOT / "traces" / "samples"
PLAN = """
traces = ["*.h5"]
methods = ["streaming", "full"]
budgets = [8, "25%"]
seed = 3
[[method]]
text = "momentum"
[method.grid]
alpha = [0.9, 0.97]
[[method]]
text = "h2o:sink=1+adakv"
budgets = [8]
[method.zip]
window = [2, 4]
"h2o.group" = ["mean", "max"]
"""
N_CELLS = 2 * 2 * (2 + 1 + 4 + 2)  # two traces of two layers


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    make(folder / "a.h5", layers=(0, 1), n_heads=4, n_kv_heads=2)
    make(folder / "b.h5", layers=(0, 1), n_heads=4, n_kv_heads=2, seed=2)
    return folder


@pytest.fixture()
def plan(traces, tmp_path):
    """A folder with the two traces and the plan over them."""
    for trace in traces.iterdir():
        os.link(trace, tmp_path / trace.name)
    return write_plan(tmp_path, PLAN)


@pytest.fixture(scope="module")
def long_plan(tmp_path_factory):
    """Units enough, and slow enough, to be killed in between."""
    folder = tmp_path_factory.mktemp("long")
    for seed in (1, 2):
        assert kvreplay("synth", folder / f"t{seed}.h5", "--tokens", 500, "--prompt-len", 200, "--n-layers", 4, "--heads",
                        4, "--kv-heads", 2, "--head-dim", 32, "--seed", seed).returncode == 0
    return write_plan(folder, 'traces = ["t*.h5"]\nmethods = ["h2o", "tova", "streaming", "snapkv"]\nbudgets = [32, 64]\n')


@pytest.fixture(scope="module")
def long_table(long_plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    good_sweep(long_plan, out)
    return (out / "cells.csv").read_bytes()


def write_plan(folder, text, name="plan.toml"):
    path = folder / name
    path.write_text(text)
    return path


def sweep(plan, out, *arguments, **more):
    return kvreplay("sweep", plan, "--out", out, "--threads", 1, *arguments, **more)


def good_sweep(plan, out, *arguments, **more):
    done = sweep(plan, out, *arguments, **more)
    assert done.returncode == 0 and done.stderr == "", done
    return table(out) if (out / "cells.csv").exists() else None


def table(out, name="cells.csv"):
    with open(out / name, newline="") as f:
        return list(csv.DictReader(f))


def items(out, kind="cells"):
    return sorted((out / "items").glob(f"*.{kind}"))


def state(out):
    """What tells whether an item was touched."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in items(out)}


def keys(path):
    return json.loads(path.read_bytes().split(b"\n")[1])["keys"]


def status(out):
    done = kvreplay("status", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def counts(out):
    s = status(out)
    return s["done"], s["failed"], s["left"]


# --- numbers ---------------------------------------------------------------------------------------------------------

def pooled(summary):
    """{(layer, label, budget, column): (mean, n)} of a run, over the heads of a layer."""
    cells = {}
    for row in summary:
        column = row["metric"] + ("." + row["compensator"] if row["compensator"] else "")
        cells.setdefault((row["layer"], row["label"], row["budget"], column), []).append(row)
    out = {}
    for key, of_heads in cells.items():
        n = sum(row["n"] for row in of_heads)
        out[key] = (sum(row["n"] * row["mean"] for row in of_heads if row["n"]) / n if n else None, n)
    return out


@pytest.mark.parametrize("name", ["stories260k-512", "fineweb-gqa-1k"])
def test_the_numbers_of_a_run(tmp_path, name):
    plan = write_plan(tmp_path, f"""
traces = ["{SAMPLES / name}.h5"]
methods = ["h2o", "streaming", "full", "snapkv+clusters:entries=4"]
budgets = [32, "50%"]
layers = "0"
max_steps = 40
detail = "heads"
statistics = ["mean", "p90"]
""")
    cells = good_sweep(plan, tmp_path / "out")
    done = run(SAMPLES / f"{name}.h5", tmp_path / "run", "-m", "h2o,streaming,full,snapkv+clusters:entries=4", "-b", "32,50%",
               "--layers", "0", "--max-steps", 40)
    assert done.returncode == 0, done.stderr
    summary = rows(tmp_path / "run")
    expected = pooled(summary)
    assert len(cells) == 7
    n_compared = 0
    for (layer, label, budget, column), (mean, n) in expected.items():
        row, = (c for c in cells if (c["layer"], c["label"], c["budget"]) == (layer, label, budget))
        column = column.replace("clusters:entries=4", "own").replace("clusters", "own")
        assert int(row[column + ":n"]) == n, (label, column)
        if mean is None:
            assert row[column] == ""
        else:
            assert float(row[column]) == pytest.approx(mean, rel=1e-7, abs=1e-12), (label, column)
        n_compared += 1
    assert n_compared > 150
    # Of single heads the very same text.
    heads = {(r["kv_head"], r["q_head"], r["label"], r["budget"]): r for r in table(tmp_path / "out", "heads.csv")}
    with open(tmp_path / "run" / "summary.csv", newline="") as f:
        for row in csv.DictReader(f):
            column = row["metric"] + ("." + row["compensator"] if row["compensator"] else "")
            column = column.replace("clusters:entries=4", "own").replace("clusters", "own")
            if row["kv_head"]:
                of_head = heads[row["kv_head"], row["q_head"], row["label"], row["budget"]]
                assert (of_head[column], of_head[column + ":p90"], of_head[column + ":n"]) == (row["mean"], row["p90"], row["n"])


def test_table(plan, tmp_path):
    cells = good_sweep(plan, tmp_path / "out")
    assert len(cells) == N_CELLS
    assert [(c["trace"], c["layer"]) for c in cells] == [(t, layer) for t in "ab" for layer in "01" for _ in range(9)]
    of_layer = cells[:9]
    assert [c["label"] for c in of_layer] == [
        "streaming", "streaming", "full", "momentum:alpha=0.9", "momentum:alpha=0.9", "momentum:alpha=0.97",
        "momentum:alpha=0.97", "h2o:sink=1,window=2,group=mean+adakv", "h2o:sink=1,window=4,group=max+adakv"]
    assert [c["budget"] for c in of_layer] == ["8", "25%", "", "8", "25%", "8", "25%", "8", "8"]
    assert [c["param.alpha"] for c in of_layer] == ["", "", "", "0.9", "0.9", "0.97", "0.97", "", ""]
    assert [c["param.window"] for c in of_layer][-2:] == ["2", "4"]
    assert [c["param.h2o.group"] for c in of_layer][-2:] == ["mean", "max"]
    assert of_layer[2]["error"] == "0" and float(of_layer[0]["error"]) > 0
    assert not (tmp_path / "out" / "heads.csv").exists()
    resolved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert resolved["cells"] == {"done": N_CELLS, "failed": 0, "left": 0}
    assert [t["stem"] for t in resolved["plan"]["traces"]] == ["a", "b"]
    assert counts(tmp_path / "out") == (N_CELLS, 0, 0)


def test_the_same_bytes_for_any_threads_memory_and_order(plan, tmp_path):
    good_sweep(plan, tmp_path / "out", "--heads")
    files = ("cells.csv", "heads.csv")
    for name, arguments in (("threads", ("--threads", 3)), ("memory", ("--memory", "400KiB"))):
        done = kvreplay("sweep", plan, "--out", tmp_path / name, "--heads", *arguments)
        assert done.returncode == 0, done.stderr
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert len(items(tmp_path / "memory")) > len(items(tmp_path / "out"))


def test_heads_can_be_added_and_left_out_again(plan, tmp_path):
    out = tmp_path / "out"
    good_sweep(plan, out)
    before = (out / "cells.csv").read_bytes()
    good_sweep(plan, out, "--heads")
    assert (out / "cells.csv").read_bytes() == before
    assert len(table(out, "heads.csv")) == 6 * N_CELLS  # four query heads, two KV heads
    with_heads = state(out)
    good_sweep(plan, out)
    assert state(out) == with_heads and (out / "cells.csv").read_bytes() == before
    assert not (out / "heads.csv").exists()


def test_details_of_a_run(plan, tmp_path):
    plan.write_text(PLAN.replace("seed = 3", 'seed = 3\ndetail = ["steps", "retained"]'))
    out = tmp_path / "out"
    good_sweep(plan, out)
    assert {p.stem for p in items(out)} == {p.name for p in (out / "runs").iterdir()}
    for folder in (out / "runs").iterdir():
        assert sorted(p.name for p in folder.iterdir()) == ["results.h5", "run.json", "summary.csv"]


def test_tables_of_values_lie_beside_the_plan(plan, tmp_path):
    (tmp_path / "alpha.json").write_text('{"0": 0.9, "1": 0.97}')
    plan.write_text('traces = ["a.h5"]\nbudgets = [8]\nmethods = ["momentum:alpha=@alpha.json"]\n')
    good_sweep(plan, tmp_path / "out", cwd="/")
    first = state(tmp_path / "out")
    (tmp_path / "alpha.json").write_text('{"0": 0.8, "1": 0.97}')  # other numbers, so other cells
    good_sweep(plan, tmp_path / "out", cwd="/")
    assert len(state(tmp_path / "out")) == 2 * len(first)
    assert len(table(tmp_path / "out")) == 2


def test_tables_may_meet_in_the_layers_in_use_only(plan, tmp_path):
    (tmp_path / "surface.json").write_text('{"0": 0.9, "1": 0.9}')
    (tmp_path / "logic.json").write_text('{"1": 0.2, "2": 0.2}')
    text = 'traces = ["a.h5"]\nbudgets = [8]\nmethods = ["h2o+surface_logic:surface=@surface.json,logic=@logic.json"]\n'
    plan.write_text(text + "layers = [1]\n")
    good_sweep(plan, tmp_path / "out")
    assert [c["layer"] for c in table(tmp_path / "out")] == ["1"]


def test_allocators_that_measure_layers(plan, tmp_path):
    """What they measured is an item of its own, done once and before the cells that divide by it."""
    plan.write_text('traces = ["*.h5"]\nmethods = ["h2o+zigzag", "h2o"]\nbudgets = [12]\n')
    out = tmp_path / "out"
    cells = good_sweep(plan, out)
    for trace in "ab":
        assert run(tmp_path / f"{trace}.h5", tmp_path / trace, "-m", "h2o+zigzag", "-b", "12").returncode == 0
        expected = pooled(rows(tmp_path / trace))
        for cell in cells:
            if cell["trace"] == trace and cell["label"] == "h2o+zigzag":
                for column in ("error", "resident"):
                    mean, _ = expected[cell["layer"], "h2o+zigzag", "12", column]
                    assert float(cell[column]) == pytest.approx(mean, rel=1e-7)
    measured = {p.name: p.read_bytes() for p in items(out, "measured")}
    assert len(measured) == 4
    plan.write_text(plan.read_text().replace("[12]", "[12, 16]"))
    good_sweep(plan, out)
    assert {p.name: p.read_bytes() for p in items(out, "measured")} == measured
    for i in range(2):
        assert sweep(plan, tmp_path / f"s{i}", "--shard", f"{i}/2").returncode == 0
    assert kvreplay("merge", tmp_path / "s0", tmp_path / "s1", "--out", tmp_path / "all").returncode == 0
    assert (tmp_path / "all" / "cells.csv").read_bytes() == (out / "cells.csv").read_bytes()
    # Damaged numbers are measured again where a cell needs them, and never divided by.
    for item in items(out, "measured"):
        item.write_bytes(item.read_bytes()[:-3] + b"9\n]")
    for item in items(out):
        item.unlink()
    done = sweep(plan, out)
    assert done.returncode == 0 and done.stderr.count("damaged") == 4, done.stderr
    assert sorted(p.read_bytes() for p in items(out, "measured")) == sorted(measured.values())
    assert (tmp_path / "all" / "cells.csv").read_bytes() == (out / "cells.csv").read_bytes()


# --- once and for all -------------------------------------------------------------------------------------------------

def test_what_is_finished_is_not_done_again(plan, tmp_path):
    out = tmp_path / "out"
    good_sweep(plan, out)
    before, written = state(out), (out / "cells.csv").read_bytes()
    done = sweep(plan, out)
    assert done.returncode == 0 and f"({N_CELLS} were there before)" in done.stdout
    assert state(out) == before and (out / "cells.csv").read_bytes() == written


@pytest.mark.parametrize("old, new, n_new", [
    ("alpha = [0.9, 0.97]", "alpha = [0.9, 0.93, 0.97]", 2 * 2 * 2),   # two budgets, two traces of two layers
    ("budgets = [8, \"25%\"]", "budgets = [8, 12, \"25%\"]", 3 * 4),
    ("[\"streaming\", \"full\"]", "[\"streaming\", \"tova\", \"full\"]", 2 * 4),
])
def test_a_value_more_costs_its_own_cells_alone(plan, tmp_path, old, new, n_new):
    out = tmp_path / "out"
    good_sweep(plan, out)
    before, cells = state(out), table(out)
    assert old in PLAN
    plan.write_text(PLAN.replace(old, new))
    more = good_sweep(plan, out)
    after = state(out)
    assert all(after[name] == before[name] for name in before)
    old_keys = [k for name in before for k in keys(out / "items" / name)]
    new_keys = [k for name in set(after) - set(before) for k in keys(out / "items" / name)]
    assert len(new_keys) == n_new and not set(new_keys) & set(old_keys)
    assert len(more) == N_CELLS + n_new and [c for c in more if c in cells] == cells
    # The same as if it had been there from the start.
    good_sweep(plan, tmp_path / "fresh")
    assert (tmp_path / "fresh" / "cells.csv").read_bytes() == (out / "cells.csv").read_bytes()
    # And what the plan no longer names leaves the table, not the disk.
    plan.write_text(PLAN)
    assert good_sweep(plan, out) == cells and state(out) == after


@pytest.fixture()
def three_layers(tmp_path):
    """A trace of layers 0, 1 and 3 with named spans, and tables for them."""
    make(tmp_path / "plain.h5", layers=(0, 1, 3), n_heads=4, n_kv_heads=2)
    spans = kvreplay("repack", tmp_path / "plain.h5", tmp_path / "s.h5", "--profile", "working", "--span", "first=3:9",
                     "--span", "then=20:40")
    assert spans.returncode == 0, spans.stderr
    tables = {"scores": {"0": [0.1, 0.4], "1": [0.3, 0.2], "3": [0.8, 0.1]}, "alpha": {"0": 0.1, "1": 0.4, "3": 0.9},
              "beta": {"0": 2, "1": 4, "3": 2}, "atoms": {"0": 2, "1": 8, "3": 4}, "two": {"0": 2, "1": 3}}
    for name, values in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return lambda layers, methods, budgets: write_plan(tmp_path, (
        f'traces = ["s.h5"]\nlayers = {layers}\nmethods = {json.dumps(methods)}\nbudgets = {json.dumps(budgets)}\n'))


def test_a_layer_more(three_layers, tmp_path):
    """Redone is what divides the budget over the layers in use, and nothing else."""
    alone = ["h2o", "momentkv", "h2o+adakv", "h2o+adakv:alpha=@alpha.json", "h2o+fair", "h2o+whitelist:spans=first",
             "h2o+pyramid:window=2", "h2o+pyramid:window=2,beta=@beta.json", "snapkv:obs_window=4+adakv/tova",
             "h2o+atoms:atoms=@atoms.json", "h2o+adakv+atoms:atoms=@atoms.json"]
    over_layers = ["h2o+zigzag", "h2o+d2o_layers", "h2o+headkv:window=4,scores=@scores.json",
                   "h2o+surface_logic:surface=@scores.json", "snapkv:obs_window=4+zigzag/h2o"]
    budgets = [16, "4KiB"]
    out = tmp_path / "out"
    two = good_sweep(three_layers([0, 3], alone + over_layers, budgets), out)
    before = state(out)
    plan = three_layers([0, 1, 3], alone + over_layers, budgets)
    three = good_sweep(plan, out)
    after = state(out)
    assert all(after[name] == before[name] for name in before)
    redone = sum(len(keys(out / "items" / name)) for name in set(after) - set(before) if name.endswith(".cells"))
    assert redone == 2 * (len(alone) + 3 * len(over_layers))  # layer 1 of all, layers 0 and 3 of these
    good_sweep(plan, tmp_path / "fresh")
    assert (tmp_path / "fresh" / "cells.csv").read_bytes() == (out / "cells.csv").read_bytes()
    kept = [c for c in three if c in two]
    assert {c["label"] for c in kept} >= set(alone) and len(kept) < len(two)
    tokens = {c["layer"]: c["budget_tokens"] for c in three
              if c["label"] == "h2o+atoms:atoms=@atoms.json" and c["budget"] == "4KiB"}
    assert len(set(tokens.values())) == 3  # what each layer's atoms leave of the bytes


def test_a_layer_fails_alone(three_layers, tmp_path):
    """Its table has no row for layer 3; layer 3 gets less than the window."""
    methods = ["h2o", "h2o:sink=@two.json", "snapkv:obs_window=8+pyramid:window=2,beta=2"]
    for out, layers in ("grown", [0, 1]), ("grown", [0, 1, 3]), ("fresh", [0, 1, 3]):
        done = sweep(three_layers(layers, methods, [10]), tmp_path / out)
        assert done.returncode == (1 if 3 in layers else 0), done.stderr
    assert "no value for layer 3" in done.stderr and "obs_window=8 protects 8" in done.stderr
    assert counts(tmp_path / "fresh") == counts(tmp_path / "grown") == (7, 2, 0)
    assert (tmp_path / "fresh" / "cells.csv").read_bytes() == (tmp_path / "grown" / "cells.csv").read_bytes()
    assert [c["layer"] for c in table(tmp_path / "fresh")] == ["0", "0", "0", "1", "1", "1", "3"]


def test_a_trace_more(plan, tmp_path):
    out = tmp_path / "out"
    good_sweep(plan, out)
    before = state(out)
    make(tmp_path / "c.h5", layers=(0,), seed=5)
    cells = good_sweep(plan, out)
    assert len(cells) == N_CELLS + 9 and all(state(out)[name] == before[name] for name in before)
    (tmp_path / "a.h5").rename(tmp_path / "other.h5")  # another name is no other trace
    done = sweep(plan, out)
    assert f"({N_CELLS + 9} were there before)" in done.stdout
    assert {c["trace"] for c in table(out)} == {"b", "c", "other"}


def started(plan, out, *arguments):
    return subprocess.Popen([KVREPLAY, "sweep", plan, "--out", out, "--threads", "1", *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_items(out, process, n):
    deadline = time.monotonic() + 60
    while len(items(out)) < n and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_again_and_again(long_plan, long_table, tmp_path):
    out = tmp_path / "out"
    n_kills = 0
    for n in range(1, 8):
        process = started(long_plan, out)
        wait_for_items(out, process, n)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        n_kills += process.returncode == -signal.SIGKILL
        before = state(out)
    assert n_kills >= 3 and not (out / "cells.csv").exists()
    good_sweep(long_plan, out)
    assert (out / "cells.csv").read_bytes() == long_table
    assert all(state(out)[name] == before[name] for name in before)
    everything = [k for p in items(out) for k in keys(p)]
    assert len(everything) == len(set(everything)) == 64  # nothing was done twice
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(long_plan, long_table, tmp_path, sign):
    out = tmp_path / "out"
    process = started(long_plan, out)
    wait_for_items(out, process, 2)
    process.send_signal(sign)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command resumes" in stderr
    done, failed, left = counts(out)
    assert done >= 16 and failed == 0 and left == 64 - done and f"{done} cells in" in stdout
    before = state(out)
    good_sweep(long_plan, out)
    assert (out / "cells.csv").read_bytes() == long_table
    assert all(state(out)[name] == before[name] for name in before)


# --- shards -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3])
def test_shards_of_their_own(long_plan, long_table, tmp_path, n):
    folders = [tmp_path / f"shard{i}" for i in range(n)]
    total = 0
    for i, folder in enumerate(folders):
        done = sweep(long_plan, folder, "--shard", f"{i}/{n}")
        assert done.returncode == 0, done.stderr
        total += status(folder)["done"]
        assert (folder / "cells.csv").exists() == (n == 1)
    assert total == 64
    done = kvreplay("merge", *folders[::-1], "--out", tmp_path / "all")
    assert done.returncode == 0 and done.stderr == "", done
    assert (tmp_path / "all" / "cells.csv").read_bytes() == long_table
    assert counts(tmp_path / "all") == (64, 0, 0)
    done = sweep(long_plan, tmp_path / "all")  # a folder like any other
    assert done.returncode == 0 and "(64 were there before)" in done.stdout


def test_shards_at_once_in_one_folder(long_plan, long_table, tmp_path):
    out = tmp_path / "out"
    environment = dict(os.environ, SLURM_ARRAY_TASK_MIN="4", SLURM_ARRAY_TASK_COUNT="3")
    jobs = [subprocess.Popen([KVREPLAY, "sweep", long_plan, "--out", out, "--threads", "1"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=dict(environment, SLURM_ARRAY_TASK_ID=str(4 + i)))
            for i in range(3)]
    for i, job in enumerate(jobs):
        stdout, stderr = job.communicate(timeout=120)
        assert job.returncode == 0, stderr
        assert f"of shard {i}/3" in stdout
    everything = [k for p in items(out) for k in keys(p)]
    assert len(everything) == len(set(everything)) == 64
    assert kvreplay("merge", out, "--out", out).returncode == 0
    assert (out / "cells.csv").read_bytes() == long_table


def test_an_incomplete_merge_says_so(long_plan, tmp_path):
    assert sweep(long_plan, tmp_path / "a", "--shard", "0/2").returncode == 0
    done = kvreplay("merge", tmp_path / "a", "--out", tmp_path / "all")
    assert done.returncode == 1
    n, _, left = counts(tmp_path / "all")
    assert 0 < n < 64 and len(table(tmp_path / "all")) == n and f"{left} are left" in done.stderr


@pytest.mark.parametrize("text", ["2/2", "x", "1", ""])
def test_no_shard(plan, tmp_path, text):
    assert_refused(sweep(plan, tmp_path / "out", "--shard", text), 2, "--shard", text)


def test_slurm_script(plan, tmp_path):
    """With an sbatch that runs tasks one after the other."""
    good_sweep(plan, tmp_path / "whole")
    out, bin_ = tmp_path / "the out'put", tmp_path / "bin"
    done = sweep(plan, out, "--emit-slurm=3")
    assert done.returncode == 0 and not out.exists()
    script = tmp_path / "sweep.sbatch"
    script.write_text(done.stdout)
    assert "#SBATCH --array=0-2" in done.stdout
    bin_.mkdir()
    sbatch = bin_ / "sbatch"
    sbatch.write_text(f"""#!/usr/bin/env python3
import os, subprocess, sys
options = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
if "wrap" in options:
    assert options["dependency"] == "afterany:17", options
    sys.exit(subprocess.run(options["wrap"], shell=True).returncode)
for i in range(3):
    subprocess.run(["bash", sys.argv[-1]], check=True, stdout=2,
                   env=dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_COUNT="3"))
print("17;cluster")
""")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(["bash", script], capture_output=True, text=True,
                          env=dict(os.environ, PATH=f"{bin_}:{os.environ['PATH']}"))
    assert done.returncode == 0, done.stderr
    assert (out / "cells.csv").read_bytes() == (tmp_path / "whole" / "cells.csv").read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("old, new, words", [
    ("seed = 3", "sed = 3", ("'sed' is no key", "nearest is 'seed'")),
    ("momentum", "momentun", ("momentun", "momentum")),
    ("alpha = [0.9, 0.97]", "alpa = [0.9]", ("'alpa'", "nearest is 'alpha'")),
    ("alpha = [0.9, 0.97]", "alpha = [0.9, 1.7]", ("alpha=1.7",)),
    ("budgets = [8, \"25%\"]", "budgets = [8, \"25%%\"]", ("25%%",)),
    ("budgets = [8, \"25%\"]", "budgets = [8, 8]", ("8", "twice")),
    ("budgets = [8, \"25%\"]", "", ("streaming needs a budget",)),
    ("*.h5", "*.hdf5", ("*.hdf5",)),
    ("seed = 3", "compensators = [\"men\"]", ("men", "mean")),
    ("seed = 3", "layers = \"7\"", ("layer 7",)),
    ("seed = 3", "seed = ", ("line",)),
])
def test_a_wrong_plan(plan, tmp_path, old, new, words):
    assert old in PLAN
    plan.write_text(PLAN.replace(old, new))
    for more in ((), ("--dry-run",), ("--emit-slurm",)):
        assert_refused(sweep(plan, tmp_path / "out", *more), 2, "plan.toml", *words)
        assert not (tmp_path / "out").exists()


def test_wrong_folders(plan, tmp_path):
    assert_refused(sweep(tmp_path / "none.toml", tmp_path / "out"), 2, "none.toml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert_refused(sweep(plan, tmp_path / "full"), 2, "full", "something else")
    (tmp_path / "file").write_text("x")
    assert_refused(sweep(plan, tmp_path / "file"), 2, "file")
    assert_refused(kvreplay("status", tmp_path / "full"), 2, "full", "sweep.json")
    assert_refused(kvreplay("merge", tmp_path / "full", "--out", tmp_path / "out"), 2, "full", "sweep.json")
    assert_refused(kvreplay("merge", tmp_path / "full", "--out", ""), 2, "--out", "empty")
    assert_refused(sweep(tmp_path / "full", tmp_path / "out"), 2, "full", "is a folder")
    assert not (tmp_path / "out").exists()


def test_names_of_any_kind(plan, tmp_path):
    """The plan's own folder is no pattern; where the sweep is started from is no part of a cell."""
    folder = tmp_path / "a [b]*?\\, c"
    folder.mkdir()
    for trace in ("a.h5", "b.h5"):
        os.link(tmp_path / trace, folder / trace)
    write_plan(folder, plan.read_text())
    good_sweep(folder / "plan.toml", tmp_path / "out")
    before = state(tmp_path / "out")
    assert kvreplay("sweep", "plan.toml", "--out", tmp_path / "out", cwd=folder).returncode == 0
    assert state(tmp_path / "out") == before
    os.link(tmp_path / "a.h5", os.fsencode(folder) + b"/\xfc.h5")
    assert_refused(sweep(folder / "plan.toml", tmp_path / "latin", errors="replace"), 2, "UTF-8")


def test_two_traces_of_one_name(plan, tmp_path):
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.h5", tmp_path / "sub" / "a.h5")
    plan.write_text(PLAN.replace('"*.h5"', '"*.h5", "sub/*.h5"'))
    assert_refused(sweep(plan, tmp_path / "out"), 2, "both called 'a'")


def test_mixed_plans_and_schemas(plan, tmp_path):
    good_sweep(plan, tmp_path / "one")
    other = write_plan(tmp_path, PLAN.replace("0.97", "0.98"), "other.toml")
    good_sweep(other, tmp_path / "two")
    done = kvreplay("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "all")
    assert_refused(done, 2, "one", "two", "different plans", "methods")
    done = kvreplay("merge", tmp_path / "one", "--out", tmp_path / "two")
    assert_refused(done, 2, "one", "two", "different plans", "methods")
    path = tmp_path / "two" / "sweep.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    for command in (("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "all"), ("status", tmp_path / "two"),
                    ("sweep", plan, "--out", tmp_path / "two")):
        assert_refused(kvreplay(*command), 2, "two", "schema 99")
    path.write_text("{")
    assert_refused(kvreplay("status", tmp_path / "two"), 2, "damaged")
    assert not (tmp_path / "all").exists()


# --- what fails -------------------------------------------------------------------------------------------------------

def test_cells_that_fail_are_told_and_the_rest_goes_on(plan, tmp_path):
    out = tmp_path / "out"
    good_sweep(plan, tmp_path / "without")
    plan.write_text(PLAN.replace('"full"]', '"full", "h2o:window=12", "given:scores=mine"]'))
    for n_before in (0, N_CELLS + 4):
        done = sweep(plan, out)
        assert done.returncode == 1, done
        said = done.stderr.splitlines()
        assert len(said) == 1 + 4 and all(line.startswith("kvreplay: ") for line in said)
        assert any("window=12" in line and "budget of 8" in line and "3 more cells" in line for line in said), said
        assert any("scores 'mine'" in line for line in said), said
        assert f"({n_before} were there before)" in done.stdout
        assert counts(out) == (N_CELLS + 4, 12, 0)  # 12 tokens of window fit into a quarter of the prompt
        assert len(items(out, "failed")) == 4  # one for each layer, however often it was tried
    why = status(out)["failures"]
    assert sum(f["cells"] for f in why) == 12 and any("budget of 8" in f["why"] for f in why)
    said = kvreplay("status", out).stdout
    assert f"{N_CELLS + 4} of {N_CELLS + 16} cells done, 12 failed, 0 left" in said and "scores 'mine'" in said
    plan.write_text(PLAN)
    good_sweep(plan, out)
    assert (out / "cells.csv").read_bytes() == (tmp_path / "without" / "cells.csv").read_bytes()


def test_a_trace_that_is_none(plan, tmp_path):
    good_sweep(plan, tmp_path / "without")
    (tmp_path / "zz.h5").write_text("hello")
    done = sweep(plan, tmp_path / "out")
    assert done.returncode == 3 and "zz.h5" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "out" / "cells.csv").read_bytes() == (tmp_path / "without" / "cells.csv").read_bytes()
    assert status(tmp_path / "out")["failed_traces"][0]["path"].endswith("zz.h5")


def test_a_layer_that_cannot_be_read(plan, tmp_path):
    import h5py
    os.unlink(tmp_path / "b.h5")
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "r+") as f:
        f["layers/001/k"][0, 5, 3] = np.nan
        f.attrs["content_hash"] = "sha256:another"
    done = sweep(plan, tmp_path / "out")
    assert done.returncode == 3 and "layers/001/k" in done.stderr and "8 more cells" in done.stderr
    assert counts(tmp_path / "out") == (N_CELLS - 9, 9, 0)


def test_a_trace_that_changes_meanwhile(long_plan, long_table, tmp_path):
    for path in long_plan.parent.iterdir():
        shutil.copy(path, tmp_path / path.name)
    plan, out = tmp_path / long_plan.name, tmp_path / "out"
    process = started(plan, out)
    wait_for_items(out, process, 1)
    shutil.copy(tmp_path / "t1.h5", tmp_path / "t2.h5.new")
    os.rename(tmp_path / "t2.h5.new", tmp_path / "t2.h5")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3 and "t2.h5 has changed" in stderr, stderr
    done, failed, left = counts(out)
    assert failed >= 8 and done + failed == 64 and left == 0
    shutil.copy(long_plan.parent / "t2.h5", tmp_path / "t2.h5")
    good_sweep(plan, out)
    assert (out / "cells.csv").read_bytes() == long_table


@pytest.mark.parametrize("at", [5, 300, -3])  # the first line, the head, the body
def test_a_damaged_item_is_named_and_done_again(plan, tmp_path, at):
    out = tmp_path / "out"
    good_sweep(plan, out)
    written = (out / "cells.csv").read_bytes()
    bad = items(out)[1]
    raw = bytearray(bad.read_bytes())
    raw[at] ^= 1
    bad.write_bytes(raw)
    done = sweep(plan, out)
    assert done.returncode == 0 and bad.name in done.stderr and "ignored" in done.stderr, done
    assert (out / "cells.csv").read_bytes() == written
    assert counts(out) == (N_CELLS, 0, 0)
    assert len(items(out)) >= 4


def test_foreign_files_are_left_alone(plan, tmp_path):
    out = tmp_path / "out"
    good_sweep(plan, out)
    (out / "items" / "notes.txt").write_text("mine")
    done = sweep(plan, out)
    assert done.returncode == 0 and "notes.txt" in done.stderr
    assert (out / "items" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("limit", [2000, 5000, 12000])
def test_full_disk(plan, tmp_path, limit):
    out = tmp_path / "out"
    good_sweep(plan, tmp_path / "whole")
    done = sweep(plan, out, **files_up_to(limit))
    assert done.returncode == 1 and done.stderr.startswith("kvreplay: ") and done.stderr.count("\n") == 1, done
    assert "too large" in done.stderr.lower()
    assert not list(out.rglob("*.part")) and not (out / "cells.csv").exists()
    good_sweep(plan, out)
    assert (out / "cells.csv").read_bytes() == (tmp_path / "whole" / "cells.csv").read_bytes()


def test_full_file_system(plan, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=56k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        done = sweep(plan, disk / "out", "--heads")
        assert done.returncode == 1 and "No space left" in done.stderr and done.stderr.count("\n") == 1, done
        assert not list(disk.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        good_sweep(plan, disk / "out", "--heads")
        good_sweep(plan, tmp_path / "whole", "--heads")
        assert (disk / "out" / "heads.csv").read_bytes() == (tmp_path / "whole" / "heads.csv").read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)


# --- estimates --------------------------------------------------------------------------------------------------------

def test_dry_run(plan, tmp_path):
    out = tmp_path / "out"
    done = sweep(plan, out, "--dry-run")
    assert done.returncode == 0 and done.stderr == "" and not out.exists(), done
    said = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert said["cells"].split()[1] == str(N_CELLS) and said["units"].split()[1] == "4"
    assert {"memory", "disk", "time", "sample"} <= set(said)
    good_sweep(plan, out)
    said = sweep(plan, out, "--dry-run").stdout
    assert f"0 to measure ({N_CELLS} are done)" in said and "time" not in said


def test_the_example_of_the_document(tmp_path):
    example = ROOT / "docs" / "sweep_example.toml"
    shown = (ROOT / "docs" / "sweep.md").read_text().split("```toml\n")[1].split("```")[0]
    assert shown.strip() == example.read_text().split("\n", 1)[1].strip()
    done = sweep(example, tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and done.stderr == "", done
