"""Probabilities of rows, the same for evaluation before learning and for serving: always in fp32.

Letters: R rows, B rows of a batch.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from data_schemas.examples import F32, I64
from models.ctr import CtrModel, ServedModel
from models.embeddings import Pooled
from pipeline.data.encode import EncodedWindow

SCORING_BATCH = 8192


@torch.no_grad()
def probabilities(
    model: CtrModel | ServedModel,
    dense_weights: Mapping[str, torch.Tensor],
    window: EncodedWindow,
    rows: I64 | None = None,
    *,
    device: torch.device,
    go_on: Callable[[], bool] = lambda: True,
) -> F32:
    """Probability of a click for each of `rows` (all by default), in that order.

    Args:
        dense_weights: of `model.net`; passed so that averaged weights can be scored without touching the live ones.
        go_on: asked before each batch; where it says no, the probabilities of the rows so far are returned.
    """
    rows = np.arange(window.num_rows) if rows is None else rows
    scored = [np.empty(0, np.float32)]
    for start in range(0, len(rows), SCORING_BATCH):
        if not go_on():
            break
        batch = window.minibatch(rows[start : start + SCORING_BATCH]).to(device)
        pooled: Pooled = model.tables(batch.deep, batch.wide)
        inputs = (model.layout.with_history(pooled.deep_BS, batch.history_row_B), pooled.wide_BW, batch.dense_BN)
        logits_B = torch.func.functional_call(model.net, dict(dense_weights), inputs)
        scored.append(torch.sigmoid(logits_B.double()).float().cpu().numpy())
    return np.concatenate(scored)
