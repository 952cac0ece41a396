import numpy as np
import pytest

from kvreplay_analysis import bootstrap


def with_count(values, weight=1.0):
    values = np.asarray(values, float)
    return np.column_stack([values * weight, np.full(len(values), weight)])


def test_interval_is_that_of_the_mean():
    """Independent blocks: the percentile interval is close to mean ± 1.96 standard errors."""
    values = np.random.default_rng(5).normal(3.0, 1.0, 400)
    estimate, low, high = bootstrap.interval([with_count(values)], bootstrap.mean)
    se = values.std() / np.sqrt(len(values))
    assert estimate == pytest.approx(values.mean())
    assert low == pytest.approx(values.mean() - 1.96 * se, abs=0.15 * se)
    assert high == pytest.approx(values.mean() + 1.96 * se, abs=0.15 * se)


def test_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(200):
        _, low, high = bootstrap.interval([with_count(rng.normal(0, 1, 40))], bootstrap.mean, n_resamples=400)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_several_traces_widen_it():
    """Traces that differ among themselves: knowing each of them well is not knowing the next one."""
    rng = np.random.default_rng(7)
    traces = [with_count(rng.normal(level, 0.1, 50)) for level in (1.0, 2.0, 3.0, 4.0)]
    _, low, high = bootstrap.interval(traces, bootstrap.mean)
    _, low_one, high_one = bootstrap.interval([np.concatenate(traces)], bootstrap.mean)
    assert high - low > 2 * (high_one - low_one)


def test_same_seed_same_interval_and_constant_blocks_have_none():
    blocks = [with_count(np.random.default_rng(8).normal(size=9))]
    assert bootstrap.interval(blocks, bootstrap.mean) == bootstrap.interval(blocks, bootstrap.mean)
    assert bootstrap.interval(blocks, bootstrap.mean) != bootstrap.interval(blocks, bootstrap.mean, seed=1)
    assert bootstrap.interval([with_count([0.5] * 8)], bootstrap.mean) == (0.5, 0.5, 0.5)


def test_one_block_has_no_interval():
    estimate, low, high = bootstrap.interval([with_count([2.0])], bootstrap.mean)
    assert estimate == 2.0 and np.isnan(low) and np.isnan(high)
    assert np.isnan(bootstrap.interval([], bootstrap.mean)[0])


def test_blocks_weigh_as_many_steps_as_they_have():
    """A last block of 16 steps counts a quarter of one of 64."""
    blocks = np.array([[64 * 1.0, 64], [16 * 6.0, 16]])
    assert bootstrap.interval([blocks], bootstrap.mean)[0] == pytest.approx(2.0)


def test_share_removed_is_a_ratio_of_sums():
    blocks = np.array([[10.0, 4.0, 64], [30.0, 6.0, 64]])
    estimate, low, high = bootstrap.interval([blocks], bootstrap.removed_share)
    assert estimate == pytest.approx(0.75)
    assert (low, high) == pytest.approx((0.6, 0.8))


def paired(a, b, n_rows=3):
    """Sums of two sides from per-block levels, with noise of the blocks that both share."""
    rng = np.random.default_rng(9)
    shared = rng.normal(0, 5, (n_rows, len(a)))
    return bootstrap.block_sums([shared + np.asarray(a), shared + np.asarray(b)], np.full(len(a), 64.0))


def test_paired_difference_is_free_of_what_both_share():
    """The blocks differ by far more than the two sides do; the interval of the difference does not see it."""
    rng = np.random.default_rng(10)
    a = 10 + rng.normal(0, 0.1, 50)
    b = 9.8 + rng.normal(0, 0.1, 50)
    estimate, low, high = bootstrap.interval([paired(a, b)], bootstrap.difference)
    assert estimate == pytest.approx(np.mean(a - b))
    assert 0 < low < estimate < high
    se = np.std(a - b) / np.sqrt(50)
    assert (low, high) == pytest.approx((estimate - 1.96 * se, estimate + 1.96 * se), abs=0.2 * se)
    one = bootstrap.interval([paired(a, b)[:, [0, 2]]], bootstrap.mean)
    assert one[2] - one[1] > 10 * (high - low)


def test_swapping_the_sides_negates_and_a_side_against_itself_is_zero():
    a, b = np.random.default_rng(11).normal(3, 1, (2, 20))
    there = bootstrap.interval([paired(a, b)], bootstrap.difference)
    back = bootstrap.interval([paired(b, a)], bootstrap.difference)
    assert back == pytest.approx((-there[0], -there[2], -there[1]), rel=1e-12)
    assert bootstrap.interval([paired(a, a)], bootstrap.difference) == (0, 0, 0)
    assert bootstrap.interval([paired(a, a)], bootstrap.relative_difference) == (0, 0, 0)


def test_paired_sums_count_where_both_counted():
    a = np.array([[1.0, np.nan, 3.0], [2.0, 2.0, 2.0]])
    b = np.array([[0.5, 1.0, np.nan], [1.0, 1.0, 4.0]])
    sums = bootstrap.block_sums([a, b], np.array([64.0, 64.0, 16.0]))
    np.testing.assert_array_equal(sums, [[3 * 64, 1.5 * 64, 2 * 64], [2 * 64, 64, 64], [2 * 16, 4 * 16, 16]])
    assert bootstrap.difference(sums.sum(axis=0)) == pytest.approx((3 * 64 + 128 + 32 - 96 - 64 - 64) / (128 + 64 + 16))


def test_paired_totals_of_results(results):
    """Against a loop over heads and blocks."""
    cells = results.cells
    pairs = [(i, j) for layer in (0, 4, 8, 11)
             for i in cells.index[(cells["label"] == "h2o") & (cells["budget"] == "64") & (cells["layer"] == layer)]
             for j in cells.index[(cells["label"] == "tova") & (cells["budget"] == "64") & (cells["layer"] == layer)]]
    assert len(pairs) == 4
    totals, = bootstrap.paired_totals(results, results, pairs, ("error_output", ""))
    expected = np.zeros((8, 3))
    for i, j in pairs:
        a, b = results.blocks("error_output")[i], results.blocks("error_output")[j]
        for head in range(8):
            for block in range(8):
                expected[block] += [64 * a[head, block], 64 * b[head, block], 64]
    np.testing.assert_allclose(totals, expected, rtol=1e-12)
    corrected, = bootstrap.paired_totals(results, results, pairs, ("error_output", ""), ("error_corrected", "moments"))
    np.testing.assert_array_equal(corrected[:, 0], totals[:, 0])
    assert (corrected[:, 1] != totals[:, 1]).all()
