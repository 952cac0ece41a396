"""What can go wrong, each in one sentence that a stranger can act on."""


class ResultsError(Exception):
    """The results folder is missing, unreadable or not what kvreplay writes."""


class UsageError(Exception):
    """Something was asked for that does not exist; the message names what is allowed."""


class Absent(Exception):
    """A figure or a column cannot be made from this run; the message says why and how to get it."""


def nearest(name, allowed):
    """', did you mean X?' where some allowed name is close, else nothing."""
    import difflib

    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
