"""Tables, figures and the report over kvreplay results.

    import kvreplay_analysis as ka
    results = ka.load("out")                       # frames: results.summary, results.cells
    ka.configurations(results)                     # one row per method and budget
    ka.figures.error_resident.draw(results)     # a matplotlib figure; .data(results) is what it shows
"""

import importlib

_WHERE = {"Absent": "errors", "ResultsError": "errors", "UsageError": "errors", "Results": "results", "load": "results",
          "configurations": "tables", "compare": None, "explain": None, "figures": None, "latency": None,
          "league": None, "ranks": None, "taxonomy": None, "tradeoffs": None, "tune": None}
__all__ = list(_WHERE)


def __getattr__(name):
    # Loaded when asked for, so that a missing numpy is a sentence of the command line and not a traceback.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if _WHERE[name] is None:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
