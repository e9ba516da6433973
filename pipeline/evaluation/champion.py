"""Champion and challenger on a window's held-out rows.

Enters: the state before and after learning, the window's rows. Leaves: what both predict, as the gate takes it, and its
verdict.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64
from pipeline.config import UpdateConfig
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.window_rows import WindowRows
from pipeline.evaluation.gate import GateVerdict, judge
from pipeline.evaluation.paired import Evidence, Paired
from pipeline.evaluation.score import probabilities
from pipeline.model_state import ModelState, restore_serving
from pipeline.training.learn import Learned


def champion_probabilities(state: ModelState, rows: WindowRows, config: UpdateConfig, spec: DatasetSpec, hour: int) -> F32:
    """`[H]` of the held-out rows, by the model that serves, before the window that starts at `hour` is learned."""
    if state.serving is None or not len(rows.held_out):
        return predicted(state, rows.encoded, rows.held_out)
    serving = restore_serving(config, spec, state)
    held = rows.examples.take(rows.held_out)
    encoded = encode(held, spec, serving.memory, serving.moments, hour=hour, ids=serving.ids)
    return predicted(serving, encoded, np.arange(held.num_rows))


def gathered_evidence(state: ModelState, rows: WindowRows, champion_H: F32, max_rows: int) -> Evidence:
    """This window's held-out rows, and those of windows before it that could not decide; of very many, those of some users.

    Args:
        state: after learning.
        rows: as they were learned.
        champion_H: what `champion_probabilities` gave before.
        max_rows: about so many are kept.
    """
    held, before = rows.held_out, state.evidence
    known_share = rows.encoded.known_share(held)
    pair = Paired(
        labels_H=np.minimum(rows.examples.labels_R[held], 1),
        champion_H=champion_H * known_share,
        challenger_H=predicted(state, rows.encoded, held) * known_share,
        weights_H=rows.judged_weights_R[held],
        user_H=rows.examples.user_R[held],
    )
    pair = pair.plus(before.pair if before else None).at_most(max_rows, rows.seed)
    return Evidence(pair=pair, windows=1 + (before.windows if before else 0))


def gate_verdict(
    evidence: Evidence, rows: WindowRows, learned: Learned, config: UpdateConfig, history: Sequence[Mapping[str, Any]]
) -> GateVerdict:
    """What the gate says; gains of windows at or after this one, learned before a rollback, are not looked at."""
    return judge(
        evidence.pair,
        limits=config.gate.limits(),
        windows=evidence.windows,
        past_gains=past_gains(history, before=rows.seed[-1]),
        skipped_steps=learned.skipped_steps,
        steps=learned.steps,
        seed=rows.seed,
    )


def past_gains(history: Sequence[Mapping[str, Any]], *, before: int) -> list[float]:
    """Of AUC, of the published windows that ended before an hour, since 1970."""
    found = []
    for record in history:
        gate = record.get("gate")
        ended = int(datetime.fromisoformat(record["window_end"]).timestamp()) // 3600
        if record["outcome"] == "published" and gate and gate["auc_difference"] is not None and ended < before:
            found.append(float(gate["auc_difference"]))
    return found


def predicted(state: ModelState, encoded: EncodedWindow, rows: I64) -> F32:
    """`[len(rows)]` probabilities by the weights that are evaluated and published."""
    learner = state.learner
    with learner.averaged() as dense_weights:
        return probabilities(learner.model, dense_weights, encoded, rows, device=learner.device, processes=learner.processes)
