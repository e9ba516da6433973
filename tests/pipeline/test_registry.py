"""A registered model answers as training did, without a pickle, or it is not registered."""

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_schemas.errors import CheckpointError, TrackingUnavailable
from pipeline.config import UpdateConfig, load_config
from pipeline.evaluation.metrics import measure
from pipeline.outcome import UpdateReport
from pipeline.publishing.registry import register_model, withdraw_challenger
from pipeline.publishing.tracking import Tracker, open_experiment, prepare_mlflow

EXAMPLE = pd.DataFrame(
    {
        "user_id": [9007199254740993, 2, 3],
        "word": ["a", None, "c"],
        "tags": [["x", "y"], None, []],
        "price": [0.25, 0.5, 0.75],
        "event_time": pd.to_datetime(["2026-01-01T05:00", "2026-01-01T05:30", "2026-01-01T05:59"]),
    }
)
EXPECTED = np.array([0.25, 0.5, 0.75], dtype=np.float32)
NAME = "synthetic-hourly"


class PriceIsTheProbability:
    def predict(self, frame: pd.DataFrame) -> Any:
        return frame["price"].fillna(0.1).to_numpy(dtype=np.float32)


@pytest.fixture(autouse=True)
def predictor(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    here = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(here)
    stub = types.ModuleType("pipeline.publishing.predictor")
    stub.load_predictor = lambda folder: PriceIsTheProbability() if (folder / "weights").exists() else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.publishing.predictor", stub)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    yield
    assert not list(here.iterdir()), "MLflow wrote into the current folder"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> UpdateConfig:
    prepare_mlflow()
    return load_config(overrides=[f"state_dir={tmp_path_factory.mktemp('state')}", "tracking.keep_models=2"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"weights")
    return tmp_path


def report_at(hour: int, model_name: str = "hourly") -> UpdateReport:
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour)
    return UpdateReport(
        dataset="synthetic",
        model_name=model_name,
        outcome="published",
        version=hour,
        log_version=hour,
        window_start=start,
        window_end=start + timedelta(hours=1),
        rows=3,
        late_rows=0,
        rows_learned=3,
        rows_pending=0,
        batch_size=3,
        precision="fp32",
        before=measure([0, 1, 1], EXPECTED, [1, 2, 3]),
        after=None,
        frozen=None,
        evaluated_rows=3,
        seconds={"learn": 1.0},
        budget_seconds=60.0,
        plan=(),
        loss_curve=(),
        skipped_steps=0,
        git_commit="abc",
        notes=(),
    )


def champion_of(config: UpdateConfig, name: str = NAME) -> Any:
    return open_experiment(config)[0].get_model_version_by_alias(name, "champion")


def load_champion(config: UpdateConfig) -> Any:
    import mlflow

    location = open_experiment(config)[0].get_logged_model(champion_of(config).tags["tidemark.logged_model"]).artifact_location
    return mlflow.pyfunc.load_model(location)


def test_the_champion_answers_as_training_did(config: UpdateConfig, folder: Path) -> None:
    run_id = Tracker(config).log_update(report_at(1))
    version = register_model(config, report_at(1), folder, EXAMPLE, EXPECTED)
    made = champion_of(config)
    assert (str(made.version), made.run_id, made.tags["checkpoint_version"]) == (version, run_id, "1")
    model = load_champion(config)
    assert np.array_equal(model.predict(EXAMPLE), EXPECTED)
    assert np.array_equal(model.predict(EXAMPLE[["price"]].astype(object)), EXPECTED)
    assert model.predict(pd.DataFrame({"price": [1, 0], "user_id": ["7", None]})).tolist() == [1, 0]


def test_the_champion_answers_json(config: UpdateConfig, folder: Path) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    register_model(config, report_at(2), folder, EXAMPLE, EXPECTED)
    rows = [{"price": 0.125, "tags": ["a"], "user_id": 5}, {"word": None, "user_id": None}]
    model = load_champion(config)
    request = json.dumps({"dataframe_records": rows})
    answer = invocations(request, "application/json", model, model.metadata.get_input_schema())
    assert json.loads(answer.response) == {"predictions": [0.125, pytest.approx(0.1)]}


def test_the_model_holds_no_pickle_and_states_its_requirements(config: UpdateConfig, folder: Path) -> None:
    register_model(config, report_at(3), folder, EXAMPLE, EXPECTED)
    client, _ = open_experiment(config)
    location = client.get_logged_model(champion_of(config).tags["tidemark.logged_model"]).artifact_location
    files = {path.name for path in Path(location.removeprefix("file://")).rglob("*") if path.is_file()}
    assert {"serving.py", "weights", "input_example.json", "MLmodel", "requirements.txt"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))]
    requirements = next(Path(location.removeprefix("file://")).rglob("requirements.txt")).read_text().split()
    assert all("==" in line for line in requirements)
    assert any(line.startswith("torch==") for line in requirements)


