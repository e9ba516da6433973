"""Examples: the rows of a window as the learner sees them, column-major, ids hashed.

Letters: R rows, N numeric features, V ids of all lists of a column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class IdLists:
    """A list of ids a row: row r has `values_V[offsets[r]:offsets[r + 1]]`."""

    values_V: U64
    offsets: I64
    """`[R + 1]`, starts at 0, never falls."""

    def take(self, rows: I64) -> "IdLists":
        """The lists of `rows`, in that order."""
        positions, offsets = gathered(self.offsets, rows)
        return IdLists(values_V=self.values_V[positions], offsets=offsets)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows of a click log, one array a column."""

    single_ids: Mapping[str, U64]
    """By feature: `[R]` hashed ids, `hashing.MISSING` where there is none; features from the time hold the bucket."""
    list_ids: Mapping[str, IdLists]
    """By feature: lists of hashed ids."""
    numeric_NR: F32
    """`[N, R]` raw numbers in the order of the spec; NaN is missing."""
    labels_R: F32
    """`[R]` 0 or 1; a correction, which makes a positive of a row that was learned as a negative, has one over its weight."""
    weights_R: F32
    """`[R]` one over the inclusion probability; 1 where nothing was sampled."""
    user_R: U64
    """`[R]` hashed user; `hashing.MISSING` where unknown."""
    item_R: U64
    """`[R]` hashed item."""
    hour_R: I64
    """`[R]` event time in whole hours since 1970-01-01T00Z."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.labels_R)

    def take(self, rows: I64) -> "Examples":
        """The examples at `rows`, in that order."""
        return Examples(
            single_ids={name: ids[rows] for name, ids in self.single_ids.items()},
            list_ids={name: lists.take(rows) for name, lists in self.list_ids.items()},
            numeric_NR=self.numeric_NR[:, rows],
            labels_R=self.labels_R[rows],
            weights_R=self.weights_R[rows],
            user_R=self.user_R[rows],
            item_R=self.item_R[rows],
            hour_R=self.hour_R[rows],
        )

    def with_weights(self, weights_R: F32) -> "Examples":
        """The same rows with other weights."""
        return replace(self, weights_R=weights_R)


def gathered(offsets: I64, chosen: I64) -> tuple[I64, I64]:
    """Positions of the values of the lists at `chosen`, list after list, and these lists' new offsets.

    >>> gathered(np.array([0, 2, 2, 5]), np.array([2, 1, 0]))
    (array([2, 3, 4, 0, 1]), array([0, 3, 3, 5]))
    >>> gathered(np.array([0]), np.array([], np.int64))
    (array([], dtype=int64), array([0]))
    """
    starts = offsets.take(chosen)
    lengths = offsets.take(chosen + 1) - starts
    new_offsets = np.zeros(len(chosen) + 1, np.int64)
    lengths.cumsum(out=new_offsets[1:])
    positions: I64 = (starts - new_offsets[:-1]).repeat(lengths) + np.arange(new_offsets[-1])
    return positions, new_offsets


def concatenate(parts: Sequence[Examples]) -> Examples:
    """All rows of `parts` (at least one, of the same spec), in order."""
    first = parts[0]
    return Examples(
        single_ids={name: np.concatenate([p.single_ids[name] for p in parts]) for name in first.single_ids},
        list_ids={name: _join([p.list_ids[name] for p in parts]) for name in first.list_ids},
        numeric_NR=np.concatenate([p.numeric_NR for p in parts], axis=1),
        labels_R=np.concatenate([p.labels_R for p in parts]),
        weights_R=np.concatenate([p.weights_R for p in parts]),
        user_R=np.concatenate([p.user_R for p in parts]),
        item_R=np.concatenate([p.item_R for p in parts]),
        hour_R=np.concatenate([p.hour_R for p in parts]),
    )


def _join(lists: Sequence[IdLists]) -> IdLists:
    lengths = np.concatenate([np.diff(part.offsets) for part in lists])
    return IdLists(
        values_V=np.concatenate([part.values_V for part in lists]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
