"""Traces that are damaged, wrong or change; disks that fill up; users who lose patience."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest

from harness import KVREPLAY, arrays, assert_refused, files_up_to, final_files, good_run, kvreplay, make, rows, run, write

H2O = ("-m", "h2o", "-b", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def trace(folder):
    return make(folder / "a.h5", layers=(0, 1))


@pytest.fixture(scope="module")
def long_trace(folder):
    """Long enough that a run can be caught in the middle."""
    path = folder / "long.h5"
    assert kvreplay("synth", path, "--tokens", 2500, "--prompt-len", 300, "--n-layers", 3, "--heads", 8, "--kv-heads", 2,
                    "--head-dim", 64).returncode == 0
    return path


def replace(name, data):
    def edit(f):
        del f[name]
        f[name] = data
    return edit


def attribute(name, value):
    owner, _, key = name.rpartition("@")
    return lambda f: f[owner or "/"].attrs.__setitem__(key, value)


def lacks(name):
    owner, _, key = name.rpartition("@")
    return (lambda f: f[owner or "/"].attrs.__delitem__(key)) if "@" in name else (lambda f: f.__delitem__(name))


def value(name, at, x):
    return lambda f: f[name].__setitem__(at, x)


@pytest.mark.parametrize("edit, words", [
    (lacks("/@format"), ("format",)),
    (attribute("/@format_version", "2.0"), ("format_version", "1.x", "2.0")),
    (lacks("n_valid"), ("n_valid",)),
    (replace("n_valid", np.uint64(0)), ("n_valid", "0")),
    (replace("n_valid", np.uint64(97)), ("n_valid", "96", "97")),
    (lacks("model"), ("model",)),
    (lacks("model@n_heads"), ("n_heads",)),
    (lacks("model@attention_scale"), ("attention_scale",)),
    (lacks("model@sliding_window"), ("sliding_window",)),
    (attribute("model@n_heads", "two"), ("n_heads", "integer")),
    (attribute("model@n_heads", 3), ("layers/000/q", "(3, 96, 8)", "(2, 96, 8)")),
    (attribute("model@n_kv_heads", 0), ("n_kv_heads", "0")),
    (attribute("model@head_dim", 10 ** 9), ("head_dim", "1000000000")),
    (attribute("model@attention_scale", np.nan), ("attention_scale", "nan")),
    (attribute("model@attention_scale", 0.0), ("attention_scale", "0")),
    (attribute("model@sliding_window", np.zeros(5, "i4")), ("sliding_window", "2", "5")),
    (attribute("model@atention_scale", 1.0), ("atention_scale",)),
    (attribute("model/rope@style", "diag"), ("style", "diag", "half")),
    (lacks("layers/000/k"), ("layers/000/k",)),
    (replace("layers/000/k", np.zeros((1, 95, 8), "f4")), ("layers/000/k", "(1, 96, 8)", "(1, 95, 8)")),
    (replace("layers/000/k", np.zeros((1, 0, 8), "f4")), ("layers/000/k", "(1, 0, 8)")),
    (replace("layers/001/v", np.zeros((1, 96), "f4")), ("layers/001/v", "(1, 96)")),
    (replace("layers/000/k", np.zeros((1, 96, 8), "f8")), ("layers/000/k", "float64")),
    (replace("layers/000/k", np.zeros((1, 96, 8), "i4")), ("layers/000/k", "int32")),
    (replace("layers/000/k", np.zeros((1, 96, 8), "f2")), ("layers/000", "f16", "f32")),
    (replace("tokens/id", np.zeros(96, "f4")), ("tokens/id", "float32")),
    (value("tokens/phase", 0, 1), ("tokens/phase",)),
    (value("tokens/phase", 70, 0), ("tokens/phase", "70")),
    (value("layers/000/k", (0, 5, 3), np.nan), ("layers/000/k", "nan", "5")),
    (value("layers/001/v", (0, 95, 7), np.inf), ("layers/001/v", "inf", "95")),
    (value("layers/000/q", (1, 90, 3), -np.inf), ("layers/000/q", "inf", "90")),
    (lambda f: f.__setitem__("layers/000/q_index", np.arange(96, dtype="i4")[::-1]), ("q_index", "ascending")),
    (lambda f: f.__setitem__("layers/000/w_o", np.zeros((3, 15), "f4")), ("w_o", "(3, 16)", "(3, 15)")),
    (lambda f: f.__setitem__("layers/000/w_0", np.zeros((3, 16), "f4")), ("w_0",)),
])
def test_traces_that_are_none(trace, tmp_path, edit, words):
    bad = shutil.copy(trace, tmp_path / "bad.h5")
    with h5py.File(bad, "r+") as f:
        edit(f)
    out = tmp_path / "out"
    assert_refused(run(bad, out, *H2O, "-m", "streaming"), 3, "bad.h5", *words)
    if "layers/001/v" in words and "inf" in words:  # only reading shows it, and layer 0 was finished by then
        assert json.loads((out / "run.json").read_text())["complete"] is False
    else:
        assert final_files(out) == []


def test_a_terminal_is_told_nothing_by_names(tmp_path):
    evil = "a\x1b[2J\rb"
    q, k, v = arrays()
    path = write(tmp_path / "t.h5", q, k, v, spans=[(evil, 0, 6)], model_name=evil)
    said = kvreplay("info", path).stdout
    assert "a?[2J?b" in said and "span" in said and "\x1b" not in said and "\r" not in said
    for done in (run(path, tmp_path / "out", "-m", "h2o+whitelist:spans=x", "-b", "16"),
                 run(tmp_path / f"{evil}.h5", tmp_path / "out", *H2O), kvreplay(f"{evil}\n")):
        assert done.returncode in (2, 3) and "a?[2J?b" in done.stderr
        assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and "\r" not in done.stderr


def test_files_that_are_no_traces(tmp_path):
    def refused(path, *words):
        for done in (run(path, tmp_path / "out", *H2O), kvreplay("info", path), kvreplay("verify", path),
                     kvreplay("repack", path, tmp_path / "r.h5", "--profile", "archive"),
                     kvreplay("recover", path, tmp_path / "r.h5")):
            assert_refused(done, 3, *words)
        assert not (tmp_path / "out").exists() and not (tmp_path / "r.h5").exists()
    refused(tmp_path / "none.h5", "none.h5", "does not exist")
    refused(tmp_path, "folder")
    (tmp_path / "empty.h5").write_bytes(b"")
    refused(tmp_path / "empty.h5", "empty.h5")
    (tmp_path / "text.h5").write_text("hello" * 1000)
    refused(tmp_path / "text.h5", "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["x"] = 1
    refused(tmp_path / "other.h5", "other.h5")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated(trace, tmp_path, share):
    whole = trace.read_bytes()
    bad = tmp_path / "bad.h5"
    bad.write_bytes(whole[:int(share * len(whole))])
    assert_refused(run(bad, tmp_path / "out", *H2O), 3, "bad.h5")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bits_are_noticed_or_harmless(trace, tmp_path, seed):
    """Never a crash, never a hang; half of the flips hit the file's metadata."""
    draw = random.Random(seed)
    whole = trace.read_bytes()
    bad = tmp_path / "bad.h5"
    for i in range(12):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 4, 32))):
            damaged[draw.randrange(6000 if i % 2 else len(whole))] ^= 1 << draw.randrange(8)
        bad.write_bytes(damaged)
        for done in (run(bad, tmp_path / "out", "-m", "streaming", "-b", "8", "--force", timeout=30),
                     kvreplay("verify", bad, timeout=30)):
            assert done.returncode in (0, 2, 3), (seed, i, done)
            if done.returncode:
                assert done.stderr.startswith("kvreplay: ") and done.stderr.count("\n") == 1, (seed, i, done.stderr)


