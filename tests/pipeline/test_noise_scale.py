"""The noise scale against a toy problem whose gradients have a known mean and covariance."""

import numpy as np
import pytest

from pipeline.training.noise_scale import NoiseScale, Spread, spread_at_fixed_weights, spread_of

TRUE_MEAN_P = np.linspace(0.1, 1.0, 20)
DEVIATION_P = np.linspace(4.0, 2.0, 20)
SIGNAL, NOISE = float(TRUE_MEAN_P @ TRUE_MEAN_P), float(DEVIATION_P @ DEVIATION_P)


def _gradients(rng: np.random.Generator, rows: int) -> np.ndarray:
    """The mean gradient of `rows` rows."""
    return TRUE_MEAN_P + DEVIATION_P * rng.normal(size=20) / np.sqrt(rows)


def _spread(rng: np.random.Generator, rows_K: list[int]):  # type: ignore[no-untyped-def]
    own_KP = [_gradients(rng, rows) for rows in rows_K]
    mean_P = np.average(own_KP, axis=0, weights=rows_K)
    return spread_of([float(g @ g) for g in own_KP], rows_K, float(mean_P @ mean_P))


@pytest.mark.parametrize("sizes", [[[64] * 2], [[64] * 8], [[64] * 4, [64] * 16, [64] * 2, [64, 64, 17]]])
def test_the_noise_scale_is_within_5_percent_also_across_batch_changes(sizes: list[list[int]]) -> None:
    rng, scale = np.random.default_rng(1), NoiseScale(decay=0.9999)
    for number in range(6000):
        scale.add(_spread(rng, sizes[number // 50 % len(sizes)]))
    assert scale.averages.noise == pytest.approx(NOISE, rel=0.05)
    assert scale.averages.signal == pytest.approx(SIGNAL, rel=0.05)
    assert scale.last == pytest.approx(NOISE / SIGNAL, rel=0.05)


def test_limits_hold_at_the_rate_of_one_standard_error_and_come_close_with_measurements() -> None:
    """A mean is at most one standard error too low in 84 of 100 cases, and too high in as many."""
    rng, few, many = np.random.default_rng(4), [], []
    for _ in range(400):
        scale = NoiseScale(decay=0.95)
        for number in range(120):
            scale.add(_spread(rng, [64] * 2))
            if number in (7, 119) and scale.at_least is not None:
                (few if number == 7 else many).append((scale.at_least, scale.at_most))
            assert number >= 7 or scale.at_most == np.inf
    assert len(few) >= 350
    for limits in (few, many):
        lower, upper = np.array(limits).T
        assert np.mean(lower <= NOISE / SIGNAL) == pytest.approx(0.84, abs=0.06)
        assert np.mean(upper >= NOISE / SIGNAL) == pytest.approx(0.84, abs=0.06)
    (wide_low, wide_high), (near_low, near_high) = np.median(few, axis=0), np.median(many, axis=0)
    assert wide_low < near_low < NOISE / SIGNAL < near_high < wide_high


def test_what_is_expected_counts_as_far_as_the_measurements_allow_it() -> None:
    rng, scale = np.random.default_rng(6), NoiseScale()
    assert scale.believed(1000.0) == 1000.0
    for _ in range(100):
        scale.add(_spread(rng, [64] * 4))
    assert scale.at_least is not None
    assert 0 < scale.at_least < scale.at_most < np.inf
    assert [scale.believed(rows) for rows in (0.1, 1e9)] == [scale.at_least, scale.at_most]
    within = (scale.at_least + scale.at_most) / 2
    assert scale.believed(within) == within
    for _ in range(40):
        scale.add(Spread(noise=NOISE, signal=-SIGNAL))
    assert scale.at_most == np.inf


def test_a_measurement_without_signal_makes_the_scale_no_larger_than_it_surely_is() -> None:
    scale = NoiseScale()
    for signal in (1.0, 0.8, 1.2, 0.9):
        scale.add(Spread(noise=1000.0, signal=signal))
    before = scale.at_least
    for signal in (-2.0, -1.0):
        scale.add(Spread(noise=1000.0, signal=signal))
    assert scale.last is not None
    assert before is not None
    assert scale.at_least is not None
    assert 800 < before < 1000 < 1e4 < scale.last
    assert scale.at_least < 3000


def test_equal_micro_batches_give_the_formula_of_the_paper() -> None:
    spread = spread_of([3.0, 5.0, 4.0, 8.0], [32] * 4, 2.5)
    assert spread is not None
    assert spread.noise == pytest.approx(32 * 4 / 3 * (5.0 - 2.5))
    assert spread.signal == pytest.approx(2.5 - spread.noise / 128)


def test_the_estimate_at_fixed_weights_is_unbiased() -> None:
    rng = np.random.default_rng(2)
    spreads = [spread_at_fixed_weights(np.stack([_gradients(rng, 256) for _ in range(4)]), 256) for _ in range(4000)]
    assert np.mean([spread.noise for spread in spreads]) == pytest.approx(NOISE, rel=0.02)
    assert np.mean([spread.signal for spread in spreads]) == pytest.approx(SIGNAL, rel=0.02)


def test_one_micro_batch_or_no_signal_keeps_the_last_scale() -> None:
    scale = NoiseScale(decay=0.0)
    scale.add(spread_of([2.0, 2.0], [10, 10], 1.5))
    kept = scale.last
    scale.add(spread_of([2.0], [10], 2.0))
    assert (scale.last, scale.measurements, scale.kept_last) == (kept, 1, 0)
    scale.add(spread_of([2.0, 2.0], [10, 10], 0.5))
    assert (scale.last, scale.kept_last) == (kept, 1)


def test_a_restored_scale_goes_on_bit_for_bit() -> None:
    rng, scale, restored = np.random.default_rng(3), NoiseScale(), NoiseScale()
    for _ in range(5):
        scale.add(_spread(rng, [64] * 3))
    restored.load(scale.state())
    one_more = _spread(rng, [64] * 3)
    scale.add(one_more)
    restored.add(one_more)
    assert restored.state() == scale.state()


def test_of_a_scale_that_was_saved_without_its_error_the_estimate_is_kept_and_measured_anew() -> None:
    rng, scale, restored, new = np.random.default_rng(5), NoiseScale(), NoiseScale(), NoiseScale()
    for _ in range(5):
        scale.add(_spread(rng, [64] * 3))
    restored.load(scale.state()[:5])
    saved_again, restored = restored.state(), NoiseScale()
    restored.load(saved_again)
    assert (restored.last, restored.at_least, restored.at_most) == (scale.last, scale.last, np.inf)
    one_more = _spread(rng, [64] * 3)
    restored.add(one_more)
    new.add(one_more)
    assert restored.state() == new.state()
