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
    for name, what in (("layer", "layer"), ("head", "query head"), ("step", "stored decode step")):
        parser.add_argument(f"--{name}", type=int, metavar="N",
                            help=f"{what} of a figure of one head; default: where the "
                            "error is greatest")


def run(asked):
    from ..errors import UsageError, nearest
    from ..figures import ALL, of_a_head
    from ..report import write_whole
    from ..results import load
    from ..scopes import scopes
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
    module = ALL[asked.name]
    of_head = {}
    for option in ("layer", "head", "step"):
        if getattr(asked, option) is None:
            continue
        takes = [name for name, m in ALL.items() if of_a_head(m) and (option != "step" or getattr(m, "STEPS", False))]
        if asked.name not in takes:
            raise UsageError(f"figure {asked.name} has no --{option} (given {getattr(asked, option)}): that is for "
                             f"{', '.join(takes)}")
        of_head[option] = getattr(asked, option)
    picture = module.draw(results, asked.budget, asked.style, **of_head)
    out = Path(asked.out or f"{asked.name}.{format}")
    write_whole(out, to_bytes(picture, format))
    print(out)
