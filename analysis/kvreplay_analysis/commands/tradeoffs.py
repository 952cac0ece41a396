"""`kvreplay tradeoffs DIR --gpu h100`: fidelity beside bytes, latency, energy and capacity."""

NUMBERS = {"--launch-us": ("launch_us", "microseconds of a launch, per layer and step (default 0)"),
           "--pj-per-bit": ("pj_per_bit", "energy of memory traffic (default 5.5, the middle of HBM's 4 to 7)"),
           "--pj-per-flop": ("pj_per_flop", "energy of an operation (default 0: left out)"),
           "--static-watts": ("static_watts", "power drawn whatever is done (default 0: left out)"),
           "--weights-gb": ("weights_gb", "the model's weights: read once per step, held in memory (default 0)")}
SHOWN = ["configuration", "F", "OP*", "OG*", "worst 10%", "top-1", "top-16", "bytes", "of full", "read", "us/step",
         "mJ/token", "max batch", "tok/s", "tok/s/GB", "front", "hypervolume"]


def add(commands):
    parser = commands.add_parser("tradeoffs", help="fidelity beside bytes, latency, energy and capacity of a GPU")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--gpu", metavar="NAME", help="whose costs are estimated: a name or its numbers")
    parser.add_argument("--batch", help="sequences decoded together, for the table")
    for name, (_, what) in NUMBERS.items():
        parser.add_argument(name, metavar="X", help=what)
    parser.add_argument("--model-layers", metavar="N", help="layers of the whole model (default: those of the run)")
    parser.add_argument("--budget", help="only these budgets as they were asked, separated by commas")
    parser.add_argument("--trace", help="only these traces, separated by commas")
    parser.add_argument("--batches", default="1,8,64", help="of the winner map")
    parser.add_argument("--contexts", default="", help="of the winner map, beside those measured: costs alone")
    parser.add_argument("--least-fidelity", default="0.9", help="that a winner has to have")
    parser.add_argument("--out", metavar="FILE", help="also draw it: pdf, svg or png by its ending")
    parser.add_argument("--style", default="double", help="width of the figure: single or double column")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--csv", action="store_true", help="the table as CSV")


def run(asked):
    import json
    import sys
    from pathlib import Path

    from ..errors import Absent, UsageError, nearest
    from ..latency import DEFAULT
    from ..report import write_whole
    from ..results import load
    from ..scopes import scopes
    from ..style import FORMATS, WIDTHS
    from ..text import records
    from ..tradeoffs import Workload, eviction_bias, spans, tradeoffs, winners

    if asked.json and asked.csv:
        raise UsageError("--json and --csv cannot both be printed; give one")
    format = Path(asked.out).suffix.lstrip(".") if asked.out else "pdf"
    for what, value, allowed in (("--out: the ending", format, FORMATS), ("--style", asked.style, list(WIDTHS))):
        if value not in allowed:
            raise UsageError(f"{what} {value or 'of ' + asked.out} is none of {', '.join(allowed)}"
                             f"{nearest(value, allowed)}")
    given = {field: _number(name, getattr(asked, field), float) for name, (field, _) in NUMBERS.items()}
    given |= {"batch": _number("--batch", asked.batch, int),
              "model_layers": _number("--model-layers", asked.model_layers, int)}
    workload = Workload(gpu=asked.gpu or DEFAULT, **{k: v for k, v in given.items() if v is not None})
    results = load(asked.folder)
    title, scope = scopes(results)[0]
    if asked.trace:
        title, scope = asked.trace, results.only(trace=asked.trace.split(","))
    table = tradeoffs(scope, workload)
    won = winners(scope, workload, _list("--batches", asked.batches), _list("--contexts", asked.contexts),
                  _number("--least-fidelity", asked.least_fidelity, float))
    shown = table
    if asked.budget:
        budgets = asked.budget.split(",")
        for b in budgets:
            if b not in results.budgets:
                raise UsageError(f"budget {b} is not in {results.folder}, which has {', '.join(results.budgets)}"
                                 f"{nearest(b, results.budgets)}")
        shown = table[table["budget"].isin([*budgets, ""])]
    try:
        of_spans = spans(scope)
    except Absent:
        of_spans = None
    if asked.csv:
        print(shown.to_csv(index=False, float_format="%.9g", lineterminator="\n"), end="")
    elif asked.json:
        print(json.dumps({"constants": workload.constants(), "configurations": records(shown),
                          "winners": records(won), "spans": [] if of_spans is None else records(of_spans)}, indent=2,
                         ensure_ascii=False))
    else:
        print(to_text(shown, won, title, workload, asked.least_fidelity))
        if of_spans is not None:
            bias = None
            if of_spans["span"].nunique() > 1:
                bias = eviction_bias(scope)
            print(spans_text(of_spans, bias))
    if asked.out:
        from ..figures import tradeoffs as figure
        from ..style import to_bytes

        write_whole(asked.out, to_bytes(figure.draw(scope, table, won, workload, asked.style), format))
        print(asked.out, file=sys.stderr if asked.json or asked.csv else sys.stdout)


