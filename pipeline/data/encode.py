"""From examples to mini-batches: table rows of all ids, normalised numbers, and batches gathered by row index.

Enters: `Examples`, running moments. Leaves: an `EncodedWindow`, which cuts `MiniBatch`es of any rows.

Letters: R rows of the window, B rows of a batch, K keys with one id a row, N dense columns, U users, V ids of all bags.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.dataset import Categorical, DatasetSpec
from data_schemas.examples import F32, I64, U64, Examples, IdLists, gathered
from data_schemas.minibatch import MiniBatch
from models.histories import Histories
from models.id_table import SHARED_ROW, IdTables
from models.ids import cross_rows
from models.memory import Memory, column_names, linear_only_names
from models.tables import TableLayout, click_key, cross_key, history_pools, pool_key, table_layout
from pipeline.data.delays import LEAST_LOG
from pipeline.data.normalise import RunningMoments, normalise, transform

THREADS = 2
BLOCK_ROWS = 8_192
"""Rows whose ids are looked up at a time, so that their part of the window stays in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Bags:
    """A weighted bag of table rows for each row, or each user: `rows_V[offsets[i]:offsets[i + 1]]`."""

    rows_V: I64
    weights_V: F32
    offsets: I64

    def take(self, chosen: I64) -> "Bags":
        """The bags of `chosen`, in that order."""
        return self.at(*gathered(self.offsets, chosen))

    def at(self, positions: I64, offsets: I64) -> "Bags":
        """Bags of the values at `positions`, as `gathered` gives both."""
        return Bags(rows_V=self.rows_V.take(positions), weights_V=self.weights_V.take(positions), offsets=offsets)


@dataclass(frozen=True, kw_only=True)
class UserBags:
    """Histories: one bag a user and pool, whatever the number of the user's rows."""

    user_R: I64
    """`[R]` position of the row's user in the bags."""
    pools: Mapping[str, Bags]
    """By key: `[U]` bags. All have the same offsets: a user's bags are of the same clicks."""
    ids: Mapping[str, U64] = field(default_factory=dict)
    """By key: the ids that `pools` has the rows of."""

    def __post_init__(self) -> None:
        assert self.pools, "a history has a pool at least"
        first = self._offsets
        assert all(np.array_equal(bags.offsets, first) for bags in self.pools.values()), "a user's bags differ in length"

    def take(self, chosen: I64) -> dict[str, Bags]:
        """By key: the bags of the users `chosen`, in that order."""
        positions, offsets = gathered(self._offsets, chosen)
        return {key: bags.at(positions, offsets) for key, bags in self.pools.items()}

    @property
    def _offsets(self) -> I64:
        return next(iter(self.pools.values())).offsets


