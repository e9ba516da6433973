"""What an update leaves behind: the figures that MLflow, Prefect, the terminal and the history show."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from models.id_table import IdFigures
from pipeline.evaluation.alarms import Alarm
from pipeline.evaluation.diagnosis import Diagnosis
from pipeline.evaluation.gate import GateVerdict
from pipeline.evaluation.metrics import Metrics
from pipeline.evaluation.profile import WindowProfile
from pipeline.evaluation.stability import Stability
from sampling.plan import SamplingPlan

Outcome = Literal["published", "held", "rejected", "suspicious", "empty"]
"""`held`: learned, but not proven yet, so the model before goes on serving; `rejected`: the gate turned it away;
`suspicious`: an alarm kept it from being learned."""
LEARNED: tuple[Outcome, ...] = ("published", "held")
"""Outcomes after which the window is part of the model."""


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """One decision of the learner; the sequence of them replays an update to the same bits."""

    step: int
    """First step of the window that it governs."""
    position: int
    """Rows of the permutation consumed before that step."""
    batch_size: int
    """Rows."""
    learning_rate: float
    """Of the dense optimizer, before the warm-up of a new model."""
    reason: str
    keep_rate: float = 1.0
    """Share of the rows from here on that are learned; the others are left out on purpose."""
    sparse_rate_factor: float = 1.0
    """On the rates of the embeddings and of the wide part."""
    rows: int = 0
    """To be learned from here on, as planned; 0 where nothing was planned."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """The mean log loss of some consecutive steps, before each of them."""

    rows: int
    """Rows of the window learned by then."""
    seconds: float
    """Since the start of learning."""
    log_loss: float


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update, from window to published model."""

    dataset: str
    model_name: str
    outcome: Outcome
    version: int
    """Checkpoint that the update made; where it made none, the one that goes on serving."""
    log_version: int
    """Version of the click log that the model has consumed."""
    window_start: datetime
    window_end: datetime
    """Half-open, UTC."""
    rows: int
    """Rows of the window."""
    late_rows: int
    """Of them, rows whose hour lies before `window_start`."""
    rows_learned: int
    rows_pending: int
    """Rows of this window that are left for the next update: out of time, or over `window.max_rows`."""
    batch_size: int
    """Rows of the last step."""
    precision: str
    before: Metrics | None
    """On the window's rows, before anything was learned from them."""
    after: Metrics | None
    """On the same rows after learning: how well they were fitted, not how well the model generalises."""
    frozen: Metrics | None
    """Of the model that stopped learning, on the same rows; None without `evaluation.frozen_after_updates`."""
    evaluated_rows: int
    seconds: Mapping[str, float]
    """By stage."""
    budget_seconds: float
    plan: tuple[PlanRecord, ...]
    loss_curve: tuple[LossPoint, ...]
    skipped_steps: int
    """Steps whose loss was not finite; nothing was learned from them."""
    git_commit: str
    notes: tuple[str, ...]
    """Everything that was dropped, capped or skipped, in words."""
    ids: Mapping[str, IdFigures] = field(default_factory=dict)
    """By feature with `ids = "admitted"`."""
    sampling: SamplingPlan | None = None
    """What was to be learned of each stratum; None where the settings name no strata and leave no row out."""
    stability: Stability | None = None
    """How steady learning was."""
    diagnosis: Diagnosis | None = None
    """What is wrong with it, if anything."""
    rows_thinned: int = 0
    """Rows left out in mid-pass because time did not suffice for all; they do not come again."""
    clicks_known_share: float = 1.0
    """Share of the clicks of the evaluated rows that is known yet, by estimate; below 1 where clicks come late."""
    clicks_corrected: int = 0
    """Impressions that were learned before their click came, and are corrected by this update; of `rows`."""
    profile: WindowProfile | None = None
    """What the window's rows looked like; later windows are compared with it, if it was learned."""
    alarms: tuple[Alarm, ...] = ()
    """What was out of line in them."""
    rows_held_out: int = 0
    """Of `rows_pending`, rows that models are judged by; they are learned with the next window."""
    gate: GateVerdict | None = None
    """None where there was no model to compare with."""
    serving: int | None = None
    """Checkpoint that goes on serving, where it is not `version`."""
    fixed_seconds: float | None = None
    """Of a training step, undisturbed, as fitted in the pass: `fixed_seconds + row_seconds * rows`; None if not measured."""
    row_seconds: float | None = None
    noise_scale: float | None = None
    """Of the dense gradients, in rows; None if not measured."""
    waiting_share: float | None = None
    """Share of the pass over the window that the learner waited for its batches; None where nothing was learned."""

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())
