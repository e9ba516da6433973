"""Means, paired differences and corrected p-values against scipy and against the definitions written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.comparison.statistics import holm, mean_with_interval, paired_difference

SHARES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


@pytest.mark.parametrize("num_seeds", [2, 5, 8])
def test_the_interval_is_student_s(num_seeds: int) -> None:
    values = np.random.default_rng(num_seeds).normal(0.72, 0.003, num_seeds)
    ours = mean_with_interval(values)
    low, high = stats.t.interval(0.95, num_seeds - 1, loc=values.mean(), scale=stats.sem(values))
    assert (ours.mean, ours.low, ours.high) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert ours.half_width == pytest.approx((high - low) / 2)


def test_the_interval_holds_the_truth_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    holds = [one.low <= 3.0 <= one.high for one in map(mean_with_interval, draws)]
    assert np.mean(holds) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("num_seeds", [2, 5, 8])
def test_the_paired_difference_is_scipy_s_paired_t_test(num_seeds: int) -> None:
    rng = np.random.default_rng(num_seeds)
    reference = rng.normal(0.72, 0.01, num_seeds)
    values = reference + rng.normal(0.001, 0.002, num_seeds)
    ours, theirs = paired_difference(values, reference), stats.ttest_rel(values, reference)
    interval = theirs.confidence_interval(0.95)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (ours.estimate.low, ours.estimate.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_pairing_takes_out_the_luck_that_both_share() -> None:
    luck = np.array([0.0, 0.1, -0.1, 0.05, -0.05])
    values, reference = 0.7 + luck + [0.001, 0.0011, 0.0009, 0.001, 0.001], 0.7 + luck
    assert paired_difference(values, reference).p_value < 1e-4
    assert stats.ttest_ind(values, reference).pvalue > 0.9


def test_equal_differences_have_a_certain_answer() -> None:
    same = paired_difference([0.5, 0.25], [0.5, 0.25])
    apart = paired_difference([0.5, 0.25], [0.25, 0.0])
    assert (same.estimate.mean, same.p_value) == (0.0, 1.0)
    assert (apart.estimate.low, apart.estimate.high, apart.p_value) == (0.25, 0.25, 0.0)


@given(SHARES)
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float]) -> None:
    """Holm 1979: go up the ordered p-values, and stop at the first that exceeds level / (K - k)."""
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected: set[int] = set()
        for k, place in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[place] * (len(p_values) - k) > level:
                break
            rejected.add(int(place))
        assert {place for place, p in enumerate(adjusted) if p <= level} == rejected


@given(SHARES)
def test_holm_only_raises_p_values_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = np.array(holm(p_values))
    assert (adjusted >= np.array(p_values) - 1e-15).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()


def test_holm_is_never_above_bonferroni_and_a_single_comparison_needs_no_correction() -> None:
    assert holm([0.04]) == (0.04,)
    assert holm([]) == ()
    assert (np.array(holm([0.01, 0.02, 0.03])) <= 3 * np.array([0.01, 0.02, 0.03])).all()


@pytest.mark.parametrize("values", [[], [0.7], [[0.7, 0.8]]])
def test_an_interval_of_one_seed_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="at least 2 seeds"):
        mean_with_interval(values)  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="the same seeds, got 3 and 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        mean_with_interval([0.7, float("nan")])
    with pytest.raises(ValueError, match=r"in \[0, 1\], got \[1.5\]"):
        holm([1.5])
