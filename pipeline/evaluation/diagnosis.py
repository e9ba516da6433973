"""Is the learning rate too high, is the batch too small, or did the data move?

Enters: what single steps did to the loss on their own rows and on others, and how the window was predicted before it was
learned, beside the same hour of earlier days. Leaves: a verdict with its reason, or none where there is too little to judge by.

Three probes. The loss on the batch that a step learned, after the step: a gradient points downhill, so that a rise is a step
too long. The loss on rows that have not been learned yet: where it stands while that on the own batch falls, the step learned
the noise of its batch. The new window before learning: a jump is drift. An hour is compared with the same hour of earlier days
only: clicks follow the day.

The bounds were set on seeds 0 to 5 of `benchmarks/diagnosis.py`, and tested on others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["healthy", "learning_rate_too_high", "noise_limited", "drift"]
Part = Literal["dense", "sparse"]

SAME_RISE = 0.002
"""Nats by which a step too long raises the loss on its own rows, in the mean."""
OTHER_RISE = 0.01
"""Nats on rows not yet learned: no step that is short enough does such damage."""
NOISE_PER_ROW = 1e-5
"""Nats by which a step of a batch too small lowers the loss on its own rows, divided by their number."""
SIGNAL_SHARE = 0.1
"""Of the fall on the own rows, what others gain at most when the batch is too small."""
AUC_FALL = 0.025
"""Below the same hour of earlier days: drift."""
LOG_LOSS_JUMP = 0.1
"""Share of the log loss by which it rises above the same hour of earlier days: drift."""
ERRORS = 3.0
"""Standard errors by which either must be certain."""
LEAST_STEPS = 6
"""Dense steps that must be probed before the batch is judged."""
EARLIER_DAYS = 7
"""Days that an hour is compared with at most."""


@dataclass(frozen=True, kw_only=True)
class StepProbe:
    """One step: mean log loss in nats before and after it."""

    part: Part
    """A step of the dense network alone, or of the table rows alone."""
    rows: int
    """Rows that the step learned."""
    same_before: float
    """On rows that it learned."""
    same_after: float
    other_before: float
    """On rows that nothing was learned from yet."""
    other_after: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How well a window was predicted before it was learned."""

    hour: int
    """Start of the window, in hours since 1970."""
    log_loss: float
    log_loss_error: float
    """Standard errors."""
    auc: float | None
    auc_error: float | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong, if anything."""

    verdict: Verdict | None
    """None: too little to judge by."""
    reason: str
    """With the figures that decided."""


def diagnose(steps: Sequence[StepProbe], window: Prediction | None, earlier: Sequence[Prediction]) -> Diagnosis:
    """The first that applies: a rate too high ruins what the other probes see, and noise is no drift.

    Args:
        steps: probed along the pass.
        window: None where the window was not predicted.
        earlier: windows before it; those at the same hour of the day count.
    """
    reason = _rate_too_high(steps)
    if reason:
        return Diagnosis(verdict="learning_rate_too_high", reason=reason)
    reason = _noise_limited(steps)
    if reason:
        return Diagnosis(verdict="noise_limited", reason=reason)
    same_hour = same_hour_before(window, earlier) if window else []
    reason = _drifted(window, same_hour) if window and same_hour else ""
    if reason:
        return Diagnosis(verdict="drift", reason=reason)
    missing = []
    if sum(step.part == "dense" for step in steps) < LEAST_STEPS:
        missing.append(f"fewer than {LEAST_STEPS} steps were probed")
    if not same_hour:
        missing.append("the same hour of an earlier day was not predicted")
    return Diagnosis(verdict=None if missing else "healthy", reason="; ".join(missing))


def same_hour_before(window: Prediction, earlier: Sequence[Prediction]) -> list[Prediction]:
    """The windows at the same hour of at most `EARLIER_DAYS` days before, newest first."""
    days = {(window.hour - past.hour) // 24: past for past in earlier if (window.hour - past.hour) % 24 == 0}
    return [days[day] for day in sorted(days) if 1 <= day <= EARLIER_DAYS]


def _rate_too_high(steps: Sequence[StepProbe]) -> str:
    for part in ("dense", "sparse"):
        of_part = [step for step in steps if step.part == part]
        if not of_part:
            continue
        same = float(np.mean([step.same_after - step.same_before for step in of_part]))
        other = float(np.mean([step.other_after - step.other_before for step in of_part]))
        if same > SAME_RISE or other > OTHER_RISE or not math.isfinite(same + other):
            setting = "training.dense_learning_rate" if part == "dense" else "the sparse and wide learning rates"
            return (
                f"a {part} step changed the log loss by {same:+.4f} on its own rows and {other:+.4f} on rows not yet learned; "
                f"lower {setting}"
            )
    return ""


def _noise_limited(steps: Sequence[StepProbe]) -> str:
    dense = [step for step in steps if step.part == "dense"]
    if len(dense) < LEAST_STEPS:
        return ""
    same = float(np.mean([step.same_before - step.same_after for step in dense]))
    other = float(np.mean([step.other_before - step.other_after for step in dense]))
    rows = float(np.mean([step.rows for step in dense]))
    if same / rows <= NOISE_PER_ROW or other >= SIGNAL_SHARE * same:
        return ""
    return (
        f"a dense step of {rows:.0f} rows lowered the log loss by {same:.5f} on them and by {other:.5f} on others; raise "
        "training.batch_size or lower training.dense_learning_rate"
    )


def _drifted(window: Prediction, same_hour: Sequence[Prediction]) -> str:
    days = f"the same hour of {len(same_hour)} earlier day{'s' if len(same_hour) > 1 else ''}"
    with_auc = [(past.auc, past.auc_error) for past in same_hour if past.auc is not None and past.auc_error is not None]
    if window.auc is not None and window.auc_error is not None and with_auc:
        fall, error = _difference([(-window.auc, window.auc_error)], [(-auc, error) for auc, error in with_auc])
        if fall > AUC_FALL and fall > ERRORS * error:
            return f"before learning, AUC {window.auc:.4f} is {fall:.4f} ± {error:.4f} below {days}"
    now, past = (window.log_loss, window.log_loss_error), [(past.log_loss, past.log_loss_error) for past in same_hour]
    rise, error = _difference([now], past)
    if rise > LOG_LOSS_JUMP * (window.log_loss - rise) and rise > ERRORS * error:
        return f"before learning, log loss {window.log_loss:.4f} is {rise:.4f} ± {error:.4f} above {days}"
    return ""


def _difference(now: Sequence[tuple[float, float]], past: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Difference of the means, and its standard error; days that differ among themselves make it larger."""
    ((value, own_error),) = now
    values, errors = np.array(past).T
    between = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    of_mean = max(float((errors**2).mean()), between) / len(values)
    return float(value - values.mean()), math.sqrt(own_error**2 + max(between - float((errors**2).mean()), 0.0) + of_mean)
