#!/usr/bin/env python3
"""A sweep over the bundled traces that is killed again and again, and resumed.

  tests/faults/resume.py --configs 1000 --kills 10 --seed 1
"""

import argparse
import json
import pathlib
import random
import tempfile
import time

from kill import Killed
from subjects import KVREPLAY, ROOT, must

BUDGETS = [32, 36, 40, 44, 48, 56, 64, 72, 80, 96]
GRIDS = """
[[method]]
text = "momentum"
[method.grid]
alpha = {{from = 0.5, to = 0.99, count = {momentum}, scale = "one_minus"}}
[[method]]
text = "h2o"
[method.grid]
sink = {{from = 0, to = {h2o}, step = 1}}
window = [4, 8]
[[method]]
text = "streaming"
[method.grid]
sink = {{from = 0, to = {streaming}, step = 1}}
"""


def plan_of(traces, n_configs, max_steps):
    """TOML of so many methods at a budget: multiples of 100."""
    assert n_configs % 100 == 0
    n = n_configs // 100  # methods of each ten: 4 momentum, 2 x 2 h2o, 2 streaming
    return (f"traces = {json.dumps([str(t) for t in traces])}\nbudgets = {BUDGETS}\nlayers = \"0\"\nmax_steps = {max_steps}\n"
            'metrics = ["error", "evicted_mass"]\ncompensators = []\n'
            + GRIDS.format(momentum=4 * n, h2o=2 * n - 1, streaming=2 * n - 1))


def items(out):
    return {p.name: p.read_bytes() for p in (out / "items").glob("*.cells")}


def keys(out):
    return [key for raw in items(out).values() for key in json.loads(raw.split(b"\n")[1])["keys"]]


def resumed(folder, traces, n_configs, n_kills, max_steps, draw, threads=1):
    """Seconds undisturbed, and of all starts of the killed one together."""
    plan = folder / "plan.toml"
    plan.write_text(plan_of(traces, n_configs, max_steps))

    def sweep(out):
        return [KVREPLAY, "sweep", plan, "--out", out, "--threads", threads, "--memory", "256MiB"]

    start = time.monotonic()
    must(sweep(folder / "whole"))
    undisturbed = time.monotonic() - start
    expected = (folder / "whole" / "cells.csv").read_bytes()
    n_cells = len(keys(folder / "whole"))
    assert n_cells == n_configs * len(traces), n_cells

    out, spent, killed, n_done = folder / "killed", 0.0, 0, []
    before = {}
    while killed < n_kills:
        done = Killed(sweep(out), draw.uniform(0.02, 1.3) * undisturbed / n_kills)
        spent += done.seconds
        if done.returncode == 0:  # it ended first: start over, and be quicker
            assert (out / "cells.csv").read_bytes() == expected
            break
        killed += 1
        after = items(out) if out.exists() else {}
        assert all(after.get(name) == body for name, body in before.items()), "a finished unit was touched"
        before = after
        n_done.append(len(keys(out)) if after else 0)
        if (out / "sweep.json").exists():
            assert json.loads(must([KVREPLAY, "status", out, "--json"]).stdout)["damaged"] == []
    start = time.monotonic()
    must(sweep(out))
    spent += time.monotonic() - start
    assert (out / "cells.csv").read_bytes() == expected
    everything = keys(out)
    assert len(everything) == len(set(everything)) == n_cells, "a cell was done twice"
    assert not list(out.rglob("*.part"))
    return undisturbed, spent, killed, n_cells, n_done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--max-steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    traces = sorted((ROOT / "traces" / "samples").glob("*.h5"))
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, spent, killed, n_cells, n_done = resumed(
            pathlib.Path(folder), traces, options.configs, options.kills, options.max_steps, random.Random(options.seed),
            options.threads)
    print(f"{options.configs} configurations, {n_cells} cells: undisturbed {undisturbed:.1f} s; killed {killed} times, "
          f"with {', '.join(map(str, n_done))} cells done, {spent:.1f} s in all: the same bytes, no cell done twice")


if __name__ == "__main__":
    main()
