"""A window as it is learned: the rows that the settings keep, with the weights and shifts that make up for the others.

Enters: a window's examples, encoded; the settings. Leaves: the window with other weights, which of its rows are learned, and
the plan. What entered stays as it is: it is evaluated and counted whole.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64, Examples
from models.memory import column_names
from pipeline.config import SamplingConfig
from pipeline.data.encode import EncodedWindow, joined
from sampling.counting import CountedIds
from sampling.minibatches import Bools
from sampling.plan import Columns, SamplingPlan, sample_rows
from sampling.strata import I32, StratifyBy


@dataclass(frozen=True, kw_only=True)
class SampledWindow:
    """What `learn` takes."""

    window: EncodedWindow
    stratum_R: I32 | None
    """That batches mirror; None where they need not."""
    kept_R: Bools | None
    """None: all rows are learned."""
    plan: SamplingPlan | None
    """None where the settings leave every row in and name no strata."""
    mean_weight: float | None = None
    """Of the window's own rows, where rows stand behind them whose weights make up for their small gradients; None: that of
    all."""


def sample_window(
    config: SamplingConfig, examples: Examples, window: EncodedWindow, spec: DatasetSpec, *, seed: tuple[int, ...]
) -> SampledWindow:
    """The same window, settings and seed give the same sample.

    Raises:
        ConfigError: the settings ask for what the window does not have.
    """
    rules = config.rules()
    if not (rules.strata or rules.leaves_rows_out) or not window.num_rows:
        return SampledWindow(window=window, stratum_R=None, kept_R=None, plan=None)
    sample = sample_rows(rules, columns_of(examples, window, spec, rules.strata), seed)
    if sample.factor_R is not None:
        shifts_R = _sum(window.logit_shifts_R, sample.shift_R)
        window = replace(window, weights_R=window.weights_R * sample.factor_R, logit_shifts_R=shifts_R)
    stratum_R = sample.strata.stratum_R if config.stratified_batches else None
    return SampledWindow(window=window, stratum_R=stratum_R, kept_R=sample.kept_R, plan=sample.plan)


def without_rows(sampled: SampledWindow, rows: I64) -> SampledWindow:
    """The same, without learning those."""
    if not len(rows):
        return sampled
    kept_R = np.ones(sampled.window.num_rows, bool) if sampled.kept_R is None else sampled.kept_R.copy()
    kept_R[rows] = False
    return replace(sampled, kept_R=kept_R)


def with_rows_behind(sampled: SampledWindow, past: EncodedWindow) -> SampledWindow:
    """Further rows behind the window's own, all to be learned; in a stratum of their own, where batches mirror strata."""
    stratum_R, kept_R, num_past = sampled.stratum_R, sampled.kept_R, past.num_rows
    if stratum_R is not None:
        stratum_R = np.concatenate([stratum_R, np.full(num_past, stratum_R.max() + 1, np.int32)])
    if kept_R is not None:
        kept_R = np.concatenate([kept_R, np.ones(num_past, bool)])
    return replace(sampled, window=joined(sampled.window, past), stratum_R=stratum_R, kept_R=kept_R)


def columns_of(examples: Examples, window: EncodedWindow, spec: DatasetSpec, by: Collection[StratifyBy]) -> Columns:
    """What the rules look at; popularity, activity and ages only where `by` names them."""
    users, items = CountedIds(examples.user_R), CountedIds(examples.item_R)
    return Columns(
        labels_R=np.minimum(examples.labels_R, 1),
        users=users,
        items=items,
        hour_R=examples.hour_R,
        popularity_R=items.occurrences_R if "item_popularity" in by and spec.item else None,
        age_hours_R=_age_hours(window, spec) if "item_age" in by else None,
        activity_R=users.occurrences_R if "user_activity" in by and spec.user else None,
    )


def _sum(drawn_R: F32 | None, thinned_R: F32 | None) -> F32 | None:
    """Shifts add up: each is the log of a ratio of probabilities."""
    if drawn_R is None or thinned_R is None:
        return thinned_R if drawn_R is None else drawn_R
    return drawn_R + thinned_R


def _age_hours(window: EncodedWindow, spec: DatasetSpec) -> F32 | None:
    """Hours since the item was first seen, 0 for a new one; None where the declaration has no such age."""
    names = [*(number.name for number in spec.numeric), *column_names(spec)]
    column = f"age({spec.item})"
    return np.expm1(window.raw_dense_NR[names.index(column)]) if column in names else None
