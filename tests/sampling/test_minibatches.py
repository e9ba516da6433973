"""Orders of rows: shuffled, stratified, thinned; what a batch mirrors, and what an early end has reached."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampling.minibatches import BatchCursor, stratified_order

strata_of_rows = st.lists(st.integers(0, 5), min_size=1, max_size=300).map(lambda s: np.array(s, np.int32))


@given(stratum_R=strata_of_rows, seed=st.integers(0, 2**32))
def test_a_stratified_order_is_a_permutation(stratum_R: np.ndarray, seed: int) -> None:
    cursor = BatchCursor.of(len(stratum_R), seed=[seed], stratum_R=stratum_R)
    assert np.array_equal(np.sort(cursor.order_R), np.arange(len(stratum_R)))


@given(stratum_R=strata_of_rows, seed=st.integers(0, 2**32), data=st.data())
def test_any_run_of_rows_mirrors_the_strata(stratum_R: np.ndarray, seed: int, data: st.DataObject) -> None:
    """A run spans an interval of places of some length; a stratum has its share of that, give or take one row."""
    order_R = BatchCursor.of(len(stratum_R), seed=[seed], stratum_R=stratum_R).order_R
    start = data.draw(st.integers(0, len(order_R) - 1))
    stop = data.draw(st.integers(start + 1, len(order_R)))
    share_S = np.bincount(stratum_R) / len(stratum_R)
    in_run_S = np.bincount(stratum_R[order_R[start:stop]], minlength=len(share_S))
    assert np.all(np.abs(in_run_S - (stop - start) * share_S) <= 1 + np.count_nonzero(share_S) * share_S + 1e-9)


def test_one_stratum_gives_the_plain_permutation() -> None:
    plain = BatchCursor.of(1000, seed=[3])
    assert np.array_equal(BatchCursor.of(1000, seed=[3], stratum_R=np.zeros(1000, np.int32)).order_R, plain.order_R)


def test_each_row_is_equally_likely_at_each_place_of_a_stratified_order() -> None:
    """Ten rows in strata of 7 and 3: over 4,000 orders, every row is in every half of the order every other time."""
    stratum_R, rng = np.array([0, 0, 1, 0, 1, 0, 0, 1, 0, 0], np.int32), np.random.default_rng(0)
    first_half_R = np.zeros(10)
    for _ in range(4000):
        first_half_R[stratified_order(stratum_R, rng)[:5]] += 1 / 4000
    assert first_half_R == pytest.approx(0.5, abs=0.04)


def test_the_mean_gradient_of_a_stratified_batch_is_that_of_the_window() -> None:
    """The first batch of 2,000 orders: its weighted mean has the window's mean within 4 standard errors, and less spread."""
    rng = np.random.default_rng(0)
    stratum_R = (rng.random(1000) < 0.1).astype(np.int32)
    gradient_R = rng.normal(0, 0.1, 1000) + 3 * stratum_R
    means = {
        name: np.array([gradient_R[BatchCursor.of(1000, seed=[s], stratum_R=strata).order_R[:50]].mean() for s in range(2000)])
        for name, strata in (("stratified", stratum_R), ("plain", None))
    }
    error = means["stratified"].std() / np.sqrt(2000)
    assert means["stratified"].mean() == pytest.approx(gradient_R.mean(), abs=4 * error)
    assert means["stratified"].var() < 0.1 * means["plain"].var()


@given(stratum_R=strata_of_rows, seed=st.integers(0, 2**32), stratified=st.booleans(), batch_size=st.integers(1, 40))
def test_a_thinned_pass_hands_out_the_kept_rows_and_reaches_all(
    stratum_R: np.ndarray, seed: int, stratified: bool, batch_size: int
) -> None:
    kept_R = np.random.default_rng(seed).random(len(stratum_R)) < 0.3
    cursor = BatchCursor.of(len(stratum_R), seed=[seed], stratum_R=stratum_R if stratified else None, kept_R=kept_R)
    handed_out: list[int] = []
    while cursor.remaining:
        unreached = set(cursor.unreached().tolist())
        assert unreached >= set(cursor.order_R[cursor.position :].tolist())
        assert not unreached & set(handed_out)
        handed_out += cursor.next_rows(batch_size).tolist()
    assert sorted(handed_out) == np.flatnonzero(kept_R).tolist()
    assert len(cursor.unreached()) == 0


def test_a_thinned_pass_that_ends_half_way_has_reached_half_of_the_rows_left_out() -> None:
    kept_R = np.random.default_rng(0).random(20_000) < 0.1
    for stratum_R in (None, np.zeros(20_000, np.int32)):
        cursor = BatchCursor.of(20_000, seed=[0], stratum_R=stratum_R, kept_R=kept_R)
        cursor.next_rows(cursor.remaining // 2)
        left = cursor.unreached()
        assert len(left) == pytest.approx(10_000, rel=0.05)
        assert kept_R[left].mean() == pytest.approx(0.1, abs=0.006)