@pytest.mark.parametrize("name, at", [("k", (0, 3, 5)), ("v", (0, 60, 1)), ("q", (1, 95, 7))])
def test_verify_names_what_was_changed(trace, tmp_path, name, at):
    bad = shutil.copy(trace, tmp_path / "bad.h5")
    with h5py.File(bad, "r+") as f:
        f[f"layers/001/{name}"][at] += 1
    done = kvreplay("verify", bad)
    assert done.returncode == 3
    assert "content_hash" in done.stderr and done.stderr.count("\n") == 1


def with_a_length_too_long(whole):
    """A trace whose text attributes of variable length, which HDF5 does not protect, point beyond their heap."""
    raw = bytearray(whole)
    at = raw.find(b"GCOL")
    assert at >= 0
    raw[at + 16 + 8 + 5] = 0x40  # the size of the first object, beyond any file
    return raw


def with_free_space_too_short(whole):
    """The same, where the space that is left in the heap does not reach to its end: HDF5 1.10 reads on and never stops."""
    raw = bytearray(whole)
    heap = raw.find(b"GCOL")
    assert heap >= 0
    at = heap + 16
    while int.from_bytes(raw[at:at + 2], "little") != 0:
        at += 16 + (int.from_bytes(raw[at + 8:at + 16], "little") + 7) // 8 * 8
    assert raw[at + 9] >= 4
    raw[at + 9] ^= 4
    return raw


