"""Which tables a data set needs, and what is looked up in each.

Enters: a `DatasetSpec`. Leaves: a `TableLayout`, the one place that fixes the order of embeddings and wide weights.

Letters: B rows, S the sum of the embedding lengths of all lookups.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from data_schemas.dataset import DatasetSpec


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table and everything that is looked up in it."""

    name: str
    rows: int
    dim: int
    lookups: tuple[str, ...]
    """Keys of the batch that hold rows of this table: the feature itself, and pools of a user's history of it."""


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """The tables of a model."""

    deep: tuple[Table, ...]
    """For embeddings."""
    wide: tuple[Table, ...]
    """For one weight an id."""
    pools: tuple[tuple[str, str], ...] = ()
    """Keys of history pools, each with the feature that it pools."""

    @cached_property
    def deep_keys(self) -> list[str]:
        """Lookups in the order of the embeddings: features, then pools."""
        pools = [pool for pool, _ in self.pools]
        return [key for table in self.deep for key in table.lookups if key not in pools] + pools

    @cached_property
    def deep_dims(self) -> list[int]:
        """Lengths of the embeddings, in that order."""
        by_key = {key: table.dim for table in self.deep for key in table.lookups}
        return [by_key[key] for key in self.deep_keys]

    @cached_property
    def wide_keys(self) -> list[str]:
        """Features and crosses, in the order of the wide weights."""
        return [key for table in self.wide for key in table.lookups]

    @cached_property
    def plain_width(self) -> int:
        """Columns of the embeddings that are not pools of a history; the pools follow them."""
        return sum(self.deep_dims[: len(self.deep_dims) - len(self.pools)])

    def with_history(self, deep_BS: torch.Tensor, history_row_B: torch.Tensor | None) -> torch.Tensor:
        """Each row's own embeddings beside the pools of its user, which stand once a batch, in row `history_row_B`."""
        if history_row_B is None:
            return deep_BS
        return torch.cat([deep_BS[:, : self.plain_width], deep_BS[history_row_B, self.plain_width :]], dim=1)


def table_layout(spec: DatasetSpec) -> TableLayout:
    """A deep and a wide table for each categorical feature."""
    deep = [Table(name=f.name, rows=f.capacity, dim=f.embedding_dim, lookups=(f.name,)) for f in spec.categorical]
    return TableLayout(deep=tuple(deep), wide=tuple(_wide(table) for table in deep))


def _wide(table: Table) -> Table:
    return Table(name=table.name, rows=table.rows, dim=1, lookups=(table.name,))
