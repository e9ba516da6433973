"""CowClip: the gradient of each embedding row is clipped by how often its id occurred (Zheng et al. 2022, algorithm 1).

    g <- g * min(1, count * max(ratio * |w|, least) / |g|)

with `g` the gradient of the row for the mean loss of the batch, `count` the occurrences of its id in the batch, `w` the row
before the step. Frequent ids may have a longer gradient than rare ones, and none one that is long beside its row: that is what
lets a batch grow without a learning rate of its own for each id.

Where we depart from the paper:
- Its optimizer is Adam; ours is row-wise or per-coordinate Adagrad. Clipping comes before it, as there.
- It adds L2 regularisation, scaled with the batch. We have none: an embedding that no example touches stays as it is.
- Its batch is our sparse step: `training.sparse_step_rows` or one batch, whichever is more. The gradient is then the sum of the
  batches' means, and the count that of all of them.
- An occurrence counts with its example's weight, so that a row that stands for ten thinned ones counts as ten.
- Its ids come one an example and field. Rows of lists and of histories occur once for each example whose list or history
  has them; a table that several features share gets one clipped sum.
- The wide weights are not clipped: they start at zero, where the paper's bound would hold them to `least` an occurrence.

Letters: U distinct rows, D length of an embedding.
"""

import torch


def clip_by_count(
    gradient_UD: torch.Tensor, weight_UD: torch.Tensor, count_U: torch.Tensor, *, ratio: float, least: float
) -> tuple[torch.Tensor, int]:
    """The clipped gradients, and how many rows were clipped.

    >>> gradient, weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> clip_by_count(gradient, weight, torch.tensor([1.0, 10.0]), ratio=1.0, least=1e-5)
    (tensor([[0.6000, 0.8000],
            [3.0000, 4.0000]]), 1)

    Args:
        gradient_UD: of the mean loss, summed over all occurrences.
        weight_UD: the rows before the step.
        count_U: occurrences of each row, above 0.
        ratio: r of the paper, above 0.
        least: zeta of the paper, at least 0: the bound of an occurrence for rows that are nearly zero.
    """
    bound_U = count_U * (ratio * weight_UD.norm(dim=1)).clamp(min=least)
    length_U = gradient_UD.norm(dim=1)
    clipped_U = length_U > bound_U
    scale_U = torch.where(clipped_U, bound_U / length_U.clamp(min=torch.finfo(length_U.dtype).tiny), 1.0)
    return gradient_UD * scale_U[:, None], int(clipped_U.sum())
