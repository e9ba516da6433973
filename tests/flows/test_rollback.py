"""Back to a kept version: model and consumed log version together, whole or not at all."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from data_schemas.dataset import load_spec
from data_schemas.errors import CheckpointError, CorruptCheckpoint, UpdateInProgress
from flows.catching_up import waiting_windows
from flows.rollback import rollback
from flows.settings import settings_for
from pipeline.config import UpdateConfig
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.model_state import restore_or_create
from pipeline.publishing.checkpoint import current_version, read_manifest, undone_versions, versions
from pipeline.rollback import roll_back
from pipeline.update import run_update

HOURS = 4
STREAM = SyntheticConfig(hours=HOURS, rows_per_hour=200, num_users=50, num_items=40, num_authors=8)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> UpdateConfig:
    """A model that has learned four hours; tests work on copies."""
    folder = tmp_path_factory.mktemp("learned")
    write_landing(STREAM, folder / "landing")
    overrides = ["tracking.enabled=false", "model.hidden=[8]", "training.precision=fp32", "keep_checkpoints=3"]
    places = {"landing": str(folder / "landing"), "state_dir": str(folder / "state")}
    config = settings_for(None, overrides, dataset="synthetic", **places)
    spec = load_spec("synthetic")
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=STREAM.hour_start(HOURS + 1))
    learn_all(config)
    return config


@pytest.fixture
def config(learned: UpdateConfig, tmp_path: Path) -> UpdateConfig:
    shutil.copytree(learned.state_dir, tmp_path / "state")
    return learned.model_copy(update={"state_dir": tmp_path / "state"})


def learn_all(config: UpdateConfig) -> int:
    updates = 0
    while run_update(config, now=STREAM.hour_start(HOURS)):
        updates += 1
    return updates


def tables_of(config: UpdateConfig) -> dict[str, bytes]:
    state = restore_or_create(config, load_spec(config.dataset))
    return {piece.name: piece.tensor.contiguous().numpy().tobytes() for piece in state.learner.model.tables.slices()}


def test_what_was_learned_since_is_learned_again_to_the_same_bits(config: UpdateConfig) -> None:
    learned = tables_of(config)
    done = roll_back(config, 2)
    assert (done.before, done.version, done.learned_until) == (4, 2, STREAM.hour_start(2))
    assert tables_of(config) != learned
    assert waiting_windows(config, STREAM.hour_start(HOURS)) == [STREAM.hour_start(2), STREAM.hour_start(3)]
    assert learn_all(config) == 2
    assert tables_of(config) == learned
    assert current_version(config.model_dir) == 6, "numbers of undone versions are not used again"


def test_a_corrupt_later_version_does_not_bring_back_what_was_undone(config: UpdateConfig) -> None:
    roll_back(config, 2)
    assert undone_versions(config.model_dir) == [3, 4]
    assert run_update(config, now=STREAM.hour_start(HOURS)) is not None
    (config.model_dir / "checkpoints/v000005/dense.safetensors").write_bytes(b"rotten")
    assert restore_or_create(config, load_spec(config.dataset)).version == 2


def test_a_rollback_can_be_taken_back(config: UpdateConfig) -> None:
    learned = tables_of(config)
    roll_back(config, 2)
    assert roll_back(config, 4).before == 2
    assert tables_of(config) == learned
    assert undone_versions(config.model_dir) == []
    assert waiting_windows(config, STREAM.hour_start(HOURS)) == []


def test_undone_versions_are_kept_no_longer_than_others(config: UpdateConfig) -> None:
    for _ in range(3):
        roll_back(config, 2)
        learn_all(config)
    assert len(undone_versions(config.model_dir)) <= config.keep_checkpoints
    assert len(versions(config.model_dir)) <= config.keep_checkpoints


def test_without_a_version_it_is_the_one_before(config: UpdateConfig) -> None:
    assert roll_back(config).version == 3
    assert roll_back(config).version == 2
    with pytest.raises(CheckpointError, match=r"no version before 2 is kept .* keep_checkpoints = 3"):
        roll_back(config)


def test_a_version_that_is_not_whole_changes_nothing(config: UpdateConfig) -> None:
    (config.model_dir / "checkpoints/v000003/dense.safetensors").write_bytes(b"rotten")
    with pytest.raises(CorruptCheckpoint, match="v000003"):
        roll_back(config, 3)
    assert current_version(config.model_dir) == 4
    assert read_manifest(config.model_dir, 4).version == 4


def test_an_absent_version_is_named_beside_those_there_are(config: UpdateConfig) -> None:
    with pytest.raises(CheckpointError, match=r"version 9 is not kept .*; there are 2, 3, 4"):
        roll_back(config, 9)


def test_it_waits_for_no_running_update_but_says_so(config: UpdateConfig) -> None:
    with FileLock(config.model_dir / "lock"), pytest.raises(UpdateInProgress, match="is held by"):
        roll_back(config, 3)


def test_the_command_says_what_serves_now(config: UpdateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    rollback(state_dir=str(config.state_dir), version=3, overrides=["tracking.enabled=false"])
    said = capsys.readouterr().out
    assert said.startswith("version 3 serves instead of 4: it had learned until 2026-01-01 03:00 UTC, click-log version")
