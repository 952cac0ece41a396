"""The page of `kvreplay explain`: the frames of explain.py as figures, tables and sentences."""

from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from . import explain as ka
from .errors import Absent, UsageError
from .explain_figures import FIGURES, colours, percent, quoted, shown, visible
from .report import OPEN_LOOP, PAGE, _json, _packed, as_text, breakable, exact, number, write_whole
from .scopes import scopes
from .style import compensator_title

N_LISTED = 25  # tokens in a table

# What the table of numbers shows: (metric, per compensator, what it says).
NUMBERS = [
    ("error_output", False, "what the method as written returns, against full attention"),
    ("error", False, "plain eviction of the same tokens"),
    ("evicted_mass", False, "share of the attention that went to evicted tokens"),
    ("error_parallel", False, "part of the error along f_R: a longer or shorter f_R would repair it"),
    ("error_orthogonal", False, "part of the error across f_R: no rescaling repairs it"),
    ("cos_retained_evicted", False, "cosine between retained and evicted output"),
    ("norm_ratio_evicted", False, "ln of the evicted output's length over the retained one's"),
    ("error_corrected", True, "the same eviction with this compensator"),
    ("error_exact_mass", True, "with the true mass: what is left is the direction half's error"),
    ("error_exact_direction", True, "with the true direction: what is left is the mass half's error"),
    ("logit_variance", False, "of the evicted logits"),
    ("logit_spread", False, "largest distance of an evicted logit from their mean"),
    ("resident", False, "tokens resident per KV head"),
    ("attended", False, "tokens attended per KV head"),
    ("bytes", False, "per KV head, with the state that the method itself carries"),
]


def write(ex, out=None, original=None):
    """Writes the page; returns its path."""
    out = Path(out) if out else ex.folder / "explain.html"
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of the page, such as {out / 'explain.html'}")
    write_whole(out, page(ex, original).encode())
    return out


def page(ex, original=None):
    """The page as text; original: the results that are explained, to say where the replay differs from them."""
    from plotly.offline import get_plotlyjs

    chosen = [(title, ex.only(scope)) for title, scope in scopes(ex.results)]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters.update(number=number, exact=exact, text=as_text, breakable=breakable)
    colour = colours(ex)
    cells = ex.results.cells.drop_duplicates("label").set_index("label")
    methods = [{"label": label, "shown": shown(ex, label), "method": cells.at[label, "method"],
                "colour": colour[label], "acting": cells.at[label, "compensator_acting"],
                "foresight": cells.at[label, "foresight"]} for label in ex.labels]
    drawn = [f for f in FIGURES if not (f.needs_two and len(ex.labels) < 2)]
    blobs = {f"{i}/{f.name}": _packed(f.content(scope)) for i, (_, scope) in enumerate(chosen) for f in drawn}
    blobs["plotly"] = _packed(get_plotlyjs())
    meta = {"scopes": [{"title": title} for title, _ in chosen]}

    def text(name):
        return (PAGE / name).read_text(encoding="utf-8")

    return environment.get_template("explain.html").render(
        ex=ex, run=ex.results.run, methods=methods, colours=colour, meta=_json(meta),
        open_loop=ex.results.run.get("open_loop") or OPEN_LOOP, sections=_sections(drawn),
        scopes=[{"title": title, **_tables(scope)} for title, scope in chosen],
        differs=ka.difference_to(ex, original) if original is not None else "",
        blobs=blobs,
        css=text("report.css"), own_css=text("explain.css"), page_js=text("page.js"), js=text("explain.js"))


def _sections(figures):
    out = {}
    for f in figures:
        out.setdefault(f.section, []).append(f)
    return out


# --- sentences and tables ---------------------------------------------------------------------------------------

