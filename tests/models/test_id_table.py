"""Ids that earn a row by being seen: against a plain dictionary, at the edges, and bounded."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from data_schemas.dataset import Categorical, DatasetSpec
from data_schemas.errors import SpecMismatch
from data_schemas.examples import Examples, IdLists
from data_schemas.hashing import mix64
from models.id_table import MISSING_ROW, NUM_COMMON_ROWS, SHARED_ROW, IdTable, IdTables


def admitting(**changes: object) -> Categorical:
    return Categorical.model_validate({"name": "item", "ids": "admitted", "capacity": 1000} | changes)


def ids_of(*numbers: int) -> np.ndarray:
    return mix64(np.array(numbers, np.uint64))


def test_an_id_uses_the_shared_row_until_it_was_seen_often_enough() -> None:
    table = IdTable(admitting(admit_after=3))
    once = table.admit(ids_of(7, 7, 8), 0)
    assert (once.figures.admitted, once.figures.waiting) == (0, 2)
    np.testing.assert_array_equal(table.rows(ids_of(7, 8)), [SHARED_ROW, SHARED_ROW])
    twice = table.admit(ids_of(7, 8), 1)
    own, shared = table.rows(ids_of(7, 8))
    assert own >= NUM_COMMON_ROWS
    assert shared == SHARED_ROW
    assert list(twice.fresh_rows) == [own]
    assert (twice.figures.admitted, twice.figures.waiting, twice.figures.stored) == (1, 1, 1)
    assert (twice.figures.new_share, twice.figures.shared_share) == (1.0, 0.5)
    assert len(table.admit(ids_of(7, 7, 7), 2).fresh_rows) == 0, "an id that has its row keeps it"


def test_a_missing_id_has_a_row_that_no_id_gets() -> None:
    table = IdTable(admitting(admit_after=1))
    admission = table.admit(np.array([0, 0, 5], np.uint64), 0)
    assert admission.figures.stored == 1
    assert table.rows(np.array([0], np.uint64)) == [MISSING_ROW]
    assert MISSING_ROW not in admission.fresh_rows


@given(st.lists(st.lists(st.integers(0, 30), max_size=60), max_size=8), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_admission_equals_counting_in_a_dictionary(windows: list[list[int]], admit_after: int) -> None:
    table, sightings = IdTable(admitting(admit_after=admit_after)), dict.fromkeys(range(31), 0)
    for hour, window in enumerate(windows):
        table.admit(ids_of(*window), hour)
        for number in window:
            sightings[number] += 1
        owns = table.rows(ids_of(*range(31))) >= NUM_COMMON_ROWS
        np.testing.assert_array_equal(owns, [sightings[number] >= admit_after for number in range(31)])
    rows = table.rows(ids_of(*range(31)))
    assert len(set(rows[rows != SHARED_ROW])) == np.count_nonzero(rows != SHARED_ROW), "nobody shares a row of one's own"


@given(
    st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=40), max_size=6),
    st.integers(4, 40),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 3)),
)
@settings(deadline=None, max_examples=60)
def test_rows_are_in_range_and_the_order_of_ids_does_not_matter(
    windows: list[list[int]], capacity: int, admit_after: int, evict_after: int | None
) -> None:
    feature = admitting(capacity=capacity, admit_after=admit_after, evict_after_hours=evict_after)
    one, other = IdTable(feature), IdTable(feature)
    for hour, window in enumerate(windows):
        ids = np.array(window * 2, np.uint64)
        first, second = one.admit(ids, 2 * hour), other.admit(ids[::-1], 2 * hour)
        assert first.figures == second.figures
        assert sorted(first.fresh_rows) == sorted(second.fresh_rows)
        rows = one.rows(ids)
        assert ((rows >= 0) & (rows < capacity)).all()
        assert ((first.fresh_rows >= NUM_COMMON_ROWS) & (first.fresh_rows < capacity)).all()
        assert len(set(first.fresh_rows)) == len(first.fresh_rows)
        assert one.rows(ids).tolist() == other.rows(ids).tolist()


def test_an_id_that_was_not_seen_for_long_gives_its_row_back() -> None:
    table = IdTable(admitting(admit_after=2, evict_after_hours=5))
    table.admit(ids_of(1, 1, 2, 2, 3), 0)
    table.admit(ids_of(2), 4)
    kept = table.admit(ids_of(9), 5)
    assert (kept.figures.evicted, kept.figures.forgotten) == (0, 0)
    late = table.admit(ids_of(2, 3), 6)
    assert (late.figures.evicted, late.figures.forgotten) == (1, 1)
    rows = table.rows(ids_of(1, 2, 3))
    np.testing.assert_array_equal(rows == SHARED_ROW, [True, False, True])


def test_in_a_full_table_the_least_recently_seen_gives_way_and_its_row_is_fresh() -> None:
    table = IdTable(admitting(capacity=NUM_COMMON_ROWS + 8, admit_after=1))
    for number in range(8):
        table.admit(ids_of(number), number)
    oldest = table.rows(ids_of(0))[0]
    admission = table.admit(ids_of(100), 8)
    assert list(admission.fresh_rows) == [oldest]
    assert table.rows(ids_of(0)) == [SHARED_ROW]
    assert table.rows(ids_of(100)) == [oldest]
    assert (admission.figures.evicted, admission.figures.stored) == (1, 8)


def test_ids_of_one_window_never_take_rows_from_each_other() -> None:
    table = IdTable(admitting(capacity=NUM_COMMON_ROWS + 8, admit_after=1))
    table.admit(ids_of(*range(8)), 0)
    admission = table.admit(ids_of(*range(20)), 1)
    assert (admission.figures.evicted, admission.figures.admitted) == (0, 0)
    assert (table.rows(ids_of(*range(8))) >= NUM_COMMON_ROWS).all()
    assert admission.figures.shared_share == 12 / 20


def test_a_burst_of_new_ids_alone_keeps_memory_bounded_and_evicts_nobody() -> None:
    table, rng = IdTable(admitting(capacity=500, admit_after=2)), np.random.default_rng(0)
    regular = ids_of(*range(200))
    table.admit(np.tile(regular, 2), 0)
    stored = table.rows(regular) >= NUM_COMMON_ROWS
    for hour in range(1, 5):
        burst = table.admit(rng.integers(1, 2**63, 20_000).astype(np.uint64), hour)
        assert burst.figures.admitted < 20, "single sightings earn nothing"
        assert burst.figures.waiting <= 500
        assert burst.figures.forgotten > 19_000
        assert sum(array.nbytes for array in table.arrays().values()) < 500 * 2 * 40
    assert np.count_nonzero(table.rows(regular) >= NUM_COMMON_ROWS) == np.count_nonzero(stored)


def spec_of(*features: Categorical) -> DatasetSpec:
    return DatasetSpec.model_validate(
        {"name": "x", "time": {"column": "t"}, "label": {"column": "y"}, "event_key": ("t",), "categorical": features}
    )


def window(rng: np.random.Generator, hour: int) -> Examples:
    ids = rng.integers(0, 60, 200).astype(np.uint64)
    lists = IdLists(values_V=mix64(rng.integers(0, 40, 300).astype(np.uint64)), offsets=np.sort(rng.integers(0, 300, 201)))
    return Examples(
        single_ids={"item": ids},
        list_ids={"tags": lists},
        numeric_NR=np.empty((0, 200), np.float32),
        labels_R=np.zeros(200, np.float32),
        weights_R=np.ones(200, np.float32),
        user_R=ids,
        item_R=ids,
        hour_R=np.full(200, hour, np.int64),
    )


def test_saved_and_loaded_tables_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    spec = spec_of(admitting(capacity=50), admitting(name="tags", many=True, capacity=30, evict_after_hours=2))
    one, rng = IdTables(spec), np.random.default_rng(1)
    for hour in range(4):
        one.admit(window(rng, hour), hour)
    save_file(one.arrays(), tmp_path / "ids.safetensors")
    other = IdTables(spec)
    assert other.load(load_file(tmp_path / "ids.safetensors")) == ()
    for hour in range(4, 9):
        examples = window(rng, hour)
        first, second = one.admit(examples, hour), other.admit(examples, hour)
        for name in ("item", "tags"):
            assert first[name].figures == second[name].figures
            np.testing.assert_array_equal(first[name].fresh_rows, second[name].fresh_rows)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name])


def test_tables_of_another_capacity_are_refused_and_new_features_start_empty() -> None:
    one = IdTables(spec_of(admitting(capacity=50)))
    one.admit(window(np.random.default_rng(2), 0), 0)
    with pytest.raises(SpecMismatch, match="another capacity"):
        IdTables(spec_of(admitting(capacity=200))).load(one.arrays())
    grown = IdTables(spec_of(admitting(capacity=50), admitting(name="tags", many=True)))
    assert grown.load(one.arrays()) == ("tags",)
    torn = {name: array for name, array in one.arrays().items() if not name.endswith("sightings")}
    with pytest.raises(SpecMismatch, match="lack"):
        IdTables(spec_of(admitting(capacity=50))).load(torn)


def test_a_declaration_that_makes_no_sense_names_the_way_out() -> None:
    for changes, message in (
        ({"capacity": 3}, "capacity"),
        ({"capacity": 2**31}, "capacity"),
        ({"from_time": "hour_of_day", "capacity": 24}, "leave out 'ids'"),
        ({"ids": "hashed", "evict_after_hours": 3}, "need ids = 'admitted'"),
        ({"ids": "hashed", "admit_after": 3}, "need ids = 'admitted'"),
        ({"admit_after": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            admitting(**changes)
