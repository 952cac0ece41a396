"""How figures look: one colour per method for ever, sizes of a paper's columns, files whose bytes do not change."""

import io
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass

import matplotlib

if "MPLBACKEND" not in os.environ and "matplotlib.pyplot" not in sys.modules:
    matplotlib.use("Agg")  # no display is needed; a notebook keeps the backend that shows figures in it
import matplotlib.pyplot as plt  # noqa: E402

# Readable on white and on near-black, told apart in the common forms of colour blindness together with the markers.
# A method keeps its colour in every figure of every run: the colour belongs to the part that decides what is read.
_METHODS = {
    "full": ("#8a8a8a", "o"),
    "random": ("#a08770", "X"),
    "streaming": ("#56b4e9", "s"),
    "h2o": ("#0072b2", "o"),
    "tova": ("#00a88f", "^"),
    "snapkv": ("#e8762d", "D"),
    "knorm": ("#9a8f2a", "v"),
    "keydiff": ("#b07aa1", "P"),
    "momentum": ("#cc3355", "s"),
    "residual": ("#7f5fd0", "^"),
    "given": ("#6f8fa8", "h"),
    "quest": ("#2c8f4f", "D"),
    "kivi": ("#c2571a", "p"),
    "topk": ("#b58a00", "*"),
    "oracle_mass": ("#d58fb8", "*"),
    "oracle_greedy": ("#a0589a", "*"),
}
_SPARE_COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b6992d", "#af7aa1", "#9c755f"]
_SPARE_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "h", "<", ">", "p"]
DASHES = ["-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]  # dots are for oracles
_PLOTLY_DASH = {0: "solid", 1: "dash", 2: "dashdot", 3: "longdashdot", 4: "longdash"}
_PLOTLY_MARKER = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross",
                  "X": "x", "*": "star", "h": "hexagon", "<": "triangle-left", ">": "triangle-right",
                  "p": "pentagon"}

COMPENSATORS = {"none": ("#8a8a8a", "o"), "mean": ("#56b4e9", "s"), "moments": ("#0072b2", "o"),
                "gaussian": ("#e8762d", "^"), "clusters": ("#2c8f4f", "D")}
COMPENSATOR_TITLES = {"mean": "mean (zeroth order)", "moments": "moments (first order)",
                      "gaussian": "gaussian (second-order mass)"}

GREY = "#8a8a8a"
WIDTHS = {"single": 3.35, "double": 6.9}  # inches
FORMATS = ("pdf", "svg", "png")


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    dash: int  # index into DASHES
    oracle: bool

    @property
    def line(self):
        return DASHES[self.dash]

    @property
    def plotly_dash(self):
        return _PLOTLY_DASH[self.dash]

    @property
    def plotly_marker(self):
        return _PLOTLY_MARKER[self.marker] + ("-open" if self.oracle else "")

    @property
    def face(self):
        return "none" if self.oracle else self.colour


def deciding_part(method):
    """h2o of `h2o:window=8+adakv`; quest of `full+quest`; momentum of `snapkv/momentum`."""
    parts = [p.split(":")[0] for p in method.split("/")[-1].split("+")]
    return parts[1] if parts[0] == "full" and len(parts) > 1 else parts[0]


def _without_pool(method):
    return re.sub(r"[:,]pool=decode(?=[+/]|$)", "", method.replace("pool=decode,", ""))


def looks(results):
    """{label: Look}. A method and itself at pool=decode differ in the line alone (solid, dashed); other variants of
    a method share its colour and differ in line and marker."""
    first = results.cells.drop_duplicates("label")
    variants, out = {}, {}
    for what in first.itertuples():
        part = deciding_part(what.method)
        oracle = what.foresight == "oracle"
        key = zlib.crc32(part.encode())
        colour, marker = _METHODS.get(part, (_SPARE_COLOURS[key % len(_SPARE_COLOURS)],
                                             "*" if oracle else _SPARE_MARKERS[key % len(_SPARE_MARKERS)]))
        # A variant is known by its own text, so that leaving another method out of a run changes nothing.
        text = _without_pool(what.method)
        if text in (part, f"full+{part}"):
            out[what.label] = Look(colour, marker, int(text != what.method), oracle)
            continue
        taken = variants.setdefault(part, set())
        hashed = zlib.crc32(what.method.encode())
        choices = [(2 + (hashed + i) % (len(DASHES) - 2), _SPARE_MARKERS[(hashed + i) % len(_SPARE_MARKERS)])
                   for i in range(len(_SPARE_MARKERS) * (len(DASHES) - 2))]
        dash, marker = next((c for c in choices if c not in taken and c[1] != marker), choices[0])
        taken.add((dash, marker))
        out[what.label] = Look(colour, marker, dash, oracle)
    return out


