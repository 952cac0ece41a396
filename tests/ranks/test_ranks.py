"""Processes of mpirun share a sweep: the same bytes as one process, whoever is killed or fails."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cli"))
from harness import KVREPLAY, kvreplay  # noqa: E402
from launcher import MPIEXEC, RANKS  # noqa: E402

N_CELLS = 3 * 4 * 4  # three traces of four layers, four methods at a budget


def command(n, plan, out, *more):
    return [MPIEXEC, "-n", str(n), KVREPLAY, "sweep", str(plan), "--out", str(out), "--threads", "1", *map(str, more)]


def ranks(n, plan, out, *more, **options):
    return subprocess.run(command(n, plan, out, *more), capture_output=True, text=True, timeout=120, env=RANKS, **options)


def said(done):
    """Our own lines; mpirun adds a paragraph where a process failed."""
    return [line for line in done.stderr.splitlines() if line.startswith("kvreplay: ")]


def keys(out):
    lines = [p.read_bytes().split(b"\n")[1] for p in sorted((out / "items").glob("*.cells"))]
    return [key for line in lines for key in json.loads(line)["keys"]]


def files(out):
    return {p.name: p.read_bytes() for p in (out / "items").glob("*.cells")}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    for seed in (1, 2, 3):
        assert kvreplay("synth", folder / f"t{seed}.h5", "--tokens", 500, "--prompt-len", 200, "--n-layers", 4, "--heads",
                        4, "--kv-heads", 2, "--head-dim", 32, "--seed", seed).returncode == 0
    (folder / "plan.toml").write_text('traces = ["t*.h5"]\nmethods = ["h2o", "tova"]\nbudgets = [32, 64]\n')
    return folder / "plan.toml"


@pytest.fixture(scope="module")
def alone(plan, tmp_path_factory):
    """The table of one process, which knows nothing of MPI."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = kvreplay("sweep", plan, "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr
    return (out / "cells.csv").read_bytes()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_bytes_of_one_process(plan, alone, tmp_path, n):
    done = ranks(n, plan, tmp_path / "out")
    assert done.returncode == 0 and said(done) == [], done.stderr
    assert done.stdout.count("cells in") == 1 and f"{N_CELLS} cells in" in done.stdout
    assert (tmp_path / "out" / "cells.csv").read_bytes() == alone
    everything = keys(tmp_path / "out")
    assert len(everything) == len(set(everything)) == N_CELLS  # nothing was done twice
    before = files(tmp_path / "out")
    again = ranks(n, plan, tmp_path / "out")
    assert f"({N_CELLS} were there before)" in again.stdout and files(tmp_path / "out") == before


