"""What one would write first in PyTorch: the same network, a table for each feature, a loop over batches.

Enters: Parquet files of integer ids. Leaves: rows learned. The network is tidemark's own `DenseNet`, so that only the way of
looking up, accumulating and stepping differs.

Letters: R rows, F features, B rows of a batch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from models.ctr import Architecture, DenseNet
from models.tables import table_layout

SPARSE_RATE, DENSE_RATE = 0.05, 0.001


def read_columns(files: Sequence[Path], names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[R, F] int64` and labels `[R] float32`, of files read one after the other."""
    table = pq.ParquetDataset(list(files), partitioning=None).read(columns=["label", *names])
    ids_RF = np.stack([table[name].to_numpy() for name in names], axis=1)
    return torch.from_numpy(ids_RF), torch.from_numpy(table["label"].to_numpy().astype(np.float32))


class PlainLoop:
    """`nn.Embedding` with sparse gradients and Adagrad beside Adam for the network, or dense gradients and Adam for all."""

    def __init__(
        self,
        spec: DatasetSpec,
        architecture: Architecture,
        *,
        batch_size: int,
        sparse: bool,
        bf16: bool,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self._names = [feature.name for feature in spec.categorical]
        self._batch_size, self._bf16, self._device = batch_size, bf16, device
        self._deep = nn.ModuleList(nn.Embedding(f.capacity, f.embedding_dim, sparse=sparse) for f in spec.categorical)
        self._wide = nn.ModuleList(nn.Embedding(f.capacity, 1, sparse=sparse) for f in spec.categorical)
        for table in self._deep:
            nn.init.normal_(table.weight, std=0.01)  # type: ignore[arg-type]
        for table in self._wide:
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]
        self._net = DenseNet(architecture, table_layout(spec), num_dense=0)
        for module in (self._deep, self._wide, self._net):
            module.to(device)
        tables = [*self._deep.parameters(), *self._wide.parameters()]
        if sparse:
            of_net = torch.optim.Adam(self._net.parameters(), lr=DENSE_RATE, fused=True)
            self._optimizers: list[torch.optim.Optimizer] = [of_net, torch.optim.Adagrad(tables, lr=SPARSE_RATE)]
        else:
            self._optimizers = [torch.optim.Adam([*self._net.parameters(), *tables], lr=DENSE_RATE, fused=True)]

    def learn(self, files: Sequence[Path]) -> None:
        """Reads them and takes one shuffled pass."""
        ids_RF, labels_R = read_columns(files, self._names)
        for rows_B in torch.randperm(len(labels_R)).split(self._batch_size):
            logits_B = self._logits(ids_RF[rows_B].to(self._device))
            loss = binary_cross_entropy_with_logits(logits_B, labels_R[rows_B].to(self._device))
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()

    @torch.no_grad()
    def predict(self, file: Path) -> F32:
        """Probabilities of a file's rows."""
        ids_RF, _ = read_columns([file], self._names)
        parts = [torch.sigmoid(self._logits(ids_BF.to(self._device))).cpu() for ids_BF in ids_RF.split(4096)]
        return torch.cat(parts).numpy()

    def _logits(self, ids_BF: torch.Tensor) -> torch.Tensor:
        columns = ids_BF.unbind(1)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            deep_BS = torch.cat([table(column_B) for table, column_B in zip(self._deep, columns, strict=True)], dim=1)
            wide_BW = torch.cat([table(column_B) for table, column_B in zip(self._wide, columns, strict=True)], dim=1)
            logits_B: torch.Tensor = self._net(deep_BS, wide_BW, deep_BS.new_empty(len(ids_BF), 0))
        return logits_B
