"""One weight an id, of all wide tables in one vector, looked up and stepped once a distinct id.

Enters: ids of each table. Leaves: their weights; a backward pass through them steps the vector.

Fused tables look rows of at least four numbers up, each as often as it occurs, and sort the ids of a step to add the gradients
of each row. Here the ids of a lookup are sorted first: memory is read and written once for each distinct one, in its own order,
and gradients are added up and weights stepped in vectors as short as the distinct ids are many, which a cache holds.

Letters: R rows of all tables, K tables, B rows of the batch, V ids looked up, U distinct ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from models.distinct import distinct_by_kind
from models.tables import Table


class WideWeights(nn.Module):
    """Weights with the steps of FTRL-proximal (McMahan et al. 2013, section 2.1) but for its L1 and L2:
    `learning_rate / (beta + sqrt(sum of g^2))` for each, g the gradient summed over the rows of a step.

    For tables that lie whole on a CPU; the result is deterministic. An id has to be a row of its own table: what lies beyond
    stands for an id of another, which may then be stepped for one of them alone.
    """

    state_R2: torch.Tensor
    """Weights, and sums of squared gradients: beside each other, since memory gives both of an id as fast as one."""

    def __init__(self, tables: Sequence[Table], *, learning_rate: float, beta: float, weighted: bool = True) -> None:
        """All weights are zero.

        Args:
            tables: each with one lookup.
            learning_rate: can be set anew between steps.
            beta: above 0.
            weighted: False: every key has one id a row or none, of weight 1, and lookups pass weights by.
        """
        super().__init__()
        assert all(len(table.lookups) == 1 for table in tables)
        self.learning_rate = learning_rate
        self.weighted = weighted
        self._beta = beta
        self._tables = tuple(tables)
        self._keys = [table.lookups[0] for table in tables]
        rows = [table.rows for table in tables]
        self._first_K1 = torch.tensor(rows).cumsum(0).sub(torch.tensor(rows)).unsqueeze(1)
        self.register_buffer("state_R2", torch.zeros(sum(rows), 2))
        self.marks_R: torch.Tensor | None = None
        """`[R] bool` of someone who wants to know which weights are looked up to be learned; None: nobody does."""

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        """Weighted sums, one a key; no ids give zero.

        Raises:
            ValueError: the keys are not those of the tables, in their order.
        """
        if ids.keys() != self._keys:
            raise ValueError(f"wide weights are looked up in the order {self._keys}, got {ids.keys()}")
        anchor = torch.zeros((), requires_grad=True)
        values_BK: torch.Tensor = _LookedUp.apply(anchor, self, self.look_up(ids), ids)  # type: ignore[no-untyped-call]
        return KeyedTensor(keys=self._keys, length_per_key=[1] * len(self._keys), values=values_BK)

    def parts(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name of each table, its weights and their sums of squared gradients, both `[rows, 1]` of the live storage."""
        start = 0
        for table in self._tables:
            own = slice(start, start + table.rows)
            yield table.name, self.state_R2[own, :1], self.state_R2[own, 1:]
            start += table.rows

    def look_up(self, ids: KeyedJaggedTensor) -> "DistinctWeights":
        """Where the weights of these ids stand, and what they are now; they are marked where gradients are asked for."""
        place_U, of_V = map(torch.from_numpy, distinct_by_kind(self._places(ids).numpy()))
        if self.marks_R is not None and torch.is_grad_enabled():
            self.marks_R.index_fill_(0, place_U, True)
        return DistinctWeights(place_U=place_U, of_V=of_V, state_U2=self._at(place_U), version=self.state_R2._version)

    def step(self, found: "DistinctWeights", gradient_V: torch.Tensor) -> None:
        """One step, with the gradients by what was looked up; `found` is used up."""
        is_as_it_was = self.state_R2._version == found.version  # counts what is changed in place, through views too
        state_U2 = found.state_U2 if is_as_it_was else self._at(found.place_U)
        sum_U = torch.zeros(len(found.place_U)).scatter_add_(0, found.of_V, gradient_V)
        weight_U, squares_U = state_U2.unbind(dim=1)
        squares_U.addcmul_(sum_U, sum_U)
        weight_U.addcdiv_(sum_U, squares_U.sqrt().add_(self._beta), value=-self.learning_rate)
        self._pairs_R.scatter_(0, found.place_U, state_U2.view(torch.int64).view(-1))

    def _places(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """`[K, V/K]`, or `[1, V]` where keys have not as many ids as others: where in the vector each id's weight stands."""
        rows_V: torch.Tensor = ids.values().long()
        counts = ids.length_per_key()
        if len(set(counts)) == 1:
            return rows_V.view(len(counts), counts[0]) + self._first_K1
        return (rows_V + self._first_K1.view(-1).repeat_interleave(torch.tensor(counts))).unsqueeze(0)

    def _at(self, place_U: torch.Tensor) -> torch.Tensor:
        """`[U, 2]`: a copy of weights and sums of squares."""
        return self._pairs_R.index_select(0, place_U).view(torch.float32).view(-1, 2)

    @property
    def _pairs_R(self) -> torch.Tensor:
        """Each weight and its sum of squares as one number of twice the size, of the live storage."""
        return self.state_R2.view(torch.int64).view(-1)


@dataclass(frozen=True, kw_only=True)
class DistinctWeights:
    """What was looked up."""

    place_U: torch.Tensor
    """Places of the distinct ids, rising."""
    of_V: torch.Tensor
    """Which of them each id is."""
    state_U2: torch.Tensor
    """Weights and sums of squares as they were."""
    version: int
    """Of the vector, then."""


class _LookedUp(torch.autograd.Function):
    """Weights by id, whose backward pass steps them; the first argument only makes autograd call it."""

    @staticmethod
    def forward(
        context: Any, anchor: torch.Tensor, wide: WideWeights, found: DistinctWeights, ids: KeyedJaggedTensor
    ) -> torch.Tensor:
        weights_V = ids.weights_or_none() if wide.weighted else None
        num_ids, num_bags = len(found.of_V), len(ids.keys()) * ids.stride()
        lists = num_ids != num_bags or (wide.weighted and _some_have_none(ids.lengths()))
        if lists:
            pooled = embedding_bag(
                found.of_V,
                found.state_U2,
                ids.offsets().long(),
                mode="sum",
                per_sample_weights=weights_V,
                include_last_offset=True,
            )[:, 0]
        else:
            pooled = found.state_U2[:, 0].contiguous().index_select(0, found.of_V)
            pooled = pooled if weights_V is None else pooled * weights_V
        context.wide, context.found, context.weights_V = wide, found, weights_V
        context.lengths = ids.lengths() if lists else None
        return pooled.view(len(ids.keys()), ids.stride()).t().clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None]:
        gradient_V = gradients[0].t().reshape(-1)
        if context.lengths is not None:
            gradient_V = gradient_V.repeat_interleave(context.lengths)
        if context.weights_V is not None:
            gradient_V = gradient_V * context.weights_V
        found, context.found = context.found, None  # its state is overwritten
        context.wide.step(found, gradient_V)
        return None, None, None, None


def _some_have_none(lengths: torch.Tensor) -> bool:
    """Whether some bag has no id; where there are as many ids as bags, others have several then."""
    return len(lengths) > 0 and int(lengths.min()) == 0
