"""DLRM: dot products between every pair of embeddings, then a network (Naumov et al. 2019, arXiv:1906.00091).

Letters: B rows, F features, N dense columns, D the common embedding length, S the sum of the embedding lengths.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.models.dlrm import InteractionArch

from models.layers import CommonLength, feed_forward


class DlrmHead(nn.Module):
    """Interacts embeddings pairwise, the dense columns taking part as one more embedding.

    Departure: a data set without dense columns has a learned vector in their place.
    """

    def __init__(self, *, dims: Sequence[int], num_dense: int, common_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        num_features = len(dims)
        self.common = CommonLength(dims, common_dim)
        self.bottom = feed_forward([num_dense, *hidden[:1], common_dim]) if num_dense else None
        self.constant_D = None if num_dense else nn.Parameter(torch.zeros(common_dim))
        self.interaction = InteractionArch(num_features)
        self.top = feed_forward([common_dim + num_features * (num_features + 1) // 2, *hidden, 1])

    def forward(self, deep_BS: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B]`."""
        embedded_BFD = self.common(deep_BS)
        if self.bottom is not None:
            dense_BD = self.bottom(dense_BN)
        else:
            assert self.constant_D is not None
            dense_BD = self.constant_D.to(embedded_BFD.dtype).expand(deep_BS.shape[0], -1)
        logits_B1: torch.Tensor = self.top(self.interaction(dense_BD, embedded_BFD))
        return logits_B1.squeeze(1)
