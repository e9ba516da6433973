"""Which events the click log has already.

Enters: event keys by hour, in the order in which files are committed. Leaves: which of them are new. Pure, but for reading the
log's keys.

Keys lie in sorted arrays of rising size that are merged as they grow (a log-structured merge tree, O'Neil et al. 1996), so that
n keys cost n log n however they arrive.

Letters: R rows, D distinct keys.
"""

import numpy as np
import numpy.typing as npt

from data_schemas.hashing import combine_hashes
from pipeline.data.lake import ClickLog, LogFile

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

MAX_REMEMBERED_KEYS = 64_000_000
"""Event keys kept in memory between files, 8 bytes each; beyond it they are read from the log again."""


class SeenKeys:
    """Event keys by hour, 8 bytes each: those of the click log, read when first asked for, and those of the file in hand."""

    _files: dict[int, list[LogFile]]
    _hours: set[int]
    _committed: "dict[int, _SortedKeys]"
    _staged: "dict[int, _SortedKeys]"

    def __init__(self, log: ClickLog) -> None:
        self._log = log
        self.forget()

    @property
    def newest_hour(self) -> int | None:
        """The latest hour of the log, without the file in hand; None for an empty log."""
        return max(self._hours, default=None)

    def take_new(self, hour: int, keys_R: U64, around: int = 0) -> Bools:
        """`[R]` true for the first row of each key that neither the log nor the file had in that hour; stages them.

        Args:
            hour: of the rows.
            keys_R: their event keys.
            around: nor in so many hours before and after it.
        """
        distinct, first_R = np.unique(keys_R, return_index=True)
        staged = self._staged.setdefault(hour, _SortedKeys())
        new = ~(self._of_log(hour).contain(distinct) | staged.contain(distinct))
        for other in range(hour - around, hour + around + 1):
            if other != hour:
                new &= ~(self._of_log(other).contain(distinct) | self._staged.get(other, _SortedKeys()).contain(distinct))
        staged.add(distinct[new])
        is_new_R = np.zeros(len(keys_R), bool)
        is_new_R[first_R[new]] = True
        return is_new_R

    def commit(self) -> None:
        """The file in hand is in the log."""
        only_ours = self._log.version == self._version + 1
        if not only_ours or sum(len(keys) for keys in self._committed.values()) > MAX_REMEMBERED_KEYS:
            self.forget()
            return
        for hour, keys in self._staged.items():
            self._committed[hour].merge(keys)
            self._hours.add(hour)
        self._staged = {}
        self._version += 1

    def roll_back(self) -> None:
        """The file in hand did not enter the log."""
        self._staged = {}

    def forget(self) -> None:
        """Read the log again."""
        self._version = self._log.version
        self._files = {}
        for file in self._log.files():
            self._files.setdefault(file.hour, []).append(file)
        self._hours = set(self._files)
        self._committed, self._staged = {}, {}

    def _of_log(self, hour: int) -> "_SortedKeys":
        if hour not in self._committed:
            keys = _SortedKeys()
            keys.add(np.sort(self._log.keys_of(self._files.get(hour, []))))
            self._committed[hour] = keys
        return self._committed[hour]


class Repeats:
    """Tells rows of one file with the same hour and key apart, by their number; 8 bytes a row."""

    def __init__(self) -> None:
        self._read: dict[int, _SortedKeys] = {}

    def tell_apart(self, hour: int, keys_R: U64) -> U64:
        """`[R]` a key of its own for each row: the first of the file with that key in the hour keeps it."""
        order = np.argsort(keys_R, kind="stable")
        sorted_R = keys_R[order]
        distinct, start_D, count_D = np.unique(sorted_R, return_index=True, return_counts=True)
        read = self._read.setdefault(hour, _SortedKeys())
        number_R = np.empty(len(keys_R), np.uint64)
        number_R[order] = np.arange(len(keys_R)) - np.repeat(start_D - read.count(distinct), count_D)
        read.add(sorted_R)
        return np.where(number_R > 0, combine_hashes(keys_R, number_R), keys_R)


class _SortedKeys:
    """A set, or multiset, of uint64 in sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[U64] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def contain(self, keys: U64) -> Bools:
        """Which of `keys` are in the set."""
        found = np.zeros(len(keys), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[places] == keys
        return found

    def count(self, keys: U64) -> I64:
        """How often each of `keys` was added."""
        counts = np.zeros(len(keys), np.int64)
        for run in self._runs:
            counts += np.searchsorted(run, keys, side="right") - np.searchsorted(run, keys, side="left")
        return counts

    def add(self, keys: U64) -> None:
        """Sorted keys; for a set, none that it has."""
        if not len(keys):
            return
        self._runs.append(keys)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")
            self._runs.append(merged)

    def merge(self, other: "_SortedKeys") -> None:
        """Another set, disjoint from this one."""
        for run in other._runs:
            self.add(run)
