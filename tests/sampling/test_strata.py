"""Strata, allocations and draws, against brute force, closed forms and many repetitions."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.errors import ConfigError
from sampling.strata import Allocation, Shape, Strata, allocate, draw, keep_rates, strata_of

SHAPES: tuple[Shape, ...] = ("proportional", "sqrt", "equal")
counts_of_strata = st.lists(st.integers(1, 400), min_size=1, max_size=12).map(np.array)


def rows_of(counts_S: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts_S), dtype=np.int32), counts_S))


@given(counts_S=counts_of_strata, keep_rate=st.floats(1e-3, 1), how=st.sampled_from(SHAPES))
def test_keep_rates_keep_the_share_asked_for_and_no_stratum_more_than_it_has(
    counts_S: np.ndarray, keep_rate: float, how: Shape
) -> None:
    rates_S = keep_rates(counts_S, keep_rate, how)
    assert np.all((rates_S > 0) & (rates_S <= 1))
    assert np.dot(counts_S, rates_S) == pytest.approx(keep_rate * counts_S.sum())
    shape_S = {"proportional": counts_S, "sqrt": np.sqrt(counts_S), "equal": np.ones(len(counts_S))}[how]
    free = rates_S < 1 - 1e-9
    scales = (rates_S * counts_S / shape_S)[free]
    assert np.allclose(scales, scales[:1])
    assert np.all(counts_S[~free] / shape_S[~free] <= scales.min(initial=np.inf) * (1 + 1e-9))


@given(counts_S=counts_of_strata, share=st.floats(0, 1), how=st.sampled_from(SHAPES), replacement=st.booleans())
def test_an_allocation_takes_the_total_and_at_least_one_row_of_each_stratum(
    counts_S: np.ndarray, share: float, how: Allocation, replacement: bool
) -> None:
    total = len(counts_S) + int(share * (counts_S.sum() * (3 if replacement else 1) - len(counts_S)))
    taken_S = allocate(counts_S, total, how, replacement=replacement)
    assert taken_S.sum() == total
    assert np.all(taken_S >= 1)
    assert replacement or np.all(taken_S <= counts_S)


def test_a_proportional_allocation_is_within_one_row_of_the_exact_share() -> None:
    counts_S = np.array([5000, 3000, 1999, 1])
    assert np.all(np.abs(allocate(counts_S, 1000, "proportional") - counts_S / 10) <= 1)


@settings(max_examples=50, deadline=None)
@given(
    counts_S=st.lists(st.integers(1, 60), min_size=1, max_size=6).map(np.array),
    share=st.floats(0.05, 1),
    how=st.sampled_from(SHAPES),
    replacement=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_sums_weighted_by_one_over_the_probability_are_unbiased(
    counts_S: np.ndarray, share: float, how: Shape, replacement: bool, seed: int
) -> None:
    """The mean of 200 estimates lies within 5 standard errors, by the closed form of a stratified sample's variance."""
    stratum_R, rng = rows_of(counts_S, seed), np.random.default_rng(seed)
    value_R = rng.normal(1, 3, len(stratum_R)) * (1 + stratum_R)
    taken_S = allocate(counts_S, max(len(counts_S), int(share * counts_S.sum())), how, replacement=replacement)
    estimates = []
    for _ in range(200):
        rows, pi = draw(stratum_R, taken_S, rng, replacement)
        estimates.append((value_R[rows] / pi).sum())
    variance_S = [np.var(value_R[stratum_R == s]) for s in range(len(counts_S))]
    finite_S = np.ones(len(counts_S)) if replacement else (counts_S - taken_S) / np.maximum(counts_S - 1, 1)
    expected_variance = np.sum(counts_S**2 / taken_S * variance_S * finite_S)
    slack = 5 * np.sqrt(expected_variance / 200) + 1e-8 * np.abs(value_R).sum()
    assert abs(np.mean(estimates) - value_R.sum()) <= slack