@dataclass(frozen=True, kw_only=True)
class EncodedWindow:
    """Examples as table rows and normalised numbers, ready to be cut into batches by row index."""

    layout: TableLayout
    single_keys: tuple[str, ...]
    single_RK: npt.NDArray[np.int32 | np.int64]
    """Table rows of the keys with one id a row; row by row, so that a batch is gathered in one access a row, and int32 where
    every table has at most 2^31 rows."""
    bags: Mapping[str, Bags]
    """By key: `[R]` bags of the list features."""
    histories: UserBags | None
    raw_dense_NR: F32
    """Numbers and counters before they were normalised."""
    dense_RN: F32
    moments: RunningMoments
    """That `dense_RN` was normalised by."""
    labels_R: F32
    weights_R: F32
    user_R: U64
    logit_shifts_R: F32 | None = None
    """As in `MiniBatch`; None: nothing."""
    looks_R3: F32 | None = None
    """As in `MiniBatch`; None: every click is known."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.labels_R)

    def minibatch(self, rows_B: I64, *, filling_B: npt.NDArray[np.bool_] | None = None) -> MiniBatch:
        """The batch of these rows; those in `filling_B` only fill its shape and have weight 0."""
        deep_keys, wide_keys = self.layout.lookup_keys, self.layout.wide_keys
        carrier_B: I64 | None = None
        gathered_KB = self.single_RK.take(rows_B, axis=0).T.astype(np.int64, order="C")
        if self.layout.weighted:
            segments = self._segments(gathered_KB, rows_B)
            carrier_B = None if self.histories is None else _add_histories(segments, self.histories, rows_B, self.layout)
            look_up = partial(_jagged, segments, size=len(rows_B))
        else:
            look_up = partial(_one_id_each, gathered_KB, self.single_keys)
        deep = look_up(deep_keys)
        weights_B = self.weights_R[rows_B]
        return MiniBatch(
            deep=deep,
            wide=deep if deep_keys == wide_keys else look_up(wide_keys),
            history_row_B=None if carrier_B is None else torch.from_numpy(carrier_B),
            dense_BN=torch.from_numpy(self.dense_RN[rows_B]),
            labels_B=torch.from_numpy(self.labels_R[rows_B]),
            weights_B=torch.from_numpy(weights_B if filling_B is None else np.where(filling_B, np.float32(0), weights_B)),
            logit_shifts_B=None if self.logit_shifts_R is None else torch.from_numpy(self.logit_shifts_R[rows_B]),
            looks_B3=None if self.looks_R3 is None else torch.from_numpy(self.looks_R3[rows_B]),
        )

    def known_share(self, rows: I64) -> F32 | float:
        """`[len(rows)]` share of their clicks that is known now: what a predicted probability has to be multiplied by before it
        is compared with the labels."""
        return 1.0 if self.looks_R3 is None else -np.expm1(self.looks_R3[rows, 1])

    def _segments(self, gathered_KB: I64, rows_B: I64) -> dict[str, "_Segment"]:
        """By key: what the batch looks up for it."""
        ones_B, length_B = np.ones(len(rows_B), np.float32), np.ones(len(rows_B), np.int32)
        segments = {
            key: _Segment(rows=gathered_KB[position], weights=ones_B, lengths=length_B)
            for position, key in enumerate(self.single_keys)
        }
        for key, bags in self.bags.items():
            taken = bags.take(rows_B)
            lengths = (taken.offsets[1:] - taken.offsets[:-1]).astype(np.int32)
            segments[key] = _Segment(rows=taken.rows_V, weights=taken.weights_V, lengths=lengths)
        return segments


def encode(
    examples: Examples,
    spec: DatasetSpec,
    memory: Memory,
    moments: RunningMoments | None,
    *,
    hour: int,
    ids: IdTables | None = None,
) -> EncodedWindow:
    """Table rows of all ids, what is remembered of them, and numbers normalised by `moments`.

    Args:
        memory: counters and histories of the rows before; these rows are not in it yet.
        moments: of the dense columns before; None for a first window, which is normalised by itself.
        hour: hours since the epoch at which the rows are predicted; what is remembered has decayed until then.
        ids: the ids that have a row of their own; needed where a feature has `ids = "admitted"`.
    """
    if ids is None:
        assert all(feature.ids == "hashed" for feature in spec.categorical), "features with admitted ids need their tables"
        ids = IdTables(spec)
    raw_dense_NR = np.concatenate([transform(spec.numeric, examples.numeric_NR), memory.columns(examples, hour)])
    if moments is None:
        moments = RunningMoments.nothing_seen(len(raw_dense_NR)).after(raw_dense_NR)
    return encode_known(
        examples, spec, ids, moments, raw_dense_NR=raw_dense_NR, histories=memory.histories(examples), hour=hour
    )


def encode_known(
    examples: Examples,
    spec: DatasetSpec,
    ids: IdTables,
    moments: RunningMoments,
    *,
    raw_dense_NR: F32,
    histories: Histories | None,
    hour: int,
) -> EncodedWindow:
    """The same, where numbers, what is remembered and histories are known already: those of the rows' own time."""
    single = [feature for feature in spec.categorical if not feature.many]
    many = [feature for feature in spec.categorical if feature.many]
    return EncodedWindow(
        layout=table_layout(spec),
        single_keys=(*(feature.name for feature in single), *(cross_key(cross) for cross in spec.crosses)),
        single_RK=_single_rows(single, spec, examples, ids),
        bags={f.name: _mean_bags(ids.rows(f, lists.values_V), lists) for f in many for lists in [examples.list_ids[f.name]]},
        histories=_user_bags(histories, spec, ids, hour),
        raw_dense_NR=raw_dense_NR,
        dense_RN=normalise(raw_dense_NR, moments, num_flags=len(spec.numeric)),
        moments=moments,
        labels_R=examples.labels_R,
        weights_R=examples.weights_R,
        user_R=examples.user_R,
    )


