"""The module `kvreplay`: arrays as h5py reads them, results as the command writes them, selectors as the built-in ones.

What a selector decides reaches the numbers only through the tokens that it lets go. A Python selector with the same
evictions as a built-in one therefore has the same numbers bit for bit, and that is what is compared.
"""

import ast
import csv
import inspect
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest

import kvreplay

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "traces" / "samples" / "stories260k-512.h5"  # 8 query heads, 4 KV heads, 64 + 448 tokens, f16
COMMAND = os.environ.get("KVREPLAY_BINARY", str(ROOT / "build" / "release" / "sim" / "kvreplay"))
QUICK = {"layers": 2, "max_steps": 96, "compensators": "none", "metrics": "error"}


class HeavyHitters:
    """H2O as the built-in one: attention since birth, summed in double, and a recent window"""

    def __init__(self, shape, window):
        self.window = window
        self.mass = np.zeros(shape.n_tokens)

    def prefill(self, view):
        self.mass[: view.prompt_len] = view.column_mass().mean(axis=0)

    def step(self, view):
        self.mass[view.pos] += view.attention()

    def score(self, view):
        scores = self.mass[view.pos]
        scores[view.pos > view.now - min(self.window, view.budget)] = np.inf
        return scores


class Batched(HeavyHitters):
    """the same, many steps in one call"""

    calls = []

    def steps(self, attention, pos, now):
        assert attention.shape == (len(now), len(pos)) and attention.dtype == np.float32
        assert np.all(np.diff(now) == 1) and now[-1] == pos[-1]
        for row, at in zip(attention, now):
            assert np.all(row[pos > at] == 0) and np.all(row[pos <= at] >= 0)
            self.mass[pos] += row
        self.calls.append(len(now))

    def step(self, view):
        raise AssertionError("steps() takes the place of step()")


