"""Point-in-time statistics of ids: decayed clicks, impressions and click rate, and the age of an id.

Enters: a window's examples. Leaves: dense columns `[C, R]` as they were known before the window; then the window is counted
in. Rows of one window never see each other: take the columns first, add after. The work is proportional to the rows.

Letters: R rows, C columns, H half-lives, S slots, U slots that a window touches, K statistics kept of a slot.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import Counter
from data_schemas.errors import SpecMismatch
from data_schemas.examples import F32, I64, Examples
from models.distinct import Bool, distinct
from models.key_index import KeyChanges, KeyIndex, keys_over

F64 = npt.NDArray[np.float64]

LONGEST_TABLE_HOURS = 10_000
"""More than a year."""


def counter_columns(counter: Counter) -> list[str]:
    """Names of the columns of one `[[counters]]` entry, in their order.

    >>> counter_columns(Counter(over=("item_id",), of=("clicks", "ctr"), half_lives_hours=(24.0, float("inf"))))
    ['clicks_24h(item_id)', 'clicks_total(item_id)', 'ctr_24h(item_id)', 'ctr_total(item_id)']
    """
    return _columns_of(counter, counter.of)


def linear_only_columns(counter: Counter) -> list[str]:
    """Those of them that the network does not see.

    >>> linear_only_columns(Counter(over=("item_id",), of=("clicks", "ctr"), half_lives_hours=(24.0,), linear_only=("ctr",)))
    ['ctr_24h(item_id)']
    """
    return _columns_of(counter, counter.linear_only)


def _columns_of(counter: Counter, statistics: Sequence[str]) -> list[str]:
    spans = ["total" if span == float("inf") else repr(span).removesuffix(".0") + "h" for span in counter.half_lives_hours]
    return [f"{statistic}_{span}({','.join(counter.over)})" for statistic in statistics for span in spans]


class CounterBank:
    """The counts of one `[[counters]]` entry.

    An event of hour e counts `2 ** ((e - t) / half_life)` at hour t, times its row's weight: one over its inclusion
    probability. Counts are float32, so a total (half-life `inf`) is exact up to 16 million. Decay is applied when a slot is
    read or written, from the hour of its last update; time never runs backwards, so a late window does not undo it.
    """

    def __init__(self, counter: Counter) -> None:
        """Nothing counted yet."""
        self.counter = counter
        self._half_lives_H = np.array(counter.half_lives_hours, np.float32)
        self._kinds = [kind for kind in ("clicks", "impressions") if {kind, "ctr"} & set(counter.of)]
        self._index = KeyIndex(counter.capacity)
        self._counts_SK = np.zeros((self._index.num_slots, len(self._kinds) * self._num_spans), np.float32)
        self._hour_S = np.zeros(self._index.num_slots, np.int32)
        self._bank_clicks_H = np.zeros(self._num_spans)
        self._bank_impressions_H = np.zeros(self._num_spans)
        self._bank_hour = 0

    def columns(self, examples: Examples, hour: int) -> F32:
        """The statistics of each row's key, from what was added so far.

        Returns:
            `[C, R]` in the order of `counter_columns`. Clicks and impressions c are `log(1 + c)`. `ctr` is the log odds of
            `(clicks + prior_rows * base) / (impressions + prior_rows)` less those of `base`, the click rate of all keys
            together with the same half-life. All are 0 for a key that is not known, or missing.
        """
        slots_R = self._index.find(keys_over(examples, self.counter.over))
        stored_R = np.maximum(slots_R, 0)
        counts_RK = self._counts_SK.take(stored_R, axis=0)
        left_RK = self._decay(np.where(slots_R < 0, 0, hour - self._hour_S.take(stored_R)))
        if left_RK is not None:
            counts_RK *= left_RK
        counts_RK[slots_R < 0] = 0
        counts = dict(zip(self._kinds, np.split(np.ascontiguousarray(counts_RK.T), len(self._kinds)), strict=True))
        return np.concatenate(
            [
                self._log_odds(counts["clicks"], counts["impressions"]) if kind == "ctr" else np.log1p(counts[kind])
                for kind in self.counter.of
            ]
        )

    def new_share(self, examples: Examples) -> float:
        """Share of rows with a key that is not known."""
        return self._index.new_share(keys_over(examples, self.counter.over))

    def add(self, examples: Examples, hour: int) -> KeyChanges:
        """Count a closed window in, each row at its own hour.

        Args:
            examples: the window's rows, late ones included.
            hour: the hour of the window, since 1970.
        """
        now = max(hour, int(examples.hour_R.max(initial=hour)))
        key_U, place_R = distinct(keys_over(examples, self.counter.over))
        slots_U, fresh_U, num_evicted = self._index.find_or_add(key_U, now)
        stored_U = slots_U >= 0
        counts_UK, before_U = self._counts_SK.take(slots_U, axis=0, mode="clip"), self._hour_S.take(slots_U, mode="clip")
        counts_UK[fresh_U], before_U[fresh_U | ~stored_U] = 0, now  # without a slot, what was taken is another key's
        hour_U = np.maximum(before_U, now)
        left_UK = self._decay(hour_U - before_U)
        if left_UK is not None:
            counts_UK *= left_UK
        counts_UK += self._counted(examples, hour_U, place_R)
        kept = slice(None) if stored_U.all() else stored_U
        self._counts_SK[slots_U[kept]] = counts_UK[kept]
        self._hour_S[slots_U[kept]] = hour_U[kept]
        self._add_to_bank(examples, stored_U.take(place_R), now)
        return KeyChanges.of(key_U, place_R, slots_U, fresh_U, num_evicted)

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps; as large as the number of keys that are stored, or `changed` since `mark_saved`."""
        index = self._index.arrays(changed=changed)
        return index | {
            "counts": self._counts_SK[index["slots"]],
            "hour": self._hour_S[index["slots"]],
            "bank": np.stack([self._bank_clicks_H, self._bank_impressions_H]),
            "bank_hour": np.array([self._bank_hour]),
        }

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        self._index.mark_saved()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `arrays()` gave, and then from what had changed.

        Raises:
            SpecMismatch: it was kept with another capacity or other half-lives.
        """
        width = self._counts_SK.shape[1]
        if arrays["counts"].shape[1:] != (width,) or arrays["bank"].shape != (2, self._num_spans):
            raise SpecMismatch(
                f"counts of {list(self.counter.over)} were saved with {arrays['counts'].shape[1:]} statistics a key, "
                f"the spec has {width}: set 'of' and 'half_lives_hours' back, or start without them"
            )
        slots = self._index.load(arrays)
        self._counts_SK[slots] = arrays["counts"]
        self._hour_S[slots] = arrays["hour"]
        self._bank_clicks_H, self._bank_impressions_H = np.array(arrays["bank"], np.float64)
        self._bank_hour = int(arrays["bank_hour"][0])

    @property
    def _num_spans(self) -> int:
        return len(self._half_lives_H)

    def _decay(self, hours_R: npt.NDArray[np.integer[Any]]) -> F32 | None:
        """`[R, K]` what is left of a count after these hours, all of it where they are negative; None if nothing has decayed.

        An hour is worth the same in all rows, so that it is taken from a table of hours, as long as that is short.
        """
        longest = int(hours_R.max(initial=0))
        if longest <= 0 or np.isinf(self._half_lives_H).all():
            return None
        hours_R = np.maximum(hours_R, 0)
        if longest > LONGEST_TABLE_HOURS:
            return self._left_after(hours_R)
        return self._left_after(np.arange(longest + 1)).take(hours_R, axis=0)

    def _left_after(self, hours_R: npt.NDArray[np.integer[Any]]) -> F32:
        """`[R, K]`, for hours that are not negative."""
        hours_R1 = hours_R.astype(np.float32)[:, None]
        return np.tile(np.exp2(-hours_R1 / self._half_lives_H), (1, len(self._kinds)))

    def _counted(self, examples: Examples, hour_U: npt.NDArray[np.int32], place_R: I64) -> F32:
        """`[U, K]` what the rows add to their keys by the hours of these; once for all half-lives where nothing has decayed."""
        weights_R = examples.weights_R
        added = {"clicks": weights_R * examples.labels_R, "impressions": weights_R}
        by_kind = [added[kind] for kind in self._kinds]
        left_RK = self._decay(hour_U.take(place_R) - examples.hour_R)
        if left_RK is None:
            return np.repeat(_sums(place_R, by_kind, len(hour_U)), self._num_spans, axis=1)
        by_span = [amount_R for amount_R in by_kind for _ in range(self._num_spans)]
        return _sums(place_R, [amount_R * left_R for amount_R, left_R in zip(by_span, left_RK.T, strict=True)], len(hour_U))

    def _add_to_bank(self, examples: Examples, stored_R: Bool, now: int) -> None:
        """Count the rows whose key is stored into the totals of all keys together."""
        hour = max(self._bank_hour, now)
        left_H = np.exp2(-(hour - self._bank_hour) / self._half_lives_H.astype(np.float64))
        left_RK = self._decay(hour - examples.hour_R)
        weight_R1 = (examples.weights_R * stored_R)[:, None]
        weight_RH = weight_R1 if left_RK is None else weight_R1 * left_RK[:, : self._num_spans]  # or one column for all spans
        clicked_RH = weight_RH * examples.labels_R[:, None]
        self._bank_clicks_H = self._bank_clicks_H * left_H + clicked_RH.sum(axis=0, dtype=np.float64)
        self._bank_impressions_H = self._bank_impressions_H * left_H + weight_RH.sum(axis=0, dtype=np.float64)
        self._bank_hour = hour

    def _log_odds(self, clicks_HR: F32, impressions_HR: F32) -> F32:
        """The smoothed log odds of a click above those of the bank; exactly 0 for counts of 0."""
        base_H = (self._bank_clicks_H + 0.5) / (self._bank_impressions_H + 1)  # Jeffreys' prior: never 0 or 1
        prior_clicks_H1 = (self.counter.prior_rows * base_H).astype(np.float32)[:, None]
        prior_others_H1 = (self.counter.prior_rows * (1 - base_H)).astype(np.float32)[:, None]
        others_HR = np.maximum(impressions_HR - clicks_HR, 0)
        log_odds_HR: F32 = np.log1p(clicks_HR / prior_clicks_H1) - np.log1p(others_HR / prior_others_H1)
        return log_odds_HR


class AgeBank:
    """The first hour of each id of a feature."""

    def __init__(self, feature: str, capacity: int) -> None:
        """Nothing seen yet."""
        self.feature = feature
        self._index = KeyIndex(capacity)
        self._first_hour_S = np.zeros(self._index.num_slots, np.int32)

    def columns(self, examples: Examples, hour: int) -> F32:
        """`[1, R]` the log of 1 + the hours since the row's id was first seen; 0 for one that is not known, or missing."""
        slots_R = self._index.find(examples.single_ids[self.feature])
        age_R = np.maximum(hour - self._first_hour_S.take(np.maximum(slots_R, 0)), 0)
        return np.log1p(np.where(slots_R < 0, 0, age_R).astype(np.float32))[None]

    def add(self, examples: Examples, hour: int) -> KeyChanges:
        """Note the ids of a closed window; an id that was late is as old as its earliest row."""
        now = max(hour, int(examples.hour_R.max(initial=hour)))
        key_U, place_R = distinct(examples.single_ids[self.feature])
        slots_U, fresh_U, num_evicted = self._index.find_or_add(key_U, now)
        first_U = self._first_hour_S.take(slots_U, mode="clip")
        first_U[fresh_U] = now
        np.minimum.at(first_U, place_R, examples.hour_R.astype(np.int32))
        stored_U = slots_U >= 0
        self._first_hour_S[slots_U[stored_U]] = first_U[stored_U]
        return KeyChanges.of(key_U, place_R, slots_U, fresh_U, num_evicted)

    def new_share(self, examples: Examples) -> float:
        """Share of rows with an id that is not known."""
        return self._index.new_share(examples.single_ids[self.feature])

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps; as large as the number of ids that are stored, or `changed` since `mark_saved`."""
        index = self._index.arrays(changed=changed)
        return index | {"first_hour": self._first_hour_S[index["slots"]]}

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        self._index.mark_saved()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `arrays()` gave, and then from what had changed.

        Raises:
            SpecMismatch: it was kept with another capacity.
        """
        self._first_hour_S[self._index.load(arrays)] = arrays["first_hour"]


def _sums(place_R: I64, values_KR: Sequence[F32], num_places: int) -> F32:
    """`[U, K]` sums of the rows that share a place, taken in float64."""
    sums_UK = np.empty((num_places, len(values_KR)), np.float32)
    for k, values_R in enumerate(values_KR):
        sums_UK[:, k] = np.bincount(place_R, values_R, num_places)
    return sums_UK