def joined(first: EncodedWindow, second: EncodedWindow) -> EncodedWindow:
    """The rows of both, one after the other; numbers stay as each normalised them."""
    pair = (first, second)
    histories = None
    if first.histories is not None and second.histories is not None:
        num_users = len(next(iter(first.histories.pools.values())).offsets) - 1
        histories = UserBags(
            user_R=np.concatenate([first.histories.user_R, second.histories.user_R + num_users]),
            pools={key: _join_bags(bags, second.histories.pools[key]) for key, bags in first.histories.pools.items()},
            ids={key: np.concatenate([ids, second.histories.ids[key]]) for key, ids in first.histories.ids.items()},
        )
    unseen = [each.looks_R3 for each in pair]
    all_known = [np.full((each.num_rows, 3), [0.0, LEAST_LOG, 0.0], np.float32) for each in pair]
    own_looks = [known if own is None else own for known, own in zip(all_known, unseen, strict=True)]
    shifts = [np.zeros(each.num_rows, np.float32) if each.logit_shifts_R is None else each.logit_shifts_R for each in pair]
    return replace(
        first,
        single_RK=np.concatenate([each.single_RK for each in pair]),
        bags={key: _join_bags(bags, second.bags[key]) for key, bags in first.bags.items()},
        histories=histories,
        raw_dense_NR=np.concatenate([each.raw_dense_NR for each in pair], axis=1),
        dense_RN=np.concatenate([each.dense_RN for each in pair]),
        labels_R=np.concatenate([each.labels_R for each in pair]),
        weights_R=np.concatenate([each.weights_R for each in pair]),
        user_R=np.concatenate([each.user_R for each in pair]),
        logit_shifts_R=None if first.logit_shifts_R is None and second.logit_shifts_R is None else np.concatenate(shifts),
        looks_R3=None if unseen[0] is None and unseen[1] is None else np.concatenate(own_looks),
    )


def _join_bags(first: Bags, second: Bags) -> Bags:
    return Bags(
        rows_V=np.concatenate([first.rows_V, second.rows_V]),
        weights_V=np.concatenate([first.weights_V, second.weights_V]),
        offsets=np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
    )


def look_up_again(
    window: EncodedWindow, examples: Examples, spec: DatasetSpec, ids: IdTables, *, all_counted: bool = True
) -> EncodedWindow:
    """The same rows, with the rows that ids have now that they were admitted.

    Args:
        window: encoded before the window's own ids were admitted, which takes no row from any that was counted.
        examples: that it was encoded from.
        ids: of all features.
        all_counted: whether the ids of all rows were. An id that was not may have lost its row to another.
    """
    single_RK, bags = window.single_RK.copy(), dict(window.bags)
    for feature in (feature for feature in spec.categorical if feature.name in ids.features):
        if feature.many:
            rows_V = bags[feature.name].rows_V.copy()
            _give_new_rows(rows_V, examples.list_ids[feature.name].values_V, feature, ids, all_counted=all_counted)
            bags[feature.name] = replace(bags[feature.name], rows_V=rows_V)
        else:
            rows_R = single_RK[:, window.single_keys.index(feature.name)]
            _give_new_rows(rows_R, examples.single_ids[feature.name], feature, ids, all_counted=all_counted)
    return replace(window, single_RK=single_RK, bags=bags, histories=_pools_again(window.histories, spec, ids))


def dense_columns(spec: DatasetSpec) -> list[str]:
    """Names of the columns of `dense_BN`: numbers, what is remembered, and a missing flag for each number."""
    numbers = [number.name for number in spec.numeric]
    return [*numbers, *column_names(spec), *(f"missing({name})" for name in numbers)]


