"""Telemetry and pickled results are off unless the user says otherwise; only a run by hand is quiet."""

import os
import socket
import sys

import pytest

from flows import environment
from flows.environment import BY_HAND, DEFAULTS, set_defaults


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*DEFAULTS, *BY_HAND, "PREFECT__FLOW_RUN_ID"]:
        # Set first, so that what `set_defaults` adds is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_importing_any_flow_module_switched_telemetry_off() -> None:
    assert set(DEFAULTS) <= set(os.environ)


@pytest.mark.parametrize("arguments", [["flows/hourly_update.py"], ["/venv/bin/prefect", "run", "flows/demo.py"]])
def test_a_run_by_hand_is_quiet(bare: pytest.MonkeyPatch, arguments: list[str]) -> None:
    bare.setattr(sys, "argv", arguments)
    set_defaults()
    assert {name: os.environ[name] for name in DEFAULTS | BY_HAND} == DEFAULTS | BY_HAND


@pytest.mark.parametrize("arguments", [["/venv/bin/prefect", "worker", "start"], ["prefect", "server", "start"], ["prefect"]])
def test_server_and_worker_keep_their_logs(bare: pytest.MonkeyPatch, arguments: list[str]) -> None:
    bare.setattr(sys, "argv", arguments)
    set_defaults()
    assert os.environ["DO_NOT_TRACK"] == "true"
    assert not set(BY_HAND) & set(os.environ)


def test_a_scheduled_run_keeps_its_logs(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(sys, "argv", ["/venv/lib/prefect/engine.py"])
    bare.setenv("PREFECT__FLOW_RUN_ID", "7")
    set_defaults()
    assert not set(BY_HAND) & set(os.environ)


@pytest.mark.parametrize("how", ["down", "silent"])
def test_a_run_by_hand_does_without_a_server_that_does_not_answer(
    bare: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    bare.setattr(sys, "argv", ["flows/hourly_update.py"])
    bare.setattr(environment, "PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}/api"
        if how == "down":
            server.close()
        bare.setenv("PREFECT_API_URL", f"http://someone:secret@{address}")
        set_defaults()
    assert "PREFECT_API_URL" not in os.environ
    assert f"no Prefect server answers at {address}" in caplog.text
    assert "secret" not in caplog.text


def test_a_scheduled_run_keeps_its_server(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(sys, "argv", ["/venv/lib/prefect/engine.py"])
    bare.setenv("PREFECT__FLOW_RUN_ID", "7")
    bare.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    set_defaults()
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"


def test_what_the_user_set_is_left_alone(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(sys, "argv", ["flows/hourly_update.py"])
    bare.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    bare.setenv("DO_NOT_TRACK", "false")
    set_defaults()
    assert (os.environ["PREFECT_LOGGING_LEVEL"], os.environ["DO_NOT_TRACK"]) == ("DEBUG", "false")
