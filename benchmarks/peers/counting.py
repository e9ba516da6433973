"""What counting alone gives: the click rate of all, and the click rate of the item over the last day."""

from collections import deque
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from peers.contender import Contender, Hour, Settings

TRAILING_HOURS = 24


def contenders(spec: DatasetSpec) -> list[Contender]:
    """The constant, and popularity."""
    prior = {"prior_rows": (20, 5, 50, 100, 300, 1000)}
    return [
        Contender(name="constant", build=lambda spec, settings, seed: Constant(), grid={}),
        Contender(name="popularity", build=_build, grid=prior),
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


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """Clicks and rows by item, of one window."""

    end: int
    by_item: pd.DataFrame


class Popularity:
    """Clicks over impressions of the item in the last 24 hours, with rows at the day's mean rate added in advance."""

    def __init__(self, prior_rows: float) -> None:
        self._prior_rows = prior_rows
        self._day: deque[_Counted] = deque()
        self._total = pd.DataFrame({"clicks": [], "rows": []}, dtype=float)

    def prepare(self, hour: Hour) -> Hour:
        """Nothing to do."""
        return hour

    def predict(self, hour: Hour) -> F32:
        """An item that was not shown has the mean rate."""
        known = self._total.reindex(hour.examples.item_R).fillna(0.0)
        mean = (self._total["clicks"].sum() + 1) / (self._total["rows"].sum() + 2)
        rate_R = (known["clicks"] + self._prior_rows * mean) / (known["rows"] + self._prior_rows)
        return rate_R.to_numpy(np.float32)

    def learn(self, hour: Hour) -> None:
        """Counts the window in and the window of a day ago out."""
        rows = pd.DataFrame({"clicks": hour.examples.labels_R.astype(float), "rows": 1.0, "item": hour.examples.item_R})
        end = hour.start + hour.span_hours
        self._day.append(_Counted(end=end, by_item=rows.groupby("item").sum()))
        while self._day[0].end <= end - TRAILING_HOURS:
            self._day.popleft()
        self._total = pd.concat([counted.by_item for counted in self._day]).groupby(level=0).sum()


def _build(spec: DatasetSpec, settings: Settings, seed: int) -> Popularity:
    return Popularity(settings["prior_rows"])
