"""The whole update on a small synthetic click log: warm start, deadline, corruption, and what reaches the next update."""

import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable
from filelock import FileLock

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.errors import ConfigError, CorruptCheckpoint, DataError, SpecMismatch, UpdateInProgress
from pipeline.config import TrainingConfig, UpdateConfig, load_config, overridden, spec_of
from pipeline.data.encode import EncodedWindow, UserBags, dense_columns, encode, linear_only_places
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.windows import Cursor, next_window, read_window
from pipeline.evaluation.score import probabilities
from pipeline.model_state import ModelState, restore_or_create
from pipeline.outcome import UpdateReport
from pipeline.publishing.checkpoint import current_version, load_dense, read_manifest, versions
from pipeline.publishing.predictor import Predictor, export_predictor, load_predictor
from pipeline.publishing.report import append_history, as_markdown, read_history
from pipeline.training.batch_size import FixedBatch
from pipeline.training.choose_threads import ChosenThreads
from pipeline.training.learn import learn
from pipeline.training.processes import Processes
from pipeline.training.threads import torch_threads
from pipeline.update import run_update

TOML = """
name = "tiny"
user = "user"
item = "item"
event_key = ["event_id"]
crosses = [["user", "item"]]
ages = ["item"]
[time]
column = "time"
[label]
column = "label"
[[categorical]]
name = "user"
type = "integer"
capacity = 42
embedding_dim = 8
ids = "admitted"
admit_after = 4
[[categorical]]
name = "item"
capacity = 128
embedding_dim = 8
ids = "admitted"
admit_after = 6
evict_after_hours = 1
[[categorical]]
name = "tags"
many = true
capacity = 32
embedding_dim = 8
[[categorical]]
name = "hour_of_day"
from_time = "hour_of_day"
capacity = 24
embedding_dim = 8
[[numeric]]
name = "price"
lower = 0.0
[[counters]]
over = ["item"]
half_lives_hours = [1.0, 24.0]
[[counters]]
over = ["user", "item"]
of = ["clicks"]
half_lives_hours = [inf]
[history]
of = ["item"]
length = 5
"""
SETTINGS = ["training.precision='fp32'", "training.batch_size=64", "training.micro_batch_size=32", "tracking.enabled=false"]
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    (tmp_path / "tiny.toml").write_text(TOML)
    (tmp_path / "landing").mkdir()
    places = [f"dataset={tmp_path / 'tiny.toml'}", f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}"]
    return load_config(overrides=[*places, "model.hidden=[8]", "model.interaction_dim=8", *SETTINGS])


