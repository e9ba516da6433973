"""What experiments measure, against closed forms, other implementations and arithmetic by hand."""

import numpy as np
import pytest
import torch

from pipeline.lab.best_rate import one_step_law
from pipeline.lab.epochs import loader_batches, sliced_batches
from pipeline.lab.gradient_descent import gradients, logits, new_weights, sgd_step
from pipeline.lab.gradient_variance import batch_gradients, finite_correction, slope, variance_around
from pipeline.lab.hardware import PIECES, product
from pipeline.lab.logistic import logistic_rows
from pipeline.lab.noise_scale import exact_noise_scale, plain_noise_scale, subset_means, unbiased_noise_scale
from pipeline.lab.problems import LinearRegression, NoisyQuadratic, clicks, descend, linear_gradients, log_loss, small_net
from pipeline.lab.sharpness import largest_eigenvalue, quadratic_variance, rise_along
from pipeline.lab.targets import Hyperbola, crossing, fitted, log_r2, log_rows_r2
from pipeline.lab.time_to_target import best_batch
from pipeline.training.step_time import StepTime

PROBLEM = LinearRegression.of(6, condition=5.0)
WEIGHTS_D = PROBLEM.true_weights_D + np.array([0.9, -0.8, 0.7, -0.6, 0.5, 0.4])


@pytest.mark.parametrize("num_rows", [1, 7, 4097])
@pytest.mark.parametrize("size", [1, 4, 4096, 10_000])
def test_a_pass_has_so_many_batches_as_rows_need_and_every_row_once(num_rows: int, size: int) -> None:
    batches = loader_batches(num_rows, size, seed=[0])
    assert len(batches) == len(sliced_batches(num_rows, size)) == -(-num_rows // size)
    assert sum(batches) == num_rows
    assert max(batches) - min(batches) <= 1 or len(batches) > num_rows // size


def test_descent_by_hand_is_that_of_torch() -> None:
    data = clicks(600)
    features_RD, labels_R = data.features_RD[:600], data.labels_R[:600]
    ours = new_weights(features_RD.shape[1], 8, seed=3)
    theirs = [weight.clone().requires_grad_() for weight in ours]
    optimizer = torch.optim.SGD(theirs, lr=0.3)
    for start in range(0, 600, 60):
        rows = slice(start, start + 60)
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(theirs, features_RD[rows]), labels_R[rows])
        loss.backward()
        for by_hand, theirs_too in zip(gradients(ours, features_RD[rows], labels_R[rows]), theirs, strict=True):
            assert torch.allclose(by_hand, theirs_too.grad, atol=1e-6)
        optimizer.step()
        sgd_step(ours, features_RD[rows], labels_R[rows], 0.3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_the_variance_of_a_mini_batch_gradient_is_sigma_over_b() -> None:
    gradients_RD = linear_gradients(*PROBLEM.rows(4000, [1]), WEIGHTS_D)
    whole_D, sizes, strata = gradients_RD.mean(axis=0), [4, 16, 64, 256, 1024], np.zeros(4000, np.int32)
    drawn = {
        kind: [variance_around(whole_D, batch_gradients(gradients_RD, kind, b, 400, [2, b], strata)) for b in sizes]
        for kind in ("with", "without")
    }
    corrected = [value / finite_correction(4000, b) for value, b in zip(drawn["without"], sizes, strict=True)]
    assert slope(sizes, drawn["with"]) == pytest.approx(-1, abs=0.05)
    assert slope(sizes, corrected) == pytest.approx(-1, abs=0.05)
    known = float(np.trace(PROBLEM.covariance(WEIGHTS_D)))
    assert np.mean([value * b for value, b in zip(drawn["with"], sizes, strict=True)]) == pytest.approx(known, rel=0.1)


def test_the_noise_scale_of_a_linear_regression_is_its_closed_form_and_the_plain_estimate_is_too_low() -> None:
    gradient_D = PROBLEM.gradient(WEIGHTS_D)
    known = float(np.trace(PROBLEM.covariance(WEIGHTS_D))) / float(gradient_D @ gradient_D)
    gradients_RD = linear_gradients(*PROBLEM.rows(200_000, [4]), WEIGHTS_D)
    assert exact_noise_scale(gradients_RD) == pytest.approx(known, rel=0.05)
    means_TD = subset_means(gradients_RD, 16, 4000, [5])
    assert unbiased_noise_scale(means_TD, 16) == pytest.approx(known, rel=0.05)
    few = [plain_noise_scale(group, 1) for group in np.split(subset_means(gradients_RD, 1, 4000, [6]), 1000)]
    assert np.mean(few) < 0.8 * known


def test_the_best_rate_of_one_step_is_its_closed_form() -> None:
    """On a linear regression the loss after a step is a parabola in the rate, whatever the batch."""
    features_RD, labels_R = PROBLEM.rows(20_000, [7])
    gradients_RD = linear_gradients(features_RD, labels_R, WEIGHTS_D)
    law = one_step_law(gradients_RD, features_RD.T @ features_RD / len(labels_R))
    rng = np.random.default_rng(8)
    for size in (2, 8, 32):
        means = np.array([gradients_RD[rng.integers(20_000, size=size)].mean(axis=0) for _ in range(4000)])
        losses = [np.mean([PROBLEM.excess_loss(WEIGHTS_D - rate * g) for g in means]) for rate in (0.0, 0.1, 0.2)]
        curve = np.polyfit([0.0, 0.1, 0.2], losses, 2)
        assert -curve[1] / (2 * curve[0]) == pytest.approx(law.rate(size), rel=0.05)


def test_a_noisy_quadratic_ends_with_the_variance_of_the_closed_form() -> None:
    quadratic = NoisyQuadratic(curvature=2.0, noise_variance=3.0)
    for rate in (0.05, 0.4, 0.9):
        assert quadratic_variance(quadratic, rate, seed=1) == pytest.approx(quadratic.steady_variance(rate), rel=0.05)
    assert quadratic.steady_variance(1.0) == float("inf")
    assert quadratic.steady_variance(0.4, 8) == pytest.approx(quadratic.steady_variance(0.4) / 8)


def test_power_iteration_finds_the_largest_eigenvalue_of_the_hessian() -> None:
    data = clicks(600)
    features_RD, labels_R = data.features_RD[:200, :5], data.labels_R[:200]
    net = small_net(5, hidden=(3,), seed=1)
    names = [name for name, _ in net.named_parameters()]
    shapes = [parameter.shape for parameter in net.parameters()]

    def loss_of(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        outputs = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (features_RD,))
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels_R)

    flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(loss_of)(flat))
    known = float(eigenvalues[eigenvalues.abs().argmax()])
    assert largest_eigenvalue(net, features_RD, labels_R, iterations=200) == pytest.approx(known, rel=0.01)


