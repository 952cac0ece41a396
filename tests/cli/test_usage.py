"""What the command line refuses: one sentence on stderr, exit 2, and nothing is made."""

import hashlib
import os
import shutil
import subprocess

import pytest

from harness import KVREPLAY, assert_refused, final_files, good_run, kvreplay, make, pick, run


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return make(tmp_path_factory.mktemp("usage") / "a.h5", layers=(0, 1))


H2O = ("-m", "h2o", "-b", "32")


@pytest.mark.parametrize("arguments, words", [
    (("-m", "h20", "-b", "32"), ("'h20'", "'h2o'")),
    (("-m", "momentum:alpha=1.5", "-b", "32"), ("alpha=1.5", "0 to 1")),
    (("-m", "momentum:alhpa=0.5", "-b", "32"), ("'alhpa'", "'alpha'")),
    (("-m", "tova:pin_newest=yes", "-b", "32"), ("pin_newest=yes", "true or false")),
    (("-m", "h2o:scope=head", "-b", "32"), ("scope=head", "kv_head, layer or query_head")),
    (("-m", "h2o:interval=0", "-b", "32"), ("interval=0", "at least 1")),
    (("-m", "snapkv:kernel=4", "-b", "32"), ("kernel=4", "odd")),
    (("-m", "h2o:window=64", "-b", "32"), ("window=64", "32")),
    (("-m", "h2o:sink=4,window=30", "-b", "32"), ("window=30", "sink=4", "34", "32")),
    (("-m", "h2o:window=5,window=6", "-b", "32"), ("'window'", "twice")),
    (("-m", "mean", "-b", "32"), ("'mean'", "selector")),
    (("-m", "h2o+tova", "-b", "32"), ("'tova'", "'h2o'")),
    (("-m", "h2o+", "-b", "32"), ("h2o",)),
    (("-m", "", "-b", "32"), ("method is empty",)),
    (("-m", "h2o,h2o:sink=0", "-b", "32"), ("same method",)),
    (("-m", "tova+adakv", "-b", "32"), ("'adakv'", "scope")),
    (("-m", "h2o:pool=decode+adakv", "-b", "32"), ("'adakv'", "pool=all")),
    (("-m", "momentum+quest", "-b", "32"), ("'quest'", "pool=all")),
    (("-m", "h2o:pool=decode,decode=grow", "-b", "32"), ("decode=evict",)),
    (("-m", "full/momentum", "-b", "32"), ("'full'",)),
    (("-m", "h2o/tova/knorm", "-b", "32"), ("'/'",)),
    (("-m", "given", "-b", "32"), ("scores=NAME", "evicted_at=FILE")),
    (("-m", "given:scores=mine", "-b", "32"), ("'mine'",)),
    (("-m", "h2o"), ("budget",)),
    ((*H2O, "--layers", "7"), ("7", "0, 1")),
    ((*H2O, "--layers", "1-0"), ("1-0",)),
    ((*H2O, "--prompt-len", "96"), ("96", "no decode step")),
    ((*H2O, "--prompt-len", "-3"), ("--prompt-len", "at least 1")),
    ((*H2O, "--prompt-len", "0"), ("--prompt-len", "at least 1")),
    ((*H2O, "--seed", "-1"), ("--seed", "-1")),
    ((*H2O, "--metrics", "eror"), ("'eror'", "'error'")),
    ((*H2O, "-c", "momnts"), ("'momnts'", "'moments'")),
    ((*H2O, "-c", "mean,mean"), ("'mean'", "twice")),
    ((*H2O, "--detail", "foo"), ("'foo'", "steps, retained, outputs")),
    ((*H2O, "--detail", "outputs"), ("--steps",)),
    ((*H2O, "--steps", "3"), ("--detail outputs",)),
    ((*H2O, "--detail", "outputs", "--steps", "32"), ("32", "31")),
    ((*H2O, "--checkpoints", "0"), ("--checkpoints",)),
    ((*H2O, "--memory", "much"), ("'much'",)),
    ((*H2O, "--memory", "1KiB"), ("--memory",)),
    ((*H2O, "--frce"), ("--frce",)),
    ((*H2O, "--layers", "0", "--layers", "1"), ("--layers",)),
    (("-b", "32"), ("--method",)),
])
def test_refused_before_anything_is_made(trace, tmp_path, arguments, words):
    assert_refused(run(trace, tmp_path / "out", *arguments), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", ["0", "-1", "x", "100000"])
def test_threads(trace, tmp_path, threads):
    assert_refused(kvreplay("run", trace, *H2O, "--threads", threads, "--out", tmp_path / "out"), 2, "--threads")


@pytest.mark.parametrize("budget", ["0", "-1", "abc", "nan", "inf", "1e400", "1e10", "1.5", "101%", "0%", "1B", "12.5KB",
                                    "64 KiB", "0x10", "+5", "32,32"])
def test_budgets_that_are_none(trace, tmp_path, budget):
    assert_refused(run(trace, tmp_path / "out", "-m", "h2o", f"-b{budget}"), 2, "budget")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget, tokens", [("20", 20), ("25%", 16), ("0.25", 16), (".01", 1), ("100%", 64), ("1KiB", 16),
                                            ("127B", 1), ("1e1", 10)])
