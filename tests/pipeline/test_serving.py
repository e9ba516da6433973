"""The registered model answers raw rows with the probabilities that training computes."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from data_schemas.dataset import DATASETS_FOLDER, load_spec
from data_schemas.errors import CorruptCheckpoint
from data_schemas.examples import Examples
from pipeline.config import TablePrecision, UpdateConfig, load_config, spec_of
from pipeline.data.encode import encode
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.windows import Cursor, next_window, read_window
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.publishing.predictor import export_predictor, load_predictor
from pipeline.training.processes import Processes
from pipeline.update import run_update


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> UpdateConfig:
    """One synthetic hour, learned, published and registered."""
    return publish(tmp_path_factory.mktemp("published"))


def publish(folder: Path, *overrides: str) -> UpdateConfig:
    write_landing(SyntheticConfig(hours=1, rows_per_hour=400), folder / "landing")
    config = load_config(overrides=[f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}", *overrides])
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


def _rows(config: UpdateConfig) -> Examples:
    spec = load_spec(config.dataset)
    log = ClickLog.open_or_create(config.log_path, spec)
    window = next_window(log, Cursor(), config.window, datetime.now(UTC))
    assert window is not None
    return to_examples(read_window(log, window, columns_to_read(spec)), spec)


@pytest.mark.parametrize(("precision", "most", "share"), [("fp16", 1e-3, 0.52), ("int8", 5e-3, 0.45)])
def test_a_narrow_predictor_is_small_and_predicts_nearly_the_same(
    published: UpdateConfig, tmp_path: Path, precision: TablePrecision, most: float, share: float
) -> None:
    exact, narrow, share_of_bytes = _narrowed(published, tmp_path, precision)
    assert 0 < np.abs(narrow - exact).max() <= most
    assert share_of_bytes < share


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_linear_model_is_served_from_narrow_weights_too(tmp_path: Path, precision: TablePrecision) -> None:
    config = publish(tmp_path, "model.kind=linear", f"serving.table_precision={precision}")
    exact, narrow, share_of_bytes = _narrowed(config, tmp_path, precision)
    assert 0 < np.abs(narrow - exact).max() <= 1e-3, "wide weights have 16 bits with either"
    assert share_of_bytes < 0.52


def _narrowed(config: UpdateConfig, tmp_path: Path, precision: TablePrecision) -> tuple[np.ndarray, np.ndarray, float]:
    """What a model predicts with tables in fp32 and in `precision`, and the share of bytes that these take."""
    spec, examples = spec_of(config), _rows(config)
    state = restore_or_create(config, spec, Processes())
    for name in ("fp32", precision):
        export_predictor(state, spec, config.model, tmp_path / name, table_precision=name)  # type: ignore[arg-type]
    exact, narrow = (load_predictor(tmp_path / name).predict_examples(examples) for name in ("fp32", precision))
    bytes_of = {name: (tmp_path / name / "weights.safetensors").stat().st_size for name in ("fp32", precision)}
    return exact, narrow, bytes_of[precision] / bytes_of["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_wide_weights_of_the_time_in_an_older_export_are_left_out_and_told_of(
    published: UpdateConfig, tmp_path: Path, precision: TablePrecision, caplog: pytest.LogCaptureFixture
) -> None:
    spec, examples, folder = load_spec(published.dataset), _rows(published), tmp_path / "exported"
    state = restore_or_create(published, spec, Processes())
    export_predictor(state, spec, published.model, folder, table_precision=precision)
    expected = load_predictor(folder).predict_examples(examples)
    assert "older tidemark" not in caplog.text
    tensors = load_file(folder / "weights.safetensors")
    surplus = tensors["tables.wide.device.weight"].new_ones(24, 1)
    save_file(tensors | {"tables.wide.hour_of_day.weight": surplus}, folder / "weights.safetensors")
    np.testing.assert_array_equal(load_predictor(folder).predict_examples(examples), expected)
    assert "exported by an older tidemark: wide.hour_of_day.weight are left out" in caplog.text


@pytest.mark.parametrize("history", ["", '[history]\nof = ["item_id"]\nlength = 5\nattended_clicks = 2\n'])
def test_a_model_with_int8_tables_is_registered_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: str
) -> None:
    declared = tmp_path / "own.toml"
    declared.write_text((DATASETS_FOLDER / "synthetic.toml").read_text(encoding="utf-8") + history, encoding="utf-8")
    config = publish(tmp_path, "serving.table_precision=int8", f"dataset={declared}")
    (description,) = (tmp_path / "state").rglob("predictor.json")
    assert json.loads(description.read_text())["table_precision"] == "int8"
    spec = load_spec(config.dataset)
    request = {feature.name: None for feature in (*spec.logged_categorical(), *spec.numeric)}
    status, answer = _ask(config, {"inputs": [request | {"event_time": "2026-01-01T00:30:00Z"}]}, monkeypatch)
    assert (status, len(answer["predictions"])) == (200, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("saved", "claimed"), [("int8", "fp32"), ("fp32", "int8"), ("fp16", "int8")])
def test_tables_that_are_not_what_the_description_says_are_refused(
    published: UpdateConfig, tmp_path: Path, saved: TablePrecision, claimed: str
) -> None:
    spec = load_spec(published.dataset)
    state = restore_or_create(published, spec, Processes())
    export_predictor(state, spec, published.model, tmp_path / "model", table_precision=saved)
    path = tmp_path / "model/predictor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"table_precision": claimed}))
    with pytest.raises(CorruptCheckpoint, match="tables in"):
        load_predictor(tmp_path / "model")
