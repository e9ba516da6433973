"""Keys to slots of a bounded table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.errors import SpecMismatch
from data_schemas.examples import Examples
from data_schemas.hashing import MISSING, combine_hashes, mix64, rows_of
from models.distinct import distinct
from models.key_index import WAYS, KeyChanges, KeyIndex, keys_over


def as_keys(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


def find_or_add(index: KeyIndex, keys_R: np.ndarray, hour: int) -> tuple[np.ndarray, np.ndarray, int]:
    """By row, of keys that may repeat."""
    key_U, place_R = distinct(keys_R)
    slots_U, fresh_U, num_evicted = index.find_or_add(key_U, hour)
    return slots_U.take(place_R), fresh_U.take(place_R), num_evicted


class SlowIndex:
    """The same rules, a key at a time, in dictionaries."""

    def __init__(self, capacity: int) -> None:
        self.ways = min(WAYS, capacity)
        self.num_buckets = capacity // self.ways
        self.key_of: dict[int, int] = {}
        self.used: dict[int, int] = {}

    def find(self, key: int) -> int:
        return next((slot for slot, stored in self.key_of.items() if stored == key), -1)

    def find_or_add(self, keys: list[int], hour: int) -> tuple[list[int], list[bool], int]:
        distinct = sorted(set(keys) - {0})
        in_use = {self.find(key) for key in distinct} - {-1}
        new = [key for key in distinct if self.find(key) < 0]
        evicted = 0
        for key in new:
            bucket = int(rows_of(mix64(as_keys([key])), self.num_buckets)[0])
            slots = range(bucket * self.ways, (bucket + 1) * self.ways)
            candidates = [slot for slot in slots if slot not in in_use]
            if not candidates:
                continue
            slot = min(candidates, key=lambda s: (self.used.get(s, -(10**9)), s))
            evicted += slot in self.key_of
            self.key_of[slot], self.used[slot] = key, hour
            in_use.add(slot)
        for slot in in_use:
            self.used[slot] = max(self.used[slot], hour)
        return [self.find(k) for k in keys], [k in new and self.find(k) >= 0 for k in keys], evicted


CALLS = st.lists(st.tuples(st.lists(st.integers(0, 60), max_size=30), st.integers(0, 5)), max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(capacity=st.integers(2, 40), calls=CALLS)
def test_an_index_equals_a_dictionary_with_buckets_that_give_up_the_least_recently_used(
    capacity: int, calls: list[tuple[list[int], int]]
) -> None:
    index, slow = KeyIndex(capacity), SlowIndex(capacity)
    for keys, hour in calls:
        slots, fresh, evicted = find_or_add(index, as_keys(keys), hour)
        assert (slots.tolist(), fresh.tolist(), evicted) == slow.find_or_add(keys, hour)
        assert index.find(as_keys(list(range(61)))).tolist() == [slow.find(key) if key else -1 for key in range(61)]
        assert len(index) == len(slow.key_of) <= capacity


@settings(max_examples=50, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 2**64 - 1), max_size=60))
def test_the_order_of_keys_in_a_call_does_not_matter(keys: list[int]) -> None:
    shuffled = np.random.default_rng(0).permutation(as_keys(keys))
    one, other = KeyIndex(32), KeyIndex(32)
    find_or_add(one, as_keys(keys), 3)
    find_or_add(other, shuffled, 3)
    np.testing.assert_array_equal(one.find(as_keys(keys)), other.find(as_keys(keys)))


def test_no_key_is_lost_while_its_bucket_has_room_and_slots_are_distinct() -> None:
    keys = np.random.default_rng(1).integers(1, 2**64, 20_000, np.uint64)
    index = KeyIndex(8 * 20_000)
    for hour, part in enumerate(np.split(keys, 20)):
        slots, fresh, evicted = find_or_add(index, part, hour)
        assert fresh.all()
        assert evicted == 0
    slots = index.find(keys)
    assert (slots >= 0).all()
    assert len(np.unique(slots)) == len(np.unique(keys)) == len(index)
    assert slots.max() < index.num_slots <= index.capacity


def test_a_table_keeps_99_keys_of_100_at_half_of_its_capacity() -> None:
    keys = np.random.default_rng(2).integers(1, 2**64, 32_768, np.uint64)
    index = KeyIndex(65_536)
    find_or_add(index, keys, 0)
    assert (index.find(keys) >= 0).mean() > 0.985


def test_a_burst_of_new_keys_never_passes_the_capacity() -> None:
    rng = np.random.default_rng(3)
    index = KeyIndex(1000)
    for hour in range(10):
        slots, fresh, _ = find_or_add(index, rng.integers(1, 2**64, 5000, np.uint64), hour)
        assert slots.max() < 1000
        assert len(np.unique(slots[fresh])) == fresh.sum()
    assert len(index) == index.num_slots == 1000


def test_a_key_used_in_this_call_or_touched_since_outlives_the_others() -> None:
    index = KeyIndex(8)
    find_or_add(index, as_keys(list(range(1, 9))), 1)
    index.touch(index.find(as_keys([1, 2, 999])), 5)
    slots, fresh, evicted = find_or_add(index, as_keys([3, *range(20, 25)]), 6)
    assert (slots >= 0).all()
    assert fresh.tolist() == [False] + [True] * 5
    assert evicted == 5
    assert (index.find(as_keys([1, 2, 3])) >= 0).all()
    assert (index.find(as_keys([4, 5, 6, 7, 8])) == -1).all()


def test_missing_is_never_stored() -> None:
    index = KeyIndex(16)
    slots, fresh, evicted = find_or_add(index, np.full(3, MISSING), 0)
    assert (slots.tolist(), fresh.any(), evicted, len(index)) == ([-1] * 3, False, 0, 0)
    assert index.find(np.full(1, MISSING)).tolist() == [-1]


def test_no_keys_at_all_are_fine() -> None:
    index = KeyIndex(16)
    slots, fresh, evicted = find_or_add(index, as_keys([]), 0)
    assert (len(slots), len(fresh), evicted, len(index.find(as_keys([])))) == (0, 0, 0, 0)


def test_a_restored_index_goes_on_as_if_it_had_not_stopped() -> None:
    rng = np.random.default_rng(4)
    one = KeyIndex(300)
    for hour in range(5):
        find_or_add(one, rng.integers(0, 600, 200).astype(np.uint64), hour)
    other = KeyIndex(300)
    find_or_add(other, as_keys([77, 78]), 99)
    other.load(one.arrays())
    for hour in range(5, 9):
        keys = rng.integers(0, 600, 200).astype(np.uint64)
        for left, right in zip(find_or_add(one, keys, hour), find_or_add(other, keys, hour), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("seed", range(5))
def test_what_changed_since_brings_a_copy_to_the_same_keys_and_marks_them_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = KeyIndex(300), KeyIndex(300)
    find_or_add(one, rng.integers(1, 900, 150).astype(np.uint64), 0)
    other.load(one.arrays())
    one.mark_saved()
    for hour in range(1, 6):
        find_or_add(one, rng.integers(1, 900, int(rng.integers(0, 60))).astype(np.uint64), hour)
        one.touch(one.find(rng.integers(1, 900, 5).astype(np.uint64)), hour + 1)
        one.remove(one.unused_since(hour - 3)[: int(rng.integers(0, 40))])
    changed = one.arrays(changed=True)
    assert 0 < len(changed["slots"]) < len(one.arrays()["slots"])
    assert len(changed["freed"])
    other.load(changed)
    for copy in ({}, {"changed": True}):
        for name, array in one.arrays(**copy).items():
            np.testing.assert_array_equal(other.arrays(**copy)[name], array)


def test_an_index_of_another_capacity_is_refused_with_the_capacity() -> None:
    index = KeyIndex(300)
    find_or_add(index, as_keys(list(range(1, 100))), 0)
    with pytest.raises(SpecMismatch, match="capacity 400"):
        KeyIndex(400).load(index.arrays())


def test_a_key_over_several_features_is_missing_where_one_of_them_is() -> None:
    ids = {"a": as_keys([1, 2, 0, 4]), "b": as_keys([5, 0, 7, 8]), "c": as_keys([9, 9, 9, 0])}
    nothing = np.zeros(4, np.float32)
    examples = Examples(
        single_ids=ids, list_ids={}, numeric_NR=np.empty((0, 4), np.float32), labels_R=nothing, weights_R=nothing,
        user_R=ids["a"], item_R=ids["b"], hour_R=np.zeros(4, np.int64),
    )  # fmt: skip
    pair = combine_hashes(ids["a"], ids["b"])
    np.testing.assert_array_equal(keys_over(examples, ["a"]), ids["a"])
    np.testing.assert_array_equal(keys_over(examples, ["a", "b"]), [pair[0], 0, 0, pair[3]])
    np.testing.assert_array_equal(keys_over(examples, ["a", "b", "c"]), [combine_hashes(pair, ids["c"])[0], 0, 0, 0])
    assert ids["a"].tolist() == [1, 2, 0, 4]


@pytest.mark.parametrize("keys", [[5, 5], [6, 5]])
def test_an_index_refuses_keys_that_are_not_distinct_and_ascending(keys: list[int]) -> None:
    with pytest.raises(AssertionError, match="distinct and ascending"):
        KeyIndex(16).find_or_add(as_keys(keys), 0)


def test_changes_count_keys_once_and_all_rows_that_were_refused() -> None:
    key_U, place_R = distinct(as_keys([5, 5, 6, 0, 7, 7]))
    changes = KeyChanges.of(key_U, place_R, np.array([-1, 1, 2, -1]), np.array([False, True, False, False]), 1)
    assert changes == KeyChanges(new_keys=1, evicted_keys=1, refused_rows=2)
    assert changes.plus(changes) == KeyChanges(new_keys=2, evicted_keys=2, refused_rows=4)
