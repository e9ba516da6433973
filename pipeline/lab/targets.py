"""Steps to a target loss by batch size, each with its best learning rate, and the hyperbola that they are said to lie on.

    S = S_min + E_min / b, with E = b S rows: (S / S_min - 1) (E / E_min - 1) = 1    (McCandlish et al. 2018, eq. 2.11)

which is also K(b) = N_iter + C / b with N_iter = S_min and C = E_min.

Letters: W learning rates, T points in time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.lab.logistic import descend_many, logistic_rows, lowest, seeds_for, spaced
from pipeline.lab.problems import F64

LEAST_EXCESS = 0.1


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The fewest steps of a batch size to the target."""

    batch_size: int
    steps: float
    """Interpolated between points of the loss curve; infinite where no rate reaches the target."""
    learning_rate: float
    at_edge: bool
    """The best rate is the first or last that was tried, so that another may be better."""

    @property
    def rows(self) -> float:
        """E."""
        return self.batch_size * self.steps


@dataclass(frozen=True, kw_only=True)
class Hyperbola:
    """S = S_min + E_min / b."""

    least_steps: float
    """S_min."""
    least_rows: float
    """E_min."""

    @property
    def critical_batch(self) -> float:
        """E_min / S_min, where both cost twice their least."""
        return self.least_rows / self.least_steps

    def steps(self, batch_size: float) -> float:
        """S."""
        return self.least_steps + self.least_rows / batch_size


@lru_cache(maxsize=4)
def steps_to_target(
    *,
    num_rows: int,
    sizes: tuple[int, ...],
    share: float,
    rates: tuple[float, ...],
    seeds: int,
    most_rows: int,
    most_steps: int,
    seed: int = 0,
) -> tuple[tuple[Reached, ...], float]:
    """For each batch size; and the target loss.

    Args:
        share: of the way from the first loss to the least possible one, in (0, 1).
        rates: learning rates that are tried for every size.
        seeds: runs whose mean loss has to reach the target, fewer for large batches.
        most_rows: a run ends after so many rows, or `most_steps`, whichever is more steps.
    """
    rows = logistic_rows(num_rows, seed)
    first = float(rows.losses(rows.start_D[:, None])[0])
    target = first - share * (first - rows.least_loss())
    found = []
    for size in sizes:
        at_steps = spaced(max(most_rows // size, most_steps), 60)
        losses_TW = descend_many(
            rows, batch_size=size, rates_W=rates, at_steps=at_steps, seeds=seeds_for(size, seeds), seed=[seed, size]
        )
        steps_W = np.array([crossing(at_steps, losses_T, target) for losses_T in losses_TW.T])
        rate, log_steps = lowest(rates, np.log(steps_W))
        at_edge = int(np.argmin(steps_W)) in (0, len(rates) - 1)
        found.append(Reached(batch_size=size, steps=float(np.exp(log_steps)), learning_rate=rate, at_edge=at_edge))
    return tuple(found), target


def crossing(at_steps: Sequence[int], losses_T: F64, target: float) -> float:
    """Steps at which the loss first reaches the target, linear between points; infinite where it does not.

    >>> crossing([10, 20, 30], np.array([3.0, 2.0, 0.0]), 1.0)
    25.0
    """
    below = np.flatnonzero(losses_T <= target)
    if not len(below):
        return float("inf")
    place = int(below[0])
    if place == 0:
        return float(at_steps[0])
    before, after = losses_T[place - 1], losses_T[place]
    part = (before - target) / (before - after) if np.isfinite(before) else 1.0
    return float(at_steps[place - 1] + part * (at_steps[place] - at_steps[place - 1]))


def fitted(steps_by_size: Mapping[int, float]) -> Hyperbola:
    """Least squares of relative errors; both constants are at least a thousandth of their share.

    >>> fitted({1: 110.0, 10: 20.0, 100: 11.0})
    Hyperbola(least_steps=10.0, least_rows=100.0)
    """
    sizes, steps = (np.array(list(part), np.float64) for part in (steps_by_size.keys(), steps_by_size.values()))
    design = np.stack([np.ones_like(sizes), 1 / sizes], axis=1) / steps[:, None]
    least_steps, least_rows = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)[0]
    return Hyperbola(
        least_steps=round(max(float(least_steps), 1e-3 * float(steps.min())), 9),
        least_rows=round(max(float(least_rows), 1e-3 * float((steps * sizes).min())), 9),
    )


def log_r2(curve: Hyperbola, steps_by_size: Mapping[int, float], *, least_excess: float = LEAST_EXCESS) -> float:
    """R^2 of log(S / S_min - 1) as minus log(E / E_min - 1); NaN below three sizes.

    Over sizes for which the law puts either excess at `least_excess` or more: a smaller one is lost in the noise of S. Minus
    infinity where a measured excess is not above 0, and so has no logarithm.
    """
    pairs = [
        (steps / curve.least_steps - 1, size * steps / curve.least_rows - 1)
        for size, steps in steps_by_size.items()
        if least_excess <= size / curve.critical_batch <= 1 / least_excess
    ]
    if len(pairs) < 3:
        return float("nan")
    steps_excess, rows_excess = np.array(pairs).T
    if min(steps_excess.min(), rows_excess.min()) <= 0:
        return float("-inf")
    return r2(np.log(steps_excess), -np.log(rows_excess))


def log_rows_r2(curve: Hyperbola, steps_by_size: Mapping[int, float]) -> float:
    """R^2 of log E by batch size, over all sizes; that of log S is nearer to 1, since S spans more."""
    sizes = list(steps_by_size)
    measured = np.log([size * steps_by_size[size] for size in sizes])
    return r2(measured, np.log([size * curve.steps(size) for size in sizes]))


def r2(measured: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> float:
    """One less the share of the variance that is left.

    >>> r2(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    1.0
    """
    return float(1 - np.square(measured - predicted).sum() / np.square(measured - measured.mean()).sum())
