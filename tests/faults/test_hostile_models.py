"""Models that are not what was saved: other people's pickles, and files cut short. Nothing runs; what can go on goes on."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from data_schemas.dataset import load_spec
from data_schemas.errors import CorruptCheckpoint
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.publishing.checkpoint import current_version, head_version, read_manifest
from pipeline.publishing.tracking import prepare_mlflow, quiet_mlflow
from pipeline.update import run_update


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    write_landing(SyntheticConfig(hours=4, rows_per_hour=300), tmp_path / "landing")
    places = [f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}", "tracking.enabled=false"]
    small = ["training.precision='fp32'", "model.hidden=[8]", "evaluation.frozen_after_updates=1"]
    config = load_config(overrides=[*places, *small])
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    return config


def _learn(config: UpdateConfig, windows: int) -> None:
    for _ in range(windows):
        assert run_update(config) is not None


def _plant(folder: Path, name: str, content: bytes) -> None:
    """In the place of a part, with the manifest's hash made to fit, as one who can write there would."""
    path = folder / name
    path.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for part in manifest["parts"]:
        if part["file"] == name:
            part["sha256"] = hashlib.sha256(content).hexdigest()
    manifest["digest"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["dense.safetensors", "tables-0-of-1.safetensors", "manifest.json"])
@pytest.mark.parametrize("make", ["pickle", "torch"])
def test_a_pickle_in_a_checkpoint_is_refused_and_the_version_before_goes_on(
    config: UpdateConfig, tmp_path: Path, name: str, make: str
) -> None:
    _learn(config, 2)
    canary, planted = Canary(tmp_path / "ran"), tmp_path / "planted"
    if make == "torch":
        torch.save({"weights": canary}, planted)
    else:
        planted.write_bytes(pickle.dumps(canary))
    folder = config.model_dir / "checkpoints" / "v000002"
    if name == "manifest.json":
        (folder / name).write_bytes(planted.read_bytes())
    else:
        _plant(folder, name, planted.read_bytes())
    report = run_update(config)
    assert report is not None
    assert any("went back to the checkpoint before" in note for note in report.notes)
    assert report.window_start.hour == 1, "what the refused version had learned is learned again"
    assert not (tmp_path / "ran").exists()


FLIPS = 60


def test_no_flipped_bit_of_a_version_or_of_what_it_builds_on_is_learned(
    config: UpdateConfig, tell: Callable[[str], None]
) -> None:
    """In every file that a restore reads: whole tables, what changed in them, all else, and the manifest itself."""
    deltas = config.model_copy(update={"delta_checkpoints_from_mib": 0})
    _learn(deltas, 2)
    folder, rng, refused = config.model_dir / "checkpoints", np.random.default_rng(2), Counter[str]()
    whole = read_manifest(config.model_dir, 2)
    paths = [folder / f"v{part.of or 2:06d}" / part.file for part in whole.parts] + [folder / "v000002" / "manifest.json"]
    assert whole.base == 1
    for number in range(FLIPS):
        path = paths[number % len(paths)]
        with path.open("r+b") as file:
            place, bit = int(rng.integers(path.stat().st_size)), 1 << int(rng.integers(8))
            for _ in range(2):
                file.seek(place)
                (byte,) = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ bit]))
                file.flush()
                try:
                    assert read_manifest(config.model_dir, 2) == whole
                except CorruptCheckpoint:
                    refused[path.name] += 1
    tell(f"{FLIPS} flips in {len(paths)} files of a delta and its base: {refused.total()} refused, 0 silent")
    assert refused.total() == FLIPS


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 100])
def test_a_frozen_model_that_cannot_be_read_stops_no_update(config: UpdateConfig, content: bytes) -> None:
    _learn(config, 2)
    (config.model_dir / "frozen" / "weights.safetensors").write_bytes(content)
    report = run_update(config)
    assert report is not None
    assert (report.outcome, report.frozen) == ("published", None)
    assert report.before is not None


def test_a_champion_that_is_not_whole_gives_way_and_the_unproven_version_goes_on(
    config: UpdateConfig,
) -> None:
    """Nothing that was learned is lost, and what serves is whole."""
    _learn(config, 2)
    gate = config.gate.model_copy(update={"action": "enforce", "auc_margin": 1e-6, "max_windows": 6})
    strict = config.model_copy(update={"gate": gate})
    _learn(strict, 1)
    assert (current_version(config.model_dir), head_version(config.model_dir)) == (2, 3)
    (config.model_dir / "checkpoints" / "v000002" / "dense.safetensors").write_bytes(b"flipped")
    report = run_update(strict)
    assert report is not None
    assert report.window_start.hour == 3
    assert any("version 1 serves instead" in note for note in report.notes)
    checkpoints = {path.name for path in (config.model_dir / "checkpoints").iterdir()}
    assert {"v000001", "v000002.corrupt"} <= checkpoints
    assert "v000003.corrupt" not in checkpoints


def test_no_whole_checkpoint_is_an_error_that_names_them(config: UpdateConfig) -> None:
    _learn(config, 1)
    _plant(config.model_dir / "checkpoints" / "v000001", "dense.safetensors", b"PK\x03\x04")
    with pytest.raises(CorruptCheckpoint, match=r"dense\.safetensors cannot be read"):
        run_update(config)


def test_a_pickled_model_of_mlflow_is_refused(tmp_path: Path) -> None:
    """By MLflow itself, with the switch that the project sets before it imports it."""
    prepare_mlflow()
    import mlflow
    from mlflow.exceptions import MlflowException

    with quiet_mlflow():

        class Harmless(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
            def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> Any:
                return model_input

        mlflow.pyfunc.save_model(tmp_path / "model", python_model=Harmless(), pip_requirements=[])
        (pickled,) = (tmp_path / "model").glob("*.pkl")
        pickled.write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        with pytest.raises(MlflowException, match=r"(?i)pickle"):
            mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()
