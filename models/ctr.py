"""CtrModel: embedding tables, a wide part and a head; and the one place that chooses between heads.

Letters: B rows, N dense columns, M of them that the head sees, S the sum of the embedding lengths of all lookups,
W wide weights, D an embedding's length.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import nn

from data_schemas.minibatch import MiniBatch
from models.attention import ActivationUnit
from models.dcn import DcnHead
from models.deepfm import DeepFmHead
from models.dlrm import DlrmHead
from models.embeddings import EmbeddingTables, Pooled, SparseOptimizer
from models.layers import NoHead, side_by_side
from models.narrow_tables import NarrowTables
from models.tables import TableLayout


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a head."""

    kind: Literal["dlrm", "dcnv2", "deepfm", "linear"]
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
    as dense columns. Where single clicks are attended to, their weighted sum goes in as dense columns, and so do its product
    with the candidate and the sum of that. The wide weights and the linear part are added outside autocast, in fp32: they
    carry the calibration.

    Args:
        linear_only: places of the dense columns that the head does not see.
    """

    seen_M: torch.Tensor | None
    """Places of the dense columns that the head sees; None: all are."""

    def __init__(
        self, architecture: Architecture, layout: TableLayout, num_dense: int, linear_only: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.dims = list(layout.head_dims)
        self.head_width = sum(self.dims)
        self.candidate_of = [(layout.head_keys.index(pool), layout.head_keys.index(of)) for pool, of in layout.pools]
        self.attended = [(layout.head_keys.index(of), count) for of, count in layout.attended.items()]
        products = sum(self.dims[pool] + 1 for pool, _ in self.candidate_of)
        products += sum(2 * self.dims[of] + 1 for of, _ in self.attended)
        self.head = _head(architecture, self.dims, num_dense - len(linear_only) + products)
        seen_M = [place for place in range(num_dense) if place not in linear_only]
        self.register_buffer("seen_M", torch.tensor(seen_M, dtype=torch.long) if linear_only else None, persistent=False)
        self.attention = nn.ModuleList(ActivationUnit(self.dims[of]) for of, _ in self.attended)
        self.linear_N = nn.Parameter(torch.zeros(num_dense + len(self.candidate_of) + len(self.attended)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, deep_BS: torch.Tensor, wide_BW: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """Logits `[B] float32`."""
        if not self.candidate_of and not self.attended:
            return self._logits(deep_BS, wide_BW, dense_BN, self._seen(dense_BN))
        head_BS, clicks_BS = deep_BS, deep_BS[:, self.head_width :]
        if self.attended:  # or the backward pass would copy all gradients for nothing
            head_BS, clicks_BS = deep_BS.split([self.head_width, deep_BS.shape[1] - self.head_width], dim=1)
        embedded = head_BS.split(self.dims, dim=1)
        products = [embedded[pool] * embedded[candidate] for pool, candidate in self.candidate_of]
        attended = self._attend(embedded, clicks_BS)
        products += [sum_BD * embedded[of] for sum_BD, (of, _) in zip(attended, self.attended, strict=True)]
        sums = [product_BD.sum(dim=1, keepdim=True) for product_BD in products]
        linear_BN = side_by_side(dense_BN, *sums)
        products += attended
        return self._logits(head_BS, wide_BW, linear_BN, side_by_side(self._seen(dense_BN), *sums, *products))

    def _seen(self, dense_BN: torch.Tensor) -> torch.Tensor:
        """The dense columns that the head sees."""
        return dense_BN if self.seen_M is None else dense_BN.index_select(1, self.seen_M)

    def _logits(
        self, head_BS: torch.Tensor, wide_BW: torch.Tensor, linear_BN: torch.Tensor, seen_BM: torch.Tensor
    ) -> torch.Tensor:
        """`[B]`: of the head, which sees `seen_BM`, the wide part and the linear part."""
        logits_B: torch.Tensor = self.head(head_BS, seen_BM)
        return logits_B.float() + wide_BW.sum(dim=1) + (linear_BN * self.linear_N).sum(dim=1) + self.bias

    def _attend(self, embedded: Sequence[torch.Tensor], clicks_BS: torch.Tensor) -> list[torch.Tensor]:
        """For each feature of the history: `[B, D]`, the sum of the user's clicks as the candidate weighs them."""
        widths = [count * self.dims[of] for of, count in self.attended]
        return [
            unit(clicked_BC.unflatten(1, (count, -1)), embedded[of])
            for unit, (of, count), clicked_BC in zip(
                self.attention, self.attended, clicks_BS.split(widths, dim=1) if widths else (), strict=True
            )
        ]


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


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model whose tables are narrow, and which predicts only."""

    tables: NarrowTables
    net: DenseNet
    layout: TableLayout


def build_model(
    architecture: Architecture,
    layout: TableLayout,
    *,
    num_dense: int,
    linear_only: Collection[int] = (),
    sparse_optimizer: SparseOptimizer,
    sparse_learning_rate: float,
    wide_learning_rate: float,
    wide_beta: float = 0.0,
    device: torch.device,
    seed: int,
    spread: Callable[[Callable[[torch.device], EmbeddingTables]], EmbeddingTables] | None = None,
) -> CtrModel:
    """A fresh model; the same seed gives the same bits.

    Args:
        linear_only: places of the dense columns that go to the linear part alone.
        spread: makes the tables, of what makes them whole on a device, and leaves torch's generator as they leave it that are
            made from `seed`; None: all of them are on `device`.
    """

    def make(place: torch.device) -> EmbeddingTables:
        return EmbeddingTables(
            layout,
            sparse_optimizer=sparse_optimizer,
            sparse_learning_rate=sparse_learning_rate,
            wide_learning_rate=wide_learning_rate,
            wide_beta=wide_beta,
            device=place,
        )

    torch.manual_seed(seed)
    tables = make(device) if spread is None else spread(make)
    return CtrModel(tables, DenseNet(architecture, layout, num_dense, linear_only).to(device), layout)


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
        case "linear":
            return NoHead()
        case unknown:
            assert_never(unknown)