@pytest.mark.parametrize("damage", [with_a_length_too_long, with_free_space_too_short])
def test_damaged_heap_of_texts(tmp_path, damage):
    path = make(tmp_path / "a.h5")
    with h5py.File(path, "r+") as f:
        f["model"].attrs["name"] = "a text of variable length"
    path.write_bytes(damage(path.read_bytes()))
    for done in (run(path, tmp_path / "out", *H2O, timeout=30), kvreplay("info", path, timeout=30)):
        assert_refused(done, 3, "a.h5")


def test_spans_of_any_name(tmp_path):
    names = ["a/b", "a|b", 'with "quotes", a comma', "two\nlines", "twice", "twice"]
    path = make(tmp_path / "a.h5", write_options={"spans": [(name, 2 * i, 2 * i + 3) for i, name in enumerate(names)]})
    done = run(path, tmp_path / "out", *H2O)
    if done.returncode == 0:
        assert {row["metric"] for row in rows(tmp_path / "out") if row["metric"].startswith("retention:")} \
            == {f"retention:{name}" for name in names}
    else:  # or the trace is refused, by name
        assert_refused(done, 3, "spans")


# --- needs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, ok", [("h2o", False), ("tova", False), ("snapkv", False), ("residual", False),
                                        ("momentum:pool=all", False), ("h2o/momentum", False), ("momentum", True),
                                        ("streaming", True), ("knorm", True), ("h2o:pool=decode", True), ("full", True),
                                        ("full+quest", True), ("oracle_mass", True)])
def test_queries_of_the_decode_alone(folder, tmp_path, method, ok):
    path = folder / "decode.h5"
    if not path.exists():
        kvreplay("synth", path, "--tokens", 200, "--prompt-len", 120, "--heads", 4, "--kv-heads", 2, "--head-dim", 16,
                 "--queries", "decode")
    if ok:
        good_run(path, tmp_path / "out", "-m", method, "-b", "64")
    else:
        assert_refused(run(path, tmp_path / "out", "-m", method, "-b", "64"), 2, method, "queries", "--queries all")
        assert not (tmp_path / "out").exists()
    # Which of the two lacks them: the method, or what is measured beside it.
    done = run(path, tmp_path / "more", "-m", method, "-b", "64", "-c", "clusters")
    if ok and method in ("streaming", "knorm"):
        assert_refused(done, 2, f"a compensator beside {method} needs the queries", "--queries all")
    elif not ok:
        assert_refused(done, 2, f"{method} needs the queries")


def test_no_queries_at_all(trace, tmp_path):
    bad = shutil.copy(trace, tmp_path / "bad.h5")
    with h5py.File(bad, "r+") as f:
        del f["layers/001/q"]
    assert_refused(run(bad, tmp_path / "out", "-m", "streaming", "-b", "8"), 2, "layer 1", "queries")
    good_run(bad, tmp_path / "out", "-m", "streaming", "-b", "8", "--layers", "0")


def test_no_decode_step(trace, tmp_path):
    bad = shutil.copy(trace, tmp_path / "bad.h5")
    with h5py.File(bad, "r+") as f:
        f["tokens/phase"][:] = 0
    assert_refused(run(bad, tmp_path / "out", *H2O), 2, "96", "no decode step")
    good_run(bad, tmp_path / "out", *H2O, "--prompt-len", "95")


def test_sliding_windows(trace, tmp_path):
    path = shutil.copy(trace, tmp_path / "w.h5")
    with h5py.File(path, "r+") as f:
        f["model"].attrs["sliding_window"] = np.array([32, 96], "i4")
    table = good_run(path, tmp_path / "out", *H2O)
    assert {row["layer"] for row in table} == {"1"}
    skipped = json.loads((tmp_path / "out" / "run.json").read_text())["traces"][0]["layers_skipped"]
    assert [s["layer"] for s in skipped] == [0] and "32" in skipped[0]["reason"]
    with h5py.File(path, "r+") as f:
        f["model"].attrs["sliding_window"] = np.array([32, 32], "i4")
    assert_refused(run(path, tmp_path / "none", *H2O), 2, "sliding window")


