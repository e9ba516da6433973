"""The moving average of dense weights counts rows, whatever the batches that they come in."""

import pytest
import torch

from pipeline.training.smoothing import MovingAverage


def test_an_observation_of_many_steps_is_as_many_observations() -> None:
    values = [torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.5]), torch.tensor([-3.0, 2.0])]
    once, many = (MovingAverage({"w": values[0]}, decay=0.9) for _ in range(2))
    for value, steps in zip(values, (4, 1, 2), strict=True):
        once.add({"w": value}, steps=steps)
        for _ in range(steps):
            many.add({"w": value})
    assert once.steps == many.steps == 7
    torch.testing.assert_close(once.averages(), many.averages())


def test_half_steps_add_up_and_are_corrected_for_the_start() -> None:
    average = MovingAverage({"w": torch.zeros(1)}, decay=0.9)
    for _ in range(3):
        average.add({"w": torch.ones(1)}, steps=0.5)
    assert average.averages()["w"].item() == pytest.approx(1.0)
