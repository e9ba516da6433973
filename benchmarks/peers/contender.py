"""What a compared system is: it predicts an hour, then learns it; and how its settings are searched.

Letters: R rows of an hour.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, Examples
from models.histories import Histories
from pipeline.data.encode import EncodedWindow

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Hour:
    """A window of the stream, as every system gets it."""

    start: int
    """Hours since 1970-01-01T00Z."""
    span_hours: int
    """Length of the window."""
    examples: Examples
    """Ids by feature, hashed."""
    encoded: EncodedWindow
    """Our own encoding, which holds the numbers and counters, the same columns for all."""
    histories: Histories | None = None
    """What the rows' users clicked before, where the data set declares a history."""
    true_probability_R: F32 | None = None
    """Of a generated stream."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.examples.num_rows

    def dense_columns(self, scale: str) -> F32:
        """Numbers and counters by row: `normalised` with flags for what is missing, or `raw` logarithms with 0 for it."""
        match scale:
            case "normalised":
                return self.encoded.dense_RN
            case "raw":
                return np.nan_to_num(self.encoded.raw_dense_NR.T, nan=0.0)
            case unknown:
                raise ValueError(f"scale must be normalised or raw, got {unknown!r}")


class System(Protocol):
    """A learner. `prepare` brings rows into its own format and is not timed; `learn` is."""

    def prepare(self, hour: Hour) -> Any:
        """The rows in the form that `predict` and `learn` take."""

    def predict(self, prepared: Any) -> F32:
        """`[R]` probability of label 1, from the hours learned so far."""

    def learn(self, prepared: Any) -> None:
        """One pass over the rows and their labels."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A line of the table."""

    name: str
    build: Callable[[DatasetSpec, Settings, int], System]
    """From the spec, one value of each setting, and a seed."""
    grid: Mapping[str, Sequence[Any]]
    """Values of each setting that are tried; the first of each together are the first trial."""
    package: str = ""
    """Optional package that it needs."""
    random: bool = False
    """True where the seed changes the result."""
    searched_as: str = ""
    """Name of the contender whose best settings it takes; empty: its own."""
    frozen_after_hours: int | None = None
    """From then on it predicts and learns no more."""

    def trials(self, count: int) -> list[dict[str, Any]]:
        """At most `count` combinations: the first values, then others drawn without replacement, the same in every run."""
        first, *others = (dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))
        order = np.random.default_rng(0).permutation(len(others))
        return [first, *(others[place] for place in order)][:count]
