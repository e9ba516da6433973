"""Impressions that were learned as not clicked while their click may still come, as they were known at their own time.

Enters: the rows that a window learned. Leaves: in later windows, the looks at them that are learned beside the window's own
rows. Those that were clicked since are all learned; of the others a sample, with probability F_b - F_a, the share of clicks
that became known between the looks (`models/loss.py`), which is how much such a look can tell; their weight is one over it.

Only with both, and with what was known at the impression's own time, does a window of late clicks teach what is true: with
today's counters and histories, or with the clicked ones alone, a network learns that what looks like a late click is always
clicked.

Letters: K kept rows, C late clicks, D rows that are drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64, U64, Examples
from models.id_table import IdTables
from pipeline.data.delays import LEAST_LOG, Delays
from pipeline.data.encode import EncodedWindow
from pipeline.data.lineage import Mask
from pipeline.data.normalise import RunningMoments
from pipeline.training.past_rows import Arrays, PastRows, as_saved

PREFIX = "awaiting/"


@dataclass(frozen=True, kw_only=True)
class Awaiting:
    """Rows whose click may still come."""

    keys_K: U64
    """Of their events, sorted."""
    known_until_K: I64
    """Hour until which the clicks of each were known at its last look."""
    weights_K: F32
    """Above 1 for a row that was drawn and not reached: it stands for others that were passed by."""
    given_back_K: F32
    """What is given back to the logit of each row at later looks."""
    rows: PastRows | None = None
    """In the order of the keys; None: nothing is kept."""

    @classmethod
    def nothing(cls) -> "Awaiting":
        """No row was learned yet."""
        none = np.empty(0, np.float32)
        return cls(keys_K=np.empty(0, np.uint64), known_until_K=np.empty(0, np.int64), weights_K=none, given_back_K=none)

    def find(self, keys_C: U64) -> I64:
        """`[C]` places of those events among the kept rows; -1 where a row is not kept."""
        if not len(self.keys_K):
            return np.full(len(keys_C), -1)
        place_C = np.minimum(np.searchsorted(self.keys_K, keys_C), len(self.keys_K) - 1)
        return np.where(self.keys_K[place_C] == keys_C, place_C, -1)

    def clicked(
        self,
        keys_C: U64,
        late: Examples,
        delays: Delays,
        spec: DatasetSpec,
        ids: IdTables,
        moments: RunningMoments,
        *,
        hour: int,
    ) -> EncodedWindow | None:
        """Looks at rows whose click has come; None where none of them is kept.

        One whose row is not kept has weight 0: it counts in counters and histories, and no step learns it.

        Args:
            keys_C: events of their impressions.
            late: the impressions.
            delays: as they were before the window.
            hour: start of the window.
        """
        place_C = self.find(keys_C)
        if self.rows is None or not (place_C >= 0).any():
            return None
        at_C = np.maximum(place_C, 0)
        looks = replace(late, labels_R=np.ones_like(late.labels_R), weights_R=(place_C >= 0).astype(np.float32))
        encoded = self.rows.take(at_C).encoded(looks, spec, ids, moments, hour)
        at_last_C = delays.log_unseen(late.hour_R, self.known_until_K[at_C])
        return replace(
            encoded, looks_R3=np.stack([at_last_C, np.full_like(at_last_C, LEAST_LOG), self.given_back_K[at_C]], axis=1)
        )

    def drawn(self, delays: Delays, came: U64, known_until: int, seed: Sequence[int]) -> tuple[I64, F32]:
        """`[D]` places of rows that are looked at and still are not clicked, and the weights of these looks.

        Args:
            delays: as they were before the window.
            came: events whose click has come.
            known_until: hour until which clicks on past impressions are known by now.
            seed: of the draw.
        """
        if self.rows is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        hour_K = self.rows.examples.hour_R
        at_last_K, now_K = (np.exp(delays.log_unseen(hour_K, until)) for until in (self.known_until_K, known_until))
        probability_K = np.clip(at_last_K - now_K, 0, 1).astype(np.float64)
        chosen = np.random.default_rng([*seed, 7]).random(len(hour_K)) < probability_K
        places = np.flatnonzero(chosen & ~np.isin(self.keys_K, came))
        return places, (self.weights_K[places] / probability_K[places]).astype(np.float32)

    def not_clicked(
        self,
        places_D: I64,
        weights_D: F32,
        delays: Delays,
        known_until: int,
        spec: DatasetSpec,
        ids: IdTables,
        moments: RunningMoments,
        *,
        hour: int,
    ) -> EncodedWindow:
        """Looks at rows that `drawn` gave."""
        assert self.rows is not None
        rows = self.rows.take(places_D)
        looks = replace(rows.examples, labels_R=np.zeros_like(weights_D), weights_R=weights_D)
        hour_D = rows.examples.hour_R
        unseen = [delays.log_unseen(hour_D, until) for until in (self.known_until_K[places_D], known_until)]
        looks_D3 = np.stack([*unseen, self.given_back_K[places_D]], axis=1)
        return replace(rows.encoded(looks, spec, ids, moments, hour), looks_R3=looks_D3)

    def after(
        self,
        new: PastRows,
        new_keys: U64,
        new_given_back: F32,
        *,
        came: U64,
        drawn_D: I64,
        weights_D: F32,
        reached_D: Mask,
        end: int,
        known_until: int,
        ages: int,
    ) -> "Awaiting":
        """What is kept once a window was learned.

        Args:
            new: impressions that it learned as not clicked.
            new_keys: of their events.
            new_given_back: what is given back to their logits at later looks.
            came: events whose click was learned.
            drawn_D: what `drawn` gave.
            weights_D: the same.
            reached_D: which of these looks were learned.
            end: of the window: hour until which clicks on past impressions are known by now.
            known_until: the same of its own.
            ages: hours after the start of an impression's hour at which all its clicks are known; older rows are given up.
        """
        until_K, weights_K = np.maximum(self.known_until_K, end), np.ones(len(self.keys_K), np.float32)
        missed = drawn_D[~reached_D]
        until_K[missed], weights_K[missed] = self.known_until_K[missed], weights_D[~reached_D]
        keys = np.concatenate([self.keys_K, new_keys])
        rows = new if self.rows is None else self.rows.plus(new)
        stay = np.flatnonzero(~np.isin(keys, came) & (rows.examples.hour_R > end - ages))
        order = stay[np.argsort(keys[stay], kind="stable")]
        if not len(order):
            return Awaiting.nothing()
        return Awaiting(
            keys_K=keys[order],
            known_until_K=np.concatenate([until_K, np.full(len(new_keys), known_until)])[order],
            weights_K=np.concatenate([weights_K, np.ones(len(new_keys), np.float32)])[order],
            given_back_K=np.concatenate([self.given_back_K, new_given_back])[order],
            rows=rows.take(order),
        )

    def arrays(self) -> Arrays:
        """What a checkpoint keeps; nothing where nothing is kept."""
        if self.rows is None:
            return {}
        own: Arrays = {"keys": as_saved(self.keys_K), "known_until": self.known_until_K}
        own |= {"look_weights": self.weights_K, "given_back": self.given_back_K}
        return {f"{PREFIX}{name}": array for name, array in (self.rows.arrays() | own).items()}

    @classmethod
    def load(cls, arrays: Mapping[str, npt.NDArray[Any]], spec: DatasetSpec, num_dense: int) -> "Awaiting":
        """Goes on from what `arrays()` gave; starts again where the features are others."""
        saved = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
        rows = PastRows.of_arrays(saved, spec, num_dense)
        if rows is None:
            return cls.nothing()
        return cls(
            keys_K=saved["keys"].view(np.uint64),
            known_until_K=saved["known_until"],
            weights_K=saved["look_weights"],
            given_back_K=saved["given_back"],
            rows=rows,
        )
