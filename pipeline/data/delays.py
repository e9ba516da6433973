"""How long clicks take to come after their impressions, where they are events of their own.

Enters: the hours of impressions and of their clicks. Leaves: the share of all clicks of an impression that is known when it is
so many hours old.

Young impressions have had time for quick clicks only, so the delays that were seen are too short. The share is therefore built
backwards from the longest delay, each factor from the impressions that are old enough for it (Lagakos, Barraj and De Gruttola
1988, "Nonparametric analysis of truncated survival data, with application to AIDS"): F(a - 1) = F(a) * (1 - n_a / N_a), where
n_a clicks became known at age a, and N_a until then, of impressions that have reached this age.

Letters: C hours of impressions, A ages from 1 hour on; age a means: everything is known until a hours after the start of the
impression's hour.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_schemas.examples import F32, I64

F64 = npt.NDArray[np.float64]

KEPT_HOURS = 168
"""Impressions that clicks are counted of; older ones tell how it was."""
PRIOR_CLICKS = 4.0
"""Clicks that are assumed to have been seen before the first, half of them in each hour of those that are left."""
LEAST_LOG = -80.0
"""Logarithm that stands for nothing."""


@dataclass(frozen=True, kw_only=True)
class Delays:
    """Clicks by the hour of their impression and the age at which they became known."""

    hour_C: I64
    """Hours since the epoch, ascending."""
    clicks_CA: I64
    known_until: int = 0
    """Hour until which clicks are known."""

    @classmethod
    def nothing_seen(cls, ages: int) -> "Delays":
        """No click yet.

        Args:
            ages: A; at this age every click is known.
        """
        return cls(hour_C=np.empty(0, np.int64), clicks_CA=np.empty((0, ages), np.int64))

    @property
    def ages(self) -> int:
        """A."""
        return int(self.clicks_CA.shape[1])

    def known_shares(self) -> F64:
        """`[A + 1]` share of the clicks that is known at age 0, 1, ... A: from 0 to 1.

        >>> Delays.nothing_seen(2).known_shares().round(2)
        array([0.  , 0.67, 1.  ])
        """
        prior_A = PRIOR_CLICKS * 0.5 ** np.arange(1, self.ages + 1) / (1 - 0.5**self.ages)
        shares = np.zeros(self.ages + 1)
        shares[-1] = 1.0
        observed_C = self.known_until - self.hour_C
        for age in range(self.ages, 1, -1):
            clicks_A = self.clicks_CA[observed_C >= age, :age].sum(axis=0)
            became_known = clicks_A[-1] + prior_A[age - 1]
            shares[age - 1] = shares[age] * (1 - became_known / (clicks_A.sum() + prior_A[:age].sum()))
        return shares

    def log_unseen(self, hour_R: I64, known_until_R: I64 | int) -> F32:
        """`[R]` logarithm of the share of an impression's clicks that is not known at that hour; 0 before its own."""
        shares = self.known_shares()
        unseen_R = 1 - shares[np.clip(known_until_R - hour_R, 0, self.ages)]
        with np.errstate(divide="ignore"):
            logs: F32 = np.maximum(np.log(unseen_R), LEAST_LOG).astype(np.float32)
        return logs

    def after(self, hour_E: I64, age_E: I64, known_until: int) -> "Delays":
        """With further clicks counted.

        Args:
            hour_E: of their impressions.
            age_E: at which each became known, from 1; later ones than A count as A.
            known_until: hour until which clicks are known by now.
        """
        hour_C = np.union1d(self.hour_C, hour_E)
        hour_C = hour_C[hour_C >= known_until - KEPT_HOURS]
        clicks_CA = np.zeros((len(hour_C), self.ages), np.int64)
        old = np.isin(self.hour_C, hour_C)
        clicks_CA[np.searchsorted(hour_C, self.hour_C[old])] = self.clicks_CA[old]
        kept = np.isin(hour_E, hour_C)
        np.add.at(clicks_CA, (np.searchsorted(hour_C, hour_E[kept]), np.clip(age_E[kept], 1, self.ages) - 1), 1)
        return Delays(hour_C=hour_C, clicks_CA=clicks_CA, known_until=max(known_until, self.known_until))

    def arrays(self) -> dict[str, npt.NDArray[np.int64]]:
        """What a checkpoint keeps."""
        known_until = np.array([self.known_until])
        return {"delays/hours": self.hour_C, "delays/clicks": self.clicks_CA, "delays/known_until": known_until}

    @classmethod
    def load(cls, arrays: Mapping[str, npt.NDArray[np.int64]], ages: int) -> "Delays":
        """Goes on from what `arrays()` gave; starts again where the longest delay is another."""
        if "delays/clicks" not in arrays or arrays["delays/clicks"].shape[1] != ages:
            return cls.nothing_seen(ages)
        known_until = int(arrays["delays/known_until"][0])
        return cls(hour_C=arrays["delays/hours"], clicks_CA=arrays["delays/clicks"], known_until=known_until)
