"""`kvreplay explain DIR --method M`: the page and the numbers, from the folder that the replay wrote."""


def add(commands):
    parser = commands.add_parser("explain", help="what a method's error comes from")
    parser.add_argument("folder", metavar="FOLDER", help="DIR/explain/NAME, as the replay wrote it")
    parser.add_argument("--out", metavar="FILE", help="default FOLDER/explain.html")
    parser.add_argument("--json", action="store_true", help="numbers as JSON instead of text")


def run(asked):
    import json
    import sys

    from .. import explain, explain_page
    from ..errors import ResultsError, UsageError
    from ..results import load

    ex = explain.load(asked.folder)
    try:
        original = load(ex.said["results"])
    except (UsageError, ResultsError):  # moved away since: nothing to compare with
        original = None
    page = explain_page.write(ex, asked.out, original)
    differs = explain.difference_to(ex, original) if original is not None else ""
    if differs:
        print(f"kvreplay explain: {differs}", file=sys.stderr)
    if asked.json:
        print(json.dumps(explain_page.as_json(ex, page), indent=1, allow_nan=False))
        return
    for sentence in explain_page.findings(ex):
        print(sentence)
    print(page)
