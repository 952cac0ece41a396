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


def test_same_figure_same_bytes(tmp_path):
    import fake_results

    from kvreplay_analysis import load
    from kvreplay_analysis.style import plt, to_bytes

    results = load(fake_results.write(tmp_path / "r", fake_results.Plan(
        methods=fake_results.Plan().methods[2:5], budgets=[32, 64], layers=[0, 1], n_heads=2, n_kv_heads=1)))
    for module in figures.ALL.values():
        for format in ("pdf", "svg"):
            first, second = (to_bytes(module.draw(results), format) for _ in range(2))
            plt.close("all")
            assert first == second, (module.NAME, format)
            assert b"CreationDate" not in first and b"<dc:date>" not in first


def test_compensators_with_parameters(tmp_path):
    import fake_results

    from kvreplay_analysis import load

    asked = ["moments", "gaussian:cov=full,clip=0", "moments:state=f16"]
    results = load(fake_results.write(tmp_path / "r", fake_results.Plan(
        methods=fake_results.Plan().methods[3:4], budgets=[32], layers=[0], compensators=asked)))
    assert results.compensators == ["moments", "moments:state=f16", "gaussian:cov=full,clip=0"]
    assert set(figures.correction.data(results)["by_layer"]["compensator"]) == set(asked)
    figures.correction.draw(results)
