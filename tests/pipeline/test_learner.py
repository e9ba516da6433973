"""The two-phase step: accumulation is exact, nothing non-finite is learned, and a pass replays to the same bits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import LearningDiverged
from data_schemas.examples import Examples
from models.ctr import build_model
from models.loss import weighted_log_loss_sum
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig, TrainingConfig
from pipeline.data.encode import EncodedWindow, encode, num_dense_columns
from pipeline.data.normalise import RunningMoments
from pipeline.model_state import architecture
from pipeline.training.batch_size import FixedBatch, RecordedPlan, batch_policy
from pipeline.training.budget import Deadline
from pipeline.training.compilation import Compiled
from pipeline.training.learn import Learned, learn
from pipeline.training.learner import Arithmetic, Learner, StepResult
from pipeline.training.local_updates import Sharing
from pipeline.training.processes import Processes
from sampling.minibatches import BatchCursor

CPU = torch.device("cpu")
PLAIN = {"sparse_step_rows": 0, "sparse_optimizer": "rowwise_adagrad", "sparse_learning_rate": 0.1, "weight_ema": 0.0}
MakeExamples = Callable[..., Examples]


def _window(spec: DatasetSpec, examples: Examples) -> EncodedWindow:
    return encode(examples, spec, Memory(spec), None, hour=0)


def _learner(spec: DatasetSpec, *, precision: Arithmetic = "fp32", kind: str = "dlrm", **training: Any) -> Learner:
    model_config = ModelConfig(kind=kind, hidden=(16, 8), interaction_dim=8)  # type: ignore[arg-type]
    config = TrainingConfig(**{**PLAIN, **training})
    model = build_model(
        architecture(model_config),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer=config.sparse_optimizer,
        sparse_learning_rate=config.sparse_learning_rate,
        wide_learning_rate=config.wide_learning_rate,
        wide_beta=config.wide_beta,
        device=CPU,
        seed=0,
    )
    return Learner(model, config, precision=precision, device=CPU)


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    tables = {piece.name: piece.tensor.clone() for piece in learner.model.tables.slices()}
    return tables | {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


def _greatest_difference(first: Learner, second: Learner) -> float:
    others = _weights(second)
    return max(float((tensor - others[name]).abs().max()) for name, tensor in _weights(first).items())


def _pass(learner: Learner, window: EncodedWindow, batch_size: int = 64, **more: Any) -> Learned:
    return learn(learner, window, seed=[1], policy=FixedBatch(batch_size=batch_size, learning_rate=0.01), **more)


def _step(
    learner: Learner, window: EncodedWindow, rows: np.ndarray, *, divisor: float = 64, learning_rate: float = 0.01
) -> StepResult:
    """One batch that is a chunk of its own."""
    chunk = learner.look_up(window.minibatch(rows))
    result = learner.step(chunk, slice(0, len(rows)), divisor=divisor, learning_rate=learning_rate)
    learner.finish(chunk)
    return result


@pytest.mark.parametrize("kind", ["dlrm", "dcnv2", "deepfm", "linear"])
@pytest.mark.parametrize("dense_optimizer", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("micro_batch_size", [16, 24, 63])
def test_micro_batches_equal_one_big_batch(
    small_spec: DatasetSpec, small_examples: MakeExamples, kind: str, dense_optimizer: str, micro_batch_size: int
) -> None:
    spec = small_spec.linear() if kind == "linear" else small_spec
    window = _window(spec, small_examples(320))
    whole = _learner(spec, kind=kind, dense_optimizer=dense_optimizer, micro_batch_size=64)
    parts = _learner(spec, kind=kind, dense_optimizer=dense_optimizer, micro_batch_size=micro_batch_size)
    _pass(whole, window)
    _pass(parts, window)
    assert whole.steps == parts.steps == 5
    assert _greatest_difference(whole, parts) < 2e-5


def test_the_naive_loop_differs_where_ours_does_not(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    """Backward through the fused tables for each micro-batch steps sparse rows once a micro-batch."""
    window = _window(small_spec, small_examples(320))
    whole, naive = _learner(small_spec, micro_batch_size=64), _learner(small_spec, micro_batch_size=64)
    _pass(whole, window)
    cursor = BatchCursor.of(window.num_rows, seed=[1])
    while cursor.remaining:
        rows = cursor.next_rows(64)
        naive.optimizer.zero_grad()
        for part in np.split(rows, 4):
            batch = window.minibatch(part)
            logits_B = naive.model(batch)
            (weighted_log_loss_sum(logits_B, batch.labels_B, batch.weights_B) / len(rows)).backward()
        naive._dense_step(0.01)
    assert _greatest_difference(whole, naive) > 0.05


def test_padding_changes_nothing(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(20))
    bare, padded = _learner(small_spec), _learner(small_spec)
    rows = np.arange(20)
    _step(bare, window, rows, divisor=20)
    chunk = padded.look_up(window.minibatch(np.resize(rows, 32), filling_B=np.arange(32) >= 20))
    padded.step(chunk, slice(0, 32), divisor=20, learning_rate=0.01)
    padded.finish(chunk)
    assert _greatest_difference(bare, padded) < 1e-6


def test_a_weight_of_two_equals_the_row_twice(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    examples = small_examples(40)
    twice = examples.take(np.concatenate([np.arange(40), np.arange(10)]))
    weights = np.ones(40, np.float32)
    weights[:10] = 2
    learners = []
    for rows in (twice, examples.with_weights(weights)):
        window = encode(rows, small_spec, Memory(small_spec), RunningMoments.nothing_seen(2), hour=0)
        learners.append(_learner(small_spec, sparse_optimizer="adagrad"))
        _step(learners[-1], window, np.arange(rows.num_rows), divisor=50)
    first, second = (_weights(learner) for learner in learners)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-6, msg=name)


def test_learning_brings_the_loss_below_that_of_the_click_rate(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    examples = small_examples(20_000)
    learned = _pass(_learner(small_spec), _window(small_spec, examples))
    assert learned.rows == 20_000
    last_quarter = [point.log_loss for point in learned.loss_curve if point.rows > 15_000]
    assert np.mean(last_quarter) < _entropy(float(examples.labels_R.mean())) - 0.05


@pytest.mark.parametrize("click_rate", [0.002, 0.3])
def test_a_new_model_starts_at_the_click_rate_of_its_first_window(
    small_spec: DatasetSpec, small_examples: MakeExamples, click_rate: float
) -> None:
    labels_R = (np.arange(5_000) < 5_000 * click_rate).astype(np.float32)
    window = _window(small_spec, replace(small_examples(5_000), labels_R=labels_R))
    learned = _pass(_learner(small_spec, kind="deepfm", sparse_learning_rate=0.05), window)  # labels by chance: learning costs
    losses = [point.log_loss for point in learned.loss_curve]
    assert np.mean(losses[:20]) == pytest.approx(_entropy(click_rate), rel=0.35)
    assert np.mean(losses) < _entropy(click_rate) * 1.1


def test_a_new_model_starts_at_the_click_rate_before_negatives_were_thinned(
    small_spec: DatasetSpec, small_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of 9,500 negatives beside 500 clicks: the shift of log(10) says that the rate was 5 %."""
    examples = replace(small_examples(1_450), labels_R=(np.arange(1_450) < 500).astype(np.float32))
    shifted = replace(_window(small_spec, examples), logit_shifts_R=np.full(1_450, math.log(10), np.float32))
    learner, started = _learner(small_spec), list[float]()
    monkeypatch.setattr(learner, "start_at", started.append)
    _pass(learner, shifted)
    assert started == [pytest.approx(0.05, rel=1e-6)]