def compensator_look(text):
    """(colour, marker) of a compensator: the colour of its kind; a variant has a marker of its own."""
    name = text.split(":")[0]
    key = zlib.crc32(text.encode())
    colour, marker = COMPENSATORS.get(name, (_SPARE_COLOURS[key % len(_SPARE_COLOURS)], "o"))
    return colour, marker if text == name else _SPARE_MARKERS[3 + key % (len(_SPARE_MARKERS) - 3)]


def plotly_marker(marker):
    return _PLOTLY_MARKER[marker]


def compensator_title(text):
    return COMPENSATOR_TITLES.get(text, text)


def shown_name(label, foresight):
    return f"{label} (oracle)" if foresight == "oracle" and "oracle" not in label else label


RC = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5,
    "xtick.labelsize": 6.8, "ytick.labelsize": 6.8, "legend.fontsize": 6.8, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.45, "axes.axisbelow": True, "lines.linewidth": 1.2, "lines.markersize": 3.2,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "legend.frameon": False, "pdf.fonttype": 42, "ps.fonttype": 42,
    "svg.hashsalt": "kvreplay", "svg.fonttype": "path", "savefig.dpi": 200, "figure.dpi": 100,
    "axes.formatter.use_mathtext": False,
    "axes.titleweight": "bold", "axes.titlelocation": "left",
}


def paper(draw):
    """Runs a drawing function under the paper settings, whatever the notebook around it has set."""
    from functools import wraps

    @wraps(draw)
    def drawn(*args, **kwargs):
        with plt.rc_context({**matplotlib.rcParamsDefault, "backend": matplotlib.get_backend(), **RC}):
            return draw(*args, **kwargs)

    return drawn


def to_bytes(figure, format):
    """The figure as a file's content: same figure, same bytes."""
    metadata = {"pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": "kvreplay"},
                "svg": {"Date": None, "Creator": "kvreplay"}, "png": {"Software": "kvreplay"}}[format]
    out = io.BytesIO()
    with plt.rc_context(RC):
        if figure.get_layout_engine():
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine(None)  # the layout is found: no format needs to search for it again
            for ax in figure.axes:
                ax.apply_aspect()  # limits that follow from the place: a drawing goes on from what the last one had
                # The search's last digits are not the same each time.
                bounds = ax.get_position(original=True).bounds
                ax.set_position([round(b, 6) for b in bounds])
        figure.savefig(out, format=format, metadata=metadata)
    return out.getvalue()


def grid(n_panels, style, height, max_columns=None, **kwargs):
    """Figure and flat list of axes for a row (or a few) of panels; height in inches per row of panels."""
    columns = min(n_panels, max_columns or (1 if style == "single" else 3))
    rows = -(-n_panels // columns)
    width = WIDTHS[style]
    if style == "double" and n_panels == 1:
        width *= 0.62
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained",
                                **kwargs)
    axes = list(axes.flat)
    for unused in axes[n_panels:]:
        unused.set_visible(False)
    return figure, axes[:n_panels]


def legend_below(figure, handles, style):
    """One legend for all panels, under them, its columns as wide as the longest name needs; the figure grows by it."""
    if not handles:
        return
    longest = max(len(h.get_label()) for h in handles)
    columns = max(1, min(len(handles), int(WIDTHS[style] * 72 / (30 + 4.1 * longest))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.4)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.13 + 0.145 * -(-len(handles) // columns))


def plain_log(axis):
    """Ticks of a logarithmic axis as plain numbers: 0.1, 1, 128."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 9
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if decades < 1.9 else (1, 3) if decades < 2.6 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
