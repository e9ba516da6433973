"""Layers that the heads share.

Letters: B rows, F features, D the common embedding length, S the sum of the embedding lengths.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class CommonLength(nn.Module):
    """Embeddings side by side to `[B, F, D]`; those of another length are projected.

    Ginart et al. 2019, *Mixed Dimension Embeddings*, arXiv:1909.11810.
    """

    def __init__(self, dims: Sequence[int], common_dim: int) -> None:
        super().__init__()
        self.dims = list(dims)
        self.common_dim = common_dim
        self.projections = nn.ModuleDict(
            {str(i): nn.Linear(dim, common_dim, bias=False) for i, dim in enumerate(dims) if dim != common_dim}
        )

    def forward(self, deep_BS: torch.Tensor) -> torch.Tensor:
        """`[B, S]` to `[B, F, D]`."""
        if not self.projections:
            return deep_BS.view(deep_BS.shape[0], len(self.dims), self.common_dim)
        pieces = deep_BS.split(self.dims, dim=1)
        return torch.stack(
            [self.projections[str(i)](p) if str(i) in self.projections else p for i, p in enumerate(pieces)], dim=1
        )


class NoHead(nn.Module):
    """Of a linear model, which has no embeddings: the wide weights and the linear part over the dense columns are all."""

    def forward(self, deep_BS: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B]` of zero, from `[B, 0]`."""
        return deep_BS.sum(dim=1)


def side_by_side(*pieces: torch.Tensor) -> torch.Tensor:
    """Their columns in one tensor; nothing is copied where only one of them has any."""
    filled = [piece for piece in pieces if piece.shape[1]] or pieces[:1]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)


def feed_forward(sizes: Sequence[int], *, activate_last: bool = False) -> nn.Sequential:
    """Linear layers of `sizes` with ReLU between them, and after the last if `activate_last`."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if activate_last or i < len(sizes) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
