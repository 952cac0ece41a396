"""The page: self-contained, its console clean, and whatever a run lacks said in words."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_results
import numpy as np
import pytest
from fake_results import Plan

import kvreplay_analysis as ka
from kvreplay_analysis import figures, report
from kvreplay_analysis.__main__ import main
from kvreplay_analysis.errors import Absent
from kvreplay_analysis.style import looks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WINDOW = "1400,1000"
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: the page was not opened")

H2O = ("h2o", "h2o", "evictable", "none")
FULL = ("full", "full", "evictable", "none")


def opened(page, query=""):
    """(what the console said, the document after its scripts ran)."""
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                           "--virtual-time-budget=60000", f"--window-size={WINDOW}", "--dump-dom",
                           f"{Path(page).resolve().as_uri()}{query}"],
                          capture_output=True, text=True, timeout=180)
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line], done.stdout


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    return report.write(ka.load(folder), tmp_path_factory.mktemp("page") / "index.html")


def test_page_is_self_contained(written):
    text = written.read_text()
    outside_blobs = re.sub(r'<script type="application/octet-stream".*?</script>', "", text, flags=re.S)
    assert len(outside_blobs) < len(text) - 1_000_000
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", outside_blobs)
    assert "@import" not in outside_blobs and "url(" not in outside_blobs
    absent = {"raster", "pca"}  # this run has no --detail
    for name in figures.ALL:
        for format, magic in (("pdf", b"%PDF"), ("svg", b"<?xml")):
            file = written.parent / "figures" / f"{name}.{format}"
            assert not file.exists() if name in absent else file.read_bytes().startswith(magic)
    assert b"/Type3" not in (written.parent / "figures" / "decode.pdf").read_bytes()


def test_page_says_what_it_must(written, folder):
    text = written.read_text()
    run = json.loads((folder / "run.json").read_text())
    assert run["open_loop"] in text and "f" * 16 in text and run["git"] in text
    assert "a &lt;host&gt; &amp; co" in text and "a <host>" not in text
    assert "sliding window 256 is shorter" in text
    numbers = text[text.index('id="tables"'):]
    assert numbers.count(">oracle</span>") == 4  # one method at four budgets
    assert "Not run at <code>pool=decode</code>: random, streaming, tova, snapkv" in text
    assert "Incomplete run" not in text
    for title in ("Prompt evictable", "Prompt pinned (pool=decode)", "Per-step selection"):
        assert f"<h3>{title}</h3>" in text


def test_same_run_same_page(tmp_path):
    results = ka.load(fake_results.write(tmp_path / "r", Plan(methods=[H2O, FULL], budgets=[32], layers=[0])))
    assert report.page(results) == report.page(results)


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_opens_with_a_clean_console(written, theme):
    console, document = opened(written, f"?theme={theme}")
    assert console == []
    assert 'data-ready="yes"' in document and f'data-theme="{theme}"' in document
    assert document.count('class="main-svg"') >= 6
    assert "Data: by_layer (CSV)" in document


def driven(page, script, folder):
    """What a script that drives the page by its own controls puts into its title, and a clean console."""
    waits = """<script>
      const settled = async () => {
        await new Promise((r) => setTimeout(r, 50));
        while (document.documentElement.dataset.ready !== "yes" || !document.documentElement.dataset.head) {
          await new Promise((r) => setTimeout(r, 50));
        }
      };
      const set = async (select, value) => {
        select.value = value;
        select.dispatchEvent(new Event("change"));
        await settled();
      };
      const press = (key) => document.getElementById("heat").dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      const shown = (element) => element.getClientRects().length > 0;
      addEventListener("load", async () => { await settled(); document.title = JSON.stringify(await drive()); });
      """
    copy = folder / "driven.html"
    copy.write_text(Path(page).read_text().replace("</body>", f"{waits}{script}</script></body>"))
    console, document = opened(copy)
    assert console == []
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document)[1]))


@needs_browser
def test_sorting_filtering_and_choosing(written, tmp_path):
    """Drives the page by its own controls and reads what they did from the document."""
    assert driven(written, """async function drive() {
      const table = document.querySelector("#tables .scope:not([hidden]) table.sortable");
      const sort = table.querySelector('[data-column="error_output"]');
      const column = [...table.querySelectorAll("thead button")].indexOf(sort);
      const values = () => [...table.tBodies[0].rows].map((r) => Number(r.children[column].dataset.v));
      sort.click();
      const up = values();
      sort.click();
      const down = values();
      const ordered = up.every((v, i) => !i || up[i - 1] <= v) && down.every((v, i) => !i || down[i - 1] >= v);
      [...document.querySelectorAll("#methods input")].find((b) => b.value === "tova").click();
      await set(document.getElementById("budget"), "3");
      const drawn = document.querySelector("#figure-decode .plot").data.map((t) => t.meta);
      return {ordered, rows: up.length, shown: drawn.includes("h2o"), gone: !drawn.includes("tova"),
        rowGone: [...document.querySelectorAll('tr[data-label="tova"]')].every((r) => r.hidden),
        budget: budget.selectedOptions[0].textContent};
    }""", tmp_path) == {"ordered": True, "rows": 37, "shown": True, "gone": True, "rowGone": True, "budget": "256"}


@needs_browser
def test_league_is_chosen_and_sorted(written, tmp_path):
    got = driven(written, """async function drive() {
      const rows = () => [...document.querySelectorAll("#league tbody tr")].filter(shown);
      const near = new Set(rows().map((r) => r.dataset.budget));
      await set(document.getElementById("league-budget"), "all");
      const all = rows().length;
      await set(document.getElementById("league-equal"), "bytes");
      const equal = rows().every((r) => r.closest(".league").dataset.equal === "bytes");
      const table = rows()[0].closest("table");
      const rank = table.querySelector('[data-column="rank"]');
      rank.click();
      const ranks = rows().map((r) => r.children[1].dataset.v);
      return {near: [...near], more: all > 20, equal, sort: rank.closest("th").getAttribute("aria-sort"),
        first: ranks[0], last: ranks.at(-1)};
    }""", tmp_path)
    assert got == {"near": ["64", ""], "more": True, "equal": True, "sort": "ascending", "first": "1.0", "last": ""}


@pytest.fixture(scope="module")
def detailed(tmp_path_factory):
    """(folder, page) of a run with everything that --detail writes, on two traces of one model."""
    plan = Plan(methods=[FULL, H2O, ("snapkv", "snapkv", "evictable", "none"), ("streaming", "streaming", "evictable",
                                                                                "none"),
                         ("full+quest", "full+quest", "selection", "none")], budgets=[32, 64], layers=[2, 5, 7],
                traces=[("a", "m", 64, 150), ("b", "m", 80, 130)], detail=("steps", "retained", "outputs"),
                output_steps=(10, 100))
    out = fake_results.write(tmp_path_factory.mktemp("detailed") / "run", plan)
    page = out / "page.html"
    page.write_text(report.page(ka.load(out)))
    return out, page


@needs_browser
def test_a_click_and_the_keyboard_show_a_head(detailed, tmp_path):
    out, page = detailed
    got = driven(page, """async function drive() {
      const heat = document.getElementById("heat");
      const plot = heat.querySelector(".plot");
      const headPlot = document.querySelector('[data-name="head"] .plot');
      const curve = () => headPlot.data.find((t) => t.name === "error_output").y;
      plot.emit("plotly_click", {points: [{x: "3", y: "5"}]});
      await settled();
      const clicked = {title: document.getElementById("h-panel").textContent, curve: curve(),
        raster: document.querySelector('[data-name="raster"] .plot').data[0].z.length,
        worst: [...document.querySelectorAll("#worst tbody tr")].map((r) => Number(r.cells[0].textContent)),
        names: headPlot.data.map((t) => t.name)};
      heat.focus();
      for (const key of ["ArrowDown", "ArrowDown", "ArrowRight", "ArrowDown", "ArrowUp"]) { press(key); }
      const said = document.getElementById("heat-at").textContent;
      press("Enter");
      await settled();
      const typed = {title: document.getElementById("h-panel").textContent, said, shapes: plot.layout.shapes.length};
      press("ArrowRight");
      press(" ");
      await settled();
      typed.space = document.getElementById("h-panel").textContent;
      const trace = document.querySelector('#panel [data-part="trace"]');
      await set(trace, "b");
      return {clicked, typed, other: curve().length, traces: [...trace.options].map((o) => o.value)};
    }""", tmp_path)
    results = ka.load(out)
    label, budget = "h2o", results.default_budget
    frames = figures.head.data(results.only(trace="a", label=label), budget, layer=5, head=3)
    assert got["clicked"]["title"] == f"One head: layer 5, query head 3, {label}, budget {budget}"
    np.testing.assert_allclose(got["clicked"]["curve"], frames["curves"]["error_output"], rtol=5.1e-3)
    assert got["clicked"]["worst"] == list(frames["worst"]["step"])
    assert got["clicked"]["raster"] == figures.raster.N_TOKEN_BINS
    assert "with moments (first order)" in got["clicked"]["names"] and "worst steps" in got["clicked"]["names"]
    assert "layer 5, query head 1" in got["typed"]["title"] and got["typed"]["shapes"] == 2
    assert re.match(r"Layer 5, query head 1: error_output 0\.\d+\. Enter", got["typed"]["said"])
    assert "layer 5, query head 2" in got["typed"]["space"]
    assert got["traces"] == ["a", "b"] and got["other"] == 3


@needs_browser
def test_the_plane_follows_head_and_step(detailed, tmp_path):
    out, page = detailed
    got = driven(page, """async function drive() {
      const plane = document.getElementById("plane");
      const part = (name) => plane.querySelector(`[data-part="${name}"]`);
      const seen = () => ({rows: [...document.querySelectorAll("#angles tbody tr")].map((r) => [...r.cells].map((c) => c.textContent)),
        caption: document.querySelector("#angles caption").textContent, text: document.querySelector("#angles p").textContent,
        xy: plane.querySelector(".plot").data.map((t) => [t.x[1], t.y[1]])});
      await set(part("label"), "snapkv");
      await set(part("layer"), "7");
      await set(part("head"), "4");
      await set(part("step"), "10");
      const one = seen();
      await set(part("step"), "100");
      const other = seen();
      await set(part("label"), "full");
      return {one, other, steps: [...part("step").options].map((o) => o.value), heat: document.querySelector("#figure-heads .variant select").value,
        reason: plane.querySelector(".absent").textContent, gone: !shown(plane.querySelector(".plot"))};
    }""", tmp_path)
    results = ka.load(out).only(trace="a", label="snapkv")
    for seen, step in ((got["one"], 10), (got["other"], 100)):
        frames = figures.pca.data(results, results.default_budget, layer=7, head=4, step=step)
        vectors, plane = frames["vectors"], frames["plane"].iloc[0]
        assert seen["caption"] == f"snapkv, layer 7, query head 4, step {step}"
        np.testing.assert_allclose(seen["xy"], vectors[["x", "y"]], rtol=5.1e-3)
        assert [row[0] for row in seen["rows"]] == [figures.pca.shown(v) for v in vectors["vector"]]
        for row, v in zip(seen["rows"], vectors.itertuples()):
            assert float(row[1]) == pytest.approx(v.length, rel=5.1e-3)
            assert float(row[2].rstrip("°")) == pytest.approx(figures.pca.degrees(v.cos_f_E), abs=0.51)
            assert float(row[3].rstrip("°")) == pytest.approx(figures.pca.degrees(v.cos_f_R), abs=0.51)
        assert f"The plane holds {100 * plane['explained']:.1f} %" in seen["text"]
    assert got["gone"] and "evicted nothing" in got["reason"]
    assert got["heat"] == "full"


@needs_browser
def test_results_without_details_say_how_to_get_them(written, tmp_path):
    got = driven(written, """async function drive() {
      const reason = (name) => document.querySelector(`[data-name="${name}"] > .absent`);
      return {raster: reason("raster").textContent, pca: reason("pca").textContent, shown: shown(reason("raster")),
        curves: shown(document.querySelector('[data-name="head"] .plot')), worst: document.querySelector("#worst caption").textContent};
    }""", tmp_path)
    assert got["shown"] and got["curves"]
    assert "--detail retained" in got["raster"] and "--detail outputs --steps LIST" in got["pca"]
    assert "Worst 64 steps on end" in got["worst"] and "--detail steps" in got["worst"]


@needs_browser
@pytest.mark.parametrize("width", [1400, 900])
def test_nothing_is_wider_than_the_window_or_on_top_of_another(detailed, tmp_path, width):
    """Sections follow each other; what is too wide scrolls inside its own box."""
    script = """async function drive() {
      const blocks = [...document.querySelectorAll("main > *, figure > *, .panel > *, .of-head > *")].filter(shown)
        .filter((e) => getComputedStyle(e).position === "static");
      const overlaps = [];
      for (const e of blocks) {
        const next = [...e.parentElement.children].slice([...e.parentElement.children].indexOf(e) + 1).find((n) => shown(n) &&
          getComputedStyle(n).position === "static");
        if (next && next.getBoundingClientRect().top < e.getBoundingClientRect().bottom - 1) { overlaps.push(e.tagName + e.className); }
      }
      const boxes = [...document.querySelectorAll("#panel .beside > *")].map((e) => e.getBoundingClientRect());
      const apart = boxes.every((a, i) => boxes.every((b, j) => i >= j || a.right <= b.left + 1 || a.bottom <= b.top + 1));
      const cut = [...document.querySelectorAll(".plot svg.main-svg")].filter(shown)
        .filter((svg) => svg.getBoundingClientRect().height < 300).length;
      return {overlaps, apart, cut, wide: document.documentElement.scrollWidth - innerWidth};
    }"""
    _, page = detailed
    got = driven(page, script, tmp_path) if width == 1400 else narrow(page, script, tmp_path)
    assert got == {"overlaps": [], "apart": True, "cut": 0, "wide": got["wide"]} and got["wide"] <= 0


def narrow(page, script, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "WINDOW", "900,1000")
        return driven(page, script, folder)


def test_every_control_has_a_name_and_a_place_in_the_order(detailed):
    """No positive tabindex, every button and choice is labelled, the skip links lead somewhere."""
    _, page = detailed
    text = page.read_text()
    body = text[text.index("<body>"):text.index('<script type="application/json"')]
    assert not re.search(r'tabindex="[1-9]', body)
    assert re.search(r'<a class="skip" href="#overview">', body) and 'id="overview"' in body
    for button in re.findall(r"<button[^>]*>(.*?)</button>", body, flags=re.S):
        assert re.sub("<[^>]*>", "", button).strip()
    assert len(re.findall(r"<select", body)) == len(re.findall(r"<label[^>]*>[^<]*<select", body))
    assert body.count('role="application"') == 1 and 'aria-live="polite"' in body
    for region in re.findall(r'<div[^>]*role="region"[^>]*>', body):
        assert "aria-label=" in region and 'tabindex="0"' in region


def test_incomplete_run_is_flagged(tmp_path):
    out = fake_results.write(tmp_path / "r", Plan(methods=[H2O], budgets=[32], layers=[1], complete=False))
    assert "Incomplete run." in report.page(ka.load(out))


@pytest.mark.parametrize("plan", [
    Plan(methods=[H2O], budgets=[32], layers=[3], n_heads=1, n_kv_heads=1, traces=[("one", "m", 1, 40)]),
    Plan(methods=[FULL], layers=[0]),
    Plan(methods=[H2O, FULL], compensators=[]),
    Plan(methods=[H2O], budgets=[16], traces=[("a", "m", 64, 100), ("b", "m", 32, 70)], layers=[0, 1]),
    Plan(methods=[H2O], budgets=[16], traces=[("a", "m", 64, 100), ("b", "other", 32, 70)], layers=[0]),
    Plan(methods=[H2O], budgets=[64], detail=("steps",), layers=[0]),
    Plan(methods=[FULL], layers=[0], n_heads=2, n_kv_heads=1, detail=("steps", "retained", "outputs")),
    Plan(methods=[H2O], budgets=[32], layers=[3], n_heads=1, n_kv_heads=1, traces=[("one", "m", 1, 40)],
         compensators=[], complete=False, detail=("steps", "retained", "outputs")),
    Plan(methods=[H2O, FULL], budgets=[16], traces=[("a", "m", 64, 100), ("b", "other", 32, 70)], layers=[0],
         detail=("retained", "outputs")),
], ids=["one-of-everything", "full-only", "no-compensators", "two-traces", "two-models", "steps", "full-detailed",
        "one-head-detailed", "two-models-detailed"])
def test_small_and_odd_runs(tmp_path, plan):
    out = fake_results.write(tmp_path / "r", plan)
    page = out / "page.html"
    page.write_text(report.page(ka.load(out)))
    if CHROMIUM:
        console, document = opened(page)
        assert console == [] and 'data-ready="yes"' in document and "data-head=" in document
    for module in figures.ALL.values():
        try:
            module.draw(ka.load(out), style="single")
        except Absent as reason:
            assert len(str(reason)) > 20


def test_absent_figures_say_why(tmp_path):
    out = fake_results.write(tmp_path / "r", Plan(methods=[H2O, FULL], budgets=[32], compensators=[], layers=[0]))
    results = ka.load(out)
    with pytest.raises(Absent, match="--compensators mean,moments,gaussian"):
        figures.correction.data(results)
    (out / "figures").mkdir()
    (out / "figures" / "correction.pdf").write_bytes(b"of an earlier run")
    page = report.write(results)
    assert (page.parent / "figures" / "decode.pdf").exists()
    assert not (page.parent / "figures" / "correction.pdf").exists()


def test_a_hundred_configurations(tmp_path):
    methods = [(f"h2o:window={w}", f"h2o:window={w}", "evictable", "none") for w in range(1, 26)]
    out = fake_results.write(tmp_path / "r", Plan(methods=methods, layers=[0, 1], traces=[("story", "m", 128, 128)]))
    page = tmp_path / "page.html"
    page.write_text(report.page(ka.load(out)))
    assert page.stat().st_size < 8_000_000
    figures.error_resident.draw(ka.load(out))
    styles = looks(ka.load(out))
    assert len({(s.colour, s.marker, s.dash) for s in styles.values()}) == 25
    if CHROMIUM:
        console, document = opened(page)
        assert console == [] and 'data-ready="yes"' in document


def test_colour_belongs_to_the_method_not_to_the_run(results, tmp_path):
    alone = ka.load(fake_results.write(tmp_path / "r", Plan(methods=[H2O], layers=[0], budgets=[32])))
    assert looks(alone)["h2o"] == looks(results)["h2o"]
    both = looks(results)
    assert both["h2o"].colour == both["h2o:pool=decode"].colour
    assert both["h2o"].dash != both["h2o:pool=decode"].dash
    named = [looks(results)[m].colour for m in ("h2o", "tova", "snapkv", "momentum", "residual", "streaming")]
    assert len(set(named)) == 6


def test_several_traces_are_pooled_only_within_a_model(tmp_path):
    plan = Plan(methods=[H2O], budgets=[16], layers=[0],
                traces=[("a", "m", 64, 128), ("b", "m", 64, 128), ("c", "other", 64, 128)])
    chosen = report.scopes(ka.load(fake_results.write(tmp_path / "r", plan)))
    assert [(t, s.traces) for t, s in chosen] == [("a", ["a"]), ("b", ["b"]), ("c", ["c"]),
                                                  ("m: 2 traces pooled", ["a", "b"])]


def test_nan_blocks_do_not_spread(tmp_path):
    """A head that never counts leaves the other heads' numbers alone."""
    import h5py

    out = fake_results.write(tmp_path / "r", Plan(methods=[H2O], budgets=[32], layers=[0]))
    before = ka.load(out)
    expected = figures.decode.data(before)["blocks"]
    with h5py.File(out / "results.h5", "r+") as file:
        blocks = file["blocks/000000/error_output"]
        rest = blocks[1:].mean(axis=0)
        blocks[0] = np.nan
    got = figures.decode.data(ka.load(out))["blocks"]
    np.testing.assert_allclose(got["error_output"], rest)
    assert not np.allclose(got["error_output"], expected["error_output"])
    report.page(ka.load(out))


