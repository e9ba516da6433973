"""Probabilities of rows, the same for evaluation before learning and for serving: always in fp32.

Letters: R rows, B rows of a batch.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from data_schemas.examples import F32, I64
from models.ctr import CtrModel
from models.embeddings import Pooled
from pipeline.data.encode import EncodedWindow
from pipeline.training.processes import Processes

SCORING_BATCH = 8192
ALONE = Processes()


@torch.no_grad()
def probabilities(
    model: CtrModel,
    dense_weights: Mapping[str, torch.Tensor],
    window: EncodedWindow,
    rows: I64 | None = None,
    *,
    device: torch.device,
    go_on: Callable[[], bool] = lambda: True,
    processes: Processes = ALONE,
) -> F32:
    """Probability of a click for each of `rows` (all by default), in that order.

    Args:
        dense_weights: of `model.net`; passed so that averaged weights can be scored without touching the live ones.
        go_on: asked before each batch, in the first process; where it says no, the probabilities of the rows so far are
            returned.
        processes: that hold the tables together; each scores its share of the rows, and all of them get all.
    """
    rows = np.arange(window.num_rows) if rows is None else rows
    scored = [np.empty(0, np.float32)]
    for start in range(0, len(rows), SCORING_BATCH * processes.count):
        if not processes.from_first(go_on):
            break
        together = rows[start : start + SCORING_BATCH * processes.count]
        batch = window.minibatch(_own_share(together, processes)).to(device)
        pooled: Pooled = model.tables(batch.deep, batch.wide)
        inputs = (model.layout.with_history(pooled.deep_BS, batch.history_row_B), pooled.wide_BW, batch.dense_BN)
        logits_B = torch.func.functional_call(model.net, dict(dense_weights), inputs)
        own = torch.sigmoid(logits_B.double()).float().cpu().numpy()
        scored.append(processes.concatenated_array(own)[: len(together)])
    return np.concatenate(scored)


def _own_share(rows: I64, processes: Processes) -> I64:
    """This process's part of some rows; as many in each, for the tables are looked up together: rows at the end repeat."""
    share = -(-len(rows) // processes.count)
    return np.resize(rows, share * processes.count)[processes.rank * share :][:share]
