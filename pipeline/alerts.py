"""What leaves the house when an update needs a person: a small JSON, posted to a webhook.

Enters: the report of an update, or the error that it failed with. Leaves: one POST, or a line in
`<model_dir>/undelivered_alerts.jsonl` and in the log. The address is a secret: it is in neither.
"""

import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

from pipeline.config import AlertEvent, UpdateConfig
from pipeline.outcome import UpdateReport
from pipeline.passwords import without_passwords
from pipeline.publishing.report import verdict

MAX_TEXT = 2000
"""Characters of a sentence; an error may quote a whole row."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Alert:
    """The JSON that is posted."""

    text: str
    """What happened, in one sentence; chat services show this field."""
    event: AlertEvent
    dataset: str
    model_name: str
    window_start: str | None
    """ISO 8601, UTC; None for an update that failed."""
    window_end: str | None
    serving: int | None
    """Version that goes on serving; None where it is not known."""
    alarms: tuple[str, ...]
    """What was out of line, a sentence each."""


def alert_of(report: UpdateReport) -> Alert | None:
    """What to tell of an update; None where nobody needs to look."""
    if report.outcome in ("held", "rejected", "suspicious"):
        event: AlertEvent = report.outcome
    elif report.alarms:
        event = "alarm"
    else:
        return None
    sentences = tuple(alarm.sentence for alarm in report.alarms)
    text = verdict(report)
    if event == "alarm":
        text = f"{text} Out of line: {'; '.join(sentences)}."
    return Alert(
        text=_short(f"{report.model_name}: {text}"),
        event=event,
        dataset=report.dataset,
        model_name=report.model_name,
        window_start=report.window_start.astimezone(UTC).isoformat(),
        window_end=report.window_end.astimezone(UTC).isoformat(),
        serving=report.version if report.serving is None else report.serving,
        alarms=tuple(_short(sentence) for sentence in sentences),
    )


def alert_of_failure(config: UpdateConfig, error: BaseException) -> Alert:
    """What to tell of an update that ended with `error`."""
    return Alert(
        text=_short(f"{config.model_name}: the update failed, {type(error).__name__}: {error}"),
        event="failed",
        dataset=config.dataset,
        model_name=config.model_name,
        window_start=None,
        window_end=None,
        serving=None,
        alarms=(),
    )


def send(config: UpdateConfig, alert: Alert) -> str | None:
    """Posts the alert, if there is an address and `alerts.events` has it. Takes `alerts.timeout_seconds` at most, and never
    raises for it.

    Returns:
        None, or why it was not delivered; that is then in the log and in `undelivered_alerts.jsonl` too.
    """
    address = config.alerts.webhook_url.get_secret_value()
    if not address or alert.event not in config.alerts.events:
        return None
    body = json.dumps(_without_secrets(asdict(alert), address)).encode()
    problem = _post(address, body, config.alerts.timeout_seconds)
    if problem is None:
        return None
    note = f"an alert ({alert.event}) could not be delivered: {problem}"
    log.warning("%s", note)
    _write_down(config.model_dir, body, problem)
    return note


@dataclass(frozen=True, kw_only=True)
class Undelivered:
    """Alerts of a model that never left."""

    number: int
    last_at: datetime
    last_problem: str


def undelivered_alerts(model_dir: Path) -> Undelivered | None:
    """How many alerts could not be delivered, ever; None for none. Lines that cannot be read are counted all the same."""
    path = _undelivered_path(model_dir)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    if not lines:
        return None
    try:
        last = json.loads(lines[-1])
        return Undelivered(number=len(lines), last_at=datetime.fromisoformat(last["at"]), last_problem=str(last["problem"]))
    except (ValueError, KeyError, TypeError):
        changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return Undelivered(number=len(lines), last_at=changed, last_problem="its line cannot be read")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The address was chosen by whoever set it; another one is an answer like any other."""

    def redirect_request(self, *answer: object) -> None:
        return None


def _post(address: str, body: bytes, timeout_seconds: float) -> str | None:
    """Why it did not work. In a thread of its own: name servers, and servers that send a byte a second, know no time limit."""
    outcome: list[str | None] = []
    thread = threading.Thread(target=lambda: outcome.append(_posted(address, body, timeout_seconds)), daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return outcome[0] if outcome else f"no answer within {timeout_seconds:g} s"


def _posted(address: str, body: bytes, timeout_seconds: float) -> str | None:
    """No message of the network library is passed on: it may quote the address."""
    try:
        request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"}, method="POST")
        urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_seconds).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"the webhook answered {error.code}"
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except urllib.error.URLError as error:
        cause = error.reason
        return f"no connection ({type(cause).__name__})" if isinstance(cause, OSError) else "no connection"
    except (OSError, HTTPException, ValueError) as error:
        return f"no connection ({type(error).__name__})"
    return None


def _without_secrets(fields: dict[str, object], address: str) -> dict[str, object]:
    def clean(value: object) -> object:
        if isinstance(value, str):
            return without_passwords(value.replace(address, "***"))
        return [clean(item) for item in value] if isinstance(value, Sequence) else value

    return {name: clean(value) for name, value in fields.items()}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT else f"{line[: MAX_TEXT - 1]}…"


def _undelivered_path(model_dir: Path) -> Path:
    return model_dir / "undelivered_alerts.jsonl"


def _write_down(model_dir: Path, body: bytes, problem: str) -> None:
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "problem": problem, "alert": json.loads(body)}
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_undelivered_path(model_dir), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("an alert that was not delivered could not be written down either: %s", error.strerror)
