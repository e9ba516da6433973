"""The gradient noise scale: how many rows a batch needs before its gradient is more signal than noise.

Enters: squared norms of the gradients of a step's micro-batches, and of the whole step. Leaves: N = tr(S) / |G|^2, in rows
(McCandlish et al. 2018, *An Empirical Model of Large-Batch Training*, appendix A.1).

The gradients are those of the dense network alone: it is what the batch size averages. An embedding row meets few examples of a
batch, whatever its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DECAY = 0.95
"""Of the averages, a measurement."""
MEASURE_EVERY = 16
"""Steps from one measurement to the next."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Unbiased estimates from one step."""

    noise: float
    """tr(S): the trace of the covariance of a single row's gradient."""
    signal: float
    """|G|^2; an unbiased estimate can come out negative."""


def spread_of(squared_norms_K: Sequence[float], rows_K: Sequence[int], squared_norm: float) -> Spread | None:
    """From the mean gradients of K micro-batches and their mean over all rows; None if there are fewer than two.

    With micro-batches of one size m these are the paper's `S = m K/(K-1) (mean|g_i|^2 - |g|^2)` and `|G|^2 = |g|^2 - S/b`;
    for sizes that differ, the mean is weighted by rows.

    >>> spread_of([3.0, 5.0], [10, 10], 2.0)
    Spread(noise=40.0, signal=0.0)

    Args:
        squared_norms_K: of the mean gradient of each micro-batch.
        rows_K: in each; those without rows are left out.
        squared_norm: of the mean gradient of all rows.
    """
    pairs = [(norm, rows) for norm, rows in zip(squared_norms_K, rows_K, strict=True) if rows]
    batch, count = sum(rows for _, rows in pairs), len(pairs)
    if count < 2:
        return None
    mean = sum(norm * rows for norm, rows in pairs) / batch
    noise = batch / (count - 1) * (mean - squared_norm)
    return Spread(noise=noise, signal=squared_norm - noise / batch)


def spread_at_fixed_weights(gradients_TP: npt.NDArray[np.float64], rows: int) -> Spread:
    """From T subsets of `rows` rows each, all at the same weights: `S = b T/(T-1) (mean|g|^2 - |mean g|^2)`,
    `|G|^2 = |mean g|^2 - S/(b T)`.

    Args:
        gradients_TP: mean gradient of each subset, over P parameters; T at least 2.
    """
    count = len(gradients_TP)
    if count < 2:
        raise ValueError(f"the spread of gradients needs at least 2 subsets, got {count}")
    spread = spread_of(
        [float(row @ row) for row in gradients_TP], [rows] * count, float(np.square(gradients_TP.mean(axis=0)).sum())
    )
    assert spread is not None
    return spread


@dataclass(kw_only=True)
class NoiseScale:
    """The ratio of two moving averages, which each start without bias (Kingma & Ba 2015, algorithm 1)."""

    decay: float = DECAY
    noise_sum: float = 0.0
    signal_sum: float = 0.0
    measurements: int = 0
    last: float | None = None
    """N in rows; None until signal was measured. Kept while the signal's average is not positive."""
    kept_last: int = 0
    """Measurements in a row after which the average of |G|^2 was not positive."""

    def add(self, spread: Spread | None) -> None:
        """Counts one step in."""
        if spread is None or not np.isfinite([spread.noise, spread.signal]).all():
            return
        self.measurements += 1
        self.noise_sum += (1 - self.decay) * (spread.noise - self.noise_sum)
        self.signal_sum += (1 - self.decay) * (spread.signal - self.signal_sum)
        if self.signal_sum > 0 and self.noise_sum > 0:
            self.last, self.kept_last = self.noise_sum / self.signal_sum, 0
        else:
            self.kept_last += 1

    @property
    def averages(self) -> Spread:
        """De-biased; at least one measurement is needed."""
        assert self.measurements
        correction = 1 - self.decay**self.measurements
        return Spread(noise=self.noise_sum / correction, signal=self.signal_sum / correction)

    def state(self) -> list[float]:
        """To continue from, bit for bit."""
        last = float("nan") if self.last is None else self.last
        return [self.noise_sum, self.signal_sum, float(self.measurements), last, float(self.kept_last)]

    def load(self, state: Sequence[float]) -> None:
        """Goes on from `state`."""
        self.noise_sum, self.signal_sum = float(state[0]), float(state[1])
        self.measurements, self.kept_last = int(state[2]), int(state[4])
        self.last = None if np.isnan(state[3]) else float(state[3])
