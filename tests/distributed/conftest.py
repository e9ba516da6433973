"""A small click log that the tests of this folder learn, on any number of processes.

What the processes of these tests are to do is found by them, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import load_config, spec_of
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.launch import run_together
from pipeline.model_state import restore_or_create
from pipeline.publishing.report import as_plain
from pipeline.training.processes import Processes
from pipeline.update import run_update

HOURS = 3
STREAM = SyntheticConfig(hours=HOURS, rows_per_hour=400, num_users=60, num_items=40, num_authors=8, traffic_ratio=1.5)
EXACT = ("version", "outcome", "rows", "rows_learned", "rows_pending", "evaluated_rows", "skipped_steps", "ids")
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


@pytest.fixture(autouse=True)
def _findable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@dataclass(frozen=True, kw_only=True)
class Day:
    """A click log of some hours, and the models that learn it."""

    folder: Path
    hours: int = HOURS

    @property
    def end(self) -> datetime:
        """Of the last hour."""
        return STREAM.hour_start(self.hours)

    def overrides(self, model: str, *more: str) -> list[str]:
        """Settings of a model."""
        folder = self.folder
        places = [f"dataset={folder / 'together.toml'}", f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}"]
        return [*places, f"model_name={model}", *SETTINGS, *more]

    def updated(self, model: str, count: int, *more: str, hours: int = HOURS) -> list[dict[str, Any]]:
        """The reports of the hours that wait, up to `hours`, learned by so many processes."""
        words, now = self.overrides(model, *more), STREAM.hour_start(hours)
        if count > 1:
            arguments = {"overrides": words, "now": now.isoformat()}
            together: list[dict[str, Any]] = run_together("parts:update_all", count, arguments)[0]
            return together
        reports = []
        while report := run_update(load_config(overrides=words), now=now):
            reports.append(as_plain(report))
        return reports

    def numbers(self, model: str, *more: str) -> dict[str, np.ndarray]:
        """Everything that a model is made of."""
        config = load_config(overrides=self.overrides(model, *more))
        state = restore_or_create(config, spec_of(config), Processes())
        learner = state.learner
        tables = {piece.name: piece.tensor.numpy().copy() for piece in learner.model.tables.slices()}
        dense = {name: parameter.detach().numpy() for name, parameter in learner.parameters.items()}
        squares = torch.cat([kept["exp_avg_sq"].reshape(-1) for kept in learner.optimizer.state.values()])
        return tables | dense | {"adam": squares.numpy()} | state.memory.arrays() | state.ids.arrays() | state.replay.arrays()

    def assert_same(self, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        """Two runs of the same hours, but for the last bits of floats and for seconds."""
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            for name in EXACT:
                assert one[name] == other[name], name
            curves = [[point["log_loss"] for point in report["loss_curve"]] for report in (one, other)]
            np.testing.assert_allclose(*curves, rtol=2e-3)
            assert (one["before"] is None) == (other["before"] is None)
            for measure in ("auc", "log_loss") if other["before"] else ():
                assert one["before"][measure] == pytest.approx(other["before"][measure], abs=2e-3)

    def assert_same_numbers(self, model: str, other: str, *more: str) -> None:
        """Two models, but for the last bits of floats."""
        found, expected = self.numbers(model, *more), self.numbers(other, *more)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            if np.issubdtype(array.dtype, np.floating):
                np.testing.assert_allclose(found[name], array, rtol=2e-2, atol=2e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], array, err_msg=name)


def _write_stream(landing: Path) -> None:
    write_landing(STREAM, landing)


@pytest.fixture
def declaration() -> str:
    """Counters, histories, ages, admitted ids, lists of ids."""
    return DECLARATION


@pytest.fixture
def make_day(tmp_path: Path) -> Callable[..., Day]:
    """Ingests what `write` puts into a landing folder, as the declaration reads it."""

    def make(declaration: str = DECLARATION, write: Callable[[Path], object] = _write_stream) -> Day:
        (tmp_path / "together.toml").write_text(declaration)
        (tmp_path / "landing").mkdir()
        write(tmp_path / "landing")
        day = Day(folder=tmp_path)
        config = load_config(overrides=day.overrides("one"))
        log = ClickLog.open_or_create(config.log_path, spec_of(config))
        quarantine = Quarantine.open_or_create(config.quarantine_path)
        ingest_landing(config.landing, log, quarantine, spec_of(config), now=day.end)
        return day

    return make


@pytest.fixture
def day(make_day: Callable[..., Day]) -> Day:
    """Some hours of the synthetic stream, ingested."""
    return make_day()