def num_dense_columns(spec: DatasetSpec) -> int:
    """Width of `dense_BN`: numbers, columns of counters, and a missing flag for each number."""
    return len(dense_columns(spec))


def linear_only_places(spec: DatasetSpec) -> list[int]:
    """Places in `dense_BN` of the columns that go to the linear part alone."""
    columns = dense_columns(spec)
    return [columns.index(name) for name in linear_only_names(spec)]


def num_normalised(spec: DatasetSpec) -> int:
    """Dense columns that are normalised: all but the flags."""
    return len(spec.numeric) + len(column_names(spec))


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """What a batch looks up for one key."""

    rows: I64
    weights: F32
    lengths: npt.NDArray[np.int32]


def _single_rows(
    single: Sequence[Categorical], spec: DatasetSpec, examples: Examples, tables: IdTables
) -> npt.NDArray[np.int32 | np.int64]:
    """Table rows of features and crosses, `[R, K]`."""
    capacities = [feature.capacity for feature in single] + [spec.cross_capacity for _ in spec.crosses]
    rows_RK = np.empty((examples.num_rows, len(capacities)), np.int32 if max(capacities) <= 2**31 else np.int64)

    def fill(start: int) -> None:
        block = slice(start, start + BLOCK_ROWS)
        ids = {name: column[block] for name, column in examples.single_ids.items()}
        for position, feature in enumerate(single):
            rows_RK[block, position] = tables.rows(feature, ids[feature.name])
        for position, cross in enumerate(spec.crosses, start=len(single)):
            rows_RK[block, position] = cross_rows([ids[name] for name in cross], spec.cross_capacity)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, range(0, examples.num_rows, BLOCK_ROWS)))
    return rows_RK


def _mean_bags(rows_V: I64, lists: IdLists) -> Bags:
    """Bags whose weights sum to 1."""
    return Bags(rows_V=rows_V, weights_V=_equal_weights(np.diff(lists.offsets)), offsets=lists.offsets)


def _equal_weights(lengths: I64) -> F32:
    """`[V]` weights that sum to 1 in each list."""
    weights_V: F32 = np.repeat((1.0 / np.maximum(lengths, 1)).astype(np.float32), lengths)
    return weights_V


def _user_bags(histories: Histories | None, spec: DatasetSpec, ids: IdTables, hour: int) -> UserBags | None:
    """Weighted bags of what each user clicked, the weights of a bag summing to 1."""
    if histories is None:
        return None
    by_name = {feature.name: feature for feature in spec.categorical}
    rows = {of: ids.rows(by_name[of], lists.values_V) for of, lists in histories.lists.items()}
    pools, raw = dict[str, Bags](), dict[str, U64]()
    for of, half_life in history_pools(spec):
        lists, key = histories.lists[of], pool_key(of, half_life)
        weights_V = _decayed_weights(lists, hour - histories.hour_V, half_life)
        pools[key], raw[key] = Bags(rows_V=rows[of], weights_V=weights_V, offsets=lists.offsets), lists.values_V
    return UserBags(user_R=histories.position_R, pools=pools, ids=raw)


def _pools_again(histories: UserBags | None, spec: DatasetSpec, ids: IdTables) -> UserBags | None:
    """Histories after admission: what was clicked may have lost its row as well."""
    if histories is None:
        return None
    by_name, pools, rows = {feature.name: feature for feature in spec.categorical}, dict(histories.pools), dict[str, I64]()
    for of, half_life in history_pools(spec):
        key = pool_key(of, half_life)
        if of in ids.features:
            if of not in rows:
                rows[of] = ids.rows(by_name[of], histories.ids[key])
            pools[key] = replace(pools[key], rows_V=rows[of])
    return replace(histories, pools=pools)


def _give_new_rows(
    rows: npt.NDArray[np.int32 | np.int64], raw: U64, feature: Categorical, ids: IdTables, *, all_counted: bool
) -> None:
    """Puts rows after admission in place; where all ids were counted, only one that had none of its own can have another."""
    if not all_counted:
        rows[:] = ids.rows(feature, raw)
        return
    shared = np.flatnonzero(rows == SHARED_ROW)
    rows[shared] = ids.rows(feature, raw[shared])


