"""`kvreplay compare A[:METHOD] B[:METHOD]`: paired differences of two methods, or of two runs."""

from pathlib import Path


def add(commands):
    parser = commands.add_parser("compare", help="paired differences of two methods, or of two runs")
    parser.add_argument("a", metavar="A[:METHOD]")
    parser.add_argument("b", metavar="B[:METHOD]")
    parser.add_argument("--metric", action="append", metavar="NAME", help="default error_output; may be repeated")
    parser.add_argument("--budget", help="only these budgets as they were asked, separated by commas")
    parser.add_argument("--trace", help="only these traces, separated by commas")
    parser.add_argument("--by", metavar="LEVEL", help="also one line for each layer, head, step or trace")
    parser.add_argument("--tolerance", metavar="X", help="exit 1 where means of a cell are more than this share apart")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    parser.add_argument("--out", metavar="FILE", help="also draw the differences: pdf, svg or png by its ending")
    parser.add_argument("--style", default="double", help="width of the figure: single or double column")


def run(asked):
    import sys

    from ..compare import LEVELS, compare, named
    from ..errors import UsageError, nearest
    from ..figures import compare as figure
    from ..report import write_whole
    from ..style import FORMATS, WIDTHS, to_bytes

    format = Path(asked.out).suffix.lstrip(".") if asked.out else "pdf"
    for what, value, allowed in (("--out: the ending", format, FORMATS), ("--style", asked.style, list(WIDTHS)),
                                 ("--by", asked.by or LEVELS[0], LEVELS)):
        if value not in allowed:
            raise UsageError(f"{what} {value or 'of ' + asked.out} is none of {', '.join(allowed)}"
                             f"{nearest(value, allowed)}")
    tolerance = _share(asked.tolerance)
    metrics = [m for text in asked.metric or ["error_output"] for m in text.split(",")]
    found = compare(*named(asked.a, asked.b), metrics=metrics,
                    budget=asked.budget.split(",") if asked.budget else None,
                    trace=asked.trace.split(",") if asked.trace else None)
    print(to_json(found, asked.by) if asked.json else to_text(found, asked.by))
    if asked.out:
        write_whole(asked.out, to_bytes(figure.draw(found, asked.style), format))
        print(asked.out, file=sys.stderr if asked.json else sys.stdout)
    worst = found.worst()
    if tolerance is not None and worst["apart"] > tolerance:
        print(f"kvreplay compare: {_named(worst)}{_at(worst)} on {worst['trace']} layer {worst['layer']} has "
              f"{_metric(worst)} {worst['mean_a']:.9g} in A and {worst['mean_b']:.9g} in B, {worst['apart']:.3g} "
              f"apart; --tolerance allows {tolerance:g}, which {int((found.cells['apart'] > tolerance).sum())} of "
              f"{len(found.cells)} cells exceed", file=sys.stderr)
        return 1
    return 0


def _share(text):
    from ..errors import UsageError

    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise UsageError(f"--tolerance {text} is no share; give a number from 0 on, such as 1e-6")
    return value


def to_json(found, by=None):
    """One object: the sides, the rows, wins, the worst cell and what is in one side alone; NaN becomes null."""
    import json

    from ..text import records

    out = {"a": found.title_a, "b": found.title_b, "rows": records(found.rows),
           "n_cells": len(found.cells), "n_identical": int(found.cells["identical"].sum()),
           "worst": records(found.cells.loc[[found.cells["apart"].idxmax()]])[0],
           "only_in_a": {what: sides[0] for what, sides in found.only.items()},
           "only_in_b": {what: sides[1] for what, sides in found.only.items()}}
    if found.by_method:
        out["wins"] = records(found.wins())
    if by:
        out[by] = records(found.by(by))
    return json.dumps(out, indent=2, ensure_ascii=False)


def to_text(found, by=None):
    from ..text import aligned

    rows, cells = found.rows, found.cells
    several = rows[["metric", "compensator"]].drop_duplicates().shape[0] > 1
    lines = [f"A  {found.title_a}", f"B  {found.title_b}",
             f"{'' if several else _metric(rows.iloc[0]) + ', '}{len(found.cells)} cells on both sides, "
             f"{int(cells['identical'].sum())} of them identical in every block; intervals of the paired difference "
             "at 95 % (block bootstrap)", ""]
    lines += _table(rows, several, {"tokens A": "resident_a", "tokens B": "resident_b"},
                    {"": lambda r: r["verdict"]}, not found.by_method)
    if found.by_method:
        lines += ["", "Who is lower (in brackets: where the interval leaves out 0)"]
        table = [["metric"] * several + ["budget", "by", "A lower", "B lower", "equal"]]
        for w in found.wins().to_dict("records"):
            surely = ["", ""] if w["by"] == "step" else [f" ({w['a_surely']})", f" ({w['b_surely']})"]
            table.append([_metric(w)] * several + [w["budget"] or "-", w["by"], f"{w['a_lower']}{surely[0]}",
                                                   f"{w['b_lower']}{surely[1]}", str(w["equal"])])
        lines += aligned(table)
    if by:
        units = {c: c for c in ("trace", "layer", "head", "step") if c in found.by(by)}
        lines += ["", f"By {by}"] + _table(found.by(by), several, units, {}, not found.by_method)
    for what, (in_a, in_b) in found.only.items():
        for side, names in (("A", in_a), ("B", in_b)):
            if names:
                lines.append(f"Only in {side}: {what} {', '.join(names)}")
    return "\n".join(lines)


def _table(frame, several, more, last, name_methods):
    from ..text import aligned, number

    table = [[*["method"] * name_methods, *["metric"] * several, "budget", *more, "A", "B", "A - B", "95 % interval",
              "relative", *last]]
    for r in frame.to_dict("records"):
        table.append([*[_named(r)] * name_methods, *[_metric(r)] * several, r["budget"] or "-",
                      *(number(r[c]) for c in more.values()), number(r["mean_a"]), number(r["mean_b"]),
                      number(r["difference"]), f"{number(r['low'])} to {number(r['high'])}" if r["low"] == r["low"]
                      else "-", f"{100 * r['relative']:+.2f} %" if r["relative"] == r["relative"] else "-",
                      *(f(r) for f in last.values())])
    return aligned(table)


def _named(row):
    return row["label_a"] if row["method_a"] == row["method_b"] else f"{row['label_a']} | {row['label_b']}"


def _at(row):
    return f" at budget {row['budget']}" if row["budget"] else ""


def _metric(row):
    return row["metric"] + (f".{row['compensator']}" if row["compensator"] else "")