def test_a_walk_along_random_directions_comes_back() -> None:
    data = clicks(600)
    net = small_net(data.features_RD.shape[1], hidden=(4,), seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    descend(net, data, batch_size=60, steps=100, optimizer=optimizer, seed=[1])
    before = log_loss(net, data.features_RD, data.labels_R)
    rises = rise_along(net, data, 0.5, 2, seed=0)
    assert rises[0] == 0
    assert rises[-1] > 0
    assert torch.equal(log_loss(net, data.features_RD, data.labels_R), before)


def test_a_hyperbola_is_found_again_from_its_points() -> None:
    curve = Hyperbola(least_steps=20.0, least_rows=4000.0)
    points = {b: curve.steps(b) for b in (4, 16, 64, 200, 1000, 4000)}
    found = fitted(points)
    assert (found.least_steps, found.least_rows) == (pytest.approx(20.0), pytest.approx(4000.0))
    assert log_r2(found, points) == pytest.approx(1.0)
    assert log_rows_r2(found, points) == pytest.approx(1.0)
    assert log_r2(found, points, least_excess=1e-9) == pytest.approx(1.0)
    assert log_r2(found, points | {2: 0.9 * curve.steps(2)}, least_excess=1e-9) == float("-inf")
    line = StepTime(fixed_seconds=0.001, row_seconds=0.00002)
    best = best_batch(curve, line)
    totals = {b: curve.steps(b) * line.seconds(b) for b in (0.8 * best, best, 1.25 * best)}
    assert min(totals, key=totals.__getitem__) == best


def test_a_target_that_is_not_reached_takes_for_ever() -> None:
    assert crossing([1, 2], np.array([3.0, 2.0]), 1.0) == float("inf")
    assert crossing([1, 2], np.array([np.inf, 0.5]), 1.0) == 2.0


def test_a_product_in_pieces_is_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 9, generator=generator), torch.randn(9, 9, generator=generator)
    for pieces in PIECES:
        assert torch.allclose(product(left, right, pieces, 4), left @ right, atol=1e-5)


def test_the_loss_and_gradient_of_the_rows_are_those_of_torch() -> None:
    rows = logistic_rows(600, 0)
    weights_D = rows.start_D + 0.1 * np.random.default_rng(0).normal(size=len(rows.start_D))
    weights = torch.tensor(weights_D, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(rows.features_RD) @ weights, torch.from_numpy(rows.labels_R)
    )
    loss.backward()
    assert weights.grad is not None
    assert rows.losses(weights_D[:, None])[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert np.allclose(rows.gradients(weights_D).mean(axis=0), weights.grad.numpy(), atol=1e-12)
    assert rows.least_loss() < float(rows.losses(rows.start_D[:, None])[0])
