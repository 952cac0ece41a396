"""Small traces out of random numbers, written by kvtrace.py, and the command under test.

The binary is $KVREPLAY_BINARY, else the release build.
"""

import csv
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "traces" / "python"))
import kvtrace  # noqa: E402

KVREPLAY = os.environ.get("KVREPLAY_BINARY", str(ROOT / "build" / "release" / "sim" / "kvreplay"))

COLUMNS = ("trace,layer,kv_head,q_head,method,label,budget,compensator,foresight,metric,n,n_skipped,mean,std,p50,p90,"
           "p99,max").split(",")


def arrays(n_tokens=96, n_heads=2, n_kv_heads=1, head_dim=8, v_head_dim=None, layers=(0,), sharp=1.0, seed=1):
    """{layer: q}, {layer: k}, {layer: v} of standard normal numbers; `sharp` scales the queries."""
    rng = np.random.default_rng(seed)
    v_head_dim = v_head_dim or head_dim
    q, k, v = {}, {}, {}
    for layer in layers:
        q[layer] = (sharp * rng.standard_normal((n_heads, n_tokens, head_dim))).astype(np.float32)
        k[layer] = rng.standard_normal((n_kv_heads, n_tokens, head_dim)).astype(np.float32)
        v[layer] = rng.standard_normal((n_kv_heads, n_tokens, v_head_dim)).astype(np.float32)
    return q, k, v


def write(path, q, k, v, prompt_len=64, rope=True, **more):
    """Writes a trace; what is not given is as plain as can be."""
    first = next(iter(k))
    n_tokens, head_dim = k[first].shape[1], k[first].shape[2]
    more.setdefault("dtype", "f32")
    more.setdefault("attention_scale", head_dim ** -0.5)
    if rope:
        more.setdefault("rope_theta", 1e4)
    kvtrace.write(str(path), q=q, k=k, v=v, token_ids=np.arange(n_tokens), prompt_len=prompt_len, **more)
    return path


def make(path, prompt_len=64, rope=True, write_options=None, **shape):
    q, k, v = arrays(**shape)
    return write(path, q, k, v, prompt_len, rope, **(write_options or {}))


def kvreplay(*arguments, timeout=120, **more):
    return subprocess.run([KVREPLAY, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **more)


def files_up_to(limit):
    """For kvreplay(): a command that can write so many bytes into a file, as on a disk that fills up."""
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # The thread sanitizer has a file of its own there, and dies if that one is cut.
    return {"preexec_fn": small_files, "env": {**os.environ, "TMPDIR": "/nowhere"}}


def run(trace, out, *arguments, threads=1, **more):
    traces = trace if isinstance(trace, (list, tuple)) else [trace]
    return kvreplay("run", *traces, "--threads", threads, "--out", out, *arguments, **more)


def good_run(trace, out, *arguments, **more):
    """A run that must succeed; returns the rows of summary.csv."""
    done = run(trace, out, *arguments, **more)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return rows(out)


def rows(out):
    with open(pathlib.Path(out) / "summary.csv", newline="") as f:
        reader = csv.DictReader(f)
        table = list(reader)
        assert reader.fieldnames == COLUMNS
    for row in table:
        assert None not in row and None not in row.values(), row
        for name in ("mean", "std", "p50", "p90", "p99", "max"):
            row[name] = float(row[name]) if row[name] else None
        row["n"], row["n_skipped"] = int(row["n"]), int(row["n_skipped"])
    return table


def pick(table, metric, field="mean", **where):
    """The field of the rows with this metric, e.g. pick(t, "error", method="h2o", compensator="")."""
    return [row[field] for row in table
            if row["metric"] == metric and all(row[name] == str(value) for name, value in where.items())]


def assert_numbers(table):
    """What counted is a finite number; what did not count is empty."""
    for row in table:
        for name in ("mean", "std", "p50", "p90", "p99", "max"):
            assert (row[name] is None) == (row["n"] == 0), row
            assert row[name] is None or np.isfinite(row[name]), row


def final_files(folder):
    """What lies in a folder under a name that claims to be whole."""
    folder = pathlib.Path(folder)
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def assert_refused(done, code, *words):
    """One sentence on stderr that starts with the program's name and says these words; nothing on stdout."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == "", done.stdout
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvreplay: "), done.stderr
    assert len(lines[0]) > len("kvreplay: ") + 10, done.stderr
    for word in words:
        assert str(word) in lines[0], (word, done.stderr)
