"""A bounded reservoir of past rows: within each stratum a uniform sample of all rows ever seen.

Every row gets a permanent uniform number when it is seen; the reservoir holds the rows with the smallest numbers of each
stratum. So each row of a stratum was equally likely to be held, `min(1, places / seen)`, in whatever order and windows the rows
came (bottom-k sampling: Cohen & Kaplan 2007, "Summarizing Data Using Bottom-k Sketches").

Enters: the strata of a window's rows. Leaves: which held rows stay, which new ones enter; and for learning, rows to replay with
weights by which they stand for all that was seen.

Letters: K held rows, R rows of a window, S strata, M replayed rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from data_schemas.examples import I64

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Reservoir:
    """Who is held, without the rows themselves."""

    number_K: F64
    """The permanent number of each held row, in [0, 1)."""
    stratum_K: I32
    seen_S: I64
    """Rows of each stratum that were ever offered."""
    places: int
    """Rows that are held of each stratum at most."""

    @classmethod
    def empty(cls, *, capacity: int, num_strata: int) -> "Reservoir":
        """Nothing held; the capacity is shared out evenly.

        Raises:
            ValueError: fewer places than strata.
        """
        if capacity < num_strata:
            raise ValueError(f"capacity must be at least one row for each of {num_strata} strata, got {capacity}")
        nothing = np.empty(0)
        return cls(
            number_K=nothing,
            stratum_K=nothing.astype(np.int32),
            seen_S=np.zeros(num_strata, np.int64),
            places=capacity // num_strata,
        )

    @property
    def num_rows(self) -> int:
        """K."""
        return len(self.number_K)

    @property
    def held_S(self) -> I64:
        """Held rows of each stratum."""
        return np.bincount(self.stratum_K, minlength=len(self.seen_S)).astype(np.int64)

    @property
    def inclusion_K(self) -> F64:
        """Probability with which each held row came to be held: held over seen of its stratum."""
        inclusion: F64 = (self.held_S / np.maximum(self.seen_S, 1))[self.stratum_K]
        return inclusion

    def offer(self, stratum_R: I32, seed: Sequence[int]) -> tuple["Reservoir", I64, I64]:
        """The reservoir after more rows were seen.

        Returns:
            it, the places of held rows that stay, and the rows that enter; the new reservoir holds those, then these.
        """
        number = np.concatenate([self.number_K, np.random.default_rng(list(seed)).random(len(stratum_R))])
        stratum = np.concatenate([self.stratum_K, stratum_R]).astype(np.int32)
        order = np.lexsort((number, stratum))
        rank = np.arange(len(order)) - np.searchsorted(stratum[order], stratum[order])
        kept = np.sort(order[rank < self.places])
        seen_S = self.seen_S + np.bincount(stratum_R, minlength=len(self.seen_S))
        after = replace(self, number_K=number[kept], stratum_K=stratum[kept], seen_S=seen_S)
        return after, kept[kept < self.num_rows], kept[kept >= self.num_rows] - self.num_rows

    def draw(self, num_rows: int, seed: Sequence[int], preference_K: F64 | None = None) -> tuple[I64, F64]:
        """Rows to replay, without replacement, of each stratum in proportion to what was seen of it, as far as it goes.

        Args:
            preference_K: above 0; within its stratum, each next row is drawn with a probability in proportion to it (Efraimidis
                & Spirakis 2006, "Weighted random sampling with a reservoir"). None: all alike.

        Returns:
            `[M]` places of held rows, M at most `num_rows`, and weights of mean 1: the share of each stratum among all that was
            seen, over its share among the drawn. With no preference, one over the weight is in proportion to the row's
            inclusion probability, held and drawn; with one, the rows stand for the past as the preference weighs it.
        """
        share_S = self.seen_S / max(int(self.seen_S.sum()), 1)
        take_S = np.minimum(np.maximum(np.round(share_S * num_rows), self.held_S > 0), self.held_S).astype(np.int64)
        number_K = np.random.default_rng(list(seed)).standard_exponential(self.num_rows)
        order = np.lexsort((number_K if preference_K is None else number_K / preference_K, self.stratum_K))
        rank = np.arange(len(order)) - np.searchsorted(self.stratum_K[order], self.stratum_K[order])
        drawn = np.sort(order[rank < take_S[self.stratum_K[order]]])
        weight_S = share_S * take_S.sum() / np.maximum(take_S, 1)
        return drawn, weight_S[self.stratum_K[drawn]]
