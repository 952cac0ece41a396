"""Orders of methods and Kendall's tau, against counting pairs."""

import exact_results
import numpy as np
import pandas as pd
import pytest
from exact_results import cell

from kvreplay_analysis import figures, load, ranks
from kvreplay_analysis.errors import Absent, UsageError

LABELS = ("h2o", "tova", "random", "knorm", "keydiff")


def tau_b(x, y):
    """Concordant less discordant pairs over the pairs untied in either, geometrically."""
    more = less = tied_x = tied_y = 0
    for i in range(len(x)):
        for j in range(i):
            a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
            more += a * b > 0
            less += a * b < 0
            tied_x += a == 0
            tied_y += b == 0
    n = len(x) * (len(x) - 1) / 2
    return (more - less) / np.sqrt((n - tied_x) * (n - tied_y))


def test_tau_against_pairs():
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.integers(0, 6, (7, 9)).astype(float))  # with ties
    found = ranks.taus(table)
    for i in range(7):
        for j in range(7):
            assert found.at[i, j] == pytest.approx(tau_b(table.loc[i], table.loc[j]), abs=1e-12)
    assert (np.diag(found) == 1).all()
    assert np.isnan(ranks.taus(pd.DataFrame([[1.0, 1, 1], [1, 2, 3]])).at[0, 1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Layer 2 has the reverse of layer 0's order; heads 0 and 1 are local, the others diffuse with an order between."""
    cells = []
    for i, label in enumerate(LABELS):
        for b in (16, 32):
            for n in (0, 1, 2):
                level = {0: 1 + i, 1: 1 + i * (1 if b == 16 else 1.1), 2: 6 - i}[n] / b
                values = np.array([level, level, 7 / b - level, level])
                for t in ("t", "u"):
                    cells.append(cell(label, b, {"error_output": values * (1 if t == "t" else 1 + i), "resident": b},
                                      layer=n, trace=t))
    for b in (16, 32):
        cells += [cell("oracle_mass", b, {"error_output": 0.01, "resident": b}, layer=n, trace=t, foresight="oracle")
                  for n in (0, 1, 2) for t in ("t", "u")]
    cells += [cell("full", "", {"error_output": 0, "resident": 99}, layer=n, trace=t) for n in (0, 1, 2)
              for t in ("t", "u")]
    local = dict(sink=[0.1] * 4, local=[0.8, 0.8, 0.1, 0.1], far=[0.1, 0.1, 0.8, 0.8], entropy=[0.5] * 4,
                 concentration=[0.1] * 4)
    where = {(t, n): local for t in ("t", "u") for n in (0, 1, 2)}
    return load(exact_results.write(tmp_path_factory.mktemp("ranks") / "run", cells, heads=where))


def loops(run, factor, level, label, budget):
    """Mean of the steps' errors in a level, from the rows of summary.csv."""
    rows = run.summary[(run.summary["metric"] == "error_output") & (run.summary["label"] == label)]
    total = n = 0
    for r in rows.itertuples():
        if (factor != "budget" and r.budget != budget) or \
                (factor == "head_type" and ("local" if r.q_head < 2 else "diffuse") != level) or \
                (factor in ("layer", "budget", "trace") and getattr(r, factor) != level):
            continue
        total, n = total + r.n * r.mean, n + r.n
    return total / n


@pytest.mark.parametrize("factor", ranks.FACTORS)
def test_errors_of_levels(run, factor):
    table = ranks.errors(run, factor, None if factor == "budget" else "32")
    assert list(table.columns) == list(LABELS)  # neither the oracle nor the uncompressed cache
    assert list(table.index) == {"layer": [0, 1, 2], "head_type": ["local", "diffuse"], "budget": ["16", "32"],
                                 "trace": ["t", "u"]}[factor]
    for level in table.index:
        for label in LABELS:
            assert table.at[level, label] == pytest.approx(loops(run, factor, level, label, "32"), rel=1e-12)
    tau = ranks.matrix(run, factor, None if factor == "budget" else "32")
    for a in table.index:
        for b in table.index:
            assert tau.at[a, b] == pytest.approx(tau_b(list(table.loc[a]), list(table.loc[b])), abs=1e-12)


def test_a_reversed_order_is_minus_one(run):
    one_head = run.only(head_type="local", trace="t")
    tau = ranks.matrix(one_head, "layer", "16")
    assert (tau.at[0, 1], tau.at[0, 2], tau.at[2, 0]) == pytest.approx((1, -1, -1), abs=1e-12)


def test_one_level_and_few_methods_are_absent(run, tmp_path):
    for factor, one in (("layer", run.only(layer=1)), ("trace", run.only(trace="t")), ("budget", run.only(budget="16")),
                        ("head_type", run.only(head_type="local"))):
        with pytest.raises(Absent, match="this run has one"):
            ranks.errors(one, factor)
    with pytest.raises(Absent, match="an order needs 3 methods, and at budget .* has 2"):
        ranks.errors(run.only(label=["h2o", "tova"]), "layer")
    with pytest.raises(UsageError, match="factor layers is none of .*did you mean layer"):
        ranks.errors(run, "layers")
    lone = load(exact_results.write(tmp_path / "r", [cell("h2o", 8, {"error_output": 0.1})]))
    with pytest.raises(Absent, match="no order to compare"):
        figures.ranks.data(lone)


def test_figure_shows_the_matrices(run):
    frames = figures.ranks.data(run, "16")
    assert {"layer", "head_type", "budget", "trace"} <= set(frames)
    picture = figures.ranks.draw(run, "16", frames=frames)
    shown = [np.array(ax.images[0].get_array()) for ax in picture.axes if ax.images]
    for image, factor in zip(shown, ranks.FACTORS):
        expected = ranks.matrix(run, factor, "16").to_numpy()
        np.testing.assert_allclose(image, expected)
        assert (frames[factor]["n_methods"] == 5).all()
    orders = frames["layer_errors"].set_index(["level", "label"])["rank"]
    assert sorted(orders["0"]) == [1, 2, 3, 4, 5]
