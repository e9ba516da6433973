"""The loss of rows whose clicks come late, beside its closed form and the likelihood that it is a part of."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from models.loss import weighted_log_loss_sum

KNOWN = torch.tensor([0.0, 0.3, 0.55, 0.8, 1.0], dtype=torch.float64)
"""Share of the clicks that is known at each look."""
LOGITS = torch.linspace(-6, 5, 12)


def look(logits: torch.Tensor, place: int, *, clicked: bool) -> torch.Tensor:
    """`[B]` losses of the look after `place`."""
    looks = torch.cat([torch.log(1 - KNOWN[place : place + 2]).clamp(min=-80).float(), torch.zeros(1)]).expand(len(logits), 3)
    labels = torch.full_like(logits, float(clicked))
    ones = torch.ones(1)
    rows = zip(logits.split(1), labels.split(1), looks.split(1), strict=True)
    return torch.stack([weighted_log_loss_sum(logit, label, ones, own) for logit, label, own in rows])


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("clicked", [True, False])
def test_a_look_has_the_log_loss_of_what_happened_since_the_last(place: int, clicked: bool) -> None:
    p, before, now = torch.sigmoid(LOGITS.double()), KNOWN[place], KNOWN[place + 1]
    chance = p * (now - before) / (1 - p * before)
    expected = -torch.log(chance if clicked else 1 - chance)
    constant = torch.log(now - before) if clicked else 0.0
    torch.testing.assert_close(look(LOGITS, place, clicked=clicked).double() - constant, expected, rtol=1e-4, atol=1e-4)


def test_without_delay_it_is_the_log_loss() -> None:
    weights, labels = torch.rand(12, generator=torch.Generator().manual_seed(0)), (LOGITS > 1).float()
    all_known = torch.tensor([0.0, -80.0, 0.0]).expand(12, 3)
    plain = (binary_cross_entropy_with_logits(LOGITS, labels, reduction="none") * weights).sum()
    for looks in (None, all_known):
        torch.testing.assert_close(weighted_log_loss_sum(LOGITS, labels, weights, looks), plain)


def test_the_looks_of_a_row_add_up_to_the_likelihood_of_when_it_was_clicked() -> None:
    p = torch.sigmoid(LOGITS.double())
    not_yet = torch.zeros(len(LOGITS), dtype=torch.float64)
    for place in range(4):
        clicked = (not_yet + look(LOGITS, place, clicked=True)).double()
        torch.testing.assert_close(clicked, -torch.log(p), rtol=1e-4, atol=1e-4)
        not_yet = not_yet + look(LOGITS, place, clicked=False)
    torch.testing.assert_close(not_yet.double(), -torch.log(1 - p), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", range(4))
def test_no_look_moves_a_model_that_is_right(place: int) -> None:
    logits = LOGITS.clone().requires_grad_()
    p, before, now = torch.sigmoid(LOGITS), KNOWN[place].float(), KNOWN[place + 1].float()
    chance = p * (now - before) / (1 - p * before)
    expected_loss = chance * look(logits, place, clicked=True) + (1 - chance) * look(logits, place, clicked=False)
    (gradient,) = torch.autograd.grad(expected_loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=2e-6)


def test_what_is_given_back_moves_the_logit() -> None:
    ones, labels = torch.ones(12), (LOGITS > 1).float()
    looks = torch.stack([torch.full((12,), -0.3), torch.full((12,), -1.0), torch.linspace(-1, 2, 12)], dim=1)
    moved = torch.cat([looks[:, :2], torch.zeros(12, 1)], dim=1)
    first = weighted_log_loss_sum(LOGITS, labels, ones, looks)
    torch.testing.assert_close(first, weighted_log_loss_sum(LOGITS + looks[:, 2], labels, ones, moved))
