"""What a few runs with different seeds say: means with intervals, paired differences, and p-values for many at once.

Enters: one figure a seed. Leaves: `Estimate`s and adjusted p-values. All intervals are 95 % and two-sided, by Student's t,
which takes the figures of different seeds as independent and about normal.

Letters: S seeds, K comparisons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and its 95 % interval, `low <= mean <= high`."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much the figures of one strategy lie above those of another, seed by seed."""

    estimate: Estimate
    p_value: float
    """Two-sided, of the paired t-test (Student 1908): the chance of a difference at least this large if there were none."""


def mean_with_interval(values_S: npt.ArrayLike) -> Estimate:
    """Mean of S values and the interval `mean +- t * s / sqrt(S)`.

    >>> mean_with_interval([1.0, 2.0, 3.0]).mean
    2.0

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    values = _checked(values_S)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def paired_difference(values_S: npt.ArrayLike, reference_S: npt.ArrayLike) -> PairedDifference:
    """Of `values_S` less `reference_S`, which belong to the same seeds in the same order.

    The same seed gives both the same first weights and order of rows, so that their common luck cancels. Where all differences
    are equal there is no spread to judge by: the p-value is 1 for zero, else 0.

    Raises:
        ValueError: unequal lengths, fewer than two seeds, or a value that is not finite.
    """
    values, reference = _checked(values_S), _checked(reference_S)
    if len(values) != len(reference):
        raise ValueError(f"paired figures need the same seeds, got {len(values)} and {len(reference)} values")
    difference_S = values - reference
    estimate = mean_with_interval(difference_S)
    if estimate.half_width == 0:
        return PairedDifference(estimate=estimate, p_value=float(estimate.mean == 0))
    t = estimate.mean / (float(difference_S.std(ddof=1)) / math.sqrt(len(values)))
    return PairedDifference(estimate=estimate, p_value=float(2 * stats.t.sf(abs(t), len(values) - 1)))


def holm(p_values_K: Sequence[float]) -> tuple[float, ...]:
    """The p-values of K comparisons, adjusted so that the chance of any false alarm among them is the level that one asks.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure": the k-th smallest (from 0) times K - k, never below a
    smaller one's, at most 1.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)

    Raises:
        ValueError: a value outside [0, 1].
    """
    p_values = np.asarray(p_values_K, dtype=np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values must be in [0, 1], got {list(p_values_K)}")
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * (len(p_values) - np.arange(len(p_values))))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return tuple(adjusted.tolist())


def _checked(values_S: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(values_S, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs the figures of at least 2 seeds, got {np.size(values)}")
    if not np.isfinite(values).all():
        raise ValueError(f"figures must be finite, got {values.tolist()}")
    return values
