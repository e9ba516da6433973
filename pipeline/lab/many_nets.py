"""K small networks of one shape, trained side by side in one batched product: a grid of settings costs about what one does.

Enters: first weights, rows, a rate and a weight decay for each network. Leaves: the trained networks and their logits.

A network is `P -> H (ReLU) -> 1`. Networks never meet: each has its own rows, weights and settings.

Letters: K networks, R rows, B rows of a batch, P inputs, H hidden units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(kw_only=True)
class ManyNets:
    """The weights of K networks."""

    first_KPH: torch.Tensor
    bias_K1H: torch.Tensor
    last_KH1: torch.Tensor
    shift_K11: torch.Tensor

    @classmethod
    def of(cls, seeds: Sequence[int], *, inputs: int, hidden: int) -> "ManyNets":
        """One network a seed, `Normal(0, 1 / fan in)`; equal seeds give equal networks."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        first = torch.stack([torch.randn(inputs, hidden, generator=g) for g in generators]) / inputs**0.5
        last = torch.stack([torch.randn(hidden, 1, generator=g) for g in generators]) / hidden**0.5
        return cls(
            first_KPH=first.requires_grad_(),
            bias_K1H=torch.zeros(len(seeds), 1, hidden).requires_grad_(),
            last_KH1=last.requires_grad_(),
            shift_K11=torch.zeros(len(seeds), 1, 1).requires_grad_(),
        )

    @classmethod
    def holding(cls, parameters: Sequence[torch.Tensor]) -> "ManyNets":
        """With these weights, in the order of `parameters`."""
        first, bias, last, shift = parameters
        return cls(first_KPH=first, bias_K1H=bias, last_KH1=last, shift_K11=shift)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All of them; the networks are the first axis of each."""
        return [self.first_KPH, self.bias_K1H, self.last_KH1, self.shift_K11]

    def logits(self, inputs_KBP: torch.Tensor) -> torch.Tensor:
        """`[K, B]`; inputs `[1, B, P]` are the same for all networks."""
        if inputs_KBP.shape[0] == 1:
            inputs_KBP = inputs_KBP.expand(self.first_KPH.shape[0], -1, -1)
        hidden_KBH = torch.relu(torch.baddbmm(self.bias_K1H, inputs_KBP, self.first_KPH))
        return torch.baddbmm(self.shift_K11, hidden_KBH, self.last_KH1).squeeze(2)


def log_losses(logits_KB: torch.Tensor, labels_KB: torch.Tensor) -> torch.Tensor:
    """`[K]`: the mean log loss of each network over its own rows, nats."""
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits_KB, labels_KB.expand_as(logits_KB), reduction="none"
    ).mean(dim=1)


def descend(
    nets: ManyNets, inputs_KBP: torch.Tensor, labels_KB: torch.Tensor, rate_K: torch.Tensor, decay_K: torch.Tensor | None = None
) -> None:
    """One step of stochastic gradient descent of each network.

    Args:
        rate_K: learning rate of each.
        decay_K: weight decay of each: the loss has `decay / 2 |w|^2` in it, biases left out.
    """
    loss = log_losses(nets.logits(inputs_KBP), labels_KB).sum()
    gradients = torch.autograd.grad(loss, nets.parameters)
    with torch.no_grad():
        for weight, gradient in zip(nets.parameters, gradients, strict=True):
            if decay_K is not None and weight.shape[1] > 1:
                gradient = gradient + decay_K[:, None, None] * weight
            weight -= rate_K[:, None, None] * gradient


def shuffled(seeds: Sequence[int], num_rows: int) -> torch.Tensor:
    """`[K, R]`: an order of the rows for each network; equal seeds give equal orders."""
    return torch.stack([torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
