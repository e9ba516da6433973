"""The stability and the diagnosis of one update, from what its stages left and from the model's history.

Enters: probes of the pass, scores before and after it, and the lines of the history. Leaves: `Stability` and `Diagnosis`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from data_schemas.examples import F32
from pipeline.evaluation.diagnosis import Diagnosis, Prediction, StepProbe, diagnose
from pipeline.evaluation.metrics import Metrics
from pipeline.evaluation.stability import Stability, stability

_Z = 1.959963984540054  # the normal's 97.5 % point


def judge_steadiness(
    steps: Sequence[StepProbe],
    probe_log_losses: Sequence[float],
    gradient_norms: Sequence[float],
    *,
    hour: int,
    before: Metrics | None,
    probabilities: tuple[F32, F32] | None,
    history: Sequence[Mapping[str, Any]],
) -> tuple[Stability, Diagnosis]:
    """Both, as far as there is something to judge by.

    Args:
        steps: probed along the pass.
        probe_log_losses: of one fixed set of rows along the pass.
        gradient_norms: of the probed steps.
        hour: start of the window, in hours since 1970.
        before: of the window before it was learned.
        probabilities: of the same rows before and after learning.
        history: lines of earlier updates, oldest first; those of windows at or after this one are left out.
    """
    window = _prediction(hour, asdict(before)) if before else None
    earlier = [past for entry in history if (past := _past(entry)) is not None and past.hour < hour]
    last = max(earlier, key=lambda past: past.hour, default=None)
    figures = stability(probe_log_losses, gradient_norms, window, last, *(probabilities or (None, None)))
    return figures, diagnose(steps, window, earlier)


def _past(entry: Mapping[str, Any]) -> Prediction | None:
    """None for an update whose window was not predicted."""
    if not entry.get("before"):
        return None
    start = datetime.fromisoformat(entry["window_start"]).timestamp()
    return _prediction(int(start // 3600), entry["before"])


def _prediction(hour: int, metrics: Mapping[str, Any]) -> Prediction:
    return Prediction(
        hour=hour,
        log_loss=metrics["log_loss"],
        log_loss_error=_error(metrics.get("log_loss_interval")) or 0.0,
        auc=metrics.get("auc"),
        auc_error=_error(metrics.get("auc_interval")),
    )


def _error(interval: Mapping[str, float] | None) -> float | None:
    """The standard error of a normal interval."""
    return None if interval is None else (interval["high"] - interval["low"]) / (2 * _Z)
