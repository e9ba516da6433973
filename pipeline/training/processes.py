"""The processes that train one model together, as torchrun starts them; one process is the common case.

Enters: torch.distributed, initialised by the caller. Leaves: `Processes`, with the few exchanges that a step needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from data_schemas.examples import I64
from models.embeddings import EmbeddingTables

ROW_WISE_FROM = 4096
"""Tables of at least this many rows are cut by rows, so that ids are partitioned by their hash; smaller ones stay whole."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all."""

    rank: int = 0
    count: int = 1
    """World size."""

    @classmethod
    def started(cls) -> "Processes":
        """As torch.distributed was initialised; one process if it was not."""
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), count=dist.get_world_size())

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds the gradients of all processes, in one exchange."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, pieces, strict=True):
            gradient.copy_(total.view_as(gradient))

    def add_up(self, tensor: torch.Tensor) -> None:
        """Puts the sum of all processes' tensors in the place of this one."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def union(self, numbers: I64, device: torch.device) -> I64:
        """The numbers that any process has, each once, rising; costs what they all have together.

        Args:
            numbers: of this process; each process calls it in the same order.
            device: that exchanges are made on.
        """
        if self.count == 1:
            return numbers
        have_P = torch.zeros(self.count, dtype=torch.int64, device=device)
        have_P[self.rank] = len(numbers)
        self.add_up(have_P)
        sizes = have_P.tolist()
        joined = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        start = sum(sizes[: self.rank])
        joined[start : start + len(numbers)] = torch.from_numpy(numbers)
        self.add_up(joined)
        return np.unique(joined.cpu().numpy())

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def total(self, value: float) -> float:
        """The sum of `value` over all processes, the same on each."""
        if self.count == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(summed)
        return float(summed)


def shard_tables(tables: EmbeddingTables, processes: Processes, device: torch.device) -> EmbeddingTables:
    """The tables cut over all processes by torchrec's planner, with the weights that they had.

    The same tables if there is but one process.

    Gradients are not divided by the number of processes: each process's loss is already divided by the whole batch.
    """
    if processes.count == 1:
        return tables
    set_gradient_division(False)
    sharder = _RowWiseSharder()
    names = [config.name for part in (tables.deep, tables.wide) for config in part.embedding_bag_configs()]
    rows = [config.num_embeddings for part in (tables.deep, tables.wide) for config in part.embedding_bag_configs()]
    constraints = {
        name: ParameterConstraints(sharding_types=["row_wise" if count >= ROW_WISE_FROM else "table_wise"])
        for name, count in zip(names, rows, strict=True)
    }
    initial = {piece.name: [piece] for piece in tables.slices()}
    topology = Topology(world_size=processes.count, compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(tables, [sharder], dist.GroupMember.WORLD)
    parallel = DistributedModelParallel(tables, device=device, plan=plan, sharders=[sharder], init_data_parallel=False)
    sharded: EmbeddingTables = parallel.module
    sharded.load_slices(initial)
    return sharded


class _RowWiseSharder(FusedEmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Offers on the CPU what torchrec only offers on a GPU; it trains and restores there as well."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise"]
