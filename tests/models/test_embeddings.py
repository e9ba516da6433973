"""Embedding tables against torch's own embeddings and Adagrad."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.errors import CorruptCheckpoint
from models.embeddings import EmbeddingTables, SparseOptimizer, TableSlice, fused_wide_tables
from models.tables import Table, TableLayout

TABLES = (
    Table(name="user", rows=11, dim=4, lookups=("user",)),
    Table(name="item", rows=5, dim=8, lookups=("item", "pool(item)")),
    Table(name="tags", rows=7, dim=4, lookups=("tags",)),
)
WIDE = tuple(Table(name=table.name, rows=table.rows, dim=1, lookups=table.lookups[:1]) for table in TABLES)
LAYOUT = TableLayout(deep=TABLES, wide=WIDE, pools=(("pool(item)", "item"),))


def _tables(optimizer: SparseOptimizer = "adagrad", seed: int = 0) -> EmbeddingTables:
    torch.manual_seed(seed)
    return EmbeddingTables(
        LAYOUT, sparse_optimizer=optimizer, sparse_learning_rate=0.1, wide_learning_rate=0.2, device=torch.device("cpu")
    )


def _weights(tables: EmbeddingTables) -> dict[str, torch.Tensor]:
    return {piece.name: piece.tensor.clone() for piece in tables.slices()}


def _batch() -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """Three rows: users 1, 1, 3; items 0, 4, 4; tags [2, 3], [], [2]; the first carries a history of items 4 and 2."""
    deep = KeyedJaggedTensor(
        keys=["user", "item", "pool(item)", "tags"],
        values=torch.tensor([1, 1, 3, 0, 4, 4, 4, 2, 2, 3, 2]),
        weights=torch.tensor([1, 1, 1, 1, 1, 1, 0.25, 0.75, 0.5, 0.5, 1]),
        lengths=torch.tensor([1, 1, 1, 1, 1, 1, 2, 0, 0, 2, 0, 1], dtype=torch.int32),
    )
    wide = KeyedJaggedTensor(
        keys=["user", "item", "tags"],
        values=torch.tensor([1, 1, 3, 0, 4, 4, 2, 3, 2]),
        weights=torch.tensor([1, 1, 1, 1, 1, 1, 0.5, 0.5, 1]),
        lengths=torch.tensor([1, 1, 1, 1, 1, 1, 2, 0, 1], dtype=torch.int32),
    )
    return deep, wide


def test_pooled_embeddings_equal_a_lookup_by_hand() -> None:
    tables = _tables()
    weights = _weights(tables)
    pooled = tables(*_batch())
    assert LAYOUT.deep_keys == ["user", "item", "tags", "pool(item)"]
    item, tags = weights["deep.item.weight"], weights["deep.tags.weight"]
    history = 0.25 * item[4] + 0.75 * item[2]
    expected = torch.cat(
        [
            weights["deep.user.weight"][[1, 1, 3]],
            item[[0, 4, 4]],
            torch.stack([tags[[2, 3]].mean(0), torch.zeros(4), tags[2]]),
            torch.stack([history, torch.zeros(8), torch.zeros(8)]),
        ],
        dim=1,
    )
    torch.testing.assert_close(pooled.deep_BS, expected)
    assert pooled.wide_BW.shape == (3, 3)
    spread = LAYOUT.with_history(pooled.deep_BS, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(spread[:, -8:], torch.stack([history, history, torch.zeros(8)]))


def test_a_step_equals_torch_adagrad_on_summed_gradients() -> None:
    tables = _tables()
    before = _weights(tables)
    generator = torch.Generator().manual_seed(1)
    pooled = tables(*_batch())
    gradient_BS = torch.randn(pooled.deep_BS.shape, generator=generator)
    gradient_BW = torch.randn(pooled.wide_BW.shape, generator=generator)
    torch.autograd.backward([pooled.deep_BS, pooled.wide_BW], [gradient_BS, gradient_BW])

    for part, column, gradient, rate in (("deep", slice(0, 4), gradient_BS, 0.1), ("wide", slice(0, 1), gradient_BW, 0.2)):
        weight = torch.nn.Parameter(before[f"{part}.user.weight"].clone())
        optimizer = torch.optim.Adagrad([weight], lr=rate, eps=1e-8)
        weight.grad = torch.zeros_like(weight).index_add(0, torch.tensor([1, 1, 3]), gradient[:, column])
        optimizer.step()
        torch.testing.assert_close(_weights(tables)[f"{part}.user.weight"], weight.detach())


def test_wide_weights_step_as_ftrl_proximal_says() -> None:
    """McMahan et al. 2013: rate / (beta + sqrt(sum of g^2)), with the gradients of a weight's rows added up first."""
    tables = EmbeddingTables(
        LAYOUT,
        sparse_optimizer="adagrad",
        sparse_learning_rate=0.1,
        wide_learning_rate=0.2,
        wide_beta=0.7,
        device=torch.device("cpu"),
    )
    expected, squares = torch.zeros(11), torch.zeros(11)
    for gradients in ([0.3, 0.1, -0.9], [0.2, 0.2, 0.4]):
        pooled = tables(*_batch())
        gradient_BW = torch.zeros_like(pooled.wide_BW)
        gradient_BW[:, 0] = torch.tensor(gradients)
        torch.autograd.backward([pooled.deep_BS, pooled.wide_BW], [torch.zeros_like(pooled.deep_BS), gradient_BW])
        summed = torch.zeros(11)
        summed[1], summed[3] = gradients[0] + gradients[1], gradients[2]  # the rows' users are 1, 1 and 3
        squares += summed**2
        expected -= 0.2 * summed / (0.7 + squares.sqrt())
    torch.testing.assert_close(_weights(tables)["wide.user.weight"][:, 0], expected)
    sums = {piece.name: piece.tensor for piece in tables.slices()}["wide.user.accumulator"]
    torch.testing.assert_close(sums[:, 0], squares, msg="checkpoints keep the sums of the weights' own squares")


