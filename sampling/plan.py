"""The plan of a window: what is learned of each stratum, and with what probability.

Enters: columns of a window, `Rules`, a seed. Leaves: kept rows with their factors and shifts, and a small table of it all.

    strata -> caps -> keep rates -> draw -> table

The same columns, rules and seed give the same rows, so that an update replays.

Letters: R rows, S strata, X strata without the label.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.errors import ConfigError
from data_schemas.examples import F32, I64
from sampling.counting import CountedIds
from sampling.strata import Allocation, Numbers, Strata, StratifyBy, keep_rates, strata_of
from sampling.thinning import Bools, Correction, Method, Thinned, effective_rows, logit_shift, thin, within_cap


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows are sampled; `SamplingConfig` has the same fields, and says what they mean."""

    strata: tuple[StratifyBy, ...] = ()
    negative_keep_rate: float = 1.0
    allocation: Allocation = "proportional"
    given_keep_rates: Mapping[str, float] = field(default_factory=dict)
    draw: Method = "poisson"
    replacement: bool = False
    correction: Correction = "weights"
    max_rows_per_user: int = 0
    max_rows_per_item: int = 0

    @property
    def leaves_rows_out(self) -> bool:
        """Whether any row can be left out."""
        thins = self.negative_keep_rate < 1 or self.allocation == "given"
        return thins or self.max_rows_per_user > 0 or self.max_rows_per_item > 0


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What rules look at, of each row of a window."""

    labels_R: F32
    users: CountedIds
    items: CountedIds
    hour_R: I64
    popularity_R: Numbers | None = None
    age_hours_R: Numbers | None = None
    activity_R: Numbers | None = None

    def strata(self, by: tuple[StratifyBy, ...]) -> Strata:
        """By any of the columns that are there."""
        return strata_of(
            by,
            labels_R=self.labels_R,
            popularity_R=self.popularity_R,
            age_hours_R=self.age_hours_R,
            activity_R=self.activity_R,
            hour_R=self.hour_R,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedStratum:
    """One line of the table."""

    name: str
    rows: int
    """Of the window."""
    capped: int
    """Left out by a cap; nothing makes up for them."""
    keep_rate: float
    """Inclusion probability of the others; with replacement the expected number of draws."""
    kept: int
    """Rows that are learned."""
    effective_rows: float
    """Equally weighted rows that would tell as much."""


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is learned of a window, and what is left out."""

    strata: tuple[PlannedStratum, ...]
    seed: tuple[int, ...]
    correction: Correction
    effective_rows: float
    """Of all kept rows."""
    absent: tuple[str, ...] = ()
    """Strata of `given_keep_rates` that have no rows in this window."""

    @property
    def rows(self) -> int:
        """Of the window."""
        return sum(stratum.rows for stratum in self.strata)

    @property
    def kept(self) -> int:
        """Rows that are learned."""
        return sum(stratum.kept for stratum in self.strata)

    @property
    def capped(self) -> int:
        """Rows that a cap left out."""
        return sum(stratum.capped for stratum in self.strata)

    def notes(self) -> Iterator[str]:
        """What was left out, in words."""
        if self.capped:
            yield f"{self.capped:,} rows were over sampling.max_rows_per_user or max_rows_per_item; no weight makes up for them"
        thinned = self.rows - self.capped - self.kept
        if thinned:
            made_up = "weights" if self.correction == "weights" else "a shift of the logits"
            yield f"{thinned:,} of {self.rows:,} rows were left out by sampling; {made_up} made up for them"
        if self.absent:
            yield f"sampling.given_keep_rates names strata that have no rows in this window: {'; '.join(self.absent)}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The rows of a window as the rules want them learned."""

    strata: Strata
    kept_R: Bools | None
    """None: all."""
    factor_R: F32 | None
    """On the weight of each row; None: 1 everywhere."""
    shift_R: F32 | None
    """To be added to each row's logit before it is judged; None: 0 everywhere."""
    plan: SamplingPlan


def sample_rows(rules: Rules, columns: Columns, seed: tuple[int, ...]) -> Sample:
    """Applies the rules to a window.

    Raises:
        ConfigError: negatives are to be thinned and there are none, a column is missing, or `given_keep_rates` names what
            cannot be a stratum.
    """
    if not rules.leaves_rows_out:
        strata = columns.strata(rules.strata)
        rate_S, ones_R = np.ones(len(strata.names)), np.ones(len(columns.labels_R), np.float32)
        table = _table(strata, np.zeros(len(ones_R), bool), rate_S, ones_R, ones_R > 0, rules.correction, seed)
        return Sample(strata=strata, kept_R=None, factor_R=None, shift_R=None, plan=table)
    others = tuple(name for name in rules.strata if name != "label")
    strata, rng = columns.strata(("label", *others)), np.random.default_rng([*seed, 3])
    among_R = within_cap(columns.users, rules.max_rows_per_user, rng)
    among_R &= within_cap(columns.items, rules.max_rows_per_item, rng)
    wanted_S = _rates(rules, strata, among_R)
    thinned = thin(strata, wanted_S, rng, method=rules.draw, replacement=rules.replacement, among_R=among_R)
    factor_R, shift_R = thinned.factor_R, None
    if rules.correction == "logit_shift":
        factor_R, shift_R = thinned.times_R.astype(np.float32), _shift(rules, strata, columns.strata(others), thinned)
    table = _table(strata, ~among_R, thinned.rate_S, factor_R, thinned.kept_R, rules.correction, seed)
    table = replace(table, absent=tuple(name for name in rules.given_keep_rates if name not in strata.names))
    return Sample(strata=strata, kept_R=thinned.kept_R, factor_R=factor_R, shift_R=shift_R, plan=table)


