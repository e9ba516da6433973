"""How good are these probabilities: ranking, likelihood and calibration, each with a 95 % interval.

Enter: labels, probabilities, users and weights of the same rows. Leave: `Metrics`, or the bins of a calibration plot.
A figure that does not exist, such as the AUC of rows without a click, is None: never 0, never NaN.

Rows of one user are not independent. The intervals here treat them as if they were, and are therefore too narrow: good
for a band in a plot, not for a decision; a decision needs a bootstrap clustered by user.

Letters: R rows, G groups of rows with equal probability, S segments (users), K calibration bins.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import gammaincinv

from data_schemas.examples import F32
from data_schemas.hashing import MISSING

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CALIBRATION_BINS = 15
LEAST_PROBABILITY = 1e-7
"""Probabilities are clipped to [1e-7, 1 - 1e-7] in the log loss, so that float32's 0 and 1 cost something finite."""

_Z = 1.959963984540054  # the normal's 97.5 % point


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % confidence interval, `low <= high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"an interval needs low <= high, got low = {self.low}, high = {self.high}")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The figures of one set of rows. Sums and means are weighted; `rows` and `clicks` are counts."""

    rows: int
    """Rows with a weight above 0."""
    clicks: int
    """Of them, rows with label 1."""
    auc: float | None
    """Chance that a click is ranked above a non-click, ties counting half; in [0, 1]. None without both classes."""
    auc_interval: Interval | None
    """DeLong's; None with fewer than two rows of a class, or at an AUC of 0 or 1, where DeLong's error is 0."""
    gauc: float | None
    """Mean AUC within a user, weighted by the user's impressions; None if no user has both classes."""
    gauc_users: int
    """Users that have both classes."""
    log_loss: float
    """Mean negative log likelihood in nats, at least 0."""
    log_loss_interval: Interval | None
    """Of the mean, normal; None for a single row."""
    normalised_entropy: float | None
    """Log loss over that of always predicting these rows' click rate: below 1 beats it. None without both classes."""
    copc: float | None
    """Clicks over predicted clicks: 1 is calibrated, above 1 predicts too few. None without a click."""
    copc_interval: Interval | None
    """Poisson in the number of clicks."""
    ece: float
    """Expected calibration error over 15 bins of equal mass; in [0, 1]. Noise alone makes it positive on few rows."""
    mean_probability: float

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Name to value, without what does not exist; an interval becomes `<name>_low` and `<name>_high`.

        >>> metrics = measure(np.array([0, 1]), np.array([0.2, 0.7]), np.array([1, 1]))
        >>> metrics.as_dict("before/")["before/auc"]
        1.0
        """
        flat: dict[str, float] = {}
        for field in fields(self):
            match getattr(self, field.name):
                case None:
                    continue
                case Interval(low=low, high=high):
                    name = field.name.removesuffix("_interval")
                    flat |= {f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
                case value:
                    flat[f"{prefix}{field.name}"] = float(value)
        return flat


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Rows of about the same predicted probability."""

    mean_probability: float
    click_rate: float
    rows: int
    weight: float
    """Share of the total weight, in (0, 1]."""


def measure(
    labels_R: npt.ArrayLike,
    probabilities_R: npt.ArrayLike,
    user_R: npt.ArrayLike,
    weights_R: npt.ArrayLike | None = None,
) -> Metrics:
    """All figures of R rows; 1 M rows take a fraction of a second.

    Args:
        labels_R: 0 or 1.
        probabilities_R: in [0, 1].
        user_R: ids of any type; rows of `hashing.MISSING` belong to no user and are left out of GAUC.
        weights_R: one over the inclusion probability, at least 0; None is 1 for every row.

    Raises:
        ValueError: no rows, unequal lengths, or a value out of range or not finite.
    """
    rows = _check(labels_R, probabilities_R, user_R, weights_R)
    clicks = int(np.count_nonzero(rows.clicked_R))
    both = 0 < clicks < len(rows.clicked_R)
    everyone = _group_ties(rows, np.zeros(len(rows.clicked_R), dtype=np.int64))
    auc, auc_interval = _auc(everyone) if both else (None, None)
    gauc, gauc_users = _gauc(rows) if both else (None, 0)
    log_loss, log_loss_interval = _log_loss(rows)
    copc, copc_interval = _copc(rows) if clicks else (None, None)
    return Metrics(
        rows=len(rows.clicked_R),
        clicks=clicks,
        auc=auc,
        auc_interval=auc_interval,
        gauc=gauc,
        gauc_users=gauc_users,
        log_loss=log_loss,
        log_loss_interval=log_loss_interval,
        normalised_entropy=log_loss / _entropy(rows) if both else None,
        copc=copc,
        copc_interval=copc_interval,
        ece=sum(bin.weight * abs(bin.mean_probability - bin.click_rate) for bin in _bins(everyone, CALIBRATION_BINS)),
        mean_probability=float(np.average(rows.probabilities_R, weights=rows.weights_R)),
    )


def calibration_bins(
    labels_R: npt.ArrayLike,
    probabilities_R: npt.ArrayLike,
    weights_R: npt.ArrayLike | None = None,
    *,
    num_bins: int = CALIBRATION_BINS,
) -> tuple[CalibrationBin, ...]:
    """At most `num_bins` bins of about equal mass in rising order of probability; equal probabilities share a bin.

    Raises:
        ValueError: as `measure`.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    rows = _check(labels_R, probabilities_R, None, weights_R)
    return _bins(_group_ties(rows, np.zeros(len(rows.clicked_R), dtype=np.int64)), num_bins)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    clicked_R: Bools
    probabilities_R: npt.NDArray[np.floating[Any]]
    weights_R: F64
    segment_R: I64
    """Code of the user, from 0; -1 for no user."""

    def take(self, kept_R: Bools) -> "_Rows":
        if kept_R.all():
            return self
        return _Rows(
            clicked_R=self.clicked_R[kept_R],
            probabilities_R=self.probabilities_R[kept_R],
            weights_R=self.weights_R[kept_R],
            segment_R=self.segment_R[kept_R],
        )


def _check(
    labels_R: npt.ArrayLike,
    probabilities_R: npt.ArrayLike,
    user_R: npt.ArrayLike | None,
    weights_R: npt.ArrayLike | None,
) -> _Rows:
    labels, probabilities = np.asarray(labels_R), np.asarray(probabilities_R)
    weights = np.ones(len(labels)) if weights_R is None else np.asarray(weights_R, dtype=np.float64)
    users = np.zeros(len(labels), dtype=np.int64) if user_R is None else np.asarray(user_R)
    shapes = [labels.shape, probabilities.shape, users.shape, weights.shape]
    if labels.ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(f"labels, probabilities, users and weights must be vectors of one length, got shapes {shapes}")
    clicked = labels == 1
    _refuse("labels must be 0 or 1", labels, ~(clicked | (labels == 0)))
    _refuse("probabilities must be in [0, 1]", probabilities, ~((probabilities >= 0) & (probabilities <= 1)))
    _refuse("weights must be 0 or in [1e-12, 1e12]", weights, ~((weights == 0) | (weights >= 1e-12) & (weights <= 1e12)))
    kept = weights > 0
    if not kept.any():
        raise ValueError(f"nothing to measure: {len(labels)} rows, none with a weight above 0; skip an empty window")
    if not np.issubdtype(probabilities.dtype, np.floating):
        probabilities = probabilities.astype(np.float64)
    return _Rows(clicked_R=clicked, probabilities_R=probabilities, weights_R=weights, segment_R=_codes(users)).take(kept)


def _refuse(rule: str, values_R: npt.NDArray[Any], wrong_R: Bools) -> None:
    if wrong_R.any():
        first, count = int(np.argmax(wrong_R)), int(np.count_nonzero(wrong_R))
        raise ValueError(f"{rule}, got {values_R[first]} in row {first}; {count} of {len(values_R)} rows are wrong")


def _codes(user_R: npt.NDArray[Any]) -> I64:
    codes_R = np.asarray(pd.factorize(user_R)[0], dtype=np.int64)
    if user_R.dtype == np.uint64:
        codes_R[user_R == MISSING] = -1
    return codes_R


@dataclass(frozen=True, kw_only=True)
class _Ties:
    """Groups of equal probability, rising inside a segment; segments one after the other."""

    probability_G: F64
    count_G: I64
    clicks_G: F64
    """Weight of the clicks."""
    others_G: F64
    """Weight of the rest."""
    clicks_squared_G: F64
    others_squared_G: F64
    """Sums of squared weights."""
    num_clicks: int
    num_others: int
    starts_S: I64
    """First group of each segment."""


def _group_ties(rows: _Rows, segment_R: I64) -> _Ties:
    order = np.argsort(rows.probabilities_R, kind="stable")
    one_segment = not segment_R.any()
    if not one_segment:
        order = order[np.argsort(segment_R[order], kind="stable")]
    probabilities_R, segments_R = rows.probabilities_R[order], segment_R[order]
    clicked_R, weights_R = rows.clicked_R[order], rows.weights_R[order]
    new_segment_R = np.concatenate([[True], segments_R[1:] != segments_R[:-1]])
    new_group_R = new_segment_R | np.concatenate([[True], probabilities_R[1:] != probabilities_R[:-1]])
    starts_G = np.flatnonzero(new_group_R)
    of_clicks_R = np.where(clicked_R, weights_R, 0.0)
    of_others_R = weights_R - of_clicks_R
    return _Ties(
        probability_G=probabilities_R[starts_G].astype(np.float64),
        count_G=np.diff(np.append(starts_G, len(order))),
        clicks_G=np.add.reduceat(of_clicks_R, starts_G),
        others_G=np.add.reduceat(of_others_R, starts_G),
        clicks_squared_G=np.add.reduceat(of_clicks_R**2, starts_G),
        others_squared_G=np.add.reduceat(of_others_R**2, starts_G),
        num_clicks=int(np.count_nonzero(clicked_R)),
        num_others=int(len(order) - np.count_nonzero(clicked_R)),
        starts_S=np.flatnonzero(new_segment_R[starts_G]),
    )


def _auc(ties: _Ties) -> tuple[float, Interval | None]:
    """The Mann-Whitney statistic, and its error from placement values.

    DeLong et al. 1988, in the sorted form of Sun and Xu 2014, "Fast Implementation of DeLong's Algorithm". With weights
    the variance of a weighted mean takes the place of S10 / m and S01 / n; with equal weights it is theirs.
    """
    total_clicks, total_others = ties.clicks_G.sum(), ties.others_G.sum()
    beaten_G = (np.cumsum(ties.others_G) - ties.others_G / 2) / total_others  # placement of a click in the group
    beating_G = 1 - (np.cumsum(ties.clicks_G) - ties.clicks_G / 2) / total_clicks  # placement of a non-click
    auc = float(np.clip(_dot(ties.clicks_G, beaten_G) / total_clicks, 0.0, 1.0))
    if ties.num_clicks < 2 or ties.num_others < 2 or auc in (0.0, 1.0):
        return auc, None
    m, n = ties.num_clicks, ties.num_others
    variance = m / (m - 1) * _dot(ties.clicks_squared_G, (beaten_G - auc) ** 2) / total_clicks**2
    variance += n / (n - 1) * _dot(ties.others_squared_G, (beating_G - auc) ** 2) / total_others**2
    return auc, _normal_interval(auc, float(np.sqrt(variance)), high=1.0)


def _gauc(rows: _Rows) -> tuple[float | None, int]:
    """Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising", equation 11."""
    known = rows.segment_R >= 0
    if not known.any():
        return None, 0
    rows = rows.take(known)
    ties = _group_ties(rows, rows.segment_R)
    groups_S = np.diff(np.append(ties.starts_S, len(ties.clicks_G)))
    clicks_S = np.add.reduceat(ties.clicks_G, ties.starts_S)
    others_S = np.add.reduceat(ties.others_G, ties.starts_S)
    both_S = (clicks_S > 0) & (others_S > 0)
    if not both_S.any():
        return None, 0
    # Each user's non-clicks sum to 1, so that the running sum over all users keeps its precision for the light ones.
    share_G = ties.others_G / np.repeat(np.where(others_S > 0, others_S, 1.0), groups_S)
    before_G = np.cumsum(share_G) - share_G
    beaten_G = before_G - np.repeat(before_G[ties.starts_S], groups_S) + share_G / 2
    auc_S = np.add.reduceat(ties.clicks_G * beaten_G, ties.starts_S)[both_S] / clicks_S[both_S]
    gauc = np.average(auc_S, weights=(clicks_S + others_S)[both_S])
    return float(np.clip(gauc, 0.0, 1.0)), int(np.count_nonzero(both_S))


def log_losses(clicked_R: npt.NDArray[np.bool_], probabilities_R: F32) -> npt.NDArray[np.float64]:
    """`[R]` log loss of each row; probabilities are kept `LEAST_PROBABILITY` away from 0 and 1."""
    right_R = np.where(clicked_R, probabilities_R, 1.0 - probabilities_R.astype(np.float64))
    losses_R: npt.NDArray[np.float64] = -np.log(np.clip(right_R, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY))
    return losses_R


def log_odds(
    probabilities_R: F32, within: tuple[float, float] = (LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
) -> npt.NDArray[np.float64]:
    """`[R]` log of p / (1 - p); probabilities beyond `within` are taken for its ends."""
    clipped_R = np.clip(probabilities_R.astype(np.float64), *within)
    odds_R: npt.NDArray[np.float64] = np.log(clipped_R / (1 - clipped_R))
    return odds_R


def _log_loss(rows: _Rows) -> tuple[float, Interval | None]:
    loss_R = log_losses(rows.clicked_R, rows.probabilities_R)
    total, num_rows = rows.weights_R.sum(), len(loss_R)
    mean = _dot(rows.weights_R, loss_R) / float(total)
    if num_rows < 2:
        return mean, None
    variance = num_rows / (num_rows - 1) * float(((rows.weights_R * (loss_R - mean)) ** 2).sum()) / total**2
    return mean, _normal_interval(mean, float(np.sqrt(variance)))


def _entropy(rows: _Rows) -> float:
    """Of the click rate of the rows: the denominator of normalised entropy (He et al. 2014, equation 1)."""
    clicks, others = rows.weights_R[rows.clicked_R].sum(), rows.weights_R[~rows.clicked_R].sum()
    shares = np.array([clicks, others]) / (clicks + others)
    return -_dot(shares, np.log(shares))


def _copc(rows: _Rows) -> tuple[float | None, Interval | None]:
    """Garwood's exact Poisson interval of the clicks; weighted clicks count as `(sum w)^2 / sum w^2` of them."""
    weights_C = rows.weights_R[rows.clicked_R]
    expected = _dot(rows.weights_R, rows.probabilities_R)
    if expected == 0:
        return None, None
    copc = float(weights_C.sum()) / expected
    effective_clicks = float(weights_C.sum() ** 2 / (weights_C**2).sum())
    low, high = gammaincinv(effective_clicks, 0.025), gammaincinv(effective_clicks + 1, 0.975)
    return copc, Interval(low=copc * float(low) / effective_clicks, high=copc * float(high) / effective_clicks)


def _bins(ties: _Ties, num_bins: int) -> tuple[CalibrationBin, ...]:
    weight_G = ties.clicks_G + ties.others_G
    middle_G = np.cumsum(weight_G) - weight_G / 2
    total = weight_G.sum()
    bin_of_G = np.minimum((num_bins * middle_G / total).astype(np.int64), num_bins - 1)
    starts_K = np.flatnonzero(np.concatenate([[True], bin_of_G[1:] != bin_of_G[:-1]]))
    weight_K = np.add.reduceat(weight_G, starts_K)
    probability_K = np.add.reduceat(weight_G * ties.probability_G, starts_K) / weight_K
    rate_K = np.add.reduceat(ties.clicks_G, starts_K) / weight_K
    count_K = np.add.reduceat(ties.count_G, starts_K)
    return tuple(
        CalibrationBin(mean_probability=float(p), click_rate=float(rate), rows=int(count), weight=float(weight / total))
        for p, rate, count, weight in zip(probability_K, rate_K, count_K, weight_K, strict=True)
    )


def _dot(left_R: npt.NDArray[np.floating[Any]], right_R: npt.NDArray[np.floating[Any]]) -> float:
    """Without BLAS, whose threads spin for a tenth of a second after a product, on cores that a window is learned with next."""
    return float((left_R * right_R).sum(dtype=np.float64))


def _normal_interval(mean: float, error: float, high: float = np.inf) -> Interval:
    return Interval(low=max(mean - _Z * error, 0.0), high=min(mean + _Z * error, high))
