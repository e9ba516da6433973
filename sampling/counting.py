"""How often each id occurs among rows, without sorting them: popularity of items, activity of users, and who is over a cap.

Enters: one id a row. Leaves: the same ids numbered in the order in which they first come, by one pass of a hash table, and rows
grouped by such a number, by radix sort.

Letters: R rows, G distinct ids.
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.examples import I64, U64

_RADIX = 1 << 16
"""numpy sorts two bytes by radix, and more by comparing."""


class CountedIds:
    """The ids of a window's rows; they are counted when this is first asked for, and once.

    >>> CountedIds(np.array([7, 7, 9], np.uint64)).occurrences_R
    array([2, 2, 1])
    """

    def __init__(self, ids_R: U64) -> None:
        self.ids_R = ids_R

    @property
    def code_R(self) -> I64:
        """`[R]` in [0, G): ids numbered in the order in which they first come."""
        return self._codes_and_ids[0]

    @property
    def ids_G(self) -> U64:
        """The id of each code."""
        return self._codes_and_ids[1]

    @cached_property
    def counts_G(self) -> I64:
        """Rows of each id."""
        return np.bincount(self.code_R, minlength=len(self.ids_G)).astype(np.int64, copy=False)

    @property
    def occurrences_R(self) -> I64:
        """`[R]` how many rows have the row's id."""
        return self.counts_G[self.code_R]

    @cached_property
    def _codes_and_ids(self) -> tuple[I64, U64]:
        codes_R, ids_G = pd.factorize(self.ids_R)
        return codes_R.astype(np.int64, copy=False), ids_G


def grouped(code_R: npt.NDArray[np.integer], num_codes: int) -> I64:
    """`[R]` the rows in the order of their codes, which are in [0, num_codes); rows of one code stay in order.

    >>> grouped(np.array([2, 0, 2, 1]), 3)
    array([1, 3, 0, 2])
    """
    order_R = np.argsort(code_R.astype(np.uint16), kind="stable")
    while num_codes > _RADIX:
        code_R, num_codes = code_R // _RADIX, -(-num_codes // _RADIX)
        order_R = order_R[np.argsort(code_R[order_R].astype(np.uint16), kind="stable")]
    return order_R
