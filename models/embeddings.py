"""Embedding tables whose optimizer runs inside the backward pass (torchrec over fbgemm).

Enters: KeyedJaggedTensors of table rows with weights. Leaves: `Pooled`, an embedding and a wide weight for each key.

Letters: B rows of the batch, W wide weights, S the sum of the embedding lengths of all lookups.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchrec.distributed.types import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from data_schemas.errors import CorruptCheckpoint
from data_schemas.examples import I64
from models.changed_rows import ChangedRows, marks_side_by_side
from models.tables import Table, TableLayout
from models.wide_weights import WideWeights

SparseOptimizer = Literal["adagrad", "rowwise_adagrad"]

WIDE_DIM = 4
"""Columns of fused wide tables, whose kernels want a multiple of 4; the first is the wide weight, the others stay zero."""
WIDE_GRADIENT_FACTOR = WIDE_DIM**0.5
"""Factor on gradients of fused wide weights. Adagrad by row is nearly three times as fast as by coordinate and adds the mean
square over the columns to a row's sum; of the columns only one has a gradient. With the factor the sum is that of the weight's
own squares, and its rate is divided by the factor: the same steps."""
SMALLEST_BETA = 1e-8
"""So that a weight without a gradient divides by no zero."""
INITIAL_BOUND = 0.01 * 3**0.5
"""Embeddings start uniform with a standard deviation of .01."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What the tables give for a batch: weighted sums of embeddings; no ids give zero."""

    deep_BS: torch.Tensor
    """Embeddings of all lookups side by side, in the order of `TableLayout.deep_keys`."""
    wide_BW: torch.Tensor
    """One weight a feature and a cross, in the order of `TableLayout.wide_keys`; what autograd derives by those of fused tables
    is larger by `WIDE_GRADIENT_FACTOR`, for the tables' step."""


@dataclass(frozen=True, kw_only=True)
class TableSlice:
    """A rectangle of a table or of its optimizer's state, as one process holds it."""

    name: str
    row: int
    column: int
    tensor: torch.Tensor
    """`[rows, columns]`; the live storage, not a copy."""

    @property
    def table(self) -> str:
        """The feature or cross that it belongs to, as `EmbeddingTables.changed` names it."""
        found = _OF_TABLE.fullmatch(self.name)
        if not found:
            raise ValueError(f"{self.name!r} is no part of a table; 'deep.item.weight' is")
        return found[1]

    def rows_inside(self, rows: I64) -> I64:
        """Those of a table's rows that lie in the rectangle."""
        return rows[self._places_inside(rows)]

    def own_rows(self, rows: I64) -> torch.Tensor:
        """The same, counted from the rectangle's first."""
        return torch.from_numpy(self.rows_inside(rows) - self.row).to(self.tensor.device)

    @torch.no_grad()
    def put(self, rows: I64, column: int, values: torch.Tensor) -> None:
        """Puts `values`, `[rows, columns]` from a column of the table on, where these rows and columns are its own."""
        inside = self._places_inside(rows)
        left, right = max(column, self.column), min(column + values.shape[1], self.column + self.tensor.shape[1])
        if len(inside) and left < right:
            taken = values[torch.from_numpy(inside), left - column : right - column].to(self.tensor.device)
            self.tensor[:, left - self.column : right - self.column].index_copy_(0, self.own_rows(rows), taken)

    def _places_inside(self, rows: I64) -> I64:
        return np.flatnonzero((rows >= self.row) & (rows < self.row + len(self.tensor)))


_OF_TABLE = re.compile(r"(?:row_\w+\.)?(?:deep|wide)\.(.+)\.(?:weight|accumulator)(?:\.\w+)?")


class Unfilled(TorchFunctionMode):
    """Inside, new tables are not drawn at random, which takes as long as reading them: all that is not constant comes from a
    checkpoint."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leaves `uniform_` over a range out."""
        if func is torch.Tensor.uniform_:
            tensor, low, high = args
            return tensor.fill_(low) if low == high else tensor
        return func(*args, **(kwargs or {}))


