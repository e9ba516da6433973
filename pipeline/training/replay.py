"""Past rows against forgetting: which are kept with the model, and how they are learned again.

A replayed row keeps what was known at its own time. Its ids are looked up in today's tables, and its numbers normalised by
today's moments.

Letters: R rows of the window, K held rows, M replayed rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import I64, Examples
from models.histories import Histories
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import SamplingConfig
from pipeline.data.encode import EncodedWindow
from pipeline.training.past_rows import Arrays, PastRows, as_saved
from pipeline.training.sampling import SampledWindow, with_rows_behind
from sampling.replay import Reservoir

PREFIX = "replay/"
NUM_STRATA = 2
"""Rows that were not clicked, and rows that were."""


@dataclass(frozen=True, kw_only=True)
class ReplayMemory:
    """The reservoir and its rows."""

    reservoir: Reservoir
    held: PastRows | None = None
    """None: nothing is held."""

    @classmethod
    def empty(cls, sampling: SamplingConfig) -> "ReplayMemory":
        """Nothing seen."""
        return cls(reservoir=Reservoir.empty(capacity=sampling.replay_capacity, num_strata=NUM_STRATA))

    def drawn(
        self,
        window: EncodedWindow,
        spec: DatasetSpec,
        ids: IdTables,
        config: SamplingConfig,
        *,
        seed: Sequence[int],
        hour: int,
    ) -> EncodedWindow | None:
        """Past rows, so many that they are `replay_share` of the window and them in number and in weight; None: none."""
        share = config.replay_share
        if self.held is None or share == 0 or not window.num_rows:
            return None
        preference_K = np.maximum(hour - self.held.examples.hour_R, 1).astype(np.float64) ** config.replay_age_power
        rows, weights_M = self.reservoir.draw(round(window.num_rows * share / (1 - share)), seed, preference_K)
        if not len(rows):
            return None
        past = self.held.take(rows)
        total = float(window.weights_R.mean()) / float((past.examples.weights_R * weights_M).mean())
        weighted = past.examples.with_weights((past.examples.weights_R * weights_M * total).astype(np.float32))
        return past.encoded(weighted, spec, ids, window.moments, hour)

    def after(
        self, examples: Examples, window: EncodedWindow, histories: Histories | None, learned: I64, *, seed: Sequence[int]
    ) -> "ReplayMemory":
        """What is held once the rows `learned` of a window were offered."""
        stratum_R = (examples.labels_R[learned] > 0).astype(np.int32)
        reservoir, stay, enter = self.reservoir.offer(stratum_R, seed)
        new = PastRows.of(examples, window, histories, learned[enter])
        return ReplayMemory(reservoir=reservoir, held=new if self.held is None else self.held.take(stay).plus(new))

    def arrays(self) -> Arrays:
        """What a checkpoint keeps; nothing where nothing is held."""
        if self.held is None:
            return {}
        reservoir = self.reservoir
        kept: Arrays = self.held.arrays() | {
            "numbers": reservoir.number_K,
            "strata": reservoir.stratum_K,
            "seen": reservoir.seen_S,
            "places": np.array([reservoir.places]),
        }
        return {PREFIX + name: as_saved(array) for name, array in kept.items()}

    @classmethod
    def load(
        cls, arrays: Mapping[str, npt.NDArray[Any]], sampling: SamplingConfig, spec: DatasetSpec, num_dense: int
    ) -> "ReplayMemory":
        """Goes on from what `arrays()` gave; starts again where the features or the capacity are others."""
        saved = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
        fresh, held = cls.empty(sampling), PastRows.of_arrays(saved, spec, num_dense)
        if held is None or int(saved["places"][0]) != fresh.reservoir.places:
            return fresh
        reservoir = replace(fresh.reservoir, number_K=saved["numbers"], stratum_K=saved["strata"], seen_S=saved["seen"])
        return cls(reservoir=reservoir, held=held)


def with_replay(
    replay: ReplayMemory,
    sampled: SampledWindow,
    config: SamplingConfig,
    spec: DatasetSpec,
    ids: IdTables,
    *,
    seed: Sequence[int],
    hour: int,
) -> SampledWindow:
    """The window with past rows behind its own; in a stratum of their own, where batches mirror strata."""
    past = replay.drawn(sampled.window, spec, ids, config, seed=[*seed, 3], hour=hour)
    return sampled if past is None else with_rows_behind(sampled, past)


def after_window(
    replay: ReplayMemory, examples: Examples, sampled: SampledWindow, memory: Memory, reached: I64, *, seed: Sequence[int]
) -> ReplayMemory:
    """What is held once the window's own rows that were learned have been offered.

    Args:
        memory: as it was before the window.
        reached: rows that the pass came to, those left out by sampling too.
    """
    learned = reached if sampled.kept_R is None else reached[sampled.kept_R[reached]]
    return replay.after(examples, sampled.window, memory.histories(examples), learned, seed=[*seed, 4])
