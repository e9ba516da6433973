"""What each user clicked last."""

from collections import defaultdict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.dataset import History
from data_schemas.errors import SpecMismatch
from data_schemas.examples import Examples
from models.histories import Histories, HistoryBank

OF = ("item", "author")


def rows(user: list[int], item: list[int], label: list[int], hour: int = 0) -> Examples:
    items = np.array(item, np.uint64)
    return Examples(
        single_ids={"user": np.array(user, np.uint64), "item": items, "author": items * np.uint64(10)},
        list_ids={},
        numeric_NR=np.empty((0, len(item)), np.float32),
        labels_R=np.array(label, np.float32),
        weights_R=np.ones(len(item), np.float32),
        user_R=np.array(user, np.uint64),
        item_R=items,
        hour_R=np.full(len(item), hour, np.int64),
    )


def by_row(histories: Histories, feature: str = "item") -> list[list[int]]:
    lists = histories.lists[feature].take(histories.position_R)
    return [part.tolist() for part in np.split(lists.values_V, lists.offsets[1:-1])]


WINDOWS = st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99), st.integers(0, 1)), max_size=25), max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(windows=WINDOWS, length=st.integers(1, 7), most=st.integers(1, 9))
def test_histories_equal_a_dictionary_of_deques(windows: list[list[tuple[int, int, int]]], length: int, most: int) -> None:
    bank = HistoryBank(History(of=OF, length=length, capacity=64, max_events_per_window=most))
    slow: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=length))
    for hour, window in enumerate(windows):
        examples = rows(*([list(column) for column in zip(*window, strict=True)] or [[], [], []]), hour=hour)
        if window:
            found = bank.lookup(examples)
            assert by_row(found) == [list(slow[user]) for user, _, _ in window]
            assert by_row(found, "author") == [[10 * item for item in slow[user]] for user, _, _ in window]
            assert found.num_users == len({user for user, _, _ in window})
        clicks: dict[int, list[int]] = defaultdict(list)
        for user, item, label in window:
            if user and label:
                clicks[user].append(item)
        _, left_out = bank.add(examples)
        assert left_out == sum(max(len(items) - most, 0) for items in clicks.values())
        for user, items in clicks.items():
            slow[user].extend(items[-most:])


def test_a_crawler_is_cut_to_its_last_events_and_counted() -> None:
    bank = HistoryBank(History(of=("item",), length=50, capacity=64))
    crawler = list(range(1, 80_001))
    changes, left_out = bank.add(rows([3] * 80_000 + [4], [*crawler, 5], [1] * 80_001))
    assert (changes.new_keys, left_out) == (2, 79_000)
    assert by_row(bank.lookup(rows([3, 4], [0, 0], [0, 0]))) == [crawler[-50:], [5]]


def test_a_window_does_not_see_its_own_clicks_and_rows_that_are_no_clicks_are_not_kept() -> None:
    bank = HistoryBank(History(of=OF, capacity=64))
    window = rows([1, 1, 2], [5, 6, 7], [1, 0, 0])
    assert by_row(bank.lookup(window)) == [[], [], []]
    bank.add(window)
    assert by_row(bank.lookup(window)) == [[5], [5], []]


def test_rows_without_a_user_have_no_history() -> None:
    bank = HistoryBank(History(of=OF, capacity=64))
    bank.add(rows([0, 0], [5, 6], [1, 1]))
    assert by_row(bank.lookup(rows([0], [5], [1]))) == [[]]


def test_a_user_who_takes_the_place_of_another_starts_from_nothing() -> None:
    bank = HistoryBank(History(of=OF, capacity=2, length=3))
    bank.add(rows([1, 2], [5, 6], [1, 1], hour=0))
    changes, _ = bank.add(rows([3, 4, 5], [7, 8, 9], [1, 1, 1], hour=1))
    assert (changes.new_keys, changes.evicted_keys, changes.refused_rows) == (2, 2, 1)
    assert by_row(bank.lookup(rows([1, 2, 3, 4, 5], [0] * 5, [0] * 5))) == [[], [], [7], [8], []]


def test_restored_histories_go_on_as_if_they_had_not_stopped() -> None:
    history = History(of=OF, capacity=10, length=4)
    one, other, rng = HistoryBank(history), HistoryBank(history), np.random.default_rng(9)

    def window(hour: int) -> Examples:
        return rows(*(rng.integers(0, high, 40).tolist() for high in (15, 99, 2)), hour=hour)

    for hour in range(5):
        one.add(window(hour))
    other.add(window(50))
    other.load(one.arrays())
    for hour in range(5, 10):
        examples = window(hour)
        assert by_row(one.lookup(examples)) == by_row(other.lookup(examples))
        assert one.add(examples) == other.add(examples)
        for part, saved in one.arrays().items():
            np.testing.assert_array_equal(saved, other.arrays()[part])


def test_histories_longer_than_the_spec_says_are_refused() -> None:
    bank = HistoryBank(History(of=OF, capacity=64, length=4))
    bank.add(rows([1] * 4, [1, 2, 3, 4], [1] * 4))
    with pytest.raises(SpecMismatch, match="length 3"):
        HistoryBank(History(of=OF, capacity=64, length=3)).load(bank.arrays())


def test_each_click_keeps_its_hour_beside_its_ids() -> None:
    bank = HistoryBank(History(of=OF, capacity=64, length=2))
    for hour in (3, 5, 9):
        bank.add(rows([1, 2], [10 + hour, 20 + hour], [1, int(hour == 5)], hour=hour))
    found = bank.lookup(rows([2, 1, 7], [0] * 3, [0] * 3))
    assert found.lists["item"].values_V.tolist() == [15, 19, 25]
    assert found.hour_V.tolist() == [5, 9, 5]
