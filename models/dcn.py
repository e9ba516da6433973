"""DCNv2: explicit feature crosses of low rank beside a deep network (Wang et al. 2021, arXiv:2008.13535).

Letters: B rows, N dense columns, S the sum of the embedding lengths.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from models.layers import feed_forward


class DcnHead(nn.Module):
    """Cross layers and a network side by side (the paper's parallel structure), joined by one last layer."""

    def __init__(
        self, *, dims: Sequence[int], num_dense: int, hidden: Sequence[int], cross_layers: int, cross_rank: int
    ) -> None:
        super().__init__()
        width = sum(dims) + num_dense
        self.cross = LowRankCrossNet(in_features=width, num_layers=cross_layers, low_rank=min(cross_rank, width))
        self.deep = feed_forward([width, *hidden], activate_last=True)
        self.last = nn.Linear(width + hidden[-1], 1)

    def forward(self, deep_BS: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B]`."""
        inputs_BI = torch.cat([deep_BS, dense_BN], dim=1)
        joined_BJ = torch.cat([self.cross(inputs_BI), self.deep(inputs_BI)], dim=1)
        logits_B1: torch.Tensor = self.last(joined_BJ)
        return logits_B1.squeeze(1)