# --- the command line ---------------------------------------------------------------------------------------------

def said(capsys):
    text = capsys.readouterr().err.strip()
    assert text and "\n" not in text and "Traceback" not in text
    return text


def test_missing_folder(capsys, tmp_path):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in said(capsys)
    assert main(["report", str(tmp_path)]) == 2
    assert "no run.json and no summary.csv and no results.h5" in said(capsys)


@pytest.mark.parametrize("break_it, expected", [
    (lambda d: (d / "run.json").write_text("{"), "run.json is not readable JSON"),
    (lambda d: (d / "summary.csv").write_text("trace,layer\n"), "column kv_head is missing"),
    (lambda d: (d / "summary.csv").write_text((d / "summary.csv").read_text().replace(",mean,", ",moan,", 1)),
     "column mean is missing"),
    (lambda d: (d / "results.h5").write_bytes((d / "results.h5").read_bytes()[:1000]), "results.h5 cannot be read"),
    (lambda d: (d / "results.h5").write_bytes(b""), "results.h5 cannot be read"),
    (lambda d: (d / "summary.csv").write_text((d / "summary.csv").read_text().replace("error,512,", "error,many,", 1)),
     "not a number"),
], ids=["json", "columns", "column", "truncated", "empty", "text"])
def test_malformed_folder(capsys, tmp_path, break_it, expected):
    out = fake_results.write(tmp_path / "r", Plan(methods=[H2O], budgets=[32], layers=[0]))
    break_it(out)
    assert main(["report", str(out)]) == 1
    assert expected in said(capsys)
    assert not (out / "report.html").exists()


