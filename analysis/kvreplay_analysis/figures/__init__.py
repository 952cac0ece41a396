"""The figures, one module each. Every module has

    NAME, TITLE, HOW_TO_READ   what it is called, and one sentence on how to read it
    data(results, budget)      {part: tidy frame}: exactly what is drawn; raises Absent where the run cannot tell
    draw(results, budget, style, frames)   matplotlib figure for a paper
    interactive(results, frames)           {variant: plotly figure as a dict} for the page

A figure of one head (OF_A_HEAD) takes layer, head and, where STEPS says so, step in data and draw; the page draws it
itself for the head that is chosen there, from what details.py embeds.
"""

from . import (correction, decode, error_resident, head, heads, layers, league, mass_error, mismatch, pareto, pca, ranks,
               raster, taxonomy)

ALL = {module.NAME: module for module in (error_resident, league, pareto, correction, mismatch, mass_error, layers, heads,
                                           head, raster, pca, taxonomy, decode, ranks)}


def of_a_head(module):
    return getattr(module, "OF_A_HEAD", False)
