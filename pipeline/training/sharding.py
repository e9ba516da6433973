"""How the tables are cut over processes, planned by torchrec.

Enters: the tables of one process, and what the settings ask for. Leaves: the same tables, of which each process holds a part.
"""

import torch
import torch.distributed as dist
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from models.embeddings import EmbeddingTables
from pipeline.training.processes import Processes

ROW_WISE_FROM = 4096
"""Tables of at least this many rows are cut by rows, so that ids are partitioned by their hash; smaller ones stay whole."""


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