def _decayed_weights(lists: IdLists, age_hours_V: I64, half_life: float) -> F32:
    """Weights that halve in `half_life` hours and sum to 1 in each list."""
    lengths = np.diff(lists.offsets)
    if np.isinf(half_life):
        return _equal_weights(lengths)
    lengths = lengths[lengths > 0]
    starts = np.cumsum(lengths) - lengths
    if not len(starts):
        return np.empty(0, np.float32)
    youngest_V = np.repeat(np.minimum.reduceat(age_hours_V, starts), lengths)
    decayed_V = np.exp2((youngest_V - age_hours_V) / half_life)
    weights_V: F32 = (decayed_V / np.repeat(np.add.reduceat(decayed_V, starts), lengths)).astype(np.float32)
    return weights_V


def _add_histories(segments: dict[str, _Segment], histories: UserBags, rows_B: I64, layout: TableLayout) -> I64:
    """Gives the bags of each user to the first of the user's rows; `[B]` the row that carries each row's bags."""
    users, first, inverse = np.unique(histories.user_R[rows_B], return_index=True, return_inverse=True)
    in_row_order = np.argsort(first)
    taken = histories.take(users[in_row_order])
    for key, bags in taken.items():
        lengths = np.zeros(len(rows_B), np.int32)
        lengths[first[in_row_order]] = np.diff(bags.offsets)
        segments[key] = _Segment(rows=bags.rows_V, weights=bags.weights_V, lengths=lengths)
    for feature, count in layout.attended.items():
        bags = taken[next(pool for pool, of in layout.pools if of == feature)]
        for back in range(count):
            segments[click_key(feature, back)] = _single_clicks(bags, back, first[in_row_order], len(rows_B))
    carrier_B: I64 = first[inverse]
    return carrier_B


def _single_clicks(bags: Bags, back: int, carrier_U: I64, num_rows: int) -> _Segment:
    """Of each user the click that `back` others followed, in the row that carries the user's history."""
    has_U = np.diff(bags.offsets) > back
    lengths = np.zeros(num_rows, np.int32)
    lengths[carrier_U[has_U]] = 1
    rows = bags.rows_V[bags.offsets[1:][has_U] - 1 - back]
    return _Segment(rows=rows, weights=np.ones(len(rows), np.float32), lengths=lengths)


def _one_id_each(rows_KB: I64, own_keys: Sequence[str], keys: Sequence[str]) -> KeyedJaggedTensor:
    """`_jagged` for keys that all have one id a row; nothing is copied where they are all of the window's own keys."""
    if list(own_keys) != list(keys):
        rows_KB = rows_KB.take([own_keys.index(key) for key in keys], axis=0)
    weights, lengths, offsets = _of_single_ids(rows_KB.size)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(rows_KB.reshape(-1)),
        weights=weights,
        lengths=lengths,
        offsets=offsets,
        stride=rows_KB.shape[1],
    )


@lru_cache(maxsize=4)
def _of_single_ids(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, lengths and offsets of so many ids, which are the same for every batch of a size. Not to be changed."""
    ones = np.ones(count, np.float32)  # torch's own would start threads beside the learner's
    return torch.from_numpy(ones), torch.from_numpy(ones.astype(np.int32)), torch.from_numpy(np.arange(count + 1))


_NOTHING = _Segment(rows=np.empty(0, np.int64), weights=np.empty(0, np.float32), lengths=np.empty(0, np.int32))


def _jagged(segments: Mapping[str, _Segment], keys: Sequence[str], size: int) -> KeyedJaggedTensor:
    chosen = [segments[key] for key in keys] or [_NOTHING]
    lengths = np.concatenate([segment.lengths for segment in chosen])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=offsets[1:])
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(np.concatenate([segment.rows for segment in chosen])),
        weights=torch.from_numpy(np.concatenate([segment.weights for segment in chosen])),
        lengths=torch.from_numpy(lengths),
        offsets=torch.from_numpy(offsets),
        stride=size,
    )
