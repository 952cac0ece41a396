"""Every method that the catalogue allows, on traces of every shape and on numbers at their worst."""

import itertools
import json
import re
import subprocess

import h5py
import numpy as np
import pytest

from harness import KVREPLAY, ROOT, arrays, assert_numbers, final_files, good_run, kvreplay, pick, write

N_TOKENS, PROMPT = 80, 48


def trace(path, edit=None, n_tokens=N_TOKENS, prompt_len=PROMPT, write_options=None, rope=True, n_heads=4, n_kv_heads=2,
          **shape):
    q, k, v = arrays(n_tokens=n_tokens, n_heads=n_heads, n_kv_heads=n_kv_heads, **shape)
    for layer in q:
        if edit:
            edit(q[layer], k[layer], v[layer])
    scores = {"mine": {layer: np.random.default_rng(0).random((n_kv_heads, n_tokens), np.float32) for layer in k}}
    options = {"spans": [("first", 0, min(3, n_tokens)), ("rest", min(3, n_tokens - 1), n_tokens)], **(write_options or {})}
    return write(path, q, k, v, prompt_len, rope, scores=scores, **options)


def catalogue():
    return json.loads(kvreplay("policies", "--json").stdout)


def whole_catalogue():
    """Every selector with every other part, and every two parts of other roles with a selector of each scope; presets."""
    parts, presets = catalogue()["parts"], catalogue()["presets"]
    # 'uniform' and 'none' say what happens anyway, and are the same method as without them.
    by_role = {role: [part["name"] for part in parts if part["role"] == role and part["name"] not in ("uniform", "none")]
               for role in ("select", "read", "allocate", "rewrite", "compensate")}
    starts = ["given:scores=mine" if name == "given" else name for name in by_role.pop("select")]
    methods = [*starts, *(f"{start}+{more}" for start in starts for names in by_role.values() for more in names)]
    for one, other in itertools.combinations(by_role.values(), 2):
        methods += ["+".join(pieces) for pieces in itertools.product(("h2o", "tova", "full"), one, other)]
    # Weights are one over the chances that the sampling selector had: no other selector has any.
    methods = [m for m in methods if "inverse_chance" not in m or m.startswith("sample")]
    canonical = set(starts)
    return methods, [preset["name"] for preset in presets if preset["method"] not in canonical]


def encodes(method):
    return any(part in method for part in ("kivi", "turboquant", "polarquant", "tada", "sals_store"))


def test_the_demo_ranks_every_part():
    """But what needs scores of the user's own, what is slow, and what stands for doing nothing."""
    demo = (ROOT / "scripts" / "demo").read_text()
    lists = re.search(r"^field=\(.*?\)$", demo, re.M | re.S).group(0)
    words = subprocess.run(["bash", "-c", f'{lists}; printf "%s\\n" "${{field[@]}}"'], capture_output=True, text=True,
                           check=True).stdout.split()
    compensators = re.search(r"--compensators (\S+) --threads.*field", demo).group(1).split(",")
    expansions = {preset["name"]: preset["expansion"] for preset in catalogue()["presets"]}
    used = set()
    for word in [*words, *compensators]:
        for piece in re.split(r"[+/]", word):
            name = piece.split(":")[0]
            used |= {p.split(":")[0] for p in re.split(r"[+/]", expansions.get(name, name))}
    missing = {part["name"] for part in catalogue()["parts"]} - used
    assert missing == {"given", "oracle_greedy", "uniform", "none"}


@pytest.fixture(scope="module")
def legal(tmp_path_factory):
    """Methods of the whole catalogue that are not refused by name. One refusal stops a run, hence the search by halves."""
    folder = tmp_path_factory.mktemp("catalogue")
    path = trace(folder / "t.h5")

    def accepted(methods):
        if not methods:
            return []
        done = kvreplay("run", path, *(f"--method={m}" for m in methods), "-b", "8", "--prompt-len", "1000", "--out",
                        folder / "out")
        assert done.returncode == 2, done
        if "no decode step" in done.stderr:
            return methods
        if len(methods) == 1:
            return []
        half = len(methods) // 2
        return accepted(methods[:half]) + accepted(methods[half:])

    methods, _ = whole_catalogue()
    found = accepted(methods)
    assert len(found) > 300
    return found