class NoEmbeddings(nn.Module):
    """A collection without tables, which torchrec's can neither look up in nor be spread: what is looked up has no columns."""

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        """`[B, 0]`, which a backward pass can start from as from others."""
        none_B0 = torch.zeros(ids.stride(), 0, device=ids.values().device, requires_grad=torch.is_grad_enabled())
        return KeyedTensor(keys=[], length_per_key=[], values=none_B0)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """None, as a collection would say."""
        return []

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Of nothing."""
        return CombinedOptimizer([])


class EmbeddingTables(nn.Module):
    """Fused tables for embeddings; for wide weights one vector on a CPU, fused tables on a GPU or where they are to be spread
    over processes (on `meta`).

    The deep tables have Adagrad by row (one accumulator a row) or by coordinate; each wide weight its own
    (Duchi et al. 2011), which is what makes one pass over a small stream learn as well as a linear learner does. Its rate is
    that of FTRL-proximal (McMahan et al. 2013, section 2.1): `wide_learning_rate / (wide_beta + sqrt(sum of g^2))`. With a
    beta of zero the first step of a weight has the size of the rate whatever its gradient is, so that the one row without
    a click that an id has moves its weight as far down as a click would move it up.
    """

    def __init__(
        self,
        layout: TableLayout,
        *,
        sparse_optimizer: SparseOptimizer,
        sparse_learning_rate: float,
        wide_learning_rate: float,
        wide_beta: float = 0.0,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.saved_elsewhere = False
        """Whether another process saves the same tables, of which these are a copy."""
        by_row = sparse_optimizer == "rowwise_adagrad"
        self.deep: nn.Module = NoEmbeddings()
        if layout.deep:
            self.deep = FusedEmbeddingBagCollection(
                [_config(table, "deep", table.dim, INITIAL_BOUND) for table in layout.deep],
                optimizer_type=RowWiseAdagrad if by_row else torch.optim.Adagrad,
                optimizer_kwargs={"lr": sparse_learning_rate},
                is_weighted=layout.weighted,
                device=device,
            )
        beta = max(wide_beta, SMALLEST_BETA)
        self.wide: nn.Module = (
            WideWeights(layout.wide, learning_rate=wide_learning_rate, beta=beta, weighted=layout.weighted)
            if device.type == "cpu"
            else fused_wide_tables(layout, learning_rate=wide_learning_rate, beta=beta, device=device)
        )
        self.decays: list[float] = []
        """Factors that all accumulators were multiplied by since `mark_saved`, in their order."""
        self.lie_on(device)

    def forward(self, deep: KeyedJaggedTensor, wide: KeyedJaggedTensor) -> Pooled:
        """Looks every id up once. Backward through the result steps the tables at once: call it once a step."""
        in_vector = self.wide_vector is not None
        if torch.is_grad_enabled():
            self._note_changed(deep, wide, in_vector=in_vector)
        wide_BW = in_order(*_looked_up(self.wide, wide), self.layout.wide_keys)
        if not in_vector:
            wide_BW = wide_BW[:, ::WIDE_DIM]
            if wide_BW.requires_grad:  # the columns between stay without a gradient
                wide_BW.register_hook(lambda gradient_BW: gradient_BW * WIDE_GRADIENT_FACTOR)
        return Pooled(deep_BS=in_order(*_looked_up(self.deep, deep), self.layout.deep_keys), wide_BW=wide_BW)

    @property
    def wide_vector(self) -> WideWeights | None:
        """The wide weights where they lie in one vector; None: in fused tables."""
        return next((part for part in self.wide.modules() if isinstance(part, WideWeights)), None)

    @torch.no_grad()
    def draw(self) -> None:
        """Gives this process's part the weights that all of it would have been made with, from torch's generator as it is.

        A table at a time is drawn whole, on the host; wide weights are zero.
        """
        pieces = list(self.slices(with_optimizer=False))
        for own in pieces:
            if own.name.startswith("wide."):
                own.tensor.zero_()
        for table in self.layout.deep:
            whole = torch.empty(table.rows, table.dim).uniform_(-INITIAL_BOUND, INITIAL_BOUND)
            drawn = TableSlice(name=f"deep.{table.name}.weight", row=0, column=0, tensor=whole)
            for own in pieces:
                if own.name == drawn.name:
                    _copy_overlap(drawn, own)

    def lie_on(self, device: torch.device) -> None:
        """The tables are on this device now, and none of their rows has changed."""
        self.device = device
        of_vector = self.layout.wide if self.wide_vector is not None else ()
        marks_R, in_vector = marks_side_by_side({table.name: table.rows for table in of_vector})
        if self.wide_vector is not None:
            self.wide_vector.marks_R = marks_R
        rows = {table.name: table.rows for table in (*self.layout.deep, *self.layout.wide)}
        self.changed = {name: in_vector.get(name) or ChangedRows(count, device) for name, count in rows.items()}
        """By feature or cross: the rows that may have changed since `mark_saved`, in whichever of its tables. Each of several
        processes knows those that it looked up to be learned; of wide weights of which each has a copy, those of all."""

    def mark_saved(self) -> None:
        """What is looked up to be learned from here on has changed."""
        self.decays.clear()
        for changed in self.changed.values():
            changed.clear()

    def set_learning_rates(self, *, sparse: float, wide: float) -> None:
        """Takes effect with the next backward pass."""
        _set_rate(self.deep, sparse)
        if self.wide_vector is None:
            _set_rate(self.wide, wide / WIDE_GRADIENT_FACTOR)
        else:
            self.wide_vector.learning_rate = wide

    @torch.no_grad()
    def start_rows(
        self,
        rows_by_feature: Mapping[str, I64],
        *,
        like: int,
        add_up: Callable[[torch.Tensor], None] = lambda tensor: None,
    ) -> None:
        """Makes rows copies of another row, embedding and wide weight, and forgets what their optimizer knew of them.

        Args:
            rows_by_feature: rows of each feature's tables that have a new owner.
            like: the row that they start as.
            add_up: sums a tensor over all processes, in place; each process calls it in the same order.
        """
        pieces = list(self.slices())
        for name, rows in rows_by_feature.items():
            self.changed[name].add(rows)
        for part, table in [("deep", table) for table in self.layout.deep] + [("wide", table) for table in self.layout.wide]:
            if table.name not in rows_by_feature:
                continue
            weights = [piece for piece in pieces if piece.name == f"{part}.{table.name}.weight"]
            start_D = torch.zeros(table.dim, device=self.device)
            for piece in weights if not self.saved_elsewhere else ():
                if 0 <= like - piece.row < len(piece.tensor):
                    start_D[piece.column : piece.column + piece.tensor.shape[1]] = piece.tensor[like - piece.row]
            add_up(start_D)
            for piece in weights:
                columns = slice(piece.column, piece.column + piece.tensor.shape[1])
                piece.tensor[piece.own_rows(rows_by_feature[table.name])] = start_D[columns]
            for piece in (piece for piece in pieces if piece.name == f"{part}.{table.name}.accumulator"):
                piece.tensor[piece.own_rows(rows_by_feature[table.name])] = 0.0

    @torch.no_grad()
    def decay_accumulators(self, factor: float) -> None:
        """Multiplies every sum of squared gradients by `factor`, so that old gradients slow new ones down less."""
        if factor == 1.0:
            return
        self.decays.append(factor)
        for piece in self.slices():
            if piece.name.endswith(".accumulator"):
                piece.tensor.mul_(factor)

    def slices(self, *, with_optimizer: bool = True) -> Iterator[TableSlice]:
        """Every rectangle of weights, and of optimizer state if asked for, that this process holds.

        Of a fused wide table that is its first column: the others are zero for good.
        """
        yield from _fused_slices("deep", self.deep, None, with_optimizer=with_optimizer)
        if self.wide_vector is None:
            yield from _fused_slices("wide", self.wide, 1, with_optimizer=with_optimizer)
            return
        for name, weight_R1, squares_R1 in self.wide_vector.parts():
            yield TableSlice(name=f"wide.{name}.weight", row=0, column=0, tensor=weight_R1)
            if with_optimizer:
                yield TableSlice(name=f"wide.{name}.accumulator", row=0, column=0, tensor=squares_R1)

    def load_slices(
        self,
        saved: Mapping[str, Iterable[TableSlice]],
        *,
        with_optimizer: bool = True,
        new_tables: Collection[str] = (),
    ) -> None:
        """Fills this process's rectangles from saved ones, however those were cut.

        Args:
            saved: by name of a table's part.
            with_optimizer: whether optimizer state is among them.
            new_tables: `deep.<name>` and `wide.<name>` of tables that stay as they are.

        Raises:
            CorruptCheckpoint: a part of a table is not among the saved slices.
        """
        filling = Filling(
            own for own in self.slices(with_optimizer=with_optimizer) if own.name.rpartition(".")[0] not in new_tables
        )
        for pieces in saved.values():
            for piece in pieces:
                filling.take(piece)
        filling.require_whole()

    def _note_changed(self, deep: KeyedJaggedTensor, wide: KeyedJaggedTensor, *, in_vector: bool) -> None:
        """Rows that a backward pass will step, but for those that `WideWeights` marks itself. A feature's embeddings and wide
        weights are mostly looked up alike."""
        alike = wide.values().data_ptr() == deep.values().data_ptr() and wide.keys() == deep.keys()
        by_table = ([] if alike else [deep]) + ([] if in_vector else [wide])
        for ids in by_table:
            for key, rows in zip(ids.keys(), ids.values().split(ids.length_per_key()), strict=True):
                self.changed[self.layout.table_of[key]].add(rows)


class Filling:
    """Rectangles that are being filled from others, a few at a time, so that not all need be in memory at once."""

    def __init__(self, own: Iterable[TableSlice]) -> None:
        """Nothing is filled yet."""
        self._own: dict[str, list[TableSlice]] = {}
        self._missing: dict[str, int] = {}
        for piece in own:
            self._own.setdefault(piece.name, []).append(piece)
            self._missing[piece.name] = self._missing.get(piece.name, 0) + piece.tensor.numel()

    @torch.no_grad()
    def take(self, saved: TableSlice) -> None:
        """Copies what the saved rectangle covers; one that nobody asks for is passed over."""
        for own in self._own.get(saved.name, ()):
            self._missing[saved.name] -= _copy_overlap(saved, own)

    def put(self, name: str, rows: I64, column: int, values: torch.Tensor) -> None:
        """Puts rows over what was copied."""
        for own in self._own.get(name, ()):
            own.put(rows, column, values)

    def require_whole(self) -> None:
        """Whether every value was copied, once.

        Raises:
            CorruptCheckpoint: some of a table were not.
        """
        for name, missing in self._missing.items():
            if missing:
                size = sum(own.tensor.numel() for own in self._own[name])
                raise CorruptCheckpoint(
                    f"table {name}: {size - missing} of {size} values are in the checkpoint; "
                    "restore an older version, or start a new model under another model_name"
                )


def fused_wide_tables(
    layout: TableLayout, *, learning_rate: float, beta: float, device: torch.device
) -> FusedEmbeddingBagCollection:
    """As `WideWeights`, in the first of `WIDE_DIM` columns, for gradients that are enlarged by `WIDE_GRADIENT_FACTOR`."""
    return FusedEmbeddingBagCollection(
        [_config(table, "wide", WIDE_DIM, 0.0) for table in layout.wide],
        optimizer_type=RowWiseAdagrad,
        optimizer_kwargs={"lr": learning_rate / WIDE_GRADIENT_FACTOR, "eps": beta},
        is_weighted=layout.weighted,
        device=device,
    )


def _looked_up(collection: nn.Module, ids: KeyedJaggedTensor) -> tuple[list[str], list[int], torch.Tensor]:
    """Keys, lengths of their embeddings, and the embeddings side by side.

    Ids that stand in the order of the tables go to fbgemm's operator as they are: the collection would take them apart by key,
    put them together again, and copy the result. Nor does it say, where tables are spread over processes, that the weights of
    ids are not learned, whose gradient is more than a third of the backward pass.
    """
    if isinstance(collection, FusedEmbeddingBagCollection) and len(collection._emb_modules) == 1:
        configs = collection.embedding_bag_configs()
        names = [name for config in configs for name in config.feature_names]
        if ids.keys() == names:
            weighted: dict[str, torch.Tensor] = {}
            if collection.is_weighted():
                not_learned = torch.zeros(len(names), dtype=torch.int32, device=ids.values().device)
                weighted = {"per_sample_weights": ids.weights(), "feature_requires_grad": not_learned}
            values_BS = collection._emb_modules[0]._emb_module(ids.values(), ids.offsets(), **weighted)
            return names, [config.embedding_dim for config in configs for _ in config.feature_names], values_BS
    pooled: KeyedTensor = collection(ids)
    return pooled.keys(), pooled.length_per_key(), pooled.values()


def in_order(keys: list[str], lengths: list[int], values_BS: torch.Tensor, names: list[str]) -> torch.Tensor:
    """The values side by side in the order of `names`; lookups answer in the order of their tables, or of their shards.

    Split at once, not key by key: the backward pass of a slice fills a tensor of the whole width with zeros.
    """
    if keys == names:
        return values_BS
    pieces = dict(zip(keys, values_BS.split(lengths, dim=1), strict=True))
    return torch.cat([pieces[name] for name in names], dim=1)


def _config(table: Table, part: str, dim: int, bound: float) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=f"{part}_{table.name}",
        feature_names=list(table.lookups),
        num_embeddings=table.rows,
        embedding_dim=dim,
        pooling=PoolingType.SUM,
        weight_init_min=-bound,
        weight_init_max=bound,
    )


def _fused_slices(part: str, collection: nn.Module, columns: int | None, *, with_optimizer: bool) -> Iterator[TableSlice]:
    """Of a fused collection, so many columns of each table; None: all."""
    for key, tensor in collection.state_dict().items():
        yield from _rectangles(f"{part}.{_table_name(key)}.weight", tensor, columns)
    if with_optimizer:
        for table, state in _optimizer(collection).state_dict()["state"].items():
            for tensor in state.values():
                yield from _rectangles(f"{part}.{_table_name(table)}.accumulator", tensor, columns)


def _set_rate(collection: nn.Module, rate: float) -> None:
    optimizer = _optimizer(collection)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _optimizer(collection: nn.Module) -> KeyedOptimizer:
    """A property of the sharded collection, a method of the plain one."""
    optimizer: Any = collection.fused_optimizer
    return optimizer() if inspect.ismethod(optimizer) else optimizer


def _table_name(key: str) -> str:
    """`embedding_bags.deep_user.weight` and `deep_user.weight` are both of the feature `user`."""
    return key.split(".")[-2].split("_", 1)[1]


def _rectangles(name: str, tensor: torch.Tensor | ShardedTensor, columns: int | None) -> Iterator[TableSlice]:
    if not isinstance(tensor, ShardedTensor):
        yield TableSlice(name=name, row=0, column=0, tensor=_as_matrix(tensor)[:, :columns])
        return
    for shard in tensor.local_shards():
        row, column = (*shard.metadata.shard_offsets, 0)[:2]
        yield TableSlice(name=name, row=row, column=column, tensor=_as_matrix(shard.tensor)[:, :columns])


def _copy_overlap(piece: TableSlice, own: TableSlice) -> int:
    """Copies what both rectangles cover; the number of values copied."""
    source, target = piece.tensor, own.tensor
    top, left = max(piece.row, own.row), max(piece.column, own.column)
    bottom = min(piece.row + source.shape[0], own.row + target.shape[0])
    right = min(piece.column + source.shape[1], own.column + target.shape[1])
    if top >= bottom or left >= right:
        return 0
    inside = source[top - piece.row : bottom - piece.row, left - piece.column : right - piece.column]
    target[top - own.row : bottom - own.row, left - own.column : right - own.column].copy_(inside)
    return inside.numel()


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
