"""Alerts of the flows: to the webhook of the settings, and as events that Prefect's automations can wait for.

Enters: the report of an update, or the error that it failed with. Leaves: an alert, where a person needs to look.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from data_schemas.errors import UpdateInProgress
from pipeline.alerts import Alert, alert_of, alert_of_failure, send
from pipeline.config import UpdateConfig
from pipeline.outcome import UpdateReport


def tell_of(report: UpdateReport, config: UpdateConfig, tell: Callable[[str], None]) -> None:
    """Send an alert where the update was not simply published."""
    alert = alert_of(report)
    if alert:
        _send(alert, config, tell)


@contextmanager
def failures_told(config: UpdateConfig, tell: Callable[[str], None]) -> Iterator[None]:
    """Send an alert where the block fails, and let the error pass; that another process is at work is no failure."""
    try:
        yield
    except UpdateInProgress:
        raise
    except Exception as error:
        _send(alert_of_failure(config, error), config, tell)
        raise


def _send(alert: Alert, config: UpdateConfig, tell: Callable[[str], None]) -> None:
    undelivered = send(config, alert)
    if undelivered:
        tell(undelivered)
    if PREFECT_API_URL.value():  # without a server of the user's own there are no automations
        emit_event(
            f"tidemark.update.{alert.event}",
            resource={"prefect.resource.id": f"tidemark.model.{alert.model_name}", "prefect.resource.name": alert.model_name},
            payload=asdict(alert),
        )
