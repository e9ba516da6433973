"""What a window looks like before anything is learned from it, in a few figures that the history keeps.

Enters: the examples of a window and the model's memory. Leaves: a `WindowProfile`.

Letters: R rows, N numeric features, U users, H levels of a quantile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import Examples
from data_schemas.hashing import MISSING
from models.memory import Memory

EXCESS_USERS = 10
LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True, kw_only=True)
class WindowProfile:
    """Figures of a window that a healthy stream changes slowly."""

    rows: int
    clicks: int
    missing: Mapping[str, float]
    """By feature, ids and numbers: share of rows without a value."""
    quantiles: Mapping[str, tuple[float, float, float]]
    """By number: `LEVELS` of what is not missing; absent where everything is."""
    new: Mapping[str, float]
    """By feature that the model remembers ids of: share of rows whose id it has never seen."""
    user_excess: float
    """Standard errors by which the clicks of a user exceed the window's click rate, in the mean of the ten users with most."""


def profile_of(examples: Examples, spec: DatasetSpec, memory: Memory) -> WindowProfile:
    """The profile of logged rows.

    Args:
        examples: rows of the click log, none drawn.
        spec: of the data set.
        memory: of the model, as of the window's start.
    """
    logged = {feature.name for feature in spec.logged_categorical()}
    missing = {name: float((ids == MISSING).mean()) for name, ids in examples.single_ids.items() if name in logged}
    missing |= {name: float((np.diff(ids.offsets) == 0).mean()) for name, ids in examples.list_ids.items() if name in logged}
    quantiles: dict[str, tuple[float, float, float]] = {}
    for number, values_R in zip(spec.numeric, examples.numeric_NR, strict=True):
        present = values_R[~np.isnan(values_R)]
        missing[number.name] = 1 - len(present) / max(examples.num_rows, 1)
        if len(present):
            low, middle, high = (float(value) for value in np.quantile(present, LEVELS))
            quantiles[number.name] = (low, middle, high)
    return WindowProfile(
        rows=examples.num_rows,
        clicks=int((examples.labels_R > 0).sum()),
        missing=missing,
        quantiles=quantiles,
        new=memory.new_shares(examples),
        user_excess=_user_excess(examples),
    )


def _user_excess(examples: Examples) -> float:
    """Ten users with 20 times their clicks change no total, but are far from what their own impressions make likely.

    `(clicks - rate * rows) / sqrt(rate * (1 - rate) * rows + 1)` of a user; the 1 keeps a user of few rows from counting much.
    """
    known = examples.user_R != MISSING
    if not known.any():
        return 0.0
    _, user_R = np.unique(examples.user_R[known], return_inverse=True)
    clicked_R = examples.labels_R[known] > 0
    rows_U, clicks_U = np.bincount(user_R), np.bincount(user_R, weights=clicked_R)
    rate = float(clicked_R.mean())
    excess_U = (clicks_U - rate * rows_U) / np.sqrt(rate * (1 - rate) * rows_U + 1)
    return float(np.sort(excess_U)[-EXCESS_USERS:].mean())
