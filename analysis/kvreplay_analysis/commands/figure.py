"""`kvreplay figure NAME DIR`: one figure for a paper."""

from pathlib import Path


def add(commands):
    parser = commands.add_parser("figure", help="one figure for a paper")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--format", help="pdf, svg or png; default: by the ending of --out, else pdf")
    parser.add_argument("--style", default="double", help="width: single or double column")
    parser.add_argument("--out", metavar="FILE", help="default NAME.FORMAT in the current folder")
    parser.add_argument("--trace", help="only these traces, separated by commas")
    parser.add_argument("--budget", help="budget as it was asked")
    parser.add_argument("--method", action="append", metavar="LABEL", help="only this method; may be repeated")


def run(asked):
    from ..errors import UsageError, nearest
    from ..figures import ALL
    from ..report import scopes, write_whole
    from ..results import load
    from ..style import FORMATS, WIDTHS, to_bytes

    def one_of(what, value, allowed):
        if value not in allowed:
            raise UsageError(f"{what} {value} is none of {', '.join(allowed)}{nearest(value, allowed)}")

    one_of("figure", asked.name, list(ALL))
    one_of("--style", asked.style, list(WIDTHS))
    format = asked.format or (Path(asked.out).suffix.lstrip(".") if asked.out else "pdf") or "pdf"
    one_of("format" if asked.format is None else "--format", format, list(FORMATS))
    results = load(asked.folder)
    results = results.only(trace=asked.trace.split(",")) if asked.trace else scopes(results)[0][1]
    if asked.method:
        results = results.only(label=asked.method)
    picture = ALL[asked.name].draw(results, asked.budget, asked.style)
    out = Path(asked.out or f"{asked.name}.{format}")
    write_whole(out, to_bytes(picture, format))
    print(out)
