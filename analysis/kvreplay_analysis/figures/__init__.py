"""The figures, one module each. Every module has

    NAME, TITLE, HOW_TO_READ   what it is called, and one sentence on how to read it
    data(results, budget)      {part: tidy frame}: exactly what is drawn; raises Absent where the run cannot tell
    draw(results, budget, style, frames)   matplotlib figure for a paper
    interactive(results, frames)           {variant: plotly figure as a dict} for the page
"""

from . import correction, decode, error_resident, heads, league, mass_error, mismatch, pareto, ranks, taxonomy

ALL = {module.NAME: module for module in (error_resident, league, pareto, correction, mismatch, mass_error,
                                             heads, taxonomy, decode, ranks)}
