"""`kvreplay league DIR`: methods ranked at equal tokens or at equal bytes."""


def add(commands):
    parser = commands.add_parser("league", help="methods ranked at equal tokens or at equal bytes")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--at", default="tokens", help="what is equal: tokens (default) or bytes")
    parser.add_argument("--base", metavar="METHOD", help="what methods are an improvement over")
    parser.add_argument("--budget", help="only these budgets as they were asked, separated by commas")
    parser.add_argument("--trace", help="only these traces, separated by commas")
    parser.add_argument("--head-type", help="only heads of this type: sink, local, retrieval or diffuse")
    parser.add_argument("--gpu", metavar="NAME", help="whose decode latency is estimated")
    parser.add_argument("--best", action="store_true", help="only the best of each class of method")
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    parser.add_argument("--csv", action="store_true", help="the table as CSV")


def run(asked):
    import json

    from ..errors import UsageError
    from ..latency import DEFAULT
    from ..league import best, league
    from ..results import load
    from ..scopes import scopes
    from ..text import records

    if asked.json and asked.csv:
        raise UsageError("--json and --csv cannot both be printed; give one")
    results = load(asked.folder)
    title, scope = scopes(results)[0]
    if asked.trace:
        title, scope = asked.trace, results.only(trace=asked.trace.split(","))
    if asked.head_type:
        title, scope = f"{title}, {asked.head_type} heads", scope.only(head_type=asked.head_type)
    gpu = asked.gpu or DEFAULT
    budget = asked.budget.split(",") if asked.budget else None
    table = (best if asked.best else league)(scope, asked.at, asked.base, gpu=gpu, budget=budget)
    if asked.csv:
        print(table.to_csv(index=False, float_format="%.9g", lineterminator="\n"), end="")
    elif asked.json:
        print(json.dumps(records(table), indent=2, ensure_ascii=False))
    else:
        if not asked.best:
            print(to_text(table, title, gpu) + "\n")
            table = best(scope, asked.at, asked.base, gpu=gpu, bands=False, budget=budget)
        print(best_text(table, title))


def to_text(table, title, gpu):
    from ..results import GROUPS
    from ..text import aligned, number

    lines = [f"{title}: mean error_output at equal size, its 95 % interval (block bootstrap), the share of the way "
             f"from the base to the best oracle; latency estimated for {gpu}"]
    for (group, budget), rows in table.groupby(["group", "budget"], sort=False):
        unit = rows["unit"].iloc[0]
        lines += ["", f"{GROUPS.get(group, group)}, " + (f"near budget {budget}: {number(rows['at'].iloc[0])} {unit}"
                                                         if budget else "methods without a budget, at their own size")]
        named = rows[rows["closed"].notna()]
        if len(named):
            lines[-1] += f" (base {named['base'].iloc[0]}, oracle {named['oracle'].iloc[0]})"
        cells = [["method", "rank", "error_output", "95 %", "closed", "tokens", "bytes", "bytes read", "latency us",
                  ""]]
        for r in rows.to_dict("records"):
            name = r["label"] + (" (oracle)" if r["foresight"] == "oracle" else "")
            if r["error_output"] != r["error_output"]:
                cells.append([name, *["-"] * 8, r["note"]])
                continue
            odd = [n for n in r["note"].split("; ") if not n.startswith(("measured at", "between", "no budget"))]
            cells.append([name, "-" if r["rank"] is None or r["rank"] != r["rank"] else str(r["rank"]),
                          number(r["error_output"]), f"{number(r['low'])} to {number(r['high'])}",
                          "-" if r["closed"] != r["closed"] else f"{r['closed']:.3f}", number(r["resident"]),
                          number(r["bytes"]), number(r["bytes_read"]), number(r["latency_us"]), "; ".join(odd)])
        lines += aligned(cells)
    return "\n".join(lines)


def best_text(table, title):
    from ..league import CLASSES
    from ..results import GROUPS
    from ..text import aligned, number

    lines = [f"{title}: the best of each class at equal size, and how far it is from the best oracle"]
    for group, rows in table.groupby("group", sort=False):
        unit = rows["unit"].iloc[0]
        cells = [["near budget", "", "method", "error_output", "distance", "x oracle", "closed", "tokens", "bytes",
                  "bytes read", "oracle", "its error"]]
        for r in rows.to_dict("records"):
            cells.append([f"{r['budget']} ({number(r['at'])} {unit})", CLASSES[r["class"]], r["label"],
                          number(r["error_output"]), number(r["distance"]), number(r["times_oracle"]),
                          "-" if r["closed"] != r["closed"] else f"{r['closed']:.3f}", number(r["resident"]),
                          number(r["bytes"]), number(r["bytes_read"]), r["oracle"] or "-", number(r["oracle_error"])])
        lines += ["", GROUPS.get(group, group), *aligned(cells)]
    if ((table["class"] == "correction") & (table["unit"] == "tokens")).any():
        lines += ["", "Tokens do not count what a correction remembers: bytes do, and --at bytes ranks by them"]
    return "\n".join(lines)