@given(counts_S=counts_of_strata, how=st.sampled_from(SHAPES), seed=st.integers(0, 2**32))
def test_a_draw_without_replacement_takes_distinct_rows_and_counts_each_stratum_exactly(
    counts_S: np.ndarray, how: Shape, seed: int
) -> None:
    stratum_R = rows_of(counts_S, seed)
    taken_S = allocate(counts_S, max(len(counts_S), len(stratum_R) // 2), how)
    rows, pi = draw(stratum_R, taken_S, np.random.default_rng(seed))
    assert np.all(np.diff(rows) > 0)
    assert np.array_equal(np.bincount(stratum_R[rows], minlength=len(counts_S)), taken_S)
    assert np.bincount(stratum_R[rows], weights=1 / pi) == pytest.approx(counts_S)


def test_every_pair_of_rows_of_a_stratum_is_drawn_equally_often() -> None:
    rng, stratum_R = np.random.default_rng(0), np.array([0, 1, 0, 0, 1, 0], np.int32)
    seen = [tuple(rows[stratum_R[rows] == 0]) for rows in (draw(stratum_R, np.array([2, 1]), rng)[0] for _ in range(6000))]
    shares = [seen.count(pair) / 6000 for pair in combinations([0, 2, 3, 5], 2)]
    assert shares == pytest.approx([1 / 6] * 6, abs=0.025)


def test_the_seed_decides_the_draw() -> None:
    stratum_R = rows_of(np.array([50, 7]), 0)
    first, again, other = (draw(stratum_R, np.array([9, 3]), np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_strata_are_the_combinations_that_have_rows() -> None:
    strata = strata_of(
        ["label", "item_age", "user_activity", "hour"],
        labels_R=np.array([0, 0, 1, 0], np.float32),
        age_hours_R=np.array([0.5, 200, np.nan, 0.2]),
        activity_R=np.array([1, 7, 7, 1]),
        hour_R=np.array([24, 24, 25, 24]),
    )
    assert strata.names == (
        "label=0, item_age=below 1 h, user_activity=below 2, hour=1970-01-02T00",
        "label=0, item_age=168 h and more, user_activity=5 to 20, hour=1970-01-02T00",
        "label=1, item_age=unknown, user_activity=5 to 20, hour=1970-01-02T01",
    )
    assert strata.stratum_R.tolist() == [0, 1, 2, 0]
    assert strata.counts_S.tolist() == [2, 1, 1]


def test_deciles_of_popularity_hold_a_tenth_of_the_rows_each() -> None:
    popularity_R = np.random.default_rng(0).exponential(size=200_000)
    strata = strata_of(["item_popularity"], labels_R=np.zeros(200_000), popularity_R=popularity_R)
    assert strata.names[0] == "item_popularity=decile 1"
    assert strata.counts_S == pytest.approx([20_000] * 10, rel=0.02)
    assert popularity_R[strata.stratum_R == 9].min() >= popularity_R[strata.stratum_R == 8].max()


@given(
    counts=st.lists(st.integers(0, 130) | st.integers(-(2**62), 2**62), min_size=1, max_size=300),
    dtype=st.sampled_from([np.int64, np.float64]),
)
def test_users_are_in_the_stratum_that_their_rows_say(counts: list[int], dtype: type) -> None:
    strata = strata_of(["user_activity"], labels_R=np.zeros(len(counts)), activity_R=np.array(counts, dtype))
    lows = {"below 2": -np.inf, "2 to 5": 2, "5 to 20": 5, "20 to 100": 20, "100 and more": 100}
    expected = [max((low, name) for name, low in lows.items() if low <= count)[1] for count in counts]
    assert [strata.names[s] for s in strata.stratum_R] == [f"user_activity={name}" for name in expected]


def test_without_anything_to_stratify_by_there_is_one_stratum() -> None:
    assert strata_of([], labels_R=np.zeros(3)).names == ("all",)
    assert strata_of([], labels_R=np.zeros(0)).counts_S.tolist() == []


@pytest.mark.parametrize("keep_rate", [0.0, -0.1, 1.0001, float("nan")])
def test_a_keep_rate_outside_its_range_is_refused(keep_rate: float) -> None:
    with pytest.raises(ConfigError, match=r"keep_rate must be in \(0, 1\], got"):
        keep_rates(np.array([3]), keep_rate)


@pytest.mark.parametrize(
    ("counts", "total", "how", "chosen", "message"),
    [
        ([3, 0], 2, "equal", None, r"sampling\.strata: stratum 1 has no rows"),
        ([3, 4], 8, "sqrt", None, r"sampling\.allocation = 'sqrt' asks for 8 of 7 rows"),
        ([3, 4], 1, "sqrt", None, r"less than one of each"),
        ([3, 4], 5, "given", [4, 1], r"asks for 4 rows of stratum 0, which has 3"),
        ([3, 4], 4, "given", [0, 4], r"takes 0 of the 3 rows of stratum 0"),
        ([3, 4], 5, "given", [1, 1], r"sums to 2, not to 5"),
        ([3, 4], 5, "given", [5], r"each of 2 strata, got 1"),
        ([3, 4], 5, "given", None, r"each of 2 strata, got none"),
    ],
)
def test_an_allocation_that_cannot_be_is_refused_by_name(
    counts: list[int], total: int, how: Allocation, chosen: list[int] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(np.array(counts), total, how, chosen)


def test_more_than_there_is_can_be_had_with_replacement() -> None:
    taken_S = allocate(np.array([3, 4]), 20, "given", [15, 5], replacement=True)
    rows, pi = draw(rows_of(np.array([3, 4]), 0), taken_S, np.random.default_rng(0), replacement=True)
    assert len(rows) == 20
    assert sorted(set(pi)) == [5 / 4, 15 / 3]


def test_a_draw_that_cannot_be_is_refused() -> None:
    stratum_R = np.array([0, 0, 1], np.int32)
    with pytest.raises(ConfigError, match="asks for 2 rows of stratum 1, which has 1"):
        draw(stratum_R, np.array([1, 2]), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="has 1 strata, the rows have 2"):
        draw(stratum_R, np.array([1]), np.random.default_rng(0))


def test_strata_that_cannot_be_are_refused_by_name() -> None:
    labels_R = np.zeros(2)
    with pytest.raises(ConfigError, match=r"sampling\.strata names something twice"):
        strata_of(["label", "label"], labels_R=labels_R)
    with pytest.raises(ConfigError, match=r"sampling\.strata: these rows have no column for 'hour'"):
        strata_of(["hour"], labels_R=labels_R)
    with pytest.raises(ConfigError, match=r"sampling\.strata make 2,000,000 strata"):
        strata_of(["hour", "label"], labels_R=np.zeros(1_000_000), hour_R=np.arange(1_000_000))


def test_strata_count_rows_of_the_last_ones_too() -> None:
    assert Strata(("a", "b", "c"), np.array([0], np.int32)).counts_S.tolist() == [1, 0, 0]
