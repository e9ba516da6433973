"""Counters and ages, as of a window's start."""

from dataclasses import replace
from math import inf, log, log1p

import numpy as np
import pytest

from data_schemas.dataset import Counter
from data_schemas.errors import SpecMismatch
from data_schemas.examples import Examples
from models.counters import AgeBank, CounterBank, counter_columns
from models.key_index import keys_over


def rows(
    item: list[int], label: list[int], *, user: list[int] | None = None, hour: list[int] | int = 0, weight: float = 1.0
) -> Examples:
    items = np.array(item, np.uint64)
    users = np.array(user if user is not None else [1] * len(item), np.uint64)
    return Examples(
        single_ids={"item": items, "user": users},
        list_ids={},
        numeric_NR=np.empty((0, len(item)), np.float32),
        labels_R=np.array(label, np.float32),
        weights_R=np.full(len(item), weight, np.float32),
        user_R=users,
        item_R=items,
        hour_R=np.broadcast_to(np.array(hour, np.int64), len(item)),
    )


def random_rows(rng: np.random.Generator, hour: int, size: int = 60) -> Examples:
    examples = rows(
        rng.integers(0, 12, size).tolist(),
        rng.integers(0, 2, size).tolist(),
        user=rng.integers(0, 6, size).tolist(),
        hour=(hour - rng.integers(0, 4, size) * (rng.random(size) < 0.2)).tolist(),
    )
    return examples.with_weights(rng.choice([1, 2, 10], size).astype(np.float32))


