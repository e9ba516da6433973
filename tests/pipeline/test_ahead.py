"""Batches that are cut ahead are those that would be cut at once; a guess that was wrong is counted and changes nothing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import Examples
from data_schemas.minibatch import MiniBatch
from models.memory import Memory
from pipeline.data.encode import EncodedWindow, encode
from pipeline.training.ahead import LEAST_ROWS, ChunkRows, CutAhead, ahead_from


@pytest.fixture
def window(small_spec: DatasetSpec, small_examples: Callable[..., Examples]) -> EncodedWindow:
    return encode(small_examples(200), small_spec, Memory(small_spec), None, hour=0)


def chunk_of(*rows: int, filling: int = 0, **more: Any) -> ChunkRows:
    return ChunkRows(rows_C=np.array(rows), filling_C=np.arange(len(rows)) >= len(rows) - filling, **more)


def assert_same(one: MiniBatch, other: MiniBatch) -> None:
    for first, second in ((one.deep, other.deep), (one.wide, other.wide)):
        assert first.keys() == second.keys()
        assert torch.equal(first.values(), second.values())
        assert torch.equal(first.lengths(), second.lengths())
        assert torch.equal(first.weights(), second.weights())
    for name in ("dense_BN", "labels_B", "weights_B"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("expected", "thrown_away"),
    [(None, 0), (chunk_of(5, 3, 9, filling=1), 0), (chunk_of(5, 3, 8, filling=1), 1), (chunk_of(5, 3, 9), 1)],
)
def test_what_is_taken_is_what_was_planned(window: EncodedWindow, expected: ChunkRows | None, thrown_away: int) -> None:
    planned = chunk_of(5, 3, 9, filling=1)
    with CutAhead(window) as cutting:
        if expected is not None:
            cutting.expect(expected)
        assert_same(cutting.take(planned), window.minibatch(planned.rows_C, filling_B=planned.filling_C))
    assert cutting.thrown_away == thrown_away
    assert cutting.waiting_seconds > 0


@pytest.mark.parametrize(
    ("ahead", "device", "from_rows"),
    [(None, "cpu", LEAST_ROWS), (None, "cuda", 0), (True, "cpu", 0), (False, "cpu", math.inf), (False, "cuda", math.inf)],
)
def test_small_chunks_are_cut_ahead_only_beside_another_device(
    window: EncodedWindow, ahead: bool | None, device: str, from_rows: float
) -> None:
    assert ahead_from(ahead, torch.device(device)) == from_rows
    with CutAhead(window, from_rows=from_rows) as cutting:
        assert [cutting.is_worth_it(rows) for rows in (1, LEAST_ROWS)] == [from_rows <= 1, from_rows <= LEAST_ROWS]


def test_rows_whose_weights_have_changed_are_cut_anew(window: EncodedWindow) -> None:
    with CutAhead(window) as cutting:
        cutting.expect(chunk_of(1, 2))
        window.weights_R[2] = 7.0
        assert cutting.take(chunk_of(1, 2, reweighted=True)).weights_B.tolist() == [1.0, 7.0]
    assert cutting.thrown_away == 1


@pytest.mark.parametrize("taken", [chunk_of(1, 10_000), chunk_of(1, 2)], ids=["the one that fails", "another"])
def test_what_goes_wrong_on_the_thread_is_raised(window: EncodedWindow, taken: ChunkRows) -> None:
    with CutAhead(window) as cutting:
        cutting.expect(chunk_of(0))
        cutting.take(chunk_of(0))
        cutting.expect(chunk_of(1, 10_000))
        assert cutting._expected is not None
        assert cutting._expected[1].exception() is not None  # it has run: it cannot be cancelled any more
        with pytest.raises(IndexError):
            cutting.take(taken)