def test_a_first_window_of_one_class_leaves_the_bias_where_it_was(small_spec: DatasetSpec) -> None:
    for click_rate in (0.0, 1.0):
        learner = _learner(small_spec)
        learner.start_at(click_rate)
        assert float(learner.model.net.bias.detach()) == 0.0


def test_a_trained_model_keeps_its_bias(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    learner, window = _learner(small_spec), _window(small_spec, small_examples(64))
    _step(learner, window, np.arange(64))
    before = float(learner.model.net.bias.detach())
    learner.start_at(0.9)
    assert float(learner.model.net.bias.detach()) == before


def test_wide_weights_step_by_the_sum_over_rows_and_not_by_the_mean_over_the_batch(
    small_spec: DatasetSpec, small_examples: MakeExamples
) -> None:
    window = _window(small_spec, small_examples(64))
    weights = []
    for divisor in (64.0, 640.0):
        learner = _learner(small_spec, wide_beta=0.5)
        _step(learner, window, np.arange(64), divisor=divisor)
        weights.append({name: tensor for name, tensor in _weights(learner).items() if name.startswith("wide.")})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_about_the_same(
    small_spec: DatasetSpec, small_examples: MakeExamples, precision: Arithmetic
) -> None:
    window = _window(small_spec, small_examples(10_000))
    exact, rounded = _learner(small_spec), _learner(small_spec, precision=precision)
    curves = [_pass(learner, window).loss_curve for learner in (exact, rounded)]
    last = [np.mean([point.log_loss for point in curve[-50:]]) for curve in curves]
    assert last[1] == pytest.approx(last[0], abs=0.01)


def test_fp16_unscales_before_the_tables_step(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(64))
    exact, scaled = _learner(small_spec), _learner(small_spec, precision="fp16")
    for learner in (exact, scaled):
        _step(learner, window, np.arange(64), learning_rate=0.001)
    gradients = [
        {piece.name: piece.tensor for piece in learner.model.tables.slices() if "accumulator" in piece.name}
        for learner in (exact, scaled)
    ]
    for name, accumulator in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], accumulator, rtol=0.05, atol=1e-6)


