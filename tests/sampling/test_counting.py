"""Counting and grouping by hash and radix, against sorting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampling.counting import CountedIds, grouped

MOST = 2**64 - 1
ids_of_rows = st.lists(st.integers(0, 9) | st.integers(0, MOST) | st.sampled_from([0, 2**63, MOST]), max_size=60).map(
    lambda ids: np.array(ids, np.uint64)
)


@given(ids_R=ids_of_rows)
def test_counts_are_what_sorting_gives(ids_R: np.ndarray) -> None:
    counted = CountedIds(ids_R)
    ids, inverse_R, counts = np.unique(ids_R, return_inverse=True, return_counts=True)
    assert counted.occurrences_R.tolist() == counts[inverse_R].tolist()
    assert dict(zip(counted.ids_G.tolist(), counted.counts_G.tolist(), strict=True)) == dict(
        zip(ids.tolist(), counts.tolist(), strict=True)
    )
    assert np.array_equal(counted.ids_G[counted.code_R], ids_R)


def test_counts_of_many_ids_are_what_sorting_gives() -> None:
    ids_R = np.random.default_rng(0).zipf(1.3, 200_000).astype(np.uint64)
    _, inverse_R, counts = np.unique(ids_R, return_inverse=True, return_counts=True)
    assert np.array_equal(CountedIds(ids_R).occurrences_R, counts[inverse_R])


@pytest.mark.parametrize("most", [3, 2**16, 2**16 + 1, 2**33])
@pytest.mark.parametrize("num_rows", [0, 1, 5000])
def test_rows_are_grouped_as_a_stable_sort_does(most: int, num_rows: int) -> None:
    code_R = np.random.default_rng([most, num_rows]).integers(0, most, num_rows)
    code_R[: num_rows // 2] //= 2**15
    assert np.array_equal(grouped(code_R, most), np.argsort(code_R, kind="stable"))
