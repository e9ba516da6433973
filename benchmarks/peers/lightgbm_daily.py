"""LightGBM, trained anew every six hours on the trailing day."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from peers.contender import Contender, Hour, Settings
from pipeline.data.encode import num_dense_columns

EVERY_HOURS, TRAILING_HOURS = 6, 24
MOST_CATEGORIES = 250
"""Ids of a feature that trees may split on, the day's most frequent; the others are missing to them."""


def contenders(spec: DatasetSpec) -> list[Contender]:
    """One contender."""
    grid: dict[str, Sequence[Any]] = {
        "n_estimators": (100, 200),
        "learning_rate": (0.1, 0.05),
        "num_leaves": (31, 63, 127),
        "min_child_samples": (20, 200),
        "ids": (True, False) if num_dense_columns(spec) else (True,),
    }
    return [Contender(name="lightgbm", build=_build, grid=grid, package="lightgbm")]


class LightGbm:
    """The trees of the last training; the mean click rate before the first."""

    def __init__(self, *, ids: bool, **parameters: Any) -> None:
        self._ids = ids
        self._parameters = parameters
        self._day: deque[Hour] = deque()
        self._known: dict[str, np.ndarray] = {}
        self._model: Any = None
        self._trained_at = -EVERY_HOURS

    def prepare(self, hour: Hour) -> Hour:
        """Nothing: which ids are frequent is known at the time of training."""
        return hour

    def predict(self, hour: Hour) -> F32:
        """From the last training."""
        if self._model is None:
            return np.full(hour.num_rows, 0.5, np.float32)
        return self._model.predict(self._matrix(hour)).astype(np.float32)

    def learn(self, hour: Hour) -> None:
        """Trains if six hours have passed."""
        self._day.append(hour)
        end = hour.start + hour.span_hours
        while self._day[0].start < end - TRAILING_HOURS:
            self._day.popleft()
        if end - self._trained_at >= EVERY_HOURS or self._model is None:
            self._train()
            self._trained_at = end

    def _train(self) -> None:
        import lightgbm

        names = self._day[0].examples.single_ids if self._ids else ()
        self._known = {name: _most_frequent([hour.examples.single_ids[name] for hour in self._day]) for name in names}
        features = np.concatenate([self._matrix(hour) for hour in self._day])
        labels_R = np.concatenate([hour.examples.labels_R for hour in self._day])
        categorical = list(range(features.shape[1] - len(self._known), features.shape[1]))
        data = lightgbm.Dataset(features, labels_R, categorical_feature=categorical, free_raw_data=True)
        parameters = {
            "objective": "binary",
            "verbose": -1,
            "feature_pre_filter": False,
            "num_threads": 1,
            "seed": 0,
            **self._parameters,
        }
        self._model = lightgbm.train(parameters, data, num_boost_round=parameters.pop("n_estimators"))

    def _matrix(self, hour: Hour) -> F32:
        """Dense columns, then the place of each id among the frequent ones; a column of zeros where there is neither."""
        places = []
        for name, known in self._known.items():
            ids = hour.examples.single_ids[name]
            place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
            places.append(np.where(known[place] == ids, place, np.nan).astype(np.float32))
        columns = [hour.encoded.dense_RN, *(place[:, None] for place in places)]
        matrix = np.concatenate(columns, axis=1)
        return matrix if matrix.shape[1] else np.zeros((hour.num_rows, 1), np.float32)


def _most_frequent(parts: Sequence[np.ndarray]) -> np.ndarray:
    ids, counts = np.unique(np.concatenate(parts), return_counts=True)
    return np.sort(ids[np.argsort(-counts, kind="stable")[:MOST_CATEGORIES]])


def _build(spec: DatasetSpec, settings: Settings, seed: int) -> LightGbm:
    return LightGbm(**settings)
