"""`python -m kvreplay_analysis COMMAND ...`; `kvreplay` calls this."""

import argparse
import os
import sys

from . import commands

USAGE, OTHER = 2, 1


def _parser():
    parser = argparse.ArgumentParser(prog="kvreplay", description="Analysis of results folders")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in commands.ALL.values():
        command.add(subparsers)
    return parser


def main(argv=None):
    asked = _parser().parse_args(argv)
    try:
        from .errors import Absent, ResultsError, UsageError
        try:
            code = commands.ALL[asked.command].run(asked) or 0
            sys.stdout.flush()
            return code
        except UsageError as error:
            print(f"kvreplay {asked.command}: {error}", file=sys.stderr)
            return USAGE
        except (Absent, ResultsError) as error:
            print(f"kvreplay {asked.command}: {error}", file=sys.stderr)
            return OTHER
        except BrokenPipeError:  # its reader has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
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
