"""One pass over a window: batches in, a model that learned them out.

Enters: an encoded window and a learner. Leaves: the learner changed in place, and what was done, to report and to replay.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.loader import EncodedWindow
from pipeline.outcome import LossPoint, PlanRecord
from pipeline.training.batch_size import BatchPolicy, Decision
from pipeline.training.budget import Deadline
from pipeline.training.learner import Learner, StepResult
from sampling.minibatches import BatchCursor

LOSS_POINTS = 200
"""Points of the loss curve at most."""

Progress = Callable[[int, int], None]
"""Called with rows learned and rows of the window."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a pass did."""

    rows: int
    """Rows learned: the first `rows` of the permutation, but for those of skipped steps."""
    unreached_R: npt.NDArray[np.bool_]
    """True for rows of the window that the pass did not come to."""
    last_batch_size: int
    """Rows of the last step."""
    plan: tuple[PlanRecord, ...]
    loss_curve: tuple[LossPoint, ...]
    skipped_steps: int
    out_of_time: bool


def learn(
    learner: Learner,
    window: EncodedWindow,
    *,
    seed: Sequence[int],
    policy: BatchPolicy,
    deadline: Deadline | None = None,
    progress: Progress = lambda done, rows: None,
) -> Learned:
    """Learns the window once, in the order that `seed` gives, until it is done or the deadline's reserve line is reached."""
    cursor = BatchCursor.of(window.num_rows, seed=seed)
    trace = _Trace(window.num_rows)
    mean_weight = float(window.weights_R.mean()) if window.num_rows else 1.0
    started_left = deadline.learning_seconds_left() if deadline else math.inf
    out_of_time = False
    while cursor.remaining:
        left = deadline.learning_seconds_left() if deadline else math.inf
        out_of_time = learner.processes.total(float(left <= 0)) > 0
        decision = None if out_of_time else policy.decide(step=trace.steps, position=cursor.position)
        if decision is None:
            break
        position = cursor.position
        rows = cursor.next_rows(decision.batch_size)
        result = _one_step(learner, window, rows, decision, mean_weight)
        seconds = started_left - deadline.learning_seconds_left() if deadline else 0.0
        trace.add(decision, result, position=position, rows=len(rows), seconds=seconds)
        progress(cursor.position, window.num_rows)
    unreached_R = np.zeros(window.num_rows, bool)
    unreached_R[cursor.order_R[cursor.position :]] = True
    return trace.learned(unreached_R, out_of_time=out_of_time)


def _one_step(
    learner: Learner, window: EncodedWindow, rows: npt.NDArray[np.int64], decision: Decision, mean_weight: float
) -> StepResult:
    """The step over `rows`, of which each process takes every n-th."""
    mine = rows[learner.processes.rank :: learner.processes.count]
    micro = learner.config.micro_batch_size
    share = _ceil_div(decision.batch_size, learner.processes.count)
    most = _ceil_div(len(rows), learner.processes.count)
    pad_to = share if share <= micro else _ceil_div(most, micro) * micro
    batch = window.minibatch(mine, pad_to=pad_to)
    return learner.step(batch, divisor=len(rows) * mean_weight, learning_rate=decision.learning_rate)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


class _Trace:
    """Everything that is written down along a pass."""

    def __init__(self, num_rows: int) -> None:
        self.steps = 0
        self.rows_learned = 0
        self.skipped = 0
        self.last_batch_size = 0
        self.plan: list[PlanRecord] = []
        self.curve: list[LossPoint] = []
        self.rows_a_point = max(num_rows // LOSS_POINTS, 1)
        self.gathered: list[tuple[float, int]] = []

    def add(self, decision: Decision, result: StepResult, *, position: int, rows: int, seconds: float) -> None:
        last = self.plan[-1] if self.plan else None
        if last is None or (last.batch_size, last.learning_rate) != (decision.batch_size, decision.learning_rate):
            self.plan.append(
                PlanRecord(
                    step=self.steps,
                    position=position,
                    batch_size=decision.batch_size,
                    learning_rate=decision.learning_rate,
                    reason=decision.reason,
                )
            )
        self.steps += 1
        self.last_batch_size = rows
        if not result.learned:
            self.skipped += 1
            return
        self.rows_learned += rows
        self.gathered.append((result.log_loss, rows))
        if sum(count for _, count in self.gathered) >= self.rows_a_point:
            self._close_point(position + rows, seconds)

    def learned(self, unreached_R: npt.NDArray[np.bool_], *, out_of_time: bool) -> Learned:
        return Learned(
            rows=self.rows_learned,
            unreached_R=unreached_R,
            last_batch_size=self.last_batch_size,
            plan=tuple(self.plan),
            loss_curve=tuple(self.curve),
            skipped_steps=self.skipped,
            out_of_time=out_of_time,
        )

    def _close_point(self, position: int, seconds: float) -> None:
        weight = sum(count for _, count in self.gathered)
        mean = sum(loss * count for loss, count in self.gathered) / weight
        self.curve.append(LossPoint(rows=position, seconds=seconds, log_loss=mean))
        self.gathered.clear()
