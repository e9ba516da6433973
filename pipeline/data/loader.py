"""From the click log to mini-batches: read column-major, hash ids once per distinct value, gather rows by index.

    click log -> Examples (hashed ids) -> EncodedWindow (table rows, normalised numbers) -> MiniBatch

Letters: R rows of the window, B rows of a batch, F features, N numeric features.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.dataset import Categorical, DatasetSpec
from data_schemas.examples import F32, I64, U64, Examples, IdLists
from data_schemas.hashing import MISSING, hash_ids
from data_schemas.minibatch import MiniBatch
from models.ids import table_rows
from pipeline.data.normalise import RunningMoments, normalise, transform

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


@dataclass(frozen=True, kw_only=True)
class EncodedWindow:
    """Examples as table rows and normalised numbers, ready to be cut into batches by row index."""

    feature_names: tuple[str, ...]
    """Single-id features, then list features: the order of the embedding tables."""
    single_rows_FR: I64
    list_rows: tuple[IdLists, ...]
    dense_RN: F32
    labels_R: F32
    weights_R: F32
    user_R: U64

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.labels_R)

    def minibatch(self, rows_B: I64, *, pad_to: int = 0) -> MiniBatch:
        """The batch of these rows, padded to `pad_to` rows with rows that have no ids and weight 0."""
        padding = max(pad_to - len(rows_B), 0)
        size = len(rows_B) + padding
        single_FB = self.single_rows_FR[:, rows_B]
        values, lengths = [single_FB.reshape(-1)], [np.ones(single_FB.size, np.int32)]
        if padding:
            row_lengths_FB = np.zeros((len(single_FB), size), np.int32)
            row_lengths_FB[:, : len(rows_B)] = 1
            lengths = [row_lengths_FB.reshape(-1)]
        for lists in self.list_rows:
            taken = lists.take(rows_B)
            values.append(taken.values_V.view(np.int64))
            lengths.append(np.pad(np.diff(taken.offsets).astype(np.int32), (0, padding)))
        lengths_FB = np.concatenate(lengths)
        return MiniBatch(
            sparse=KeyedJaggedTensor(
                keys=list(self.feature_names),
                values=torch.from_numpy(np.concatenate(values)),
                lengths=torch.from_numpy(lengths_FB),
                offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths_FB)]).astype(np.int32)),
                stride=size,
            ),
            dense_BN=torch.from_numpy(_pad(self.dense_RN[rows_B], padding)),
            labels_B=torch.from_numpy(_pad(self.labels_R[rows_B], padding)),
            weights_B=torch.from_numpy(_pad(self.weights_R[rows_B], padding)),
        )


def encode(examples: Examples, spec: DatasetSpec, moments: RunningMoments) -> EncodedWindow:
    """Table rows of all ids, and numbers normalised by `moments`."""
    single = [f for f in spec.categorical if not f.many]
    many = [f for f in spec.categorical if f.many]
    with ThreadPoolExecutor(THREADS) as pool:
        rows = list(pool.map(lambda f: table_rows(f, examples.single_ids[f.name]), single))
    return EncodedWindow(
        feature_names=tuple(f.name for f in (*single, *many)),
        single_rows_FR=np.stack(rows) if rows else np.empty((0, examples.num_rows), np.int64),
        list_rows=tuple(_list_rows(f, examples.list_ids[f.name]) for f in many),
        dense_RN=normalise(transform(spec.numeric, examples.numeric_NR), moments),
        labels_R=examples.labels_R,
        weights_R=examples.weights_R,
        user_R=examples.user_R,
    )


def num_dense_columns(spec: DatasetSpec) -> int:
    """Width of `dense_BN`: a value and a missing flag for each numeric feature."""
    return 2 * len(spec.numeric)


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


def _list_rows(feature: Categorical, lists: IdLists) -> IdLists:
    return IdLists(values_V=table_rows(feature, lists.values_V).view(np.uint64), offsets=lists.offsets)


def _pad(values: F32, padding: int) -> F32:
    if not padding:
        return values
    return np.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
