"""The shared problems against their closed forms."""

import numpy as np
import torch

from pipeline.lab.problems import (
    LinearRegression,
    TwoBasins,
    batches,
    clicks,
    linear_gradients,
    logistic_gradients,
    small_net,
)


def test_the_gradient_of_a_linear_regression_has_the_covariance_that_it_says() -> None:
    problem = LinearRegression.of(4, condition=5.0, noise=0.7)
    weights_D = problem.true_weights_D + np.array([0.5, -1.0, 0.2, 0.8])
    gradients_RD = linear_gradients(*problem.rows(400_000, [3]), weights_D)
    assert np.allclose(gradients_RD.mean(axis=0), problem.gradient(weights_D), atol=0.02)
    measured, known = np.cov(gradients_RD.T), problem.covariance(weights_D)
    assert np.abs(measured - known).max() < 0.03 * np.abs(known).max()


def test_the_gradient_of_a_logistic_regression_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    features_RD, labels_R, weights_D = rng.normal(size=(50, 3)), (rng.random(50) < 0.3).astype(float), rng.normal(size=3)
    weights = torch.tensor(weights_D, requires_grad=True)
    logits_R = torch.from_numpy(features_RD) @ weights
    torch.nn.functional.binary_cross_entropy_with_logits(logits_R, torch.from_numpy(labels_R)).backward()
    assert weights.grad is not None
    assert np.allclose(logistic_gradients(features_RD, labels_R, weights_D).mean(axis=0), weights.grad.numpy())


def test_two_basins_have_the_deeper_minimum_on_the_right() -> None:
    basins = TwoBasins()
    poor, top, good = basins.stationary()
    assert poor < top < good
    assert np.allclose(basins.gradient(np.array([poor, top, good])), 0.0, atol=1e-9)
    losses = basins.loss(np.array([poor, top, good]))
    assert losses[1] > losses[0] > losses[2]


def test_clicks_are_the_same_again_and_held_out_rows_are_others() -> None:
    first, again = clicks(600, seed=5), clicks.__wrapped__(600, seed=5)
    assert torch.equal(first.features_RD, again.features_RD)
    assert torch.equal(first.labels_R, again.labels_R)
    assert len(first.learned) == 600
    assert not set(first.learned) & set(first.held_out)
    assert len(first.learned) + len(first.held_out) == first.window.num_rows == len(first.features_RD)
    assert (first.features_RD[:, 0] == 1).all()
    assert small_net(first.features_RD.shape[1])(first.features_RD[:3]).shape == (3,)


def test_batches_are_whole_and_a_pass_has_no_row_twice() -> None:
    rows = np.arange(10)
    drawn = [part for part, _ in zip(batches(rows, 4, seed=[1]), range(4), strict=False)]
    assert [len(part) for part in drawn] == [4, 4, 4, 4]
    assert len(set(torch.cat(drawn[:2]).tolist())) == 8
    whole = next(batches(rows, 64, seed=[1]))
    assert sorted(whole.tolist()) == list(range(10))