def test_budgets(trace, tmp_path, budget, tokens):
    table = good_run(trace, tmp_path / "out", "-m", "h2o", "-b", budget, "--metrics", "resident,attended")
    # Measured when the step attends: the new token is beside the budget.
    assert set(pick(table, "attended", "max")) == {tokens + 1}
    assert {row["budget"] for row in table} == {budget}


@pytest.mark.parametrize("budget", ["1000", "1e9", "64KiB"])
def test_budgets_that_hold_everything(trace, tmp_path, budget):
    table = good_run(trace, tmp_path / "out", "-m", "h2o", "-b", budget)
    assert set(pick(table, "error", "max")) == {0}


def test_out(trace, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert_refused(run(trace, file, *H2O), 2, file)
    assert_refused(run(trace, file / "below", *H2O), 2, file)
    assert file.read_text() == "mine"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert_refused(run(trace, full, *H2O), 2, full, "--force")
    assert final_files(full) == ["mine.txt"]
    good_run(trace, full, *H2O, "--force")
    assert final_files(full) == ["mine.txt", "results.h5", "run.json", "summary.csv"]


def test_out_that_cannot_be_written(trace, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert_refused(run(trace, closed, *H2O), 2, closed)
    assert_refused(run(trace, closed / "below", *H2O), 2, closed)


def test_equal_stems(trace, tmp_path):
    (tmp_path / "other").mkdir()
    twin = shutil.copy(trace, tmp_path / "other")
    assert_refused(run([trace, twin], tmp_path / "out", *H2O), 2, "'a'")


@pytest.mark.parametrize("arguments, words", [
    (("bogus",), ("bogus",)),
    ((), ("run",)),
    (("info",), ("traces",)),
    (("policies", "nope"), ("'nope'",)),
    (("policies", "--json", "--markdown"), ("--json", "--markdown")),
    (("repack", "nope.h5", "x.h5", "--profile", "fast"), ("'fast'", "working", "archive")),
])
def test_other_commands(arguments, words):
    assert_refused(kvreplay(*arguments), 2, *words)


def test_results_that_cannot_be_printed():
    with open("/dev/full", "w") as full:
        done = subprocess.run([KVREPLAY, "policies"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("kvreplay: ")


# --- values from files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, words", [
    ("[1", ("JSON object",)),
    ("{}", ("JSON object",)),
    ('{"a": 0.5}', ("'a'",)),
    ('{"0-3": 0.5, "1": 0.5}', ("0-3",)),
    ('{"0": "x", "1": 0.5}', ("layer 0", "number")),
    ('{"0": [], "1": 0.5}', ("layer 0",)),
    ('{"0": 1.5, "1": 0.5}', ("alpha=1.5", "0 to 1")),
    ('{"0": 0.5}', ("layer 1",)),
    ('{"0": [0.5, 0.6, 0.7], "1": 0.5}', ("layer 0",)),
])
def test_tables_that_are_none(trace, tmp_path, text, words):
    table = tmp_path / "alpha.json"
    table.write_text(text)
    done = run(trace, tmp_path / "out", "-m", f"momentum:scope=kv_head,alpha=@{table}", "-b", "8")
    assert_refused(done, 2, table, *words)
    assert not (tmp_path / "out").exists()


def test_tables_of_protected_tokens_must_fit_too(trace, tmp_path):
    table = tmp_path / "window.json"
    table.write_text('{"0": 4, "1": 9}')
    assert_refused(run(trace, tmp_path / "out", "-m", f"h2o:window=@{table}", "-b", "8"), 2, "9", "8")


def test_a_table_is_what_it_holds(trace, tmp_path):
    table = tmp_path / "alpha.json"
    table.write_text('{"0": 0.5, "1": [0.9]}')
    both = good_run(trace, tmp_path / "t", "-m", f"momentum:alpha=@{table}", "-b", "4", "--metrics", "error")
    for layer, alpha in ((0, 0.5), (1, 0.9)):
        one = good_run(trace, tmp_path / f"l{layer}", "-m", f"momentum:alpha={alpha}", "-b", "4", "--metrics", "error",
                       "--layers", layer)
        assert pick(one, "error") == pick(both, "error", layer=layer)


@pytest.mark.parametrize("method, extra", [("momentum:alpha=@{}", ()), ("h2o+gaussian:strength=@{}", ()),
                                           ("h2o+adakv:alpha=@{}", ()), ("h2o", ("-c", "gaussian:strength=@{}"))])
def test_the_hash_of_a_table_enters_the_results(trace, tmp_path, method, extra):
    table = tmp_path / "values.json"
    table.write_text('{"0": 0.5, "1": 0.9}')
    good_run(trace, tmp_path / "out", "-m", method.format(table), "-b", "8", *(e.format(table) for e in extra))
    assert hashlib.sha256(table.read_bytes()).hexdigest() in (tmp_path / "out" / "run.json").read_text()
