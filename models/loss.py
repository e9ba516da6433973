"""The loss: log loss weighted by one over the inclusion probability, also where clicks may still come.

A row whose clicks come late is looked at several times. At a look it was clicked since the last one, or still is not; with p
the probability that it is ever clicked, and F_a and F_b the share of clicks that is known at the last look and at this one,
that happens with

    P(clicked | not before) = p (F_b - F_a) / (1 - p F_a),    P(still not | not before) = (1 - p F_b) / (1 - p F_a),

and the loss is its log loss, but for what does not depend on p. The looks of a row add up to the likelihood of when it was
clicked, if ever (Chapelle 2014, "Modeling Delayed Feedback in Display Advertising", for whole hours and any distribution of
delays), and each of them is smallest in the mean where p is right: a model can learn today's looks at the hours before, without
knowing what later looks will say. With F_a = 0 and F_b = 1 it is the log loss.

Letters: B rows of the batch.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def weighted_log_loss_sum(
    logits_B: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, log_unseen_B2: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum over rows of weight times log loss, in fp32; rows of weight 0 count nothing.

    Divide it by a constant of the window, never by the batch's own weight: a ratio of two sums is a biased estimate.

    Args:
        log_unseen_B2: `[B, 2]` log(1 - F_a) and log(1 - F_b); None: all clicks are known at the only look.
    """
    logits_B = logits_B.float()
    losses_B = binary_cross_entropy_with_logits(logits_B, labels_B, reduction="none")
    if log_unseen_B2 is not None:
        certain_B = softplus(logits_B)
        log_at_last_B, log_now_B = log_unseen_B2.unbind(1)
        losses_B = losses_B - (1 - labels_B) * softplus(logits_B + log_now_B) + softplus(logits_B + log_at_last_B) - certain_B
    return (losses_B * weights_B).sum()
