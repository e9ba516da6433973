"""Moving averages of dense gradients and of dense weights.

Enters: gradients or weights after each step. Leaves: their exponential moving averages, corrected for the zero they start
from (Kingma & Ba 2015, algorithm 1, for the correction).
"""

from collections.abc import Iterable, Mapping

import torch


class MovingAverage:
    """The bias-corrected exponential moving average of some tensors.

    `average = (1 - decay) * sum(decay^(t-i) * x_i) / (1 - decay^t)`.
    """

    def __init__(self, shapes_like: Mapping[str, torch.Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.steps = 0
        self.sums = {name: torch.zeros_like(tensor) for name, tensor in shapes_like.items()}

    @torch.no_grad()
    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Counts one more observation in."""
        self.steps += 1
        for name, total in self.sums.items():
            total.lerp_(values[name], 1 - self.decay)

    def averages(self) -> dict[str, torch.Tensor]:
        """The averages so far; at least one observation is needed."""
        assert self.steps > 0
        correction = 1 - self.decay**self.steps
        return {name: total / correction for name, total in self.sums.items()}

    def load(self, sums: Mapping[str, torch.Tensor], steps: int) -> None:
        """Goes on from saved sums."""
        self.steps = steps
        for name, total in self.sums.items():
            total.copy_(sums[name])


def smooth_gradients(parameters: Iterable[tuple[str, torch.nn.Parameter]], average: MovingAverage) -> None:
    """Puts each parameter's smoothed gradient in the place of its gradient."""
    named = {name: parameter for name, parameter in parameters if parameter.grad is not None}
    average.add({name: parameter.grad for name, parameter in named.items() if parameter.grad is not None})
    for name, smoothed in average.averages().items():
        named[name].grad = smoothed
