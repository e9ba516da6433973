"""Late clicks in an update: what is known of past impressions is learned beside the window, and what the window shows is kept.

Enters: the state, and a window's rows. Leaves: the window as it is learned, looks at past impressions behind its own rows; and
what goes on to the next update.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64, U64, Examples
from models.histories import Histories
from models.id_table import IdTables
from pipeline.data.clicks import is_correction
from pipeline.data.delays import Delays
from pipeline.data.encode import EncodedWindow, joined
from pipeline.data.lineage import Mask
from pipeline.data.windows import JoinedClicks
from pipeline.evaluation.metrics import log_odds
from pipeline.evaluation.score import probabilities
from pipeline.training.awaiting import Awaiting
from pipeline.training.learn import click_rate
from pipeline.training.learner import Learner
from pipeline.training.past_rows import Arrays, PastRows
from pipeline.training.sampling import SampledWindow, with_rows_behind


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Past impressions that stand behind the rows of a window as it is learned, none clicked yet."""

    places_D: I64 = field(default_factory=lambda: np.empty(0, np.int64))
    weights_D: F32 = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(frozen=True, kw_only=True)
class LateClicks:
    """What a model knows of clicks that come late."""

    delays: Delays
    awaiting: Awaiting

    @classmethod
    def nothing(cls, spec: DatasetSpec) -> "LateClicks":
        """Before the first window."""
        return cls(delays=Delays.nothing_seen(_ages(spec)), awaiting=Awaiting.nothing())

    def encoded(
        self,
        examples: Examples,
        keys: U64,
        clicks: JoinedClicks,
        encode: Callable[[Examples], EncodedWindow],
        spec: DatasetSpec,
        ids: IdTables,
        *,
        hour: int,
    ) -> EncodedWindow:
        """A window's impressions with what is known of their clicks, then those whose late click it has, as they were known at
        their own time.

        Args:
            examples: of the window, corrections last.
            keys: of their events.
            clicks: of the window.
            encode: with what is known today.
            hour: start of the window.
        """
        late_R = is_correction(examples.labels_R)
        shown, late = examples.take(np.flatnonzero(~late_R)), examples.take(np.flatnonzero(late_R))
        window = encode(shown)
        unseen_R = self.delays.log_unseen(shown.hour_R, clicks.known_until)
        none_R = np.zeros_like(unseen_R)
        window = replace(window, looks_R3=np.stack([none_R, unseen_R, none_R], axis=1))
        if not late.num_rows:
            return window
        again = self.awaiting.clicked(keys[late_R], late, self.delays, spec, ids, window.moments, hour=hour)
        if again is None:
            again = encode(replace(late, weights_R=np.zeros_like(late.weights_R), labels_R=np.ones_like(late.labels_R)))
        return joined(window, again)

    def looking_back(
        self,
        sampled: SampledWindow,
        came: U64,
        known_until: int,
        spec: DatasetSpec,
        ids: IdTables,
        *,
        seed: Sequence[int],
        hour: int,
    ) -> tuple[SampledWindow, Looks]:
        """The window with past impressions behind its rows that still are not clicked.

        Args:
            came: events whose late click the window has.
            known_until: hour until which clicks on past impressions are known by now.
            hour: start of the window.
        """
        places_D, weights_D = self.awaiting.drawn(self.delays, came, known_until, seed)
        if not len(places_D):
            return sampled, Looks()
        looks = self.awaiting.not_clicked(
            places_D, weights_D, self.delays, known_until, spec, ids, sampled.window.moments, hour=hour
        )
        own = sampled.window.weights_R[slice(None) if sampled.kept_R is None else sampled.kept_R]
        sampled = replace(with_rows_behind(sampled, looks), mean_weight=float(own.mean()) if len(own) else None)
        return sampled, Looks(places_D=places_D, weights_D=weights_D)

    def after(
        self,
        examples: Examples,
        keys: U64,
        clicks: JoinedClicks,
        window: EncodedWindow,
        histories: Histories | None,
        looks: Looks,
        moved_R: F32,
        *,
        reached: I64,
        reached_D: Mask,
        spec: DatasetSpec,
    ) -> "LateClicks":
        """What goes on once a window was learned.

        Args:
            examples: of the window, corrections last.
            keys: of their events.
            clicks: of the window.
            window: the examples, encoded.
            histories: of the examples, before the window was counted in.
            looks: that stood behind the window's rows.
            moved_R: what learning the window moved the logits of the examples by.
            reached: rows that the pass came to.
            reached_D: the looks that it came to.
        """
        late_R = is_correction(examples.labels_R[reached])
        came, not_clicked = keys[reached[late_R]], reached[examples.labels_R[reached] == 0]
        clicked = reached[examples.labels_R[reached] > 0]
        hour_E = examples.hour_R[clicked]
        age_E = np.maximum(clicks.click_hour_E[clicked] - hour_E + 1, self._age_at_last_look(keys[clicked], hour_E) + 1)
        return LateClicks(
            delays=self.delays.after(hour_E, age_E, clicks.end),
            awaiting=self.awaiting.after(
                PastRows.of(examples, window, histories, not_clicked),
                keys[not_clicked],
                -moved_R[not_clicked],
                came=came,
                drawn_D=looks.places_D,
                weights_D=looks.weights_D,
                reached_D=reached_D,
                end=clicks.end,
                known_until=clicks.known_until,
                ages=_ages(spec),
            ),
        )

    def num_unknown(self, late_keys: U64) -> int:
        """Late clicks whose impression is not kept."""
        return int((self.awaiting.find(late_keys) < 0).sum())

    def arrays(self) -> Arrays:
        """What a checkpoint keeps."""
        return self.awaiting.arrays() | self.delays.arrays() if self.delays.ages else {}

    @classmethod
    def load(cls, arrays: Mapping[str, npt.NDArray[Any]], spec: DatasetSpec, num_dense: int) -> "LateClicks":
        """Goes on from what `arrays()` gave; starts again where the features are others."""
        return cls(delays=Delays.load(arrays, _ages(spec)), awaiting=Awaiting.load(arrays, spec, num_dense))

    def _age_at_last_look(self, keys_E: U64, hour_E: I64) -> I64:
        """0 for those that were not learned before: on time or late, they were known when they were first looked at."""
        place_E = self.awaiting.find(keys_E)
        if self.awaiting.rows is None:
            return np.zeros(len(keys_E), np.int64)
        return np.where(place_E >= 0, self.awaiting.known_until_K[np.maximum(place_E, 0)] - hour_E, 0)


def logits_of(learner: Learner, window: EncodedWindow) -> F32:
    """`[R]`; of a model that has learned nothing yet, those of the click rate that it starts with."""
    if learner.steps == 0:
        rate = np.clip(click_rate(window), 1e-6, 1 - 1e-6)
        return np.full(window.num_rows, np.log(rate / (1 - rate)), np.float32)
    weights = learner.dense_weights(averaged=False)
    known = probabilities(learner.model, weights, window, device=learner.device, processes=learner.processes)
    return log_odds(known).astype(np.float32)


def _ages(spec: DatasetSpec) -> int:
    """Hours after the start of an impression's hour at which all its clicks are known; 0 where they are no events."""
    return spec.clicks.attribution_hours + 1 if spec.clicks else 0
