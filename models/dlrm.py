"""DLRM: dot products between every pair of embeddings, then a network (Naumov et al. 2019, arXiv:1906.00091).

Letters: B rows, F features, N dense columns, D the common embedding length, S the sum of the embedding lengths, P pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.layers import CommonLength, feed_forward, side_by_side


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
        places_P, pair_of_place_FF = _upper_triangle(num_features + 1)
        self.register_buffer("places_P", places_P, persistent=False)
        self.register_buffer("pair_of_place_FF", pair_of_place_FF, persistent=False)
        self.top = feed_forward([common_dim + num_features * (num_features + 1) // 2, *hidden, 1])

    def forward(self, deep_BS: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B]`."""
        embedded_BFD = self.common(deep_BS)
        if self.bottom is not None:
            dense_BD = self.bottom(dense_BN)
        else:
            assert self.constant_D is not None
            dense_BD = self.constant_D.to(embedded_BFD.dtype).expand(deep_BS.shape[0], -1)
        every_BFD = torch.cat([dense_BD[:, None], embedded_BFD], dim=1)
        dots_BP: torch.Tensor = _Dots.apply(every_BFD, self.places_P, self.pair_of_place_FF)  # type: ignore[no-untyped-call]
        logits_B1: torch.Tensor = self.top(side_by_side(dense_BD, dots_BP))
        return logits_B1.squeeze(1)


class _Dots(torch.autograd.Function):
    """Dot products of all pairs of embeddings, as torchrec's `InteractionArch` has them.

    Picking the pairs out of the square of all products, and putting gradients back, costs more than the products there.
    """

    @staticmethod
    def forward(ctx: Any, every_BFD: torch.Tensor, places_P: torch.Tensor, pair_of_place_FF: torch.Tensor) -> torch.Tensor:
        """`[B, P]`, at least fp32: columns are picked faster in it."""
        dots_BFF = torch.bmm(every_BFD, every_BFD.transpose(1, 2))
        ctx.save_for_backward(every_BFD, pair_of_place_FF)
        ctx.arithmetic = dots_BFF.dtype
        exact_BFF = dots_BFF if dots_BFF.dtype == torch.float64 else dots_BFF.float()
        return exact_BFF.flatten(1).index_select(1, places_P)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`[B, F, D]`; it can be derived again."""
        (every_BFD, pair_of_place_FF), (gradient_BP,) = ctx.saved_tensors, gradients
        none_B1 = gradient_BP.new_zeros(len(gradient_BP), 1)
        symmetric_BFF = torch.cat([gradient_BP, none_B1], dim=1).index_select(1, pair_of_place_FF.flatten())
        symmetric_BFF = symmetric_BFF.view(-1, *pair_of_place_FF.shape).to(ctx.arithmetic)
        return torch.bmm(symmetric_BFF, every_BFD.to(ctx.arithmetic)).to(every_BFD.dtype), None, None


def _upper_triangle(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[P]`: where each pair i < j stands in a flattened square; `[size, size]`: which pair a place has, P on the diagonal.

    >>> _upper_triangle(3)[0].tolist(), _upper_triangle(3)[1].tolist()
    ([1, 2, 5], [[3, 0, 1], [0, 3, 2], [1, 2, 3]])
    """
    first_P, second_P = torch.triu_indices(size, size, offset=1)
    pair_of_place_FF = torch.full((size, size), len(first_P))
    pair_of_place_FF[first_P, second_P] = pair_of_place_FF[second_P, first_P] = torch.arange(len(first_P))
    return first_P * size + second_P, pair_of_place_FF
