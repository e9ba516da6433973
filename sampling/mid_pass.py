"""Leaving rows out in mid-pass, with known probabilities, where time does not suffice for all.

Enters: strata and a keep rate that may fall and rise. Leaves: which rows are kept, and the probability that each had.

Every row has one permanent random number, and is kept when that is below the rate that its stratum has when the row comes up
(Poisson sampling with permanent random numbers: Brewer, Early & Joyce 1972, Austral. J. Statist. 14:231).

Letters: R rows, S strata, B rows of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_schemas.examples import I64
from sampling.minibatches import BatchCursor
from sampling.strata import F64, I32, Shape, keep_rates

_LAST_WORD = 7
"""Sets the permanent numbers apart from the order, which the same seed gives."""


@dataclass(frozen=True)
class Thinning:
    """The rarer a stratum, the longer it is kept."""

    chance_R: npt.NDArray[np.float64]
    """Uniform in [0, 1), permanent."""
    stratum_R: I32
    counts_S: I64
    shape: Shape = "sqrt"
    """How what is kept is spread over strata."""

    @classmethod
    def of(cls, num_rows: int, *, seed: Sequence[int], stratum_R: I32 | None = None, shape: Shape = "sqrt") -> "Thinning":
        """The same seed gives the same numbers; one stratum where none are given."""
        strata = np.zeros(num_rows, np.int32) if stratum_R is None else stratum_R
        chance_R = np.random.default_rng([*seed, _LAST_WORD]).random(num_rows)
        return cls(chance_R, strata, np.bincount(strata).astype(np.int64), shape)

    def rates(self, keep_rate: float) -> F64:
        """`[S]` by which `keep_rate` of all rows are expected to be kept."""
        return keep_rates(self.counts_S, keep_rate, self.shape)

    def next_rows(self, cursor: BatchCursor, batch_size: int, keep_rate: float) -> tuple[I64, F64]:
        """The next rows to learn, and the inclusion probability of each; the cursor passes those that are left out.

        What is expected to be kept of the remaining rows is split evenly, as `BatchCursor.next_rows` does. The last of them can
        come to none: everything that was left had been left out.
        """
        rates_S = self.rates(keep_rate)
        order_R = cursor.order_R
        expected = max(round(keep_rate * cursor.remaining), 1)
        size = -(-expected // -(-expected // batch_size))
        kept: list[I64] = []
        found, start = 0, cursor.position
        while found < size and start < len(order_R):
            part = order_R[start : start + 2 * batch_size]
            places = np.flatnonzero(self.chance_R[part] < rates_S[self.stratum_R[part]])[: size - found]
            kept.append(part[places])
            found += len(places)
            start += int(places[-1]) + 1 if found == size else len(part)
        rest = order_R[start:]
        if len(rest) * keep_rate < 1 and not (self.chance_R[rest] < rates_S[self.stratum_R[rest]]).any():
            start = len(order_R)
        cursor.position = start
        rows = np.concatenate(kept) if kept else order_R[:0]
        return rows, rates_S[self.stratum_R[rows]]
