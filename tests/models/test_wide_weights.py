"""The wide weights against torch's own embeddings and Adagrad, and against the fused tables that stand for them on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.embeddings import EmbeddingTables, Unfilled, fused_wide_tables
from models.tables import Table, TableLayout
from models.wide_weights import WideWeights

ROWS = {"user": 11, "item": 5, "user x item": 40}
TABLES = tuple(Table(name=name, rows=rows, dim=1, lookups=(name,)) for name, rows in ROWS.items())
RATE, BETA = 0.2, 0.7


def _wide() -> WideWeights:
    return WideWeights(TABLES, learning_rate=RATE, beta=BETA)


def _ids(rng: np.random.Generator, size: int, *, longest: int, weighted: bool = True) -> KeyedJaggedTensor:
    """Lists of up to so many ids; of exactly one where that is 1."""
    lengths = rng.integers(0, longest + 1, (len(ROWS), size)) if longest > 1 else np.ones((len(ROWS), size), np.int64)
    values = [rng.integers(rows, size=count) for rows, count in zip(ROWS.values(), lengths.sum(axis=1), strict=True)]
    joined = torch.from_numpy(np.concatenate(values))
    weights = torch.from_numpy(rng.random(len(joined), dtype=np.float32)) if weighted else None
    lengths_KB = torch.from_numpy(lengths.reshape(-1).astype(np.int32))
    return KeyedJaggedTensor(keys=list(ROWS), values=joined, weights=weights, lengths=lengths_KB, stride=size)


def _step(wide: WideWeights, ids: KeyedJaggedTensor, gradient_BK: torch.Tensor) -> torch.Tensor:
    values_BK = wide(ids).values()
    values_BK.backward(gradient_BK)
    return values_BK.detach()


def _state(wide: WideWeights) -> dict[str, torch.Tensor]:
    return {f"{name}.{kind}": part.clone() for name, *parts in wide.parts() for kind, part in enumerate(parts)}


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 30), longest=st.integers(1, 4), weighted=st.booleans())
def test_lookups_and_steps_equal_those_of_torch(seed: int, size: int, longest: int, weighted: bool) -> None:
    """Embedding bags, and Adagrad over dense gradients, which adds its epsilon to the root as beta is added."""
    rng, wide = np.random.default_rng(seed), _wide()
    expected = {name: torch.nn.EmbeddingBag(rows, 1, mode="sum") for name, rows in ROWS.items()}
    for bag in expected.values():
        torch.nn.init.zeros_(bag.weight)
    optimizer = torch.optim.Adagrad([bag.weight for bag in expected.values()], lr=RATE, eps=BETA)
    for _ in range(3):
        ids = _ids(rng, size, longest=longest, weighted=weighted)
        gradient_BK = torch.from_numpy(rng.normal(size=(size, len(ROWS))).astype(np.float32))
        columns = []
        for name, bag in expected.items():
            own = ids[name]
            columns.append(bag(own.values(), own.offsets()[:-1].long(), own.weights() if weighted else None))
        expected_BK = torch.cat(columns, dim=1)
        torch.testing.assert_close(_step(wide, ids, gradient_BK), expected_BK.detach(), rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()
        expected_BK.backward(gradient_BK)
        optimizer.step()
        for name, weight_R1, squares_R1 in wide.parts():
            weight = expected[name].weight
            torch.testing.assert_close(weight_R1, weight.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(squares_R1, optimizer.state[weight]["sum"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("longest", [1, 3])
def test_weights_are_marked_where_they_are_looked_up_to_be_learned_only(longest: int) -> None:
    rng, wide = np.random.default_rng(2), _wide()
    learned, predicted = (_ids(rng, 4, longest=longest) for _ in range(2))
    wide.marks_R = torch.zeros(sum(ROWS.values()), dtype=torch.bool)
    with torch.no_grad():
        wide(predicted)
    assert not wide.marks_R.any()
    _step(wide, learned, torch.ones(4, len(ROWS)))
    touched = torch.cat([squares_R1.view(-1) > 0 for _, _, squares_R1 in wide.parts()])
    assert touched.any()
    assert torch.equal(wide.marks_R, touched)


def test_fused_tables_learn_the_same() -> None:
    """Which stand for the vector on a GPU, and where tables are spread over processes."""
    deep = tuple(Table(name=name, rows=rows, dim=4, lookups=(name,)) for name, rows in ROWS.items())
    layout, device = TableLayout(deep=deep, wide=TABLES), torch.device("cpu")
    both = [
        EmbeddingTables(
            layout,
            sparse_optimizer="adagrad",
            sparse_learning_rate=0.1,
            wide_learning_rate=RATE,
            wide_beta=BETA,
            device=device,
        )
        for _ in range(2)
    ]
    both[1].wide = fused_wide_tables(layout, learning_rate=RATE, beta=BETA, device=device)
    assert [tables.wide_vector is None for tables in both] == [False, True]
    rng = np.random.default_rng(5)
    for step in range(4):
        ids = _ids(rng, 20, longest=3)
        gradient_BK = torch.from_numpy(rng.normal(size=(20, len(ROWS))).astype(np.float32))
        for tables in both:
            tables.set_learning_rates(sparse=0.1, wide=RATE / (1 + step))
        looked_up = [tables(ids, ids).wide_BW for tables in both]
        torch.testing.assert_close(*looked_up, rtol=1e-5, atol=1e-6)
        for wide_BW in looked_up:
            wide_BW.backward(gradient_BK)
    first, second = ({piece.name: piece.tensor for piece in tables.slices() if "wide" in piece.name} for tables in both)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-6)
    for tensor in both[1].wide.state_dict().values():
        assert tensor[:, 0].any()
        assert not tensor[:, 1:].any(), "no checkpoint holds the other columns"


def test_what_is_drawn_from_a_range_stays_as_it_is_where_all_of_it_is_about_to_be_loaded() -> None:
    """But for ranges of one value: the columns of fused wide tables that no checkpoint holds start so."""
    with Unfilled():
        drawn, constant = torch.ones(3).uniform_(-1.0, 1.0), torch.ones(3).uniform_(0.0, 0.0)
    assert torch.equal(drawn, torch.ones(3))
    assert torch.equal(constant, torch.zeros(3))


def test_keys_in_another_order_are_refused() -> None:
    ids = KeyedJaggedTensor(
        keys=["item", "user", "user x item"],
        values=torch.tensor([0, 0, 0]),
        lengths=torch.tensor([1, 1, 1], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=r"in the order \['user', 'item', 'user x item'\], got \['item'"):
        _wide()(ids)


def test_weights_of_ones_may_be_passed_by() -> None:
    found = []
    for weighted in (True, False):
        rng = np.random.default_rng(8)
        wide = WideWeights(TABLES, learning_rate=RATE, beta=BETA, weighted=weighted)
        for _ in range(3):
            bare = _ids(rng, 9, longest=1, weighted=False)
            ones = torch.ones(len(bare.values()))
            ids = KeyedJaggedTensor(
                keys=list(ROWS), values=bare.values(), weights=ones, lengths=bare.lengths(), stride=bare.stride()
            )
            _step(wide, ids, torch.from_numpy(rng.normal(size=(9, 3)).astype(np.float32)))
        found.append(_state(wide))
    assert all(torch.equal(first, found[1][name]) for name, first in found[0].items())


@pytest.mark.parametrize("longest", [1, 3])
def test_what_changes_between_a_lookup_and_its_step_is_stepped_as_it_then_is(longest: int) -> None:
    """Two lookups of some of the same ids before the step of either; and rows that start anew in between."""
    rng = np.random.default_rng(4)
    first, second = _ids(rng, 12, longest=longest), _ids(rng, 12, longest=longest)
    gradient_BK = torch.from_numpy(rng.normal(size=(12, 3)).astype(np.float32))
    at_once, in_turns = _wide(), _wide()
    both = [at_once(ids).values() for ids in (first, second)]
    for values_BK in both:
        values_BK.backward(gradient_BK)
    for ids in (first, second):
        _step(in_turns, ids, gradient_BK)
    for name, tensor in _state(in_turns).items():
        assert torch.equal(tensor, _state(at_once)[name])

    values_BK = at_once(first).values()
    for _, weight_R1, squares_R1 in at_once.parts():
        weight_R1.fill_(0.5)
        squares_R1.fill_(0.25)
    values_BK.backward(torch.zeros(12, 3))
    for _, weight_R1, squares_R1 in at_once.parts():
        assert bool((weight_R1 == 0.5).all())
        assert bool((squares_R1 == 0.25).all())


def test_a_step_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    ids, gradient_BK = _ids(rng, 10, longest=3), torch.from_numpy(rng.normal(size=(10, 3)).astype(np.float32))
    failing, expected = _wide(), _wide()
    for wide in (failing, expected):
        _step(wide, ids, gradient_BK)
    values_BK = failing(ids).values()
    with monkeypatch.context() as broken:
        broken.setattr(failing, "_beta", "no number")
        with pytest.raises(TypeError):
            values_BK.backward(gradient_BK)
    for wide in (failing, expected):
        _step(wide, ids, gradient_BK)
    assert all(torch.equal(tensor, _state(expected)[name]) for name, tensor in _state(failing).items())


@pytest.mark.parametrize("weighted", [True, False])
def test_keys_may_have_ids_for_some_rows_only(weighted: bool) -> None:
    """As where gradients are given row by row: each table has as many rows of the batch as it has gradients."""
    wide = WideWeights(TABLES, learning_rate=RATE, beta=0.0, weighted=weighted)
    ids = KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.tensor([4, 9, 0]),
        weights=torch.ones(3),
        lengths=torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.int32),
        stride=2,
    )
    gradient_BK = torch.tensor([[1.0, 7.0, -1.0], [1.0, 7.0, 7.0]])
    assert torch.equal(_step(wide, ids, gradient_BK), torch.zeros(2, 3))
    with torch.no_grad():
        values_BK = wide(ids).values()
    torch.testing.assert_close(values_BK, torch.tensor([[-RATE, 0.0, RATE], [-RATE, 0.0, 0.0]]))


@pytest.mark.parametrize("size", [0, 3])
def test_where_nothing_is_looked_up_nothing_is_stepped(size: int) -> None:
    wide = _wide()
    none = torch.empty(0)
    lengths = torch.zeros(len(ROWS) * size, dtype=torch.int32)
    ids = KeyedJaggedTensor(keys=list(ROWS), values=none.long(), weights=none, lengths=lengths, stride=size)
    assert torch.equal(_step(wide, ids, torch.ones(size, len(ROWS))), torch.zeros(size, len(ROWS)))
    assert not any(tensor.any() for tensor in _state(wide).values())


def test_predicting_steps_nothing() -> None:
    wide = _wide()
    ids = _ids(np.random.default_rng(1), 6, longest=1)
    _step(wide, ids, torch.ones(6, 3))
    before = _state(wide)
    with torch.no_grad():
        values_BK = wide(ids).values()
    assert not values_BK.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in _state(wide).items())
