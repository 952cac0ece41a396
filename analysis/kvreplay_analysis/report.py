"""`kvreplay report DIR`: one self-contained page, and its figures as PDF and SVG beside it."""

import base64
import gzip
import json
import math
import os
import tempfile
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from . import details, figures, findings
from .errors import Absent, UsageError
from .figures.common import at_budget
from .results import GROUPS
from .scopes import scopes
from .style import compensator_look, compensator_title, looks, plotly_marker, plt, shown_name, to_bytes
from .tables import configurations, not_pinned

PAGE = Path(__file__).parent / "page"
N_POINTS_PAGE = 60000  # scatter points in the whole page
PAGE_BYTES = 14_500_000  # what the page may weigh; details of single heads are embedded for as long as there is room

OPEN_LOOP = ("Replay is open-loop (teacher-forced): queries come from the uncompressed run, so errors do not compound "
             "across layers and steps.")


def write_whole(path, content):
    """The file appears under its name whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: the folder {path.parent} does not exist")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write(results, out=None):
    """Writes the page and figures/ beside it; returns the page's path."""
    with results.opened():
        return _write(results, out)


def _write(results, out):
    out = Path(out) if out else results.folder / "report.html"
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of the page, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: the folder {out.parent} does not exist")
    chosen = scopes(results)
    folder = out.parent / "figures"
    folder.mkdir(exist_ok=True)
    files = {}
    for name, module in figures.ALL.items():
        files[name] = []
        for format in ("pdf", "svg"):
            (folder / f"{name}.{format}").unlink(missing_ok=True)
        try:
            picture = _drawn(module, chosen[0][1])
        except Absent:
            continue
        for format in ("pdf", "svg"):
            write_whole(folder / f"{name}.{format}", to_bytes(picture, format))
            files[name].append(f"figures/{name}.{format}")
        plt.close(picture)
    write_whole(out, page(results, chosen, files).encode())
    return out


def page(results, chosen=None, files=None, page_bytes=PAGE_BYTES):
    """The page as text."""
    chosen = chosen or scopes(results)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters.update(number=number, exact=exact, text=as_text, breakable=breakable, share=share)
    methods = _methods(results)
    listing = [{"name": name, "title": module.TITLE, "how": module.HOW_TO_READ, "by_budget": module.BY_BUDGET,
                "of_a_head": figures.of_a_head(module)} for name, module in figures.ALL.items()]
    blobs = {"plotly": _packed(_plotly()), **_blobs(chosen)}
    shown = {"run": results.run, "results": results, "groups": GROUPS, "methods": methods,
             "colours": {m["label"]: m["colour"] for m in methods},
             "open_loop": results.run.get("open_loop") or OPEN_LOOP, "figures": listing, "files": files or {},
             "scopes": [_scope(title, scope) for title, scope in chosen], "compensators": results.compensators,
             "compensator_title": compensator_title, "not_pinned": not_pinned(results), "traces": _traces(results),
             "css": (PAGE / "report.css").read_text(encoding="utf-8"),
             "page_js": (PAGE / "page.js").read_text(encoding="utf-8"),
             "js": (PAGE / "report.js").read_text(encoding="utf-8"),
             "failed": [as_text(f) for f in results.run.get("failed") or []], "state_pairs": _state_pairs(results),
             "default_budget": chosen[0][1].default_budget}
    template = environment.get_template("report.html")

    def rendered(more, held):
        meta = {"methods": methods, "figures": listing, "file": results.folder.resolve().name, "held": held,
                "compensators": {c: {"colour": compensator_look(c)[0], "symbol": plotly_marker(compensator_look(c)[1]),
                                     "title": compensator_title(c)} for c in results.compensators},
                "scopes": [{"title": title, "budgets": scope.budgets, "default_budget": scope.default_budget,
                            "traces": scope.traces} for title, scope in chosen]}
        return template.render(**shown, meta=_json(meta), blobs={**blobs, **more})

    room = page_bytes - len(rendered({}, "").encode())
    more, full = details.pack(results, _packed, room)
    return rendered(more, details.sentence(results, more, full))


def _methods(results):
    """What is said of each method."""
    look = looks(results)
    described = {m.get("label"): m for m in results.run.get("methods", []) if isinstance(m, dict)}
    out = []
    for m in results.cells.drop_duplicates("label").itertuples():
        said = described.get(m.label, {})
        out.append({"label": m.label, "shown": shown_name(m.label, m.foresight), "method": m.method, "group": m.group,
                    "foresight": m.foresight, "colour": look[m.label].colour, "paper": as_text(said.get("paper")),
                    "deviation": as_text(said.get("deviation"))})
    return out


def _scope(title, scope):
    """What the page says of the traces that are pooled together: findings, league, tables."""
    table = configurations(scope)
    leagues = {equal: _league(scope, equal) for equal in ("tokens", "bytes")}
    found, at_bytes = findings.best(leagues["tokens"]), findings.best(leagues["bytes"], compensated=True)
    foresight = dict(zip(table["label"], table["foresight"]))
    words = findings.sentences(scope, table, found, at_bytes, number=lambda v: number(v, 3),
                               shown=lambda label: shown_name(label, foresight.get(label, "none")))
    return {"title": title, "findings": words, "best": found.to_dict("records"),
            "league": {equal: frame.to_dict("records") for equal, frame in leagues.items()}, "tables": _tables(table)}


