"""Kills and failing disks leave nothing half-written under a final name, and lose nothing that was reported as done.

$KVREPLAY_FAULTS says how many calls of each kind fail, one run each (default 6; 0: every one).
"""

import os
import pathlib
import random

import pytest

from failing import LIBRARY, Failing, chosen
from kill import Victim
from resume import resumed
from subjects import ROOT, SUBJECTS, Repack, Run, Sweep

LIMIT = int(os.environ.get("KVREPLAY_FAULTS", 6))
SEED = int(os.environ.get("KVREPLAY_FAULTS_SEED", 0))


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request, tmp_path_factory):
    return SUBJECTS[request.param](tmp_path_factory.mktemp("inputs"))


def test_killed_at_random_moments(subject, tmp_path):
    victim, draw = Victim(subject, tmp_path), random.Random(SEED)
    for _ in range(LIMIT or 100):
        victim.round(draw)


needs_library = pytest.mark.skipif(not pathlib.Path(LIBRARY).is_file(), reason="fail_io.so was not built")


@needs_library
@pytest.mark.parametrize("how", ["KILL", "ENOSPC", "SHORT", "EIO"])
def test_every_output(subject, tmp_path, how):
    failing = Failing(subject, tmp_path)
    n = failing.count("write")
    felt = [failing.once("write", at, how) for at in chosen(n, LIMIT or n)]
    # Who flushes a folder in vain, or closes what is published, has its file all the same; HDF5 opens a second time.
    assert sum(felt) >= len(felt) - 3
    print(f"{type(subject).__name__}: {sum(felt)} of {len(felt)} outputs of {n} failed by {how}")


@needs_library
def test_every_input(subject, tmp_path):
    if not subject.read_codes:
        return
    failing = Failing(subject, tmp_path)
    n = failing.count("read")
    felt = [failing.once("read", at, "EIO") for at in chosen(n, LIMIT or n)]
    assert any(felt)
    print(f"{type(subject).__name__}: {sum(felt)} of {len(felt)} inputs of {n} failed")


@needs_library
@pytest.mark.parametrize("kind", [Run, Repack, Sweep])
def test_a_trace_that_changes_while_it_is_read(kind, tmp_path):
    failing = Failing(kind(tmp_path / "inputs"), tmp_path)
    n, n_felt = failing.count("read"), 0
    for at in chosen(n, LIMIT or n):
        felt = failing.once("read", at, "TOUCH")
        assert felt or kind is Sweep, f"a change at input {at} of {n} was not noticed"
        assert not felt or "changed" in failing.done.stderr, failing.done.stderr
        n_felt += felt
    assert n_felt > 1  # a sweep looks at the plan and the trace first, and at nothing of that again


def test_a_sweep_resumed_after_kills(tmp_path):
    traces = [ROOT / "traces" / "samples" / "stories260k-512.h5"]
    resumed(tmp_path, traces, n_configs=100, n_kills=3, max_steps=8, draw=random.Random(SEED))
