"""MLflow down, silent, or gone in the middle: the update is done inside its budget, and its run is in MLflow once, later."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_schemas.dataset import load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.publishing import registry, tracking
from pipeline.publishing.checkpoint import current_version
from pipeline.publishing.tracking import UPDATE_TAG, open_experiment, prepare_mlflow, quiet_mlflow
from pipeline.update import run_update

BUDGET_SECONDS = 60.0


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh one of MLflow's, which takes seconds to make."""
    prepare_mlflow()
    folder = tmp_path_factory.mktemp("mlflow")
    with quiet_mlflow():
        open_experiment(load_config(overrides=[f"state_dir={folder}"]))
    return next(folder.rglob("*.db"))


@pytest.fixture
def hours(tmp_path: Path, database: Path) -> UpdateConfig:
    """Three hours that wait in the click log, and a database of MLflow's that nobody has disturbed."""
    write_landing(SyntheticConfig(hours=3, rows_per_hour=300), tmp_path / "landing")
    places = [f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}", f"budget.seconds={BUDGET_SECONDS}"]
    config = load_config(overrides=[*places, "training.precision='fp32'", "model.hidden=[8]"])
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    shutil.copy(database, config.tracking_uri.removeprefix("sqlite:///"))
    return config


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def hanging() -> Iterator[str]:
    """Says that it is well, and answers nothing else."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                over.wait(120)
                return
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    over.set()
    server.shutdown()
    server.server_close()


def _at(config: UpdateConfig, uri: str) -> UpdateConfig:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def _runs(config: UpdateConfig) -> list[tuple[str, str]]:
    with quiet_mlflow():
        client, experiment = open_experiment(config)
        runs = client.search_runs([experiment])
    return sorted((run.data.tags[UPDATE_TAG].split("/")[3], run.info.status) for run in runs if UPDATE_TAG in run.data.tags)


def _champion(config: UpdateConfig) -> str:
    with quiet_mlflow():
        client, _ = open_experiment(config)
        found = client.get_model_version_by_alias(f"synthetic-{config.model_name}", "champion")
    return str(found.tags["checkpoint_version"])


def _timed_update(config: UpdateConfig) -> tuple[Any, float]:
    started = time.monotonic()
    report = run_update(config)
    assert report is not None
    return report, time.monotonic() - started


@pytest.mark.parametrize("how", ["silent", "hanging"])
def test_a_server_that_hangs_costs_seconds_and_its_run_comes_later_once(
    hours: UpdateConfig, how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]
) -> None:
    if how == "silent":
        monkeypatch.setattr(tracking, "PROBE_SECONDS", 1.0)
    else:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    report, seconds = _timed_update(_at(hours, request.getfixturevalue(how)))
    tell(f"{how}: {seconds:.1f} s of a budget of {BUDGET_SECONDS:.0f} s")
    assert seconds < BUDGET_SECONDS
    assert report.outcome == "published"
    assert any("the run waits in" in note for note in report.notes)
    assert current_version(hours.model_dir) == 1
    assert len(list((hours.model_dir / "spool").glob("*.json"))) == 1
    after, _ = _timed_update(hours)
    assert any("spooled earlier, is in MLflow now" in note for note in after.notes)
    assert _runs(hours) == [("v1", "FINISHED"), ("v2", "FINISHED")]
    assert _champion(hours) == "2"
    assert not list((hours.model_dir / "spool").iterdir())


@pytest.mark.slow
def test_a_server_that_hangs_as_it_is_asked_costs_less_than_the_least_budget(
    hours: UpdateConfig, hanging: str, tell: Callable[[str], None]
) -> None:
    """With the time-outs that are in force where nobody sets others."""
    _, seconds = _timed_update(_at(hours, hanging))
    tell(f"hanging, with the time-outs in force: {seconds:.1f} s of a budget of {BUDGET_SECONDS:.0f} s")
    assert seconds < BUDGET_SECONDS


def test_a_server_that_goes_between_the_run_and_the_model_leaves_the_champion_and_the_next_update_mends_it(
    hours: UpdateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise ConnectionResetError("gone in the middle")

    _timed_update(hours)
    assert _champion(hours) == "1"
    with monkeypatch.context() as patched:
        patched.setattr(registry, "_promote", gone)
        report, _ = _timed_update(hours)
    assert any("the model was not registered" in note for note in report.notes)
    assert _champion(hours) == "1"
    assert current_version(hours.model_dir) == 2
    _timed_update(hours)
    assert _champion(hours) == "3"
    assert _runs(hours) == [("v1", "FINISHED"), ("v2", "FINISHED"), ("v3", "FINISHED")]


def test_a_server_that_goes_in_the_middle_of_a_run_gets_it_once(hours: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise ConnectionResetError("gone in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(tracking, "log_image", gone)
        report, _ = _timed_update(hours)
    assert any("the run waits in" in note for note in report.notes)
    assert ("v1", "RUNNING") in _runs(hours)
    _timed_update(hours)
    assert _runs(hours) == [("v1", "FINISHED"), ("v2", "FINISHED")]
