"""How steady learning is: along the steps of a window, from hour to hour, and in what is published.

Enters: the log loss of one fixed set of rows along the pass, gradient norms, the figures of this and of the last window, and
probabilities before and after learning. Leaves: `Stability`.

The loss of a step is no measure of it: at batches of 256 nearly all of its variance is which rows the batch has. A fixed set of
rows has the same rows at every step.

Letters: T points along the pass, R rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.diagnosis import Prediction
from pipeline.evaluation.metrics import Interval

F64 = npt.NDArray[np.float64]

SPIKE_DEVIATIONS = 5.0
"""A point is a spike when it lies above the median of its neighbours by so many robust standard deviations."""
NEIGHBOURS = 5
_Z = 1.959963984540054  # the normal's 97.5 % point


@dataclass(frozen=True, kw_only=True)
class Change:
    """From the window before to this one, with a 95 % interval that takes the rows of both as independent."""

    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Of one update; None where there was nothing to measure it by."""

    probe_points: int = 0
    """Steps at which the fixed rows were predicted."""
    probe_deviation: float | None = None
    """Standard deviation over steps of their log loss, its straight trend taken out; nats."""
    probe_spikes: int | None = None
    """Points far above their neighbours."""
    gradient_variation: float | None = None
    """Standard deviation over mean of the gradient norms of the probed steps."""
    auc_change: Change | None = None
    log_loss_change: Change | None = None
    churn: float | None = None
    """Mean absolute change of a published probability, on the same rows."""
    churn_p99: float | None = None
    """The change that one row in a hundred exceeds."""

    def as_dict(self) -> dict[str, float]:
        """Name to value, without what does not exist; the same names for every update."""
        flat: dict[str, float] = {"probe_points": float(self.probe_points)}
        for name in ("probe_deviation", "probe_spikes", "gradient_variation", "churn", "churn_p99"):
            value = getattr(self, name)
            if value is not None:
                flat[name] = float(value)
        for name in ("auc_change", "log_loss_change"):
            change: Change | None = getattr(self, name)
            if change is not None:
                flat |= {name: change.value, f"{name}_low": change.interval.low, f"{name}_high": change.interval.high}
        return flat


def stability(
    probe_log_losses: Sequence[float],
    gradient_norms: Sequence[float],
    window: Prediction | None,
    last: Prediction | None,
    probabilities_before: npt.ArrayLike | None = None,
    probabilities_after: npt.ArrayLike | None = None,
) -> Stability:
    """All measures of one update.

    Args:
        probe_log_losses: `[T]` of one fixed set of rows.
        gradient_norms: of steps.
        window: before it was learned.
        last: the window before, before it was learned.
        probabilities_before: of rows before the window was learned.
        probabilities_after: of the same rows after it; the shorter of both counts.
    """
    loss_T, norms_T = np.asarray(probe_log_losses, np.float64), np.asarray(gradient_norms, np.float64)
    moved_R = _moved(probabilities_before, probabilities_after)
    return Stability(
        probe_points=len(loss_T),
        probe_deviation=math.sqrt(variance_over_steps(loss_T)) if len(loss_T) > 2 else None,
        probe_spikes=spikes(loss_T) if len(loss_T) > 2 else None,
        gradient_variation=float(norms_T.std(ddof=1) / norms_T.mean()) if len(norms_T) > 1 and norms_T.mean() > 0 else None,
        auc_change=_auc_change(window, last),
        log_loss_change=_log_loss_change(window, last),
        churn=float(moved_R.mean()) if len(moved_R) else None,
        churn_p99=float(np.quantile(moved_R, 0.99)) if len(moved_R) else None,
    )


def variance_over_steps(log_loss_T: npt.ArrayLike) -> float:
    """Variance around the least-squares line: learning itself moves the loss, and is no unsteadiness.

    >>> variance_over_steps([3.0, 2.0, 1.0]), round(variance_over_steps([1.0, -1.0, -1.0, 1.0]), 9)
    (0.0, 2.0)

    Raises:
        ValueError: fewer than three points.
    """
    loss_T = np.asarray(log_loss_T, np.float64)
    if len(loss_T) < 3:
        raise ValueError(f"a variance around a line needs at least 3 points, got {len(loss_T)}")
    step_T = np.arange(len(loss_T)) - (len(loss_T) - 1) / 2
    slope = step_T @ loss_T / (step_T @ step_T)
    rest_T = loss_T - loss_T.mean() - slope * step_T
    return float(rest_T @ rest_T / (len(loss_T) - 2))


def spikes(log_loss_T: npt.ArrayLike) -> int:
    """Points that rise out of their neighbourhood.

    >>> spikes([0.5, 0.51, 0.5, 0.9, 0.49, 0.5, 0.5])
    1
    """
    loss_T = np.asarray(log_loss_T, np.float64)
    half = NEIGHBOURS // 2
    median_T = np.array([np.median(loss_T[max(place - half, 0) : place + half + 1]) for place in range(len(loss_T))])
    rest_T = loss_T - median_T
    moves_T = np.abs(np.diff(loss_T))
    deviation = 1.4826 * float(np.median(moves_T)) if len(moves_T) else 0.0
    return int((rest_T > SPIKE_DEVIATIONS * max(deviation, 1e-9)).sum())


def _auc_change(window: Prediction | None, last: Prediction | None) -> Change | None:
    if window is None or last is None:
        return None
    if window.auc is None or last.auc is None or window.auc_error is None or last.auc_error is None:
        return None
    return _change(window.auc - last.auc, math.hypot(window.auc_error, last.auc_error))


def _log_loss_change(window: Prediction | None, last: Prediction | None) -> Change | None:
    if window is None or last is None:
        return None
    return _change(window.log_loss - last.log_loss, math.hypot(window.log_loss_error, last.log_loss_error))


def _change(value: float, error: float) -> Change:
    return Change(value=value, interval=Interval(low=value - _Z * error, high=value + _Z * error))


def _moved(before: npt.ArrayLike | None, after: npt.ArrayLike | None) -> F64:
    if before is None or after is None:
        return np.empty(0)
    before_R, after_R = np.asarray(before, np.float64), np.asarray(after, np.float64)
    rows = min(len(before_R), len(after_R))
    return np.abs(after_R[:rows] - before_R[:rows])