def test_heads_too(plan, tmp_path):
    assert kvreplay("sweep", plan, "--out", tmp_path / "one", "--heads").returncode == 0
    assert ranks(2, plan, tmp_path / "two", "--heads").returncode == 0
    for name in ("cells.csv", "heads.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def children(pid):
    """Processes of kvreplay below mpirun."""
    out = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in out.splitlines() if "kvreplay" in line]


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_rank_costs_its_unit(plan, tmp_path, which):
    """Units that take a while, so that some are left when the kill comes, on a busy machine too."""
    long = tmp_path / "plan.toml"
    long.write_text(plan.read_text().replace('"t*.h5"', f'"{plan.parent}/t*.h5"')
                    .replace('"tova"', '"tova", "residual", "snapkv", "momentum"').replace("64]", "64, 80, 96, 112]"))
    plan, per_unit = long, 5 * 5
    n_cells = 3 * 4 * per_unit
    assert kvreplay("sweep", plan, "--out", tmp_path / "alone", "--threads", 1).returncode == 0
    out = tmp_path / "out"
    process = subprocess.Popen(command(2, plan, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=RANKS)
    deadline = time.monotonic() + 60
    pids = []  # known before there is anything, so that the kill comes at once
    while len(pids) < 2 and process.poll() is None and time.monotonic() < deadline:
        pids = children(process.pid)
    while len(list((out / "items").glob("*.cells"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(pids) == 2 and process.poll() is None
    os.kill(sorted(pids)[which], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    before = files(out)
    assert 3 * per_unit <= len(keys(out)) < n_cells and not (out / "cells.csv").exists()
    done = ranks(2, plan, out)
    assert done.returncode == 0, done.stderr
    assert (out / "cells.csv").read_bytes() == (tmp_path / "alone" / "cells.csv").read_bytes()
    assert all(files(out)[name] == body for name, body in before.items())
    everything = keys(out)
    assert len(everything) == len(set(everything)) == n_cells  # only what was missing was done
    assert not list(out.rglob("*.part"))


def test_cells_that_fail_are_told_once(plan, tmp_path):
    bad = tmp_path / "plan.toml"
    bad.write_text(plan.read_text().replace('"t*.h5"', f'"{plan.parent}/t*.h5"')
                   .replace('"tova"', '"tova", "given:scores=mine"'))
    done = ranks(3, bad, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert len(said(done)) == 3 * 4 and all("scores 'mine'" in line for line in said(done)), done.stderr  # one for a layer
    assert f"{N_CELLS} cells in" in done.stdout
    alone = kvreplay("sweep", bad, "--out", tmp_path / "alone", "--threads", 1)
    assert alone.stderr.splitlines() == said(done)


@pytest.mark.parametrize("text, code, word", [("traces = 3\n", 2, "plan.toml"), (None, 2, "none.toml")])
def test_what_is_refused_is_said_once(plan, tmp_path, text, code, word):
    bad = tmp_path / ("plan.toml" if text else "none.toml")
    if text:
        bad.write_text(text)
    done = ranks(3, bad, tmp_path / "out")
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(said(done)) == 1 and word in said(done)[0], done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("KVREPLAY_FAIL_IO" not in os.environ, reason="fail_io.so was not built")
def test_what_is_refused_is_said_before_anyone_leaves(tmp_path):
    """mpirun kills the others once one has exited with a failure."""
    (tmp_path / "plan.toml").write_text("traces = 3\n")
    done = subprocess.run(command(3, tmp_path / "plan.toml", tmp_path / "out"), capture_output=True, text=True, timeout=120,
                          env={**RANKS, "LD_PRELOAD": os.environ["KVREPLAY_FAIL_IO"], "FAIL_IO_LATE": "3"})
    assert done.returncode == 2 and len(said(done)) == 1 and "plan.toml" in said(done)[0], done.stderr


def test_an_estimate_is_said_once(plan, tmp_path):
    done = ranks(3, plan, tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{N_CELLS} to measure") == 1 and done.stdout.count("sample ") == 1, done.stdout
    assert not (tmp_path / "out").exists()


def test_a_trace_that_is_none(plan, alone, tmp_path):
    for path in plan.parent.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "t9.h5").write_text("hello")
    done = ranks(2, tmp_path / "plan.toml", tmp_path / "out")
    assert done.returncode == 3 and len(said(done)) == 1 and "t9.h5" in said(done)[0], done.stderr
    assert (tmp_path / "out" / "cells.csv").read_bytes() == alone


@pytest.mark.skipif("KVREPLAY_FAIL_IO" not in os.environ, reason="fail_io.so was not built")
def test_a_disk_that_is_full_for_all(plan, alone, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(command(3, plan, out), capture_output=True, text=True, timeout=120, env={
        **RANKS, "LD_PRELOAD": os.environ["KVREPLAY_FAIL_IO"], "FAIL_IO_UNDER": f"{out}/", "FAIL_IO_CALLS": "write",
        "FAIL_IO_AT": "12", "FAIL_IO_HOW": "ENOSPC"})
    assert done.returncode == 1, done.stderr
    assert len(said(done)) == 1 and "No space left" in said(done)[0], done.stderr
    assert not (out / "cells.csv").exists() and not list(out.rglob("*.part"))
    before = files(out)
    assert ranks(2, plan, out).returncode == 0
    assert (out / "cells.csv").read_bytes() == alone
    assert before and all(files(out)[name] == body for name, body in before.items())


def test_shards_of_their_own_need_no_ranks(plan, alone, tmp_path):
    """Processes that were each given their part share nothing."""
    out = tmp_path / "out"
    script = f'exec "{KVREPLAY}" sweep "{plan}" --out "{out}" --threads 1 --shard $OMPI_COMM_WORLD_RANK/2'
    done = subprocess.run([MPIEXEC, "-n", "2", "bash", "-c", script], capture_output=True, text=True, timeout=120, env=RANKS)
    assert done.returncode == 0, done.stderr
    assert kvreplay("merge", out, "--out", out).returncode == 0
    assert (out / "cells.csv").read_bytes() == alone


def test_processes_that_mpi_does_not_connect(plan, tmp_path):
    done = kvreplay("sweep", plan, "--out", tmp_path / "out", env={**RANKS, "SLURM_STEP_NUM_TASKS": "4"})
    assert done.returncode == 2 and "4 processes" in done.stderr and "--shard" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
