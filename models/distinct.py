"""Distinct values and where they stood, by sorting: in numpy 2.4 twice as fast as the hashing of `np.unique`.

Enters: keys or places of the rows of a window or of a batch. Leaves: each once, ascending, and which of them each row has.

Letters: R rows, K kinds of values, N values of each, U distinct ones.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_schemas.examples import I64, U64

Bool = npt.NDArray[np.bool_]
V = TypeVar("V", bound=np.generic)


def distinct(keys_R: U64) -> tuple[U64, I64]:
    """Each key once, ascending, and where each row's key stands among them.

    >>> distinct(np.array([7, 3, 7], np.uint64))
    (array([3, 7], dtype=uint64), array([1, 0, 1]))
    """
    order_R = np.argsort(keys_R)
    return _distinct_of(keys_R.take(order_R), order_R)


def distinct_by_kind(places_KN: I64) -> tuple[I64, I64]:
    """The same of small numbers, of which all of a kind are below all of the next; the rows are those of kind after kind.

    >>> distinct_by_kind(np.array([[7, 3, 7], [9, 8, 8]]))
    (array([3, 7, 8, 9]), array([1, 0, 1, 3, 2, 2]))
    """
    sorted_KN, position_KN = sorted_with_positions(places_KN)
    position_KN += places_KN.shape[1] * np.arange(len(places_KN))[:, None]
    return _distinct_of(sorted_KN.reshape(-1), position_KN.reshape(-1))


def sorted_with_positions(numbers_KN: I64) -> tuple[I64, I64]:
    """The numbers along the last axis rising, and where each stood, equal ones in their order: numbers of both together are
    sorted, which is five times as fast as a stable `argsort`.

    >>> sorted_with_positions(np.array([7, 3, 7]))
    (array([3, 7, 7]), array([1, 0, 2]))

    Args:
        numbers_KN: `[N]`, or `[K, N]`; not negative, and with the bits of N in no more than 63.
    """
    count = numbers_KN.shape[-1]
    bits = count.bit_length()
    assert numbers_KN.max(initial=0) < 2 ** (63 - bits), f"numbers too large to be sorted with {count:,} positions"
    both_KN = np.sort((numbers_KN << bits) | np.arange(count), axis=-1)
    position_KN = both_KN & ((1 << bits) - 1)
    both_KN >>= bits
    return both_KN, position_KN


def run_starts(sorted_values: npt.NDArray[Any]) -> I64:
    """Where each run of equal values begins.

    >>> run_starts(np.array([3, 3, 5, 8, 8]))
    array([0, 2, 3])
    """
    return np.flatnonzero(_begins(sorted_values))


def _begins(sorted_values: npt.NDArray[Any]) -> Bool:
    begins = np.ones(len(sorted_values), np.bool_)
    np.not_equal(sorted_values[1:], sorted_values[:-1], out=begins[1:])
    return begins


def _distinct_of(sorted_R: npt.NDArray[V], position_R: I64) -> tuple[npt.NDArray[V], I64]:
    begins_R = _begins(sorted_R)
    place_R = np.empty(len(sorted_R), np.int64)
    place_R[position_R] = np.cumsum(begins_R) - 1
    return sorted_R.take(np.flatnonzero(begins_R)), place_R
