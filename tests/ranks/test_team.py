"""What a sweep asks of the processes that mpirun started: every unit once, one plan for all, one sentence of a failure."""

import collections
import os
import subprocess

import pytest

from launcher import MPIEXEC, RANKS

TEAM = os.environ.get("KVREPLAY_TEAM_TEST", "team_test")


def team(n, *arguments):
    done = subprocess.run([MPIEXEC, "-n", str(n), TEAM, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env=RANKS)
    return done, collections.Counter(line for line in done.stdout.splitlines() if line)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_unit_once_in_every_round(n):
    done, said = team(n, 25)
    assert done.returncode == 0, done.stderr
    units = {line: count for line, count in said.items() if line.startswith("round")}
    assert units == {f"round {r} unit {i}": 1 for r in (1, 2) for i in range(25)}
    for line in ("agreed on 25 units in round 1", "agreed on 25 units in round 2", "long true"):
        assert said[line] == n, said
    assert said["any true false"] == 2 * n and said[f"leads true of {n} here"] == 1


@pytest.mark.parametrize("unit", [0, 13, 24])
def test_a_member_that_fails_ends_the_others_and_speaks_alone(unit):
    done, said = team(3, 25, unit, 3)
    assert done.returncode == 3, (done.returncode, done.stderr)
    assert said["first true"] == 1 and said["failed 3"] == 2, said
    assert not [line for line in said if line.startswith("round 2")]


def test_no_launcher_no_team():
    done = subprocess.run([TEAM, "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "leads true of 1 here" in done.stdout, done


def test_a_launcher_that_mpi_does_not_know():
    done = subprocess.run([TEAM, "3"], capture_output=True, text=True, timeout=60,
                          env={**RANKS, "SLURM_STEP_NUM_TASKS": "4"})
    assert done.returncode == 2 and "4 processes were started" in done.stdout and "--shard" in done.stdout, done
