"""The gradient of each table row that a batch looked up, and one step of the tables with gradients given row by row.

Enters: the gradient of the pooled embeddings. Leaves: `RowGradients`, summed over everything that a table is looked up by:
single ids, lists, and pools of histories, which share the table of their feature. The tables sum the same inside backward;
here it can be clipped or averaged first, and then goes through the same optimizers.

Letters: C rows of the chunk, V ids looked up, U distinct rows of a table, D length of an embedding, S the sum of the lengths.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.embeddings import EmbeddingTables, Pooled
from models.tables import Table, TableLayout

Part = Literal["deep", "wide"]


@dataclass(frozen=True, kw_only=True)
class RowGradients:
    """Of one table, for one step."""

    part: Part
    table: str
    rows_U: torch.Tensor
    """Distinct rows, rising."""
    gradient_UD: torch.Tensor
    count_U: torch.Tensor
    """Sum of the weights of the examples in which each row occurs; a row twice in one example counts twice."""

    @property
    def name(self) -> str:
        """As `EmbeddingTables.slices` names the table."""
        return f"{self.part}.{self.table}.weight"


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """What a chunk looked up in one part of the tables, and the gradient of what it got."""

    part: Part
    tables: Sequence[Table]
    ids: KeyedJaggedTensor
    gradient_CS: torch.Tensor
    columns: Mapping[str, slice]
    """Of `gradient_CS`, by key."""
    counts_by_key_C: Mapping[str, torch.Tensor]
    """Weight of the examples for which each bag was looked up; 0 where none of them was learned."""


def lookups_of(
    layout: TableLayout,
    deep: KeyedJaggedTensor,
    wide: KeyedJaggedTensor,
    deep_gradient_CS: torch.Tensor,
    wide_gradient_CW: torch.Tensor,
    counts_C: torch.Tensor,
    history_row_C: torch.Tensor | None,
) -> tuple[Lookups, Lookups]:
    """Of the deep and of the wide tables.

    Args:
        layout: of the tables.
        deep: ids that were looked up in the deep tables.
        wide: and in the wide ones.
        deep_gradient_CS: of the pooled embeddings, in the order of `layout.deep_keys`.
        wide_gradient_CW: of the wide weights, in the order of `layout.wide_keys`.
        counts_C: weight of each example; 0 for one that was not learned, whose ids are then not touched.
        history_row_C: where the history of each example's user stands; None without histories.
    """
    of_history = {key for key, _ in (*layout.pools, *layout.clicks)}
    of_users_C = counts_C
    if history_row_C is not None:
        of_users_C = torch.zeros_like(counts_C).index_add_(0, history_row_C, counts_C)
    return (
        Lookups(
            part="deep",
            tables=layout.deep,
            ids=deep,
            gradient_CS=deep_gradient_CS,
            columns=_columns(layout.deep_keys, layout.deep_dims),
            counts_by_key_C={key: of_users_C if key in of_history else counts_C for key in layout.deep_keys},
        ),
        Lookups(
            part="wide",
            tables=layout.wide,
            ids=wide,
            gradient_CS=wide_gradient_CW,
            columns=_columns(layout.wide_keys, [1] * len(layout.wide_keys)),
            counts_by_key_C=dict.fromkeys(layout.wide_keys, counts_C),
        ),
    )


def row_gradients(lookups: Lookups) -> Iterator[RowGradients]:
    """Of every table in which a learned example looked something up."""
    for table in lookups.tables:
        parts = [_entries(lookups, key) for key in table.lookups]
        rows_V, gradient_VD, count_V = (torch.cat(column) for column in zip(*parts, strict=True))
        if not len(rows_V):
            continue
        rows_U, of_V = torch.unique(rows_V, return_inverse=True)
        yield RowGradients(
            part=lookups.part,
            table=table.name,
            rows_U=rows_U,
            gradient_UD=gradient_VD.new_zeros(len(rows_U), table.dim).index_add_(0, of_V, gradient_VD),
            count_U=count_V.new_zeros(len(rows_U)).index_add_(0, of_V, count_V),
        )


def step_rows(tables: EmbeddingTables, gradients: Sequence[RowGradients]) -> None:
    """One step of the tables' own optimizers with these gradients: each row is looked up once, with weight 1."""
    layout = tables.layout
    deep, wide = ([of for of in gradients if of.part == part] for part in ("deep", "wide"))
    pooled: Pooled = tables(_one_row_each(layout.deep, deep), _one_row_each(layout.wide, wide))
    outputs, given = [], []
    for output, part, columns in (
        (pooled.deep_BS, deep, _columns(layout.deep_keys, layout.deep_dims)),
        (pooled.wide_BW, wide, _columns(layout.wide_keys, [1] * len(layout.wide_keys))),
    ):
        if not part:
            continue
        gradient = torch.zeros_like(output)
        first_key = {table.name: table.lookups[0] for table in (*layout.deep, *layout.wide)}
        for of in part:
            gradient[: len(of.rows_U), columns[first_key[of.table]]] = of.gradient_UD
        outputs.append(output)
        given.append(gradient)
    torch.autograd.backward(outputs, given)


def _entries(lookups: Lookups, key: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, gradient and count of each id that `key` looked up for learned examples."""
    ids = lookups.ids[key]
    lengths_C = ids.lengths()
    bag_V = torch.repeat_interleave(torch.arange(len(lengths_C), device=lengths_C.device), lengths_C)
    count_V = lookups.counts_by_key_C[key][bag_V]
    kept = count_V > 0
    rows_V, weights_V = ids.values(), ids.weights()
    if not bool(kept.all()):
        bag_V, count_V, rows_V, weights_V = bag_V[kept], count_V[kept], rows_V[kept], weights_V[kept]
    gradient_VD = lookups.gradient_CS[:, lookups.columns[key]][bag_V] * weights_V[:, None]
    return rows_V, gradient_VD, count_V


def _columns(keys: Sequence[str], widths: Sequence[int]) -> dict[str, slice]:
    ends = [sum(widths[: number + 1]) for number in range(len(widths))]
    return {key: slice(end - width, end) for key, width, end in zip(keys, widths, ends, strict=True)}


def _one_row_each(tables: Sequence[Table], gradients: Sequence[RowGradients]) -> KeyedJaggedTensor:
    """A batch in which the first lookup of each table holds that table's rows, one an example; the others hold nothing."""
    rows = {of.table: of.rows_U for of in gradients}
    size = max((len(rows_U) for rows_U in rows.values()), default=1)
    none = next(iter(rows.values())).new_empty(0) if rows else torch.empty(0, dtype=torch.long)
    keys, values, lengths = [], [none], [none.int()]
    for table in tables:
        for key in table.lookups:
            own = rows.get(table.name, none) if key == table.lookups[0] else none
            keys.append(key)
            values.append(own)
            lengths.append((torch.arange(size, device=own.device) < len(own)).int())
    joined = torch.cat(values)
    return KeyedJaggedTensor(
        keys=keys, values=joined, weights=torch.ones(len(joined), device=joined.device), lengths=torch.cat(lengths), stride=size
    )