HEAVY = {"params": {"window": "50%"}, "prompt_queries": "all"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    kvreplay.register("heavy", HeavyHitters, **HEAVY)
    kvreplay.register("heavy_batched", Batched, **HEAVY)


def one(method, budgets=24, trace=SAMPLE, **more):
    """The only cell of a quick run."""
    results = kvreplay.run(trace, method, budgets, **{**QUICK, **more})
    assert len(results) == 1
    return results[0]


def same(a, b):
    assert np.array_equal(a.evicted_at, b.evicted_at)
    assert a.metrics == b.metrics
    for metric in a.metrics:
        np.testing.assert_array_equal(a.series(metric), b.series(metric), err_msg=metric)


def selector(name="probe", **register):
    """Registers a class that keeps the latest tokens; the test adds methods to it."""
    class Latest:
        def __init__(self, shape, **params):
            self.shape, self.params = shape, params

        def score(self, view):
            return view.pos

    kvreplay.register(name, Latest, **register)
    return Latest


# --- traces ----------------------------------------------------------------------------------------------------------

def test_arrays_are_what_h5py_reads():
    trace = kvreplay.open(SAMPLE)
    with h5py.File(SAMPLE) as file:
        assert trace.n_tokens == file["n_valid"][()] == len(trace.token_ids)
        assert trace.layers == sorted(int(name) for name in file["layers"])
        assert (trace.n_heads, trace.n_kv_heads, trace.group_size) == (8, 4, 2)
        assert trace.attention_scale == file["model"].attrs["attention_scale"] and trace.dtype == "f16"
        np.testing.assert_array_equal(trace.token_ids, file["tokens/id"][:])
        np.testing.assert_array_equal(trace.positions, file["tokens/position"][:])
        np.testing.assert_array_equal(trace.phase, file["tokens/phase"][:])
        assert trace.prompt_len == np.count_nonzero(trace.phase == 0)
        np.testing.assert_array_equal(trace.rope["inv_freq"], file["model/rope"].attrs["inv_freq"])
        for layer in (0, 4):
            group = file[f"layers/{layer:03}"]
            for name in ("q", "k", "v", "out", "w_o"):
                array = getattr(trace, name)(layer)
                assert array.dtype == np.float32
                np.testing.assert_array_equal(array, group[name][:].astype(np.float32), err_msg=name)
            np.testing.assert_array_equal(trace.out_index(layer), group["out_index"][:])
            np.testing.assert_array_equal(trace.q_index(layer), np.arange(trace.n_tokens))
    assert "stories260k-512" in repr(trace) and os.fspath(trace) == str(SAMPLE)


def test_a_wrong_trace_says_what_is_wrong(tmp_path):
    with pytest.raises(kvreplay.TraceError, match="nothing.h5"):
        kvreplay.open(tmp_path / "nothing.h5")
    (tmp_path / "text.h5").write_text("this is no trace")
    with pytest.raises(OSError, match="text.h5"):
        kvreplay.open(str(tmp_path / "text.h5"))
    with pytest.raises(kvreplay.TraceError, match="layer 7 is not in this trace; it has 0, 1, 2, 3, 4"):
        kvreplay.open(SAMPLE).k(7)


# --- runs ------------------------------------------------------------------------------------------------------------

def test_results_are_those_of_the_command(tmp_path):
    options = ["--layers", "1,2", "--max-steps", "96", "--threads", "2", "--detail", "steps,retained"]
    subprocess.run([COMMAND, "run", SAMPLE, "--method", "h2o,snapkv:obs_window=8+adakv+mean", "--budget", "16,50%",
                    *options, "--out", tmp_path / "out"], check=True, capture_output=True)
    results = kvreplay.run(SAMPLE, ["h2o", "snapkv:obs_window=8+adakv+mean"], [16, "50%"], layers=[1, 2], max_steps=96)
    assert len(results) == 8

    with h5py.File(tmp_path / "out" / "results.h5") as file:
        n_series = 0
        for i, cell in enumerate(results):
            assert file["cells/layer"][i] == cell.layer and file["cells/method"][i].decode() == cell.method
            assert file["cells/budget"][i].decode() == cell.budget
            assert file["cells/budget_tokens"][i] == cell.budget_tokens
            assert file["cells/compensators"][i].decode().split(",") == cell.compensators
            assert file["cells/compensator_acting"][i].decode() == (cell.acting or "")
            np.testing.assert_array_equal(cell.evicted_at, file[f"evicted_at/{i:06}"][:])
            for name, dataset in file[f"steps/{i:06}"].items():
                metric, _, compensator = name.partition(".")
                which = {"compensator": compensator} if compensator else {}
                np.testing.assert_array_equal(cell.series(metric, **which), dataset[:], err_msg=name)
                if "steps" in dataset.attrs:
                    np.testing.assert_array_equal(cell.steps(metric, **which), dataset.attrs["steps"])
                n_series += 1
        assert n_series > 8 * 30

    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        written = list(csv.DictReader(file))
    table = results.to_dict()
    assert list(table) == list(written[0]) and len(table["mean"]) == len(written)
    for name, column in table.items():
        for value, row in zip(column, written):
            if name in ("mean", "std", "p50", "p90", "p99", "max"):
                assert row[name] == ("" if np.isnan(value) else f"{value:.9g}"), (name, row)
            else:
                assert row[name] == ("" if value is None else str(value)), (name, row)


def test_arguments_may_be_one_or_many(tmp_path):
    by_text = kvreplay.run(str(SAMPLE), "h2o,snapkv", "16,32", **{**QUICK, "layers": "1-2"})
    by_list = kvreplay.run([kvreplay.open(SAMPLE)], ("h2o", "snapkv"), [16, 32], **{**QUICK, "layers": [1, 2]})
    assert len(by_text) == len(by_list) == 8
    for a, b in zip(by_text, by_list):
        same(a, b)
    without = kvreplay.run(SAMPLE, "full", **QUICK)
    assert without[0].budget == "" and without[0].mean("error") == 0
    third = one("h2o", 0.25)
    assert third.budget == "0.25" and third.budget_tokens == 16


def test_series_need_no_copy_and_outlive_the_results():
    results = kvreplay.run(SAMPLE, "h2o", 24, **{**QUICK, "compensators": "mean,moments", "metrics": "error,error_corrected"})
    error = results[0].series("error")
    assert error.shape == (8, 96) and error.dtype == np.float32 and not error.flags.writeable
    assert np.shares_memory(error, results[0].series("error"))
    assert results[0].mean("error") == pytest.approx(np.nanmean(error.astype(float)), rel=1e-12)
    with pytest.raises(kvreplay.ConfigError, match="more than one.*compensator='mean', compensator='moments'"):
        results[0].series("error_corrected")
    with pytest.raises(ValueError, match="'eror' was not measured; the nearest is 'error'"):
        results[0].series("eror")
    with pytest.raises(IndexError):
        results[1]
    before = error.copy()
    del results
    kvreplay.run(SAMPLE, "snapkv", 24, **QUICK)  # something else where the memory would have been
    np.testing.assert_array_equal(error, before)


@pytest.mark.parametrize("arguments, says", [
    (dict(methods="h20"), "the nearest is 'h2o'"),
    (dict(methods="h2o:windw=3"), "window"),
    (dict(methods="h2o", budgets=[]), "needs a budget"),
    (dict(methods="h2o", budgets="many"), "many"),
    (dict(methods="h2o", layers=9), "has no layer 9"),
    (dict(methods="h2o", layers="x"), "no list of numbers"),
    (dict(methods="h2o", metrics="eror"), "error"),
    (dict(methods="h2o", max_steps=0), "max_steps=0"),
    (dict(methods="h2o", layers=[]), "layers is empty"),
    (dict(methods="h2o", threads=-1), "threads=-1"),
    (dict(methods="h2o", threads=100000), "threads=100000 is outside of 0 to 1024"),
    (dict(methods="h2o", memory=-1), "memory=-1"),
    (dict(methods="h2o", memory=2**70), "is no number of bytes"),
    (dict(methods="h2o", memory="much"), "much"),
    (dict(methods="h2o", compensators="mood"), "no compensator is called 'mood'"),
    (dict(methods=[]), "no method"),
])
def test_bad_arguments_are_refused_with_a_sentence(arguments, says):
    with pytest.raises(kvreplay.ConfigError) as refused:
        kvreplay.run(SAMPLE, **{"budgets": 24, **QUICK, **arguments})
    assert says in str(refused.value) and isinstance(refused.value, ValueError)


def test_policies_are_what_the_command_prints():
    import json
    printed = subprocess.run([COMMAND, "policies", "h2o", "--json"], check=True, capture_output=True, text=True).stdout
    assert kvreplay.policies("h2o") == json.loads(printed)
    names = [part["name"] for part in kvreplay.policies()["parts"]]
    assert "h2o" in names and "heavy" in names
    mine = kvreplay.policies("heavy")
    assert mine["summary"].startswith("H2O as the built-in one") and mine["needs"]["prompt_queries"] == "all"
    assert [key["name"] for key in mine["keys"]] == ["window"] and mine["keys"][0]["default"] == "50%"
    with pytest.raises(kvreplay.ConfigError, match="nearest"):
        kvreplay.policies("heavi")


# --- selectors in Python ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("engine", ["", "interval=16", "scope=layer", "scope=query_head,group=sum",
                                    "evict=before_attention,interval=5"])
