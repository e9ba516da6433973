"""Rows of earlier windows as they were known at their own time: numbers, counters, ages, and what their users had clicked.

Enters: rows of a window, encoded. Leaves: the same, to keep with the model, and to learn from later with today's table rows and
moments. What is known today would tell a past row's label, as counters and histories hold the very click.

Letters: R rows of the window, K kept rows, N dense columns, U users.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64, Examples, IdLists, concatenate
from models.histories import Histories
from models.id_table import IdTables
from pipeline.data.encode import EncodedWindow, encode_known
from pipeline.data.normalise import RunningMoments

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class PastRows:
    """K rows as they were known at their own time."""

    examples: Examples
    raw_dense_NK: F32
    """Numbers and counters before they were normalised."""
    histories: Histories | None
    """Of their users; a user who has rows of two windows stands there twice."""

    @classmethod
    def of(cls, examples: Examples, window: EncodedWindow, histories: Histories | None, rows: I64) -> "PastRows":
        """Those rows of a window, with the weights that they were learned with.

        Args:
            examples: of the window.
            window: the same, encoded; further rows may stand behind them.
            histories: of the same, before the window was counted in.
            rows: K places.
        """
        return cls(
            examples=examples.with_weights(window.weights_R[: examples.num_rows]).take(rows),
            raw_dense_NK=window.raw_dense_NR[:, rows],
            histories=None if histories is None else _of_rows(histories, rows),
        )

    @property
    def num_rows(self) -> int:
        """K."""
        return self.examples.num_rows

    def take(self, rows: I64) -> "PastRows":
        """Those of `rows`, in that order."""
        return PastRows(
            examples=self.examples.take(rows),
            raw_dense_NK=self.raw_dense_NK[:, rows],
            histories=None if self.histories is None else _of_rows(self.histories, rows),
        )

    def plus(self, other: "PastRows") -> "PastRows":
        """These rows, then the others."""
        return PastRows(
            examples=concatenate([self.examples, other.examples]),
            raw_dense_NK=np.concatenate([self.raw_dense_NK, other.raw_dense_NK], axis=1),
            histories=None if self.histories is None or other.histories is None else _join(self.histories, other.histories),
        )

    def encoded(
        self, examples: Examples, spec: DatasetSpec, ids: IdTables, moments: RunningMoments, hour: int
    ) -> EncodedWindow:
        """As they are learned in a window that starts at `hour`.

        Args:
            examples: of these rows, with the labels and weights that they are learned with.
        """
        return encode_known(examples, spec, ids, moments, raw_dense_NR=self.raw_dense_NK, histories=self.histories, hour=hour)

    def arrays(self) -> Arrays:
        """What a checkpoint keeps; unsigned words as `int64` of the same bits."""
        examples = self.examples
        kept: Arrays = {
            "raw_dense": self.raw_dense_NK,
            "numeric": examples.numeric_NR,
            "labels": examples.labels_R,
            "weights": examples.weights_R,
            "user": examples.user_R,
            "item": examples.item_R,
            "hour": examples.hour_R,
        }
        kept |= {f"single/{name}": ids for name, ids in examples.single_ids.items()}
        lists = {f"list/{name}": each for name, each in examples.list_ids.items()}
        if self.histories is not None:
            lists |= {f"history/{name}": each for name, each in self.histories.lists.items()}
            kept |= {"history_hour": self.histories.hour_V, "history_place": self.histories.position_R}
        for name, each in lists.items():
            kept |= {f"{name}/values": each.values_V, f"{name}/offsets": each.offsets}
        return {name: as_saved(array) for name, array in kept.items()}

    @classmethod
    def of_arrays(cls, saved: Mapping[str, npt.NDArray[Any]], spec: DatasetSpec, num_dense: int) -> "PastRows | None":
        """What `arrays()` gave; None where there is nothing, or where the features are others."""
        if not _fits(saved, spec, num_dense):
            return None
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
            histories = Histories(position_R=saved["history_place"], lists=lists, hour_V=saved["history_hour"])
        return cls(examples=examples, raw_dense_NK=saved["raw_dense"], histories=histories)


def as_saved(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Contiguous; unsigned words as `int64` of the same bits."""
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.int64) if contiguous.dtype == np.uint64 else contiguous


def _fits(saved: Mapping[str, npt.NDArray[Any]], spec: DatasetSpec, num_dense: int) -> bool:
    needed = {f"list/{f.name}/values" if f.many else f"single/{f.name}" for f in spec.categorical}
    needed |= {f"history/{name}/values" for name in spec.history.of} | {"history_place"} if spec.history else set()
    if not needed | {"raw_dense", "numeric"} <= saved.keys():
        return False
    return len(saved["raw_dense"]) == num_dense and len(saved["numeric"]) == len(spec.numeric)


def _of_rows(histories: Histories, rows: I64) -> Histories:
    """The histories of those rows, each user's once."""
    users, position_K = np.unique(histories.position_R[rows], return_inverse=True)
    hours = next(iter(histories.lists.values()))
    hour_V = IdLists(values_V=histories.hour_V.view(np.uint64), offsets=hours.offsets).take(users).values_V.view(np.int64)
    lists = {name: lists.take(users) for name, lists in histories.lists.items()}
    return Histories(position_R=position_K, lists=lists, hour_V=hour_V)


def _join(first: Histories, second: Histories) -> Histories:
    lists = {
        name: IdLists(
            values_V=np.concatenate([each.values_V, second.lists[name].values_V]),
            offsets=np.concatenate([each.offsets, second.lists[name].offsets[1:] + each.offsets[-1]]),
        )
        for name, each in first.lists.items()
    }
    return Histories(
        position_R=np.concatenate([first.position_R, second.position_R + first.num_users]),
        lists=lists,
        hour_V=np.concatenate([first.hour_V, second.hour_V]),
    )


def _lists(saved: Mapping[str, npt.NDArray[Any]], name: str) -> IdLists:
    return IdLists(values_V=saved[f"{name}/values"].view(np.uint64), offsets=saved[f"{name}/offsets"])
