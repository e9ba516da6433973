"""Prefect's temporary server is started early, and only where a run needs one; what does not learn imports no torch."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import prefect.server.api.server as server
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.early_server import server_starting


def started_with(monkeypatch: pytest.MonkeyPatch, *, address: str | None, error: Exception | None = None) -> list[str]:
    """What happened, in order."""
    happened: list[str] = []

    def start() -> None:
        happened.append("started")
        if error:
            raise error

    monkeypatch.setattr(server, "SubprocessASGIServer", lambda: SimpleNamespace(start=start))
    with temporary_settings({PREFECT_API_URL: address} if address else {}, restore_defaults={PREFECT_API_URL}):
        with server_starting():
            happened.append("in the block")
        happened.append("after it")
    return happened


def test_the_server_has_started_at_the_end_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = started_with(monkeypatch, address=None)
    assert sorted(happened[:2]) == ["in the block", "started"]
    assert happened[2:] == ["after it"]


def test_a_server_of_the_users_own_is_left_to_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started_with(monkeypatch, address="http://127.0.0.1:4200/api") == ["in the block", "after it"]


def test_a_start_that_fails_is_told_and_left_to_prefect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert "after it" in started_with(monkeypatch, address=None, error=RuntimeError("no port is free"))
    assert "no port is free" in caplog.text


@pytest.mark.parametrize(
    ("module", "left_out"),
    [("flows.hourly_update", ("torch", "pandas", "mlflow")), ("flows.status", ("torch", "prefect", "mlflow"))],
)
def test_what_does_not_learn_starts_without_torch(module: str, left_out: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {left_out} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
