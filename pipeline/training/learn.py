"""One pass over a window: batches in, a model that learned them out.

Enters: an encoded window and a learner. Leaves: the learner changed in place, and what was done, to report and to replay.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from data_schemas.examples import I64
from pipeline.data.encode import EncodedWindow
from pipeline.outcome import LossPoint, PlanRecord
from pipeline.training.ahead import ChunkRows, CutAhead, ahead_from
from pipeline.training.batch_size import BatchPolicy, Decision
from pipeline.training.budget import Deadline
from pipeline.training.learner import Learner, StepResult
from pipeline.training.probes import Probed, Probes
from pipeline.training.processes import Processes
from pipeline.training.room import memory_explained
from pipeline.training.step_time import StepTime
from pipeline.training.threads import torch_threads
from sampling.mid_pass import Thinning
from sampling.minibatches import BatchCursor

LOSS_POINTS = 200
"""Points of the loss curve at most."""
LEAST_PROBE_ROWS = 32
"""Steps are not probed on fewer rows."""

Progress = Callable[[int, int], None]
"""Called with rows learned and rows to learn."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a pass did."""

    rows: int
    """Rows learned: the first `rows` of the permutation, but for those of skipped steps."""
    unreached_R: npt.NDArray[np.bool_]
    """True for rows of the window that the pass did not come to; rows left out by sampling are passed by like the others."""
    position: int
    """Rows of the permutation that the pass came to, those left out in mid-pass too; held-out rows and those that sampling left
    out have no place in it."""
    last_batch_size: int
    """Rows of the last step."""
    plan: tuple[PlanRecord, ...]
    loss_curve: tuple[LossPoint, ...]
    steps: int
    """Skipped ones among them."""
    skipped_steps: int
    skipped_rows: int
    """Rows of skipped steps: not learned, and not learned later either."""
    kept_R: npt.NDArray[np.bool_] | None = None
    """True for rows that were not left out by sampling; None: all."""
    probed: Probed | None = None
    """What single steps did; None where none was probed."""
    thinned_R: npt.NDArray[np.bool_] | None = None
    """True for rows that were passed by because the plan left them out; None where it left out none."""

    step_time: StepTime | None = None
    """As fitted in the pass; None where the policy fits none."""
    seconds: float = 0.0
    """Of the pass, by the clock on the wall."""
    waiting_seconds: float = 0.0
    """Of these, waiting for batches to be cut."""
    thrown_away: int = 0
    """Chunks that were cut ahead for a plan that came out otherwise, and were cut anew."""

    @property
    def waiting_share(self) -> float | None:
        """Of the pass; None where nothing was learned."""
        return self.waiting_seconds / self.seconds if self.seconds > 0 and self.steps else None

    @property
    def thinned_rows(self) -> int:
        """Rows that the plan left out in mid-pass."""
        return 0 if self.thinned_R is None else int(self.thinned_R.sum())

    def leaving(self, rows: npt.NDArray[np.int64]) -> "Learned":
        """The same, with rows that were not to be learned waiting like those that it did not come to."""
        unreached_R = self.unreached_R.copy()
        unreached_R[rows] = True
        return replace(self, unreached_R=unreached_R)

    def first(self, num_rows: int) -> "Learned":
        """What was done with the first rows of the window alone; what was skipped or left out is shared out evenly."""
        if num_rows == len(self.unreached_R):
            return self
        unreached_R = self.unreached_R[:num_rows]
        kept_R = np.ones(num_rows, bool) if self.kept_R is None else self.kept_R[:num_rows]
        thinned_R = None if self.thinned_R is None else self.thinned_R[:num_rows]
        reached, all_reached = int((kept_R & ~unreached_R).sum()), self.rows + self.skipped_rows
        reached -= 0 if thinned_R is None else int((kept_R & thinned_R).sum())
        skipped = round(self.skipped_rows * reached / max(all_reached, 1))
        return replace(
            self,
            rows=reached - skipped,
            unreached_R=unreached_R,
            kept_R=kept_R,
            thinned_R=thinned_R,
            skipped_rows=skipped,
        )


