"""How the tables are spread over processes, planned by torchrec; or copied into each.

Enters: a layout of tables, and what the settings ask for. Leaves: `EmbeddingTables` of which each process holds a part, with
the weights that one process would have started with; or a `ConfigError` where they do not fit, before any is made.

Letters: K keys, B rows of a batch, S the sum of the embedding lengths of all lookups.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import collective_utils
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from data_schemas.errors import ConfigError
from models.embeddings import WIDE_DIM, EmbeddingTables, SparseOptimizer, Unfilled
from models.tables import TableLayout
from pipeline.config import Sharding
from pipeline.training.processes import Processes
from pipeline.training.room import free_bytes

ROW_WISE_FROM = 4096
"""Tables of at least this many rows are cut by rows, so that ids are partitioned by their hash; smaller ones stay whole."""
LEAST_WIDTH = 4
"""Columns of a part, in multiples of which the fused kernels want them."""
FLOAT_BYTES = 4
UNBOUNDED = 1 << 60
"""Bytes of a device as torchrec is told: what fits is added up here, of weights and accumulators alone."""


def spread_tables(
    make: Callable[[torch.device], EmbeddingTables],
    processes: Processes,
    device: torch.device,
    *,
    layout: TableLayout,
    sharding: Sharding,
    sparse_optimizer: SparseOptimizer,
    seed: int,
    new: bool,
) -> EmbeddingTables:
    """The tables, spread over all processes; those of one process if there is but one.

    Gradients are not divided by the number of processes: each process's loss is already divided by the whole batch.

    Args:
        make: the tables whole, on a device; on `meta` they take no memory.
        processes: that share them.
        device: of each.
        layout: of the tables.
        sharding: how.
        sparse_optimizer: of the embeddings.
        seed: of the first weights, with which torch's generator begins.
        new: whether the first weights count; not, where they are about to be loaded.

    Raises:
        ConfigError: the tables do not fit into memory, or cannot be cut so.
    """
    if processes.count == 1 or sharding == "data_parallel":
        _require_room(list(_whole_needs(layout, sparse_optimizer, device)), processes, device)
        with nullcontext() if new else Unfilled():
            tables = make(device)
        if processes.count > 1:
            if layout.deep:
                tables.deep = _Copies(tables.deep, processes)
            tables.wide = _Copies(tables.wide, processes)
            tables.saved_elsewhere = not processes.is_first
        return tables
    if sharding == "column_wise" and sparse_optimizer == "rowwise_adagrad":
        raise ConfigError(
            "processes.sharding = 'column_wise' cuts the rows of a table, and training.sparse_optimizer = 'rowwise_adagrad' "
            "keeps one sum for a whole row; use sparse_optimizer 'adagrad' with a new model, or sharding 'row_wise'"
        )
    set_gradient_division(False)
    tables, sharder = make(torch.device("meta")), _Sharder()
    plan = _plan(tables, sharder, processes, device, sharding)
    _require_room(list(_needs(plan, processes.rank, sparse_optimizer)), processes, device)
    collective_utils._INITIALIZED = False  # or a process that was in a group before leaves out an exchange that new ones make
    parallel = DistributedModelParallel(tables, device=device, plan=plan, sharders=[sharder], init_data_parallel=False)
    spread: EmbeddingTables = parallel.module
    spread.lie_on(device)
    torch.manual_seed(seed)
    if new:
        spread.draw()
    return spread


def _plan(
    tables: EmbeddingTables, sharder: "_Sharder", processes: Processes, device: torch.device, sharding: Sharding
) -> ShardingPlan:
    parts: tuple[Any, ...] = (tables.deep, tables.wide)
    constraints = {
        config.name: ParameterConstraints(
            sharding_types=[_kind(sharding, config.num_embeddings, processes.count, wide=part is tables.wide)],
            min_partition=LEAST_WIDTH * -(-config.embedding_dim // (LEAST_WIDTH * processes.count)),
        )
        for part in parts
        for config in part.embedding_bag_configs()
    }
    machine = TrainerConfig(
        world_size=processes.count,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", processes.count)),
        hbm_cap_bytes=UNBOUNDED,
        ddr_cap_bytes=UNBOUNDED,
    )
    topology = TopologyFactory.create_topology(machine, kernel_config=KernelConfig(compute_device=device.type))
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )
    plan: ShardingPlan = planner.collective_plan(tables, [sharder], dist.GroupMember.WORLD)
    return plan


def _kind(sharding: Sharding, rows: int, count: int, *, wide: bool) -> str:
    """Of one table, as torchrec calls it; one with fewer rows than there are processes is not cut by rows, and one of wide
    weights not by columns: a row of it has one weight, and one sum of squares."""
    match sharding:
        case "auto":
            return "row_wise" if rows >= max(ROW_WISE_FROM, count) else "table_wise"
        case "row_wise":
            return "row_wise" if rows >= count else "table_wise"
        case "column_wise" if wide:
            return "table_wise"
        case _:
            return sharding


@dataclass(frozen=True)
class _Need:
    table: str
    bytes: int


def _needs(plan: ShardingPlan, rank: int, sparse_optimizer: SparseOptimizer) -> Iterator[_Need]:
    """Of a process's parts."""
    for part, of in plan.plan.items():
        for name, parameter in of.items():
            for shard in parameter.sharding_spec.shards:
                if shard.placement.rank() == rank:
                    rows, columns = shard.shard_sizes
                    yield _need(name, part, rows, columns, sparse_optimizer)


