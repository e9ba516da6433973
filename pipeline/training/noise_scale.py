"""The gradient noise scale: how many rows a batch needs before its gradient is more signal than noise.

Enters: squared norms of the gradients of a step's micro-batches, and of the whole step. Leaves: N = tr(S) / |G|^2, in rows
(McCandlish et al. 2018, *An Empirical Model of Large-Batch Training*, appendix A.1).

The gradients are those of the dense network alone: it is what the batch size averages. An embedding row meets few examples of a
batch, whatever its size.
"""

import math
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
    products_sum: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of noise and signal: the squares of either and their product, which tell how far the averages are to be believed."""
    measurements: int = 0
    last: float | None = None
    """N in rows; None until signal was measured. Kept while the signal's average is not positive."""
    at_least: float | None = None
    """N is this or more with 84 % probability (Fieller 1954, one standard error of a ratio of means); None as long as `last`
    is. |G|^2 is small and uncertain, so that a few measurements can make `last` ten times too large; this they cannot."""
    kept_last: int = 0
    """Measurements in a row after which the average of |G|^2 was not positive."""

    def add(self, spread: Spread | None) -> None:
        """Counts one step in."""
        if spread is None or not np.isfinite([spread.noise, spread.signal]).all():
            return
        self.measurements += 1
        self.noise_sum += (1 - self.decay) * (spread.noise - self.noise_sum)
        self.signal_sum += (1 - self.decay) * (spread.signal - self.signal_sum)
        products = (spread.noise**2, spread.signal**2, spread.noise * spread.signal)
        before = zip(self.products_sum, products, strict=True)
        self.products_sum = tuple(total + (1 - self.decay) * (product - total) for total, product in before)  # type: ignore[assignment]
        if self.signal_sum > 0 and self.noise_sum > 0:
            self.last, self.kept_last = self.noise_sum / self.signal_sum, 0
        else:
            self.kept_last += 1
        if self.last is not None:
            self.at_least = self._lower_limit()

    @property
    def averages(self) -> Spread:
        """De-biased; at least one measurement is needed."""
        assert self.measurements
        correction = 1 - self.decay**self.measurements
        return Spread(noise=self.noise_sum / correction, signal=self.signal_sum / correction)

    def _lower_limit(self) -> float | None:
        """The smaller root of `(s - N g)^2 = v_s - 2 N c + N^2 v_g`: averages s and g, squares of their standard errors v_s and
        v_g, and c of both together. A single measurement tells nothing of these, and no N fits a gradient that is surely 0."""
        left = self.decay**self.measurements
        squared_weights = (1 - self.decay) / (1 + self.decay) * (1 + left) / (1 - left)
        if self.measurements < 2 or squared_weights == 1:
            return 0.0
        share = squared_weights / (1 - squared_weights)
        noise, signal = self.averages.noise, self.averages.signal
        squares_s, squares_g, products = (total / (1 - left) for total in self.products_sum)
        v_s, v_g = (max(share * (squares - mean**2), 0.0) for squares, mean in ((squares_s, noise), (squares_g, signal)))
        middle = noise * signal - share * (products - noise * signal)
        first, last = signal**2 - v_g, noise**2 - v_s
        if last <= 0:
            return 0.0
        below = middle + math.sqrt(max(middle**2 - first * last, 0.0))
        return last / below if below > 0 else self.last

    def state(self) -> list[float]:
        """To continue from, bit for bit."""
        last, at_least = (float("nan") if value is None else value for value in (self.last, self.at_least))
        sums = [self.noise_sum, self.signal_sum, float(self.measurements)]
        return [*sums, last, float(self.kept_last), at_least, *self.products_sum]

    def load(self, state: Sequence[float]) -> None:
        """Goes on from `state`; one of five values tells nothing of the error, and is taken to have none."""
        self.noise_sum, self.signal_sum = float(state[0]), float(state[1])
        self.measurements, self.kept_last = int(state[2]), int(state[4])
        self.last = self.at_least = None if np.isnan(state[3]) else float(state[3])
        if len(state) > 5:
            self.at_least = None if np.isnan(state[5]) else float(state[5])
            self.products_sum = (float(state[6]), float(state[7]), float(state[8]))
        elif self.measurements:
            means, counted = self.averages, 1 - self.decay**self.measurements
            products = (means.noise**2, means.signal**2, means.noise * means.signal)
            self.products_sum = (products[0] * counted, products[1] * counted, products[2] * counted)
