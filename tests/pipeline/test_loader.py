"""From Arrow to mini-batches, against a lookup row by row."""

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import Examples, IdLists, concatenate
from data_schemas.hashing import MISSING, hash_ids, rows_of
from models.memory import Memory
from models.tables import table_layout
from pipeline.data.encode import encode
from pipeline.data.loader import to_examples
from pipeline.data.normalise import RunningMoments


def _table() -> pa.Table:
    return pa.table(
        {
            "event_time": pa.array(
                [datetime(2026, 3, 2, hour, 59, tzinfo=UTC) for hour in (0, 13, 23)], pa.timestamp("us", "UTC")
            ),
            "label": pa.array([0, 1, 0], pa.int8()),
            "user": pa.array([7, None, -3], pa.int64()),
            "tags": pa.chunked_array([[["a", "b"]], [None, []]], pa.list_(pa.string())),
            "item": pa.array([1, 2, 2], pa.int64()),
            "price": pa.array([1.5, None, 2.0], pa.float32()),
            "age": pa.array([30, 40, 50], pa.float32()),
        }
    )


def test_columns_become_hashes_lists_and_numbers(small_spec: DatasetSpec) -> None:
    examples = to_examples(_table(), small_spec)
    np.testing.assert_array_equal(examples.single_ids["user"], hash_ids(pa.array([7, None, -3], pa.int64())))
    assert examples.user_R[1] == MISSING
    np.testing.assert_array_equal(examples.single_ids["hour_of_day"], [0, 13, 23])
    np.testing.assert_array_equal(examples.list_ids["tags"].offsets, [0, 2, 2, 2])
    np.testing.assert_array_equal(examples.list_ids["tags"].values_V, hash_ids(pa.array(["a", "b"])))
    np.testing.assert_array_equal(examples.numeric_NR, [[1.5, np.nan, 2.0], [30, 40, 50]])
    np.testing.assert_array_equal(examples.labels_R, [0, 1, 0])


def test_monday_midnight_begins_the_week(small_spec: DatasetSpec) -> None:
    features = tuple(
        feature.model_copy(update={"name": "hour_of_week", "from_time": "hour_of_week"}) if feature.from_time else feature
        for feature in small_spec.categorical
    )
    weekly = small_spec.model_copy(update={"categorical": features})
    np.testing.assert_array_equal(to_examples(_table(), weekly).single_ids["hour_of_week"], [0, 13, 23])


def test_a_log_of_clicks_only_has_labels_of_one(small_spec: DatasetSpec) -> None:
    clicks_only = small_spec.model_copy(update={"label": None})
    np.testing.assert_array_equal(to_examples(_table().drop(["label"]), clicks_only).labels_R, 1)


def test_a_minibatch_holds_the_rows_asked_for(small_spec: DatasetSpec, small_examples: Callable[..., Examples]) -> None:
    examples = small_examples(30)
    window = encode(examples, small_spec, Memory(small_spec), RunningMoments.nothing_seen(2), hour=0)
    rows = np.array([3, 29, 3, 0, 11])
    batch = window.minibatch(rows, filling_B=np.arange(5) == 4)
    tags = examples.list_ids["tags"]
    for sparse in (batch.deep.to_dict(), batch.wide.to_dict()):
        for position, row in enumerate(rows):
            expected = rows_of(tags.values_V[tags.offsets[row] : tags.offsets[row + 1]], 32)
            start, stop = sparse["tags"].offsets()[position : position + 2]
            np.testing.assert_array_equal(sparse["tags"].values()[start:stop], expected)
            np.testing.assert_allclose(sparse["tags"].weights()[start:stop], 1 / max(len(expected), 1))
            assert sparse["user"].values()[position] == rows_of(examples.single_ids["user"], 64)[row]
    np.testing.assert_array_equal(batch.labels_B, examples.labels_R[rows])
    np.testing.assert_array_equal(batch.weights_B, [1, 1, 1, 1, 0])


def test_taking_and_joining_lists_keeps_them_whole(small_examples: Callable[..., Examples]) -> None:
    examples = small_examples(20)
    halves = concatenate([examples.take(np.arange(7)), examples.take(np.arange(7, 20))])
    np.testing.assert_array_equal(halves.list_ids["tags"].values_V, examples.list_ids["tags"].values_V)
    np.testing.assert_array_equal(halves.list_ids["tags"].offsets, examples.list_ids["tags"].offsets)
    empty = IdLists(values_V=np.empty(0, np.uint64), offsets=np.zeros(1, np.int64)).take(np.empty(0, np.int64))
    assert len(empty.values_V) == 0


def test_dictionary_strings_hash_like_plain_ones() -> None:
    words = pa.array(["x", None, "y", "x", ""])
    np.testing.assert_array_equal(hash_ids(words.dictionary_encode()), hash_ids(words))
    assert len(set(hash_ids(words).tolist())) == 4


@pytest.mark.parametrize("crosses", [(), (("user", "item"),)])
def test_a_batch_of_single_ids_equals_the_general_form(
    small_spec: DatasetSpec, small_examples: Callable[..., Examples], crosses: tuple[tuple[str, ...], ...]
) -> None:
    features = tuple(feature for feature in small_spec.categorical if not feature.many)
    crossed = small_spec.model_copy(update={"crosses": crosses, "cross_capacity": 50})
    single = crossed.model_copy(update={"categorical": features})
    examples = small_examples(30)
    rows = np.array([3, 29, 3, 0, 11])
    fast, general = (encode(examples, spec, Memory(spec), None, hour=0).minibatch(rows) for spec in (single, crossed))
    for part in ("deep", "wide"):
        expected = getattr(general, part).to_dict()
        for key, values in getattr(fast, part).to_dict().items():
            for of in ("values", "weights", "lengths", "offsets"):
                assert getattr(values, of)().tolist() == getattr(expected[key], of)().tolist(), (part, key, of)


def test_the_time_of_day_has_an_embedding_and_no_wide_weight(small_spec: DatasetSpec) -> None:
    layout = table_layout(small_spec)
    assert layout.deep_keys == ["user", "tags", "item", "hour_of_day"]
    assert layout.wide_keys == ["user", "tags", "item"]