def _whole_needs(layout: TableLayout, sparse_optimizer: SparseOptimizer, device: torch.device) -> Iterator[_Need]:
    """Of all tables; on a CPU a wide weight has its sum of squares beside it, and nothing else as large."""
    for table in layout.deep:
        yield _need(f"deep_{table.name}", "deep", table.rows, table.dim, sparse_optimizer)
    for table in layout.wide:
        columns = 1 if device.type == "cpu" else WIDE_DIM
        yield _need(f"wide_{table.name}", "wide", table.rows, columns, sparse_optimizer)


def _need(name: str, part: str, rows: int, columns: int, sparse_optimizer: SparseOptimizer) -> _Need:
    """Weights and accumulators."""
    sums = 1 if sparse_optimizer == "rowwise_adagrad" or part == "wide" else columns
    return _Need(name, FLOAT_BYTES * rows * (columns + sums))


def _require_room(needs: list[_Need], processes: Processes, device: torch.device) -> None:
    """Raises `ConfigError`, in all processes, where those of one machine or one GPU need more than is free there."""
    own = sum(need.bytes for need in needs)
    largest = max(needs, key=lambda need: need.bytes, default=_Need("no table", 0))
    place = f"{socket.gethostname()} {torch.cuda.current_device() if device.type == 'cuda' else ''}".strip()
    all_needs = processes.gather((place, own, largest, free_bytes(device)))
    together: dict[str, int] = {}
    for at, size, _, _ in all_needs:
        together[at] = together.get(at, 0) + size
    for rank, (at, size, table, free) in enumerate(all_needs):
        if together[at] > free:
            others = f", {together[at] / 2**30:.3g} GiB with the others on {at}" if together[at] > size else ""
            raise ConfigError(
                f"tables and accumulators take {size / 2**30:.3g} GiB in process {rank}{others}, and {free / 2**30:.3g} GiB "
                f"are free there; {table.bytes / 2**30:.3g} GiB are of {table.table}. Lower capacity or embedding_dim of that "
                "feature in the data set's declaration, or spread them over more machines with processes.sharding 'auto'"
            )


class _Sharder(FusedEmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Offers on the CPU what torchrec only offers on a GPU; it trains and restores there as well."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "column_wise"]


class _Copies(nn.Module):
    """Tables of which each process has a copy: looked up alone, stepped by what all of them looked up.

    torchrec's own data-parallel tables keep optimizer state that cannot be saved; here the tables stay what they are in one
    process, and each applies the same gradients in the same order, so that the copies stay the same to the bit.
    """

    def __init__(self, collection: Any, processes: Processes) -> None:
        """Of a fused collection, or of `WideWeights`."""
        super().__init__()
        self.collection = collection
        self._processes = processes

    def forward(self, looked_up: KeyedJaggedTensor) -> KeyedTensor:
        """As the collection; a backward pass waits for all processes."""
        with torch.no_grad():
            pooled = self.collection(looked_up)
        if not torch.is_grad_enabled():
            return pooled
        anchor = torch.zeros((), requires_grad=True)
        values: torch.Tensor = _Stepped.apply(anchor, pooled.values(), self, looked_up)  # type: ignore[no-untyped-call]
        return KeyedTensor(keys=pooled.keys(), length_per_key=pooled.length_per_key(), values=values)

    def step(self, looked_up: KeyedJaggedTensor, gradient_BS: torch.Tensor) -> None:
        """Steps the rows that any process looked up, with the gradients of all."""
        processes, keys = self._processes, looked_up.keys()
        lengths_KB = looked_up.lengths().reshape(len(keys), -1)
        per_key = lengths_KB.sum(dim=1).tolist()
        weights, values = looked_up.weights().split(per_key), looked_up.values().split(per_key)
        together = [processes.concatenated(part) for part in (*values, *weights)]
        everything = KeyedJaggedTensor(
            keys=keys,
            values=torch.cat(together[: len(keys)]),
            weights=torch.cat(together[len(keys) :]),
            lengths=torch.cat([processes.concatenated(lengths_B.contiguous()) for lengths_B in lengths_KB]),
        )
        with torch.enable_grad():
            pooled: torch.Tensor = self.collection(everything).values()
        pooled.backward(processes.concatenated(gradient_BS.contiguous()))

    def embedding_bag_configs(self) -> Any:
        """Of the collection."""
        return self.collection.embedding_bag_configs()

    def fused_optimizer(self) -> Any:
        """Of the collection."""
        return self.collection.fused_optimizer()


class _Stepped(torch.autograd.Function):
    """The identity, whose backward pass steps tables; the first argument only makes autograd call it."""

    @staticmethod
    def forward(
        context: Any, anchor: torch.Tensor, values: torch.Tensor, copies: _Copies, looked_up: KeyedJaggedTensor
    ) -> torch.Tensor:
        context.copies, context.looked_up = copies, looked_up
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None]:
        context.copies.step(context.looked_up, gradients[0])
        return None, None, None, None
