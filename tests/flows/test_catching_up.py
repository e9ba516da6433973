"""Catching up: every closed window once, in order, each with its own budget; and what is told about it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.artifacts import Artifact

from data_schemas.errors import ConfigError, DataError
from flows.backfill import parse_hour, refuse_earlier_hours
from flows.catching_up import _summary, catch_up, learn_waiting, waiting_windows
from flows.history import reports_of
from flows.nightly_update import NIGHTLY
from flows.settings import settings_for
from pipeline.config import UpdateConfig, overridden
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.evaluation import champion
from pipeline.evaluation.gate import GateVerdict
from pipeline.outcome import UpdateReport
from pipeline.publishing.tracking import open_experiment, quiet_mlflow

HOURS = 3
STREAM = SyntheticConfig(hours=HOURS, rows_per_hour=200, num_users=50, num_items=40, num_authors=8)


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    write_landing(STREAM, tmp_path / "landing")
    overrides = ["tracking.enabled=false", "model.hidden=[8]", "training.precision=fp32"]
    return settings_for(
        None, overrides, dataset="synthetic", landing=str(tmp_path / "landing"), state_dir=str(tmp_path / "state")
    )


def in_a_flow(work: Callable[[], list[UpdateReport]]) -> list[UpdateReport]:
    """Tasks and artifacts need a flow around them."""
    results: list[list[UpdateReport]] = []

    @flow
    def around() -> None:
        results.append(work())

    around()
    return results[0]


@pytest.mark.usefixtures("temporary_server")
class TestWithAServer:
    def test_every_closed_hour_is_learned_once_in_order(self, config: UpdateConfig) -> None:
        told: list[str] = []
        reports = in_a_flow(lambda: catch_up(config, tell=told.append))
        starts = [report.window_start for report in reports]
        assert starts == [STREAM.hour_start(hour) for hour in range(HOURS)]
        assert reports_of(config.model_dir)[-1].version == HOURS
        assert told[-1].startswith(f"learned {HOURS} windows, {sum(r.rows for r in reports):,} rows")
        again = in_a_flow(lambda: catch_up(config, tell=told.append))
        assert again == []
        assert told[-1] == "nothing to do: no closed window waits for the model 'hourly'"

    def test_each_update_leaves_a_report_and_the_next_windows_files_are_read_ahead(
        self, config: UpdateConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = list[ReadAhead]()

        def make() -> ReadAhead:
            made.append(ReadAhead())
            return made[0]

        monkeypatch.setattr("flows.catching_up.ReadAhead", make)
        reports = in_a_flow(lambda: catch_up(config, tell=lambda line: None))
        assert made[0].taken >= len(reports) - 1, "every file but those of the first window"
        artifact = Artifact.get("synthetic-hourly")
        assert artifact is not None
        assert "## Figures" in str(artifact.data)
        assert "](data:image/png;base64," in str(artifact.data)

    def test_files_that_cannot_be_read_ahead_stop_no_update(
        self, config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: object) -> None:
            raise DataError("the log is being written")

        monkeypatch.setattr("flows.catching_up.reads_of", fail)
        reports = in_a_flow(lambda: catch_up(config, until=STREAM.hour_start(1), tell=lambda line: None))
        assert len(reports) == 1
        assert "the next window is not read ahead: the log is being written" in caplog.text

    def test_catching_up_stops_before_the_hour_it_is_told(self, config: UpdateConfig) -> None:
        reports = in_a_flow(lambda: catch_up(config, until=STREAM.hour_start(2), tell=lambda line: None))
        assert [report.window_start for report in reports] == [STREAM.hour_start(0), STREAM.hour_start(1)]
        assert waiting_windows(config, STREAM.hour_start(9)) == [STREAM.hour_start(2)]

    def test_a_backfill_refuses_to_skip_hours_that_the_model_would_learn_unasked(self, config: UpdateConfig) -> None:
        in_a_flow(lambda: catch_up(config, until=STREAM.hour_start(1), tell=lambda line: None))
        refuse_earlier_hours(config, STREAM.hour_start(1), STREAM.hour_start(9))
        with pytest.raises(ConfigError, match=r"1 windows before START = .* start at 2026-01-01T01"):
            refuse_earlier_hours(config, STREAM.hour_start(2), STREAM.hour_start(9))

    def test_a_missing_landing_folder_is_refused_with_the_way_out(self, config: UpdateConfig, tmp_path: Path) -> None:
        absent = config.model_copy(update={"landing": str(tmp_path / "absent")})
        with pytest.raises(DataError, match=r"no landing folder .*; create it"):
            in_a_flow(lambda: catch_up(absent))

    @pytest.mark.parametrize(("register", "expected"), [("each", [1, 1, 1]), ("last", [0, 0, 1]), ("never", [0, 0, 0])])
    def test_the_chosen_updates_register_their_model(
        self, config: UpdateConfig, register: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the models; what serves is registered in the end, if it is not yet."""
        asked: list[bool] = []
        waiting = [[STREAM.hour_start(hour) for hour in range(left)] for left in (3, 2, 1, 0)]

        def record(config: UpdateConfig, **_: object) -> UpdateReport | None:
            asked.append(config.tracking.register_model)
            return made.pop(0) if made else None

        made = in_a_flow(lambda: catch_up(config, tell=lambda line: None))
        monkeypatch.setattr("flows.catching_up.waiting_windows", lambda config, now: waiting.pop(0))
        in_a_flow(
            lambda: learn_waiting(config, register=register, tell=lambda line: None, update=record)  # type: ignore[arg-type]
        )
        assert asked[:3] == expected

    def test_the_registry_follows_what_serves_where_the_last_update_did_not_publish(
        self, config: UpdateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_landing(replace(STREAM, hours=4), tmp_path / "landing")
        config = overridden(config, ["gate.action='enforce'", "tracking.enabled=true"])
        decisions, judge = iter(["hold", "publish", "hold"]), champion.judge

        def decided(*given: Any, **named: Any) -> GateVerdict:
            return replace(judge(*given, **named), decision=next(decisions))  # type: ignore[arg-type]

        monkeypatch.setattr(champion, "judge", decided)
        told: list[str] = []
        reports = in_a_flow(lambda: catch_up(config, register="last", tell=told.append))
        assert [report.outcome for report in reports] == ["published", "held", "published", "held"]
        with quiet_mlflow():
            client, _ = open_experiment(config)
            aliases = client.get_registered_model("synthetic-hourly").aliases
            checkpoints = {
                alias: client.get_model_version("synthetic-hourly", version).tags["checkpoint_version"]
                for alias, version in aliases.items()
            }
        assert checkpoints == {"champion": "3", "challenger": "4"}
        assert told[-1].startswith("learned 4 windows, ")
        assert told[-1].endswith("; version 3 of 'hourly' serves, version 4 is not proven yet")


def test_the_summary_tells_windows_that_were_held_aside_from_those_learned(
    config: UpdateConfig, report: Callable[..., UpdateReport]
) -> None:
    rejected = report(1, outcome="rejected", version=1, rows_learned=0, rows_pending=0)
    line = _summary(config, [report(0, rows_pending=0), rejected])
    assert line == "learned 1 window, 1,200 rows in 3.0 s; 1 window held aside; version 1 of 'hourly' serves"
    held = report(1, outcome="held", serving=1, rows_pending=0)
    line = _summary(config, [held])
    assert line == "learned 1 window, 1,200 rows in 1.5 s; version 1 of 'hourly' serves, version 2 is not proven yet"


def test_waiting_windows_are_aligned_and_closed(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        @staticmethod
        def open_or_create(path: object, spec: object) -> "Log":
            return Log()

        def files(self) -> list[object]:
            class File:
                def __init__(self, hour: int) -> None:
                    self.hour = hour
                    self.path = f"{hour}.parquet"

            return [File(hour) for hour in (1, 2, 30)]

    monkeypatch.setattr("flows.catching_up.ClickLog", Log)
    nightly = settings_for(None, ["window.label_delay_minutes=30"], defaults=NIGHTLY)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    starts = [epoch + timedelta(hours=hour) for hour in (-22, 2, 26)]
    assert waiting_windows(nightly, epoch + timedelta(days=9)) == starts
    assert waiting_windows(nightly, epoch + timedelta(hours=26)) == starts[:1]
    assert waiting_windows(nightly, epoch + timedelta(hours=26, minutes=30)) == starts[:2]


def test_later_settings_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('model_name = "file"\nlanding = "file"\n[budget]\nseconds = 10\n[window]\nhours = 1\n')
    monkeypatch.setenv("TIDEMARK_LANDING", "environment")
    settings = settings_for(str(file), ["window.hours=12"], defaults=NIGHTLY, budget__seconds=20, dataset=None)
    assert (settings.model_name, settings.landing) == ("nightly", "environment")
    assert (settings.budget.seconds, settings.window.hours, settings.dataset) == (20, 12, "synthetic")


@pytest.mark.parametrize("text", ['a "quoted" name', "back\\slash", "2019", "true", "ünïcode 😀", "s3://bucket/a=b"])
def test_any_text_reaches_a_setting_as_it_is(text: str) -> None:
    assert settings_for(None, [], landing=text).landing == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2019-02-22", "2019-02-22T00"), ("2019-02-22T05", "2019-02-22T05"), ("2019-02-22T05:00+09:00", "2019-02-21T20")],
)
def test_hours_are_utc_unless_they_say_otherwise(text: str, expected: str) -> None:
    assert f"{parse_hour(text):%Y-%m-%dT%H}" == expected


@pytest.mark.parametrize("text", ["yesterday", "2019-02-22T05:30", "", "2019-02-30"])
def test_what_is_no_hour_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write 2019-02-22 or 2019-02-22T05"):
        parse_hour(text)