def test_a_non_finite_loss_touches_nothing(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(64))
    poisoned = replace(window, dense_RN=np.full_like(window.dense_RN, np.nan))
    learner, untouched = _learner(small_spec), _learner(small_spec)
    result = _step(learner, poisoned, np.arange(64))
    assert not result.learned
    assert _greatest_difference(learner, untouched) == 0
    assert _step(learner, window, np.arange(64)).learned


def test_an_overflow_in_fp16_lowers_the_scale_and_goes_on(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(64))
    learner, untouched = _learner(small_spec, precision="fp16"), _learner(small_spec)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    result = _step(learner, window, np.arange(64))
    assert not result.learned
    assert learner.skipped_in_a_row == 0
    assert learner.scaler.get_scale() == 2.0**39
    assert _greatest_difference(learner, untouched) == 0


@dataclass(frozen=True, kw_only=True)
class BesideAnOverflow(Processes):
    """One process, to which another seems to tell that its memory sufficed, and then that its gradients overflowed."""

    count: int = 2
    told: list[float] = field(default_factory=lambda: [1.0, 0.0])

    def total(self, value: float) -> float:
        return value + self.told.pop() if self.told else value

    def sum_gradients(self, parameters: object) -> None:
        """The other's are not added."""


def test_an_overflow_in_another_process_lowers_the_scale_of_this_one(
    small_spec: DatasetSpec, small_examples: MakeExamples
) -> None:
    window = _window(small_spec, small_examples(64))
    learner, untouched = _learner(small_spec, precision="fp16"), _learner(small_spec)
    learner.processes = BesideAnOverflow()
    learner.sharing = Sharing(1, learner.processes)
    before = learner.scaler.get_scale()
    assert not _step(learner, window, np.arange(64)).learned
    assert learner.scaler.get_scale() == before / 2
    assert _greatest_difference(learner, untouched) == 0


def test_a_loss_that_stays_non_finite_ends_the_pass(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(640))
    poisoned = replace(window, dense_RN=np.full_like(window.dense_RN, np.nan))
    with pytest.raises(LearningDiverged, match="4 steps in a row"):
        _pass(_learner(small_spec), poisoned)


def test_a_pass_replays_to_the_same_bits(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(1000))
    times = iter(np.arange(0, 1000.0))
    stopped = _learner(small_spec)
    clock = lambda: float(next(times))  # noqa: E731
    deadline = Deadline(started=0, budget_seconds=30, reserve_seconds=10, clock=clock)
    learned = _pass(stopped, window, deadline=deadline)
    assert 0 < learned.rows < 1000
    assert learned.unreached_R.sum() == 1000 - learned.rows
    replayed = _learner(small_spec)
    learn(replayed, window, seed=[1], policy=RecordedPlan(records=learned.plan, stopped_at=learned.position))
    assert _greatest_difference(stopped, replayed) == 0


