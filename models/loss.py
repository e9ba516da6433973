"""The loss: log loss weighted by one over the inclusion probability, also where clicks may still come.

A row whose clicks come late is looked at several times. At a look it was clicked since the last one, or still is not; with p
the probability that it is ever clicked, and F_a and F_b the share of clicks that is known at the last look and at this one,
that happens with

    P(clicked | not before) = p (F_b - F_a) / (1 - p F_a),    P(still not | not before) = (1 - p F_b) / (1 - p F_a),

and the loss is its log loss, but for what does not depend on p. The looks of a row add up to the likelihood of when it was
clicked, if ever (Chapelle 2014, "Modeling Delayed Feedback in Display Advertising", for whole hours and any distribution of
delays), and each of them is smallest in the mean where p is right: a model can learn today's looks at the hours before, without
knowing what later looks will say. With F_a = 0 and F_b = 1 it is the log loss.

After its first look a model knows the row, and predicts for a row that was not clicked less than for others like it: what its
next looks say would be weighed by a p that is too low, and the model would learn too many clicks. So what the first look moved
the row's own logit by is given back to it at later ones.

Letters: B rows of the batch.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def weighted_log_loss_sum(
    logits_B: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, looks_B3: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum over rows of weight times log loss, in fp32; rows of weight 0 count nothing.

    Divide it by a constant of the window, never by the batch's own weight: a ratio of two sums is a biased estimate.

    Args:
        looks_B3: log(1 - F_a), log(1 - F_b), and what is given back to the logit; None: all clicks are known at the only look.
    """
    if looks_B3 is None:
        losses_B = binary_cross_entropy_with_logits(logits_B.float(), labels_B, reduction="none")
        return (losses_B * weights_B).sum()
    at_last_B, now_B, given_back_B = looks_B3.unbind(1)
    logits_B = logits_B.float() + given_back_B
    certain_B = softplus(logits_B)
    clicked_B, unclicked_B = softplus(-logits_B), certain_B - softplus(logits_B + now_B)
    losses_B = torch.where(labels_B > 0, clicked_B, unclicked_B) + softplus(logits_B + at_last_B) - certain_B
    return (losses_B * weights_B).sum()
