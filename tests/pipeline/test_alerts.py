"""Alerts: what is posted, and that neither a dead, a slow nor a talkative webhook costs more than its time limit."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_schemas.errors import ConfigError, DataError
from pipeline.alerts import Alert, alert_of, alert_of_failure, send, undelivered_alerts
from pipeline.config import UpdateConfig, load_config, overridden
from pipeline.evaluation.alarms import Alarm
from pipeline.outcome import UpdateReport

SECRET = "plover-xyzzy"
ALARM = Alarm(figure="rows", value=3, low=90, high=110, sentence="rows: 3, where the last 7 days make 90 to 110 likely")


MakeReport = Callable[..., UpdateReport]


@dataclass
class Webhook:
    """A webhook on this machine, that answers `status`."""

    status: int = 200
    received: list[dict[str, object]] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(hook.status, self.path)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hook.address = f"http://127.0.0.1:{server.server_port}/{SECRET}"
        yield hook
        server.shutdown()
        thread.join()


@pytest.fixture
def config(tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> UpdateConfig:
    monkeypatch.setenv("TIDEMARK_ALERTS__WEBHOOK_URL", webhook.address)
    return load_config(None, [f"state_dir={tmp_path}", "alerts.timeout_seconds=5"])


@pytest.fixture
def alert(report: MakeReport) -> Alert:
    made = alert_of(report(5, outcome="suspicious", alarms=(ALARM,)))
    assert made
    return made


def test_a_window_that_was_held_is_told_in_words_and_fields(config: UpdateConfig, webhook: Webhook, alert: Alert) -> None:
    assert send(config, alert) is None
    (received,) = webhook.received
    assert received["event"] == "suspicious"
    assert (received["window_start"], received["window_end"]) == ("2026-01-01T05:00:00+00:00", "2026-01-01T06:00:00+00:00")
    assert received["alarms"] == [ALARM.sentence]
    assert str(received["text"]).startswith("hourly: 2026-01-01 05:00 to 06:00 UTC does not look like the windows before it")
    assert undelivered_alerts(config.model_dir) is None


def test_only_the_events_of_the_settings_are_sent(config: UpdateConfig, webhook: Webhook, alert: Alert) -> None:
    chosen = overridden(config, ['alerts.events=["rejected", "failed"]'])
    assert send(chosen, alert) is None
    assert webhook.received == []
    assert send(chosen, replace(alert, event="rejected")) is None
    assert [received["event"] for received in webhook.received] == ["rejected"]


@pytest.mark.parametrize("outcome", ["held", "rejected", "suspicious"])
def test_every_outcome_that_a_person_should_see_is_told(outcome: str, report: MakeReport) -> None:
    made = alert_of(report(5, outcome=outcome, serving=3, alarms=(ALARM,)))
    assert made
    assert (made.event, made.serving) == (outcome, 3)


def test_an_update_that_was_published_is_told_only_with_an_alarm(report: MakeReport) -> None:
    assert alert_of(report(5)) is None
    made = alert_of(report(5, alarms=(ALARM,)))
    assert made
    assert (made.event, made.alarms) == ("alarm", (ALARM.sentence,))
    assert made.text.endswith(f"Out of line: {ALARM.sentence}.")


def test_a_failure_is_told_without_what_it_must_not_say(config: UpdateConfig, webhook: Webhook) -> None:
    error = DataError(f"cannot read ftp://me:{SECRET}@host/x, nor {webhook.address}" + "x" * 5000)
    assert send(config, alert_of_failure(config, error)) is None
    (received,) = webhook.received
    assert str(received["text"]).startswith("hourly: the update failed, DataError: cannot read ftp://***@host/x, nor ***")
    assert SECRET not in json.dumps(received)
    assert len(str(received["text"])) <= 2000


@pytest.mark.parametrize("status", [302, 307, 404, 500])
def test_any_other_answer_is_counted_and_logged(
    config: UpdateConfig, webhook: Webhook, status: int, caplog: pytest.LogCaptureFixture, alert: Alert
) -> None:
    webhook.status = status
    assert send(config, alert) == f"an alert (suspicious) could not be delivered: the webhook answered {status}"
    assert len(webhook.received) == 1, "a redirect is not followed"
    assert send(config, replace(alert, event="held"))
    undelivered = undelivered_alerts(config.model_dir)
    assert undelivered
    assert (undelivered.number, undelivered.last_problem) == (2, f"the webhook answered {status}")
    assert "could not be delivered" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in (config.model_dir / "undelivered_alerts.jsonl").read_text()


def test_nobody_listening_is_counted(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, alert: Alert) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TIDEMARK_ALERTS__WEBHOOK_URL", f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}")
    dead = load_config(None, [f"state_dir={config.state_dir}"])
    assert send(dead, alert) == "an alert (suspicious) could not be delivered: no connection (ConnectionRefusedError)"


def test_a_server_that_answers_a_byte_at_a_time_costs_no_more_than_the_limit(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, alert: Alert
) -> None:
    done = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
                if done.wait(0.05):
                    return
                connection.sendall(bytes([byte]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        monkeypatch.setenv("TIDEMARK_ALERTS__WEBHOOK_URL", f"http://127.0.0.1:{listener.getsockname()[1]}/")
        slow = load_config(None, [f"state_dir={config.state_dir}", "alerts.timeout_seconds=0.5"])
        started = time.monotonic()
        assert send(slow, alert) == "an alert (suspicious) could not be delivered: no answer within 0.5 s"
        assert time.monotonic() - started < 20, "without the limit it takes 51 s"
        done.set()
        thread.join()


def test_a_full_or_read_only_disk_is_no_failure_either(
    config: UpdateConfig, webhook: Webhook, caplog: pytest.LogCaptureFixture, alert: Alert
) -> None:
    webhook.status = 500
    config.state_dir.joinpath("models").write_text("a file where the folder should be")
    assert send(config, alert)
    assert "could not be written down either" in caplog.text


def test_a_torn_line_is_counted_all_the_same(config: UpdateConfig) -> None:
    config.model_dir.mkdir(parents=True)
    (config.model_dir / "undelivered_alerts.jsonl").write_text('{"at": "2026-01-01T00:0')
    undelivered = undelivered_alerts(config.model_dir)
    assert undelivered
    assert (undelivered.number, undelivered.last_problem) == (1, "its line cannot be read")


def test_without_an_address_nothing_is_sent(tmp_path: Path, alert: Alert) -> None:
    quiet = load_config(None, [f"state_dir={tmp_path}"])
    assert send(quiet, alert) is None
    assert list(tmp_path.iterdir()) == []


def test_the_address_is_taken_from_the_environment_only(tmp_path: Path) -> None:
    override = f"alerts.webhook_url=https://host/{SECRET}"
    file, declaration = tmp_path / "settings.toml", tmp_path / "shop.toml"
    file.write_text(f'[alerts]\nwebhook_url = "https://host/{SECRET}"\n')
    declaration.write_text(
        'name = "shop"\nevent_key = ["id"]\n[time]\ncolumn = "at"\n[label]\ncolumn = "clicked"\n[[categorical]]\nname = "id"\n'
        f'[settings.alerts]\nwebhook_url = "https://host/{SECRET}"\n'
    )
    for place, load in {
        "the command line": lambda: load_config(None, [override]),
        "the settings file": lambda: load_config(file),
        r"the data set's \[settings\]": lambda: load_config(None, [f"dataset={declaration}"]),
        "an override": lambda: overridden(load_config(), [override]),
    }.items():
        with pytest.raises(ConfigError, match=f"take it out of {place} and set TIDEMARK_ALERTS__WEBHOOK_URL") as caught:
            load()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://example.org/{}", "file:///etc/{}", "{}", "https://[{}", "https:///{}", "https://h/ {}"]
)
def test_an_unsafe_address_is_refused_without_being_quoted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMARK_ALERTS__WEBHOOK_URL", address.format(SECRET))
    with pytest.raises(ConfigError, match=r"alerts\.webhook_url: must be an address") as caught:
        load_config()
    assert SECRET not in f"{caught.value} {caught.value.__cause__}"


def test_no_print_of_the_settings_shows_the_address(config: UpdateConfig) -> None:
    assert SECRET not in f"{config} {config!r} {config.model_dump()} {config.model_dump_json()}"
