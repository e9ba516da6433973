"""CtrModel: embedding tables, a wide part and a head; and the one place that chooses between heads.

Letters: B rows, N dense columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import nn

from data_schemas.dataset import Categorical
from models.dcn import DcnHead
from models.deepfm import DeepFmHead
from models.dlrm import DlrmHead
from models.embeddings import EmbeddingTables, Pooled, SparseOptimizer


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a head."""

    kind: Literal["dlrm", "dcnv2", "deepfm"]
    hidden: Sequence[int]
    common_dim: int
    """Length to which embeddings are projected before they interact."""
    cross_layers: int
    cross_rank: int


class DenseNet(nn.Module):
    """Everything with dense gradients: the head, a linear part over the dense columns, and the bias.

    The wide part's weights and the linear part are added outside autocast, in fp32: they carry the calibration.
    """

    def __init__(self, architecture: Architecture, dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        self.head = _head(architecture, dims, num_dense)
        self.linear_N = nn.Parameter(torch.zeros(num_dense))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, deep_BS: torch.Tensor, wide_BF: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B] float32`."""
        logits_B: torch.Tensor = self.head(deep_BS, dense_BN)
        return logits_B.float() + wide_BF.sum(dim=1) + (dense_BN * self.linear_N).sum(dim=1) + self.bias


class CtrModel(nn.Module):
    """Probability of a click from ids and numbers, in two parts that step differently.

    `tables` apply their optimizer inside backward; `net` has ordinary gradients.
    """

    def __init__(self, tables: EmbeddingTables, net: DenseNet) -> None:
        super().__init__()
        self.tables = tables
        self.net = net

    def forward(self, pooled: Pooled, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B]` of rows that were looked up already."""
        logits_B: torch.Tensor = self.net(pooled.deep_BS, pooled.wide_BF, dense_BN)
        return logits_B


def build_model(
    architecture: Architecture,
    features: Sequence[Categorical],
    *,
    num_dense: int,
    sparse_optimizer: SparseOptimizer,
    sparse_learning_rate: float,
    wide_learning_rate: float,
    device: torch.device,
    seed: int,
) -> CtrModel:
    """A fresh model; the same seed gives the same bits."""
    torch.manual_seed(seed)
    tables = EmbeddingTables(
        features,
        sparse_optimizer=sparse_optimizer,
        sparse_learning_rate=sparse_learning_rate,
        wide_learning_rate=wide_learning_rate,
        device=device,
    )
    return CtrModel(tables, DenseNet(architecture, tables.dims, num_dense).to(device))


def _head(architecture: Architecture, dims: Sequence[int], num_dense: int) -> nn.Module:
    hidden = list(architecture.hidden)
    match architecture.kind:
        case "dlrm":
            return DlrmHead(dims=dims, num_dense=num_dense, common_dim=architecture.common_dim, hidden=hidden)
        case "deepfm":
            return DeepFmHead(dims=dims, num_dense=num_dense, common_dim=architecture.common_dim, hidden=hidden)
        case "dcnv2":
            return DcnHead(
                dims=dims,
                num_dense=num_dense,
                hidden=hidden,
                cross_layers=architecture.cross_layers,
                cross_rank=architecture.cross_rank,
            )
        case unknown:
            assert_never(unknown)
