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
