"""The history read back as reports, and its means."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from flows.history import after_first, mean_figures, reports_of
from pipeline.evaluation.metrics import Metrics, measure
from pipeline.outcome import UpdateReport
from pipeline.publishing.report import append_history

START = datetime(2026, 1, 1, tzinfo=UTC)


def metrics(rows: int, seed: int) -> Metrics:
    rng = np.random.default_rng(seed)
    return measure(rng.integers(0, 2, rows), rng.random(rows), rng.integers(0, 5, rows))


def report(hour: int, before: Metrics | None, frozen: Metrics | None = None) -> UpdateReport:
    return UpdateReport(
        dataset="synthetic",
        model_name="hourly",
        outcome="published",
        version=hour + 1,
        log_version=3,
        window_start=START + timedelta(hours=hour),
        window_end=START + timedelta(hours=hour + 1),
        rows=before.rows if before else 10,
        late_rows=0,
        rows_learned=10,
        rows_pending=0,
        batch_size=512,
        precision="fp32",
        before=before,
        after=None,
        frozen=frozen,
        evaluated_rows=10,
        seconds={"learn": 1.5},
        budget_seconds=60.0,
        plan=(),
        loss_curve=(),
        skipped_steps=0,
        git_commit="",
        notes=("one note",),
    )


def test_reports_come_back_as_they_were_written_in_order_of_time(tmp_path: Path) -> None:
    written = [report(0, None), report(1, metrics(50, 1), metrics(50, 2)), report(2, metrics(70, 3))]
    for one in (written[2], written[0], written[1]):
        append_history(tmp_path, one)
    assert reports_of(tmp_path) == written


def test_a_model_without_updates_has_no_reports(tmp_path: Path) -> None:
    assert reports_of(tmp_path / "absent") == []


def test_means_are_weighted_by_rows() -> None:
    small, large = metrics(40, 1), metrics(400, 2)
    assert small.auc is not None
    assert large.auc is not None
    means = mean_figures([report(0, None), report(1, small), report(2, large)], lambda one: one.before)
    assert means.auc == pytest.approx((40 * small.auc + 400 * large.auc) / 440)
    assert means.log_loss == pytest.approx((40 * small.log_loss + 400 * large.log_loss) / 440)


def test_a_window_of_one_class_counts_for_the_log_loss_alone() -> None:
    one_class = replace(metrics(40, 1), auc=None)
    means = mean_figures([report(0, one_class)], lambda one: one.before)
    assert means.auc is None
    assert means.log_loss == pytest.approx(one_class.log_loss)


def test_no_reports_have_no_means() -> None:
    means = mean_figures([], lambda one: one.before)
    assert (means.auc, means.log_loss) == (None, None)


def test_the_first_hours_are_left_out_by_time_not_by_count() -> None:
    reports = [report(hour, None) for hour in (0, 5, 23, 24, 30)]
    assert [one.window_start.hour for one in after_first(24, reports)] == [0, 6]