def test_wrong_words_name_the_nearest(capsys, folder, tmp_path):
    for argv, expected in [
            (["figure", "headss", str(folder)], "did you mean heads?"),
            (["figure", "heads", str(folder), "--format", "pfd"], "did you mean pdf?"),
            (["figure", "heads", str(folder), "--out", str(tmp_path / "x.jpeg")], "format jpeg is none of pdf"),
            (["figure", "heads", str(folder), "--style", "triple"], "single, double"),
            (["figure", "heads", str(folder), "--budget", "65"], "which has 32, 64, 128, 256"),
            (["figure", "heads", str(folder), "--method", "h20"], "did you mean h2o?"),
            (["figure", "heads", str(folder), "--layer", "4"], "figure heads has no --layer (given 4)"),
            (["figure", "head", str(folder), "--step", "4"], "that is for pca"),
            (["figure", "head", str(folder), "--layer", "5"], "layer 5 is not in"),
            (["figure", "head", str(folder), "--head", "8"], "heads 0 to 7"),
            (["figure", "heads", str(folder), "--trace", "storey"], "did you mean story?"),
            (["figure", "heads", str(folder), "--out", str(tmp_path / "no" / "x.pdf")], "does not exist"),
            (["report", str(folder), "--out", str(tmp_path)], "is a folder")]:
        assert main(argv) == 2
        assert expected in said(capsys)


