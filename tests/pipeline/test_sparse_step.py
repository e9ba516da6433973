"""Clipping and averaging row by row: against dense references that know nothing of sparse rows."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn.functional import embedding_bag

from data_schemas.dataset import DatasetSpec, History
from data_schemas.errors import ConfigError
from data_schemas.examples import Examples
from models.ctr import build_model
from models.loss import weighted_log_loss_sum
from models.memory import Memory
from models.row_gradients import RowGradients
from models.tables import table_layout
from pipeline.config import ModelConfig, TrainingConfig
from pipeline.data.encode import EncodedWindow, encode, num_dense_columns
from pipeline.model_state import architecture
from pipeline.training.batch_size import FixedBatch
from pipeline.training.cowclip import clip_by_count
from pipeline.training.learn import learn
from pipeline.training.learner import Learner
from pipeline.training.processes import Processes
from pipeline.training.smoothing import RowGradientAverage, RowWeightAverage

CPU = torch.device("cpu")
RATE = 0.1
MakeExamples = Callable[..., Examples]


@pytest.fixture
def spec(small_spec: DatasetSpec) -> DatasetSpec:
    """Single ids, a list, a cross, and histories that are pooled, and attended to, in the table of their item."""
    history = History(of=("item",), length=5, pool_half_lives_hours=(float("inf"), 6.0), attended_clicks=2)
    return small_spec.model_copy(update={"history": history, "crosses": (("user", "item"),), "cross_capacity": 64})


@pytest.fixture
def window(spec: DatasetSpec, small_examples: MakeExamples) -> EncodedWindow:
    """The second hour, so that users have a history; some rows stand for two."""
    memory = Memory(spec)
    memory.add(small_examples(300), 0)
    examples = small_examples(400, seed=1, hour=1)
    weights = np.where(np.arange(400) % 5 == 0, 2, 1).astype(np.float32)
    return encode(examples.with_weights(weights), spec, memory, None, hour=1)


def _learner(
    spec: DatasetSpec, processes: Processes | None = None, kind: Literal["deepfm", "linear"] = "deepfm", **training: Any
) -> Learner:
    plain = {"sparse_step_rows": 0, "sparse_learning_rate": RATE, "wide_learning_rate": RATE, "weight_ema": 0.0}
    config = TrainingConfig(**{**plain, **training})
    model = build_model(
        architecture(ModelConfig(kind=kind, hidden=(16, 8), interaction_dim=8)),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer=config.sparse_optimizer,
        sparse_learning_rate=config.sparse_learning_rate,
        wide_learning_rate=config.wide_learning_rate,
        device=CPU,
        seed=0,
    )
    return Learner(model, config, precision="fp32", device=CPU, processes=processes)


def _tables(learner: Learner) -> dict[str, torch.Tensor]:
    return {piece.name: piece.tensor.clone() for piece in learner.model.tables.slices()}


def _pass(learner: Learner, window: EncodedWindow, seed: int = 1) -> None:
    learn(learner, window, seed=[seed], policy=FixedBatch(batch_size=64, learning_rate=0.01))


def _assert_learned_alike(first: Learner, second: Learner, start: dict[str, torch.Tensor]) -> None:
    """Both have the same tables, each of which is another than at the start."""
    others = _tables(first)
    for name, tensor in _tables(second).items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(others[name], tensor, atol=1e-4, rtol=1e-3)


def _dense_gradients(learner: Learner, window: EncodedWindow, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Of whole tables, by torch's own embedding bags, for the mean loss of these rows."""
    batch, layout = window.minibatch(rows), learner.model.layout
    weights = {name: tensor[:].requires_grad_() for name, tensor in _tables(learner).items() if name.endswith(".weight")}

    def pooled(ids: Any, part: str, key: str) -> torch.Tensor:
        table = next(table for table in getattr(layout, part) if key in table.lookups)
        weight = weights[f"{part}.{table.name}.weight"]
        bags = ids[key]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), bags.lengths().cumsum(0)[:-1]])
        return embedding_bag(bags.values(), weight, offsets, mode="sum", per_sample_weights=bags.weights())

    deep_BS = torch.cat([pooled(batch.deep, "deep", key) for key in layout.deep_keys], dim=1)
    wide_BW = torch.cat([pooled(batch.wide, "wide", key) for key in layout.wide_keys], dim=1)
    logits_B = learner.model.net(layout.with_history(deep_BS, batch.history_row_B), wide_BW, batch.dense_BN)
    (weighted_log_loss_sum(logits_B, batch.labels_B, batch.weights_B) / len(rows)).backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def _occurrences(window: EncodedWindow, layout: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Counted example by example."""
    counts = {table.name: np.zeros(table.rows) for table in layout.deep}
    assert window.histories is not None
    for row in rows:
        weight = window.weights_R[row]
        for place, key in enumerate(window.single_keys):
            if key in counts:
                counts[key][window.single_RK[row, place]] += weight
        tags = window.bags["tags"]
        for tag in tags.rows_V[tags.offsets[row] : tags.offsets[row + 1]]:
            counts["tags"][tag] += weight
        user = window.histories.user_R[row]
        for bags in window.histories.pools.values():
            for item in bags.rows_V[bags.offsets[user] : bags.offsets[user + 1]]:
                counts["item"][item] += weight
        clicks = next(iter(window.histories.pools.values()))
        for item in clicks.rows_V[clicks.offsets[user] : clicks.offsets[user + 1]][-2:]:
            counts["item"][item] += weight
    return counts


def test_cowclip_equals_a_slow_dense_reference(spec: DatasetSpec, window: EncodedWindow) -> None:
    """Row-wise Adagrad on gradients that are clipped one table row after the other."""
    ratio, least, rows = 0.01, 1e-4, np.arange(80)
    learner = _learner(spec, cowclip=True, cowclip_ratio=ratio, cowclip_least=least)
    before, gradients = _tables(learner), _dense_gradients(learner, window, rows)
    counts, clipped, touched = _occurrences(window, learner.model.layout, rows), 0, 0
    expected = {}
    for table in learner.model.layout.deep:
        name = f"deep.{table.name}.weight"
        weight, gradient = before[name].double().numpy(), gradients[name].double().numpy()
        for row, count in enumerate(counts[table.name]):
            bound = count * max(ratio * np.linalg.norm(weight[row]), least)
            length = np.linalg.norm(gradient[row])
            touched += count > 0
            if length > bound:
                clipped += 1
                gradient[row] *= bound / length
        step = RATE * gradient / (np.sqrt((gradient**2).mean(axis=1, keepdims=True)) + 1e-8)
        expected[name] = weight - step
    chunk = learner.look_up(window.minibatch(rows))
    learner.step(chunk, slice(0, len(rows)), divisor=len(rows), learning_rate=0.01)
    learner.finish(chunk)
    assert 0.05 * touched < clipped < 0.95 * touched, "some rows are clipped, some are not"
    assert (learner.sparse_step.rows_clipped, learner.sparse_step.rows_stepped) == (clipped, touched)
    after = _tables(learner)
    for name, weight in expected.items():
        np.testing.assert_allclose(after[name].numpy(), weight, atol=2e-5, err_msg=name)
        accumulator = after[name.replace("weight", "accumulator")].numpy()
        assert (accumulator[:, 0] > 0).sum() == (counts[name.split(".")[1]] > 0).sum()
    for name in ("wide.user.weight", "wide.user x item.weight"):
        step = before[name] - RATE * gradients[name] / (gradients[name].abs() + 1e-8)
        np.testing.assert_allclose(after[name].numpy(), step.numpy(), atol=1e-4, err_msg="wide weights are not clipped")


@pytest.mark.parametrize("sparse_optimizer", ["adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("sparse_step_rows", [0, 150])
def test_a_bound_that_never_binds_changes_nothing(
    spec: DatasetSpec, window: EncodedWindow, sparse_optimizer: str, sparse_step_rows: int
) -> None:
    same = {"sparse_optimizer": sparse_optimizer, "sparse_step_rows": sparse_step_rows}
    fused, by_row = _learner(spec, **same), _learner(spec, **same, cowclip=True, cowclip_least=1e9)
    start = _tables(fused)
    _pass(fused, window)
    _pass(by_row, window)
    assert by_row.sparse_step.rows_clipped == 0
    _assert_learned_alike(by_row, fused, start)


def test_a_bound_that_never_binds_changes_nothing_where_every_row_has_one_id_of_each_feature(
    small_spec: DatasetSpec, small_examples: MakeExamples
) -> None:
    """Lookups then pass the weights of ids by; but tables have different numbers of distinct rows to step."""
    singles = tuple(feature for feature in small_spec.categorical if not feature.many)
    spec = small_spec.model_copy(update={"categorical": singles})
    assert not table_layout(spec).weighted
    window = encode(small_examples(400), spec, Memory(spec), None, hour=0)
    fused, by_row = _learner(spec), _learner(spec, cowclip=True, cowclip_least=1e9)
    start = _tables(fused)
    _pass(fused, window)
    _pass(by_row, window)
    _assert_learned_alike(by_row, fused, start)


def test_a_linear_model_steps_by_row_as_it_does_at_once(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    """It has no embeddings to clip; an average of gradients that forgets at once, and one beside the weights, change none."""
    spec = small_spec.linear()
    window = encode(small_examples(400), spec, Memory(spec), None, hour=0)
    at_once = _learner(spec, kind="linear")
    start = _tables(at_once)
    _pass(at_once, window)
    for settings in ({"cowclip": True}, {"sparse_gradient_ema": 1e-6}, {"sparse_weight_ema": 0.5}):
        by_row = _learner(spec, kind="linear", **settings)
        _pass(by_row, window)
        assert by_row.sparse_step.rows_stepped == 0
        _assert_learned_alike(by_row, at_once, start)


def test_an_id_seen_more_often_may_have_a_longer_gradient() -> None:
    gradient_UD, weight_UD = torch.full((3, 2), 5.0), torch.ones(3, 2)
    clipped_UD, count = clip_by_count(gradient_UD, weight_UD, torch.tensor([1.0, 2.0, 100.0]), ratio=1.0, least=0.0)
    assert count == 2
    torch.testing.assert_close(clipped_UD.norm(dim=1), torch.tensor([2**0.5, 2 * 2**0.5, 50**0.5]))


def test_rows_of_a_batch_that_was_not_learned_are_not_touched(spec: DatasetSpec, window: EncodedWindow) -> None:
    learner = _learner(spec, sparse_gradient_ema=0.9)
    rows = np.arange(128)
    chunk = learner.look_up(window.minibatch(rows))
    learner.step(chunk, slice(0, 64), divisor=64, learning_rate=0.01)
    learner.finish(chunk)
    average = learner.sparse_step.gradient_average
    assert average is not None
    touched = np.flatnonzero(average.touched["deep.user.weight"].numpy())
    place = window.single_keys.index("user")
    np.testing.assert_array_equal(touched, np.unique(window.single_RK[rows[:64], place]))


def _touches(steps: int, rows: int = 6, dim: int = 2) -> list[RowGradients]:
    rng = np.random.default_rng(4)
    drawn = [np.flatnonzero(rng.random(rows) < 0.3) for _ in range(steps)]
    return [
        RowGradients(
            part="deep",
            table="t",
            rows_U=torch.from_numpy(rows_U),
            gradient_UD=torch.from_numpy(rng.normal(size=(len(rows_U), dim)).astype(np.float32)),
            count_U=torch.ones(len(rows_U)),
        )
        for rows_U in drawn
    ]


def test_the_lazy_average_of_gradients_equals_a_dense_one() -> None:
    weight, decay = torch.zeros(6, 2), 0.9
    lazy, dense = RowGradientAverage({"deep.t.weight": weight}, decay), np.zeros((6, 2))
    for step, of in enumerate(_touches(60), start=1):
        whole = np.zeros((6, 2))
        whole[of.rows_U.numpy()] = of.gradient_UD
        dense = decay * dense + (1 - decay) * whole
        (smoothed,) = lazy.smooth([of])
        np.testing.assert_allclose(smoothed.gradient_UD, dense[of.rows_U.numpy()] / (1 - decay**step), rtol=1e-5, atol=1e-7)


def test_the_lazy_average_of_weights_equals_a_dense_one() -> None:
    weight, decay = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), 0.8
    lazy, dense = RowWeightAverage({"deep.t.weight": weight}, decay), weight.double().numpy().copy()
    for of in _touches(60):
        with lazy.around_step([of]):
            weight[of.rows_U] += of.gradient_UD
        dense = decay * dense + (1 - decay) * weight.double().numpy()
        own = weight.clone()
        with lazy.in_place():
            np.testing.assert_allclose(weight, dense, atol=1e-5)
        assert torch.equal(weight, own)


def test_the_average_of_rows_is_left_at_an_exception_too() -> None:
    weight = torch.zeros(6, 2)
    lazy = RowWeightAverage({"deep.t.weight": weight}, 0.9)
    (of,) = _touches(1)
    with lazy.around_step([of]):
        weight[of.rows_U] += 1.0
    own = weight.clone()

    def fail() -> None:
        assert not torch.equal(weight, own)
        raise KeyError

    with pytest.raises(KeyError), lazy.in_place():
        fail()
    assert torch.equal(weight, own)


@pytest.mark.parametrize("kind", ["sparse_gradient_ema", "sparse_weight_ema"])
def test_a_new_owner_of_a_row_inherits_no_average(spec: DatasetSpec, window: EncodedWindow, kind: str) -> None:
    learner = _learner(spec, **{kind: 0.9})
    _pass(learner, window)
    (average,) = learner.sparse_step.averages().values()
    held = average.sums if isinstance(average, RowGradientAverage) else average.deviations
    user = int(average.touched["deep.user.weight"].argmax())
    assert held["deep.user.weight"][user].abs().sum() > 0
    learner.sparse_step.forget({"user": np.array([user])})
    assert held["deep.user.weight"][user].abs().sum() == 0
    assert held["wide.user.weight"][user].abs().sum() == 0
    assert held["deep.user.weight"].abs().sum() > 0


def test_averaging_gradients_of_rows_slows_what_turns_round() -> None:
    """A gradient that changes its sign in every step cancels, one that keeps it does not."""
    rows_U, steady, turning = torch.tensor([0, 1]), [], []
    average = RowGradientAverage({"deep.t.weight": torch.zeros(2, 1)}, 0.9)
    for step in range(40):
        given = torch.tensor([[1.0], [(-1.0) ** step]])
        of = RowGradients(part="deep", table="t", rows_U=rows_U, gradient_UD=given, count_U=torch.ones(2))
        (smoothed,) = average.smooth([of])
        steady.append(float(smoothed.gradient_UD[0]))
        turning.append(float(smoothed.gradient_UD[1]))
    assert steady == pytest.approx([1.0] * 40, rel=1e-5)
    assert max(map(abs, turning[20:])) < 0.1


def test_many_processes_are_refused(spec: DatasetSpec) -> None:
    with pytest.raises(
        ConfigError, match=r"training\.cowclip needs the whole gradient of a row in one process, and there are 2"
    ):
        _learner(spec, processes=Processes(rank=0, count=2), cowclip=True)
