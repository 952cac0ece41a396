"""`kvreplay report DIR`: one self-contained page, and its figures as PDF and SVG."""


def add(commands):
    parser = commands.add_parser("report", help="one self-contained HTML page, and its figures as PDF and SVG")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--out", metavar="FILE", help="default DIR/report.html; figures/ is written beside it")


def run(asked):
    from ..report import write
    from ..results import load

    print(write(load(asked.folder), asked.out))
