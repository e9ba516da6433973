"""Vowpal Wabbit, fed text: a namespace for each feature, one for the dense columns.

Plain; with crossed namespaces; with crossed namespaces and `--ftrl`; and where the data set declares a history, that with the
ids that the user clicked last as namespaces, crossed with the candidate's. Its default update is the adaptive, normalised,
invariant one (Ross, Mineiro & Langford 2013), FTRL-proximal is that of McMahan et al. 2013.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, U64, IdLists
from peers.contender import Contender, Hour, Settings
from peers.hashed import Cross, cross_choices, scale_choices

BITS = 24
DENSE_NAMESPACE = "z"


def contenders(spec: DatasetSpec) -> list[Contender]:
    """Three ways to run it, four where there are histories."""
    crosses = cross_choices(spec)
    adaptive: dict[str, Sequence[Any]] = {"-l": (0.5, 0.2, 0.1, 1.0), "--power_t": (0.5, 0.3), "columns": scale_choices(spec)}
    ftrl: dict[str, Sequence[Any]] = {"--ftrl_alpha": (0.5, 1.0, 0.2), "columns": scale_choices(spec)}
    with_history = ftrl | {"crosses": crosses, "history": (10, 50)}
    remembering = (
        [Contender(name="vw-history", build=_build, grid=with_history, package="vowpalwabbit")] if spec.history else []
    )
    return [
        Contender(name="vw", build=_build, grid=adaptive, package="vowpalwabbit"),
        Contender(name="vw-crosses", build=_build, grid=adaptive | {"crosses": crosses}, package="vowpalwabbit"),
        Contender(name="vw-ftrl", build=_build, grid=ftrl | {"crosses": crosses}, package="vowpalwabbit"),
        *remembering,
    ]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Rows as text, without and with the label."""

    bare: list[str]
    labelled: list[str]


class VowpalWabbit:
    """A workspace of 2^24 weights."""

    def __init__(
        self, spec: DatasetSpec, arguments: str, crosses: Sequence[Cross] = (), *, scale: str = "raw", history: int = 0
    ) -> None:
        """An empty one.

        Args:
            crosses: features whose namespaces are crossed.
            scale: of the dense columns; its own update normalises them, FTRL does not.
            history: how many of the ids that the user clicked last are given.
        """
        from vowpalwabbit import Workspace

        self._letters = {feature.name: chr(ord("a") + place) for place, feature in enumerate(spec.categorical)}
        assert len(self._letters) < ord(DENSE_NAMESPACE) - ord("a"), "more features than letters"
        interactions = " ".join(f"--interactions {''.join(self._letters[name] for name in cross)}" for cross in crosses)
        if history and spec.history:
            interactions += "".join(f" --interactions {self._letters[of].upper()}{self._letters[of]}" for of in spec.history.of)
        self._history, self._scale = history, scale
        fixed = f"--loss_function logistic --link logistic -b {BITS} --quiet"
        self.arguments = f"{fixed} {interactions} {arguments}"
        self._workspace = Workspace(self.arguments)

    def prepare(self, hour: Hour) -> Lines:
        """Text lines; zeros of the dense columns are left out, which changes nothing."""
        examples = hour.examples
        past = self._past_texts(hour) if self._history else []
        return self.text_lines(examples.single_ids, examples.list_ids, hour.dense_columns(self._scale), examples.labels_R, past)

    def text_lines(
        self,
        single_ids: Mapping[str, U64],
        list_ids: Mapping[str, IdLists],
        dense_RN: F32,
        labels_R: F32,
        more: Sequence[pa.Array] = (),
    ) -> Lines:
        """A namespace for each feature, one for all dense columns, then `more`."""
        parts = [_namespace(self._letters[name], _texts(ids)) for name, ids in single_ids.items()]
        parts += [_namespace(self._letters[name], _joined(lists)) for name, lists in list_ids.items()]
        if dense_RN.shape[1]:
            parts.append(_namespace(DENSE_NAMESPACE, _numbers(dense_RN)))
        parts += more
        bare = pc.binary_join_element_wise(*parts, " ")
        label = pa.array(np.where(labels_R > 0, "1", "-1"))
        return Lines(bare=bare.to_pylist(), labelled=pc.binary_join_element_wise(label, bare, " ").to_pylist())

    def _past_texts(self, hour: Hour) -> list[pa.Array]:
        """Namespaces of capital letters: written once a user, then spread over the user's rows."""
        assert hour.histories is not None
        user_R = pa.array(hour.histories.position_R)
        lists = {name: _newest(ids, self._history) for name, ids in hour.histories.lists.items()}
        return [_namespace(self._letters[name].upper(), _joined(ids)).take(user_R) for name, ids in lists.items()]

    def predict(self, lines: Lines) -> F32:
        """Parses and predicts."""
        predict = self._workspace.predict
        return np.array([predict(line) for line in lines.bare], np.float32)

    def learn(self, lines: Lines) -> None:
        """Parses and learns."""
        learn = self._workspace.learn
        for line in lines.labelled:
            learn(line)


def _build(spec: DatasetSpec, settings: Settings, seed: int) -> VowpalWabbit:
    ftrl = "--ftrl " if "--ftrl_alpha" in settings else ""
    arguments = " ".join(f"{name} {value}" for name, value in settings.items() if name.startswith("-") and value)
    return VowpalWabbit(
        spec, ftrl + arguments, settings.get("crosses", ()), scale=settings["columns"], history=settings.get("history", 0)
    )


def _texts(ids: U64) -> pa.Array:
    return pc.cast(pa.array(ids), pa.string())


def _joined(lists: IdLists) -> pa.Array:
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(lists.offsets.astype(np.int32)), _texts(lists.values_V)), " ")


def _newest(lists: IdLists, count: int) -> IdLists:
    """The last `count` ids of each list."""
    lengths = np.minimum(np.diff(lists.offsets), count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions = np.repeat(lists.offsets[1:] - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
    return IdLists(values_V=lists.values_V[positions], offsets=offsets)


def _numbers(dense_RN: F32) -> pa.Array:
    """Such as `0:1.25 3:-0.5`."""
    rounded_NR = np.round(dense_RN.T.astype(np.float64), 4)
    columns = [
        pc.if_else(
            pa.array(column != 0), pc.binary_join_element_wise(str(place), pc.cast(pa.array(column), pa.string()), ":"), ""
        )
        for place, column in enumerate(rounded_NR)
    ]
    return pc.binary_join_element_wise(*columns, " ")


def _namespace(letter: str, texts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(f"|{letter}", texts, " ")
