"""The optimizer of the dense part.

Enters: the dense parameters and the settings. Leaves: an optimizer, of torch or of `pytorch-optimizer`.
"""

from collections.abc import Iterable, Mapping

import torch

from pipeline.config import TrainingConfig

LARS_MOMENTUM = 0.9
LARS_TRUST = 0.01
"""A matrix steps by this share of its norm at a rate of 1, before momentum."""


def dense_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Chosen by `training.dense_optimizer`.

    LARS (You et al. 2017) and LAMB (You et al. 2020) scale the step of each matrix to its own norm; the bias and other vectors,
    which start at zero and would hardly leave it, step as in SGD with momentum or as in Adam.

    LAMB as in the paper's algorithm 2, version 3: no correction for averages that start at zero. The norm of a matrix's step
    does not depend on it; vectors step up to 6 times further in the first tens of steps of a new model, which
    `training.warmup_steps` makes up for. Norms count up to 10 (the paper's phi).
    """
    rate = config.dense_learning_rate
    match config.dense_optimizer:
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, fused=True)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=rate)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate)
        case "lars":
            from pytorch_optimizer import LARS  # takes half a second to import, which most models need not pay

            return LARS(parameters, lr=rate, momentum=LARS_MOMENTUM, trust_coefficient=LARS_TRUST)
        case "lamb":
            from pytorch_optimizer import Lamb

            matrices, vectors = _by_rank(parameters)
            groups: list[dict[str, object]] = [{"params": matrices}, {"params": vectors, "adam": True}]
            return Lamb(groups, lr=rate, adam_debias=True)


def group_scalars(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What an optimizer counts once a group of parameters, not once a parameter: LARS and LAMB keep their steps there."""
    groups = enumerate(optimizer.param_groups)
    return {f"{number}.step": torch.tensor(group["step"]) for number, group in groups if "step" in group}


def load_group_scalars(optimizer: torch.optim.Optimizer, saved: Mapping[str, torch.Tensor]) -> None:
    """Goes on from what `group_scalars` gave."""
    for name, value in saved.items():
        number, _, key = name.partition(".")
        optimizer.param_groups[int(number)][key] = int(value)


def _by_rank(parameters: Iterable[torch.nn.Parameter]) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Matrices, and vectors with scalars."""
    every = list(parameters)
    return [p for p in every if p.dim() > 1], [p for p in every if p.dim() <= 1]


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """The learning rate of step `step` (from 0): rises linearly over `warmup_steps`.

    >>> [warmed_up(1.0, step, 4) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return rate * min((step + 1) / warmup_steps, 1.0) if warmup_steps else rate
