"""Running normalisation of numeric features: mean and variance up to the window's start, and a missing flag.

Enters: `[N, R]` raw numbers, NaN for missing. Leaves: dense columns by row, values first, then flags.

Letters: N features, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import Numeric
from data_schemas.examples import F32

F64 = npt.NDArray[np.float64]

CLIP = 5.0
"""Normalised values are cut to [-5, 5], so that one absurd number cannot throw a step."""


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of each numeric feature, after its transform."""

    count_N: F64
    mean_N: F64
    deviations_N: F64
    """Sum of squared distances from the mean."""

    @staticmethod
    def nothing_seen(num_features: int) -> "RunningMoments":
        """Of no rows: values pass through as they are."""
        return RunningMoments(
            count_N=np.zeros(num_features), mean_N=np.zeros(num_features), deviations_N=np.zeros(num_features)
        )

    def after(self, values_NR: F32) -> "RunningMoments":
        """With more rows counted in; missing values count nothing.

        Chan, Golub & LeVeque 1979: pairwise merging, exact up to rounding whatever the order of the windows.
        """
        counted = [_moments(values_R[~np.isnan(values_R)].astype(np.float64)) for values_R in values_NR]
        count_N, mean_N, deviations_N = np.array(counted, np.float64).reshape(-1, 3).T
        total_N = np.maximum(self.count_N + count_N, 1)
        shift_N = mean_N - self.mean_N
        return RunningMoments(
            count_N=self.count_N + count_N,
            mean_N=self.mean_N + shift_N * count_N / total_N,
            deviations_N=self.deviations_N + deviations_N + shift_N**2 * self.count_N * count_N / total_N,
        )

    def scale_N(self) -> F64:
        """The standard deviation; 1 where it is not known or zero."""
        variance_N = self.deviations_N / np.maximum(self.count_N, 1)
        return np.where(variance_N > 1e-12, np.sqrt(variance_N), 1.0)


def transform(features: Sequence[Numeric], numeric_NR: F32) -> F32:
    """Each feature's declared transform, applied to raw numbers `[N, R]`."""
    rows = [_log1p(row) if feature.transform == "log1p" else row for feature, row in zip(features, numeric_NR, strict=True)]
    return np.stack(rows) if rows else numeric_NR


def normalise(transformed_NR: F32, moments: RunningMoments, *, num_flags: int) -> F32:
    """Dense columns `[R, N + num_flags]`: normalised and clipped values with 0 for missing, then flags of 1 for missing.

    Args:
        num_flags: of the first so many columns it is flagged which values are missing; the others have none missing.
    """
    num_features, num_rows = transformed_NR.shape
    dense_RN = np.empty((num_rows, num_features + num_flags), np.float32)
    for feature, (values_R, mean, scale) in enumerate(zip(transformed_NR, moments.mean_N, moments.scale_N(), strict=True)):
        scaled_R = np.clip((values_R.astype(np.float64) - mean) / scale, -CLIP, CLIP)
        missing_R = np.isnan(values_R)
        dense_RN[:, feature] = np.where(missing_R, 0.0, scaled_R)
        if feature < num_flags:
            dense_RN[:, num_features + feature] = missing_R
    return dense_RN


def _moments(values: F64) -> tuple[float, float, float]:
    """Count, mean and sum of squared deviations; zeros for no values."""
    mean = float(values.mean()) if len(values) else 0.0
    return len(values), mean, float(np.square(values - mean).sum())


def _log1p(values: F32) -> F32:
    return (np.sign(values) * np.log1p(np.abs(values))).astype(np.float32)