@pytest.mark.parametrize("python", ["heavy", "heavy_batched"])
def test_a_python_h2o_is_the_built_in_one(python, engine):
    colon = ":" if engine else ""
    same(one(f"{python}{colon}{engine}"), one(f"h2o{colon}{engine}"))


def test_a_python_h2o_with_other_parts_and_threads():
    same(one("heavy:window=4+adakv+moments", threads=2), one("h2o:window=4+adakv+moments"))
    same(one("snapkv:budget=32/heavy"), one("snapkv:budget=32/h2o"))
    same(one("heavy:decode=grow"), one("h2o:decode=grow"))


def test_batches_enter_python_once_between_evictions():
    Batched.calls.clear()
    one("heavy_batched:interval=16", 24, max_steps=96)
    assert Batched.calls == [16] * (4 * 6)  # 4 KV heads, 96 / 16 evictions
    Batched.calls.clear()
    one("heavy_batched:decode=grow", 24, max_steps=96)
    assert Batched.calls == [64] * 4  # nothing leaves: what was seen is handed over at most 64 steps at a time


def test_what_a_view_shows():
    trace, seen = kvreplay.open(SAMPLE), []
    k, v, q = (read(2) for read in (trace.k, trace.v, trace.q))
    probe = selector(prompt_queries=4)

    def prefill(self, view):
        assert view.at_prefill and view.n_slots == view.prompt_len == 64 and view.now == 63
        mass = view.column_mass()
        assert mass.shape == (2, 64) and np.allclose(mass.sum(axis=1), 4)
        assert np.allclose(view.column_mass(last=1).mean(axis=0), view.attention(), rtol=1e-4, atol=1e-7)
        with pytest.raises(kvreplay.ConfigError, match="last=5 is outside of 1 to the 4"):
            view.column_mass(last=5)
        assert view.queries(last=100).shape == (4, 2, 8)  # no more than declared

    def step(self, view):
        head = self.shape.kv_head
        np.testing.assert_array_equal(view.keys(), k[head, view.pos])
        np.testing.assert_array_equal(view.values(0, slots=[0, -1]), v[head, view.pos[[0, -1]]])
        assert view.keys(slots=np.flatnonzero(view.pos < 0)).shape == (0, 8)
        mine = q[2 * head: 2 * head + 2, [view.now - 1, view.now]].swapaxes(0, 1)
        np.testing.assert_allclose(view.queries(last=2), mine * np.float32(trace.attention_scale), rtol=1e-6)
        logits = view.keys().astype(float) @ view.queries(0)[-1].T.astype(float)
        heads = np.exp(logits) / np.exp(logits).sum(axis=0)
        np.testing.assert_allclose(view.head_attention(), heads.T, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(view.attention(), heads.mean(axis=1), rtol=1e-4, atol=1e-7)
        assert view.bias().tolist() == [0] * view.n_slots and view.rewritten.size == 0
        assert (view.budget, view.n_lanes, view.n_heads, view.head_dim, view.v_head_dim) == (24, 1, 2, 8, 8)
        for bad in ([view.n_slots], [-view.n_slots - 1]):
            with pytest.raises(IndexError, match="does not exist"):
                view.keys(slots=bad)
        for bad in ([0.5], np.ones(view.n_slots, bool), [[0]], "x"):
            with pytest.raises(TypeError, match="slot numbers"):
                view.keys(slots=bad)
        with pytest.raises(IndexError, match="lane 1"):
            view.values(1)
        with pytest.raises(RuntimeError, match="about the prompt"):
            view.column_mass()

    def evicted(self, view, slots):
        assert slots.tolist() == ([0] if not view.at_prefill else list(range(40)))
        seen.append(view.now)

    probe.prefill, probe.step, probe.evicted = prefill, step, evicted
    kvreplay.register("probe", probe, prompt_queries=4)  # again: the class has more methods now
    cell = one("probe", 24, max_steps=8)
    assert sorted(seen) == sorted(list(range(63, 72)) * 4)
    last_kept = np.flatnonzero(cell.evicted_at[0] == cell.n_steps)
    assert last_kept.tolist() == list(range(72 - 25, 72))  # the last step evicts for one that never comes


def test_prompt_queries_that_were_not_declared_are_not_shown():
    probe = selector()
    for ask in ("attention", "head_attention", "queries", "column_mass"):
        probe.prefill = lambda self, view, ask=ask: getattr(view, ask)()
        kvreplay.register("probe", probe)
        with pytest.raises(kvreplay.RunError, match="register the selector with prompt_queries"):
            one("probe")


def test_parameters_reach_the_class():
    seen = []
    probe = selector(params={"rate": 0.5, "n": 3, "on": True, "part": "25%", "kind": ("mean", "max")}, interval=4)
    score = probe.score
    probe.score = lambda self, view: (seen.append(dict(self.params)), score(self, view))[1]
    assert one("probe", 24, max_steps=8).method == "probe"
    assert seen[0] == {"rate": 0.5, "n": 3, "on": True, "part": 6, "kind": "mean"}
    cell = one("probe:kind=max,rate=0.25,n=-2,on=false,part=7,interval=1", 24, max_steps=8)
    assert seen[-1] == {"rate": 0.25, "n": -2, "on": False, "part": 7, "kind": "max"}
    assert cell.method == "probe:rate=0.25,n=-2,on=false,part=7,kind=max,interval=1"  # in the order of params
    with pytest.raises(kvreplay.ConfigError, match="mean or max"):
        one("probe:kind=least")
    with pytest.raises(kvreplay.ConfigError, match="no key 'rat'; the nearest is 'rate'"):
        one("probe:rat=1")


@pytest.mark.parametrize("name, more, says", [
    ("h2o", {}, "'h2o' is there already"),
    ("momentkv", {}, "'momentkv' is there already"),
    ("My Idea", {}, "is no name"),
    ("idea", {"params": {"Window": 1}}, "'Window' is no name"),
    ("idea", {"params": {"interval": 1}}, "every selector has"),
    ("idea", {"params": {"x": None}}, "has the default None"),
    ("idea", {"params": {"x": ()}}, "has the default ()"),
    ("idea", {"params": {"x": (1, 2)}}, "a choice that is no text"),
    ("idea", {"params": {f"x{i}": i for i in range(33)}}, "one too many"),
    ("idea", {"prompt_queries": -1}, "prompt_queries"),
    ("idea", {"prompt_queries": "some"}, "prompt_queries"),
    ("idea", {"scope": "token"}, "kv_head, layer or query_head"),
    ("idea", {"intervall": 4}, "the nearest is 'interval'"),
])
def test_what_cannot_be_registered_is_refused(name, more, says):
    with pytest.raises(kvreplay.ConfigError) as refused:
        kvreplay.register(name, HeavyHitters, **more)
    assert says in str(refused.value)
    assert "idea" not in [part["name"] for part in kvreplay.policies()["parts"]]


def test_a_class_without_score_is_refused():
    with pytest.raises(kvreplay.ConfigError, match="no method score"):
        kvreplay.register("idea", object)


def test_an_exception_fails_its_cells_alone():
    probe = selector()

    def score(self, view):
        if view.now == 70 and self.shape.kv_head == 3:
            raise ZeroDivisionError("nothing to divide by")
        return view.pos

    probe.score = score
    with pytest.raises(kvreplay.RunError) as failed:
        kvreplay.run(SAMPLE, ["probe", "h2o"], 24, **{**QUICK, "layers": [1, 2]})
    line = inspect.getsourcelines(score)[1] + 2
    assert re.search(rf"layer 1, probe at budget 24: ZeroDivisionError: nothing to divide by \(.*{__name__}.py:{line} in "
                     r"score\) \(and 1 more", str(failed.value))
    cause = failed.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    frame = cause.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    assert frame.tb_frame.f_code.co_name == "score" and frame.tb_frame.f_locals["view"] is not None
    results = failed.value.results
    assert [(cell.label, cell.layer) for cell in results] == [("h2o", 1), ("h2o", 2)] and len(results.failed) == 2
    same(results[1], one("h2o"))
    one("h2o")  # and the next run is as good as any


@pytest.mark.parametrize("method", ["__init__", "prefill", "step", "steps", "evicted"])
def test_an_exception_anywhere_is_reported(method):
    probe = selector()

    def fail(self, *arguments):
        raise KeyError(method)

    setattr(probe, method, fail)
    kvreplay.register("probe", probe)
    with pytest.raises(kvreplay.RunError, match=f"KeyError: '{method}'"):
        one("probe", threads=2)


@pytest.mark.parametrize("answer, says", [
    (lambda view: view.pos[1:], r"score returned shape \(63,\), expected an array of shape \(64,\)"),
    (lambda view: view.pos[:, None], r"score returned shape \(64, 1\), expected an array of shape \(64,\)"),
    (lambda view: 1.0, r"score returned shape \(\)"),
    (lambda view: None, "score returned|not a number"),
    (lambda view: "high", "score returned 'str'"),
    (lambda view: np.where(view.pos == 7, np.nan, 1), "the token at position 7 is not a number at position 63"),
])
def test_scores_that_are_none_are_refused(answer, says):
    selector().score = lambda self, view: answer(view)
    with pytest.raises(kvreplay.RunError, match=says):
        one("probe")


def test_a_view_is_lent_for_one_call():
    kept = []
    probe = selector()
    probe.score = lambda self, view: (kept.append((view, view.pos)), view.pos)[1]
    one("probe", max_steps=8)
    view, pos = kept[0]
    assert pos.tolist() == list(range(64))  # arrays are the caller's own
    for use in (lambda: view.pos, lambda: view.now, view.attention, view.keys, view.values, view.bias, view.queries,
                view.head_attention, view.column_mass):
        with pytest.raises(RuntimeError, match="lent for one call"):
            use()


def test_selectors_are_let_go():
    import gc
    alive = []

    class Counted:
        def __init__(self, shape):
            alive.append(1)

        def __del__(self):
            alive.pop()

        def score(self, view):
            return view.pos

    kvreplay.register("counted", Counted)
    before = sys.getrefcount(Counted)
    one("counted", threads=2)
    gc.collect()
    assert alive == [] and sys.getrefcount(Counted) <= before


def test_nothing_runs_inside_a_run():
    probe = selector()
    probe.step = lambda self, view: kvreplay.run(SAMPLE, "h2o", 24, **QUICK)
    kvreplay.register("probe", probe)
    with pytest.raises(kvreplay.RunError, match="a run is under way in this process"):
        one("probe")
    probe.step = lambda self, view: kvreplay.register("other", HeavyHitters)
    with pytest.raises(kvreplay.RunError, match="cannot be registered while a run is under way"):
        one("probe")


# --- stopping --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_run(threads):
    steps = []

    def progress(done, total, what):
        steps.append(done)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        kvreplay.run(SAMPLE, "h2o", 24, **{**QUICK, "max_steps": 448}, threads=threads, progress=progress)
    assert len(steps) == 1  # of 7 blocks
    one("h2o")


def test_ctrl_c_in_a_selector_ends_a_run():
    probe = selector()
    seen = []

    def score(self, view):
        seen.append(view.now)
        if view.now == 80:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # where it is raised
        return view.pos

    probe.score = score
    with pytest.raises(KeyboardInterrupt):
        one("probe", max_steps=448)
    assert max(seen) == 80 and seen.count(80) == 1  # nothing is asked any more


def test_an_exception_of_progress_ends_a_run_and_is_raised():
    def progress(done, total, what):
        assert (done, total, what) == (64, 2 * 96, "stories260k-512 layer 1")
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        kvreplay.run(SAMPLE, "h2o", 24, **{**QUICK, "layers": [1, 2]}, progress=progress)


def test_a_signal_from_outside_ends_a_process_as_python_does():
    script = textwrap.dedent(f"""
        import kvreplay
        print("running", flush=True)
        while True:
            kvreplay.run({str(SAMPLE)!r}, ["h2o", "snapkv"], [16, 32])
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout.readline() == "running\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and child.returncode == -signal.SIGINT


# --- the documents ---------------------------------------------------------------------------------------------------

def test_the_document_runs_as_printed(tmp_path):
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"<!-- test: [\w ]+ -->\n```python\n(.*?)^```", text, re.S | re.M)
    assert len(blocks) == 3
    check = """
for interval in (1, 16):
    two = kvreplay.run("traces/samples/stories260k-512.h5",
                       [f"heavy:interval={interval}", f"heavy_batched:interval={interval}"], 32, layers=2, max_steps=64)
    assert np.array_equal(two[0].evicted_at, two[1].evicted_at)
"""
    script = tmp_path / "document.py"
    script.write_text("\n".join([*blocks, check]))
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "heavy:window=8+moments" in done.stdout


def test_the_stub_names_what_the_module_has():
    stub = ast.parse((ROOT / "sim" / "python" / "kvreplay.pyi").read_text())
    names = {node.name: node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    public = {name for name in dir(kvreplay) if not name.startswith("_")}
    assert {name for name in names if not name.startswith("_")} == public
    for name in ("Trace", "View", "Shape", "Cell", "Results"):
        described = {node.name for node in names[name].body if isinstance(node, ast.FunctionDef)}
        there = {key for key in vars(getattr(kvreplay, name)) if not key.startswith("_")}
        assert {key for key in described if not key.startswith("_")} == there, name
    for name in public:
        assert getattr(kvreplay, name).__doc__, name
