"""Attention to single clicks, against loops over users and clicks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from data_schemas.dataset import DatasetSpec, History
from data_schemas.examples import Examples
from models.attention import ActivationUnit
from models.ctr import CtrModel, build_model
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig
from pipeline.data.encode import EncodedWindow, encode, num_dense_columns
from pipeline.model_state import architecture

MakeExamples = Callable[..., Examples]
LAST = 3


@pytest.fixture
def spec(small_spec: DatasetSpec) -> DatasetSpec:
    return small_spec.model_copy(update={"history": History(of=("item",), length=5, attended_clicks=LAST)})


@pytest.fixture
def window(spec: DatasetSpec, small_examples: MakeExamples) -> EncodedWindow:
    """The second hour: some users have clicked often, some seldom, some never."""
    memory = Memory(spec)
    memory.add(small_examples(200), 0)
    window = encode(small_examples(200, seed=1, hour=1), spec, memory, None, hour=1)
    assert window.histories is not None
    kept = np.diff(next(iter(window.histories.pools.values())).offsets)
    assert {0, 1, LAST + 1} <= set(kept.tolist()), "histories of all lengths"
    return window


def _model(spec: DatasetSpec, kind: str = "deepfm") -> CtrModel:
    config = ModelConfig(kind=kind, hidden=(16, 8), interaction_dim=8)  # type: ignore[arg-type]
    model = build_model(
        architecture(config),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer="adagrad",
        sparse_learning_rate=0.1,
        wide_learning_rate=0.1,
        device=torch.device("cpu"),
        seed=0,
    )
    for parameter in model.net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for piece in model.tables.slices(with_optimizer=False):
            torch.nn.init.normal_(piece.tensor, std=0.5)
    return model


def _slow_unit(unit: ActivationUnit, clicked: list[torch.Tensor], candidate_D: torch.Tensor) -> torch.Tensor:
    """One click after the other, one hidden unit after the other."""
    total_D = torch.zeros_like(candidate_D)
    for click_D in clicked:
        weight = unit.weight.bias[0]
        for hidden in range(unit.weight.in_features):
            of_click_D, of_product_D = unit.of_click.weight[hidden].chunk(2)
            value = unit.of_click.bias[hidden] + of_click_D @ click_D + of_product_D @ (click_D * candidate_D)
            value = value + unit.of_candidate.weight[hidden] @ candidate_D
            weight = weight + unit.weight.weight[0, hidden] * max(value, torch.zeros(()))
        total_D = total_D + weight * click_D
    return total_D


def test_an_activation_unit_equals_a_loop_over_clicks_and_no_click_adds_nothing() -> None:
    torch.manual_seed(0)
    unit, clicked_BLD, candidate_BD = ActivationUnit(4), torch.randn(3, 5, 4), torch.randn(3, 4)
    clicked_BLD[1, 2:] = 0.0
    clicked_BLD[2] = 0.0
    counts = (5, 2, 0)
    expected = [_slow_unit(unit, list(clicked_BLD[b, :n]), candidate_BD[b]) for b, n in enumerate(counts)]
    torch.testing.assert_close(unit(clicked_BLD, candidate_BD), torch.stack(expected))
    assert not unit(clicked_BLD, candidate_BD)[2].any()


@torch.no_grad()
def test_a_model_that_attends_equals_a_loop_over_rows_users_and_clicks(spec: DatasetSpec, window: EncodedWindow) -> None:
    model, rows = _model(spec), np.random.default_rng(3).permutation(200)[:80]
    batch, layout = window.minibatch(rows), model.layout
    pooled = model.tables(batch.deep, batch.wide)
    deep_BS = layout.with_history(pooled.deep_BS, batch.history_row_B)
    own = dict(zip(layout.head_keys, deep_BS[:, : sum(layout.head_dims)].split(layout.head_dims, dim=1), strict=True))
    item_RD = next(piece.tensor for piece in model.tables.slices() if piece.name == "deep.item.weight")
    attended = []
    for place, row in enumerate(rows):
        clicks = _last_clicks(window, int(row))
        assert own["item"][place].equal(item_RD[window.single_RK[row, window.single_keys.index("item")]])
        attended.append(_slow_unit(model.net.attention[0], [item_RD[click] for click in clicks], own["item"][place]))  # type: ignore[arg-type]
    attended_BD = torch.stack(attended)
    products = [own[pool] * own["item"] for pool, _ in layout.pools] + [attended_BD * own["item"]]
    linear_BN = torch.cat([batch.dense_BN, *(product.sum(dim=1, keepdim=True) for product in products)], dim=1)
    head_B = model.net.head(torch.cat(list(own.values()), dim=1), torch.cat([linear_BN, *products, attended_BD], dim=1))
    expected_B = head_B + pooled.wide_BW.sum(dim=1) + linear_BN @ model.net.linear_N + model.net.bias
    torch.testing.assert_close(model(batch), expected_B, rtol=1e-4, atol=1e-4)


def _last_clicks(window: EncodedWindow, row: int) -> list[int]:
    """Table rows, from the plain mean's bag: oldest first."""
    assert window.histories is not None
    bags, user = window.histories.pools["item clicked, half-life inf h"], window.histories.user_R[row]
    return list(bags.rows_V[bags.offsets[user] : bags.offsets[user + 1]])[-LAST:]


def test_each_click_is_looked_up_once_a_batch_and_user_the_last_one_first(spec: DatasetSpec, window: EncodedWindow) -> None:
    rows = np.arange(150)
    batch, user_R = window.minibatch(rows), window.histories.user_R  # type: ignore[union-attr]
    assert batch.history_row_B is not None
    for back in range(LAST):
        ids = batch.deep[f"item clicked, {back} clicks ago"]
        owners = [int(row) for row in torch.nonzero(ids.lengths()).squeeze(1)]
        expected = {int(user_R[row]): _last_clicks(window, row)[::-1] for row in rows}
        assert {int(user_R[row]) for row in owners} == {user for user, clicks in expected.items() if len(clicks) > back}
        assert len(owners) == len({user_R[row] for row in owners})
        assert ids.values().tolist() == [expected[int(user_R[row])][back] for row in owners]
        assert set(owners) <= set(batch.history_row_B.tolist())


@pytest.mark.parametrize("kind", ["deepfm", "dcnv2", "dlrm"])
def test_every_head_learns_what_to_attend_to(spec: DatasetSpec, window: EncodedWindow, kind: str) -> None:
    model = _model(spec, kind)
    logits_B = model(window.minibatch(np.arange(64)))
    logits_B.square().sum().backward()
    for name, parameter in model.net.attention.named_parameters():
        assert parameter.grad is not None, name
        assert math.isfinite(float(parameter.grad.sum())), name
        assert parameter.grad.any(), name
