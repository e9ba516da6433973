"""Every plot draws from what an update leaves behind, and says nothing where there is nothing to show."""

import struct
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.evaluation.metrics import calibration_bins
from pipeline.outcome import LossPoint, PlanRecord
from pipeline.publishing import plots

PLAN = (
    PlanRecord(step=0, position=0, batch_size=256, learning_rate=0.001, reason="start"),
    PlanRecord(step=9, position=2304, batch_size=1024, learning_rate=0.002, reason="behind"),
)
CURVE = tuple(LossPoint(rows=64 * k, seconds=0.1 * k, log_loss=0.5 - 0.001 * k) for k in range(1, 40))


def entry(hour: int, auc: float | None = 0.7, frozen: float | None = 0.65) -> dict[str, Any]:
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour)
    interval = None if auc is None else {"low": auc - 0.02, "high": auc + 0.02}
    return {
        "window_start": start.isoformat(),
        "window_end": (start + timedelta(hours=1)).isoformat(),
        "rows": 1000,
        "before": {"auc": auc, "auc_interval": interval},
        "frozen": None if frozen is None else {"auc": frozen},
    }


def size_of(png: bytes | None) -> tuple[int, int]:
    assert png is not None
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("num_hours", [2, 3, 4, 5, 7, 24, 30, 60, 168, 24 * 60])
def test_auc_by_hour_draws_any_span(num_hours: int) -> None:
    assert size_of(plots.auc_by_hour([entry(hour) for hour in range(num_hours)])) == (1080, 645)


def test_auc_by_hour_draws_gaps_and_a_model_that_was_never_frozen() -> None:
    hours = [entry(0, frozen=None), entry(1, auc=None), entry(2, frozen=None)]
    assert size_of(plots.auc_by_hour(hours))
    assert size_of(plots.auc_by_hour([entry(0, frozen=None), entry(1, frozen=None), entry(2)]))


@pytest.mark.parametrize("history", [[], [entry(0)], [entry(0, auc=None), entry(1, auc=None)]])
def test_auc_by_hour_needs_two_hours(history: list[dict[str, Any]]) -> None:
    assert plots.auc_by_hour(history) is None


def test_the_title_states_the_mean_gain() -> None:
    assert "gains 0.050 AUC" in plots._auc_title([entry(0), entry(1)])
    assert "loses 0.010 AUC" in plots._auc_title([entry(0, auc=0.64)])
    assert "before they are learned" in plots._auc_title([entry(0, frozen=None)])


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    figure, axes = plots._figure("title", "AUC", "hour")
    axes.set_ylim(0, 1)
    plots._name_line_ends(axes, datetime(2026, 1, 1, tzinfo=UTC), {"a": ([0.5], "k"), "b": ([0.501], "k")})
    heights = sorted(text.xy[1] for text in axes.texts)
    assert heights[1] - heights[0] >= 0.13
    del figure


def test_loss_curve_and_plan_draw() -> None:
    assert size_of(plots.loss_curve(CURVE))
    assert size_of(plots.batch_and_rate(PLAN, rows=4000))
    assert size_of(plots.batch_and_rate(PLAN[:1], rows=0))
    assert plots.loss_curve(CURVE[:1]) is None
    assert plots.batch_and_rate((), rows=4000) is None


def test_calibration_draws_rare_and_constant_probabilities() -> None:
    rng = np.random.default_rng(0)
    rare = rng.random(5000) * 0.002
    assert size_of(plots.calibration(calibration_bins(rng.random(5000) < rare, rare)))
    assert size_of(plots.calibration(calibration_bins([0, 0], [0.0, 0.0])))
    assert plots.calibration(()) is None


@pytest.mark.parametrize(("clicks", "rows"), [(0, 10), (3, 10), (10, 10), (40, 1000)])
def test_bars_are_wilson_intervals(clicks: int, rows: int) -> None:
    low, high = plots._wilson(np.array([clicks / rows]), np.array([float(rows)]))
    expected = binomtest(clicks, rows).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (999, "999"), (1500, "1.5k"), (2_000_000, "2M")])
def test_counts_are_short(count: float, text: str) -> None:
    assert plots.short_count(count) == text


def test_the_same_input_draws_the_same_bytes() -> None:
    assert plots.loss_curve(CURVE) == plots.loss_curve(CURVE)