def _number(name, text, kind):
    from ..errors import UsageError

    if text is None:
        return None
    try:
        value = kind(text)
        if 0 <= value < float("inf"):
            return value
    except ValueError:
        pass
    raise UsageError(f"{name} {text} is not a {'whole ' if kind is int else ''}number of at least 0")


def _list(name, text):
    """4096,32k -> [4096, 32768]"""
    from ..errors import UsageError

    out = []
    for piece in text.split(",") if text else []:
        factor = 1024 if piece[-1:] in "kK" and piece else 1
        value = _number(name, piece[:-1] if factor > 1 else piece, int) * factor
        if value < 1:
            raise UsageError(f"{name} {piece} is not a whole number of at least 1")
        out.append(value)
    return out


def named(row):
    return f"{row['label']}+{row['compensator']}" if row["compensator"] else row["label"]


def to_text(table, won, title, workload, least):
    from ..results import GROUPS
    from ..text import aligned, number

    lines = [f"{title}: fidelity and what it costs, estimated (docs/tradeoffs.md)", workload.constants()]
    for group, rows in table.groupby("group", sort=False):
        lines += ["", GROUPS.get(group, group)]
        cells = [SHOWN]
        for r in rows.sort_values(["budget", "fidelity"], ascending=[True, False], kind="stable",
                                  key=_by_size(rows)).to_dict("records"):
            name = named(r) + (f" at {r['budget']}" if r["budget"] else "") + (
                " (oracle)" if r["foresight"] == "oracle" else "")
            cells.append([name, *(number(r[c]) for c in (
                "fidelity", "op", "og", "worst_decile", "top1_agreement", "top16_jaccard", "bytes")),
                _percent(r["bytes_share"]), *(number(r[c]) for c in ("bytes_read", "tpot_us", "energy_mj")),
                f"{r['max_batch']:.0f}", number(r["tokens_per_s"]), number(r["tokens_per_s_gb"]),
                "*" if r["front"] else "", number(r["hypervolume"])])
        lines += aligned(cells)
    lines += ["", f"Fastest with fidelity of at least {least}, by mean context and batch (tokens per second)"]
    batches = list(dict.fromkeys(won["batch"]))
    cells = [["context", *(f"batch {b}" for b in batches)]]
    for (context, measured), rows in won.groupby(["context", "measured"], sort=False):
        row = [f"{context:.0f}" + ("" if measured else " (costs alone)")]
        for r in rows.to_dict("records"):
            row.append(f"{named(r)}{' at ' + r['budget'] if r['budget'] else ''} ({number(r['tokens_per_s'])})"
                       if r["label"] else "none")
        cells.append(row)
    return "\n".join([*lines, *aligned(cells)])


def _percent(x):
    return "-" if x != x else f"{100 * x:.1f}%"


def _by_size(rows):
    sizes = rows.groupby("budget")["resident"].median()
    return lambda column: column.map(sizes) if column.name == "budget" else column


def spans_text(of_spans, bias):
    from ..text import aligned, number

    lines = ["", "Spans: share of their tokens kept (keep), share of all attention on their evicted tokens (lost), "
             "share of the evicted mass (of lost)"]
    cells = [["configuration", "span", "keep", "all tokens", "lost", "of lost"]]
    for r in of_spans.to_dict("records"):
        cells.append([f"{r['label']}{' at ' + r['budget'] if r['budget'] else ''}", r["span"],
                      *(number(r[c]) for c in ("keep", "overall", "lost_mass", "span_share"))])
    lines += aligned(cells)
    if bias is not None:
        first, second = bias["first"].iloc[0], bias["second"].iloc[0]
        lines += ["", f"Eviction bias: keep of {second} - keep of {first}, mean over the compression ratios measured"]
        lines += aligned([["method", "bias", "from", "to"],
                          *([r["label"], f"{r['area']:+.3f}", f"{r['low_ratio']:.2f}", f"{r['high_ratio']:.2f}"]
                            for r in bias.to_dict("records"))])
    return "\n".join(lines)
