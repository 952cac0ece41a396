"""`python -m kvreplay_analysis report DIR` and `... figure NAME DIR`; `kvreplay` calls this."""

import argparse
import sys
from pathlib import Path

USAGE, OTHER = 2, 1


def _parser():
    parser = argparse.ArgumentParser(prog="kvreplay", description="Report and figures of a results folder")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one self-contained HTML page, and its figures as PDF and SVG")
    report.add_argument("folder", metavar="DIR")
    report.add_argument("--out", metavar="FILE", help="default DIR/report.html; figures/ is written beside it")
    figure = commands.add_parser("figure", help="one figure for a paper")
    figure.add_argument("name", metavar="NAME")
    figure.add_argument("folder", metavar="DIR")
    figure.add_argument("--format", help="pdf, svg or png; default: by the ending of --out, else pdf")
    figure.add_argument("--style", default="double", help="width: single or double column")
    figure.add_argument("--out", metavar="FILE", help="default NAME.FORMAT in the current folder")
    figure.add_argument("--trace", help="only these traces, separated by commas")
    figure.add_argument("--budget", help="budget as it was asked")
    figure.add_argument("--method", action="append", metavar="LABEL", help="only this method; may be repeated")
    return parser


def _figure(asked):
    from .errors import UsageError, nearest
    from .figures import ALL
    from .report import scopes, write_whole
    from .results import load
    from .style import FORMATS, WIDTHS, to_bytes

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
    picture = module.draw(results, asked.budget, asked.style)
    out = Path(asked.out or f"{asked.name}.{format}")
    write_whole(out, to_bytes(picture, format))
    print(out)


def _report(asked):
    from .report import write
    from .results import load

    print(write(load(asked.folder), asked.out))


def main(argv=None):
    asked = _parser().parse_args(argv)
    try:
        from .errors import Absent, ResultsError, UsageError
        command = {"report": _report, "figure": _figure}[asked.command]
        try:
            command(asked)
            return 0
        except UsageError as error:
            print(f"kvreplay {asked.command}: {error}", file=sys.stderr)
            return USAGE
        except (Absent, ResultsError) as error:
            print(f"kvreplay {asked.command}: {error}", file=sys.stderr)
            return OTHER
        except OSError as error:
            print(f"kvreplay {asked.command}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
            return OTHER
    except ModuleNotFoundError as error:
        print(f"kvreplay {asked.command}: the Python package {error.name} is missing from {sys.executable}; "
              "run scripts/setup, or set KVREPLAY_PYTHON to an interpreter that has the packages of "
              "analysis/requirements.txt", file=sys.stderr)
        return OTHER
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