def test_row_wise_adagrad_scales_a_row_by_its_mean_squared_gradient() -> None:
    tables = _tables("rowwise_adagrad")
    before = _weights(tables)["deep.user.weight"]
    pooled = tables(*_batch())
    gradient = torch.randn(pooled.deep_BS.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward([pooled.deep_BS, pooled.wide_BW], [gradient, torch.zeros_like(pooled.wide_BW)])
    summed = gradient[0, :4] + gradient[1, :4]
    expected = before[1] - 0.1 * summed / (summed.square().mean().sqrt() + 1e-8)
    torch.testing.assert_close(_weights(tables)["deep.user.weight"][1], expected)
    torch.testing.assert_close(_weights(tables)["deep.user.weight"][0], before[0])


def test_learning_rates_take_effect_with_the_next_step() -> None:
    tables = _tables()
    before = _weights(tables)
    tables.set_learning_rates(sparse=0.0, wide=0.0)
    pooled = tables(*_batch())
    torch.autograd.backward(
        [pooled.deep_BS, pooled.wide_BW], [torch.ones_like(pooled.deep_BS), torch.ones_like(pooled.wide_BW)]
    )
    torch.testing.assert_close(_weights(tables)["deep.user.weight"], before["deep.user.weight"])


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_a_row_with_a_new_owner_starts_as_another_and_nothing_of_the_old_owner_survives(optimizer: SparseOptimizer) -> None:
    tables = _tables(optimizer)
    for _ in range(2):
        pooled = tables(*_batch())
        torch.autograd.backward(
            [pooled.deep_BS, pooled.wide_BW], [torch.ones_like(pooled.deep_BS), torch.ones_like(pooled.wide_BW)]
        )
    before = _weights(tables)
    tables.start_rows({"user": np.array([1, 10])}, like=3)
    after = _weights(tables)
    for part in ("deep", "wide"):
        name = f"{part}.user"
        assert before[f"{name}.accumulator"][1].abs().sum() > 0
        assert torch.equal(after[f"{name}.weight"][[1, 10]], before[f"{name}.weight"][[3, 3]])
        assert not after[f"{name}.accumulator"][[1, 10]].any()
        others = [row for row in range(11) if row not in (1, 10)]
        for kind in ("weight", "accumulator"):
            assert torch.equal(after[f"{name}.{kind}"][others], before[f"{name}.{kind}"][others])
    for name in (name for name in before if ".user." not in name):
        assert torch.equal(after[name], before[name])


def test_decayed_accumulators_give_the_steps_of_the_formula() -> None:
    """Adagrad whose sum of squares is multiplied by .25 before the third step."""
    tables = _tables("adagrad")
    weight, total = _weights(tables)["deep.user.weight"][1], torch.zeros(4)
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        if step == 2:
            tables.decay_accumulators(0.25)
            total = total * 0.25
        pooled = tables(*_batch())
        gradient = torch.randn(pooled.deep_BS.shape, generator=generator)
        torch.autograd.backward([pooled.deep_BS, pooled.wide_BW], [gradient, torch.zeros_like(pooled.wide_BW)])
        summed = gradient[0, :4] + gradient[1, :4]
        total = total + summed.square()
        weight = weight - 0.1 * summed / (total.sqrt() + 1e-8)
    torch.testing.assert_close(_weights(tables)["deep.user.weight"][1], weight)


@pytest.mark.parametrize("cuts", [(0, 11), (0, 4, 11), (0, 1, 2, 10, 11)])
def test_slices_restore_however_they_were_cut(cuts: tuple[int, ...]) -> None:
    source, target = _tables(seed=1), _tables(seed=2)
    saved: dict[str, list[TableSlice]] = {}
    for piece in source.slices():
        rows = cuts if piece.name.split(".")[1] == "user" else (0, len(piece.tensor))
        for start, stop in pairwise(rows):
            part = TableSlice(name=piece.name, row=start, column=0, tensor=piece.tensor[start:stop].clone())
            saved.setdefault(piece.name, []).append(part)
    target.load_slices(saved)
    restored = _weights(target)
    for name, tensor in _weights(source).items():
        np.testing.assert_array_equal(restored[name].numpy(), tensor.numpy())


def test_a_missing_slice_is_named() -> None:
    tables = _tables()
    saved = {piece.name: [piece] for piece in tables.slices() if piece.name != "deep.item.weight"}
    with pytest.raises(CorruptCheckpoint, match=r"deep\.item\.weight: 0 of 40 values"):
        tables.load_slices(saved)


def test_rows_that_are_looked_up_to_be_learned_or_start_anew_count_as_changed_and_others_do_not() -> None:
    tables = _tables()
    with torch.no_grad():
        tables(*_batch())
    assert not any(len(changed.rows()) for changed in tables.changed.values())
    tables(*_batch())
    tables.start_rows({"user": np.array([10])}, like=3)
    found = {name: changed.rows().tolist() for name, changed in tables.changed.items()}
    assert found == {"user": [1, 3, 10], "item": [0, 2, 4], "tags": [2, 3]}, "a pool of a history looks its items up too"
    tables.decay_accumulators(0.5)
    assert tables.decays == [0.5]
    tables.mark_saved()
    assert not any(len(changed.rows()) for changed in tables.changed.values())
    assert tables.decays == []


@pytest.mark.parametrize("fused", [False, True])
def test_rows_count_as_changed_where_embeddings_and_wide_weights_are_looked_up_by_the_same_ids(fused: bool) -> None:
    """In a copy of the tables too, which notes for itself."""
    device = torch.device("cpu")
    layout = TableLayout(deep=(TABLES[0], TABLES[2]), wide=(WIDE[0], WIDE[2]))
    tables = EmbeddingTables(
        layout, sparse_optimizer="adagrad", sparse_learning_rate=0.1, wide_learning_rate=0.2, device=device
    )
    if fused:
        tables.wide = fused_wide_tables(layout, learning_rate=0.2, beta=1.0, device=device)
        tables.lie_on(device)
    copied = deepcopy(tables)
    ids = KeyedJaggedTensor(
        keys=["user", "tags"],
        values=torch.tensor([1, 1, 3, 2, 6]),
        weights=torch.ones(5),
        lengths=torch.tensor([1, 1, 1, 2, 0, 0], dtype=torch.int32),
    )
    copied(ids, ids)
    assert {name: changed.rows().tolist() for name, changed in copied.changed.items()} == {"user": [1, 3], "tags": [2, 6]}
    assert not any(len(changed.rows()) for changed in tables.changed.values())


@pytest.mark.parametrize("cuts", [(0, 11), (0, 4, 11), (0, 1, 2, 10, 11)])
@pytest.mark.parametrize("columns", [(0, 4), (0, 1, 4)])
def test_changed_rows_are_put_where_a_rectangle_holds_them(cuts: tuple[int, ...], columns: tuple[int, ...]) -> None:
    """However the rectangles that were saved, or are filled, were cut by rows and columns."""
    rows, values = np.array([0, 1, 4, 9, 10]), torch.arange(20.0).view(5, 4)
    expected = torch.zeros(11, 4)
    expected[torch.from_numpy(rows)] = values
    found = torch.zeros(11, 4)
    own = [
        TableSlice(name="deep.user.weight", row=top, column=left, tensor=found[top:bottom, left:right])
        for top, bottom in pairwise(cuts)
        for left, right in pairwise(columns)
    ]
    for taken in ([0, 3], [1, 2, 4]):
        for left, right in pairwise((0, 3, 4)):
            for piece in own:
                piece.put(rows[taken], left, values[taken, left:right])
    assert torch.equal(found, expected)