@pytest.mark.parametrize("budget", ["1", "2", "7", "1000"])
def test_every_method_at_every_budget(legal, tmp_path, budget):
    path = trace(tmp_path / "t.h5")
    table = good_run(path, tmp_path / "out", *(f"--method={m}" for m in legal), "-b", budget)
    assert_numbers(table)
    assert {row["label"] for row in table} == set(legal)
    if budget == "1000":
        for metric in ("error", "evicted_mass"):
            assert set(pick(table, metric, "max")) == {0}
        assert {row["max"] for row in table if row["metric"] == "error_output" and not encodes(row["label"])} == {0}


@pytest.mark.parametrize("budget", ["1", "20", "1000"])
def test_presets(tmp_path, budget):
    path = trace(tmp_path / "t.h5")
    for preset in catalogue()["presets"]:
        table = good_run(path, tmp_path / preset["name"], "-m", preset["name"], "-b", budget)
        assert_numbers(table)
        assert {row["method"] for row in table} == {preset["method"]}


MANY = ["random", "random:draw=once", "streaming", "h2o", "h2o:mass=mean", "h2o:scope=layer", "h2o:scope=query_head",
        "h2o:pool=decode", "h2o:interval=5", "h2o:evict=before_attention", "h2o:decode=grow", "h2o:group=max",
        "h2o:group=sum", "tova", "tova:pin_newest=true", "snapkv", "snapkv:decode=evict", "snapkv:obs_window=50%", "knorm",
        "keydiff", "momentum", "momentum:pool=all", "momentum:alpha=0", "momentum:alpha=1", "residual",
        "residual:obs_window=50%", "residual:window=0", "residual:ewma=0.9", "residual:chunk=4", "residual:rerank=0",
        "given:scores=mine", "oracle_mass", "oracle_greedy", "momentkv", "full", "full+quest", "full+topk",
        "full+topk:per=query_head", "h2o+moments", "h2o+gaussian:variance=full", "h2o+moments:state=raw_bf16", "h2o+adakv",
        "h2o+pyramid", "snapkv+adakv:safeguard=official", "streaming/momentum", "snapkv:budget=8/momentum:alpha=0.97",
        "h2o:budget=25%/momentum:scope=kv_head", "streaming+kivi:residual=4,group=4", "full+kivi:residual=4,group=4,bits=1"]

def scaled(name, factor):
    def edit(*arrays_of_layer):
        arrays_of_layer["qkv".index(name)][:] *= factor
    return edit


def constant(name, value):
    def edit(*arrays_of_layer):
        arrays_of_layer["qkv".index(name)][:] = value
    return edit


