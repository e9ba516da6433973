"""What counting alone gives: the click rate of all; and the popularity of the item over the last day."""

from collections import deque

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from peers.contender import Contender, Hour, Settings

Keys = npt.NDArray[np.int64 | np.uint64]

TRAILING_HOURS = 24


def contenders(spec: DatasetSpec) -> list[Contender]:
    """The constant, and popularity."""
    grid = {"by": ("clicks", "rate"), "prior_rows": (20, 100, 500)}
    return [
        Contender(name="constant", build=lambda spec, settings, seed: Constant(), grid={}),
        Contender(name="popularity", build=_build, grid=grid),
    ]


class Constant:
    """The click rate of all earlier hours, for every row."""

    def __init__(self) -> None:
        self._clicks, self._rows = 1.0, 2.0

    def prepare(self, hour: Hour) -> Hour:
        """Nothing to do."""
        return hour

    def predict(self, hour: Hour) -> F32:
        """The same for all."""
        return np.full(hour.num_rows, self._clicks / self._rows, np.float32)

    def learn(self, hour: Hour) -> None:
        """Counts."""
        self._clicks += float(hour.examples.labels_R.sum())
        self._rows += hour.num_rows


class _DailyRates:
    """Clicks and rows by key over the trailing day."""

    def __init__(self) -> None:
        self._day: deque[tuple[int, pd.DataFrame]] = deque()
        self.total = pd.DataFrame({"clicks": [], "rows": []}, dtype=float)

    def add(self, keys_R: Keys, labels_R: F32, end: int) -> None:
        """Counts a window in that ends at `end`, and those of a day ago out."""
        rows = pd.DataFrame({"clicks": labels_R.astype(float), "rows": 1.0, "key": keys_R})
        self._day.append((end, rows.groupby("key").sum()))
        while self._day[0][0] <= end - TRAILING_HOURS:
            self._day.popleft()
        self.total = pd.concat([counted for _, counted in self._day]).groupby(level=0).sum()

    def smoothed(self, keys_R: Keys, prior_rows: float) -> F32:
        """Clicks over rows, with rows at the mean rate added in advance; the mean rate for an unknown key."""
        known = self.total.reindex(keys_R).fillna(0.0)
        mean = (self.total["clicks"].sum() + 1) / (self.total["rows"].sum() + 2)
        rate_R = (known["clicks"] + prior_rows * mean) / (known["rows"] + prior_rows)
        return rate_R.to_numpy(np.float32)


class Popularity:
    """Of an item in the last 24 hours: its smoothed click rate; or its clicks, turned into the rate of items with as many."""

    def __init__(self, by: str, prior_rows: float) -> None:
        if by not in ("rate", "clicks"):
            raise ValueError(f"by must be rate or clicks, got {by!r}")
        self._by, self._prior_rows = by, prior_rows
        self._items, self._buckets = _DailyRates(), _DailyRates()

    def prepare(self, hour: Hour) -> Hour:
        """Nothing to do."""
        return hour

    def predict(self, hour: Hour) -> F32:
        """An item that was not shown has the mean rate."""
        if self._by == "rate":
            return self._items.smoothed(hour.examples.item_R, self._prior_rows)
        return self._buckets.smoothed(self._bucket(hour), self._prior_rows)

    def learn(self, hour: Hour) -> None:
        """Counts the window in and the window of a day ago out."""
        end = hour.start + hour.span_hours
        if self._by == "clicks":
            self._buckets.add(self._bucket(hour), hour.examples.labels_R, end)
        self._items.add(hour.examples.item_R, hour.examples.labels_R, end)

    def _bucket(self, hour: Hour) -> Keys:
        """Half steps of the binary logarithm of one plus the item's clicks, as known before the window."""
        clicks = self._items.total["clicks"].reindex(hour.examples.item_R).fillna(0.0)
        return np.floor(2 * np.log2(1 + clicks.to_numpy())).astype(np.int64)


def _build(spec: DatasetSpec, settings: Settings, seed: int) -> Popularity:
    return Popularity(settings["by"], settings["prior_rows"])
