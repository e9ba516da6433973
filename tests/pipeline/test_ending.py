"""An update that ends between its checkpoint and its report is ended by the next one."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import pipeline.update as update
from data_schemas.dataset import load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.ending import INTERRUPTED, UNFINISHED
from pipeline.publishing import checkpoint
from pipeline.publishing.checkpoint import current_version
from pipeline.publishing.report import read_history
from pipeline.update import run_update

NOW = datetime.now(UTC) + timedelta(days=365)


class Killed(BaseException):
    """As a signal would."""


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    write_landing(SyntheticConfig(hours=2, rows_per_hour=300), tmp_path / "landing")
    places = [f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}", "tracking.enabled=false"]
    config = load_config(
        overrides=[*places, "training.precision='fp32'", "model.hidden=[8]", "evaluation.frozen_after_updates=1"]
    )
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=NOW)
    return config


def die(*_: object, **__: object) -> None:
    raise Killed


def _interrupt(monkeypatch: pytest.MonkeyPatch, place: object, name: str, config: UpdateConfig) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(place, name, die)
        with pytest.raises(Killed):
            run_update(config)


@pytest.mark.parametrize(
    ("place", "name"),
    [(update, "end_update"), (update, "freeze"), (checkpoint, "settle")],
    ids=["before the report", "before the frozen model", "before CURRENT moved"],
)
def test_a_saved_model_is_published_by_the_next_update(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    _interrupt(monkeypatch, place, name, config)
    assert read_history(config.model_dir) == []
    second = run_update(config)
    assert second is not None
    first = read_history(config.model_dir)[0]
    assert (first["version"], second.version) == (1, 2)
    log = ClickLog.open_or_create(config.log_path, load_spec(config.dataset))
    assert first["rows_learned"] + second.rows_learned == sum(file.num_rows for file in log.files())
    assert INTERRUPTED in first["notes"]
    assert first["window_end"] == second.window_start.isoformat()
    assert current_version(config.model_dir) == 2
    assert (config.model_dir / "frozen").is_dir()
    assert not (config.model_dir / UNFINISHED).exists()
    assert second.frozen == second.before, "the first version was frozen, not a later one"


def test_where_no_window_waits_it_is_ended_all_the_same(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_update(config)
    _interrupt(monkeypatch, update, "end_update", config)
    assert run_update(config) is None
    assert [record["version"] for record in read_history(config.model_dir)] == [1, 2]


def test_what_was_not_saved_is_learned_again(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt(monkeypatch, update, "save", config)
    assert (config.model_dir / UNFINISHED).exists()
    report = run_update(config)
    assert report is not None
    assert (report.version, report.rows_learned) == (1, report.rows)
    assert INTERRUPTED not in report.notes
    assert len(read_history(config.model_dir)) == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"report": {}}', b"[1]"])
def test_a_note_that_cannot_be_read_stops_nothing(config: UpdateConfig, content: bytes) -> None:
    config.model_dir.mkdir(parents=True)
    (config.model_dir / UNFINISHED).write_bytes(content)
    assert run_update(config) is not None
    assert not (config.model_dir / UNFINISHED).exists()


@pytest.mark.parametrize("name", ["forget_unpublished", "append_history"])
def test_a_window_that_was_held_aside_is_reported(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def rejected(make: Callable[..., object]) -> Callable[..., object]:
        def judged(*given: object) -> object:
            state, verdict = make(*given)  # type: ignore[misc]
            return state, verdict and update.replace(verdict, decision="reject", reason="for the test")

        return judged

    run_update(config)
    strict = config.model_copy(update={"gate": config.gate.model_copy(update={"action": "enforce"})})
    monkeypatch.setattr(update, "_judge", rejected(update._judge))
    _interrupt(monkeypatch, update, name, strict)
    assert len(read_history(config.model_dir)) == 1
    assert run_update(strict) is None
    records = read_history(config.model_dir)
    assert [record["outcome"] for record in records] == ["published", "rejected"]
    assert not (config.model_dir / UNFINISHED).exists()
    assert np.isfinite(records[1]["rows"])


def test_a_model_that_is_not_proven_is_not_frozen_but_the_next_that_serves(config: UpdateConfig) -> None:
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"frozen_after_updates": 2})})
    run_update(config)
    undecided = config.gate.model_copy(
        update={"action": "enforce", "auc_margin": 1e-6, "false_rejections": 1e-6, "max_churn": 10}
    )
    held = run_update(config.model_copy(update={"gate": undecided}))
    assert held is not None
    assert (held.outcome, held.version) == ("held", 2)
    assert not (config.model_dir / "frozen").exists()
    write_landing(SyntheticConfig(hours=3, rows_per_hour=300), Path(config.landing))
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=NOW)
    served = run_update(config)
    assert served is not None
    assert (served.outcome, served.version) == ("published", 3)
    assert (config.model_dir / "frozen").is_dir()