SHAPES = {
    "prompt of 1": dict(prompt_len=1),
    "prompt of 2": dict(prompt_len=2),
    "one decode step": dict(prompt_len=N_TOKENS - 1),
    "two tokens": dict(n_tokens=2, prompt_len=1),
    "more than a block": dict(n_tokens=200, prompt_len=70),
    "groups of 1": dict(n_heads=2),
    "groups of 3": dict(n_heads=6),
    "groups of 4": dict(n_heads=8),
    "groups of 8": dict(n_heads=8, n_kv_heads=1),
    "wide values": dict(head_dim=16, v_head_dim=24),
    "values of 1": dict(head_dim=16, v_head_dim=1),
    "odd widths": dict(head_dim=7, v_head_dim=5, rope=False),
    "width 1": dict(head_dim=1, v_head_dim=1, rope=False),
    "f16": dict(write_options={"dtype": "f16"}),
    "bf16": dict(write_options={"dtype": "bf16"}),
    "huge logits": dict(edit=scaled("k", 1e4)),
    "huge values": dict(edit=scaled("v", 1e15)),
    "tiny numbers": dict(edit=lambda *a: [x.__imul__(1e-30) for x in a]),
    "zero queries": dict(edit=constant("q", 0)),
    "zero keys": dict(edit=constant("k", 0)),
    "equal keys": dict(edit=constant("k", 1)),
    "zero values": dict(edit=constant("v", 0)),
    "equal values": dict(edit=constant("v", 1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_many_methods_on(tmp_path, name):
    path = trace(tmp_path / "t.h5", **SHAPES[name])
    table = good_run(path, tmp_path / "out", *(f"--method={m}" for m in MANY), "-b", "1,8")
    assert_numbers(table)
    n_tokens = SHAPES[name].get("n_tokens", N_TOKENS)
    assert all(0 <= x <= 1 for x in pick(table, "evicted_mass", "max") if x is not None)
    assert all(x <= n_tokens for x in pick(table, "attended", "max"))
    if name == "equal values":  # whatever leaves, the output stays
        assert max(pick(table, "error", "max")) < 1e-5


@pytest.mark.parametrize("method, peak", [("h2o", 9), ("h2o:evict=before_attention", 8), ("h2o:interval=5", 13),
                                          ("residual", 8), ("tova", 9), ("momentum", PROMPT + 9), ("streaming", 9),
                                          ("h2o:decode=grow", 8 + N_TOKENS - PROMPT)])
def test_tokens_attended(tmp_path, method, peak):
    table = good_run(trace(tmp_path / "t.h5"), tmp_path / "out", "-m", method, "-b", "8")
    assert set(pick(table, "attended", "max")) == {peak}


@pytest.mark.parametrize("method, kept, peak", [
    ("h2o/momentum", 8, 8 + 9),                                    # no budget of its own: the run's
    ("streaming/momentum:scope=kv_head", 8, 8 + 9),
    ("h2o:scope=query_head/momentum:scope=query_head", 8, 8 + 9),
    ("h2o:budget=12/momentum", 12, 12 + 9),
    ("snapkv:budget=25%,obs_window=4/momentum", 12, 12 + 9),       # of the prompt's 48 tokens
    ("knorm:budget=1KiB/streaming", 16, 16 + 9),                   # 64 bytes a token
    ("h2o:budget=1000/momentum", PROMPT, PROMPT + 9),
])
def test_one_selector_for_the_prompt_and_one_for_the_rest(tmp_path, method, kept, peak):
    path = trace(tmp_path / "t.h5")
    table = good_run(path, tmp_path / "out", "-m", method, "-b", "8", "--detail", "retained")
    with h5py.File(tmp_path / "out" / "results.h5") as f:
        at = f["evicted_at/000000"][:]
    assert {int((row[:PROMPT] != 0).sum()) for row in at} == {kept}
    assert set(at[:, :PROMPT].ravel()) <= {0, N_TOKENS - PROMPT}   # what the cut left stands
    assert set(pick(table, "attended", "max")) == {peak}


def test_allocators_keep_the_total(tmp_path):
    table = good_run(trace(tmp_path / "t.h5", layers=(0, 1, 2), n_heads=8, n_kv_heads=4), tmp_path / "out", "-m",
                     "h2o+adakv,h2o+pyramid:window=0,h2o", "-b", "12")
    def totals(label):
        return {layer: sum(pick(table, "resident", "p50", label=label, layer=layer)) for layer in range(3)}
    assert totals("h2o+adakv") == totals("h2o") == {0: 52, 1: 52, 2: 52}
    pyramid = totals("h2o+pyramid:window=0")
    assert pyramid[0] > pyramid[1] > pyramid[2]


def test_texts_that_are_no_utf8(tmp_path):
    path = trace(tmp_path / "t.h5", write_options={"model_name": "plain"})
    odd = str(tmp_path / "odd").encode() + b"\xff"
    done = subprocess.run([KVREPLAY, "run", str(path), "-m", "h2o", "-b", "8", "-j", "1", "--out", odd], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert final_files(odd.decode(errors="surrogateescape")) == ["results.h5", "run.json", "summary.csv"]
