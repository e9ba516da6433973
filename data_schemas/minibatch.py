"""MiniBatch: what one step of the learner takes in.

Letters: B rows of the batch, N dense columns, F features.
"""

from dataclasses import dataclass

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """Rows of one step, as tensors on one device."""

    sparse: KeyedJaggedTensor
    """F keys in the order of the spec, stride B; values are table rows."""
    dense_BN: torch.Tensor
    """`[B, N] float32`: normalised numbers, then their missing flags."""
    labels_B: torch.Tensor
    """`[B] float32`, 0 or 1."""
    weights_B: torch.Tensor
    """`[B] float32`, one over the inclusion probability; 0 for rows that only fill a shape."""

    @property
    def num_rows(self) -> int:
        """B, filling rows counted."""
        return self.labels_B.numel()

    def to(self, device: torch.device) -> "MiniBatch":
        """The same batch on `device`."""
        return MiniBatch(
            sparse=self.sparse.to(device, non_blocking=True),
            dense_BN=self.dense_BN.to(device, non_blocking=True),
            labels_B=self.labels_B.to(device, non_blocking=True),
            weights_B=self.weights_B.to(device, non_blocking=True),
        )
