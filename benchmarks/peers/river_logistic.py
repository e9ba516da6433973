"""river's logistic regression, one row at a time, on hashed ids, crosses and dense columns."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from peers.contender import Contender, Hour, Settings
from peers.hashed import Cross, cross_choices, one_hot, scale_choices


def contenders(spec: DatasetSpec) -> list[Contender]:
    """One contender; the optimizer is part of the search."""
    grid: dict[str, Sequence[Any]] = {
        "optimizer": ("AdaGrad", "SGD", "FTRLProximal"),
        "rate": (0.1, 0.05, 0.2, 0.02),
        "columns": scale_choices(spec),
        "crosses": ((), *cross_choices(spec)),
    }
    return [Contender(name="river", build=_build, grid=grid, package="river")]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A dictionary and a label a row."""

    features: list[dict[int, float]]
    labels: list[bool]


class RiverLogistic:
    """`LogisticRegression` of river."""

    def __init__(self, optimizer: str, rate: float, crosses: Sequence[Cross], scale: str) -> None:
        from river import linear_model, optim

        match optimizer:
            case "AdaGrad":
                chosen: optim.base.Optimizer = optim.AdaGrad(rate)
            case "SGD":
                chosen = optim.SGD(rate)
            case "FTRLProximal":
                chosen = optim.FTRLProximal(alpha=rate)
            case unknown:
                raise ValueError(f"optimizer must be AdaGrad, SGD or FTRLProximal, got {unknown!r}")
        self._model = linear_model.LogisticRegression(optimizer=chosen, intercept_lr=0.01)
        self._crosses, self._scale = crosses, scale

    def prepare(self, hour: Hour) -> Rows:
        """Hashed one-hot rows as dictionaries."""
        matrix = one_hot(hour, self._crosses, self._scale)
        columns, values = matrix.indices.tolist(), matrix.data.tolist()
        spans = itertools.pairwise(matrix.indptr.tolist())
        features = [dict(zip(columns[start:end], values[start:end], strict=True)) for start, end in spans]
        return Rows(features=features, labels=(hour.examples.labels_R > 0).tolist())

    def predict(self, rows: Rows) -> F32:
        """Row by row."""
        predict = self._model.predict_proba_one
        return np.array([predict(features)[True] for features in rows.features], np.float32)

    def learn(self, rows: Rows) -> None:
        """Row by row."""
        learn = self._model.learn_one
        for features, label in zip(rows.features, rows.labels, strict=True):
            learn(features, label)


def _build(spec: DatasetSpec, settings: Settings, seed: int) -> RiverLogistic:
    return RiverLogistic(settings["optimizer"], settings["rate"], settings["crosses"], settings["columns"])
