"""64-bit keys to slots of a bounded table, a whole window at a time.

Enters: `[R] uint64` hashes of ids, or of pairs of ids. Leaves: `[R] int64` slots in `[0, capacity)`, where the caller keeps
its state. The table is set-associative, as a processor's cache: a key may lie in any of the `WAYS` slots of its bucket, which
are one cache line, and in a full bucket the least recently used key gives way.

Letters: R rows, U distinct keys, P buckets that get new keys, W ways of a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.errors import SpecMismatch
from data_schemas.examples import I64, U64, Examples
from data_schemas.hashing import MISSING, combine_hashes, mix64, rows_of
from models.changed_rows import ChangedRows
from models.distinct import Bool, run_starts, sorted_with_positions

WAYS = 8
"""Keys of a bucket: eight keys of eight bytes are one cache line."""

FREE = np.int32(-(2**31))
"""The hour of a slot that holds no key: it goes first."""

IN_USE = np.int32(2**31 - 1)
"""The hour of a slot that the present call has returned: it never gives way."""

BLOCK_ROWS = 8192
"""Keys that are looked up at a time, so that their buckets stay in the processor's cache."""


def as_stored(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays as safetensors can keep them: it writes the memory of any that is not contiguous in its own order, and says
    nothing; unsigned keys become `int64` of the same bits."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return {name: array.view(np.int64) if array.dtype == np.uint64 else array for name, array in contiguous.items()}


class KeyIndex:
    """Which slot holds which key; memory is bounded by `capacity`, whatever arrives.

    The slots depend on the order of calls, not on the order of keys inside a call. A key loses its slot only when its bucket
    is full: with as many keys as half of the capacity 1 % do not fit, with three quarters 5 %. `MISSING` is never stored.

    >>> index = KeyIndex(1000)
    >>> slots, fresh, num_evicted = index.find_or_add(np.array([0, 7], np.uint64), now_hour=0)
    >>> slots[0], slots[1] == index.find(np.array([7], np.uint64))[0], fresh, num_evicted
    (np.int64(-1), np.True_, array([False,  True]), 0)
    """

    def __init__(self, capacity: int) -> None:
        """An empty index.

        Args:
            capacity: most slots, at least 2; rounded down to whole buckets.
        """
        assert capacity >= 2, capacity
        self.capacity = capacity
        self._ways = min(WAYS, capacity)
        self._num_buckets = capacity // self._ways
        self._keys = np.zeros(self.num_slots, np.uint64)
        self._used_hour = np.full(self.num_slots, FREE, np.int32)
        self._changed = ChangedRows(self.num_slots)

    @property
    def num_slots(self) -> int:
        """Slots that can hold a key: `capacity`, rounded down to whole buckets."""
        return self._num_buckets * self._ways

    def __len__(self) -> int:
        """Keys that are stored."""
        return int(np.count_nonzero(self._keys))

    def find(self, keys_R: U64) -> I64:
        """The slot of each key, -1 where it is not stored."""
        slots_R = np.empty(len(keys_R), np.int64)
        keys_BW = self._keys.reshape(-1, self._ways)
        for start in range(0, len(keys_R), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            bucket = self._buckets(keys_R[block])
            way = _first_true(keys_BW.take(bucket, axis=0) == keys_R[block, None])
            found = (way < self._ways) & (keys_R[block] != MISSING)
            slots_R[block] = np.where(found, bucket * self._ways + way, -1)
        return slots_R

    def new_share(self, keys_R: U64) -> float:
        """Share of rows with a key, not missing, that is not stored; 0 of no rows."""
        if not len(keys_R):
            return 0.0
        return float(((self.find(keys_R) < 0) & (keys_R != MISSING)).mean())

    def find_or_add(self, key_U: U64, now_hour: int) -> tuple[I64, Bool, int]:
        """The slot of each key; keys that are new get one, in a full bucket that of the least recently used key.

        A key that this very call has returned never gives way. Where the keys of one call overfill a bucket, the largest
        of its new keys get no slot.

        Args:
            key_U: each key once, ascending, as `distinct` gives them.
            now_hour: when these keys are used, in hours since 1970.

        Returns:
            slots: `[U]`, -1 for `MISSING` and where no place was left;
            fresh: `[U]`, true where the slot was newly assigned, so that what the caller keeps there has to be reset;
            num_evicted: stored keys that gave way.
        """
        assert (key_U[1:] > key_U[:-1]).all(), "keys that are not distinct and ascending"
        slots_U = self.find(key_U)
        found = slots_U[slots_U >= 0]
        used_hour = self._used_hour.take(found)
        self._used_hour[found] = IN_USE
        fresh_U = (slots_U < 0) & (key_U != MISSING)
        slots_U[fresh_U], num_evicted = self._place(key_U[fresh_U], now_hour)
        self._used_hour[found] = np.maximum(used_hour, now_hour)
        self._changed.add(found)
        fresh_U &= slots_U >= 0
        return slots_U, fresh_U, num_evicted

    def touch(self, slots: I64, now_hour: int) -> None:
        """Note that these slots (-1 for none) are used now, so that others give way first."""
        slots = slots[slots >= 0]
        self._used_hour[slots] = np.maximum(self._used_hour[slots], now_hour)
        self._changed.add(slots)

    def unused_since(self, hour: int) -> I64:
        """Slots whose key was last used before `hour`."""
        return np.flatnonzero((self._used_hour < hour) & (self._keys != MISSING))

    def remove(self, slots: I64) -> None:
        """Forget the keys of these slots (-1 for none); the slots are free again."""
        slots = slots[slots >= 0]
        self._keys[slots] = MISSING
        self._used_hour[slots] = FREE
        self._changed.add(slots)

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps, of the slots that hold a key alone: `slots` (ascending), `keys` and `used_hour`.

        Args:
            changed: only of the slots that were touched since `mark_saved`; those of them that hold no key now are `freed`.
        """
        touched = self._changed.rows() if changed else np.flatnonzero(self._keys)
        holds = self._keys[touched] != MISSING
        slots = touched[holds]
        kept: dict[str, npt.NDArray[Any]] = {"slots": slots, "keys": self._keys[slots], "used_hour": self._used_hour[slots]}
        return kept | {"freed": touched[~holds]} if changed else kept

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        self._changed.clear()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> I64:
        """Take the place of what `arrays()` gave, or take over what `arrays(changed=True)` gave since; returns its `slots`.

        Raises:
            SpecMismatch: the arrays come from an index of another capacity.
        """
        slots, keys = arrays["slots"], arrays["keys"]
        fits = len(slots) == len(keys) == len(arrays["used_hour"]) and (keys != MISSING).all()
        if not fits or not np.array_equal(self._buckets(keys), slots // self._ways):
            raise SpecMismatch(
                f"{len(keys)} saved keys do not lie where an index of capacity {self.capacity} looks for them; "
                "they were saved with another capacity: set that one, or start without them"
            )
        slots = slots.astype(np.int64, copy=False)
        if "freed" in arrays:
            self.remove(arrays["freed"])
            self._changed.add(slots)
        else:
            self._keys[:] = MISSING
            self._used_hour[:] = FREE
            self._changed.clear()
        self._keys[slots] = keys
        self._used_hour[slots] = arrays["used_hour"]
        return slots

    def _buckets(self, keys: U64) -> I64:
        """Keys are mixed once more: the bits that choose a key's shard or table row shall not choose its bucket."""
        return rows_of(mix64(keys), self._num_buckets)

    def _place(self, new_keys_U: U64, now_hour: int) -> tuple[I64, int]:
        """Give slots to distinct keys that are not stored, smallest first; returns them, -1 for none, and how many keys gave
        way."""
        bucket_U, order_U = sorted_with_positions(self._buckets(new_keys_U))
        first_P = run_starts(bucket_U)
        count_P = np.diff(first_P, append=len(order_U))
        rank_U = np.arange(len(order_U)) - np.repeat(first_P, count_P)
        used_PW = self._used_hour.reshape(-1, self._ways).take(bucket_U[first_P], axis=0)
        fits_U = rank_U < self._ways
        order_U = order_U[fits_U]
        slot_U = bucket_U[fits_U] * self._ways + _leaving(used_PW, np.minimum(count_P, self._ways))
        gives_way_U = self._used_hour.take(slot_U) != IN_USE
        slot_U, order_U = slot_U[gives_way_U], order_U[gives_way_U]
        num_evicted = int(np.count_nonzero(self._keys.take(slot_U)))
        self._keys[slot_U] = new_keys_U[order_U]
        self._used_hour[slot_U] = now_hour
        self._changed.add(slot_U)
        placed_U = np.full(len(new_keys_U), -1)
        placed_U[order_U] = slot_U
        return placed_U, num_evicted


@dataclass(frozen=True, kw_only=True)
class KeyChanges:
    """What counting a window in did to the keys that are stored."""

    new_keys: int = 0
    """Keys that got a slot."""
    evicted_keys: int = 0
    """Keys whose state was given up for a new one."""
    refused_rows: int = 0
    """Rows whose key got no slot: the keys of the window overfilled its bucket."""

    @staticmethod
    def of(key_U: U64, place_R: I64, slots_U: I64, fresh_U: Bool, num_evicted: int) -> "KeyChanges":
        """Those of a call of `find_or_add` for the keys of rows that lie at `place_R` among them."""
        refused_U = (slots_U < 0) & (key_U != MISSING)
        return KeyChanges(
            new_keys=int(np.count_nonzero(fresh_U)),
            evicted_keys=num_evicted,
            refused_rows=int(np.count_nonzero(refused_U.take(place_R))) if refused_U.any() else 0,
        )

    def plus(self, other: "KeyChanges") -> "KeyChanges":
        """Both together."""
        return KeyChanges(
            new_keys=self.new_keys + other.new_keys,
            evicted_keys=self.evicted_keys + other.evicted_keys,
            refused_rows=self.refused_rows + other.refused_rows,
        )


def keys_over(examples: Examples, features: Sequence[str]) -> U64:
    """`[R]` one key for the ids of `features` together; `MISSING` where any of them is.

    Args:
        examples: rows that have the features as single ids.
        features: one name or more; their order matters.
    """
    first, *others = (examples.single_ids[name] for name in features)
    if not others:
        return first
    keys_R, missing_R = first, first == MISSING
    for ids_R in others:
        keys_R = combine_hashes(keys_R, ids_R)
        missing_R |= ids_R == MISSING
    return np.where(missing_R, MISSING, np.maximum(keys_R, np.uint64(1)))


def _first_true(equal_RW: Bool) -> I64:
    """`[R]` the first true column of each row, W where none is; six times as fast as `argmax` for W of eight: the bytes of a
    row are one number, below whose lowest bit there are eight bits a column.

    >>> _first_true(np.array([[False, True], [False, False]])), _first_true(np.eye(8, dtype=bool)[[6]])
    (array([1, 2]), array([6]))
    """
    if equal_RW.shape[1] != 8:
        first_R: I64 = np.where(equal_RW.any(axis=1), equal_RW.argmax(axis=1), equal_RW.shape[1])
        return first_R
    bytes_R: U64 = equal_RW.view("<u8")[:, 0]
    below_R: U64 = (bytes_R & -bytes_R) - np.uint64(1)  # of 0 it is all bits: eight columns
    columns_R: I64 = (np.bitwise_count(below_R) >> np.uint8(3)).astype(np.int64)
    return columns_R


def _leaving(used_PW: npt.NDArray[np.int32], count_P: I64) -> I64:
    """The ways that `count_P` new keys of each bucket take, bucket after bucket: the least recently used first.

    >>> _leaving(np.array([[5, 3, 4], [1, 2, 1]], np.int32), np.array([1, 2]))
    array([1, 0, 2])
    """
    first_P = _first_leaving(used_PW)
    several_P = count_P > 1
    if not several_P.any():
        return first_P  # most buckets get one key, for which nothing need be sorted
    leaving = np.repeat(first_P, count_P)
    in_order = np.argsort(used_PW[several_P], axis=1, kind="stable")
    leaving[np.repeat(several_P, count_P)] = in_order[np.arange(used_PW.shape[1]) < count_P[several_P, None]]
    return leaving


def _first_leaving(used_PW: npt.NDArray[np.int32]) -> I64:
    """`[P]` the first way of each row that is free, else the first with the least hour."""
    first_P = _first_true(used_PW == FREE)
    full_P = first_P == used_PW.shape[1]
    if full_P.any():
        first_P[full_P] = _least(used_PW[full_P])
    return first_P


def _least(used_PW: npt.NDArray[np.int32]) -> I64:
    """`[P]` the first way of each row with the least hour."""
    ways = used_PW.shape[1]
    both_PW: I64 = used_PW.astype(np.int64) * ways + np.arange(ways)
    least_P: I64 = reduce(np.minimum, both_PW.T) % ways
    return least_P
