"""Batches cut on a second thread, while the chunk before them is learned.

Enters: the rows of the next chunk as they are expected, then as they are planned. Leaves: the `MiniBatch` of the planned ones,
the same as cutting it at once would give: a plan that came out otherwise is cut anew, and what was cut for nothing is counted.

A plan is never made early. It depends on what the chunk before took and on the seconds that are left, so that making it ahead
would let a deadline see one chunk less; what is ahead is a guess that the plan stays as it is, which it nearly always does.

Letters: C rows of a chunk in this process.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from data_schemas.examples import I64
from data_schemas.minibatch import MiniBatch
from pipeline.data.encode import EncodedWindow

LEAST_ROWS = 4096
"""Rows of a chunk from which cutting it ahead costs no time where the learner needs the CPU itself: with fewer, Python's lock
changes hands more often than the second thread is worth (benchmarks/waiting.py)."""


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """What is looked up together."""

    rows_C: I64
    """Of the window."""
    filling_C: npt.NDArray[np.bool_]
    """True for rows that only fill a shape."""
    reweighted: bool = False
    """The plan has just changed their weights: what was cut before has the old ones."""

    def same_as(self, planned: "ChunkRows") -> bool:
        """Whether what was cut for this is what is planned."""
        if planned.reweighted:
            return False
        return np.array_equal(self.rows_C, planned.rows_C) and np.array_equal(self.filling_C, planned.filling_C)


def ahead_from(ahead: bool | None, device: torch.device) -> float:
    """Rows of a chunk from which it is cut ahead; None: where that costs no time."""
    if ahead is None:
        return LEAST_ROWS if device.type == "cpu" else 0
    return 0 if ahead else math.inf


class CutAhead:
    """Cuts batches of a window, at most one chunk ahead: so much memory it takes."""

    def __init__(self, window: EncodedWindow, *, from_rows: float = 0) -> None:
        """Chunks of at least `from_rows` rows are worth expecting."""
        self.waiting_seconds = 0.0
        """That `take` took."""
        self.thrown_away = 0
        """Chunks that were cut for a plan that then came out otherwise."""
        self._from_rows = from_rows
        self._window = window
        self._pool = ThreadPoolExecutor(1, "batches")  # its thread starts with the first chunk
        self._expected: tuple[ChunkRows, Future[MiniBatch]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def is_worth_it(self, num_rows: int) -> bool:
        """Whether to expect chunks of about so many rows."""
        return num_rows >= self._from_rows

    def expect(self, chunk: ChunkRows) -> None:
        """Starts to cut what is probably taken next; the weights of these rows must stay as they are until then."""
        self._expected = chunk, self._pool.submit(self._cut, chunk)

    def take(self, chunk: ChunkRows) -> MiniBatch:
        """The batch of these rows.

        Raises:
            Exception: whatever went wrong on the thread, for this chunk or for one that is thrown away.
        """
        started = time.perf_counter()
        expected, self._expected = self._expected, None
        if expected is not None and expected[0].same_as(chunk):
            batch = expected[1].result()
        else:
            if expected is not None:
                self.thrown_away += 1
                if not expected[1].cancel():
                    expected[1].result()
            batch = self._cut(chunk)
        self.waiting_seconds += time.perf_counter() - started
        return batch

    def _cut(self, chunk: ChunkRows) -> MiniBatch:
        return self._window.minibatch(chunk.rows_C, filling_B=chunk.filling_C)