def _write_hour(config: UpdateConfig, hour: int, *, rows: int = 300, labels: int | None = None) -> None:
    rng = np.random.default_rng([hour, 5])
    users, items = rng.integers(0, 50, rows), rng.integers(0, 30, rows)
    clicked = rng.random(rows) < 1 / (1 + np.exp(1 - np.sin(users) - np.cos(items)))
    table = pa.table(
        {
            "event_id": [f"{hour}-{i}" for i in range(rows)],
            "time": pa.array([START.replace(day=1 + hour // 24, hour=hour % 24)] * rows, pa.timestamp("us", "UTC")),
            "label": (clicked.astype(int) if labels is None else np.full(rows, labels)).tolist(),
            "user": users,
            "item": [f"i{i}" for i in items],
            "tags": [[f"t{i % 5}"] * (i % 3) for i in items.tolist()],
            "price": pa.array([None if i % 7 == 0 else float(i) for i in items.tolist()], pa.float64()),
        }
    )
    pq.write_table(table, f"{config.landing}/hour-{hour:03d}.parquet")


def _ingest(config: UpdateConfig) -> None:
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))


def _learn_all(config: UpdateConfig) -> list[UpdateReport]:
    reports = []
    while report := run_update(config):
        reports.append(report)
    return reports


def _learn_all_in_memory(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> list[UpdateReport]:
    """As `_learn_all`, but nothing is restored from disk after the first update."""
    import pipeline.update as update

    kept = {}

    def restore_once(settings: UpdateConfig, spec: object) -> object:
        return kept.get("state") or restore_or_create(settings, spec)  # type: ignore[arg-type]

    def save_and_keep(*args: object, **more: object) -> object:
        kept["state"] = original(*args, **more)  # type: ignore[arg-type]
        return kept["state"]

    original = update.save
    monkeypatch.setattr(update, "restore_or_create", restore_once)
    monkeypatch.setattr(update, "save", save_and_keep)
    return _learn_all(config)


def _bits(config: UpdateConfig) -> dict[str, bytes]:
    """Every number that the current checkpoint holds."""
    state = restore_or_create(config, load_spec(config.dataset), Processes())
    manifest = read_manifest(config.model_dir, state.version)
    tensors = load_dense(config.model_dir, manifest)
    tensors |= {piece.name: piece.tensor for piece in state.learner.model.tables.slices()}
    memory = {name: array.tobytes() for name, array in _remembered(state).items()}
    weights = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    return memory | weights | {"moments": str(manifest.moments).encode()}


def _remembered(state: ModelState) -> dict[str, np.ndarray]:
    return state.memory.arrays() | state.ids.arrays() | state.replay.arrays()


def test_a_model_keeps_the_threads_that_it_was_found_fastest_with(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(config.dataset)
    _write_hour(config, 0)
    _write_hour(config, 1)
    _ingest(config)
    monkeypatch.setattr("pipeline.model_state.choose_threads", lambda *_, **__: ChosenThreads(fastest=2, notes=("two",)))
    first = run_update(config)
    assert first is not None
    assert "two" in first.notes
    monkeypatch.setattr("pipeline.model_state.choose_threads", lambda *_, **__: pytest.fail("chosen once more"))
    second = run_update(config)
    assert second is not None
    assert "two" not in second.notes
    assert read_manifest(config.model_dir, 2).fastest_threads == 2
    learner = restore_or_create(config, spec).learner
    assert learner.threads == 1, "no more than torch has"
    with torch_threads(4):
        assert learner.threads == 2
        learner.processes = Processes(rank=0, count=2)
        assert learner.threads is None
    asked = config.model_copy(update={"training": config.training.model_copy(update={"threads": 3})})
    assert restore_or_create(asked, spec).learner.threads == 3


def test_hours_are_learned_in_order_and_the_model_gets_better(config: UpdateConfig) -> None:
    for hour in range(6):
        _write_hour(config, hour, rows=600)
    _ingest(config)
    reports = _learn_all(config)
    assert [report.window_start.hour for report in reports] == list(range(6))
    assert [report.version for report in reports] == list(range(1, 7))
    assert all(report.rows_learned == report.rows == 600 for report in reports)
    assert reports[0].before is None
    last = reports[-1].before
    assert last is not None
    assert last.auc is not None
    assert last.auc > 0.6
    assert run_update(config) is None


def test_twelve_windows_with_a_restart_between_each_equal_twelve_without(
    config: UpdateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update of `config` restores from disk; the others keep their model in memory all along."""
    for hour in range(12):
        _write_hour(config, hour)
    overrides = {"dense_optimizer": "adagrad", "gradient_ema": 0.9, "weight_ema": 0.99, "warmup_steps": 20}
    past = config.sampling.model_copy(update={"replay_share": 0.2, "replay_capacity": 400})
    config = config.model_copy(update={"training": config.training.model_copy(update=overrides), "sampling": past})
    _ingest(config)
    together = config.model_copy(update={"model_name": "together"})
    _learn_all(config)
    reports = _learn_all_in_memory(together, monkeypatch)
    assert len(reports) == 12
    assert sum(report.ids["user"].evicted for report in reports) > 0, "rows changed their owner"
    assert any("past rows were learned again" in note for note in reports[-1].notes)
    assert all(report.rows_learned == report.rows for report in reports), "past rows are not counted twice"
    assert _bits(config) == _bits(together)


@pytest.mark.parametrize(
    "training",
    [
        {"dense_optimizer": "lars", "sparse_gradient_ema": 0.8, "cowclip": True, "cowclip_ratio": 0.01, "sparse_step_rows": 0},
        {"dense_optimizer": "lamb", "sparse_weight_ema": 0.8, "sparse_step_rows": 128},
    ],
    ids=str,
)
def test_optimizers_and_averages_go_on_from_disk_as_they_would_from_memory(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, training: dict[str, object]
) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    checked = TrainingConfig(**{**config.training.model_dump(), **training})
    config = config.model_copy(update={"training": checked})
    _ingest(config)
    together = config.model_copy(update={"model_name": "together"})
    _learn_all(config)
    _learn_all_in_memory(together, monkeypatch)
    assert _bits(config) == _bits(together)


def test_the_averages_of_table_rows_are_what_is_evaluated_and_published(config: UpdateConfig, tmp_path: Path) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    checked = TrainingConfig(**{**config.training.model_dump(), "sparse_weight_ema": 0.9, "sparse_step_rows": 0})
    config = config.model_copy(update={"training": checked})
    _ingest(config)
    report, spec = _learn_all(config)[-1], load_spec(config.dataset)
    state = restore_or_create(config, spec, Processes())
    live, bits = _predicted(state, config, spec), _bits(config)
    export_predictor(state, spec, config.model, tmp_path / "served")
    with state.learner.averaged():
        averaged = _predicted(state, config, spec)
    np.testing.assert_array_equal(_predicted(load_predictor(tmp_path / "served"), config, spec), averaged)
    assert np.abs(averaged - live).max() > 1e-3
    assert _bits(config) == bits, "looking at the averages moves no weight"
    assert report.after is not None


def test_out_of_time_rows_are_learned_by_the_next_update_and_the_budget_holds(config: UpdateConfig) -> None:
    _write_hour(config, 0, rows=600)
    _ingest(config)
    ticks = iter(np.arange(0.0, 1e6))
    slow = config.model_copy(update={"budget": config.budget.model_copy(update={"seconds": 28.0, "min_reserve_seconds": 10})})
    report = run_update(slow, clock=lambda: float(next(ticks)))
    assert report is not None
    assert 0 < report.rows_learned < 600
    assert report.rows_pending == 600 - report.rows_learned
    assert report.total_seconds < 28
    assert any("out of time" in note for note in report.notes)
    assert run_update(config) is None, "pending rows alone make no window"
    _write_hour(config, 1, rows=100)
    _ingest(config)
    after = run_update(config)
    assert after is not None
    assert after.rows == after.rows_learned == 100 + report.rows_pending
    assert after.rows_pending == 0


def test_a_budget_that_holds_no_batch_is_refused_and_the_rows_wait(config: UpdateConfig) -> None:
    _write_hour(config, 0)
    _write_hour(config, 1)
    _ingest(config)
    first = run_update(config)
    assert first is not None
    append_history(config.model_dir, replace(first, fixed_seconds=4.0, row_seconds=0.01))
    planned = ["training.batch_policy=deadline", "training.min_batch_size=128", "budget.min_reserve_seconds=2"]
    with pytest.raises(ConfigError, match=r"budget.seconds = 7 does not hold the reserve of .* at least (7\.\d+|[89])"):
        run_update(overridden(config, [*planned, "budget.seconds=7"]))
    assert [entry["version"] for entry in read_history(config.model_dir)] == [first.version]
    waiting = run_update(config)
    assert waiting is not None
    assert waiting.rows_learned == waiting.rows == 300


def test_an_hour_of_one_class_is_learned_and_has_no_auc(config: UpdateConfig) -> None:
    _write_hour(config, 0)
    _write_hour(config, 1, labels=0)
    _ingest(config)
    _, report = _learn_all(config)
    assert report.before is not None
    assert report.before.auc is None
    assert report.before.log_loss > 0
    assert any("of one class" in note for note in report.notes)


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(config: UpdateConfig) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    _ingest(config)
    _learn_all(config)
    broken = config.model_dir / "checkpoints" / "v000003" / "tables-0-of-1.safetensors"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    report = run_update(config)
    assert report is not None
    assert report.window_start.hour == 2, "the hour of the lost version is learned again"
    assert report.version == 4
    assert any("v000003" in note and "went back" in note for note in report.notes)


def test_a_model_without_any_whole_checkpoint_is_not_silently_new(config: UpdateConfig) -> None:
    _write_hour(config, 0)
    _ingest(config)
    _learn_all(config)
    (config.model_dir / "checkpoints" / "v000001" / "manifest.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* is whole"):
        run_update(config)


def test_another_spec_or_another_architecture_is_refused(config: UpdateConfig, tmp_path: Path) -> None:
    _write_hour(config, 0)
    _ingest(config)
    _learn_all(config)
    wider = config.model_copy(update={"model": config.model.model_copy(update={"hidden": (16,)})})
    with pytest.raises(SpecMismatch, match="another architecture"):
        run_update(wider)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny.toml").write_text(TOML.replace("capacity = 128", "capacity = 64"))
    other = config.model_copy(update={"dataset": str(tmp_path / "other" / "tiny.toml")})
    with pytest.raises(SpecMismatch, match="its features differ"):
        run_update(other)


GROWN = (
    TOML.replace('crosses = [["user", "item"]]', "")
    .replace('ages = ["item"]', "")
    .replace(TOML[TOML.index("[history]") :], "")
    .replace("admit_after = 4", "admit_after = 2")
)
"""A declaration that `TOML` adds to, and that admits other ids: below, its order is another as well."""


@pytest.mark.parametrize(
    ("kind", "smoothed"),
    [
        ("deepfm", {}),
        ("deepfm", {"dense_optimizer": "adagrad", "gradient_ema": 0.9}),
        ("dcnv2", {}),
        ("dlrm", {}),
        ("linear", {}),
    ],
)
def test_a_new_feature_keeps_the_trained_model_and_starts_from_zero_effect(
    config: UpdateConfig, tmp_path: Path, kind: str, smoothed: dict[str, object]
) -> None:
    smaller = GROWN[: GROWN.index('[[categorical]]\nname = "hour_of_day"')] + GROWN[GROWN.index("[[numeric]]") :]
    smaller = smaller[: smaller.index('[[counters]]\nover = ["user", "item"]')]
    notes = {"cross user x item", "counter of user, item", "age of item"}
    notes |= {"feature hour_of_day", "history of item"} if kind != "linear" else set()
    _check_growth(config, tmp_path, (smaller, TOML), notes, kind=kind, smoothed=smoothed)


@pytest.mark.parametrize("kind", ["deepfm", "dcnv2", "dlrm"])
def test_attention_to_clicks_keeps_the_trained_model_and_starts_from_zero_effect(
    config: UpdateConfig, tmp_path: Path, kind: str
) -> None:
    attending = TOML.replace("length = 5", "length = 5\nattended_clicks = 3")
    _check_growth(config, tmp_path, (TOML, attending), {"attention to item"}, kind=kind)


@pytest.mark.parametrize("kind", ["deepfm", "dcnv2", "dlrm"])
def test_counters_that_the_network_does_not_see_are_saved_added_to_and_served(
    config: UpdateConfig, tmp_path: Path, kind: str
) -> None:
    linear = TOML.replace('over = ["item"]\n', 'over = ["item"]\nlinear_only = ["ctr", "impressions"]\n')
    larger = linear + '[[counters]]\nover = ["user"]\nof = ["clicks", "ctr"]\nlinear_only = ["ctr"]\n'
    spec = DatasetSpec.model_validate(tomllib.loads(larger))
    places = linear_only_places(spec)
    assert [dense_columns(spec)[place] for place in places] == [
        "ctr_1h(item)", "ctr_24h(item)", "impressions_1h(item)", "impressions_24h(item)",
        "ctr_1h(user)", "ctr_24h(user)", "ctr_168h(user)",
    ]  # fmt: skip
    learned, served = _check_growth(config, tmp_path, (linear, larger), {"counter of user"}, kind=kind)
    for net in (learned.learner.model.net, served.model.net):
        assert net.seen_M is not None
        assert net.seen_M.tolist() == [place for place in range(len(dense_columns(spec))) if place not in places]


def _check_growth(
    config: UpdateConfig,
    tmp_path: Path,
    declarations: tuple[str, str],
    notes: set[str],
    *,
    kind: str,
    smoothed: Mapping[str, object] = MappingProxyType({}),
) -> tuple[ModelState, Predictor]:
    """A model that was trained by the smaller declaration predicts the same by the larger one, learns all of it, and serves."""
    smaller, larger = declarations
    (tmp_path / "tiny.toml").write_text(smaller)
    parts = {
        "model": config.model.model_copy(update={"kind": kind, "interaction_dim": 12}),
        "training": config.training.model_copy(update=dict(smoothed)),
    }
    config = config.model_copy(update=parts)
    for hour in range(5):
        _write_hour(config, hour)
    _ingest(config)
    for _ in range(3):
        assert run_update(config) is not None
    old, old_spec = restore_or_create(config, spec_of(config), Processes()), spec_of(config)
    (tmp_path / "tiny.toml").write_text(larger)
    spec = spec_of(config)
    new = restore_or_create(config, spec, Processes())
    before, after = (_predicted(state, config, spec) for state, spec in ((old, old_spec), (new, spec)))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
    assert {note.partition(" is new")[0] for note in new.notes} == notes
    for _ in range(2):
        assert run_update(config) is not None
    learned = restore_or_create(config, spec, Processes())
    assert learned.notes == ()
    for name, parameter in learned.learner.parameters.items():
        assert not torch.equal(parameter, new.learner.parameters[name]), f"{name} is learned"
    export_predictor(learned, spec, config.model, tmp_path / "served")
    served = load_predictor(tmp_path / "served")
    np.testing.assert_array_equal(_predicted(served, config, spec), _predicted(learned, config, spec))
    return learned, served


def _predicted(by: ModelState | Predictor, config: UpdateConfig, spec: DatasetSpec) -> np.ndarray:
    """Probabilities of the first hour's rows, as if they came again now."""
    log = ClickLog.open_or_create(config.log_path, spec)
    window = next_window(log, Cursor(), config.window, datetime.now(UTC))
    assert window is not None
    examples = to_examples(read_window(log, window, columns_to_read(spec)), spec)
    if isinstance(by, Predictor):
        return by.predict_examples(examples)
    encoded = encode(examples, spec, by.memory, by.moments, hour=window.start, ids=by.ids)
    learner = by.learner
    return probabilities(learner.model, learner.dense_weights(averaged=True), encoded, device=learner.device)


def test_some_features_may_have_no_embedding(config: UpdateConfig, tmp_path: Path) -> None:
    """Their wide weights are learned and served all the same."""
    shallow = 'name = "user"\ntype = "integer"\ncapacity = 42\nembedding_dim = '
    assert f"{shallow}8" in TOML
    (tmp_path / "tiny.toml").write_text(TOML.replace(f"{shallow}8", f"{shallow}0"))
    for hour in range(3):
        _write_hour(config, hour)
    _ingest(config)
    spec = spec_of(config)
    for kind in ("deepfm", "dcnv2", "dlrm"):
        own = config.model_copy(update={"model": config.model.model_copy(update={"kind": kind}), "model_name": kind})
        _learn_all(own)
        state = restore_or_create(own, spec, Processes())
        weights = {piece.name: piece.tensor for piece in state.learner.model.tables.slices(with_optimizer=False)}
        assert "deep.user.weight" not in weights
        assert weights["wide.user.weight"].any()
        export_predictor(state, spec, own.model, tmp_path / kind)
        served = load_predictor(tmp_path / kind)
        np.testing.assert_array_equal(_predicted(served, own, spec), _predicted(state, own, spec))


@pytest.mark.parametrize(("before", "after"), [("deepfm", "linear"), ("linear", "deepfm"), ("deepfm", "dlrm")])
def test_another_kind_of_model_is_refused_as_what_it_is(config: UpdateConfig, before: str, after: str) -> None:
    _write_hour(config, 0)
    _ingest(config)
    first, second = (
        config.model_copy(update={"model": config.model.model_copy(update={"kind": kind})}) for kind in (before, after)
    )
    _learn_all(first)
    with pytest.raises(SpecMismatch, match="has another architecture or optimizer"):
        run_update(second)


def test_a_feature_that_is_taken_away_is_refused(config: UpdateConfig, tmp_path: Path) -> None:
    _write_hour(config, 0)
    _ingest(config)
    _learn_all(config)
    for changed in (GROWN, TOML.replace("half_lives_hours = [1.0, 24.0]", "half_lives_hours = [1.0, 24.0, 48.0]")):
        (tmp_path / "tiny.toml").write_text(changed)
        with pytest.raises(SpecMismatch, match="its features differ"):
            run_update(config)


def test_ids_seen_often_enough_are_learned_at_once_and_reported(config: UpdateConfig) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    _ingest(config)
    first, _, last = _learn_all(config)
    assert first.ids["item"].new_share == 1.0
    assert first.ids["item"].admitted == first.ids["item"].stored > 0
    assert last.ids["item"].new_share < 0.2
    assert last.ids["user"].stored <= 40
    assert "| item |" in as_markdown(last)


def test_an_update_in_progress_is_respected(config: UpdateConfig) -> None:
    config.model_dir.mkdir(parents=True)
    with FileLock(config.model_dir / "lock"), pytest.raises(UpdateInProgress, match="is held by"):
        run_update(config)


def test_a_full_disk_leaves_the_model_before_and_the_rows_waiting(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_hour(config, 0)
    _write_hour(config, 1)
    _ingest(config)
    assert run_update(config) is not None
    assert run_update(config) is not None
    done = current_version(config.model_dir)
    import safetensors.torch

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        _write_hour(config, 2)
        _ingest(config)
        with pytest.raises(OSError, match="No space left"):
            run_update(config)
    assert current_version(config.model_dir) == done
    assert not list((config.model_dir / "checkpoints").glob("*.tmp"))
    report = run_update(config)
    assert report is not None
    assert report.version == (done or 0) + 1


def test_only_the_last_checkpoints_are_kept(config: UpdateConfig) -> None:
    for hour in range(5):
        _write_hour(config, hour)
    _ingest(config)
    _learn_all(config.model_copy(update={"keep_checkpoints": 2}))
    assert versions(config.model_dir) == [4, 5]


def test_a_frozen_model_is_measured_beside_the_fresh_one(config: UpdateConfig) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    _ingest(config)
    frozen = config.evaluation.model_copy(update={"frozen_after_updates": 1})
    reports = _learn_all(config.model_copy(update={"evaluation": frozen}))
    assert reports[0].frozen is None
    assert reports[1].frozen == reports[1].before, "after one update the frozen model is the current one"
    assert reports[2].frozen != reports[2].before


def test_the_predictor_answers_raw_rows_as_training_does(config: UpdateConfig, tmp_path: Path) -> None:
    _write_hour(config, 0)
    _ingest(config)
    _learn_all(config)
    spec = load_spec(config.dataset)
    state = restore_or_create(config, spec, Processes())
    export_predictor(state, spec, config.model, tmp_path / "served")
    served = load_predictor(tmp_path / "served")
    frame = pd.DataFrame(
        {
            "user": [1, 2, None],
            "item": ["i1", None, "never seen"],
            "tags": [["t1", "t2"], "t1|t2", None],
            "price": [3.0, None, 1e9],
            "event_time": ["2026-01-01T00:00:00Z"] * 3,
        }
    )
    answers = served.predict(frame)
    assert ((answers > 0) & (answers < 1)).all()
    np.testing.assert_array_equal(answers[:1], served.predict(frame[:1]))
    with pytest.raises(DataError, match="no column 'item'"):
        served.predict(frame.drop(columns=["item"]))
    with pytest.raises(DataError, match="'event_time'"):
        served.predict(frame.drop(columns=["event_time"]))
    with pytest.raises(DataError, match="column 'user' must hold int64"):
        served.predict(frame.assign(user=["a", "b", "c"]))


def test_a_killed_update_leaves_nothing_that_disturbs_the_next(config: UpdateConfig) -> None:
    _write_hour(config, 0)
    _ingest(config)
    leftover = config.model_dir / "checkpoints" / "v000001.tmp"
    leftover.mkdir(parents=True)
    (leftover / "dense.safetensors").write_bytes(b"half")
    report = run_update(config)
    assert report is not None
    assert report.version == 1
    assert not leftover.exists()


def test_two_models_have_their_own_cursor_on_one_click_log(config: UpdateConfig) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    _ingest(config)
    assert len(_learn_all(config)) == 3
    window = config.window.model_copy(update={"hours": 24})
    nightly = _learn_all(config.model_copy(update={"model_name": "nightly", "window": window}))
    assert [report.rows for report in nightly] == [900]


def test_random_state_is_restored(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is moved on before it is saved, so that it differs from what building a model leaves behind."""
    import pipeline.update as update

    original = update.save

    def draw_and_save(*args: object, **more: object) -> object:
        torch.rand(7)
        return original(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(update, "save", draw_and_save)
    _write_hour(config, 0)
    _ingest(config)
    _learn_all(config)
    saved = load_dense(config.model_dir, read_manifest(config.model_dir, 1))["random.torch"]
    restore_or_create(config, load_spec(config.dataset), Processes())
    assert torch.equal(torch.get_rng_state(), saved)


def test_labels_of_an_hour_do_not_reach_that_hours_inputs(config: UpdateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams that differ in the labels of their last hour alone: what the model is fed in that hour is the same."""
    import pipeline.data.window_rows as window_rows

    fed: list[EncodedWindow] = []

    def encode_and_record(*args: object, **more: object) -> EncodedWindow:
        fed.append(encode(*args, **more))  # type: ignore[arg-type]
        return fed[-1]

    monkeypatch.setattr(window_rows, "encode", encode_and_record)
    for name, labels in (("first", 1), ("second", 0)):
        stream = config.model_copy(
            update={"landing": f"{config.landing}/{name}", "state_dir": config.state_dir / name, "model_name": name}
        )
        Path(stream.landing).mkdir()
        for hour in range(2):
            _write_hour(stream, hour)
        _write_hour(stream, 2, labels=labels)
        _ingest(stream)
        _learn_all(stream)
    first, second = fed[2], fed[5]
    assert len(fed) == 6
    assert first.labels_R.sum() == 300
    assert second.labels_R.sum() == 0
    assert first.raw_dense_NR.any()
    np.testing.assert_array_equal(first.dense_RN, second.dense_RN)
    assert first.histories is not None
    assert second.histories is not None
    for key, bags in first.histories.pools.items():
        np.testing.assert_array_equal(bags.rows_V, second.histories.pools[key].rows_V)
        np.testing.assert_array_equal(bags.weights_V, second.histories.pools[key].weights_V)


def test_a_history_is_looked_up_once_a_user_and_learned_from_every_row(config: UpdateConfig) -> None:
    """With histories carried by one row a user, logits and gradients equal those of histories on every row."""
    spec = load_spec(config.dataset)
    for hour in range(2):
        _write_hour(config, hour)
    _ingest(config)
    _learn_all(config)
    state = restore_or_create(config, spec, Processes())
    log = ClickLog.open_or_create(config.log_path, spec)
    window = next_window(log, Cursor(), config.window, datetime.now(UTC))
    assert window is not None
    examples = to_examples(read_window(log, window, columns_to_read(spec)), spec).take(np.arange(120))
    encoded = encode(examples, spec, state.memory, state.moments, hour=window.end + 1, ids=state.ids)
    assert encoded.histories is not None
    by_row = UserBags(
        user_R=np.arange(120),
        pools={key: bags.take(encoded.histories.user_R) for key, bags in encoded.histories.pools.items()},
    )
    weights = []
    for form in (encoded, replace(encoded, histories=by_row)):
        learner = restore_or_create(config, spec, Processes()).learner
        learn(learner, form, seed=[0], policy=FixedBatch(batch_size=40, learning_rate=0.01))
        weights.append({piece.name: piece.tensor.clone() for piece in learner.model.tables.slices()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_lost_pointer_or_a_lost_folder_makes_no_new_model(config: UpdateConfig) -> None:
    for hour in range(3):
        _write_hour(config, hour)
    _ingest(config)
    _learn_all(config)
    (config.model_dir / "CURRENT").unlink()
    assert restore_or_create(config, load_spec(config.dataset), Processes()).version == 3
    (config.model_dir / "CURRENT").write_text("v000003\n")
    shutil.rmtree(config.model_dir / "checkpoints" / "v000003")
    state = restore_or_create(config, load_spec(config.dataset), Processes())
    assert state.version == 2
    assert any("v000003" in note for note in state.notes)
    shutil.rmtree(config.model_dir / "checkpoints")
    with pytest.raises(CorruptCheckpoint, match="is whole"):
        run_update(config)


def test_a_compacted_click_log_is_refused_before_anything_is_learned_twice(config: UpdateConfig) -> None:
    for hour in range(2):
        _write_hour(config, hour)
        _ingest(config)
        _write_hour(config, hour, rows=310)
        _ingest(config)
    _learn_all(config)
    DeltaTable(config.log_path).optimize.compact()
    _write_hour(config, 2)
    _ingest(config)
    with pytest.raises(DataError, match="were rewritten or removed"):
        run_update(config)