def learn(
    learner: Learner,
    window: EncodedWindow,
    *,
    seed: Sequence[int],
    policy: BatchPolicy,
    deadline: Deadline | None = None,
    progress: Progress = lambda done, rows: None,
    stratum_R: npt.NDArray[np.int32] | None = None,
    kept_R: npt.NDArray[np.bool_] | None = None,
    probe_rows: int = 0,
    mean_weight: float | None = None,
    ahead: bool | None = None,
) -> Learned:
    """Learns the window once, in the order that `seed` gives, until it is done or the deadline's reserve line is reached.

    Args:
        learner: changed in place.
        window: encoded; its weights are one over the inclusion probability.
        seed: of the order.
        policy: the size and the rate of each step.
        deadline: none: the whole window is learned.
        progress: called after each step.
        stratum_R: batches mirror these strata; and where the policy leaves rows out, rare strata are kept longest.
        kept_R: only these rows are learned; the others are reached as the pass goes by.
        probe_rows: some steps are looked at on so many rows; 0 for none.
        mean_weight: of a row; that of the window where it is None.
        ahead: batches are cut on a second thread while the ones before them are learned; the bits are the same;
            None: where it costs no time.
    """
    started_pass = time.perf_counter()
    learner.model.tables.decay_accumulators(learner.config.accumulator_decay)
    kept = slice(None) if kept_R is None else kept_R
    learner.start_at(click_rate(window, kept))
    cursor = BatchCursor.of(window.num_rows, seed=seed, stratum_R=stratum_R, kept_R=kept_R)
    num_rows = cursor.remaining
    trace = _Trace(num_rows)
    if mean_weight is None:
        mean_weight = float(window.weights_R[kept].mean()) if num_rows else 1.0
    stopwatch = _Stopwatch(deadline, learner.processes)
    probes = _probes(learner, window, cursor, probe_rows)
    takes = _Takes(cursor, lambda: _thinning(window, seed, stratum_R))
    window = replace(window, weights_R=window.weights_R.copy())
    with torch_threads(learner.threads), CutAhead(window, from_rows=ahead_from(ahead, learner.device)) as cutting:
        while not stopwatch.out_of_time:
            batches = _plan_chunk(takes, policy, trace.steps, learner, stopwatch.agreed_left())
            if not batches:
                break
            started, done, last = stopwatch.seconds(), 0, 0
            for batch in batches:
                if batch.probability_B is not None:
                    window.weights_R[batch.rows] /= batch.probability_B.astype(np.float32)
            reweighted = any(batch.probability_B is not None for batch in batches)
            planned, own_rows = _rows_of(learner, [batch.rows for batch in batches])
            with memory_explained("cutting", len(planned.rows_C)):
                cut = cutting.take(replace(planned, reweighted=reweighted))
            chunk = learner.look_up(cut)
            worth_it = cutting.is_worth_it(len(planned.rows_C))
            if worth_it and (coming := _rows_to_come(cursor, batches[-1].decision, learner)):
                cutting.expect(coming)
            for batch, rows in zip(batches, own_rows, strict=True):
                if stopwatch.is_up():
                    cursor.position = batch.position
                    break
                own = slice(rows.start, rows.start + len(batch.rows))
                with probes.dense_step(chunk, own, position=batch.position) if probes else nullcontext():
                    result = learner.step(
                        chunk,
                        rows,
                        divisor=len(batch.rows) * mean_weight / batch.decision.keep_rate,
                        learning_rate=batch.decision.learning_rate,
                        batch_scale=learner.config.batch_scale(batch.decision.batch_size),
                    )
                trace.add(batch, result, seconds=stopwatch.seconds())
                takes.learned(batch)
                progress(batch.position + len(batch.rows), num_rows)
                last, done = own.stop, done + 1
            learner.set_sparse_factor(batches[0].decision.sparse_rate_factor)
            passed = cursor.position - batches[0].position
            with probes.sparse_step(chunk, slice(0, last), passed, position=cursor.position) if probes else nullcontext():
                learner.finish(chunk)
            rows_done = sum(rows.stop - rows.start for rows in own_rows[:done]) * learner.processes.count
            policy.observe(steps=done, rows=rows_done, seconds=stopwatch.agreed(stopwatch.seconds() - started))
    learner.end_pass()
    if takes.last_without_rows and not cursor.remaining:
        trace.add_plan(takes.last_without_rows)
    unreached_R = np.zeros(window.num_rows, bool)
    unreached_R[cursor.unreached()] = True
    left_out_R = takes.left_out_R()
    thinned_R = None if left_out_R is None else left_out_R & ~unreached_R
    learned = trace.learned(unreached_R, thinned_R, position=cursor.position)
    return replace(
        learned,
        kept_R=kept_R,
        probed=probes.probed() if probes else None,
        seconds=time.perf_counter() - started_pass,
        waiting_seconds=cutting.waiting_seconds,
        thrown_away=cutting.thrown_away,
    )


