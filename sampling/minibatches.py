"""Even, shuffled mini-batches of a given size, and the cursor that resumes them.

Enters: the number of rows, a seed, a batch size for each step. Leaves: row indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_schemas.examples import I64


@dataclass(kw_only=True)
class BatchCursor:
    """A seeded permutation of a window's rows, and how much of it was handed out.

    >>> cursor = BatchCursor.of(10, seed=[1])
    >>> [len(cursor.next_rows(4)) for _ in range(3)]
    [4, 3, 3]
    """

    order_R: I64
    position: int = 0
    """Rows handed out; `order_R[position:]` is still to come."""

    @classmethod
    def of(cls, num_rows: int, *, seed: Sequence[int]) -> "BatchCursor":
        """The same seed gives the same order."""
        return cls(order_R=np.random.default_rng(list(seed)).permutation(num_rows))

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
