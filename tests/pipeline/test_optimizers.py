"""LARS and LAMB against their papers' algorithms, written out slowly."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipeline.config import TrainingConfig
from pipeline.training.optimizers import LARS_MOMENTUM, LARS_TRUST, dense_optimizer, group_scalars, load_group_scalars

RATE, STEPS = 0.05, 12


def _lars(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """You et al. 2017, algorithm 1, without weight decay; vectors have a local rate of 1."""
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        local = LARS_TRUST * np.linalg.norm(weight) / np.linalg.norm(gradient) if weight.ndim > 1 else 1.0
        momentum = LARS_MOMENTUM * momentum + local * gradient
        weight = weight - RATE * momentum
    return weight


def _lamb(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """You et al. 2020, algorithm 2 in the form without bias correction; vectors have a trust ratio of 1."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for gradient in gradients:
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = first / (np.sqrt(second) + 1e-6)
        trust = min(np.linalg.norm(weight), 10.0) / np.linalg.norm(step) if weight.ndim > 1 else 1.0
        weight = weight - RATE * trust * step
    return weight


def _problem() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=shape) for shape in [(5, 4), (4,), (30, 30)]]
    return weights, [[rng.normal(size=weight.shape) for _ in range(STEPS)] for weight in weights]


@pytest.mark.parametrize(("name", "reference"), [("lars", _lars), ("lamb", _lamb)])
def test_the_step_is_the_papers(name: str, reference: Callable[[np.ndarray, list[np.ndarray]], np.ndarray]) -> None:
    weights, gradients = _problem()
    parameters = [torch.nn.Parameter(torch.tensor(weight)) for weight in weights]
    optimizer = dense_optimizer(parameters, TrainingConfig(dense_optimizer=name, dense_learning_rate=RATE))
    for step in range(STEPS):
        for parameter, of_step in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(of_step[step])
        optimizer.step()
    for parameter, weight, of_steps in zip(parameters, weights, gradients, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), reference(weight, of_steps), rtol=1e-5)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_what_is_counted_once_a_group_is_kept(name: str) -> None:
    optimizers = []
    for _ in range(2):
        parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
        optimizers.append(dense_optimizer(parameters, TrainingConfig(dense_optimizer=name)))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizers[0].step()
    load_group_scalars(optimizers[1], group_scalars(optimizers[0]))
    assert [group["step"] for group in optimizers[1].param_groups] == [3] * len(optimizers[0].param_groups)
