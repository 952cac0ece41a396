"""Reading a trace locks nothing, as network file systems ask for it: any number of processes may do it at a time."""

import fcntl
import os
import subprocess

import pytest

from subjects import KVREPLAY, make, must


@pytest.fixture(scope="module", params=["working", "archive"])
def trace(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    path = make(folder / "t.h5", n_tokens=200, layers=(0, 1))
    if request.param == "working":
        return path
    must([KVREPLAY, "repack", path, folder / "a.h5", "--profile", "archive"])
    return folder / "a.h5"


def run(trace, out):
    return [KVREPLAY, "run", trace, "-m", "h2o,tova", "-b", "16", "-c", "none", "--metrics", "error", "--threads", "1",
            "--out", out]


def test_while_somebody_holds_a_lock(trace, tmp_path):
    with open(trace, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        must(run(trace, tmp_path / "out"))
        must([KVREPLAY, "verify", trace])
        must([KVREPLAY, "info", trace])


def test_many_at_a_time(trace, tmp_path):
    must(run(trace, tmp_path / "alone"))
    jobs = [subprocess.Popen(run(trace, tmp_path / f"out{i}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for i in range(6)]
    for job in jobs:
        _, stderr = job.communicate(timeout=120)
        assert job.returncode == 0, stderr
    for name in ("results.h5", "summary.csv"):
        assert len({(tmp_path / f"{folder}" / name).read_bytes()
                    for folder in ["alone"] + [f"out{i}" for i in range(6)]}) == 1


def test_where_nothing_may_be_written(trace, tmp_path):
    before = os.stat(trace)
    os.chmod(trace, 0o444)
    os.chmod(trace.parent, 0o555)
    try:
        must(run(trace, tmp_path / "out"))
    finally:
        os.chmod(trace.parent, 0o755)
    after = os.stat(trace)
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    assert os.listdir(trace.parent).count(trace.name) == 1
