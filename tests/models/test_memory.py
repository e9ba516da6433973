"""All that a model remembers of the log besides its weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_schemas.dataset import Counter, DatasetSpec, History, load_spec
from data_schemas.errors import SpecMismatch
from data_schemas.examples import Examples
from models.memory import Memory, MemoryReport, column_names


def remembering(**changes: object) -> DatasetSpec:
    declared = {
        "counters": (
            Counter(over=("item_id",), half_lives_hours=(1.0, 24.0), capacity=256),
            Counter(over=("user_id", "author_id"), of=("clicks",), half_lives_hours=(float("inf"),), capacity=2**14),
        ),
        "ages": ("item_id", "author_id"),
        "age_capacity": 256,
        "history": History(of=("item_id", "author_id"), length=5, capacity=1024, max_events_per_window=3),
    }
    return load_spec("brunch").model_copy(update=declared | changes)


def window(rng: np.random.Generator, hour: int, size: int = 300) -> Examples:
    ids = {name: rng.integers(0, 40, size).astype(np.uint64) for name in ("user_id", "item_id", "author_id")}
    return Examples(
        single_ids=ids,
        list_ids={},
        numeric_NR=np.empty((0, size), np.float32),
        labels_R=rng.integers(0, 2, size).astype(np.float32),
        weights_R=np.ones(size, np.float32),
        user_R=ids["user_id"],
        item_R=ids["item_id"],
        hour_R=np.full(size, hour, np.int64),
    )


def seen_of(memory: Memory, examples: Examples, hour: int) -> list[np.ndarray]:
    histories = memory.histories(examples)
    assert histories is not None
    return [memory.columns(examples, hour), histories.position_R, *(ids.values_V for ids in histories.lists.values())]


def test_every_column_has_a_name() -> None:
    assert column_names(remembering()) == [
        "clicks_1h(item_id)", "clicks_24h(item_id)", "impressions_1h(item_id)", "impressions_24h(item_id)",
        "ctr_1h(item_id)", "ctr_24h(item_id)", "clicks_total(user_id,author_id)", "age(item_id)", "age(author_id)",
    ]  # fmt: skip
    examples = window(np.random.default_rng(0), 0)
    assert Memory(remembering()).columns(examples, 0).shape == (len(column_names(remembering())), examples.num_rows)


def test_a_spec_that_declares_nothing_remembers_nothing() -> None:
    memory = Memory(load_spec("brunch").model_copy(update={"counters": (), "ages": (), "history": None}))
    examples = window(np.random.default_rng(0), 0)
    assert memory.columns(examples, 0).shape == (0, examples.num_rows)
    assert memory.histories(examples) is None
    assert memory.arrays() == {}
    assert memory.add(examples, 0) == MemoryReport(new_keys=0, evicted_of={}, refused_rows=0, capped_history_events=0)


def test_labels_moved_inside_an_hour_are_not_seen_in_that_hour() -> None:
    one, other, rng = Memory(remembering()), Memory(remembering()), np.random.default_rng(1)
    for hour in range(4):
        examples = window(rng, hour)
        one.add(examples, hour)
        other.add(examples, hour)
    examples = window(rng, 4)
    moved = replace(examples, labels_R=rng.permutation(examples.labels_R))
    for left, right in zip(seen_of(one, examples, 4), seen_of(other, moved, 4), strict=True):
        np.testing.assert_array_equal(left, right)


def test_looking_changes_nothing() -> None:
    memory, rng = Memory(remembering()), np.random.default_rng(2)
    memory.add(window(rng, 0), 0)
    before = memory.arrays()
    seen_of(memory, window(rng, 7), 7)
    for name, array in memory.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_memory_restored_from_a_file_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    one, rng = Memory(remembering()), np.random.default_rng(3)
    for hour in range(6):
        one.add(window(rng, hour), hour)
    save_file({name: np.ascontiguousarray(array) for name, array in one.arrays().items()}, tmp_path / "memory.safetensors")
    other = Memory(remembering())
    assert other.load(load_file(tmp_path / "memory.safetensors")) == ()
    for hour in range(6, 10):
        examples = window(rng, hour)
        for left, right in zip(seen_of(one, examples, hour), seen_of(other, examples, hour), strict=True):
            np.testing.assert_array_equal(left, right)
        assert one.add(examples, hour) == other.add(examples, hour)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name])


def test_an_empty_memory_is_saved_and_restored() -> None:
    memory = Memory(remembering())
    assert memory.load(Memory(remembering()).arrays()) == ()


def test_a_bank_that_was_not_saved_starts_empty_and_is_named() -> None:
    memory, rng = Memory(remembering(ages=("item_id",))), np.random.default_rng(4)
    memory.add(window(rng, 0), 0)
    grown = Memory(remembering())
    assert grown.load(memory.arrays()) == ("age(author_id)",)
    columns = grown.columns(window(rng, 5), 5)
    assert (columns[-1] == 0).all()
    assert columns[-2].any()


def test_a_bank_that_is_not_whole_is_refused() -> None:
    arrays = Memory(remembering()).arrays()
    del arrays["counter(item_id)/counts"]
    with pytest.raises(SpecMismatch, match=r"counter\(item_id\) lacks \['counts'\]"):
        Memory(remembering()).load(arrays)


def test_a_window_is_reported() -> None:
    memory, rng = Memory(remembering()), np.random.default_rng(5)
    examples = window(rng, 0)
    clicks = [int(((examples.user_R == user) & (examples.labels_R == 1)).sum()) for user in np.unique(examples.user_R) if user]
    pairs = {p for p in zip(examples.user_R.tolist(), examples.single_ids["author_id"].tolist(), strict=True) if all(p)}
    items, authors = (len(set(examples.single_ids[name].tolist()) - {0}) for name in ("item_id", "author_id"))
    report = memory.add(examples, 0)
    assert report.capped_history_events == sum(max(count - 3, 0) for count in clicks)
    assert report.new_keys == 2 * items + authors + len(pairs) + sum(count > 0 for count in clicks)
    assert (report.evicted_keys, report.refused_rows) == (0, 0)


def test_a_report_names_the_banks_whose_keys_gave_way() -> None:
    spec = remembering()
    tight = spec.model_copy(update={"counters": (spec.counters[0].model_copy(update={"capacity": 8}), *spec.counters[1:])})
    memory, rng = Memory(tight), np.random.default_rng(5)
    memory.add(window(rng, 0), 0)
    later = window(rng, 1)
    later = replace(later, single_ids=later.single_ids | {"item_id": later.single_ids["item_id"] + np.uint64(100)})
    report = memory.add(later, 1)
    assert set(report.evicted_of) == {"counter(item_id)"}
    assert report.evicted_of["counter(item_id)"] == report.evicted_keys > 0
