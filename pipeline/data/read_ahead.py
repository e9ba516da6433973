"""Files of the click log that are probably read next, read and verified on a thread while a window is learned.

Enters: what to read, by file and columns. Leaves: the tables, to whoever asks for them. A file of the click log is never
changed, so that reading it early gives the same rows. What fails here is not told here: whoever needs the file reads it
anew, and that error names it.

Memory: the tables of the files that are expected, `MOST_BYTES` and one file more at most; they go when others are expected.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

MOST_BYTES = 512 << 20
"""Of Arrow tables; files beyond that are read when they are needed."""

Key = tuple[Path, tuple[str, ...]]
"""A file and the columns that are read of it."""


class ReadAhead:
    """Reads on one thread, in the order that it was told."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.taken = 0
        """Times that a table was there when it was asked for."""
        self._most_bytes = most_bytes
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._coming: dict[Key, Future[pa.Table | None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, reads: Mapping[Key, Callable[[], pa.Table]]) -> None:
        """Begins to read these; what was expected before is forgotten."""
        for future in self._coming.values():
            future.cancel()
        left = [self._most_bytes]

        def begin(read: Callable[[], pa.Table]) -> pa.Table | None:
            if left[0] <= 0:
                return None
            table = read()
            left[0] -= table.nbytes
            return table

        self._coming = {key: self._pool.submit(begin, read) for key, read in reads.items()}

    def take(self, path: Path, columns: Sequence[str]) -> pa.Table | None:
        """The whole file, once it was read; None where it is not expected, not begun yet, or could not be read."""
        future = self._coming.get((path, tuple(columns)))
        if future is None or future.cancel() or future.exception() is not None:
            return None
        table = future.result()
        self.taken += table is not None
        return table
