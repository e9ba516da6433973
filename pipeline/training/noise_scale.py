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
LEAST_MEASUREMENTS = 8
"""Before which nothing is said about how large N is at most."""
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
    noise_squares_sum: float = 0.0
    signal_squares_sum: float = 0.0
    products_sum: float = 0.0
    """Of noise times signal; with the squares of both it tells how far the averages are to be believed."""
    measurable: bool = True
    """False where no step tells, or none of a small batch: the arithmetic or the shape of batches does not allow it."""
    measurements: int = 0
    last: float | None = None
    """N in rows; None until signal was measured. Kept while the signal's average is not positive."""
    at_least: float | None = None
    """N is this or more with 84 % probability (Fieller 1954, one standard error of a ratio of means); None as long as `last`
    is. |G|^2 is small and uncertain, so that a few measurements can make `last` ten times too large; this they cannot. Above
    `last` where that was kept from before, and the same where |G|^2 is measured to be below zero by more than its error."""
    kept_last: int = 0
    """Measurements in a row after which the average of |G|^2 was not positive."""

    def add(self, spread: Spread | None) -> None:
        """Counts one step in."""
        if spread is None or not np.isfinite([spread.noise, spread.signal]).all():
            return
        self.measurements += 1
        self.noise_sum += (1 - self.decay) * (spread.noise - self.noise_sum)
        self.signal_sum += (1 - self.decay) * (spread.signal - self.signal_sum)
        self.noise_squares_sum += (1 - self.decay) * (spread.noise**2 - self.noise_squares_sum)
        self.signal_squares_sum += (1 - self.decay) * (spread.signal**2 - self.signal_squares_sum)
        self.products_sum += (1 - self.decay) * (spread.noise * spread.signal - self.products_sum)
        if self.signal_sum > 0 and self.noise_sum > 0:
            self.last, self.kept_last = self.noise_sum / self.signal_sum, 0
        else:
            self.kept_last += 1
        if self.last is not None:
            self.at_least = self._lower_limit()

    @property
    def at_most(self) -> float:
        """N is this or less with 84 % probability, by the greater root; infinite where |G|^2 is not surely above zero, and as
        long as too few measurements tell of their own spread: with five of them it would hold in 79 % of cases."""
        parts = self._quadratic() if self.measurements >= LEAST_MEASUREMENTS else None
        if parts is None or self.signal_sum <= 0:
            return math.inf
        a, b, c = parts
        return (b + math.sqrt(max(b**2 - a * c, 0.0))) / a if a > 0 and b > 0 else math.inf

    def believed(self, expected: float) -> float:
        """What was expected of N, as far as the measurements allow it."""
        return min(max(expected, self.at_least or 0.0), self.at_most)

    @property
    def averages(self) -> Spread:
        """De-biased; at least one measurement is needed."""
        assert self.measurements
        correction = 1 - self.decay**self.measurements
        return Spread(noise=self.noise_sum / correction, signal=self.signal_sum / correction)

    def _lower_limit(self) -> float | None:
        """The smallest positive root; 0 while a single measurement has told nothing of the errors."""
        if (parts := self._quadratic()) is None:
            return 0.0
        a, b, c = parts
        if c <= 0:
            return 0.0
        divisor = b + math.sqrt(max(b**2 - a * c, 0.0))
        return c / divisor if divisor > 0 else self.last

    def _quadratic(self) -> tuple[float, float, float] | None:
        """a, b and c of `a N^2 - 2 b N + c = 0`, at whose roots `s - N g` is its standard error; None while that is not known.

        Of averages s and g with squared standard errors v_s and v_g, and v_sg of both, `a = g^2 - v_g`, `b = s g - v_sg` and
        `c = s^2 - v_s`.
        """
        if self.measurements < 2:
            return None
        left = self.decay**self.measurements
        squared_weights = (1 - self.decay) / (1 + self.decay) * (1 + left) / (1 - left)
        if squared_weights >= 1:
            return None
        share = squared_weights / (1 - squared_weights)
        s, g = self.averages.noise, self.averages.signal
        v_s = max(share * (self.noise_squares_sum / (1 - left) - s**2), 0.0)
        v_g = max(share * (self.signal_squares_sum / (1 - left) - g**2), 0.0)
        v_sg = share * (self.products_sum / (1 - left) - s * g)
        return g**2 - v_g, s * g - v_sg, s**2 - v_s

    def state(self) -> list[float]:
        """To continue from, bit for bit."""
        last, at_least = (float("nan") if value is None else value for value in (self.last, self.at_least))
        sums = [self.noise_sum, self.signal_sum, float(self.measurements)]
        products = [self.noise_squares_sum, self.signal_squares_sum, self.products_sum]
        return [*sums, last, float(self.kept_last), at_least, *products]

    def load(self, state: Sequence[float]) -> None:
        """Goes on from `state`. One of five values tells nothing of the errors: its estimate holds until there is another, and
        measuring starts anew."""
        self.last = None if np.isnan(state[3]) else float(state[3])
        if len(state) <= 5:
            self.at_least = self.last
            return
        self.noise_sum, self.signal_sum = float(state[0]), float(state[1])
        self.measurements, self.kept_last = int(state[2]), int(state[4])
        self.at_least = None if np.isnan(state[5]) else float(state[5])
        self.noise_squares_sum, self.signal_squares_sum, self.products_sum = map(float, state[6:9])
