"""DeepFM: a factorisation machine beside a deep network on the same embeddings (Guo et al. 2017, arXiv:1703.04247).

Letters: B rows, F features, N dense columns, D the common embedding length, S the sum of the embedding lengths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.layers import CommonLength, feed_forward, side_by_side


class DeepFmHead(nn.Module):
    """Second-order interactions plus a network.

    torchrec's FactorizationMachine sums over all coordinates of all embeddings at once; here, as in the paper's equation
    4, the coordinates stay apart.
    """

    def __init__(
        self, *, dims: Sequence[int], num_dense: int, common_dim: int, hidden: Sequence[int], gated: bool = False
    ) -> None:
        """Args other than sizes: `gated` gives each embedding a learned scale in the machine, 1 at first."""
        super().__init__()
        self.gate_F = nn.Parameter(torch.ones(len(dims))) if gated else None
        self.common = CommonLength(dims, common_dim)
        self.deep = feed_forward([sum(dims) + num_dense, *hidden, 1])

    def forward(self, deep_BS: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B]`."""
        embedded_BFD: torch.Tensor = self.common(deep_BS)
        if self.gate_F is not None:
            embedded_BFD = embedded_BFD * self.gate_F[:, None]
        pairs_B: torch.Tensor = _Pairs.apply(embedded_BFD)  # type: ignore[no-untyped-call]
        deep_B1: torch.Tensor = self.deep(side_by_side(deep_BS, dense_BN))
        return deep_B1.squeeze(1) + pairs_B


class _Pairs(torch.autograd.Function):
    """The sum of the dot products of all pairs of embeddings, in fp32.

    The derivative is the sum of the other embeddings: two passes over them, where that of the formula's squares takes six.
    """

    @staticmethod
    def forward(ctx: Any, embedded_BFD: torch.Tensor) -> torch.Tensor:
        """`[B]`."""
        ctx.save_for_backward(embedded_BFD)
        exact_BFD = embedded_BFD if embedded_BFD.dtype == torch.float64 else embedded_BFD.float()
        flat_BS = exact_BFD.flatten(1)
        pairs_B: torch.Tensor = 0.5 * (exact_BFD.sum(dim=1).square().sum(dim=1) - torch.linalg.vecdot(flat_BS, flat_BS))
        return pairs_B

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """`[B, F, D]`; it can be derived again."""
        (embedded_BFD,), (gradient_B,) = ctx.saved_tensors, gradients
        others_BFD: torch.Tensor = embedded_BFD.sum(dim=1, keepdim=True) - embedded_BFD
        return others_BFD * gradient_B.to(embedded_BFD.dtype)[:, None, None]
