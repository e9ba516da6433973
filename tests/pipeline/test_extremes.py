"""Logs at the edge of what there is, through whole updates: a crawler, and clicks as rare as two in a thousand rows."""

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_schemas.dataset import load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.outcome import UpdateReport
from pipeline.update import run_update

TOML = """
name = "extreme"
user = "user"
item = "item"
event_key = ["event"]
ages = ["item"]
[time]
column = "time"
[label]
column = "label"
[[categorical]]
name = "user"
type = "integer"
capacity = 1024
[[categorical]]
name = "item"
type = "integer"
capacity = 1024
[[counters]]
over = ["item"]
[[counters]]
over = ["user", "item"]
half_lives_hours = [inf]
[history]
of = ["item"]
max_events_per_window = 100
attended_clicks = 2
"""
START = datetime(2026, 1, 1, tzinfo=UTC)
CRAWLER, CRAWLED = 7, 80_000


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    (tmp_path / "extreme.toml").write_text(TOML)
    (tmp_path / "landing").mkdir()
    places = [f"dataset={tmp_path / 'extreme.toml'}", f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}"]
    return load_config(overrides=[*places, "model.hidden=[8]", "training.precision='fp32'", "tracking.enabled=false"])


def _learn_hour(config: UpdateConfig, hour: int, user: np.ndarray, item: np.ndarray, clicked: np.ndarray) -> UpdateReport:
    columns = {
        "event": np.arange(len(user)) + hour * 1_000_000,
        "time": pa.array([START.replace(hour=hour)] * len(user), pa.timestamp("us", "UTC")),
        "label": clicked.astype(np.int8),
        "user": user,
        "item": item,
    }
    pq.write_table(pa.table(columns), f"{config.landing}/{hour:02d}.parquet")
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    report = run_update(config)
    assert report is not None
    assert report.rows == len(user)
    return report


def test_a_crawler_of_80_000_events_is_capped_where_it_is_asked_for_and_what_is_left_out_is_reported(
    config: UpdateConfig,
) -> None:
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_rows_per_user": 500})})
    rng = np.random.default_rng(1)
    others = np.repeat(np.arange(100, 200), 20)
    user = rng.permutation(np.concatenate([np.full(CRAWLED, CRAWLER), others]))
    clicked = np.where(user == CRAWLER, 1, rng.random(len(user)) < 0.3)
    report = _learn_hour(config, 0, user, rng.integers(0, 300, len(user)), clicked)
    assert report.rows_learned == 500 + len(others)
    notes = "\n".join(report.notes)
    assert "79,500 rows were over sampling.max_rows_per_user or max_rows_per_item" in notes
    assert f"{CRAWLED - 100:,} clicks of users with very many were left out of their histories" in notes


def test_two_clicks_in_a_thousand_rows_break_nothing(config: UpdateConfig) -> None:
    """As in TalkingData's log; one hour has no click at all, so that half of the figures of it do not exist."""
    rng, num_rows, rate = np.random.default_rng(2), 4_000, 0.002
    reports = []
    for hour in range(6):
        user, item = rng.integers(0, 500, num_rows), rng.integers(0, 300, num_rows)
        clicked = rng.random(num_rows) < (0.0 if hour == 3 else rate)
        reports.append(_learn_hour(config, hour, user, item, clicked))
    for report in reports:
        assert report.rows_learned == num_rows
        assert report.skipped_steps == 0
    for hour, report in enumerate(reports[1:], start=1):
        before = report.before
        assert before is not None
        assert (before.auc is None) == (before.copc is None) == (hour == 3)
        assert all(math.isfinite(value) for value in before.as_dict().values())
        assert rate / 4 < before.mean_probability < rate * 4, "neither zero nor carried away"
        constant = -(before.clicks * math.log(rate) + (before.rows - before.clicks) * math.log1p(-rate)) / before.rows
        assert before.log_loss < constant + 0.005
