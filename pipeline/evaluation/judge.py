"""How well a model predicts the rows of a window, before and after it learns them, within the deadline.

Enters: the state and the window's rows. Leaves: `Score`s.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CorruptCheckpoint
from data_schemas.examples import F32, I64, Examples
from pipeline.config import UpdateConfig
from pipeline.data.window_rows import WindowRows
from pipeline.evaluation.metrics import CalibrationBin, Metrics, calibration_bins, measure
from pipeline.evaluation.score import probabilities
from pipeline.model_state import ModelState
from pipeline.publishing.predictor import load_predictor
from pipeline.training.budget import Deadline

log = logging.getLogger(__name__)

EVALUATION_SHARE = 0.2
"""Share of the budget after which evaluating stops with the rows that it has."""


@dataclass(frozen=True)
class Score:
    """How probabilities compare with what happened."""

    metrics: Metrics
    bins: tuple[CalibrationBin, ...]
    probabilities: F32


@dataclass(frozen=True)
class Scores:
    before: Score | None
    after: Score | None
    frozen: Score | None


def evaluate_before(
    state: ModelState, rows: WindowRows, config: UpdateConfig, spec: DatasetSpec, deadline: Deadline
) -> tuple[Score | None, Score | None]:
    """Of the model, and of the one that was frozen, where there is one; in the first process, as `evaluate`."""
    before = evaluate(state, rows, config, deadline) if state.version > 0 else None
    folder = frozen_folder(config)
    if before is None or not folder.is_dir() or deadline.learning_seconds_left() <= 0:
        return before, None
    try:
        frozen = load_predictor(folder)
    except CorruptCheckpoint as error:
        log.warning("the frozen model is not measured: %s; remove the folder to freeze the model anew", error)
        return before, None
    chosen = rows.evaluated[: before.metrics.rows]
    examples = _columns_of(frozen.spec, rows.examples.take(chosen), spec)
    return before, _measured(rows, chosen, frozen.predict_examples(examples))


def _columns_of(old: DatasetSpec, examples: Examples, spec: DatasetSpec) -> Examples:
    """The examples as a model of an older spec, which may have fewer numbers, takes them."""
    numbers = [number.name for number in spec.numeric]
    return replace(examples, numeric_NR=examples.numeric_NR[[numbers.index(number.name) for number in old.numeric]])


def evaluate(state: ModelState, rows: WindowRows, config: UpdateConfig, deadline: Deadline) -> Score | None:
    """In the first process; the others only score their share, and get None."""
    learner = state.learner
    chosen = rows.evaluated[: config.evaluation.max_rows]
    stop_at = min(deadline.seconds_used() + EVALUATION_SHARE * deadline.budget_seconds, deadline.budget_seconds)
    with learner.averaged() as dense_weights:
        scored = probabilities(
            learner.model,
            dense_weights,
            rows.encoded,
            chosen,
            device=learner.device,
            go_on=lambda: deadline.seconds_used() < stop_at,
            processes=learner.processes,
        )
    return _measured(rows, chosen[: len(scored)], scored) if learner.processes.is_first else None


def _measured(rows: WindowRows, chosen: I64, scored: F32) -> Score | None:
    if not len(chosen):
        return None
    labels, users = rows.encoded.labels_R[chosen], rows.encoded.user_R[chosen]
    weights = rows.judged_weights_R[chosen]
    scored = scored * rows.encoded.known_share(chosen)
    return Score(measure(labels, scored, users, weights), calibration_bins(labels, scored, weights), scored)


def frozen_folder(config: UpdateConfig) -> Path:
    return config.model_dir / "frozen"
