"""scikit-learn's SGDClassifier, `partial_fit` once an hour on hashed ids, crosses and dense columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import SGDClassifier

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from peers.contender import Contender, Hour, Settings
from peers.hashed import Cross, cross_choices, one_hot, scale_choices


def contenders(spec: DatasetSpec) -> list[Contender]:
    """One contender; rate, penalty and crosses are searched."""
    grid: dict[str, Sequence[Any]] = {
        "eta0": (0.01, 0.003, 0.03, 0.1),
        "alpha": (1e-6, 1e-5),
        "columns": scale_choices(spec)[::-1],
        "crosses": ((), *cross_choices(spec)),
    }
    return [Contender(name="sgd", build=_build, grid=grid, random=True)]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A hashed matrix and labels."""

    features: sparse.csr_matrix
    labels_R: F32


class SgdClassifier:
    """Logistic loss, a constant rate: the stream drifts."""

    def __init__(self, eta0: float, alpha: float, crosses: Sequence[Cross], scale: str, seed: int) -> None:
        self._model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=eta0, alpha=alpha, random_state=seed)
        self._crosses, self._scale = crosses, scale
        self._fitted = False

    def prepare(self, hour: Hour) -> Rows:
        """Hashed one-hot rows."""
        return Rows(features=one_hot(hour, self._crosses, self._scale).astype(np.float64), labels_R=hour.examples.labels_R)

    def predict(self, rows: Rows) -> F32:
        """One half before anything was learned."""
        if not self._fitted:
            return np.full(len(rows.labels_R), 0.5, np.float32)
        return self._model.predict_proba(rows.features)[:, 1].astype(np.float32)

    def learn(self, rows: Rows) -> None:
        """One shuffled pass."""
        self._model.partial_fit(rows.features, rows.labels_R, classes=[0.0, 1.0])
        self._fitted = True


def _build(spec: DatasetSpec, settings: Settings, seed: int) -> SgdClassifier:
    return SgdClassifier(settings["eta0"], settings["alpha"], settings["crosses"], settings["columns"], seed)
