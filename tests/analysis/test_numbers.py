"""What figures and tables show is what the results say: recomputed from the files by other means than the package's."""

import csv

import h5py
import numpy as np
import pytest

from kvreplay_analysis import configurations, figures


@pytest.fixture(scope="module")
def rows(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def pooled(rows, label, budget, metric, compensator="", **more):
    n = total = 0.0
    for r in rows:
        if (r["label"], r["budget"], r["metric"], r["compensator"]) == (label, budget, metric, compensator) and \
                all(r[k] == str(v) for k, v in more.items()) and r["mean"]:
            n += int(r["n"])
            total += int(r["n"]) * float(r["mean"])
    return total / n


def test_table_is_the_mean_over_counted_steps(results, rows):
    table = configurations(results, bands=False).set_index(["label", "budget"])
    for label, budget in [("h2o", "64"), ("momentkv", "128"), ("momentum", "32"), ("full", ""),
                          ("full+quest:page=16", "256")]:
        for column in ("resident", "bytes", "error_output", "error", "evicted_mass"):
            assert table.at[(label, budget), column] == pytest.approx(pooled(rows, label, budget, column), rel=1e-12)
    for c in ("mean", "moments", "gaussian"):
        assert table.at[("h2o", "64"), f"error_corrected.{c}"] == pytest.approx(
            pooled(rows, "h2o", "64", "error_corrected", c), rel=1e-12)


def test_skipped_steps_are_added_up(results, rows):
    table = configurations(results, bands=False).set_index(["label", "budget"])
    for label, budget in [("momentum", "32"), ("full", "")]:
        expected = sum(int(r["n_skipped"]) for r in rows
                       if (r["label"], r["budget"], r["metric"]) == (label, budget, "cos_retained_evicted"))
        assert expected > 0
        assert table.at[(label, budget), "n_skipped_cos"] == expected


def test_error_against_resident_is_the_table(results):
    table = configurations(results).set_index(["label", "budget"])
    lines = figures.error_resident.data(results)["lines"]
    assert len(lines) == len(table)
    for p in lines.itertuples():
        row = table.loc[(p.label, p.budget)]
        assert p.error_output == row["error_output"]
        assert p.tokens == row["attended" if row["group"] == "selection" else "resident"]
        assert (p.low, p.high) == (row["error_output_low"], row["error_output_high"])


def test_bands_rest_on_blocks_whose_mean_is_the_tables(results):
    """The interval's centre (from results.h5) and the table's mean (from summary.csv) are the same number."""
    from kvreplay_analysis import bootstrap

    table = configurations(results, bands=False).set_index(["label", "budget"])
    for label, budget in [("h2o", "64"), ("momentum", "32")]:
        mine = results.only(label=label).with_cells(results.only(label=label).cells["budget"] == budget)
        estimate, low, high = bootstrap.interval(bootstrap.totals(mine, [("error_output", "")]), bootstrap.mean)
        assert estimate == pytest.approx(table.at[(label, budget), "error_output"], rel=1e-12)
        assert low < estimate < high


def cell_of(folder, **wanted):
    with h5py.File(folder / "results.h5") as file:
        columns = {k: file["cells"][k].asstr()[()] if file["cells"][k].dtype.kind == "O" else file["cells"][k][()]
                   for k in wanted}
        found, = np.flatnonzero(np.all([columns[k] == v for k, v in wanted.items()], axis=0))
        group = file[f"blocks/{found:06d}"]
        return {k: group[k][()] for k in group}


def test_share_removed_by_layer(results, folder):
    frames = figures.correction.data(results, "64")
    for c in ("mean", "moments", "gaussian"):
        for layer in (0, 8):
            blocks = cell_of(folder, label="snapkv", budget="64", layer=layer)
            expected = 1 - blocks[f"error_corrected.{c}"].sum() / blocks["error"].sum()
            by_layer = frames["by_layer"].set_index(["label", "compensator", "layer"])
            assert by_layer.at[("snapkv", c, layer), "removed"] == pytest.approx(expected, rel=1e-12)


def test_correction_points_are_block_means(results, folder):
    points = figures.correction.data(results, "64")["points"]
    some = points[(points["label"] == "snapkv") & (points["compensator"] == "moments") & (points["layer"] == 4)]
    blocks = cell_of(folder, label="snapkv", budget="64", layer=4)
    assert len(some) > 50
    for p in some.itertuples():
        assert p.error == blocks["error"][p.head, p.block]
        assert p.error_corrected == blocks["error_corrected.moments"][p.head, p.block]


def test_mismatch_quantiles(results, folder):
    ecdf = figures.mismatch.data(results, "128")["ecdf"]
    tova = ecdf[ecdf["label"] == "tova"]
    values = np.concatenate([cell_of(folder, label="tova", budget="128", layer=layer)["directional_mismatch"].ravel()
                             for layer in (0, 4, 8, 11)])
    assert tova["n"].iloc[0] == np.isfinite(values).sum()
    middle = tova.iloc[(tova["fraction"] - 0.5).abs().argmin()]
    assert middle["directional_mismatch"] == pytest.approx(np.nanmedian(values), rel=1e-3)


def test_mass_and_error_points_are_heads_of_the_summary(results, rows):
    heads = figures.mass_error.data(results, "64")["heads"]
    assert set(heads["label"]) == set(results.labels) - {"full"}
    for p in heads[heads["label"] == "h2o"].itertuples():
        for metric in ("evicted_mass", "error"):
            assert getattr(p, metric) == pytest.approx(
                pooled(rows, "h2o", "64", metric, layer=p.layer, q_head=p.q_head), rel=1e-12)


def test_heat_map(results, rows):
    heads = figures.heads.data(results, "64")["heads"]
    for p in heads[heads["label"] == "residual"].itertuples():
        assert p.error_output == pytest.approx(
            pooled(rows, "residual", "64", "error_output", layer=p.layer, q_head=p.q_head), rel=1e-12)


def test_error_along_the_decode(results, folder):
    blocks = figures.decode.data(results, "64")["blocks"]
    line = blocks[blocks["label"] == "h2o"].set_index("block")
    mean = np.mean([cell_of(folder, label="h2o", budget="64", layer=layer)["error_output"]
                    for layer in (0, 4, 8, 11)], axis=(0, 1))
    np.testing.assert_allclose(line["error_output"], mean, rtol=1e-12)
    assert line.at[0, "step"] == 32


def test_drawn_lines_hold_the_data(results):
    """The matplotlib figure itself, not only its frame."""
    frames = figures.error_resident.data(results)
    picture = figures.error_resident.draw(results, frames=frames)
    drawn = {tuple(np.round(line.get_ydata(), 12)) for ax in picture.axes for line in ax.get_lines()}
    for _, line in frames["lines"].groupby("label"):
        assert tuple(np.round(line.sort_values("tokens")["error_output"], 12)) in drawn


@pytest.fixture(scope="module")
def detailed(tmp_path_factory):
    """A run with everything that --detail writes."""
    import fake_results

    plan = fake_results.Plan(methods=[m for m in fake_results.Plan().methods if m[0] in DETAILED], budgets=[32, 64],
                             layers=[0, 3], traces=[("story", "made-up-model", 96, 200)], output_steps=(10, 100, 150),
                             detail=("steps", "retained", "outputs"))
    return fake_results.write(tmp_path_factory.mktemp("detailed") / "out", plan)


DETAILED = ("full", "streaming", "h2o", "snapkv", "momentkv", "oracle_mass", "momentum", "full+quest:page=16")


@pytest.fixture(scope="module")
def detailed_results(detailed):
    from kvreplay_analysis import load

    return load(detailed)


def index_of(folder, **wanted):
    with h5py.File(folder / "results.h5") as file:
        columns = {k: file["cells"][k].asstr()[()] if file["cells"][k].dtype.kind == "O" else file["cells"][k][()]
                   for k in wanted}
    found, = np.flatnonzero(np.all([columns[k] == v for k, v in wanted.items()], axis=0))
    return int(found)


@pytest.mark.parametrize("style", ["single", "double"])
def test_same_figure_same_bytes(detailed_results, style):
    from kvreplay_analysis.errors import Absent
    from kvreplay_analysis.style import plt, to_bytes

    drawn = []
    for module in figures.ALL.values():
        for format in ("pdf", "svg"):
            try:
                first, second = (to_bytes(module.draw(detailed_results, style=style), format) for _ in range(2))
            except Absent:
                continue
            plt.close("all")
            assert first == second, (module.NAME, format)
            assert b"CreationDate" not in first and b"<dc:date>" not in first
            drawn.append(module.NAME)
    assert {"error_resident", "correction", "mismatch", "mass_error", "layers", "heads", "head", "raster", "pca",
            "decode"} <= set(drawn)


def test_error_by_layer_is_the_summarys(results, rows):
    frames = figures.layers.data(results, "64")
    error = frames["error"].set_index(["label", "budget", "layer"])
    for label, budget, layer in [("h2o", "32", 0), ("h2o", "256", 8), ("momentum", "64", 4)]:
        assert error.at[(label, budget, layer), "error"] == pytest.approx(
            pooled(rows, label, budget, "error", layer=layer), rel=1e-12)
        assert error.at[(label, budget, layer), "low"] < error.at[(label, budget, layer), "error"]
    removed = frames["removed"].set_index(["label", "compensator", "layer"])
    for c, layer in (("mean", 0), ("moments", 8)):
        row = removed.loc[("h2o", c, layer)]
        before = pooled(rows, "h2o", "64", "error", layer=layer)
        after = pooled(rows, "h2o", "64", "error_corrected", c, layer=layer)
        assert (row["error"], row["error_corrected"]) == pytest.approx((before, after), rel=1e-12)
        assert row["removed"] == pytest.approx(1 - after / before, rel=1e-12)
    means = frames["means"].set_index("label")
    table = configurations(results, bands=False).set_index(["label", "budget"])
    for metric in ("error", "evicted_mass", "cos_retained_evicted"):
        assert means.at["h2o", metric] == pytest.approx(table.at[("h2o", "64"), metric], rel=1e-12)
    assert "full" not in set(frames["error"]["label"])


def test_cosines_by_layer_are_those_of_the_steps(detailed_results, detailed):
    cos = figures.layers.data(detailed_results, "32")["cos"].set_index(["label", "layer"])
    with h5py.File(detailed / "results.h5") as file:
        cell = index_of(detailed, label="momentum", budget="32", layer=3)
        values = file[f"steps/{cell:06d}/cos_retained_evicted"][()].astype(float)
    row = cos.loc[("momentum", 3)]
    assert row["of"] == "steps" and row["n"] == np.isfinite(values).sum() < values.size
    for column, q in (("p5", 0.05), ("p25", 0.25), ("p50", 0.5), ("p95", 0.95)):
        assert row[column] == pytest.approx(np.nanquantile(values, q), rel=1e-12)


def test_the_papers_values_stay_apart(results):
    """They are reported, named with their source, and in no frame of this run's."""
    frames = figures.layers.data(results, "64")
    paper = frames["paper"]
    assert paper["source"].str.contains("2606.01563").all()
    of = paper.set_index("quantity")["low"]
    assert (of["mean of evicted_mass"], of["mean of cos_retained_evicted"], of["mean of error"]) == (0.075, -0.011,
                                                                                                     0.214)
    for part in ("error", "cos", "removed", "means"):
        assert set(frames[part]["label"]) <= set(results.labels)
    picture = figures.layers.draw(results, frames=frames)
    for ax in picture.axes:
        drawn = {tuple(np.round(line.get_ydata(), 12)) for line in ax.get_lines()}
        ours = {tuple(np.round(line["error"], 12)) for _, line in frames["error"].groupby(["label", "budget"])}
        theirs = {(0.77,), (0.65,), (0.33,), (0.28,)}
        assert not (drawn & ours and drawn & theirs)


def test_curves_and_worst_steps_of_a_head(detailed_results, detailed):
    mine = detailed_results.only(label="h2o")
    frames = figures.head.data(mine, "64", layer=3, head=5)
    cell = index_of(detailed, label="h2o", budget="64", layer=3)
    with h5py.File(detailed / "results.h5") as file:
        for column in ("error_output", "evicted_mass", "cos_retained_evicted", "error_corrected.moments"):
            np.testing.assert_array_equal(frames["curves"][column], file[f"blocks/{cell:06d}/{column}"][5])
        error = file[f"steps/{cell:06d}/error_output"][5].astype(float)
        mass = file[f"steps/{cell:06d}/evicted_mass"][5].astype(float)
    assert list(frames["curves"]["step"]) == [32, 96, 160, 196]
    worst = frames["worst"]
    assert set(worst["of"]) == {"steps"}
    assert list(worst["step"]) == sorted(range(len(error)), key=lambda i: -error[i])[:len(worst)]
    assert list(worst["error_output"]) == sorted(error, reverse=True)[:len(worst)]
    assert list(worst["evicted_mass"]) == list(mass[worst["step"]])


def test_without_steps_the_worst_blocks_are_shown(results, folder):
    worst = figures.head.data(results.only(label="tova"), "64", layer=4, head=2)["worst"]
    error = cell_of(folder, label="tova", budget="64", layer=4)["error_output"][2]
    assert set(worst["of"]) == {"blocks"}
    assert list(worst["step"]) == [64 * i for i in np.argsort(-error, kind="stable")[:len(worst)]]


def test_without_a_wish_the_worst_head_is_shown(results, rows):
    first = figures.head.data(results.only(label="h2o"), "64")["curves"].iloc[0]
    heads = {(r["layer"], r["q_head"]): float(r["mean"]) for r in rows
             if (r["label"], r["budget"], r["metric"]) == ("h2o", "64", "error_output")}
    assert max(heads, key=heads.get) == (str(first["layer"]), str(first["q_head"]))


def test_retained_share_counts_pairs():
    """Against a loop over tokens and steps."""
    rng = np.random.default_rng(4)
    prompt_len, n_steps, n_tokens = 9, 23, 32
    gone = rng.integers(0, n_steps + 1, (2, n_tokens)).astype(np.int32)
    gone[:, prompt_len:] = np.maximum(gone[:, prompt_len:], np.arange(n_tokens - prompt_len))
    tokens, steps, share = figures.raster.retained(gone, prompt_len, n_steps, 7, 5)
    for s in range(2):
        for i in range(len(tokens) - 1):
            for j in range(len(steps) - 1):
                written = kept = 0
                for p in range(tokens[i], tokens[i + 1]):
                    for t in range(steps[j], steps[j + 1]):
                        there = p - prompt_len <= t
                        written += there
                        kept += there and t < gone[s, p]
                assert share[s, i, j] == pytest.approx(kept / written) if written else np.isnan(share[s, i, j])


def test_attended_share_counts_pairs(detailed_results, detailed):
    cell = index_of(detailed, label="full+quest:page=16", budget="32", layer=0)
    bits = detailed_results.attended(cell)
    tokens, steps, share = figures.raster.of_cell(detailed_results, cell)
    h, i, j = 3, 20, 50
    written = kept = 0
    for p in range(tokens[i], tokens[i + 1]):
        for t in range(steps[j], steps[j + 1]):
            written += p - 96 <= t
            kept += p - 96 <= t and bits[h, t, p]
    assert written and share[h, i, j] == pytest.approx(kept / written)


def test_raster_reads_the_set_of_the_head(detailed_results):
    frame = figures.raster.data(detailed_results.only(label="h2o"), "32", layer=0, head=5)["share"]
    cell = int(detailed_results.only(label="h2o", budget="32", layer=0).cells.index[0])
    _, _, share = figures.raster.of_cell(detailed_results, cell)
    np.testing.assert_array_equal(frame["retained"], share[5 // 2].ravel())  # two query heads to a KV head


def test_principal_plane_against_the_gram_matrix(detailed_results, detailed):
    """Coordinates, share and angles from eigenvectors of the Gram matrix and the stored vectors themselves."""
    frames = figures.pca.data(detailed_results.only(label="h2o"), "32", layer=3, head=6, step=100)
    cell = index_of(detailed, label="h2o", budget="32", layer=3)
    with h5py.File(detailed / "results.h5") as file:
        group = file[f"outputs/{cell:06d}"]
        i = list(group.attrs["steps"]).index(100)
        x = np.stack([group[n][6, i] for n in frames["vectors"]["vector"]]).astype(float)
    assert list(frames["vectors"]["vector"]) == ["f", "f_R", "f_E", "f_E.mean", "f_E.moments", "f_E.gaussian"]
    values, vectors = np.linalg.eigh(x @ x.T)
    plane, drawn = frames["plane"].iloc[0], frames["vectors"]
    assert plane["explained"] == pytest.approx(values[-2:].sum() / values.sum(), rel=1e-9)
    for axis, k in (("x", -1), ("y", -2)):
        expected = vectors[:, k] * np.sqrt(values[k])
        sign = np.sign(expected[0 if axis == "x" else 2])
        np.testing.assert_allclose(drawn[axis], sign * expected, rtol=1e-7, atol=1e-9)
    for row, v in zip(drawn.itertuples(), x):
        assert row.length == pytest.approx(np.linalg.norm(v), rel=1e-12)
        assert row.cos_f_E == pytest.approx(v @ x[2] / np.linalg.norm(v) / np.linalg.norm(x[2]), rel=1e-9)
        assert row.in_plane == pytest.approx((row.x ** 2 + row.y ** 2) / (v @ v), rel=1e-9)
    assert plane["error"] == pytest.approx(np.linalg.norm(x[0] - x[1]) / np.linalg.norm(x[0]), rel=1e-9)
    w = plane["evicted_mass"]
    np.testing.assert_allclose(x[0], (1 - w) * x[1] + w * x[2], atol=1e-5)  # f = (1 − w_E) f_R + w_E f_E


def test_steps_without_evicted_tokens_have_no_plane(detailed_results):
    from kvreplay_analysis.errors import Absent, UsageError

    mine = detailed_results.only(label="momentum")
    with pytest.raises(Absent, match="evicted nothing at step 10"):
        figures.pca.data(mine, "32", layer=0, head=0, step=10)
    with pytest.raises(UsageError, match="which are 10, 100, 150"):
        figures.pca.data(mine, "32", layer=0, head=0, step=11)
    with pytest.raises(UsageError, match="heads 0 to 7"):
        figures.pca.data(mine, "32", layer=0, head=8)


# --- the page's own data ------------------------------------------------------------------------------------------

def blobs_of(text):
    import base64
    import gzip
    import html
    import json
    import re

    found = re.findall(r'<script type="application/octet-stream" data-key="([^"]*)">(.*?)</script>', text, flags=re.S)
    return {html.unescape(key): json.loads(gzip.decompress(base64.b64decode(blob))) for key, blob in found
            if key != "plotly"}


@pytest.fixture(scope="module")
def detailed_page(detailed_results):
    from kvreplay_analysis import report

    return report.page(detailed_results)


def test_page_holds_the_numbers_of_every_head(detailed_results, detailed, detailed_page):
    blobs = blobs_of(detailed_page)
    for label, budget in (("h2o", "32"), ("momentum", "64"), ("full", "")):
        found = blobs[f"head/story/{label}/{budget}"]
        assert found["layers"] == [0, 3]
        cell = index_of(detailed, label=label, budget=budget, layer=3)
        with h5py.File(detailed / "results.h5") as file:
            for name, curves in found["curves"].items():
                expected = file[f"blocks/{cell:06d}/{name}"][()]
                got = np.array([[np.nan if v is None else v for v in head] for head in curves[1]], float)
                np.testing.assert_allclose(got, expected, rtol=5.1e-3)
    planes = blobs["pca/story/h2o/32"]
    frames = figures.pca.data(detailed_results.only(label="h2o"), "32", layer=3, head=6, step=100)
    i = planes["steps"].index(100)
    np.testing.assert_allclose(planes["xy"][1][6][i], frames["vectors"][["x", "y"]], rtol=5.1e-3)
    np.testing.assert_allclose(planes["length"][1][6][i], frames["vectors"]["length"], rtol=5.1e-3)
    assert planes["explained"][1][6][i] == pytest.approx(frames["plane"]["explained"].iloc[0], rel=5.1e-3)
    rasters = blobs["raster/story/h2o/32"]
    share = figures.raster.data(detailed_results.only(label="h2o"), "32", layer=3,
                                head=6)["share"]["retained"].to_numpy()
    got = np.array(rasters["share"][1][rasters["sets"][1][6]], float).ravel()
    np.testing.assert_array_equal(got >= 0, np.isfinite(share))
    np.testing.assert_allclose(got[got >= 0], 100 * share[got >= 0], atol=0.5)
    assert "pca/story/full/" not in blobs  # nothing is evicted, so there is no f_E


def test_curves_of_long_runs_are_means_of_neighbouring_blocks():
    from kvreplay_analysis.details import _merged

    values = np.array([[1.0, 3.0, np.nan, 5.0, 7.0]])
    weights = np.array([64.0, 64, 64, 64, 16])
    np.testing.assert_allclose(_merged(values, weights, np.array([0, 2, 4])), [[2.0, 5.0, 7.0]])


def test_a_page_that_is_full_says_what_it_left_out(detailed_results, detailed_page):
    from kvreplay_analysis import details, report

    whole = blobs_of(detailed_page)
    limit = len(detailed_page.encode()) - 40_000
    text = report.page(detailed_results, page_bytes=limit)
    assert len(text.encode()) <= limit + 2_000  # the sentence itself
    held = [key for key in blobs_of(text) if key in whole and key.split("/")[0] in details.KINDS]
    n_heads = sum(key.startswith("head/") for key in held)
    assert 0 < len(held) < sum(key.split("/")[0] in details.KINDS for key in whole)
    assert f"of the {len(details.order(detailed_results))} configurations" in text
    full = {kind for kind in details.KINDS if sum(k.startswith(kind) for k in held) < sum(k.startswith(kind) for k in whole)}
    assert full
    for kind in full:
        assert f"the {details.KINDS[kind]} of {sum(k.startswith(kind + '/') for k in held)}" in text
    assert n_heads and held[0].split("/")[2:] == ["h2o", detailed_results.default_budget]


def test_league_of_the_page_is_the_league(detailed_results, detailed_page):
    import re

    from kvreplay_analysis.league import league

    for equal in ("tokens", "bytes"):
        frame = league(detailed_results, at=equal)
        part = detailed_page.split(f'class="league" data-equal="{equal}"')[1].split("</table>")[0]
        rows = re.findall(r'<tr data-label="([^"]*)" data-budget="([^"]*)">(.*?)</tr>', part, flags=re.S)
        assert len(rows) == len(frame) > 10
        for (_, budget, row), expected in zip(rows, frame.to_dict("records")):
            shown = re.findall(r'data-v="([^"]*)"', row)
            assert (shown[0], budget) == (expected["label"], expected["budget"])
            for text, column in zip(shown[4:10], ("at", "error_output", "closed", "resident", "bytes", "bytes_read")):
                value = expected[column]
                assert text == ("" if not np.isfinite(value) else repr(float(value)))


def test_findings_are_the_leagues_and_the_tables(detailed_results, detailed_page, detailed):
    """Every number of the sentences, found again by other means."""
    import re

    from kvreplay_analysis.findings import best, given_back, rests_on
    from kvreplay_analysis.league import league

    frame = league(detailed_results, at="tokens")
    found = best(frame)
    for row in found.itertuples():
        here = frame[(frame["group"] == row.group) & (frame["budget"] == row.budget)]
        methods = here[(here["foresight"] == "none") & here["error_output"].notna()]
        assert row.error_output == methods["error_output"].min() and row.n_methods == len(methods)
        assert methods.set_index("label").at[row.label, "rank"] == 1
        assert np.isnan(row.next_error) or row.next_error == sorted(methods["error_output"])[1]
    row = found[(found["group"] == "evictable") & (found["budget"] == detailed_results.default_budget)].iloc[0]
    text = " ".join(re.findall(r"<li>(Prompt evictable.*?)</li>", detailed_page, flags=re.S))
    assert f"{row['label']} has the least error of {row['n_methods']} methods, a mean error_output of " \
           f"{row['error_output']:.3g} (95 % {row['low']:.3g} to {row['high']:.3g})" in text
    assert f"{row['label']} goes {100 * row['closed']:.0f} %" in text
    assert row["closed"] == pytest.approx(_closed(frame, row), rel=1e-12)

    with open(detailed / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    budget = detailed_results.default_budget
    back = given_back(detailed_results, configurations(detailed_results, bands=False), budget)
    labels = [m for m in DETAILED if m not in ("full", "oracle_mass", "momentum", "full+quest:page=16")]
    for c in ("mean", "moments", "gaussian"):
        shares = [1 - pooled(rows, m, budget, "error_corrected", c) / pooled(rows, m, budget, "error") for m in labels]
        mine = back[(back["group"] == "evictable") & (back["compensator"] == c)].iloc[0]
        assert (mine["n_methods"], mine["n_harmed"]) == (len(labels), sum(s < 0 for s in shares))
        assert (mine["median"], mine["lowest"], mine["highest"]) == pytest.approx(
            (np.median(shares), min(shares), max(shares)), rel=1e-9)
        assert f"{c} {100 * np.median(shares):.0f} % ({100 * min(shares):.0f} % to {100 * max(shares):.0f} %)" in text
    assert rests_on(detailed_results) == {"n_traces": 1, "n_steps": 200, "n_layers": 2, "n_heads": 8,
                                          "n_head_steps": 200 * 2 * 8, "n_blocks": 4}
    assert "up to 3\u2009200 head-steps" in detailed_page


def _closed(frame, row):
    here = frame[(frame["group"] == row["group"]) & (frame["budget"] == row["budget"])].set_index("label")["error_output"]
    return (here[row["base"]] - row["error_output"]) / (here[row["base"]] - here[row["oracle"]])


def test_compensators_with_parameters(tmp_path):
    import fake_results

    from kvreplay_analysis import load

    asked = ["moments", "gaussian:cov=full,clip=0", "moments:state=f16"]
    results = load(fake_results.write(tmp_path / "r", fake_results.Plan(
        methods=fake_results.Plan().methods[3:4], budgets=[32], layers=[0], compensators=asked)))
    assert results.compensators == ["moments", "moments:state=f16", "gaussian:cov=full,clip=0"]
    assert set(figures.correction.data(results)["by_layer"]["compensator"]) == set(asked)
    figures.correction.draw(results)
