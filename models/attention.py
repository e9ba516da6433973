"""How much each of a user's last clicks says about a candidate: DIN's activation unit (Zhou et al. 2018, arXiv:1706.06978).

Enters: embeddings of what was clicked, and of the candidate. Leaves: the clicks' weighted sum.

Letters: B rows, L clicks, D length of an embedding, H hidden units.
"""

import torch
from torch import nn

HIDDEN = 16


class ActivationUnit(nn.Module):
    """`sum over l of a(e_l, c) e_l`, the paper's equation 3. Weights do not sum to 1, so that many fitting clicks say more.

    `a` is a network of one hidden layer on the click, the candidate and their product. Departures: the product is taken by
    coordinate, where the paper has the outer one, and ReLU stands for Dice. An embedding of zeros, which stands for no click,
    adds nothing.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_click = nn.Linear(2 * dim, HIDDEN)
        self.of_candidate = nn.Linear(dim, HIDDEN, bias=False)
        self.weight = nn.Linear(HIDDEN, 1)

    def forward(self, clicked_BLD: torch.Tensor, candidate_BD: torch.Tensor) -> torch.Tensor:
        """Weighted sums `[B, D]`."""
        pair_BLP = torch.cat([clicked_BLD, clicked_BLD * candidate_BD[:, None]], dim=2)
        hidden_BLH = torch.relu(self.of_click(pair_BLP) + self.of_candidate(candidate_BD)[:, None])
        weight_B1L: torch.Tensor = self.weight(hidden_BLH).transpose(1, 2)
        return torch.bmm(weight_B1L, clicked_BLD.to(weight_B1L.dtype)).squeeze(1)
