"""Updates of a log of clicks only: what is drawn, what it is made of, and what must not see it."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.errors import ConfigError
from data_schemas.examples import F32, Examples
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import SamplingConfig, UpdateConfig, load_config
from pipeline.data.encode import encode
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.loader import to_examples
from pipeline.data.negatives import drawn_examples, require_sampler, with_negatives
from pipeline.model_state import restore_or_create
from pipeline.outcome import UpdateReport
from pipeline.publishing.checkpoint import load_dense, read_manifest
from pipeline.training.learner import Learner
from pipeline.update import run_update
from sampling.negatives import Drawn, draw_negatives

TOML = """
name = "clicks"
user = "user"
item = "item"
item_features = ["author"]
event_key = ["time", "user", "item"]
ages = ["item"]
[time]
column = "time"
[[categorical]]
name = "user"
type = "integer"
capacity = 256
embedding_dim = 8
[[categorical]]
name = "item"
type = "integer"
capacity = 128
embedding_dim = 8
ids = "admitted"
admit_after = 3
[[categorical]]
name = "author"
type = "integer"
capacity = 32
embedding_dim = 8
[[categorical]]
name = "device"
capacity = 8
embedding_dim = 8
[[counters]]
over = ["item"]
of = ["clicks"]
half_lives_hours = [1.0, 24.0]
[history]
of = ["item"]
length = 5
[settings.sampling]
negatives = "popularity"
"""
SETTINGS = ["training.precision='fp32'", "training.batch_size=64", "training.micro_batch_size=32", "tracking.enabled=false"]
HOURS = 3


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    (tmp_path / "clicks.toml").write_text(TOML)
    (tmp_path / "landing").mkdir()
    for hour in range(HOURS):
        pq.write_table(_clicks(hour), tmp_path / "landing" / f"{hour}.parquet")
    places = [f"dataset={tmp_path / 'clicks.toml'}", f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}"]
    config = load_config(overrides=[*places, "model.hidden=[8]", "model.interaction_dim=8", *SETTINGS])
    log, spec = ClickLog.open_or_create(config.log_path, load_spec(config.dataset)), load_spec(config.dataset)
    ingest_landing(config.landing, log, Quarantine.open_or_create(config.quarantine_path), spec, now=datetime.now(UTC))
    return config


def _clicks(hour: int, rows: int = 150) -> pa.Table:
    rng = np.random.default_rng([hour, 6])
    item = np.unique(rng.zipf(1.4, rows * 2) % 40 + 30 * hour + 1)[rng.integers(0, 25, rows)]
    return pa.table(
        {
            "time": pa.array([datetime(2026, 1, 1, hour, tzinfo=UTC)] * rows, pa.timestamp("us", "UTC")),
            "user": np.arange(rows) % 90,
            "item": item,
            "author": item % 7,
            "device": [("phone", "tablet")[user % 2] for user in range(rows)],
        }
    )


def _sampling(config: UpdateConfig, **settings: object) -> UpdateConfig:
    sampling = SamplingConfig.model_validate(config.sampling.model_dump() | settings)
    return config.model_copy(update={"sampling": sampling, "model_name": "-".join(map(str, settings.values())) or "plain"})


def _learn_all(config: UpdateConfig) -> list[UpdateReport]:
    return list(iter(lambda: run_update(config), None))


def _logged(config: UpdateConfig, hour: int) -> Examples:
    table = ClickLog.open_or_create(config.log_path, load_spec(config.dataset))
    return _hours_of(table, config)[hour]


def _hours_of(log: ClickLog, config: UpdateConfig) -> list[Examples]:
    from pipeline.data.lake import RowRange
    from pipeline.data.loader import columns_to_read

    spec = load_spec(config.dataset)
    ranges = [RowRange.whole(file) for file in log.files()]
    return [to_examples(log.read([each], columns_to_read(spec)), spec) for each in ranges]


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in_batch", "hard"])
def test_hours_of_clicks_are_learned_with_drawn_negatives_and_only_clicks_are_remembered(
    config: UpdateConfig, negatives: str
) -> None:
    config, spec = _sampling(config, negatives=negatives), load_spec(config.dataset)
    reports = _learn_all(config)
    hours = _hours_of(ClickLog.open_or_create(config.log_path, spec), config)
    assert [report.rows_learned for report in reports] == [report.rows for report in reports] == [h.num_rows for h in hours]
    assert all("negatives" in report.notes[0] for report in reports)
    assert reports[-1].before is not None
    assert reports[-1].before.rows > 4 * hours[-1].num_rows
    assert reports[-1].before.clicks == hours[-1].num_rows
    memory, ids = Memory(spec), IdTables(spec)
    for examples in hours:
        ids.admit(examples, int(examples.hour_R[0]))
        memory.add(examples, int(examples.hour_R[0]))
    state = restore_or_create(config, spec)
    for expected, got in ((memory.arrays(), state.memory.arrays()), (ids.arrays(), state.ids.arrays())):
        assert {name: array.tobytes() for name, array in expected.items()} == {n: a.tobytes() for n, a in got.items()}


def test_the_same_seed_learns_the_same_model(config: UpdateConfig) -> None:
    found = []
    for name in ("one", "two"):
        again = config.model_copy(update={"model_name": name})
        _learn_all(again)
        found.append(load_dense(again.model_dir, read_manifest(again.model_dir, HOURS)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_no_model_of_drawn_negatives_is_judged_and_its_reports_say_so(config: UpdateConfig) -> None:
    reports = _learn_all(config.model_copy(update={"gate": config.gate.model_copy(update={"action": "enforce"})}))
    assert [(report.outcome, report.gate, report.rows_held_out) for report in reports] == [("published", None, 0)] * HOURS
    assert all(any("judges no model whose negatives are drawn" in note for note in report.notes) for report in reports)


def test_clicks_that_are_out_of_time_wait_and_are_learned_once(config: UpdateConfig) -> None:
    ticks = iter(np.arange(0.0, 1e6))
    slow = config.model_copy(update={"budget": config.budget.model_copy(update={"seconds": 32.0, "min_reserve_seconds": 10})})
    first = run_update(slow, clock=lambda: float(next(ticks)))
    assert first is not None
    assert 0 < first.rows_learned < first.rows
    assert first.rows_pending == first.rows - first.rows_learned
    second = run_update(config)
    assert second is not None
    assert second.rows == _logged(config, 1).num_rows + first.rows_pending
    assert second.rows_learned == second.rows


def test_trailing_hours_come_from_the_click_log_and_are_said_to_leak(config: UpdateConfig) -> None:
    reports = _learn_all(_sampling(config, negatives_trailing_hours=1))
    assert "gives them away" in reports[1].notes[0]
    live = [int(report.notes[0].split(" from ")[1].split(" ")[0]) for report in reports]
    distinct = [set(_logged(config, hour).item_R.tolist()) for hour in range(HOURS)]
    assert live == [len(distinct[0]), len(distinct[0] | distinct[1]), len(distinct[1] | distinct[2])]


def test_a_log_without_negatives_and_without_a_sampler_is_refused(config: UpdateConfig) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.negatives is 'none'.*'popularity'"):
        run_update(_sampling(config, negatives="none"))


def test_a_log_with_a_label_draws_no_further_negatives(small_spec: DatasetSpec) -> None:
    with pytest.raises(ConfigError, match="has a label"):
        require_sampler(small_spec, SamplingConfig(negatives="uniform"))


@pytest.mark.parametrize("role", ["user", "item"])
def test_negatives_need_a_user_and_an_item(small_spec: DatasetSpec, role: str) -> None:
    spec = small_spec.model_copy(update={"label": None, role: None})
    with pytest.raises(ConfigError, match=f"declares no {role!r}"):
        require_sampler(spec, SamplingConfig(negatives="uniform"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"negatives_per_positive": 20}, "hard_candidates"),
        ({"negatives_per_positive": 1}, "left to chance"),
        ({"negative_correction": "logq"}, "no law"),
    ],
)
def test_hard_negatives_that_cannot_be_drawn_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingConfig.model_validate({"negatives": "hard"} | settings)


def test_a_drawn_row_has_its_own_items_features_and_the_clicks_others(
    small_spec: DatasetSpec, small_examples: Callable[..., Examples]
) -> None:
    spec, clicks = small_spec.model_copy(update={"label": None, "item_features": ("tags", "price")}), small_examples(60)
    drawn = draw_negatives(clicks.user_R, clicks.item_R, clicks.hour_R, law="popularity", draws_a_click=3, power=0.75, seed=[1])
    rows = drawn_examples(clicks, drawn, spec)
    price, age = clicks.numeric_NR
    for place, (click, item) in enumerate(zip(drawn.click_D, drawn.item_D, strict=True)):
        assert rows.item_R[place] == rows.single_ids["item"][place] == clicks.item_R[item]
        assert rows.user_R[place] == rows.single_ids["user"][place] == clicks.user_R[click]
        one, other = rows.take(np.array([place])), clicks.take(np.array([item]))
        np.testing.assert_array_equal(one.list_ids["tags"].values_V, other.list_ids["tags"].values_V)
        np.testing.assert_array_equal(rows.numeric_NR[:, place], [price[item], age[click]])
    assert not rows.labels_R.any()


def _no_scores(examples: Examples) -> F32:
    raise AssertionError("only hard negatives are scored")


def test_weights_and_logit_shifts_are_the_same_correction(
    small_spec: DatasetSpec, small_examples: Callable[..., Examples]
) -> None:
    spec, clicks = small_spec.model_copy(update={"label": None}), small_examples(80)
    kinds = ("weights", "logq", "none")
    weights, logq, none = (
        with_negatives(
            clicks, spec, SamplingConfig(negatives="in_batch", negative_correction=kind), seed=[0], scores=_no_scores
        )
        for kind in kinds
    )
    assert logq.shift_R is not None
    assert logq.judged_weights_R is not None
    np.testing.assert_allclose(np.exp(logq.shift_R[80:]), weights.examples.weights_R[80:], rtol=1e-5)
    np.testing.assert_allclose(logq.judged_weights_R, weights.examples.weights_R)
    assert (logq.examples.weights_R == 1).all()
    assert (none.examples.weights_R == 1).all()
    assert none.shift_R is None


def test_shifted_logits_are_what_is_learned(small_spec: DatasetSpec, small_examples: Callable[..., Examples]) -> None:
    """The loss of a step is that of the logits plus the shifts; predictions know nothing of them."""
    from dataclasses import replace

    from models.ctr import build_model
    from models.tables import table_layout
    from pipeline.config import ModelConfig, TrainingConfig
    from pipeline.data.encode import num_dense_columns
    from pipeline.evaluation.score import probabilities
    from pipeline.model_state import architecture

    examples = small_examples(64)
    window = encode(examples, small_spec, Memory(small_spec), None, hour=0)
    device = torch.device("cpu")
    model = build_model(
        architecture(ModelConfig(hidden=(8,), interaction_dim=8)),
        table_layout(small_spec),
        num_dense=num_dense_columns(small_spec),
        sparse_optimizer="adagrad",
        sparse_learning_rate=0.05,
        wide_learning_rate=0.05,
        device=device,
        seed=0,
    )
    learner = Learner(model, TrainingConfig(micro_batch_size=16), precision="fp32", device=device)
    shifts = np.random.default_rng(0).normal(size=64).astype(np.float32)
    before = probabilities(model, learner.dense_weights(averaged=False), window, device=device)
    shifted = replace(window, logit_shifts_R=shifts)
    np.testing.assert_array_equal(before, probabilities(model, learner.dense_weights(averaged=False), shifted, device=device))
    chunk = learner.look_up(shifted.minibatch(np.arange(64)))
    result = learner.step(chunk, slice(0, 64), divisor=64.0, learning_rate=0.001)
    logits = torch.logit(torch.from_numpy(before)) + torch.from_numpy(shifts)
    expected = binary_cross_entropy_with_logits(logits, torch.from_numpy(examples.labels_R))
    assert result.log_loss == pytest.approx(float(expected), rel=1e-5)


def test_the_shipped_declaration_of_reads_draws_by_popularity() -> None:
    config = load_config(overrides=["dataset=brunch_reads"])
    assert config.sampling.negatives == "popularity"
    require_sampler(load_spec("brunch_reads"), config.sampling)


def test_draws_without_any_click_are_no_rows() -> None:
    nothing = np.empty(0, np.uint64)
    drawn = draw_negatives(nothing, nothing, np.empty(0, np.int64), law="uniform", draws_a_click=4, power=0.75, seed=[0])
    assert isinstance(drawn, Drawn)
    assert len(drawn.click_D) == drawn.live_pairs == 0
