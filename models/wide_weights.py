"""One weight an id, of all wide tables in one vector, stepped without sorting the ids.

Enters: ids of each table. Leaves: their weights; a backward pass through them steps the vector.

Fused tables look rows of at least four numbers up, and sort the ids of a step to add the gradients of each row. A weight an id
is little enough to do without: gradients are scattered into a vector of zeros as long as the weights; then each id takes the
sum of its own, comes to the same weight however often it occurs, and puts that in place.

Letters: R rows of all tables, K tables, B rows of the batch, V ids looked up.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from models.tables import Table

SPARSE_SHARE = 0.125
"""Of R, above which V ids are taken for many: it is then quicker to look for the sums that are not zero, which are as many as
there are distinct ids and stand in the order of memory."""


class WideWeights(nn.Module):
    """Weights with the steps of FTRL-proximal (McMahan et al. 2013, section 2.1) but for its L1 and L2:
    `learning_rate / (beta + sqrt(sum of g^2))` for each, g the gradient summed over the rows of a step.

    For tables that lie whole on a CPU; the result is deterministic. An id has to be a row of its own table: what lies beyond
    stands for an id of another.
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
        self._sums_R: torch.Tensor | None = None
        """Zeros between steps; None: to be made."""

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        """Weighted sums, one a key; no ids give zero.

        Raises:
            ValueError: the keys are not those of the tables, in their order.
        """
        if ids.keys() != self._keys:
            raise ValueError(f"wide weights are looked up in the order {self._keys}, got {ids.keys()}")
        anchor = torch.zeros((), requires_grad=True)
        values_BK: torch.Tensor = _LookedUp.apply(anchor, self, ids)  # type: ignore[no-untyped-call]
        return KeyedTensor(keys=self._keys, length_per_key=[1] * len(self._keys), values=values_BK)

    def parts(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name of each table, its weights and their sums of squared gradients, both `[rows, 1]` of the live storage."""
        start = 0
        for table in self._tables:
            own = slice(start, start + table.rows)
            yield table.name, self.state_R2[own, :1], self.state_R2[own, 1:]
            start += table.rows

    def places(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """`[V]`: where in the vector each id's weight stands."""
        rows_V: torch.Tensor = ids.values().long()
        counts = ids.length_per_key()
        if len(set(counts)) == 1:
            return (rows_V.view(len(counts), counts[0]) + self._first_K1).view(-1)
        return rows_V + self._first_K1.view(-1).repeat_interleave(torch.tensor(counts))

    def at(self, places_V: torch.Tensor) -> torch.Tensor:
        """`[V, 2]`: a copy of weights and sums of squares, taken as numbers of twice the size."""
        return self.state_R2.view(torch.int64).view(-1).take(places_V).view(torch.float32).view(-1, 2)

    def step(self, places_V: torch.Tensor, gradient_V: torch.Tensor, state_V2: torch.Tensor | None = None) -> None:
        """One step.

        Args:
            places_V: may repeat.
            gradient_V: by what was looked up there.
            state_V2: what `at` gives for `places_V`, which is overwritten; None: not known.
        """
        sums_R = self.state_R2.new_zeros(len(self.state_R2)) if self._sums_R is None else self._sums_R
        self._sums_R = None  # a step that fails leaves no gradients to the next
        sums_R.scatter_add_(0, places_V, gradient_V)
        if len(places_V) > SPARSE_SHARE * len(sums_R):
            places_V, state_V2 = sums_R.nonzero().view(-1), None
        sum_V, state_V2 = sums_R.take(places_V), self.at(places_V) if state_V2 is None else state_V2
        weight_V, squares_V = state_V2.unbind(dim=1)
        squares_V.addcmul_(sum_V, sum_V)
        weight_V.addcdiv_(sum_V, squares_V.sqrt().add_(self._beta), value=-self.learning_rate)
        self.state_R2.view(torch.int64).view(-1).put_(places_V, state_V2.view(torch.int64).view(-1))
        self._sums_R = sums_R.index_fill_(0, places_V, 0.0)


class _LookedUp(torch.autograd.Function):
    """Weights by id, whose backward pass steps them; the first argument only makes autograd call it."""

    @staticmethod
    def forward(context: Any, anchor: torch.Tensor, wide: WideWeights, ids: KeyedJaggedTensor) -> torch.Tensor:
        places_V, weights_V = wide.places(ids), ids.weights_or_none() if wide.weighted else None
        state_V2: torch.Tensor | None = None
        lists = len(places_V) != len(ids.keys()) * ids.stride() or (wide.weighted and _some_have_none(ids.lengths()))
        if lists:
            pooled = embedding_bag(
                places_V,
                wide.state_R2,
                ids.offsets().long(),
                mode="sum",
                per_sample_weights=weights_V,
                include_last_offset=True,
            )[:, 0]
        else:
            state_V2 = wide.at(places_V)
            pooled = state_V2[:, 0] if weights_V is None else state_V2[:, 0] * weights_V
        context.wide, context.places_V, context.weights_V = wide, places_V, weights_V
        context.lengths = ids.lengths() if lists else None
        context.state_V2, context.version = state_V2, wide.state_R2._version
        return pooled.view(len(ids.keys()), ids.stride()).t().clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        gradient_V = gradients[0].t().reshape(-1)
        if context.lengths is not None:
            gradient_V = gradient_V.repeat_interleave(context.lengths)
        if context.weights_V is not None:
            gradient_V = gradient_V * context.weights_V
        wide: WideWeights = context.wide
        is_as_it_was = wide.state_R2._version == context.version  # counts what is changed in place, through views too
        state_V2, context.state_V2 = context.state_V2, None  # it is overwritten
        wide.step(context.places_V, gradient_V, state_V2 if is_as_it_was else None)
        return None, None, None


def _some_have_none(lengths: torch.Tensor) -> bool:
    """Whether some bag has no id; where there are as many ids as bags, others have several then."""
    return len(lengths) > 0 and int(lengths.min()) == 0
