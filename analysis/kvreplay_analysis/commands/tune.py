"""`kvreplay tune ... --out DIR` ends here, and `python -m kvreplay_analysis tune DIR` repeats it.

Statistics of what was found, as a table, as tune.json and as figures.
"""


def add(commands):
    parser = commands.add_parser("tune", help="what kvreplay tune found, with intervals and figures")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print JSON (what tune.json holds)")


def run(asked):
    from .. import tune
    from ..figures import tuned as figures
    from ..report import write_whole

    found = tune.findings(tune.load(asked.folder))
    figures.write(found, asked.folder)
    write_whole(f"{asked.folder}/tune.json", tune.as_json(found).encode())
    print(tune.as_json(found) if asked.json else tune.text(found), end="" if asked.json else "\n")
