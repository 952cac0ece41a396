"""The page: self-contained, its console clean, and whatever a run lacks said in words."""

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
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: the page was not opened")

H2O = ("h2o", "h2o", "evictable", "none")
FULL = ("full", "full", "evictable", "none")


def opened(page, query=""):
    """(what the console said, the document after its scripts ran)."""
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                           "--virtual-time-budget=60000", "--dump-dom", f"{Path(page).resolve().as_uri()}{query}"],
                          capture_output=True, text=True, timeout=180)
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line], done.stdout


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    return report.write(ka.load(folder), tmp_path_factory.mktemp("page") / "index.html")


def test_page_is_self_contained(written):
    text = written.read_text()
    outside_plotly = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.S)
    assert len(outside_plotly) < len(text) - 1_000_000
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", outside_plotly)
    assert "@import" not in outside_plotly and "url(" not in outside_plotly
    for name in figures.ALL:
        for format, magic in (("pdf", b"%PDF"), ("svg", b"<?xml")):
            assert (written.parent / "figures" / f"{name}.{format}").read_bytes().startswith(magic)
    assert b"/Type3" not in (written.parent / "figures" / "decode.pdf").read_bytes()


def test_page_says_what_it_must(written, folder):
    text = written.read_text()
    run = json.loads((folder / "run.json").read_text())
    assert run["open_loop"] in text and "f" * 16 in text and run["git"] in text
    assert "a &lt;host&gt; &amp; co" in text and "a <host>" not in text
    assert "sliding window 256 is shorter" in text
    assert text.count(">oracle</span>") == 4  # one method at four budgets
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


@needs_browser
def test_sorting_filtering_and_choosing(written, tmp_path):
    """Drives the page by its own controls and reads what they did from the document."""
    script = """<script>addEventListener("load", async () => {
      const table = document.querySelector(".scope:not([hidden]) table.sortable");
      const sort = table.querySelector('[data-column="error_output"]');
      const column = [...table.querySelectorAll("thead button")].indexOf(sort);
      const values = () => [...table.tBodies[0].rows].map((r) => Number(r.children[column].dataset.v));
      sort.click();
      const up = values();
      sort.click();
      const down = values();
      const ordered = up.every((v, i) => !i || up[i - 1] <= v) && down.every((v, i) => !i || down[i - 1] >= v);
      const box = [...document.querySelectorAll("#methods input")].find((b) => b.value === "tova");
      box.click();
      const budget = document.getElementById("budget");
      budget.value = "3";
      budget.dispatchEvent(new Event("change"));
      await new Promise((r) => setTimeout(r, 200));
      while (document.documentElement.dataset.ready !== "yes") { await new Promise((r) => setTimeout(r, 50)); }
      const shown = document.querySelector("#figure-decode .plot").data.map((t) => t.meta);
      document.title = JSON.stringify({ordered, rows: up.length, shown: shown.includes("h2o"),
        gone: !shown.includes("tova"),
        rowGone: [...document.querySelectorAll('tr[data-label="tova"]')].every((r) => r.hidden),
        budget: budget.selectedOptions[0].textContent});
    });</script></body>"""
    page = tmp_path / "driven.html"
    page.write_text(written.read_text().replace("</body>", script))
    console, document = opened(page)
    assert console == []
    assert json.loads(re.search(r"<title>(.*?)</title>", document)[1].replace("&quot;", '"')) == {
        "ordered": True, "rows": 37, "shown": True, "gone": True, "rowGone": True, "budget": "256"}


def test_incomplete_run_is_flagged(tmp_path):
    out = fake_results.write(tmp_path / "r", Plan(methods=[H2O], budgets=[32], layers=[1], complete=False))
    assert "Incomplete run." in report.page(ka.load(out))


@pytest.mark.parametrize("plan", [
    Plan(methods=[H2O], budgets=[32], layers=[3], n_heads=1, n_kv_heads=1, traces=[("one", "m", 1, 40)]),
    Plan(methods=[FULL], layers=[0]),
    Plan(methods=[H2O, FULL], compensators=[]),
    Plan(methods=[H2O], budgets=[16], traces=[("a", "m", 64, 100), ("b", "m", 32, 70)], layers=[0, 1]),
    Plan(methods=[H2O], budgets=[16], traces=[("a", "m", 64, 100), ("b", "other", 32, 70)], layers=[0]),
    Plan(methods=[H2O], budgets=[64], detail_steps=True, layers=[0]),
], ids=["one-of-everything", "full-only", "no-compensators", "two-traces", "two-models", "steps"])
def test_small_and_odd_runs(tmp_path, plan):
    out = fake_results.write(tmp_path / "r", plan)
    page = report.write(ka.load(out))
    if CHROMIUM:
        console, document = opened(page)
        assert console == [] and 'data-ready="yes"' in document
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
    out = fake_results.write(tmp_path / "r", Plan(methods=methods, layers=[0, 1]))
    page = tmp_path / "page.html"
    page.write_text(report.page(ka.load(out)))
    assert page.stat().st_size < 12_000_000
    figures.error_resident.draw(ka.load(out))
    styles = looks(ka.load(out))
    assert len({(s.colour, s.marker, s.dash) for s in styles.values()}) == 25
    if CHROMIUM:
        assert opened(page)[0] == []


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
            (["figure", "hed", str(folder)], "did you mean heads?"),
            (["figure", "heads", str(folder), "--format", "pfd"], "did you mean pdf?"),
            (["figure", "heads", str(folder), "--out", str(tmp_path / "x.jpeg")], "format jpeg is none of pdf"),
            (["figure", "heads", str(folder), "--style", "triple"], "single, double"),
            (["figure", "heads", str(folder), "--budget", "65"], "which has 32, 64, 128, 256"),
            (["figure", "heads", str(folder), "--method", "h20"], "did you mean h2o?"),
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


def test_missing_package_names_the_set_up(folder):
    """An interpreter without the packages: one sentence, exit code 1."""
    done = subprocess.run([sys.executable, "-S", "-m", "kvreplay_analysis", "report", str(folder)],
                          cwd=Path(report.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1
    assert "scripts/setup" in done.stderr and "\n" not in done.stderr.strip()
