"""From rows of the click log to examples: column-major, each distinct string hashed once.

Enters: an Arrow table of the click log. Leaves: `Examples`, which `encode` turns into table rows.

Letters: R rows of the window, N numeric features.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.dataset import Categorical, DatasetSpec
from data_schemas.examples import F32, I64, U64, Examples, IdLists
from data_schemas.hashing import MISSING, hash_ids

HOUR_US = 3_600_000_000
THREADS = 2


def columns_to_read(spec: DatasetSpec) -> list[str]:
    """Columns of the click log that examples are made of."""
    label = ["label"] if spec.has_labels else []
    features = [f.name for f in spec.logged_categorical()] + [f.name for f in spec.numeric]
    return ["event_time", *label, *features]


def to_examples(table: pa.Table, spec: DatasetSpec) -> Examples:
    """Examples of click-log rows, in their order; a log of clicks only gives labels of 1."""
    hour_R = table["event_time"].cast(pa.int64()).to_numpy() // HOUR_US
    num_rows = table.num_rows
    with ThreadPoolExecutor(THREADS) as pool:
        single = [f for f in spec.categorical if not f.many]
        ids = dict(zip((f.name for f in single), pool.map(lambda f: _single(table, f, hour_R), single), strict=True))
    lists = {f.name: _id_lists(table[f.name]) for f in spec.categorical if f.many}
    nobody = np.full(num_rows, MISSING)
    return Examples(
        single_ids=ids,
        list_ids=lists,
        numeric_NR=_numeric(table, spec),
        labels_R=table["label"].to_numpy().astype(np.float32) if spec.has_labels else np.ones(num_rows, np.float32),
        weights_R=np.ones(num_rows, np.float32),
        user_R=ids[spec.user] if spec.user else nobody,
        item_R=ids[spec.item] if spec.item else nobody,
        hour_R=hour_R,
    )


def _single(table: pa.Table, feature: Categorical, hour_R: I64) -> U64:
    match feature.from_time:
        case None:
            return hash_ids(table[feature.name])
        case "hour_of_day":
            return (hour_R % 24).astype(np.uint64)
        case "hour_of_week":
            return ((hour_R + 72) % 168).astype(np.uint64)  # 1970-01-01 was a Thursday: weeks start on Monday


def _id_lists(column: pa.ChunkedArray) -> IdLists:
    chunks: Sequence[pa.ListArray] = column.chunks
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    values = [hash_ids(chunk.flatten()) for chunk in chunks] or [np.empty(0, np.uint64)]
    return IdLists(values_V=np.concatenate(values), offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _numeric(table: pa.Table, spec: DatasetSpec) -> F32:
    if not spec.numeric:
        return np.empty((0, table.num_rows), np.float32)
    columns: Mapping[str, pa.ChunkedArray] = {f.name: pc.cast(table[f.name], pa.float32()) for f in spec.numeric}
    return np.stack([pc.fill_null(columns[f.name], float("nan")).to_numpy() for f in spec.numeric])
