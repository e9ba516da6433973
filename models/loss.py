"""The loss: log loss weighted by one over the inclusion probability.

Letters: B rows of the batch.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits


def weighted_log_loss_sum(logits_B: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
    """The sum over rows of weight times log loss, in fp32; rows of weight 0 count nothing.

    Divide it by a constant of the window, never by the batch's own weight: a ratio of two sums is a biased estimate.
    """
    losses_B = binary_cross_entropy_with_logits(logits_B.float(), labels_B, reduction="none")
    return (losses_B * weights_B).sum()