class SlowCounters:
    """The same statistics, from a list of all events."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.events: list[tuple[int, int, float, float]] = []
        self.bank_hour = 0

    def add(self, examples: Examples, hour: int) -> None:
        keys = keys_over(examples, self.counter.over)
        weights, labels, hours = examples.weights_R, examples.labels_R, examples.hour_R
        self.events += [
            (int(k), int(h), float(w), float(y)) for k, h, w, y in zip(keys, hours, weights, labels, strict=True) if k
        ]
        self.bank_hour = max(self.bank_hour, hour, int(hours.max()))

    def sums(self, hour: int, half_life: float, key: int | None) -> tuple[float, float]:
        left = [(w * 2 ** ((h - hour) / half_life), y) for k, h, w, y in self.events if key in (None, k)]
        return sum(w * y for w, y in left), sum(w for w, _ in left)

    def statistic(self, kind: str, half_life: float, hour: int, key: int) -> float:
        if not any(k == key for k, *_ in self.events):
            return 0.0
        clicks, impressions = self.sums(hour, half_life, key)
        bank_clicks, bank_impressions = self.sums(self.bank_hour, half_life, None)
        base = (bank_clicks + 0.5) / (bank_impressions + 1)
        prior = self.counter.prior_rows
        ctr = (clicks + prior * base) / (impressions + prior)
        return {"clicks": log1p(clicks), "impressions": log1p(impressions), "ctr": logit(ctr) - logit(base)}[kind]


def logit(p: float) -> float:
    return log(p / (1 - p))


@pytest.mark.parametrize("over", [("item",), ("user", "item")])
@pytest.mark.parametrize("of", [("clicks", "impressions", "ctr"), ("ctr",), ("clicks",), ("impressions", "clicks")])
def test_columns_equal_sums_over_all_events_before_the_window(over: tuple[str, ...], of: tuple[str, ...]) -> None:
    counter = Counter(over=over, of=of, half_lives_hours=(1.0, 24.0, inf), capacity=4096, prior_rows=5.0)
    bank, slow = CounterBank(counter), SlowCounters(counter)
    rng = np.random.default_rng(5)
    for hour in (3, 4, 5, 9, 30, 31):
        examples = random_rows(rng, hour)
        expected = [
            [slow.statistic(kind, span, hour, int(key)) for key in keys_over(examples, over)]
            for kind in of
            for span in counter.half_lives_hours
        ]
        columns = bank.columns(examples, hour)
        assert columns.dtype == np.float32
        assert len(columns) == len(counter_columns(counter))
        np.testing.assert_allclose(columns, expected, rtol=1e-5, atol=1e-5)
        bank.add(examples, hour)
        slow.add(examples, hour)


def test_labels_moved_inside_an_hour_change_nothing_for_that_hour() -> None:
    counter = Counter(over=("item",), capacity=4096)
    one, other = CounterBank(counter), CounterBank(counter)
    rng = np.random.default_rng(6)
    for hour in range(4):
        examples = random_rows(rng, hour)
        moved = replace(examples, labels_R=np.roll(examples.labels_R, 7)) if hour == 3 else examples
        np.testing.assert_array_equal(one.columns(examples, hour), other.columns(moved, hour))
        one.add(examples, hour)
        other.add(moved, hour)
    assert (one.columns(examples, 4) != other.columns(examples, 4)).any()


def test_an_event_counts_half_after_a_half_life_and_a_total_never_fades() -> None:
    bank = CounterBank(Counter(over=("item",), of=("clicks",), half_lives_hours=(2.0, inf)))
    bank.add(rows([7], [1], weight=8.0), 0)
    for hour, count in ((0, 8.0), (2, 4.0), (6, 1.0), (1000, 0.0)):
        np.testing.assert_allclose(bank.columns(rows([7], [0]), hour)[:, 0], np.log1p([count, 8.0]), atol=1e-6)


def test_what_has_decayed_for_years_is_what_the_formula_says() -> None:
    """Longer than the table of hours, and beside a key of the same hour."""
    bank = CounterBank(Counter(over=("item",), of=("impressions",), half_lives_hours=(8766.0, inf)))
    bank.add(rows([7], [0], weight=1000.0), 0)
    bank.add(rows([8], [0], hour=20_000, weight=5.0), 20_000)
    left = 1000 * 2 ** (-20_000 / 8766)
    columns = bank.columns(rows([7, 8, 9], [0, 0, 0]), 20_000)
    np.testing.assert_allclose(columns, np.log1p([[left, 5, 0], [1000, 5, 0]]), rtol=1e-5)


def test_a_late_row_counts_as_if_it_had_come_in_time() -> None:
    counter = Counter(over=("item",), half_lives_hours=(3.0, 24.0), capacity=64)
    late, punctual = CounterBank(counter), CounterBank(counter)
    late.add(rows([7, 8], [1, 0], hour=[5, 5]), 5)
    late.add(rows([7, 9], [1, 1], hour=[2, 6]), 6)
    for item, label, hour in ((7, 1, 2), (7, 1, 5), (8, 0, 5), (9, 1, 6)):
        punctual.add(rows([item], [label], hour=hour), hour)
    now = rows([7, 8, 9], [0, 0, 0])
    np.testing.assert_allclose(late.columns(now, 8), punctual.columns(now, 8), rtol=1e-5)


def test_a_window_of_the_past_undoes_no_decay() -> None:
    bank = CounterBank(Counter(over=("item",), of=("clicks",), half_lives_hours=(1.0,)))
    bank.add(rows([7], [1], hour=10), 10)
    bank.add(rows([7], [1], hour=8), 8)
    np.testing.assert_allclose(bank.columns(rows([7], [0]), 10)[0], np.log1p([1.25]), rtol=1e-6)
    np.testing.assert_allclose(bank.columns(rows([7], [0]), 3)[0], np.log1p([1.25]), rtol=1e-6)


def test_a_missing_or_unknown_id_has_no_counts() -> None:
    bank = CounterBank(Counter(over=("user", "item"), capacity=64))
    bank.add(rows([0, 5, 5], [1, 1, 0], user=[3, 0, 3]), 0)
    columns = bank.columns(rows([0, 5, 6, 5], [0] * 4, user=[3, 0, 3, 3]), 1)
    assert (columns[:, :3] == 0).all()
    assert (columns[:6, 3] != 0).any()


def test_one_key_alone_has_the_log_odds_of_the_bank() -> None:
    bank = CounterBank(Counter(over=("item",), of=("ctr",), half_lives_hours=(inf,)))
    bank.add(rows([7] * 10_000, [1] * 100 + [0] * 9_900), 0)
    assert abs(bank.columns(rows([7], [0]), 1)[0, 0]) < 0.01


@pytest.mark.parametrize("label", [0, 1])
def test_a_log_of_one_class_gives_finite_log_odds(label: int) -> None:
    bank = CounterBank(Counter(over=("item",), of=("ctr",)))
    bank.add(rows([7] * 1000, [label] * 1000), 0)
    assert np.isfinite(bank.columns(rows([7, 8], [0, 0]), 1)).all()


def test_a_key_that_takes_the_place_of_another_starts_from_nothing() -> None:
    bank = CounterBank(Counter(over=("item",), of=("clicks",), half_lives_hours=(inf,), capacity=2))
    bank.add(rows([5, 6], [1, 1], weight=100.0, hour=0), 0)
    changes = bank.add(rows([7, 7, 8], [1, 0, 1], hour=1), 1)
    assert (changes.new_keys, changes.evicted_keys, changes.refused_rows) == (2, 2, 0)
    np.testing.assert_allclose(bank.columns(rows([5, 6, 7, 8], [0] * 4), 2)[0], np.log1p([0, 0, 1, 1]), rtol=1e-6)
    assert bank.add(rows([1, 2, 3, 4, 4], [1] * 5, hour=2), 2).refused_rows == 3


def test_empty_windows_change_nothing() -> None:
    bank, ages = CounterBank(Counter(over=("item",), capacity=64)), AgeBank("item", 64)
    for hour in (1, 2):
        assert bank.columns(rows([], []), hour).shape == (9, 0)
        assert ages.columns(rows([], []), hour).shape == (1, 0)
        assert bank.add(rows([], []), hour).new_keys == ages.add(rows([], []), hour).new_keys == 0


def test_a_restored_bank_goes_on_as_if_it_had_not_stopped() -> None:
    counter = Counter(over=("user", "item"), capacity=40)
    one, other, rng = CounterBank(counter), CounterBank(counter), np.random.default_rng(8)
    for hour in range(5):
        one.add(random_rows(rng, hour), hour)
    other.add(random_rows(rng, 90), 90)
    other.load(one.arrays())
    for hour in range(5, 9):
        examples = random_rows(rng, hour)
        np.testing.assert_array_equal(one.columns(examples, hour), other.columns(examples, hour))
        assert one.add(examples, hour) == other.add(examples, hour)


def test_counts_of_other_half_lives_are_refused() -> None:
    saved = CounterBank(Counter(over=("item",), half_lives_hours=(1.0,))).arrays()
    with pytest.raises(SpecMismatch, match="half_lives_hours"):
        CounterBank(Counter(over=("item",), half_lives_hours=(1.0, 2.0))).load(saved)


def test_column_names_tell_statistic_span_and_ids() -> None:
    counter = Counter(over=("user", "item"), of=("ctr", "clicks"), half_lives_hours=(0.5, 168.0, inf))
    assert counter_columns(counter) == [
        "ctr_0.5h(user,item)", "ctr_168h(user,item)", "ctr_total(user,item)",
        "clicks_0.5h(user,item)", "clicks_168h(user,item)", "clicks_total(user,item)",
    ]  # fmt: skip


def test_the_age_of_an_id_is_the_hours_since_its_earliest_row() -> None:
    bank = AgeBank("item", 64)
    bank.add(rows([7, 8, 0], [0, 1, 1], hour=10), 10)
    bank.add(rows([7, 8, 9], [0, 1, 1], hour=[11, 4, 12]), 12)
    columns = bank.columns(rows([7, 8, 9, 0, 5], [0] * 5), 14)
    np.testing.assert_allclose(columns, np.log1p([[4, 10, 2, 0, 0]]), rtol=1e-6)
    assert (bank.columns(rows([7], [0]), 2) == 0).all()


def test_the_age_of_a_reused_slot_is_that_of_its_new_id() -> None:
    bank = AgeBank("item", 2)
    bank.add(rows([5, 6], [0, 0], hour=0), 0)
    bank.add(rows([7], [0], hour=10), 10)
    np.testing.assert_allclose(bank.columns(rows([7], [0]), 11), np.log1p([[1]]), rtol=1e-6)
