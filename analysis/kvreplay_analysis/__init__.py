"""Tables, figures and the report over kvreplay results.

    import kvreplay_analysis as ka
    results = ka.load("out")                       # frames: results.summary, results.cells
    ka.configurations(results)                     # one row per method and budget
    ka.figures.error_resident.draw(results)     # a matplotlib figure; .data(results) is what it shows
"""

from .errors import Absent, ResultsError, UsageError
from . import figures
from .results import Results, load
from .tables import configurations

__all__ = ["Absent", "Results", "ResultsError", "UsageError", "configurations", "figures", "load"]
