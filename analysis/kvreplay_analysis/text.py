"""Frames as text: tables for a terminal, records for JSON."""

import math


def number(value):
    """Four significant digits; '-' where there is no number."""
    if isinstance(value, str):
        return value
    return "-" if value != value else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def aligned(table):
    """Lines of a table of texts: the first column and one without a title to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(w) if i == 0 or not table[0][i] else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in table]


def records(frame):
    """Rows of a frame as JSON can hold them, every digit kept; what is no finite number becomes null."""
    return [{name: _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _plain(value):
    if value is None or isinstance(value, (str, bool)):
        return value
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (int, bool)) else float(value) if _is_finite(value) else None


def _is_finite(value):
    try:
        return math.isfinite(value)
    except TypeError:  # pandas' missing integer
        return False
