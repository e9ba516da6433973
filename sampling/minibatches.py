"""Even, shuffled mini-batches of a given size, and the cursor that resumes them.

Enters: the number of rows, a seed, strata where batches shall mirror them, a batch size for each step. Leaves: row indices.

Letters: R rows, S strata, K kept rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_schemas.examples import I64

Bools = npt.NDArray[np.bool_]


@dataclass(kw_only=True)
class BatchCursor:
    """A seeded permutation of a window's rows, and how much of it was handed out.

    >>> cursor = BatchCursor.of(10, seed=[1])
    >>> [len(cursor.next_rows(4)) for _ in range(3)]
    [4, 3, 3]
    """

    order_R: I64
    """The rows that are handed out: all of the window, or the kept ones."""
    position: int = 0
    """Rows handed out; `order_R[position:]` is still to come."""
    left_out: "LeftOut | None" = None
    """The rows that are not in `order_R`, where there are any."""

    @classmethod
    def of(
        cls, num_rows: int, *, seed: Sequence[int], stratum_R: npt.NDArray[np.int32] | None = None, kept_R: Bools | None = None
    ) -> "BatchCursor":
        """The same seed gives the same order.

        Args:
            num_rows: R, of the window.
            seed: of the order.
            stratum_R: any run of consecutive rows mirrors these strata; a plain permutation without them.
            kept_R: only these rows are handed out. The others are spread among them, and reached as the pass goes by.
        """
        rng = np.random.default_rng(list(seed))
        if stratum_R is None:
            order_R = rng.permutation(num_rows)
        else:
            order_R = stratified_order(stratum_R if kept_R is None else 2 * stratum_R + kept_R, rng)
        if kept_R is None or kept_R.all():
            return cls(order_R=order_R)
        left_out = LeftOut(order_R, np.flatnonzero(kept_R[order_R]))
        return cls(order_R=order_R[left_out.place_K], left_out=left_out)

    @property
    def remaining(self) -> int:
        """Rows still to come."""
        return len(self.order_R) - self.position

    def next_rows(self, batch_size: int) -> I64:
        """The next rows: what remains is split evenly over as few steps of at most `batch_size` as will do.

        So the last batch is no small tail: 10 rows in batches of 4 are 4, 3, 3.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        steps = -(-self.remaining // batch_size)
        if steps == 0:
            return self.order_R[:0]
        size = -(-self.remaining // steps)
        rows = self.order_R[self.position : self.position + size]
        self.position += size
        return rows

    def unreached(self) -> I64:
        """Rows of the window that the pass has not come to, those left out among them."""
        return self.order_R[self.position :] if self.left_out is None else self.left_out.after(self.position)


@dataclass(frozen=True)
class LeftOut:
    """Where rows that are not handed out lie among those that are: a pass that ends early has not judged the rest of them."""

    order_R: I64
    """All rows of the window."""
    place_K: I64
    """Places in it of the rows that are handed out."""

    def after(self, position: int) -> I64:
        """All rows after the first `position` that are handed out; none after the last of them."""
        if position == len(self.place_K):
            return self.order_R[:0]
        return self.order_R[self.place_K[position - 1] + 1 if position else 0 :]


def stratified_order(stratum_R: npt.NDArray[np.int32], rng: np.random.Generator) -> I64:
    """A random permutation in which the rows of each stratum are evenly spaced, from a random start.

    Systematic sampling (Cochran 1977, Sampling Techniques, ch. 8) of every stratum at once: row j of a shuffled stratum of n
    rows has the place (j + u) / n, with one uniform u in [0, 1) for the stratum. Every row is as likely to be at any place as
    any other, so the mean gradient of a batch has the same expectation as that of a uniform one; a run of b rows has
    b n / R rows of the stratum, give or take one or two. With one stratum it is the permutation of `rng` itself.
    """
    shuffled_R = rng.permutation(len(stratum_R))
    found_R = stratum_R[shuffled_R]
    narrow_R = found_R.astype(np.uint16) if found_R.max(initial=0) < 2**16 else found_R  # two bytes sort by radix
    counts_S = np.bincount(stratum_R)
    first_S = np.cumsum(counts_S) - counts_S - rng.random(len(counts_S))
    place_R = (np.arange(len(stratum_R)) - np.repeat(first_S, counts_S)) / np.repeat(counts_S, counts_S)
    return shuffled_R[np.argsort(narrow_R, kind="stable")[np.argsort(place_R, kind="stable")]]