def _probes(learner: Learner, window: EncodedWindow, cursor: BatchCursor, probe_rows: int) -> Probes | None:
    """None where it was not asked for, for a few rows, and where a step's rows are spread over processes."""
    probe_rows = min(probe_rows, cursor.remaining // 4)
    if probe_rows < LEAST_PROBE_ROWS or learner.processes.count > 1:
        return None
    return Probes(learner, window.minibatch(cursor.order_R[-probe_rows:]), num_rows=cursor.remaining)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of one step, over all processes."""

    decision: Decision
    step: int
    position: int
    """Rows of the permutation before it."""
    rows: npt.NDArray[np.int64]
    probability_B: npt.NDArray[np.float64] | None = None
    """That each had to be kept by the plan; None where it leaves out none."""
    passed: tuple[int, int] = (0, 0)
    """Places of the permutation that were passed for it."""


class _Takes:
    """Takes rows from the permutation, all or thinned, and remembers which were left out."""

    def __init__(self, cursor: BatchCursor, thinning: Callable[[], Thinning]) -> None:
        self.cursor = cursor
        self._new_thinning = thinning
        self._thinning: Thinning | None = None
        self._left_out_R: npt.NDArray[np.bool_] | None = None
        self.last_without_rows: _Batch | None = None
        """The end of a pass whose last rows were all left out: a plan was in force there, and no step tells of it."""

    def next_batch(self, decision: Decision, step: int) -> _Batch:
        start = self.cursor.position
        rows, probability_B = self._next_rows(decision)
        passed = (start, self.cursor.position)
        return _Batch(decision=decision, step=step, position=start, rows=rows, probability_B=probability_B, passed=passed)

    def learned(self, batch: _Batch) -> None:
        """What was passed for a batch that was stepped counts as done."""
        if batch.probability_B is None or self._thinning is None:
            return
        if self._left_out_R is None:
            self._left_out_R = np.zeros(len(self._thinning.chance_R), bool)
        self._left_out_R[self.cursor.order_R[slice(*batch.passed)]] = True
        self._left_out_R[batch.rows] = False

    def left_out_R(self) -> npt.NDArray[np.bool_] | None:
        return self._left_out_R

    def _next_rows(self, decision: Decision) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64] | None]:
        if decision.keep_rate == 1:
            return self.cursor.next_rows(decision.batch_size), None
        if self._thinning is None:
            self._thinning = self._new_thinning()
        return self._thinning.next_rows(self.cursor, decision.batch_size, decision.keep_rate)


def _thinning(window: EncodedWindow, seed: Sequence[int], stratum_R: npt.NDArray[np.int32] | None) -> Thinning:
    """By the strata that were asked for; else as many clicks as rows without one, as long as there are clicks.

    That is Neyman's (1934) allocation, rows of a stratum times the root mean square of their gradients: with a click rate of p
    the derivative of a row's log loss is 1 - p with a click and p without, so that both products are p (1 - p).
    """
    if stratum_R is not None:
        return Thinning.of(window.num_rows, seed=seed, stratum_R=stratum_R)
    return Thinning.of(window.num_rows, seed=seed, stratum_R=(window.labels_R > 0).astype(np.int32), shape="equal")


def _plan_chunk(takes: _Takes, policy: BatchPolicy, step: int, learner: Learner, seconds_left: float) -> list[_Batch]:
    """The next batches whose ids are looked up together: at least one, as long as there are rows and the plan goes on."""
    batches: list[_Batch] = []
    cursor, chunk_rows = takes.cursor, learner.config.sparse_step_rows
    while cursor.remaining and sum(len(batch.rows) for batch in batches) < max(chunk_rows, 1):
        at = step + len(batches)
        decision = policy.decide(step=at, position=cursor.position, remaining=cursor.remaining, seconds_left=seconds_left)
        if decision is None:
            break
        batch = takes.next_batch(decision, at)
        if not len(batch.rows):
            takes.learned(batch)
            takes.last_without_rows = batch
            break
        batches.append(batch)
    return batches


def _rows_to_come(cursor: BatchCursor, decision: Decision, learner: Learner) -> ChunkRows | None:
    """The chunk after this one, if the plan stays as it is; None at the end, and where the plan leaves rows out: which ones is
    not known before."""
    if decision.keep_rate != 1 or not cursor.remaining:
        return None
    cursor, batches = replace(cursor), list[I64]()
    while cursor.remaining and sum(map(len, batches)) < max(learner.config.sparse_step_rows, 1):
        batches.append(cursor.next_rows(decision.batch_size))
    return _rows_of(learner, batches)[0]


def _rows_of(learner: Learner, batches: Sequence[I64]) -> tuple[ChunkRows, list[slice]]:
    """The rows of these batches in this process, and where in the chunk each batch lies.

    Each process takes every n-th row of a batch; where that does not come out even, a row of weight 0 fills the shape, so that
    all processes exchange tensors of one size.
    """
    rank, count = learner.processes.rank, learner.processes.count
    shares = [learner.padded(_ceil_div(len(batch), count)) for batch in batches]
    ends = np.cumsum(shares)
    rows = [
        np.resize(batch[rank::count] if rank < len(batch) else batch, share)
        for batch, share in zip(batches, shares, strict=True)
    ]
    filling = [np.arange(share) >= len(batch[rank::count]) for batch, share in zip(batches, shares, strict=True)]
    chunk = ChunkRows(rows_C=np.concatenate(rows), filling_C=np.concatenate(filling))
    return chunk, [slice(int(end) - share, int(end)) for end, share in zip(ends, shares, strict=True)]


def click_rate(window: EncodedWindow, kept: slice | npt.NDArray[np.bool_] = slice(None)) -> float:
    """Of all rows, estimated from those that are kept by their weights and shifts, and from the share of clicks that is known;
    0 or 1 where these have one label only."""
    weights_R = window.weights_R[kept].astype(np.float64)  # products are summed by numpy: BLAS would wake its threads for one
    total = float(weights_R.sum())
    rate = float((window.labels_R[kept] * weights_R).sum()) / total if total > 0 else 0.0
    if window.looks_R3 is not None and 0 < rate < 1:
        known_R = -np.expm1(window.looks_R3[kept, 1].astype(np.float64))
        rate = min(rate * total / float((known_R * weights_R).sum()), (1 + rate) / 2)
    if window.logit_shifts_R is None or not 0 < rate < 1:
        return rate
    shift = float((window.logit_shifts_R[kept] * weights_R).sum()) / total
    return 1 / (1 + (1 - rate) / rate * math.exp(shift))


class _Stopwatch:
    """Asks the deadline, so that all processes stop at the same batch."""

    def __init__(self, deadline: Deadline | None, processes: Processes) -> None:
        self._deadline = deadline
        self._processes = processes
        self._left_at_start = deadline.learning_seconds_left() if deadline else 0.0
        self.out_of_time = False

    def is_up(self) -> bool:
        passed = self._deadline is not None and self._deadline.learning_seconds_left() <= 0
        self.out_of_time = self._processes.total(float(passed)) > 0
        return self.out_of_time

    def agreed_left(self) -> float:
        """Seconds until the reserve line, the same in all processes; infinite without a deadline."""
        return self.agreed(self._deadline.learning_seconds_left()) if self._deadline else math.inf

    def agreed(self, value: float) -> float:
        """The mean over all processes."""
        return self._processes.total(value) / self._processes.count

    def seconds(self) -> float:
        return self._left_at_start - self._deadline.learning_seconds_left() if self._deadline else 0.0


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _governs(plan: PlanRecord | Decision) -> tuple[float, ...]:
    """What a step depends on."""
    return plan.batch_size, plan.learning_rate, plan.keep_rate, plan.sparse_rate_factor


class _Trace:
    """Everything that is written down along a pass."""

    def __init__(self, num_rows: int) -> None:
        self.steps = 0
        self.rows_learned = 0
        self.skipped = 0
        self.skipped_rows = 0
        self.last_batch_size = 0
        self.plan: list[PlanRecord] = []
        self.curve: list[LossPoint] = []
        self.rows_a_point = max(num_rows // LOSS_POINTS, 1)
        self.gathered: list[tuple[float, int]] = []
        self.last_point = (0, 0.0)

    def add(self, batch: _Batch, result: StepResult, *, seconds: float) -> None:
        rows = len(batch.rows)
        self.add_plan(batch)
        self.steps += 1
        self.last_batch_size = rows
        if not result.learned:
            self.skipped += 1
            self.skipped_rows += rows
            return
        self.rows_learned += rows
        self.gathered.append((result.log_loss, rows))
        self.last_point = (batch.position + rows, seconds)
        if sum(count for _, count in self.gathered) >= self.rows_a_point:
            self._close_point(*self.last_point)

    def add_plan(self, batch: _Batch) -> None:
        """Where it differs from the plan in force."""
        last = self.plan[-1] if self.plan else None
        if last is None or _governs(last) != _governs(batch.decision):
            self.plan.append(PlanRecord(step=batch.step, position=batch.position, **vars(batch.decision)))

    def learned(self, unreached_R: npt.NDArray[np.bool_], thinned_R: npt.NDArray[np.bool_] | None, *, position: int) -> Learned:
        if self.gathered:
            self._close_point(*self.last_point)
        return Learned(
            rows=self.rows_learned,
            unreached_R=unreached_R,
            position=position,
            last_batch_size=self.last_batch_size,
            plan=tuple(self.plan),
            loss_curve=tuple(self.curve),
            steps=self.steps,
            skipped_steps=self.skipped,
            skipped_rows=self.skipped_rows,
            thinned_R=thinned_R,
        )

    def _close_point(self, position: int, seconds: float) -> None:
        weight = sum(count for _, count in self.gathered)
        mean = sum(loss * count for loss, count in self.gathered) / weight
        self.curve.append(LossPoint(rows=position, seconds=seconds, log_loss=mean))
        self.gathered.clear()
