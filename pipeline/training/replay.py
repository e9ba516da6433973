"""Past rows against forgetting: which are kept with the model, and how they are learned again.

A replayed row keeps what was known at its own time (numbers, counters, ages, the user's history): today's would tell its label,
as the history holds the very click. Its ids are looked up in today's tables, and its numbers normalised by today's moments.

Letters: R rows of the window, K held rows, N dense columns, M replayed rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64, Examples, IdLists, concatenate
from models.histories import Histories
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import SamplingConfig
from pipeline.data.encode import EncodedWindow, encode_known, joined
from pipeline.training.sampling import SampledWindow
from sampling.replay import Reservoir

Arrays = dict[str, npt.NDArray[Any]]
PREFIX = "replay/"
NUM_STRATA = 2
"""Rows that were not clicked, and rows that were."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Rows as they were known at their own time."""

    examples: Examples
    raw_dense_NR: F32
    histories: Histories | None
    """Of each row by itself: `position_R` counts from 0."""

    @classmethod
    def of(cls, examples: Examples, window: EncodedWindow, histories: Histories | None, rows: I64) -> "Held":
        """Those rows of a window, with the weights that they were learned with."""
        return cls(
            examples=examples.with_weights(window.weights_R[: examples.num_rows]).take(rows),
            raw_dense_NR=window.raw_dense_NR[:, rows],
            histories=None if histories is None else _of_rows(histories, histories.position_R[rows]),
        )

    def take(self, rows: I64) -> "Held":
        """Those of `rows`, in that order."""
        return Held(
            examples=self.examples.take(rows),
            raw_dense_NR=self.raw_dense_NR[:, rows],
            histories=None if self.histories is None else _of_rows(self.histories, rows),
        )

    def plus(self, other: "Held") -> "Held":
        """These rows, then the others."""
        return Held(
            examples=concatenate([self.examples, other.examples]),
            raw_dense_NR=np.concatenate([self.raw_dense_NR, other.raw_dense_NR], axis=1),
            histories=None if self.histories is None or other.histories is None else _join(self.histories, other.histories),
        )


