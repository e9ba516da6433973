"""Alarms before learning: against bounds computed by hand, and through whole updates."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.dataset import Counter, DatasetSpec, load_spec
from data_schemas.examples import Examples, concatenate
from data_schemas.hashing import MISSING
from models.memory import Memory
from pipeline.config import UpdateConfig, load_config
from pipeline.data.held import decide, held_windows
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.evaluation.alarms import Alarm, Past, alarms_of, past_of
from pipeline.evaluation.profile import WindowProfile, profile_of
from pipeline.outcome import LEARNED, UpdateReport
from pipeline.publishing.report import as_plain, read_history
from pipeline.update import run_update

ORDINARY = WindowProfile(
    rows=1000,
    clicks=100,
    missing={"price": 0.1},
    quantiles={"price": (1.0, 2.0, 3.0)},
    new={"item": 0.2},
    user_excess=2.0,
)
WEEK = [Past(hour=hour, profile=ORDINARY) for hour in range(168)]


def raised(profile: WindowProfile, past: list[Past] = WEEK, *, hour: int = 168, min_windows: int = 24) -> tuple[Alarm, ...]:
    return alarms_of(profile, hour, past, deviations=6, burst_factor=1.5, min_windows=min_windows)


@pytest.mark.parametrize(
    ("changed", "figure"),
    [
        ({"rows": 3001, "clicks": 300}, "rows"),
        ({"rows": 332, "clicks": 33}, "rows"),
        ({"clicks": 190}, "click rate"),
        ({"clicks": 50}, "click rate"),
        ({"missing": {"price": 0.31}}, "missing price"),
        ({"quantiles": {"price": (1.0, 5.1, 9.0)}}, "median price"),
        ({"quantiles": {"price": (-3.0, -1.1, 0.0)}}, "median price"),
        ({"new": {"item": 0.41}}, "new item"),
        ({"user_excess": 4.1}, "clicks of ten users, in standard errors"),
    ],
)
def test_what_lies_beyond_its_bounds_raises_the_alarm_of_its_figure(changed: dict[str, object], figure: str) -> None:
    (alarm,) = raised(replace(ORDINARY, **changed))
    assert alarm.figure == figure
    assert figure in alarm.sentence


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 2999, "clicks": 300},
        {"rows": 334, "clicks": 33},
        {"clicks": 180},
        {"missing": {"price": 0.29}},
        {"missing": {"price": 0.0}},
        {"quantiles": {"price": (1.0, 4.9, 9.0)}},
        {"quantiles": {}},
        {"new": {"item": 0.39}},
        {"new": {"item": 0.0}},
        {"user_excess": 3.9},
    ],
)
def test_what_lies_within_its_bounds_raises_none(changed: dict[str, object]) -> None:
    assert raised(replace(ORDINARY, **changed)) == ()


def test_nothing_is_out_of_line_before_enough_windows_are_known() -> None:
    wrong = replace(ORDINARY, rows=1, clicks=1)
    assert raised(wrong, WEEK[-23:]) == ()
    assert raised(wrong, WEEK[-24:]) != ()
    assert raised(wrong, WEEK, hour=168 + 168) == (), "a week later, all of them are too old"


def test_rows_follow_the_hour_of_the_day() -> None:
    night = [
        Past(hour=hour, profile=replace(ORDINARY, rows=50, clicks=5) if hour % 24 < 6 else ORDINARY) for hour in range(168)
    ]
    assert raised(replace(ORDINARY, rows=50, clicks=5), night, hour=168 + 3) == ()
    assert [alarm.figure for alarm in raised(replace(ORDINARY, rows=50, clicks=5), night, hour=168 + 12)] == ["rows"]


@given(st.lists(st.integers(1, 10**6), min_size=24, max_size=60), st.integers(0, 10**7))
@settings(max_examples=50, deadline=None)
def test_the_bounds_of_rows_are_those_of_the_median_and_its_absolute_deviation(seen: list[int], rows: int) -> None:
    past = [Past(hour=168 + place // 24, profile=replace(ORDINARY, rows=count, clicks=0)) for place, count in enumerate(seen)]
    logs = np.log(seen)
    median = np.median(logs)
    step = max(math.log(3), 6 * 1.4826 * np.median(np.abs(logs - median)))
    outside = abs(math.log(max(rows, 1)) - median) > step
    figures = [alarm.figure for alarm in raised(replace(ORDINARY, rows=rows, clicks=0), past, hour=168 + 12)]
    assert ("rows" in figures) == outside


def test_a_profile_counts_what_a_loop_over_the_rows_counts(
    small_spec: DatasetSpec, small_examples: Callable[..., Examples]
) -> None:
    examples = small_examples(500)
    examples.single_ids["item"][::5] = MISSING
    memory = Memory(small_spec.model_copy(update={"counters": (Counter(over=("item",), half_lives_hours=(1.0,)),)}))
    known = examples.take(np.arange(100))
    memory.add(known, 0)
    profile = profile_of(examples, small_spec, memory)
    assert (profile.rows, profile.clicks) == (500, int(examples.labels_R.sum()))
    assert profile.missing["item"] == pytest.approx(0.2)
    prices = examples.numeric_NR[0]
    assert profile.missing["price"] == pytest.approx(np.isnan(prices).mean())
    assert profile.quantiles["price"] == pytest.approx(np.nanquantile(prices, [0.05, 0.5, 0.95]), rel=1e-6)
    seen = set(known.single_ids["item"].tolist())
    new = [item != MISSING and item not in seen for item in examples.single_ids["item"].tolist()]
    assert profile.new == {"item": pytest.approx(np.mean(new))}


def test_ten_users_with_twenty_times_their_clicks_stand_out(
    small_spec: DatasetSpec, small_examples: Callable[..., Examples]
) -> None:
    examples, memory = small_examples(4000), Memory(small_spec)
    users = np.unique(examples.user_R)[:10]
    theirs = np.flatnonzero(np.isin(examples.user_R, users) & (examples.labels_R > 0))
    burst = concatenate([examples, examples.take(np.repeat(theirs, 19))])
    before, after = (profile_of(rows, small_spec, memory).user_excess for rows in (examples, burst))
    rate = burst.labels_R.mean()
    by_hand = []
    for user in np.unique(burst.user_R):
        clicks = burst.labels_R[burst.user_R == user]
        by_hand.append((clicks.sum() - rate * len(clicks)) / math.sqrt(rate * (1 - rate) * len(clicks) + 1))
    assert after == pytest.approx(np.mean(sorted(by_hand)[-10:]), rel=1e-5)
    assert after > 2 * before


TOML = """
name = "tiny"
user = "user"
event_key = ["event_id"]
[time]
column = "time"
[label]
column = "label"
[[categorical]]
name = "user"
type = "integer"
capacity = 64
embedding_dim = 4
"""


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    (tmp_path / "tiny.toml").write_text(TOML)
    (tmp_path / "landing").mkdir()
    places = [f"dataset={tmp_path / 'tiny.toml'}", f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}"]
    own = ["model.hidden=[4]", "model.interaction_dim=4", "training.precision='fp32'", "training.batch_size=64"]
    alarms = ["training.micro_batch_size=64", "tracking.enabled=false", "alarms.min_windows=2"]
    config = load_config(overrides=[*places, *own, *alarms])
    for hour in range(4):
        write_hour(config, hour, label=1 if hour == 2 else None)
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    return config


def write_hour(config: UpdateConfig, hour: int, *, label: int | None = None) -> None:
    rng = np.random.default_rng(hour)
    table = pa.table(
        {
            "event_id": [f"{hour}-{place}" for place in range(200)],
            "time": pa.array([datetime(2026, 1, 1, hour, tzinfo=UTC)] * 200, pa.timestamp("us", "UTC")),
            "label": (rng.random(200) < 0.3).astype(int) if label is None else np.full(200, label),
            "user": rng.integers(0, 50, 200),
        }
    )
    pq.write_table(table, f"{config.landing}/hour-{hour}.parquet")


def learn_all(config: UpdateConfig) -> list[UpdateReport]:
    reports = []
    while report := run_update(config):
        reports.append(report)
    return reports


def test_a_suspicious_window_is_held_the_next_is_learned_and_a_release_lets_it_be_learned_once(config: UpdateConfig) -> None:
    reports = learn_all(config)
    assert [report.outcome for report in reports] == ["published", "published", "suspicious", "published"]
    assert [report.window_start.hour for report in reports] == list(range(4))
    assert [alarm.figure for alarm in reports[2].alarms] == ["click rate"]
    assert reports[2].version == reports[1].version, "the model stays as it is"
    (held,) = held_windows(config.model_dir)
    assert (held.kind, held.num_rows, held.reason) == ("alarm", 200, reports[2].alarms[0].sentence)
    decide(config.model_dir, held.id, "released")
    (released,) = learn_all(config)
    assert (released.outcome, released.rows, released.late_rows) == ("published", 200, 200)
    assert learn_all(config) == []


def test_a_discarded_window_is_never_learned(config: UpdateConfig) -> None:
    learn_all(config)
    decide(config.model_dir, held_windows(config.model_dir)[0].id, "discarded")
    assert learn_all(config) == []


def test_a_held_window_is_no_reference_for_later_ones(config: UpdateConfig) -> None:
    learn_all(config)
    learned = [record for record in read_history(config.model_dir) if record["outcome"] in LEARNED]
    assert [past.profile.clicks < 100 for past in past_of(learned)] == [True] * 3


def test_a_window_that_was_learned_and_is_not_proven_is_a_reference(report: Callable[..., UpdateReport]) -> None:
    records = [as_plain(report(hour, outcome=outcome, profile=ORDINARY)) for hour, outcome in enumerate(LEARNED)]
    assert [(past.hour % 24, past.profile.rows) for past in past_of(records)] == [(0, 1000), (1, 1000)]


@pytest.mark.parametrize(("action", "notes"), [("warn", 1), ("off", 0)])
def test_a_warning_does_not_keep_a_window_from_being_learned(config: UpdateConfig, action: str, notes: int) -> None:
    config = config.model_copy(update={"alarms": config.alarms.model_copy(update={"action": action})})
    reports = learn_all(config)
    assert {report.outcome for report in reports} == {"published"}
    assert len([note for note in reports[2].notes if "click rate" in note]) == notes