def _league(scope, equal):
    """The league at equal tokens or bytes; empty where the run has nothing to rank."""
    from .league import league

    try:
        return league(scope, at=equal)
    except Absent:
        return pd.DataFrame()


def _plotly():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _json(value):
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _blobs(chosen):
    """{'SCOPE/BUDGET-NUMBER/FIGURE': gzip + base64 of the figure's variants, note and data}."""
    n_drawn = sum(max(1, len(scope.budgets)) * max(1, scope.cells["label"].nunique() * max(1, len(scope.compensators)))
                  for _, scope in chosen)
    n_points = {"correction": max(24, min(500, N_POINTS_PAGE // n_drawn)),
                "mass_error": max(200, min(4000, N_POINTS_PAGE // sum(max(1, len(s.budgets)) for _, s in chosen)))}
    blobs = {}
    for i, (_, scope) in enumerate(chosen):
        for name, module in figures.ALL.items():
            if figures.of_a_head(module):
                continue
            for b, budget in enumerate((scope.budgets or [""]) if module.BY_BUDGET else [None]):
                blobs[f"{i}/{b}/{name}"] = _packed(_one(module, scope, budget, n_points.get(name)))
    return blobs


def _drawn(module, scope):
    if figures.of_a_head(module):
        return module.draw(scope)
    return module.draw(scope, frames=_frames(module, scope, scope.default_budget if module.BY_BUDGET else None)[1])


def _frames(module, scope, budget, n_points=None):
    """(the run as a figure sees it, its data), once for the files and the page."""
    whole = budget is None or getattr(module, "SEES_ALL_BUDGETS", False)
    shown = scope if whole else at_budget(scope, budget)[0]
    more = {"n_points": n_points} if n_points else {}
    return shown, scope.once(("frames", module.NAME, budget, n_points), lambda: module.data(shown, budget, **more))


def _one(module, scope, budget, n_points):
    try:
        shown, frames = _frames(module, scope, budget, n_points)
        return {"variants": module.interactive(shown, frames), "note": module.note(shown, frames),
                "csv": {part: frame.to_csv(index=False, float_format="%.6g", lineterminator="\r\n")
                        for part, frame in frames.items()}}
    except Absent as reason:
        return {"absent": str(reason)}


def _packed(value):
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _state_pairs(results):
    """[(trace, head_dim, key-value pairs that weigh as much as a first-order state in float32)]."""
    n_bytes = {"float16": 2, "bfloat16": 2, "float32": 4, "f16": 2, "bf16": 2, "f32": 4}
    out = []
    for trace in results.run.get("traces", []):
        head_dim, element = trace.get("head_dim"), n_bytes.get(trace.get("element"))
        if isinstance(head_dim, int) and element:
            out.append((trace.get("stem"), head_dim, 2 * (head_dim + 2) // element))
    return out


def _tables(table):
    """[(group, its rows)] for the groups that have any, in the report's order."""
    order = [*GROUPS, *sorted(set(table["group"]) - set(GROUPS))]
    return [(group, table[table["group"] == group].to_dict("records")) for group in order
            if (table["group"] == group).any()]


def _traces(results):
    """What is said of each trace, as text."""
    out = []
    for trace in results.run.get("traces", []):
        if not isinstance(trace, dict):
            continue
        n_tokens, prompt_len = trace.get("n_tokens"), trace.get("prompt_len")
        decode = n_tokens - prompt_len if isinstance(n_tokens, int) and isinstance(prompt_len, int) else ""
        skipped = trace.get("layers_skipped") or []
        out.append({
            "name": as_text(trace.get("stem")), "model": as_text(trace.get("model_name") or trace.get("name")),
            "architecture": as_text(trace.get("architecture")),
            "provenance": as_text(trace.get("provenance") or trace.get("generator")), "n_tokens": as_text(n_tokens),
            "prompt_len": as_text(prompt_len), "decode": decode, "element": as_text(trace.get("element")),
            "layers": as_text(trace.get("layers")),
            "n_layers": results.cells.loc[results.cells["trace"] == trace.get("stem"), "layer"].nunique(),
            "hash": as_text(trace.get("content_hash")),
            "skipped": "; ".join(f"{s.get('layer')}: {s.get('reason')}" if isinstance(s, dict) else str(s)
                                 for s in skipped)})
    return out


def breakable(name):
    """A column's name that may wrap after an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def as_text(value):
    """Any value of run.json on one line."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{k} {as_text(v)}" for k, v in value.items() if v not in (None, ""))
    if isinstance(value, list):
        return ", ".join(as_text(v) for v in value)
    return str(value)


def number(value, digits=4):
    """A number for reading: 4 significant digits, an en dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value is pd.NA:
        return "–"
    value = float(value)
    if value == 0 or value.is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}".replace(",", "\u2009")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:#.{digits}g}".rstrip(".")


def share(value):
    """A share for reading: 41 %; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %".replace("-", "−")


def exact(value):
    """The same number for sorting and for reading by programs."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return repr(float(value))
