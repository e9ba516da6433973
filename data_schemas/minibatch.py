"""MiniBatch: what one step of the learner takes in.

Letters: B rows of the batch, N dense columns.
"""

from dataclasses import dataclass

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """Rows of one step, as tensors on one device."""

    deep: KeyedJaggedTensor
    """Weighted table rows for the embeddings, stride B; lists have weights that sum to 1."""
    wide: KeyedJaggedTensor
    """Weighted table rows for the wide part, stride B."""
    history_row_B: torch.Tensor | None
    """`[B] int64`: the row of this batch that carries the history of row b's user, whose ids are looked up once a batch."""
    dense_BN: torch.Tensor
    """`[B, N] float32`: normalised numbers, then their missing flags."""
    labels_B: torch.Tensor
    """`[B] float32`, 0 or 1."""
    weights_B: torch.Tensor
    """`[B] float32`, one over the inclusion probability; 0 for rows that only fill a shape."""
    logit_shifts_B: torch.Tensor | None = None
    """`[B] float32`, added to the logits while learning and never when predicting: what drawn rows owe to how they were
    drawn. None: nothing."""
    looks_B3: torch.Tensor | None = None
    """`[B, 3] float32`: logarithms of the shares of a row's clicks that were not known when it was last learned, and are not
    known now, and what is given back to its logit; as `models/loss.py` takes them. None: every click is known."""

    @property
    def num_rows(self) -> int:
        """B, filling rows counted."""
        return self.labels_B.numel()

    def to(self, device: torch.device) -> "MiniBatch":
        """The same batch on `device`."""
        return MiniBatch(
            deep=self.deep.to(device, non_blocking=True),
            wide=self.wide.to(device, non_blocking=True),
            history_row_B=None if self.history_row_B is None else self.history_row_B.to(device, non_blocking=True),
            dense_BN=self.dense_BN.to(device, non_blocking=True),
            labels_B=self.labels_B.to(device, non_blocking=True),
            weights_B=self.weights_B.to(device, non_blocking=True),
            logit_shifts_B=None if self.logit_shifts_B is None else self.logit_shifts_B.to(device, non_blocking=True),
            looks_B3=None if self.looks_B3 is None else self.looks_B3.to(device, non_blocking=True),
        )
