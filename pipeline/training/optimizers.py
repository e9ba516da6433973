"""The optimizer of the dense part, and the smoothing around it."""

from collections.abc import Iterable

import torch

from pipeline.config import TrainingConfig


def dense_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """torch's own optimizer, chosen by `training.dense_optimizer`."""
    rate = config.dense_learning_rate
    match config.dense_optimizer:
        case "adam":
            return torch.optim.Adam(parameters, lr=rate)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=rate)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate)


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """The learning rate of step `step` (from 0): rises linearly over `warmup_steps`.

    >>> [warmed_up(1.0, step, 4) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return rate * min((step + 1) / warmup_steps, 1.0) if warmup_steps else rate
