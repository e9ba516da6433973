"""Ids to table rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_schemas.dataset import Categorical
from data_schemas.hashing import mix64
from models.ids import table_rows


@given(
    hnp.arrays(np.uint64, st.integers(0, 50)),
    st.one_of(st.integers(2, 100), st.just(2**32), st.just(2**32 + 1), st.just(2**40)),
)
def test_rows_are_never_out_of_range(ids: np.ndarray, capacity: int) -> None:
    rows = table_rows(Categorical(name="x", capacity=capacity), ids)
    assert rows.dtype == np.int64
    assert ((rows >= 0) & (rows < capacity)).all()


def test_ids_spread_evenly_over_the_table() -> None:
    rows = table_rows(Categorical(name="x", capacity=1000), mix64(np.arange(1_000_000, dtype=np.uint64)))
    counts = np.bincount(rows, minlength=1000)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 999) < 6 * np.sqrt(2 * 999)


def test_buckets_of_the_time_are_their_own_row() -> None:
    feature = Categorical(name="hour", from_time="hour_of_day", capacity=24)
    np.testing.assert_array_equal(table_rows(feature, np.arange(24, dtype=np.uint64)), np.arange(24))