@pytest.mark.parametrize("policy_name", ["deadline", "goodput"])
@pytest.mark.parametrize("sparse_step_rows", [0, 256])
def test_a_plan_that_changes_and_leaves_rows_out_replays_to_the_same_bits(
    small_spec: DatasetSpec, small_examples: MakeExamples, policy_name: str, sparse_step_rows: int
) -> None:
    """Budget for about half of the rows on a clock that each look advances; rates follow the batch."""
    window = _window(small_spec, small_examples(20_000))
    settings = {
        "batch_policy": policy_name,
        "micro_batch_size": 64,
        "min_batch_size": 64,
        "max_batch_size": 512,
        "reference_batch_size": 64,
        "learning_rate_scaling": "noise_scale",
        "sparse_learning_rate_scaling": "sqrt",
        "learning_rate_decay": "cosine",
        "rewarm_steps": 3,
        "sparse_step_rows": sparse_step_rows,
    }
    stopped, times = _learner(small_spec, **settings), iter(np.arange(0, 100_000.0))
    policy = batch_policy(stopped.config, noise=stopped.noise_scale)
    deadline = Deadline(started=0, budget_seconds=70, reserve_seconds=10, clock=lambda: float(next(times)))
    strata_R = (window.labels_R > 0).astype(np.int32)
    learned = learn(stopped, window, seed=[1], policy=policy, deadline=deadline, stratum_R=strata_R)
    unreached = int(learned.unreached_R.sum())
    assert learned.rows + learned.thinned_rows + unreached == 20_000
    assert learned.thinned_rows > 1000
    assert len({record.batch_size for record in learned.plan}) > 1
    assert learned.steps == stopped.steps
    replayed = _learner(small_spec, **settings)
    again = RecordedPlan(records=learned.plan, stopped_at=learned.position)
    repeated = learn(replayed, window, seed=[1], policy=again, stratum_R=strata_R)
    assert _greatest_difference(stopped, replayed) == 0
    assert repeated.plan == learned.plan
    np.testing.assert_array_equal(repeated.thinned_R, learned.thinned_R)


@pytest.mark.parametrize("policy_name", ["fixed", "deadline", "goodput"])
@pytest.mark.parametrize("sparse_step_rows", [0, 256])
def test_batches_that_are_cut_ahead_change_no_bit_and_no_plan(
    small_spec: DatasetSpec, small_examples: MakeExamples, policy_name: str, sparse_step_rows: int
) -> None:
    """On a clock that each look advances, so that the plan changes and rows are left out."""
    window = _window(small_spec, small_examples(8_000))
    settings = {"batch_policy": policy_name, "batch_size": 64, "micro_batch_size": 64, "min_batch_size": 64}
    settings |= {"max_batch_size": 512, "learning_rate_scaling": "noise_scale", "sparse_step_rows": sparse_step_rows}
    learners, passes = [], []
    for ahead in (True, False):
        learner, times = _learner(small_spec, **settings), iter(np.arange(0, 100_000.0))
        policy = batch_policy(learner.config, noise=learner.noise_scale)
        budget = 40 if policy_name != "fixed" else 150
        deadline = Deadline(
            started=0,
            budget_seconds=budget,
            reserve_seconds=10,
            clock=lambda times=times: float(next(times)),  # type: ignore[misc]
        )
        passes.append(learn(learner, window, seed=[1], policy=policy, deadline=deadline, ahead=ahead))
        learners.append(learner)
    assert _greatest_difference(*learners) == 0
    assert passes[0].plan == passes[1].plan
    assert passes[0].position == passes[1].position
    np.testing.assert_array_equal(passes[0].unreached_R, passes[1].unreached_R)
    assert passes[0].unreached_R.any() or passes[0].thinned_rows
    for learned in passes:
        assert learned.waiting_share is not None
        assert 0 < learned.waiting_share < 1
    assert passes[1].thrown_away == 0
    assert (passes[0].thrown_away > 0) == (policy_name != "fixed")


