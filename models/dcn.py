"""DCNv2: explicit feature crosses of low rank beside a deep network (Wang et al. 2021, arXiv:2008.13535).

Letters: B rows, N dense columns, S the sum of the embedding lengths.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear
from torchrec.modules.crossnet import LowRankCrossNet

from models.layers import feed_forward, side_by_side


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
        inputs_BI = side_by_side(deep_BS, dense_BN)
        width = inputs_BI.shape[1]
        of_cross_1I, of_deep_1H = self.last.weight.split([width, self.last.in_features - width], dim=1)
        logits_B1 = linear(self._crossed(inputs_BI), of_cross_1I, self.last.bias) + linear(self.deep(inputs_BI), of_deep_1H)
        return logits_B1.squeeze(1)

    def _crossed(self, inputs_BI: torch.Tensor) -> torch.Tensor:
        """`x_0 * (W (V x) + b) + x` layer by layer, as `self.cross` has it, in fewer passes over memory."""
        crossed_BI = inputs_BI
        for down_RI, up_IR, bias_I in zip(self.cross.V_kernels, self.cross.W_kernels, self.cross.bias, strict=True):
            crossed_BI = torch.addcmul(crossed_BI, inputs_BI, linear(linear(crossed_BI, down_RI), up_IR) + bias_I)
        return crossed_BI
