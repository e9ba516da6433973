"""The registered model answers raw rows with the probabilities that training computes."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from data_schemas.dataset import load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.encode import encode
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.windows import Cursor, next_window, read_window
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.processes import Processes
from pipeline.update import run_update


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> UpdateConfig:
    """One synthetic hour, learned, published and registered."""
    folder = tmp_path_factory.mktemp("published")
    write_landing(SyntheticConfig(hours=1, rows_per_hour=400), folder / "landing")
    config = load_config(overrides=[f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}"])
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    report = run_update(config)
    assert report is not None
    assert not report.notes
    return config


def _ask(config: UpdateConfig, request: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, object]]:
    """What `mlflow models serve` answers to a POST on /invocations."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow
    from mlflow.pyfunc.scoring_server import invocations

    mlflow.set_tracking_uri(config.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/synthetic-hourly@champion")
    answer = invocations(json.dumps(request), "application/json", model, model.metadata.get_input_schema())
    return answer.status, json.loads(answer.response)


def test_the_champion_answers_as_training_does(published: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(published.dataset)
    log = ClickLog.open_or_create(published.log_path, spec)
    window = next_window(log, Cursor(), published.window, datetime.now(UTC))
    assert window is not None
    table = read_window(log, window, columns_to_read(spec)).slice(0, 50)
    state = restore_or_create(published, spec, Processes())
    encoded = encode(to_examples(table, spec), spec, state.memory, state.moments, hour=window.start)
    learner = state.learner
    expected = probabilities(learner.model, learner.dense_weights(averaged=True), encoded, device=learner.device)

    records = table.drop(["label"]).to_pylist()
    for record in records:
        record["event_time"] = record["event_time"].isoformat()
    status, answer = _ask(published, {"dataframe_records": records}, monkeypatch)
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], expected, atol=1e-6)


def test_a_request_without_a_column_is_told_which(published: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="the request has no column 'item_id'"):
        _ask(published, {"dataframe_records": [{"user_id": 1}]}, monkeypatch)


def test_nothing_that_was_published_is_a_pickle(published: UpdateConfig) -> None:
    suffixes = {path.suffix for path in Path(published.state_dir).rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}
