"""CtrModel: embedding tables, a wide part and a head; and the one place that chooses between heads.

Letters: B rows, N dense columns, S the sum of the embedding lengths of all lookups, W wide weights, D an embedding's length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import nn

from data_schemas.minibatch import MiniBatch
from models.dcn import DcnHead
from models.deepfm import DeepFmHead
from models.dlrm import DlrmHead
from models.embeddings import EmbeddingTables, Pooled, SparseOptimizer
from models.tables import TableLayout


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a head."""

    kind: Literal["dlrm", "dcnv2", "deepfm"]
    hidden: Sequence[int]
    common_dim: int
    """Length to which embeddings are projected before they interact."""
    cross_layers: int
    cross_rank: int
    gated: bool = False
    """DeepFM: each embedding has a learned scale in the factorisation machine. A model that got new embeddings after it was
    trained has it, so that they start from zero there."""


class DenseNet(nn.Module):
    """Everything with dense gradients: the head, a linear part over the dense columns, and the bias.

    A pool of a user's history goes in as one more embedding; its product with the candidate's embedding, and the sum of that,
    as dense columns. The wide weights and the linear part are added outside autocast, in fp32: they carry the calibration.
    """

    def __init__(self, architecture: Architecture, layout: TableLayout, num_dense: int) -> None:
        super().__init__()
        self.dims = list(layout.deep_dims)
        self.candidate_of = [(layout.deep_keys.index(pool), layout.deep_keys.index(of)) for pool, of in layout.pools]
        products = sum(self.dims[pool] + 1 for pool, _ in self.candidate_of)
        self.head = _head(architecture, self.dims, num_dense + products)
        self.linear_N = nn.Parameter(torch.zeros(num_dense + len(self.candidate_of)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, deep_BS: torch.Tensor, wide_BW: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B] float32`."""
        products, sums = self._meet_history(deep_BS)
        linear_BN = torch.cat([dense_BN, *sums], dim=1)
        logits_B: torch.Tensor = self.head(deep_BS, torch.cat([linear_BN, *products], dim=1))
        return logits_B.float() + wide_BW.sum(dim=1) + (linear_BN * self.linear_N).sum(dim=1) + self.bias

    def _meet_history(self, deep_BS: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Products `[B, D]` of each pool with its candidate, and their sums `[B, 1]`."""
        if not self.candidate_of:
            return [], []
        embedded = deep_BS.split(self.dims, dim=1)
        products = [embedded[pool] * embedded[candidate] for pool, candidate in self.candidate_of]
        return products, [product_BD.sum(dim=1, keepdim=True) for product_BD in products]


class CtrModel(nn.Module):
    """Probability of a click from ids and numbers, in two parts that step differently.

    `tables` apply their optimizer inside backward; `net` has ordinary gradients.
    """

    def __init__(self, tables: EmbeddingTables, net: DenseNet, layout: TableLayout) -> None:
        super().__init__()
        self.tables = tables
        self.net = net
        self.layout = layout

    def forward(self, batch: MiniBatch) -> torch.Tensor:
        """Logits `[B]`; a backward pass from here steps the tables."""
        pooled: Pooled = self.tables(batch.deep, batch.wide)
        deep_BS = self.layout.with_history(pooled.deep_BS, batch.history_row_B)
        logits_B: torch.Tensor = self.net(deep_BS, pooled.wide_BW, batch.dense_BN)
        return logits_B


def build_model(
    architecture: Architecture,
    layout: TableLayout,
    *,
    num_dense: int,
    sparse_optimizer: SparseOptimizer,
    sparse_learning_rate: float,
    wide_learning_rate: float,
    wide_beta: float = 0.0,
    device: torch.device,
    seed: int,
) -> CtrModel:
    """A fresh model; the same seed gives the same bits."""
    torch.manual_seed(seed)
    tables = EmbeddingTables(
        layout,
        sparse_optimizer=sparse_optimizer,
        sparse_learning_rate=sparse_learning_rate,
        wide_learning_rate=wide_learning_rate,
        wide_beta=wide_beta,
        device=device,
    )
    return CtrModel(tables, DenseNet(architecture, layout, num_dense).to(device), layout)


def _head(architecture: Architecture, dims: Sequence[int], num_dense: int) -> nn.Module:
    hidden = list(architecture.hidden)
    match architecture.kind:
        case "dlrm":
            return DlrmHead(dims=dims, num_dense=num_dense, common_dim=architecture.common_dim, hidden=hidden)
        case "deepfm":
            return DeepFmHead(
                dims=dims,
                num_dense=num_dense,
                common_dim=architecture.common_dim,
                hidden=hidden,
                gated=architecture.gated,
            )
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
