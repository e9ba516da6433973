"""Impressions that were learned as negatives while their click may still come, as they were known at their own time.

Enters: the rows that a window learned. Leaves: for a click that comes in a later window, its impression with the numbers,
counters and histories that it was learned with, so that the correction meets the example that it corrects. With today's, a
network tells corrections from impressions (an item's counters have gone on), and learns that what looks like a correction is
always clicked.

Letters: K kept rows, C corrections.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import I64, U64, Examples
from models.histories import Histories
from models.id_table import IdTables
from pipeline.data.encode import EncodedWindow
from pipeline.data.lineage import Mask
from pipeline.data.normalise import RunningMoments
from pipeline.training.past_rows import Arrays, PastRows, as_saved

PREFIX = "awaiting/"
ARRIVAL_HOURS = 1
"""After `attribution_minutes`, an impression is kept so long for a click that arrives late itself."""


@dataclass(frozen=True, kw_only=True)
class Awaiting:
    """Rows whose click may still come."""

    keys_K: U64
    """Of their events, sorted."""
    rows: PastRows | None = None
    """In that order; None: nothing is kept."""

    @classmethod
    def nothing(cls) -> "Awaiting":
        """No row was learned yet."""
        return cls(keys_K=np.empty(0, np.uint64))

    def find(self, keys_C: U64) -> I64:
        """`[C]` places of those events among the kept rows; -1 where a row is not kept."""
        if not len(self.keys_K):
            return np.full(len(keys_C), -1)
        place_C = np.minimum(np.searchsorted(self.keys_K, keys_C), len(self.keys_K) - 1)
        return np.where(self.keys_K[place_C] == keys_C, place_C, -1)

    def encoded(
        self, keys_C: U64, corrections: Examples, spec: DatasetSpec, ids: IdTables, moments: RunningMoments, hour: int
    ) -> EncodedWindow | None:
        """Corrections as their impressions were known; None where none of them is kept.

        One whose impression is not kept has weight 0: it counts in counters and histories, and no step learns it.

        Args:
            keys_C: events of the impressions.
            corrections: C examples, with the labels and weights of corrections.
        """
        place_C = self.find(keys_C)
        if self.rows is None or not (place_C >= 0).any():
            return None
        weights_C = np.where(place_C >= 0, corrections.weights_R, np.float32(0))
        known = self.rows.take(np.maximum(place_C, 0))
        return known.encoded(corrections.with_weights(weights_C), spec, ids, moments, hour)

    def after(
        self,
        keys: U64,
        examples: Examples,
        window: EncodedWindow,
        histories: Histories | None,
        learned: I64,
        *,
        settled: Mask,
        from_hour: int,
    ) -> "Awaiting":
        """What is kept once a window was learned.

        Args:
            keys: events of the window's examples.
            examples: of the window.
            window: the same, encoded.
            histories: of the same, before the window was counted in.
            learned: impressions whose click may still come.
            settled: `[K]` kept rows whose click has come.
            from_hour: rows of earlier hours are given up.
        """
        new = PastRows.of(examples, window, histories, learned)
        all_keys = keys[learned]
        if self.rows is not None:
            stay = np.flatnonzero(~settled & (self.rows.examples.hour_R >= from_hour))
            new, all_keys = self.rows.take(stay).plus(new), np.concatenate([self.keys_K[stay], all_keys])
        order = np.argsort(all_keys, kind="stable")
        return Awaiting(keys_K=all_keys[order], rows=new.take(order)) if len(order) else Awaiting.nothing()

    def arrays(self) -> Arrays:
        """What a checkpoint keeps; nothing where nothing is kept."""
        if self.rows is None:
            return {}
        return {f"{PREFIX}{name}": array for name, array in (self.rows.arrays() | {"keys": as_saved(self.keys_K)}).items()}

    @classmethod
    def load(cls, arrays: Mapping[str, npt.NDArray[Any]], spec: DatasetSpec, num_dense: int) -> "Awaiting":
        """Goes on from what `arrays()` gave; starts again where the features are others."""
        saved = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
        rows = PastRows.of_arrays(saved, spec, num_dense)
        return cls.nothing() if rows is None else cls(keys_K=saved["keys"].view(np.uint64), rows=rows)
