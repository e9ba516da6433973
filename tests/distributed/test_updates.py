"""Whole updates are the same on one process and on many; what one number of processes saved, another goes on from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_schemas.dataset import load_spec
from pipeline.config import load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.launch import run_together
from pipeline.model_state import restore_or_create
from pipeline.publishing.report import as_plain
from pipeline.training.processes import Processes
from pipeline.update import run_update

slow = pytest.mark.slow
HOURS = 3
STREAM = SyntheticConfig(hours=HOURS, rows_per_hour=400, num_users=60, num_items=40, num_authors=8, traffic_ratio=1.5)
DECLARATION = """
name = "together"
user = "user_id"
item = "item_id"
event_key = ["event_id"]
crosses = [["device", "placement"]]
ages = ["item_id"]
[time]
column = "event_time"
[label]
column = "label"
[[categorical]]
name = "user_id"
type = "integer"
capacity = 8192
ids = "admitted"
admit_after = 3
[[categorical]]
name = "item_id"
capacity = 4096
[[categorical]]
name = "device"
capacity = 16
[[categorical]]
name = "placement"
capacity = 32
[[categorical]]
name = "tags"
many = true
capacity = 1024
[[numeric]]
name = "item_price"
[[counters]]
over = ["item_id"]
half_lives_hours = [1.0, 24.0]
[history]
of = ["item_id"]
length = 5
"""
SETTINGS = (
    "training.precision=fp32",
    "training.batch_size=64",
    "training.micro_batch_size=16",
    "training.sparse_step_rows=128",
    "model.hidden=[8]",
    "model.interaction_dim=8",
    "tracking.enabled=false",
    "evaluation.probe_rows=0",
    "gate.action=enforce",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A click log of some hours, the declaration beside it."""
    (tmp_path / "together.toml").write_text(DECLARATION)
    write_landing(STREAM, tmp_path / "landing")
    config = load_config(overrides=overrides(tmp_path, "one"))
    log = ClickLog.open_or_create(config.log_path, load_spec(config.dataset))
    quarantine = Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, load_spec(config.dataset), now=STREAM.hour_start(HOURS))
    return tmp_path


def overrides(folder: Path, model: str, *more: str) -> list[str]:
    places = [f"dataset={folder / 'together.toml'}", f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}"]
    return [*places, f"model_name={model}", *SETTINGS, *more]


def updated(folder: Path, model: str, count: int, *more: str) -> list[dict[str, Any]]:
    """The reports of all hours, learned by so many processes."""
    words = overrides(folder, model, *more)
    if count > 1:
        together: list[dict[str, Any]] = run_together("parts:update_all", count, {"overrides": words})[0]
        return together
    reports = []
    while report := run_update(load_config(overrides=words)):
        reports.append(as_plain(report))
    return reports


def numbers(folder: Path, model: str) -> dict[str, np.ndarray]:
    """Everything that a model is made of."""
    config = load_config(overrides=overrides(folder, model))
    state = restore_or_create(config, load_spec(config.dataset), Processes())
    tables = {piece.name: piece.tensor.numpy().copy() for piece in state.learner.model.tables.slices()}
    dense = {name: parameter.detach().numpy() for name, parameter in state.learner.parameters.items()}
    moments = {"optimizer": torch.cat([s["exp_avg_sq"].reshape(-1) for s in state.learner.optimizer.state.values()]).numpy()}
    return tables | dense | moments | state.memory.arrays() | state.ids.arrays() | state.replay.arrays()


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Two runs of the same hours, but for the last bits of floats and for seconds."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name in ("version", "outcome", "rows", "rows_learned", "rows_pending", "evaluated_rows", "skipped_steps", "ids"):
            assert one[name] == other[name], name
        curves = [[point["log_loss"] for point in report["loss_curve"]] for report in (one, other)]
        np.testing.assert_allclose(*curves, rtol=2e-3)
        assert (one["before"] is None) == (other["before"] is None)
        for measure in ("auc", "log_loss") if other["before"] else ():
            assert one["before"][measure] == pytest.approx(other["before"][measure], abs=2e-3)


def assert_same_numbers(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if np.issubdtype(array.dtype, np.floating):
            np.testing.assert_allclose(found[name], array, rtol=2e-2, atol=2e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow), pytest.param(16, marks=slow)])
def test_many_processes_learn_as_one_does(folder: Path, count: int) -> None:
    """With counters, histories, admitted ids and the gate; 16 are more than an hour has row groups."""
    alone, together = updated(folder, "one", 1), updated(folder, "many", count)
    assert_same(together, alone)
    assert any(report["gate"] for report in alone), "a model was judged"
    assert_same_numbers(numbers(folder, "many"), numbers(folder, "one"))