def test_figure_command(capsys, folder, tmp_path):
    for style, width in (("single", 3.35), ("double", 6.9)):
        out = tmp_path / f"{style}.png"
        assert main(["figure", "decode", str(folder), "--out", str(out), "--style", style, "--budget", "128",
                     "--method", "h2o", "--method", "momentum"]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        from PIL import Image

        assert Image.open(out).width == pytest.approx(width * 200, rel=0.06)


def test_figures_of_one_head(capsys, detailed, tmp_path):
    out, _ = detailed
    for name, more in (("head", []), ("raster", []), ("pca", ["--step", "100"])):
        for format in ("pdf", "svg"):
            to = tmp_path / f"{name}.{format}"
            assert main(["figure", name, str(out), "--trace", "b", "--method", "h2o", "--layer", "5", "--head", "3",
                         "--style",
                         "single", "--out", str(to), *more]) == 0
            assert to.stat().st_size > 4000
    capsys.readouterr()


def test_figures_of_one_head_say_what_is_missing(capsys, folder):
    for name, expected in (("raster", "--detail retained"), ("pca", "--detail outputs --steps LIST")):
        assert main(["figure", name, str(folder)]) == 1
        assert expected in said(capsys)


def test_missing_package_names_the_set_up(folder):
    """An interpreter without the packages: one sentence, exit code 1."""
    done = subprocess.run([sys.executable, "-S", "-m", "kvreplay_analysis", "report", str(folder)],
                          cwd=Path(report.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1
    assert "scripts/setup" in done.stderr and "\n" not in done.stderr.strip()
