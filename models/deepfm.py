"""DeepFM: a factorisation machine beside a deep network on the same embeddings (Guo et al. 2017, arXiv:1703.04247).

Letters: B rows, F features, N dense columns, D the common embedding length, S the sum of the embedding lengths.
"""

from collections.abc import Sequence

import torch
from torch import nn

from models.layers import CommonLength, feed_forward


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
        sum_BD = embedded_BFD.sum(dim=1)
        pairs_B = 0.5 * (sum_BD.square() - embedded_BFD.square().sum(dim=1)).sum(dim=1)
        deep_B1: torch.Tensor = self.deep(torch.cat([deep_BS, dense_BN], dim=1))
        return deep_B1.squeeze(1) + pairs_B
