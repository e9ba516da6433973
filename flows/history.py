"""What a model has been through: the reports of its updates, and what they come to together.

Enters: a model's folder. Leaves: `UpdateReport`s in order of time, and means over many windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.evaluation.metrics import Metrics
from pipeline.outcome import UpdateReport
from pipeline.publishing.report import read_history

_REPORT = TypeAdapter(UpdateReport)


@dataclass(frozen=True, kw_only=True)
class MeanFigures:
    """Row-weighted means of the figures of several windows; None where no window has the figure."""

    auc: float | None
    log_loss: float | None


def reports_of(model_dir: Path) -> list[UpdateReport]:
    """Every update of the model, in order of its windows, without plans and loss curves, which the history leaves out."""
    left_out: dict[str, object] = {"plan": (), "loss_curve": ()}
    reports = [_REPORT.validate_python(left_out | record) for record in read_history(model_dir)]
    return sorted(reports, key=lambda report: (report.window_start, report.version))


def after_first(hours: float, reports: Sequence[UpdateReport]) -> list[UpdateReport]:
    """The reports of windows that start `hours` or more after the first one's start."""
    start = min((report.window_start for report in reports), default=None)
    return [report for report in reports if start and report.window_start >= start + timedelta(hours=hours)]


def mean_figures(reports: Sequence[UpdateReport], metrics_of: Callable[[UpdateReport], Metrics | None]) -> MeanFigures:
    """The means of `metrics_of` each report, weighted by rows."""
    measured = [metrics for report in reports if (metrics := metrics_of(report)) is not None]
    return MeanFigures(
        auc=_mean([(metrics.auc, metrics.rows) for metrics in measured if metrics.auc is not None]),
        log_loss=_mean([(metrics.log_loss, metrics.rows) for metrics in measured]),
    )


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    rows = sum(rows for _, rows in weighted)
    return sum(value * rows for value, rows in weighted) / rows if rows else None
