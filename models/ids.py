"""Hashed ids to table rows.

Enters: `[R] uint64` hashes of a feature. Leaves: `[R] int64` rows of its table, never out of range.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from data_schemas.dataset import Categorical
from data_schemas.examples import I64, U64
from data_schemas.hashing import combine_hashes, rows_of


def table_rows(feature: Categorical, ids: U64) -> I64:
    """The row of each id in the feature's table.

    Ids are spread over the table by their hash, so two ids may share a row; buckets of the time are their own row.

    >>> table_rows(Categorical(name="hour", from_time="hour_of_day", capacity=24), np.array([0, 23], np.uint64))
    array([ 0, 23])
    """
    if feature.from_time:
        return np.minimum(ids, np.uint64(feature.capacity - 1)).astype(np.int64)
    return rows_of(ids, feature.capacity)


def cross_rows(ids: Sequence[U64], capacity: int) -> I64:
    """The row of each combination of ids, one column of `ids` for each feature crossed."""
    return rows_of(reduce(combine_hashes, ids), capacity)
