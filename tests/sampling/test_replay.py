"""The reservoir: bounded, uniform within strata, the same in whatever windows the rows came."""

import numpy as np
import pytest

from sampling.replay import Reservoir


def _offer_all(windows: list[np.ndarray], *, seed: int, capacity: int = 20) -> tuple[Reservoir, np.ndarray]:
    """The reservoir after all windows, and the numbers of the rows that it holds, counted from the first ever seen."""
    reservoir, rows, first = Reservoir.empty(capacity=capacity, num_strata=2), np.empty(0, np.int64), 0
    for place, stratum_R in enumerate(windows):
        reservoir, stay, enter = reservoir.offer(stratum_R, [seed, place])
        rows = np.concatenate([rows[stay], first + enter])
        first += len(stratum_R)
    return reservoir, rows


def _windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.random(size) < 0.2).astype(np.int32) for size in (30, 1, 0, 90, 40)]


def test_it_holds_what_it_says_within_its_bound() -> None:
    windows = _windows()
    reservoir, rows = _offer_all(windows, seed=1)
    strata = np.concatenate(windows)
    np.testing.assert_array_equal(reservoir.stratum_K, strata[rows])
    np.testing.assert_array_equal(reservoir.seen_S, np.bincount(strata))
    assert len(set(rows.tolist())) == len(rows)
    assert (reservoir.held_S == np.minimum(np.bincount(strata), 10)).all()


def test_every_row_of_a_stratum_is_held_equally_often_whenever_it_came() -> None:
    windows, trials = _windows(), 2000
    strata, held = np.concatenate(windows), np.zeros(161)
    for seed in range(trials):
        reservoir, rows = _offer_all(windows, seed=seed)
        held[rows] += 1
    for stratum in (0, 1):
        inclusion = reservoir.inclusion_K[reservoir.stratum_K == stratum][0]
        assert inclusion == pytest.approx(10 / (strata == stratum).sum())
        error = np.sqrt(inclusion * (1 - inclusion) / trials)
        assert np.abs(held[strata == stratum] / trials - inclusion).max() < 4.5 * error


def test_weighted_sums_over_replayed_rows_are_unbiased_for_the_mean_of_all_rows() -> None:
    windows = _windows()
    strata = np.concatenate(windows)
    figure = np.random.default_rng(5).random(161) + 3 * strata
    means = []
    for seed in range(1500):
        reservoir, rows = _offer_all(windows, seed=seed)
        drawn, weights = reservoir.draw(15, [seed])
        means.append((figure[rows[drawn]] * weights).mean())
        assert weights.mean() == pytest.approx(1.0)
    assert np.mean(means) == pytest.approx(figure.mean(), abs=4 * np.std(means) / np.sqrt(len(means)))


def test_a_draw_is_without_replacement_and_reproducible() -> None:
    reservoir, _ = _offer_all(_windows(), seed=0)
    first, again, other = (reservoir.draw(12, [seed])[0] for seed in (1, 1, 2))
    assert len(set(first.tolist())) == len(first)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(reservoir.draw(1000, [0])[0]) == reservoir.num_rows


def test_an_empty_reservoir_replays_nothing() -> None:
    drawn, weights = Reservoir.empty(capacity=4, num_strata=2).draw(10, [0])
    assert len(drawn) == len(weights) == 0


def test_fewer_places_than_strata_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row for each of 2 strata"):
        Reservoir.empty(capacity=1, num_strata=2)


def test_a_preferred_row_is_drawn_in_proportion_and_strata_keep_their_shares() -> None:
    reservoir, rows = _offer_all(_windows(), seed=3, capacity=100)
    preference = np.where(rows < 60, 3.0, 1.0)
    first_draws = np.zeros(reservoir.num_rows)
    for seed in range(4000):
        drawn, weights = reservoir.draw(1, [seed], preference)  # one of each stratum
        first_draws[drawn] += 1
        assert sorted(weights) == sorted(reservoir.draw(1, [seed])[1])
    for stratum in (0, 1):
        chosen = reservoir.stratum_K == stratum
        expected = preference[chosen] / preference[chosen].sum()
        error = np.sqrt(expected * (1 - expected) / 4000)
        assert (np.abs(first_draws[chosen] / 4000 - expected) < 4.5 * error).all()
