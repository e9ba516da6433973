"""Which tables a data set needs, and what is looked up in each.

Enters: a `DatasetSpec`. Leaves: a `TableLayout`, the one place that fixes the order of embeddings and wide weights.

Letters: B rows, S the sum of the embedding lengths of all lookups, H of those of histories.
"""

from collections import Counter
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
    """Keys of the batch that hold rows of this table: the feature itself, pools of a user's history of it, single clicks."""


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """The tables of a model."""

    deep: tuple[Table, ...]
    """For embeddings."""
    wide: tuple[Table, ...]
    """For one weight an id: of features that are logged, and of crosses."""
    pools: tuple[tuple[str, str], ...] = ()
    """Keys of history pools, each with the feature that it pools."""
    clicks: tuple[tuple[str, str], ...] = ()
    """Keys of single clicks that are attended to, each with its feature: by feature, the last click first."""
    weighted: bool = True
    """False: every key has one id a row, of weight 1, and lookups may take all weights for 1."""

    @cached_property
    def head_keys(self) -> list[str]:
        """Lookups that the head sees as embeddings: features, then pools."""
        of_history = {key for key, _ in (*self.pools, *self.clicks)}
        features = [key for key in self.lookup_keys if key not in of_history]
        return features + [pool for pool, _ in self.pools]

    @cached_property
    def lookup_keys(self) -> list[str]:
        """Lookups of embeddings in the order of the tables, as batches hold them."""
        return [key for table in self.deep for key in table.lookups]

    @cached_property
    def lookup_dims(self) -> list[int]:
        """Lengths of the embeddings, in that order."""
        return [table.dim for table in self.deep for _ in table.lookups]

    @cached_property
    def deep_keys(self) -> list[str]:
        """Lookups in the order of the embeddings: features, pools, then single clicks."""
        return self.head_keys + [click for click, _ in self.clicks]

    @cached_property
    def deep_dims(self) -> list[int]:
        """Lengths of the embeddings, in that order."""
        by_key = {key: table.dim for table in self.deep for key in table.lookups}
        return [by_key[key] for key in self.deep_keys]

    @cached_property
    def head_dims(self) -> list[int]:
        """Lengths of those that the head sees."""
        return self.deep_dims[: len(self.head_keys)]

    @cached_property
    def attended(self) -> dict[str, int]:
        """By feature of the history: how many clicks are attended to."""
        return dict(Counter(of for _, of in self.clicks))

    @cached_property
    def wide_keys(self) -> list[str]:
        """Features and crosses, in the order of the wide weights."""
        return [key for table in self.wide for key in table.lookups]

    @cached_property
    def table_of(self) -> dict[str, str]:
        """By key, the feature or cross whose tables it is looked up in."""
        return {key: table.name for table in (*self.deep, *self.wide) for key in table.lookups}

    @cached_property
    def plain_width(self) -> int:
        """Columns of the embeddings that are not of a history; those of the history follow them."""
        return sum(self.head_dims[: len(self.head_dims) - len(self.pools)])

    def with_history(
        self, deep_BS: torch.Tensor, history_row_B: torch.Tensor | None, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Of each of `rows` its own embeddings, beside the history of its user, which stands in row `history_row_B` alone."""
        if history_row_B is None:
            return deep_BS[rows]
        of_users_BH = deep_BS[:, self.plain_width :].index_select(0, history_row_B[rows])
        return torch.cat([deep_BS[rows, : self.plain_width], of_users_BH], dim=1)


def table_layout(spec: DatasetSpec) -> TableLayout:
    """A deep table for each categorical feature with an embedding, a wide one for each that is logged and for each cross.

    The time of day has no wide weight: all rows of an hourly window share it, so that it would absorb the click rate of the
    hour, which is for the bias to learn, and the next hour, with another weight, would start without it.

    A user's history of a feature is pooled in the feature's own table: what the user clicked and what the user is shown are
    the same items.
    """
    pools = tuple((pool_key(of, life), of) for of, life in history_pools(spec))
    clicks = tuple((click_key(of, back), of) for of, back in attended_clicks(spec))
    deep = tuple(
        Table(
            name=feature.name,
            rows=feature.capacity,
            dim=feature.embedding_dim,
            lookups=(feature.name, *(key for key, of in (*pools, *clicks) if of == feature.name)),
        )
        for feature in spec.categorical
        if feature.embedding_dim
    )
    wide = [
        Table(name=feature.name, rows=feature.capacity, dim=1, lookups=(feature.name,)) for feature in spec.logged_categorical()
    ]
    crosses = [
        Table(name=name, rows=spec.cross_capacity, dim=1, lookups=(name,)) for name in (cross_key(c) for c in spec.crosses)
    ]
    weighted = bool(pools or clicks) or any(feature.many for feature in spec.categorical)
    return TableLayout(deep=deep, wide=(*wide, *crosses), pools=pools, clicks=clicks, weighted=weighted)


def wide_weights_of_times(layout: TableLayout) -> set[str]:
    """Names of tables that features made of the time have no more; models of an older tidemark hold them."""
    return {f"wide.{table.name}.weight" for table in layout.deep} - {f"wide.{table.name}.weight" for table in layout.wide}


def history_pools(spec: DatasetSpec) -> list[tuple[str, float]]:
    """Feature and half-life of every pool of a user's history."""
    if spec.history is None:
        return []
    return [(of, life) for life in spec.history.pool_half_lives_hours for of in spec.history.of]


def attended_clicks(spec: DatasetSpec) -> list[tuple[str, int]]:
    """Feature and number, 0 for the last, of every click that is attended to."""
    if spec.history is None:
        return []
    return [(of, back) for of in spec.history.of for back in range(spec.history.attended_clicks)]


def click_key(feature: str, back: int) -> str:
    """The key of a batch that holds a single click of each user.

    >>> click_key("item_id", 0)
    'item_id clicked, 0 clicks ago'
    """
    return f"{feature} clicked, {back} clicks ago"


def pool_key(feature: str, half_life_hours: float) -> str:
    """The key of a batch that holds a pool.

    >>> pool_key("item_id", 6.0)
    'item_id clicked, half-life 6 h'
    """
    return f"{feature} clicked, half-life {half_life_hours:g} h"


def cross_key(cross: tuple[str, ...]) -> str:
    """The key of a batch that holds a cross."""
    return " x ".join(cross)
