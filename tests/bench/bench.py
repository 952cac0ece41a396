"""Runs every measurement of the bench in one go and prints one table (Markdown).

Ratios are of figures of the same run on the same machine, one thread on each side unless a row says otherwise. A row
compares with PyTorch only if both sides measured the same mean error.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# One level of threads on both sides, and as many as the row says.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
AGREEMENT = 1e-4  # relative, of mean errors
ERRORS_ONLY = "error,evicted_mass"


def run_json(words):
    """The JSON objects that a command prints, one a line."""
    result = subprocess.run(words, text=True, stdout=subprocess.PIPE, env=ENVIRONMENT, check=False)
    if result.returncode:
        sys.exit(f"bench: {' '.join(map(str, words))} failed with exit code {result.returncode}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def peak_mib(words):
    """Peak resident memory of one command, MiB."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"bench: {' '.join(map(str, words))} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, *values, goal=""):
        self.rows.append((what, *values, *[""] * (3 - len(values)), goal))

    def print(self):
        header = ("", "all metrics", "all but checkpoints", "errors only", "goal")
        print("| " + " | ".join(header) + " |\n|---|---|---|---|---|")
        for row in self.rows:
            print("| " + " | ".join(row) + " |")


def percent(x):
    return f"{100 * x:.1f} %"


def engine_rows(table, lines):
    by_key = {(line["case"], line.get("metrics"), line.get("threads")): line for line in lines}
    product = by_key[("product", None, None)]

    def of(case, metrics, threads=1):
        return by_key[(case, metrics, threads)]

    sets = ("all", "steps", ERRORS_ONLY)

    def row(what, value, goal="", columns=sets):
        table.add(what, *(value(metrics) if metrics in columns else "" for metrics in sets), goal=goal)

    def share(case):
        return lambda metrics: percent(of(case, metrics)["methods"] / of(case, metrics)["exact"])

    def compensators(metrics):
        with_them, without = of("h2o, 3 compensators", metrics), of("h2o", metrics)
        return percent((with_them["methods"] - without["methods"]) / with_them["exact"])

    table.add("Eigen float32 product, 256 x 128 x 8192", f"{product['rate'] / 1e9:.0f} GFlop/s")
    row("exact pass, share of that rate",
        lambda m: percent(product["exact_flop"] / of("momentum x 16", m)["exact"] / product["rate"]), ">= 55 % / >= 85 %")
    row("exact pass, seconds", lambda m: f"{of('momentum x 16', m)['exact']:.2f}")
    row("column mass of the prompt (h2o; shared by all methods), share of the exact pass",
        lambda m: percent(of("h2o", m)["prefill"] / of("h2o", m)["exact"]))
    row("one more `h2o`, share of the exact pass", share("h2o"), "<= 11 % / <= 8 %")
    row("three compensators beside it", compensators, "<= 4.5 %", ("all", "steps"))
    row("`residual`", share("residual"), "<= 30 %")
    row("16 `h2o`", share("h2o x 16"))
    row("16 `momentum`", share("momentum x 16"), "<= 120 %")
    row("16 `momentum` one by one, times as long as at once",
        lambda m: f"{of('16 x momentum', m)['seconds'] / of('momentum x 16', m)['seconds']:.1f}")
    row("the same sweep on two threads, times as fast",
        lambda m: f"{of('momentum x 16', m)['seconds'] / of('momentum x 16', m, 2)['seconds']:.2f}", ">= 1.8")


def class_rows(table, lines):
    sets = ("all", "steps", ERRORS_ONLY)
    by_class = {}
    for line in lines:
        by_class.setdefault((line["class"], line["method"]), {})[line["metrics"]] = line["share"]
    for (kind, method), shares in by_class.items():
        table.add(f"one more of {kind} (`{method.removeprefix('+')}`)", *(percent(shares[m]) for m in sets))


