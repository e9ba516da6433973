"""Rows left out in mid-pass: known probabilities, permanent numbers, nothing twice and nothing lost."""

import numpy as np
import pytest

from sampling.mid_pass import Thinning
from sampling.minibatches import BatchCursor

STRATUM_R = np.repeat(np.array([0, 1], np.int32), [9000, 1000])


def _pass(rates: list[float], *, seed: int = 0, batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Rows learned and their probabilities; each batch at the next of `rates`, over and over."""
    cursor = BatchCursor.of(10_000, seed=[seed])
    thinning = Thinning.of(10_000, seed=[seed], stratum_R=STRATUM_R)
    parts, number = [], 0
    while cursor.remaining:
        parts.append(thinning.next_rows(cursor, batch, rates[number % len(rates)]))
        number += 1
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([p for _, p in parts])


def test_weights_of_one_over_the_probability_estimate_the_whole_while_rates_fall_and_rise() -> None:
    value_R = np.arange(10_000.0) % 97
    sums = [float((value_R[rows] / p).sum()) for rows, p in (_pass([0.8, 0.3, 0.5], seed=seed) for seed in range(60))]
    assert np.mean(sums) == pytest.approx(value_R.sum(), abs=4 * np.std(sums) / np.sqrt(60))


def test_no_row_comes_twice_and_rare_strata_are_kept_longest() -> None:
    rows, _ = _pass([0.3])
    assert len(np.unique(rows)) == len(rows) == pytest.approx(3000, rel=0.05)
    kept_S = np.bincount(STRATUM_R[rows]) / np.bincount(STRATUM_R)
    assert kept_S[1] > 2 * kept_S[0]


def test_the_equal_shape_keeps_as_many_of_each_stratum_until_one_is_whole() -> None:
    thinning = Thinning.of(10_000, seed=[0], stratum_R=STRATUM_R, shape="equal")
    np.testing.assert_allclose(thinning.rates(0.1) * [9000, 1000], [500, 500])
    np.testing.assert_allclose(thinning.rates(0.3) * [9000, 1000], [2000, 1000])


def test_a_row_kept_at_a_low_rate_is_kept_at_every_higher_one() -> None:
    low, high = _pass([0.2])[0], _pass([0.6])[0]
    assert set(low) <= set(high)


def test_keeping_all_is_the_plain_order_in_even_batches() -> None:
    plain, thinned = BatchCursor.of(10, seed=[1]), BatchCursor.of(10, seed=[1])
    thinning = Thinning.of(10, seed=[1])
    while plain.remaining:
        np.testing.assert_array_equal(thinning.next_rows(thinned, 4, 1.0)[0], plain.next_rows(4))


def test_a_rest_that_is_left_out_whole_is_passed() -> None:
    cursor, thinning = BatchCursor.of(3, seed=[1]), Thinning(np.full(3, 0.9), np.zeros(3, np.int32), np.array([3]))
    rows, probability = thinning.next_rows(cursor, 4, 0.1)
    assert len(rows) == len(probability) == cursor.remaining == 0
