"""Measures of steadiness against numpy, and probes that leave no trace."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import torch

from data_schemas.dataset import DatasetSpec
from models.ctr import build_model
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig, TrainingConfig
from pipeline.data.encode import EncodedWindow, encode, num_dense_columns
from pipeline.evaluation.diagnosis import Prediction
from pipeline.evaluation.metrics import measure
from pipeline.evaluation.stability import spikes, stability, variance_over_steps
from pipeline.evaluation.steadiness import judge_steadiness
from pipeline.model_state import architecture
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import Learned, learn
from pipeline.training.learner import Learner

WINDOW = Prediction(hour=5, log_loss=0.50, log_loss_error=0.03, auc=0.72, auc_error=0.03)
LAST = Prediction(hour=4, log_loss=0.46, log_loss_error=0.04, auc=0.70, auc_error=0.04)


def test_the_variance_over_steps_is_that_around_the_least_squares_line() -> None:
    loss_T = np.random.default_rng(0).normal(size=40) + 0.3 * np.arange(40)
    rest_T = loss_T - np.polyval(np.polyfit(np.arange(40), loss_T, 1), np.arange(40))
    assert variance_over_steps(loss_T) == pytest.approx((rest_T**2).sum() / 38)
    assert stability(loss_T, [], None, None).probe_deviation == pytest.approx(np.sqrt((rest_T**2).sum() / 38))


def test_two_points_have_no_variance_around_a_line() -> None:
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        variance_over_steps([1.0, 2.0])
    assert stability([1.0, 2.0], [], None, None).probe_deviation is None


def test_spikes_are_counted_and_a_slope_is_none() -> None:
    rng = np.random.default_rng(1)
    loss_T = 0.5 - 0.001 * np.arange(60) + 0.0005 * rng.normal(size=60)
    assert spikes(loss_T) == 0
    loss_T[[20, 45]] += 0.05
    assert spikes(loss_T) == 2


def test_the_change_from_hour_to_hour_has_the_interval_of_a_difference() -> None:
    figures = stability([], [], WINDOW, LAST)
    assert figures.auc_change is not None
    assert figures.log_loss_change is not None
    assert figures.auc_change.value == pytest.approx(0.02)
    assert figures.auc_change.interval.high - figures.auc_change.value == pytest.approx(1.96 * 0.05, rel=1e-3)
    assert figures.log_loss_change.value == pytest.approx(0.04)


def test_churn_is_the_mean_absolute_change_on_the_same_rows() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.random(1000), rng.random(900)
    figures = stability([], [], None, None, before, after)
    assert figures.churn == pytest.approx(np.abs(after - before[:900]).mean())
    assert figures.churn_p99 == pytest.approx(np.quantile(np.abs(after - before[:900]), 0.99))


def test_the_variation_of_gradient_norms_is_relative() -> None:
    norms = [1.0, 2.0, 4.0]
    assert stability([], norms, None, None).gradient_variation == pytest.approx(np.std(norms, ddof=1) / np.mean(norms))


def test_names_are_the_same_and_what_does_not_exist_is_absent() -> None:
    assert stability([], [], None, None).as_dict() == {"probe_points": 0.0}
    whole = stability([0.5, 0.4, 0.5], [1.0, 2.0], WINDOW, LAST, [0.1], [0.2]).as_dict()
    assert {"probe_deviation", "probe_spikes", "gradient_variation", "churn", "churn_p99", "auc_change_low"} <= set(whole)


def test_an_update_is_compared_with_the_window_before_it_in_time() -> None:
    """A backfill may have learned a later hour first; it is no past."""
    labels, users = np.array([0, 1] * 40), np.arange(80)
    rng = np.random.default_rng(3)
    metrics = [measure(labels, np.clip(0.3 * labels + 0.6 * rng.random(80), 0, 1), users) for _ in range(3)]

    def entry(hour: int, of: Any) -> dict[str, Any]:
        interval = {"low": of.auc_interval.low, "high": of.auc_interval.high}
        loss_interval = {"low": of.log_loss_interval.low, "high": of.log_loss_interval.high}
        before = {"auc": of.auc, "auc_interval": interval, "log_loss": of.log_loss, "log_loss_interval": loss_interval}
        return {"window_start": datetime.fromtimestamp(3600 * hour, UTC).isoformat(), "before": before}

    history = [entry(9, metrics[0]), entry(11, metrics[1]), {**entry(8, metrics[0]), "before": None}]
    figures, _ = judge_steadiness((), (), (), hour=10, before=metrics[2], probabilities=None, history=history)
    assert figures.auc_change is not None
    assert figures.auc_change.value == pytest.approx(metrics[2].auc - metrics[0].auc)


def _learner(spec: DatasetSpec, **training: Any) -> Learner:
    config = TrainingConfig(micro_batch_size=64, **training)
    model = build_model(
        architecture(ModelConfig(hidden=(16, 8), interaction_dim=8)),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer=config.sparse_optimizer,
        sparse_learning_rate=config.sparse_learning_rate,
        wide_learning_rate=config.wide_learning_rate,
        device=torch.device("cpu"),
        seed=0,
    )
    return Learner(model, config, precision="fp32", device=torch.device("cpu"))


def _pass(learner: Learner, window: EncodedWindow, probe_rows: int) -> Learned:
    return learn(learner, window, seed=[1], policy=FixedBatch(batch_size=64, learning_rate=0.01), probe_rows=probe_rows)


def test_probes_leave_no_trace(small_spec: DatasetSpec, small_examples: Any) -> None:
    window = encode(small_examples(3000), small_spec, Memory(small_spec), None, hour=0)
    plain, probed = (_learner(small_spec, sparse_step_rows=256) for _ in range(2))
    assert _pass(plain, window, 0).probed is None
    assert _pass(probed, window, 128).probed is not None
    for own, other in zip(plain.model.tables.slices(), probed.model.tables.slices(), strict=True):
        assert torch.equal(own.tensor, other.tensor)
    assert all(torch.equal(plain.parameters[name], probed.parameters[name]) for name in plain.parameters)


def test_probes_see_the_loss_fall_and_stop_before_their_rows_are_learned(small_spec: DatasetSpec, small_examples: Any) -> None:
    window = encode(small_examples(6000), small_spec, Memory(small_spec), None, hour=0)
    found = _pass(_learner(small_spec, sparse_step_rows=256), window, 512).probed
    assert found is not None
    dense, sparse = ([step for step in found.steps if step.part == part] for part in ("dense", "sparse"))
    assert 18 <= len(dense) <= 24
    assert 9 <= len(sparse) <= 12
    assert np.mean([step.same_after - step.same_before for step in dense]) < 0
    assert np.mean([step.same_after - step.same_before for step in sparse]) < 0
    assert found.log_losses[-1] < found.log_losses[0] - 0.01
    assert len(found.gradient_norms) == len(found.log_losses) == len(dense)
    assert all(norm > 0 for norm in found.gradient_norms)
