"""Alerts of the flows: a failed update is told and still fails, and automations can wait for its event."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prefect import flow
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker

from data_schemas.errors import DataError, UpdateInProgress
from flows import alerts
from flows.catching_up import catch_up
from flows.settings import settings_for
from pipeline.alerts import Alert
from pipeline.config import UpdateConfig
from pipeline.outcome import UpdateReport

MakeReport = Callable[..., UpdateReport]


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    places = {"landing": str(tmp_path / "absent"), "state_dir": str(tmp_path / "state")}
    return settings_for(None, ["tracking.enabled=false"], dataset="synthetic", **places)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Alert]:
    """What would have been posted."""
    posted: list[Alert] = []
    monkeypatch.setattr(alerts, "send", lambda config, alert: posted.append(alert) or "no connection")
    return posted


def test_a_failure_is_told_and_passes_on(config: UpdateConfig, sent: list[Alert]) -> None:
    told: list[str] = []
    with pytest.raises(DataError, match="the disk"), alerts.failures_told(config, told.append):
        raise DataError("the disk is full")
    assert [alert.event for alert in sent] == ["failed"]
    assert told == ["no connection"], "what was not delivered is told where the run is looked at"


def test_another_process_at_work_is_no_failure(config: UpdateConfig, sent: list[Alert]) -> None:
    with pytest.raises(UpdateInProgress), alerts.failures_told(config, print):
        raise UpdateInProgress("held by process 1")
    assert sent == []


def test_a_published_update_is_not_told(config: UpdateConfig, sent: list[Alert], report: MakeReport) -> None:
    alerts.tell_of(report(1), config, print)
    assert sent == []
    alerts.tell_of(replace(report(1), outcome="held", serving=1), config, print)
    assert [alert.event for alert in sent] == ["held"]


@pytest.mark.usefixtures("temporary_server")
def test_an_update_that_cannot_read_its_landing_folder_is_an_event_of_the_flow_run(
    config: UpdateConfig, sent: list[Alert], monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(alerts, "emit_event", lambda event, resource, payload: emitted.append((event, resource)))

    @flow
    def around() -> None:
        catch_up(config, tell=lambda line: None)

    with pytest.raises(DataError, match="absent"):
        around()
    (event,) = emitted
    assert event[0] == "tidemark.update.failed"
    assert event[1]["prefect.resource.id"] == "tidemark.model.hourly"
    assert [alert.event for alert in sent] == ["failed"]


def test_the_event_is_one_that_prefect_takes(
    config: UpdateConfig, sent: list[Alert], report: MakeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts.PREFECT_API_URL, "value", lambda: "http://127.0.0.1:9/api")
    EventsWorker.set_client_override(AssertingEventsClient)
    AssertingEventsClient.reset()
    try:
        alerts.tell_of(replace(report(1), outcome="rejected"), config, print)
        EventsWorker.instance().drain()
        events = [event for client in AssertingEventsClient.all for event in client.events]
    finally:
        EventsWorker.set_client_override(None)
    assert [(event.event, event.payload["event"]) for event in events] == [("tidemark.update.rejected", "rejected")]
