"""Distinct values by sorting, against numpy's own."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.distinct import distinct, distinct_by_kind, sorted_with_positions


@settings(max_examples=50, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=40))
def test_distinct_keys_are_those_of_numpy(keys: list[int]) -> None:
    for own, known in zip(
        distinct(np.array(keys, np.uint64)), np.unique(np.array(keys, np.uint64), return_inverse=True), strict=True
    ):
        np.testing.assert_array_equal(own, known)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    places=st.lists(st.integers(0, 2**40 - 1) | st.integers(0, 3), max_size=40), kinds=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_distinct_places_of_several_kinds_are_those_of_numpy(places: list[int], kinds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    places_KN = np.stack([rng.permutation(np.array(places, np.int64)) + (kind << 40) for kind in range(kinds)])
    for own, known in zip(distinct_by_kind(places_KN), np.unique(places_KN.reshape(-1), return_inverse=True), strict=True):
        np.testing.assert_array_equal(own, known)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(numbers=st.lists(st.integers(0, 2**50), max_size=40))
def test_numbers_are_sorted_with_their_positions_as_a_stable_argsort_does(numbers: list[int]) -> None:
    numbers_N = np.array(numbers, np.int64)
    order_N = np.argsort(numbers_N, kind="stable")
    for own, known in zip(sorted_with_positions(numbers_N), (numbers_N[order_N], order_N), strict=True):
        np.testing.assert_array_equal(own, known)


@pytest.mark.parametrize(("largest", "fits"), [(2**60 - 1, True), (2**60, False)])
def test_numbers_that_leave_no_bits_for_positions_are_refused(largest: int, fits: bool) -> None:
    with nullcontext() if fits else pytest.raises(AssertionError, match="too large to be sorted with 4 positions"):
        sorted_with_positions(np.array([0, largest, 3, 1]))