def test_a_batch_that_changes_in_mid_pass_keeps_all_optimizer_state(
    small_spec: DatasetSpec, small_examples: MakeExamples
) -> None:
    """As torch's own Adam, fed the same gradients: the moments and the step count go on."""
    window = _window(small_spec, small_examples(640))
    learner = _learner(small_spec, dense_optimizer="adam")
    reference = torch.nn.Parameter(learner.parameters["bias"].detach().clone())
    adam, cursor = torch.optim.Adam([reference], lr=0.01), BatchCursor.of(640, seed=[1])
    for batch_size in (64, 64, 256, 256):
        rows = cursor.order_R[cursor.position : cursor.position + batch_size]
        cursor.position += batch_size
        _step(learner, window, rows, divisor=batch_size)
        reference.grad = learner.parameters["bias"].grad.clone()  # type: ignore[union-attr]
        adam.step()
        assert learner.parameters["bias"].item() == pytest.approx(reference.item(), abs=1e-7)


def test_measuring_the_noise_scale_changes_no_bit(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(2000))
    plain = _learner(small_spec, micro_batch_size=32)
    measured = _learner(small_spec, micro_batch_size=32, learning_rate_scaling="noise_scale")
    _pass(plain, window)
    _pass(measured, window)
    assert measured.noise_scale.measurements > 0
    assert _greatest_difference(plain, measured) == 0


def test_static_shapes_compile_once_whatever_the_batch(
    small_spec: DatasetSpec, small_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that needs no C++ compiler; the counter is that of the learner."""
    monkeypatch.setattr("pipeline.training.learner.compiled", lambda net, asked: Compiled(net, lambda graph, _: graph.forward))
    window = _window(small_spec, small_examples(3000))
    learner = _learner(
        small_spec,
        batch_policy="linear_ramp",
        batch_size=64,
        max_batch_size=320,
        micro_batch_size=64,
        compile_dense_network=True,
    )
    learned = learn(learner, window, seed=[1], policy=batch_policy(learner.config))
    assert len({record.batch_size for record in learned.plan}) > 3
    assert learner.net.compilations == 1
    assert learned.rows == 3000


def test_without_a_compiler_the_network_runs_as_it_is_and_says_so(
    small_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    learner = _learner(small_spec, batch_size=512, compile_dense_network=True)
    assert not learner.net.compiles
    assert "no C++ compiler" in learner.net.note


def test_what_was_not_reached_is_learned_by_the_next_pass_once(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(1000))
    times = iter(np.arange(0, 1000.0))
    deadline = Deadline(started=0, budget_seconds=12, reserve_seconds=2, clock=lambda: float(next(times)))
    learned = _pass(_learner(small_spec), window, deadline=deadline)
    order = BatchCursor.of(1000, seed=[1]).order_R
    np.testing.assert_array_equal(np.flatnonzero(learned.unreached_R), np.sort(order[learned.rows :]))


def test_gradient_smoothing_equals_the_formula(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    """Two steps of SGD on the bias-corrected moving average of the gradients."""
    window = _window(small_spec, small_examples(128))
    smooth = _learner(small_spec, dense_optimizer="sgd", gradient_ema=0.9)
    seen = []
    for rows in np.split(np.arange(128), 2):
        plain = _learner(small_spec, dense_optimizer="sgd")
        plain.model.net.load_state_dict(smooth.model.net.state_dict())
        plain.model.tables.load_slices({p.name: [p] for p in smooth.model.tables.slices()})
        before = plain.parameters["bias"].item()
        _step(plain, window, rows, learning_rate=1.0)
        seen.append(before - plain.parameters["bias"].item())
        start = smooth.parameters["bias"].item()
        _step(smooth, window, rows, learning_rate=1.0)
    average = (0.1 * 0.9 * seen[0] + 0.1 * seen[1]) / (1 - 0.9**2)
    assert start - smooth.parameters["bias"].item() == pytest.approx(average, rel=1e-4)


def test_warm_up_raises_the_rate_of_a_new_model(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    window = _window(small_spec, small_examples(64))
    learner = _learner(small_spec, warmup_steps=4)
    rates = [_step(learner, window, np.arange(64), learning_rate=0.04).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04, 0.04])


def _entropy(rate: float) -> float:
    """Log loss of predicting the click rate."""
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
