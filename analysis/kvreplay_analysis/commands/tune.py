"""`kvreplay tune ... --out DIR` ends here, and `python -m kvreplay_analysis tune DIR` repeats it.

Statistics of what was found, as a table, as tune.json and as figures.
"""


def add(commands):
    parser = commands.add_parser("tune", help="what kvreplay tune found, with intervals and figures")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print JSON (what tune.json holds)")
    parser.add_argument("--format", default="svg", help="of the figures: svg (default), pdf or png, or several as "
                        "svg,pdf")
    parser.add_argument("--style", default="double", help="width of the figures: single or double column")


def run(asked):
    from .. import tune
    from ..errors import UsageError, nearest
    from ..figures import tuned as figures
    from ..report import write_whole
    from ..style import FORMATS, WIDTHS

    formats = asked.format.split(",")
    for what, values, allowed in (("--format", formats, FORMATS), ("--style", [asked.style], list(WIDTHS))):
        for value in values:
            if value not in allowed:
                raise UsageError(f"{what} {value} is none of {', '.join(allowed)}{nearest(value, allowed)}")
    found = tune.findings(tune.load(asked.folder))
    figures.write(found, asked.folder, formats, asked.style)
    write_whole(f"{asked.folder}/tune.json", tune.as_json(found).encode())
    print(tune.as_json(found) if asked.json else tune.text(found), end="" if asked.json else "\n")