def as_table(plan: SamplingPlan) -> dict[str, list[Any]]:
    """Column names and rows, in the form that MLflow shows as a table."""
    names = list(PlannedStratum.__dataclass_fields__)
    return {"columns": names, "data": [[getattr(stratum, name) for name in names] for stratum in plan.strata]}


def _is_negative(strata: Strata) -> Bools:
    return np.array([name.startswith("label=0") for name in strata.names], bool)


def _rates(rules: Rules, strata: Strata, among_R: Bools) -> npt.NDArray[np.float64]:
    """`[S]` the keep rate of each stratum."""
    if rules.allocation == "given":
        _check_given(rules.given_keep_rates, strata)
        return np.array([rules.given_keep_rates.get(name, 1.0) for name in strata.names])
    rate_S, negative_S = np.ones(len(strata.names)), _is_negative(strata)
    if rules.negative_keep_rate < 1:
        if not negative_S.any():
            raise ConfigError(
                f"sampling.negative_keep_rate = {rules.negative_keep_rate} asks to thin negatives, and the window's "
                f"{len(strata.stratum_R):,} rows have none; set it to 1.0, or draw negatives"
            )
        counts_S = np.bincount(strata.stratum_R[among_R], minlength=len(strata.names))
        rate_S[negative_S] = keep_rates(counts_S[negative_S], rules.negative_keep_rate, rules.allocation)
    return rate_S


def _check_given(given: Mapping[str, float], strata: Strata) -> None:
    parts = {part for name in strata.names for part in name.split(", ")}
    kinds = [part.partition("=")[0] for part in strata.names[0].split(", ")] if strata.names else []
    for name in given:
        named = [part.partition("=")[0] for part in name.split(", ")]
        if strata.names and named != kinds:
            raise ConfigError(
                f"sampling.given_keep_rates names {name!r}, but strata here are made of {', '.join(kinds)}, such as "
                f"{strata.names[0]!r}; known parts are {', '.join(sorted(parts))}"
            )


def _shift(rules: Rules, strata: Strata, without_label: Strata, thinned: Thinned) -> F32:
    """`[R]` the shift of each row: by the rates of clicks and of others in its stratum without the label.

    Where a stratum has no negatives in this window, they would have been kept at `negative_keep_rate`.
    """
    x_of_S = np.zeros(len(strata.names), np.int64)
    x_of_S[strata.stratum_R] = without_label.stratum_R
    negative_S = _is_negative(strata)
    of_clicks_X = np.ones(len(without_label.names))
    of_others_X = np.full(len(without_label.names), 1.0 if rules.allocation == "given" else rules.negative_keep_rate)
    of_clicks_X[x_of_S[~negative_S]] = thinned.rate_S[~negative_S]
    of_others_X[x_of_S[negative_S]] = thinned.rate_S[negative_S]
    shift_R: F32 = logit_shift(of_clicks_X, of_others_X)[without_label.stratum_R]
    return shift_R


def _table(
    strata: Strata,
    capped_R: Bools,
    rate_S: npt.NDArray[np.float64],
    factor_R: F32,
    kept_R: Bools,
    correction: Correction,
    seed: tuple[int, ...],
) -> SamplingPlan:
    num_strata = len(strata.names)
    columns = (capped_R, kept_R, factor_R, np.square(factor_R, dtype=np.float64))
    capped_S, kept_S, sum_S, squares_S = (np.bincount(strata.stratum_R, c, minlength=num_strata) for c in columns)
    lines = zip(strata.names, strata.counts_S, capped_S, rate_S, kept_S, sum_S**2 / np.maximum(squares_S, 1e-300), strict=True)
    table = tuple(
        PlannedStratum(
            name=name,
            rows=int(rows),
            capped=int(capped),
            keep_rate=float(rate),
            kept=int(kept),
            effective_rows=float(effective),
        )
        for name, rows, capped, rate, kept, effective in lines
    )
    return SamplingPlan(strata=table, seed=seed, correction=correction, effective_rows=effective_rows(factor_R))
