"""The figures, one module each. Every module has

    NAME, TITLE, HOW_TO_READ   what it is called, and one sentence on how to read it
    data(results, budget)      {part: tidy frame}: exactly what is drawn; raises Absent where the run cannot tell
    draw(results, budget, style, frames)   matplotlib figure for a paper
    interactive(results, frames)           {variant: plotly figure as a dict} for the page
"""

from . import correction, decode, error_resident, heads, mass_error, mismatch

ALL = {module.NAME: module for module in (error_resident, correction, mismatch, mass_error, heads, decode)}