def test_only_the_last_versions_and_their_files_are_kept(config: UpdateConfig, folder: Path) -> None:
    client, _ = open_experiment(config)
    versions = [register_model(config, report_at(h, "kept"), folder, EXAMPLE, EXPECTED) for h in range(2)]
    client.set_registered_model_alias("synthetic-kept", "fallback", versions[0])
    aliased, old = (client.get_model_version("synthetic-kept", version) for version in versions)
    files = {v.version: Path(v.source.removeprefix("file://")) for v in (aliased, old)}
    assert all(path.exists() for path in files.values())
    versions += [register_model(config, report_at(h, "kept"), folder, EXAMPLE, EXPECTED) for h in range(2, 5)]
    kept = {v.version for v in client.search_model_versions("name = 'synthetic-kept'")}
    assert kept == {int(versions[0]), int(versions[3]), int(versions[4])}
    assert champion_of(config, "synthetic-kept").version == int(versions[4])
    assert files[aliased.version].exists()
    assert not files[old.version].exists()


def test_a_model_that_answers_otherwise_is_not_registered(config: UpdateConfig, folder: Path) -> None:
    register_model(config, report_at(10), folder, EXAMPLE, EXPECTED)
    before = champion_of(config).version
    with pytest.raises(CheckpointError, match=r"0\.75 where training gave 0\.85: .* differ by up to 0\.64"):
        register_model(config, report_at(11), folder, EXAMPLE, EXPECTED + np.float32(0.1))
    with pytest.raises(CheckpointError, match=r"answers \(3,\)"):
        register_model(config, report_at(12), folder, EXAMPLE, EXPECTED[:2])
    with pytest.raises(CheckpointError, match="nan"):
        register_model(config, report_at(13), folder, EXAMPLE, EXPECTED * np.float32(np.nan))
    rare = EXAMPLE.assign(price=0.0)
    with pytest.raises(CheckpointError, match=r"answers 0 where training gave 0\.01"):
        register_model(config, report_at(14), folder, rare, np.full(3, 0.01, np.float32))
    assert champion_of(config).version == before


def test_a_registry_that_cannot_be_reached_says_so(tmp_path: Path, folder: Path) -> None:
    config = load_config(overrides=[f"state_dir={tmp_path}", "tracking.uri=http://127.0.0.1:9"])
    with pytest.raises(TrackingUnavailable, match="no MLflow server answers"):
        register_model(config, report_at(1), folder, EXAMPLE, EXPECTED)


def test_a_model_without_a_run_is_registered_all_the_same(config: UpdateConfig, folder: Path) -> None:
    register_model(config, report_at(20), folder, EXAMPLE, EXPECTED)
    assert not champion_of(config).run_id


def test_a_challenger_is_withdrawn_and_the_champion_stays(config: UpdateConfig, folder: Path) -> None:
    own = config.model_copy(update={"model_name": "withdrawn"})
    register_model(own, report_at(1, "withdrawn"), folder, EXAMPLE, EXPECTED)
    register_model(own, replace(report_at(2, "withdrawn"), outcome="held"), folder, EXAMPLE, EXPECTED)
    assert withdraw_challenger(own, "synthetic")
    assert open_experiment(own)[0].get_registered_model("synthetic-withdrawn").aliases == {"champion": 1}
    assert not withdraw_challenger(own, "synthetic")
    assert not withdraw_challenger(own.model_copy(update={"model_name": "never registered"}), "synthetic")
