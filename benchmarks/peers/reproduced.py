"""The brunch figures of Vowpal Wabbit that were known before this benchmark, run through its loop.

`-b 24 -q ui -q ua --ftrl`: without counters at `--ftrl_alpha 1.0`; and at the default alpha with log counts of the item's
clicks of 24 hours and of the user's clicks on the author, as known before the hour.
"""

from collections import deque

import numpy as np
import pandas as pd

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from data_schemas.hashing import combine_hashes
from peers.contender import Contender, Hour
from peers.vowpal_wabbit import Lines, VowpalWabbit

KNOWN = {"vw-ftrl, no counters": (0.6682, 0.4617), "vw-ftrl, two counters": (0.6849, 0.4454)}
"""AUC and log loss on the brunch week, hours 24-167."""
TOLERANCE = 0.003
CROSSES = (("user_id", "item_id"), ("user_id", "author_id"))


def contenders() -> list[Contender]:
    """Both, with the settings that the known figures have: there is nothing to search."""
    plain, counted = KNOWN
    return [
        Contender(
            name=plain,
            build=lambda spec, settings, seed: _Known(spec, "--ftrl_alpha 1.0", counters=False),
            grid={},
            package="vowpalwabbit",
        ),
        Contender(
            name=counted, build=lambda spec, settings, seed: _Known(spec, "", counters=True), grid={}, package="vowpalwabbit"
        ),
    ]


class _Known:
    """Vowpal Wabbit on ids alone, or with two counters of its own."""

    def __init__(self, spec: DatasetSpec, arguments: str, *, counters: bool) -> None:
        self._inner = VowpalWabbit(spec, f"--ftrl {arguments}", CROSSES)
        self._counters = counters
        self._items: deque[pd.Series] = deque(maxlen=24)
        self._popular = pd.Series(dtype=float)
        self._affine = pd.Series(dtype=float)
        self._hour: Hour | None = None

    def prepare(self, hour: Hour) -> Lines:
        """Ids without the hour of the day; counters as known before the hour."""
        self._hour = hour
        examples = hour.examples
        columns = np.zeros((hour.num_rows, 2), np.float32)
        if self._counters:
            pair_R = combine_hashes(examples.user_R, examples.single_ids["author_id"])
            columns[:, 0] = np.log1p(self._popular.reindex(examples.item_R).fillna(0))
            columns[:, 1] = np.log1p(self._affine.reindex(pair_R).fillna(0))
        return self._inner.text_lines(
            {name: ids for name, ids in examples.single_ids.items() if name != "hour_of_day"}, {}, columns, examples.labels_R
        )

    def predict(self, lines: Lines) -> F32:
        """By Vowpal Wabbit."""
        return self._inner.predict(lines)

    def learn(self, lines: Lines) -> None:
        """By Vowpal Wabbit; then the hour's clicks are counted."""
        self._inner.learn(lines)
        assert self._hour is not None
        examples = self._hour.examples
        clicked = examples.labels_R > 0
        self._items.append(pd.Series(examples.item_R[clicked]).value_counts())
        self._popular = pd.concat(self._items).groupby(level=0).sum()
        pairs = combine_hashes(examples.user_R, examples.single_ids["author_id"])[clicked]
        self._affine = self._affine.add(pd.Series(pairs).value_counts(), fill_value=0)