@dataclass(frozen=True, kw_only=True)
class ReplayMemory:
    """The reservoir and its rows."""

    reservoir: Reservoir
    held: Held | None = None
    """None: nothing is held."""

    @classmethod
    def empty(cls, sampling: SamplingConfig) -> "ReplayMemory":
        """Nothing seen."""
        return cls(reservoir=Reservoir.empty(capacity=sampling.replay_capacity, num_strata=NUM_STRATA))

    def mixed(
        self,
        window: EncodedWindow,
        spec: DatasetSpec,
        ids: IdTables,
        config: SamplingConfig,
        *,
        seed: Sequence[int],
        hour: int,
    ) -> EncodedWindow:
        """The window's rows, then past ones, so many that they are `replay_share` of both in number and in weight."""
        share = config.replay_share
        if self.held is None or share == 0 or not window.num_rows:
            return window
        preference_K = np.maximum(hour - self.held.examples.hour_R, 1).astype(np.float64) ** config.replay_age_power
        rows, weights_M = self.reservoir.draw(round(window.num_rows * share / (1 - share)), seed, preference_K)
        if not len(rows):
            return window
        past = self.held.take(rows)
        total = float(window.weights_R.mean()) / float((past.examples.weights_R * weights_M).mean())
        weighted = past.examples.with_weights((past.examples.weights_R * weights_M * total).astype(np.float32))
        encoded = encode_known(
            weighted, spec, ids, window.moments, raw_dense_NR=past.raw_dense_NR, histories=past.histories, hour=hour
        )
        return joined(window, encoded)

    def after(
        self, examples: Examples, window: EncodedWindow, histories: Histories | None, learned: I64, *, seed: Sequence[int]
    ) -> "ReplayMemory":
        """What is held once the rows `learned` of a window were offered."""
        stratum_R = (examples.labels_R[learned] > 0).astype(np.int32)
        reservoir, stay, enter = self.reservoir.offer(stratum_R, seed)
        new = Held.of(examples, window, histories, learned[enter])
        return ReplayMemory(reservoir=reservoir, held=new if self.held is None else self.held.take(stay).plus(new))

    def arrays(self) -> Arrays:
        """What a checkpoint keeps; nothing where nothing is held."""
        if self.held is None:
            return {}
        held, reservoir = self.held, self.reservoir
        examples = held.examples
        kept: Arrays = {
            "numbers": reservoir.number_K,
            "strata": reservoir.stratum_K,
            "seen": reservoir.seen_S,
            "places": np.array([reservoir.places]),
            "raw_dense": held.raw_dense_NR,
            "numeric": examples.numeric_NR,
            "labels": examples.labels_R,
            "weights": examples.weights_R,
            "user": examples.user_R,
            "item": examples.item_R,
            "hour": examples.hour_R,
        }
        kept |= {f"single/{name}": ids for name, ids in examples.single_ids.items()}
        lists = {f"list/{name}": each for name, each in examples.list_ids.items()}
        if held.histories is not None:
            lists |= {f"history/{name}": each for name, each in held.histories.lists.items()}
            kept["history_hour"] = held.histories.hour_V
        for name, each in lists.items():
            kept |= {f"{name}/values": each.values_V, f"{name}/offsets": each.offsets}
        return {PREFIX + name: _as_saved(array) for name, array in kept.items()}

    @classmethod
    def load(
        cls, arrays: Mapping[str, npt.NDArray[Any]], sampling: SamplingConfig, spec: DatasetSpec, num_dense: int
    ) -> "ReplayMemory":
        """Goes on from what `arrays()` gave; starts again where the features or the capacity are others."""
        saved = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
        fresh = cls.empty(sampling)
        if not saved or not _fits(saved, fresh.reservoir, spec, num_dense):
            return fresh
        names = [feature.name for feature in spec.categorical]
        examples = Examples(
            single_ids={name: saved[f"single/{name}"].view(np.uint64) for name in names if f"single/{name}" in saved},
            list_ids={name: _lists(saved, f"list/{name}") for name in names if f"list/{name}/values" in saved},
            numeric_NR=saved["numeric"],
            labels_R=saved["labels"],
            weights_R=saved["weights"],
            user_R=saved["user"].view(np.uint64),
            item_R=saved["item"].view(np.uint64),
            hour_R=saved["hour"],
        )
        histories = None
        if spec.history:
            lists = {name: _lists(saved, f"history/{name}") for name in spec.history.of}
            histories = Histories(position_R=np.arange(examples.num_rows), lists=lists, hour_V=saved["history_hour"])
        reservoir = replace(fresh.reservoir, number_K=saved["numbers"], stratum_K=saved["strata"], seen_S=saved["seen"])
        return cls(reservoir=reservoir, held=Held(examples=examples, raw_dense_NR=saved["raw_dense"], histories=histories))


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
    window = replay.mixed(sampled.window, spec, ids, config, seed=[*seed, 3], hour=hour)
    num_past = window.num_rows - sampled.window.num_rows
    if not num_past:
        return sampled
    stratum_R, kept_R = sampled.stratum_R, sampled.kept_R
    if stratum_R is not None:
        stratum_R = np.concatenate([stratum_R, np.full(num_past, stratum_R.max() + 1, np.int32)])
    if kept_R is not None:
        kept_R = np.concatenate([kept_R, np.ones(num_past, bool)])
    return replace(sampled, window=window, stratum_R=stratum_R, kept_R=kept_R)


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


def _fits(saved: Mapping[str, npt.NDArray[Any]], fresh: Reservoir, spec: DatasetSpec, num_dense: int) -> bool:
    needed = {f"list/{f.name}/values" if f.many else f"single/{f.name}" for f in spec.categorical}
    needed |= {f"history/{name}/values" for name in spec.history.of} if spec.history else set()
    same = int(saved["places"][0]) == fresh.places and len(saved["raw_dense"]) == num_dense
    return same and needed <= saved.keys() and len(saved["numeric"]) == len(spec.numeric)


def _of_rows(histories: Histories, chosen: I64) -> Histories:
    """The lists at these places, one a row."""
    hours = next(iter(histories.lists.values()))
    hour_V = IdLists(values_V=histories.hour_V.view(np.uint64), offsets=hours.offsets).take(chosen).values_V.view(np.int64)
    return Histories(
        position_R=np.arange(len(chosen)),
        lists={name: lists.take(chosen) for name, lists in histories.lists.items()},
        hour_V=hour_V,
    )


def _join(first: Histories, second: Histories) -> Histories:
    lists = {
        name: IdLists(
            values_V=np.concatenate([each.values_V, second.lists[name].values_V]),
            offsets=np.concatenate([each.offsets, second.lists[name].offsets[1:] + each.offsets[-1]]),
        )
        for name, each in first.lists.items()
    }
    return Histories(
        position_R=np.arange(len(first.position_R) + len(second.position_R)),
        lists=lists,
        hour_V=np.concatenate([first.hour_V, second.hour_V]),
    )


def _as_saved(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.int64) if contiguous.dtype == np.uint64 else contiguous


def _lists(saved: Mapping[str, npt.NDArray[Any]], name: str) -> IdLists:
    return IdLists(values_V=saved[f"{name}/values"].view(np.uint64), offsets=saved[f"{name}/offsets"])
