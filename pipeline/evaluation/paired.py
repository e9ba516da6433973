"""Two models on the same held-out rows: how far apart they are, and how sure that is.

Enters: held-out rows with what champion and challenger predicted. Leaves: differences with intervals from a bootstrap that
resamples users, since rows of one user are not independent; and DeLong's interval, which takes them to be, to show how sure it
wrongly is.

Letters: H held-out rows, U users, S bootstrap samples, G groups of rows with equal score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtr, stdtrit  # of scipy.stats's laws, which take a second to import

from data_schemas.examples import F32, I64, U64
from data_schemas.hashing import MISSING, combine_hashes, mix64
from pipeline.evaluation.metrics import Interval, log_losses

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SAMPLES_AT_A_TIME = 32
LEAST_USERS = 2.0
"""Effective users of either class, below which nothing can be said of luck."""


def held_out(user_R: U64, *, share: float, salt: Sequence[int]) -> Mask:
    """`[R]` the rows of about `share` of the users, others with every salt; a row without a user is drawn by itself.

    Args:
        user_R: hashes of users.
        share: in [0, 1).
        salt: of the window; integers.
    """
    word = np.random.default_rng([*salt, 5]).integers(2**63, dtype=np.uint64)
    place_R = mix64(np.arange(len(user_R), dtype=np.uint64))
    key_R = combine_hashes(np.where(user_R == MISSING, place_R, user_R), np.broadcast_to(word, user_R.shape))
    chosen: Mask = key_R < np.uint64(share * 2.0**64)
    return chosen


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Held-out rows, predicted by both models before either learned them."""

    labels_H: F32
    champion_H: F32
    """Probabilities of the model that serves."""
    challenger_H: F32
    weights_H: F32
    """One over the inclusion probability."""
    user_H: U64

    def plus(self, other: "Paired | None") -> "Paired":
        """These rows, then the others."""
        if other is None:
            return self
        return Paired(**{name: np.concatenate([array, getattr(other, name)]) for name, array in vars(self).items()})

    def at_most(self, rows: int, seed: Sequence[int]) -> "Paired":
        """All, or those of so many users that they are about `rows`."""
        if len(self.labels_H) <= rows:
            return self
        chosen = held_out(self.user_H, share=rows / len(self.labels_H), salt=[*seed, 8])
        return Paired(**{name: array[chosen] for name, array in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was gathered since the champion was published, without being enough to decide."""

    pair: Paired
    windows: int
    """That were learned since."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps; unsigned words as `int64` of the same bits."""
        words = {name: array.view(np.int64) if array.dtype == np.uint64 else array for name, array in vars(self.pair).items()}
        return words | {"windows": np.array([self.windows])}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Evidence":
        """What `arrays()` gave."""
        kept = {field.name: arrays[field.name] for field in fields(Paired)}
        return cls(pair=Paired(**(kept | {"user_H": kept["user_H"].view(np.uint64)})), windows=int(arrays["windows"][0]))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Challenger less champion, oriented so that above 0 the challenger is better."""

    value: float
    error: float
    """Standard error over users."""
    freedom: float
    """Degrees of freedom: effective users who clicked, or who did not, whichever are fewer, less one; at least 1."""

    def interval(self, level: float = 0.95) -> Interval:
        """Student's, two-sided."""
        reach = float(stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return Interval(low=self.value - reach, high=self.value + reach)

    def chance_of_harm_by_luck(self) -> float:
        """One-sided p: how often two equal models would differ by so much to the challenger's disadvantage."""
        if self.error == 0:
            return 1.0 if self.value >= 0 else 0.0
        return float(stdtr(self.freedom, self.value / self.error))


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Between two models on the same rows. What does not exist is None."""

    auc: Difference | None
    """None without two users who clicked and two who did not."""
    log_loss: Difference | None
    """Of the mean log loss, relative to the champion's; above 0 the challenger's is lower. None in the same case."""
    delong: Interval | None
    """Of the AUC difference, 95 %, as if rows were independent."""
    num_users: int


def differences(pair: Paired, *, num_samples: int, seed: Sequence[int]) -> Differences:
    """The bootstrap of users (Field and Welsh 2007): whole users are drawn with replacement, here by Poisson(1) counts.

    With few users its percentiles are too narrow; so the standard error is taken from it, and the interval is Student's with
    the effective number of users, `(sum n)^2 / sum n^2` over the weights of their clicks or of their other rows, less one.

    Args:
        pair: H rows, at least one, all finite.
        num_samples: at least 2.
        seed: of the draws.
    """
    order = np.lexsort((pair.champion_H, pair.challenger_H, pair.labels_H, pair.user_H))
    pair = Paired(**{name: array[order] for name, array in vars(pair).items()})
    users = np.where(pair.user_H == MISSING, mix64(np.arange(len(order), dtype=np.uint64)), pair.user_H)
    _, user_H = np.unique(users, return_inverse=True)
    num_users = int(user_H.max()) + 1
    clicked = pair.labels_H > 0
    least = min(_effective(user_H[chosen], pair.weights_H[chosen]) for chosen in (clicked, ~clicked))
    if least < LEAST_USERS:
        delong = _delong(pair) if clicked.any() and not clicked.all() else None
        return Differences(auc=None, log_loss=None, delong=delong, num_users=num_users)
    freedom = least - 1
    ranked = [_Ranked.of(scores, pair.labels_H) for scores in (pair.champion_H, pair.challenger_H)]
    losses_H = [log_losses(clicked, scores) for scores in (pair.champion_H, pair.challenger_H)]
    weights_H = pair.weights_H.astype(np.float64)
    auc, log_loss = _both(ranked, losses_H, weights_H[None])
    aucs_S, log_losses_S, rng = [], [], np.random.default_rng([*seed, 6])
    for start in range(0, num_samples, SAMPLES_AT_A_TIME):
        counts_SU = rng.poisson(1.0, (min(SAMPLES_AT_A_TIME, num_samples - start), num_users))
        drawn = _both(ranked, losses_H, counts_SU[:, user_H] * weights_H)
        aucs_S.append(drawn[0])
        log_losses_S.append(drawn[1])
    return Differences(
        auc=_difference(float(auc[0]), np.concatenate(aucs_S), freedom),
        log_loss=_difference(float(log_loss[0]), np.concatenate(log_losses_S), freedom),
        delong=_delong(pair),
        num_users=num_users,
    )


def _effective(user_H: I64, weights_H: F32) -> float:
    """Users, those of many rows for more than those of few; 0 of no rows."""
    if not len(user_H):
        return 0.0
    rows_U = np.bincount(user_H, weights=weights_H)
    return float(rows_U.sum() ** 2 / (rows_U**2).sum())


@dataclass(frozen=True)
class _Ranked:
    """Rows in the order of their score, for weighted AUCs of many samples at a time."""

    order_H: I64
    starts_G: I64
    """First row, in that order, of each group of equal score."""
    clicked_H: Mask
    """In that order."""

    @classmethod
    def of(cls, scores_H: F32, labels_H: F32) -> "_Ranked":
        order_H = np.argsort(scores_H, kind="stable")
        sorted_H = scores_H[order_H]
        starts_G = np.flatnonzero(np.concatenate([[True], sorted_H[1:] != sorted_H[:-1]]))
        return cls(order_H, starts_G, labels_H[order_H] > 0)

    def aucs(self, weights_SH: F64) -> F64:
        """`[S]`; NaN for a sample without both classes."""
        sorted_SH = weights_SH[:, self.order_H]
        clicks_SG = np.add.reduceat(np.where(self.clicked_H, sorted_SH, 0.0), self.starts_G, axis=1)
        others_SG = np.add.reduceat(np.where(self.clicked_H, 0.0, sorted_SH), self.starts_G, axis=1)
        beaten_SG = np.cumsum(others_SG, axis=1) - others_SG / 2
        total_S = clicks_SG.sum(axis=1) * others_SG.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            aucs: F64 = np.where(total_S > 0, (clicks_SG * beaten_SG).sum(axis=1) / total_S, np.nan)
        return aucs


def _both(ranked: Sequence[_Ranked], losses_H: Sequence[F64], weights_SH: F64) -> tuple[F64, F64]:
    """`[S]` differences of AUC and of relative log loss."""
    champion, challenger = (each.aucs(weights_SH) for each in ranked)
    before, after = (weights_SH @ losses for losses in losses_H)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative: F64 = np.where(before > 0, 1 - after / before, np.nan)
    return challenger - champion, relative


def _difference(value: float, drawn_S: F64, freedom: float) -> Difference:
    drawn_S = drawn_S[np.isfinite(drawn_S)]
    error = float(drawn_S.std(ddof=1)) if len(drawn_S) > 1 else 0.0
    return Difference(value=value if np.isfinite(value) else 0.0, error=error, freedom=freedom)


def _delong(pair: Paired) -> Interval:
    """DeLong et al. 1988 for two correlated AUCs, by placement values; weights are left out."""
    clicked = pair.labels_H > 0
    of_clicks, of_others = [], []
    for scores in (pair.champion_H, pair.challenger_H):
        clicks, others = np.sort(scores[clicked]), np.sort(scores[~clicked])
        of_clicks.append(_placement(scores[clicked], others))
        of_others.append(1 - _placement(scores[~clicked], clicks))
    value = float(of_clicks[1].mean() - of_clicks[0].mean())
    variance = sum(
        float(np.var(challenger - champion, ddof=1)) / len(champion) if len(champion) > 1 else 0.0
        for champion, challenger in (of_clicks, of_others)
    )
    reach = float(ndtri(0.975)) * float(np.sqrt(variance))
    return Interval(low=value - reach, high=value + reach)


def _placement(scores: F32, others: F32) -> F64:
    """Share of `others`, sorted, that lie below each score; equal ones count half."""
    below, upto = np.searchsorted(others, scores, "left"), np.searchsorted(others, scores, "right")
    share: F64 = (below + upto) / (2 * len(others))
    return share