def findings(ex):
    """What the numbers say, in sentences; the same on stdout and on the page."""
    out = []
    means = ka.headline(ex).set_index(["label", "metric", "compensator"])["mean"]
    try:
        parts = ka.parts(ex).set_index("label")
    except Absent as reason:
        return [f"{str(reason)[0].upper()}{reason_end(reason)}"]
    for label in ex.labels:
        if label not in parts.index:
            out.append(f"{label} loses nothing: no step holds 1e-6 of evicted mass.")
            continue
        p = parts.loc[label]
        out.append(
            f"{label}: error {number(means.get((label, 'error', ''), np.nan))} without a correction, "
            f"{number(means.get((label, 'error_output', ''), np.nan))} as the method returns it; "
            f"{percent(p.evicted_mass)} of the attention is lost, to outputs {number(p.distance, 3)} lengths of f "
            f"away; of the squared error {percent(p.orthogonal_share)} is orthogonal to what is kept, "
            f"{percent(p.parallel_share)} parallel.")
    try:
        for label, rows in ka.halves(ex).groupby("label", sort=False):
            removed = rows.pivot(index="compensator", columns="quantity", values="removed")
            best, own = removed["error_corrected"].idxmax(), set(rows.loc[rows["acting"], "compensator"])
            for c in dict.fromkeys([*own, best]):
                r = removed.loc[c]
                what = "its own correction" if c in own else "the best correction measured beside it"
                out.append(f"{label}: {what}, {compensator_title(c)}, removes {percent(r['error_corrected'])} of the "
                           f"plain error; its direction with the true mass would remove "
                           f"{percent(r['error_exact_mass'])}, its mass with the true direction "
                           f"{percent(r['error_exact_direction'])}.")
    except Absent:
        pass
    top = ka.top_tokens(ex, 10)
    for (label, trace), rows in top.groupby(["label", "trace"], sort=False):
        best = rows.iloc[0]
        out.append(f"{label} on {trace}: the ten worst of its evicted tokens do {percent(rows['share'].sum())} of the "
                   f"damage, the first, token {best.token}{quoted(best.text)}, {percent(best.share)}.")
    try:
        frame = ka.evictions(ex)
        for label, rows in frame.groupby("label", sort=False):
            again = rows["lag"].notna()
            later = rows.loc[~rows["at_prompt"], "age"]
            half = number(rows.loc[again, "lag"].median())
            out.append(f"{label}: {percent(again.mean())} of the evictions were of tokens that were needed again"
                       + (f", half of these within {half} {'step' if half == '1' else 'steps'}" if again.any() else "")
                       + f", on average in {percent(rows['missed'].sum() / rows['steps_without'].sum())} of the steps "
                         "without them"
                       + (f"; during the decode half of them left at an age of {number(later.median())} or less."
                          if len(later) else "."))
    except Absent:
        pass
    if len(ex.labels) == 2:
        a, b = ex.labels
        rows = ka.paired(ex, ("error_output",))
        if len(rows):
            r = rows[rows["layer"] == "all"].iloc[0]
            sure = r.low > 0 or r.high < 0
            out.append(
                f"{a} against {b}: error_output {number(r.a)} and {number(r.b)}, difference {_signed(r.difference)}"
                + (f" ({_signed(r.low)} to {_signed(r.high)})" if np.isfinite(r.low)
                   else ", too few steps for an interval")
                + ("" if sure or not np.isfinite(r.low) else ", no significant difference")
                + f"; {a} is better in {percent(r.wins)} of the head-steps, worse in {percent(r.losses)}.")
            f = ka.factors(ex).set_index("factor")["ratio"]
            if np.isfinite(f["evicted_mass"]) and np.isfinite(f["distance"]):
                out.append(f"Before any correction {a}'s error is {number(f['error'], 3)} times {b}'s: it loses "
                           f"{number(f['evicted_mass'], 3)} times the mass, and what it loses points "
                           f"{number(f['distance'], 3)} times as far away.")
    return out


def reason_end(reason):
    text = str(reason)[1:]
    return text if text.endswith(".") else text + "."


def _signed(x):
    return "–" if not np.isfinite(x) else f"{'+' if x > 0 else '−' if x < 0 else ''}{number(abs(x), 3)}"


def numbers(ex):
    """The table of numbers: metric, compensator, doc, then a mean for each label (exactly summary.csv's), n, n_skipped
    of the first label."""
    means = ka.headline(ex).set_index(["label", "metric", "compensator"])
    rows = []
    for metric, per_compensator, doc in NUMBERS:
        for c in ex.results.compensators if per_compensator else [""]:
            row = {"metric": metric, "compensator": c, "doc": doc}
            for label in ex.labels:
                at = (label, metric, c)
                row[label] = float(means.at[at, "mean"]) if at in means.index else np.nan
                row[f"n {label}"] = int(means.at[at, "n"]) if at in means.index else 0
            if any(np.isfinite(row[label]) for label in ex.labels):
                rows.append(row)
    return pd.DataFrame(rows)


def _tables(ex):
    out = {"findings": findings(ex), "numbers": numbers(ex).to_dict("records"), "paired": [], "tokens": [], "steps": []}
    if len(ex.labels) == 2:
        out["paired"] = ka.paired(ex).to_dict("records")
    tokens = ka.top_tokens(ex, N_LISTED)
    out["tokens"] = tokens.assign(shown=tokens["text"].map(visible)).to_dict("records")
    out["has_text"] = bool((tokens["text"] != "").any())
    steps = ka.worst_steps(ex).to_dict("records")
    for row in steps:
        row["names"] = ", ".join(f"{c['token']}{quoted(c['text'])} {percent(c['share'])}" for c in row["culprits"])
    out["steps"] = steps
    return out


def as_json(ex, written):
    """The numbers of the page for programs; no number is null."""
    def records(make):
        try:
            frame = make()
        except Absent as reason:
            return {"absent": str(reason)}
        return [{k: _plain(v) for k, v in row.items()} for row in frame.to_dict("records")]

    out = {"page": str(written), "folder": str(ex.folder), **ex.said, "findings": findings(ex),
           "means": records(lambda: ka.headline(ex)), "parts": records(lambda: ka.parts(ex)),
           "halves": records(lambda: ka.halves(ex)), "spread": records(lambda: ka.spread_bins(ex)),
           "worst_steps": records(lambda: ka.worst_steps(ex)), "tokens": records(lambda: ka.top_tokens(ex)),
           "ages": records(lambda: ka.ages(ex)), "lags": records(lambda: ka.lags(ex)),
           "spans": records(lambda: ka.span_bias(ex))}
    if len(ex.labels) == 2:
        out["paired"], out["factors"] = records(lambda: ka.paired(ex)), records(lambda: ka.factors(ex))
    return out


def _plain(value):
    """Numbers as JSON has them: null where there is none."""
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
