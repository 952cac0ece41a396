"""The commands, one module each: `add(commands)` declares the arguments, `run(asked)` does it.

A command prints its result on stdout and raises UsageError, Absent or ResultsError with one sentence. Modules import
what they need inside `run`, so that a missing package is a sentence of the command line and not a traceback.
"""

from . import compare, explain, figure, league, report, tradeoffs, tune

ALL = {"report": report, "figure": figure, "compare": compare, "league": league, "tradeoffs": tradeoffs,
       "explain": explain, "tune": tune}
