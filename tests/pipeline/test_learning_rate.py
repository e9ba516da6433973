"""Rates follow the batch by rule."""

import math

import pytest

from pipeline.config import TrainingConfig
from pipeline.training.learning_rate import Rates, decayed, scaled


@pytest.mark.parametrize("scaling", ["none", "linear", "sqrt", "noise_scale"])
def test_the_reference_batch_has_the_reference_rate(scaling: str) -> None:
    assert scaled(scaling, 256, 256, 5000.0) == 1.0  # type: ignore[arg-type]


def test_noise_scaling_is_linear_far_below_the_noise_scale_and_flat_far_above() -> None:
    assert scaled("noise_scale", 64, 8, 1e7) == pytest.approx(8, rel=1e-4)
    assert scaled("noise_scale", 8e8, 1e8, 1e3) == pytest.approx(1, rel=1e-4)


def test_decay_ends_where_it_says() -> None:
    assert [decayed("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    assert [decayed("step", p) for p in (0.24, 0.25, 0.5, 0.75, 1.0)] == [1.0, 0.5, 0.25, 0.125, 0.125]
    assert decayed("constant", 0.7) == 1.0


def test_the_sparse_rate_is_unscaled_by_default_and_follows_sparse_steps() -> None:
    training = TrainingConfig(batch_size=256, sparse_step_rows=2048, learning_rate_scaling="linear")
    assert Rates.of(training).sparse_factor(8192, None) == 1.0
    assert Rates.of(training).dense(8192, None, 0.0) == pytest.approx(32 * training.dense_learning_rate)
    scaled_too = Rates.of(training.model_copy(update={"sparse_learning_rate_scaling": "sqrt"}))
    assert scaled_too.sparse_factor(1024, None) == 1.0
    assert scaled_too.sparse_factor(8192, None) == pytest.approx(math.sqrt(4))