def torch_rows(table, lines, args, trace, values):
    ours = {line["case"]: line for line in lines if line.get("metrics") == "error"}
    worst = 0.0
    for method in ("h2o", "momentum"):
        for n, chosen in ((1, values[method][-1:]), (16, values[method])):
            mine = ours[f"{method} x {n}"]
            cells = []
            for plan in ("steps", "blocks"):
                theirs = run_json([args.torch_python, HERE / "torch_replay.py", trace, "--method", method, "--plan", plan,
                                   "--budget", str(args.budget), "--values", ",".join(chosen)])[0]
                worst = max([worst, *(abs(a - b) / abs(b) for a, b in zip(mine["error"], theirs["error"], strict=True))])
                cells.append((theirs["seconds"], theirs["seconds"] / mine["seconds"]))
            (steps, ratio), (by_blocks, blocks_ratio) = cells
            table.add(f"`{method}`, {n} configuration{'s' * (n > 1)}: kvreplay {mine['seconds']:.2f} s, "
                      f"PyTorch step by step {steps:.1f} s, PyTorch on kvreplay's plan {by_blocks:.1f} s",
                      "", "", f"{ratio:.1f} x, {blocks_ratio:.1f} x", goal=">= 25 x" if n == 16 else "")
    verdict = "agrees" if worst <= AGREEMENT else "DISAGREES"
    table.add(f"mean errors, worst relative difference to PyTorch ({verdict})", "", "", f"{worst:.1e}", goal="<= 1e-4")
    return worst <= AGREEMENT


def memory_row(table, args, folder, alphas):
    bench, kvreplay = args.build / "tests/bench/replay_bench", args.build / "sim/kvreplay"
    trace, tokens = folder / "long.h5", 32768 // args.shrink
    run_json([bench, "--write-trace", trace, "--element", "f16", "--tokens", str(tokens), "--prompt-len",
              str(tokens // 2), "--kv-heads", "8", "--group", "4"])
    peak = peak_mib([kvreplay, "run", trace, "--method", *(f"momentum:alpha={alpha}" for alpha in alphas), "--budget",
                     str(args.budget), "--threads", "1", "--metrics", ERRORS_ONLY, "--out", folder / "long_out"])
    table.add(f"peak memory: {tokens} tokens, 32 / 8 heads, 16 `momentum`, one thread", "", "", f"{peak:.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens: checks the bench, measures nothing")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--class", dest="classes", action="append", default=[], metavar="NAME=METHOD",
                        help="the method that stands for a class; +PART is a compensator (default: one of each)")
    args = parser.parse_args()
    args.shrink = 8 if args.quick else 1
    args.budget = 1024 // args.shrink
    tokens = 8192 // args.shrink

    windows = [str(args.budget // 32 * i) for i in range(1, 17)]
    alphas = [f"{0.2 + 0.05 * i:.2f}" for i in range(16)]
    shape = ["--tokens", str(tokens), "--prompt-len", str(tokens // 2), "--kv-heads", str(args.kv_heads),
             "--budget", str(args.budget), "--windows", ",".join(windows), "--alphas", ",".join(alphas),
             "--repeat", str(args.repeat)]
    bench = args.build / "tests/bench/replay_bench"
    table, agrees = Table(), True
    with tempfile.TemporaryDirectory(dir=args.build) as name:
        folder = Path(name)
        lines = run_json([bench, *shape])
        engine_rows(table, lines)
        chosen = [word for text in args.classes for word in ("--class", text)] or ["--classes"]
        class_rows(table, run_json([bench, *shape, *chosen]))
        trace = folder / "layer.h5"
        if not args.no_torch:
            run_json([bench, *shape, "--write-trace", trace])
            agrees = torch_rows(table, lines, args, trace, {"h2o": windows, "momentum": alphas})
        for element in ("f16", "bf16", "f32"):
            run_json([bench, *shape, "--write-trace", trace, "--element", element])
            rate = run_json([bench, "--read-trace", trace])[0]["bytes_per_second"]
            table.add(f"reading and widening a trace, {element}", "", "", f"{rate / 1e6:.0f} MB/s")
        if not args.no_memory:
            memory_row(table, args, folder, alphas)

    print(f"{processor()}, {os.cpu_count()} CPUs; {tokens} tokens, half of them decode, head_dim 128, group 4, "
          f"{args.kv_heads} KV heads, budget {args.budget}, float32 random numbers, best of {args.repeat}.\n")
    table.print()
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