def test_soft_cap(tmp_path):
    path = make(tmp_path / "a.h5", write_options={"logit_softcap": 20.0})
    table = good_run(path, tmp_path / "default", *H2O)
    assert {row["compensator"] for row in table} == {""}
    good_run(path, tmp_path / "none", *H2O, "-c", "none")
    assert_refused(run(path, tmp_path / "c", *H2O, "-c", "moments"), 2, "soft-cap", "--compensators none")
    assert_refused(run(path, tmp_path / "m", "-m", "h2o+moments", "-b", "8"), 2, "soft-cap", "h2o+moments")
    good_run(path, tmp_path / "n", "-m", "h2o+none", "-b", "8")
    # beside a trace without one: compensators are measured on the other alone
    other = make(tmp_path / "b.h5")
    done = kvreplay("run", path, other, *H2O, "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    measured = {t["stem"]: t["compensators"] for t in json.loads((tmp_path / "both" / "run.json").read_text())["traces"]}
    assert measured["a"] == [] and len(measured["b"]) == 3
    corrected = {r["trace"] for r in rows(tmp_path / "both") if r["metric"] == "error_corrected"}
    assert corrected == {"b"}


# --- traces that change, users who stop, disks that are full ---------------------------------------------------------

def started(trace, out, *arguments):
    return subprocess.Popen([KVREPLAY, "run", trace, "-m", "h2o,tova,knorm,streaming", "-b", "64,128", "-j", "1", "--out", out,
                             *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when_begun(out, process):
    """Waits until the run has opened its results, and a little longer."""
    deadline = time.monotonic() + 30
    while not (out / "results.h5.part").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)


@pytest.mark.parametrize("change", [lambda p: os.utime(p), lambda p: os.truncate(p, 10000), lambda p: os.unlink(p)])
def test_changed_while_running(long_trace, tmp_path, change):
    path, out = shutil.copy(long_trace, tmp_path / "c.h5"), tmp_path / "out"
    process = started(path, out)
    when_begun(out, process)
    change(path)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    said = [line for line in stderr.splitlines() if "% done" not in line]  # a slow machine's run has shown progress
    assert stdout == "" and len(said) == 1 and said[0].startswith("kvreplay: ") and "c.h5" in said[0]
    assert not [name for name in final_files(out) if name.endswith(".part")]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(long_trace, tmp_path, which, times):
    out = tmp_path / "out"
    process = started(long_trace, out)
    when_begun(out, process)
    for _ in range(times):
        process.send_signal(which)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert final_files(out) == ["results.h5", "run.json", "summary.csv"]
    assert json.loads((out / "run.json").read_text())["complete"] is False
    table = rows(out)
    with h5py.File(out / "results.h5") as f:
        cells = set(zip(f["cells/layer"][:].astype(str), f["cells/label"].asstr()[:], f["cells/budget"].asstr()[:]))
    assert cells == {(row["layer"], row["label"], row["budget"]) for row in table}
    assert len(cells) < 3 * 8


def test_interrupted_before_the_first_step(long_trace, tmp_path):
    """The cut of the prompt can take long, too."""
    out = tmp_path / "out"
    process = subprocess.Popen([KVREPLAY, "run", long_trace, "-m", "oracle_greedy:horizon=2000", "-b", "16", "-j", "1",
                                "--prompt-len", "1500", "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    when_begun(out, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # whoever asks twice means it
    try:
        process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode in (130, -signal.SIGINT)


def assert_failed_cleanly(done, out):
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("kvreplay: ") and done.stderr.count("\n") == 1, done.stderr
    assert not [name for name in final_files(out) if name.endswith(".part")]
    assert not (out / "run.json").exists() and not (out / "results.h5").exists()


@pytest.mark.parametrize("limit", [0, 1100, 3000, 20000, 60000])  # LLVM's OpenMP needs 1 KiB of its own
def test_full_disk(trace, tmp_path, limit):
    out = tmp_path / "out"
    done = run(trace, out, "-m", "h2o,tova", "-b", "8,16", "--detail", "steps", **files_up_to(limit))
    assert_failed_cleanly(done, out)


@pytest.mark.parametrize("size", ["64k", "200k"])
def test_full_file_system(trace, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        done = run(trace, disk / "out", "-m", "h2o,tova,knorm,streaming", "-b", "8,16", "--detail", "steps,retained")
        assert_failed_cleanly(done, disk / "out")
        for command in (("repack", trace, disk / "r.h5", "--profile", "working"), ("synth", disk / "s.h5")):
            (disk / "ballast").write_bytes(bytes(40000))
            done = kvreplay(*command)
            if done.returncode == 0:
                assert command[0] == "repack"
                os.unlink(disk / "r.h5")
                continue
            assert done.returncode in (1, 3), done
            assert done.stderr.startswith("kvreplay: ") and done.stderr.count("\n") == 1, done.stderr
            assert [p.name for p in disk.glob("*.h5*")] == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_damage_in_a_later_layer_keeps_the_finished_ones(trace, tmp_path):
    """A run of hours is not thrown away for its last layer."""
    bad, out = shutil.copy(trace, tmp_path / "bad.h5"), tmp_path / "out"
    with h5py.File(bad, "r+") as f:
        f["layers/001/k"][0, 5, 3] = np.nan
    assert_refused(run(bad, out, *H2O), 3, "layers/001/k", "nan")
    if final_files(out):  # whole, and said to be incomplete
        assert final_files(out) == ["results.h5", "run.json", "summary.csv"]
        assert json.loads((out / "run.json").read_text())["complete"] is False
        assert {row["layer"] for row in rows(out)} == {"0"}
