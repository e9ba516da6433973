"""One update, from the rows that wait in the click log to the published model: the whole story on one screen.

window -> check -> evaluate before learning -> learn until done or out of time -> evaluate -> judge -> publish -> report

Many processes run it side by side: they read, learn and score together; the first one alone decides, writes and publishes, and
what it decided holds in all (`Processes.from_first`).
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64
from models.memory import MemoryReport
from pipeline.config import UpdateConfig, spec_of
from pipeline.data.clicks import is_correction, join_clicks, require_correctable
from pipeline.data.encode import num_normalised
from pipeline.data.held import held_windows, hold_aside
from pipeline.data.lake import ClickLog
from pipeline.data.lineage import without
from pipeline.data.negatives import require_sampler
from pipeline.data.normalise import RunningMoments
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.window_rows import WindowRows, load_rows
from pipeline.data.windows import Window, next_window
from pipeline.describe import as_rejected, describe, describe_suspicious, one_line, with_steadiness
from pipeline.ending import Shown, end_interrupted, end_update, forget_note, freeze, note_down, track
from pipeline.evaluation.alarms import Checked, alarms_of, past_of
from pipeline.evaluation.champion import champion_probabilities, gate_verdict, gathered_evidence
from pipeline.evaluation.gate import GateVerdict
from pipeline.evaluation.judge import Scores, evaluate, evaluate_before
from pipeline.evaluation.metrics import CalibrationBin
from pipeline.evaluation.profile import profile_of
from pipeline.lock import alone
from pipeline.model_state import ModelState, admit_ids, as_saved, fingerprint_of_copies, restore_or_create, save
from pipeline.outcome import LEARNED, UpdateReport
from pipeline.publishing.checkpoint import current_version, forget_unpublished
from pipeline.publishing.report import append_history, read_history, reason_of
from pipeline.publishing.report import verdict as verdict_of
from pipeline.training.batch_size import batch_policy
from pipeline.training.budget import Clock, Deadline, earlier_step_time, refuse_too_small, reserve_seconds
from pipeline.training.late_clicks import LateClicks, Looks, logits_of
from pipeline.training.learn import Learned, Progress, learn
from pipeline.training.processes import Processes
from pipeline.training.replay import after_window, with_replay
from pipeline.training.room import keep_freed_memory
from pipeline.training.sampling import sample_window, without_rows
from pipeline.training.step_time import StepTimeFit
from sampling.plan import SamplingPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

AFTER_LEARNING = ("evaluate after learning", "judge", "checkpoint", "publish")
"""Stages that the reserve is kept for."""


class StageRunner(Protocol):
    """Runs one stage; a flow makes each a task of that name."""

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns."""


def run_update(
    config: UpdateConfig,
    *,
    stage: StageRunner = lambda name, work: work(),
    clock: Clock = time.monotonic,
    now: datetime | None = None,
    progress: Progress = lambda done, rows: None,
    spent_seconds: float = 0.0,
    read_ahead: ReadAhead | None = None,
) -> UpdateReport | None:
    """Learns the next closed window and publishes the model; None where no window waits, and in all processes but the first.

    The model before stays current until the new one is written whole, and the rows stay waiting until then.

    Args:
        config: settings; the same in all processes, and so is the call.
        stage: runs each stage.
        clock: of the deadline.
        now: no later window is closed; None: the wall clock. Only the first process is asked.
        progress: called after each step.
        spent_seconds: of the budget, by an attempt before this one.
        read_ahead: files that it has are not read again.

    Raises:
        UpdateInProgress: another process has the model, and kept it for `lock_wait_seconds`.
        TidemarkError: what went wrong and the way out; the model before still serves.
    """
    keep_freed_memory()
    spec = spec_of(config)
    require_sampler(spec, config.sampling)
    require_correctable(spec, config.sampling)
    processes = Processes.started()
    with ExitStack() as held:
        lock = alone(config.model_dir, "update", wait_seconds=config.lock_wait_seconds)
        processes.from_first(lambda: held.enter_context(lock))
        stages, asked = _Stages(stage, clock), now
        now, spent_seconds = processes.from_first(lambda: (asked or datetime.now(UTC), spent_seconds))
        state = stages.run("restore", lambda: _restore(config, spec, processes))
        history = processes.from_first(lambda: [r for r in read_history(config.model_dir) if r["outcome"] in LEARNED])
        click_log, window = stages.run("find window", lambda: _find_window(config, spec, state, now))
        if window is None:
            return None
        click_log.read_ahead = read_ahead
        deadline = _deadline(config, stages, history, spent_seconds)
        rows = stages.run("load", lambda: load_rows(click_log, window, state, spec, config))
        seen = stages.run(
            "check the data", lambda: processes.from_first(lambda: _check(state, rows, window, config, spec, history))
        )
        if seen.alarms and config.alarms.action == "hold":
            if not processes.is_first:
                return None
            report = describe_suspicious(config, spec, window, state, seen, stages.seconds)
            return stages.run("hold aside", lambda: _hold_aside(config, window, report, now))
        before, frozen = stages.run("evaluate before learning", lambda: evaluate_before(state, rows, config, spec, deadline))
        champion_H = stages.run(
            "predict as the champion", lambda: champion_probabilities(state, rows, config, spec, window.start)
        )
        rows, learned, plan = stages.run("learn", lambda: _learn(state, rows, window, config, spec, deadline, progress))
        after = stages.run("evaluate after learning", lambda: evaluate(state, rows, config, deadline))
        state, verdict = stages.run("judge", lambda: _judge(state, rows, champion_H, learned, config, history))
        scores, enforced = Scores(before, after, frozen), config.gate.action == "enforce"
        if enforced and verdict and verdict.decision == "reject":
            if not processes.is_first:
                return None
            report = describe(config, spec, window, state, rows, learned, plan, scores, stages.seconds)
            report = replace(as_rejected(report, state), profile=seen.profile, gate=verdict)
            return stages.run("hold aside", lambda: _hold_aside(config, window, report, now))
        on_hold = verdict.decision == "hold" if verdict else state.serving is not None
        published = not (enforced and on_hold)

        def described(saved: ModelState) -> UpdateReport:
            report = describe(config, spec, window, saved, rows, learned, plan, scores, stages.seconds)
            report = with_steadiness(report, window, learned, before, after, history)
            report = report if published else replace(report, outcome="held", serving=current_version(config.model_dir))
            report = replace(report, profile=seen.profile, alarms=seen.alarms, gate=verdict)
            return replace(report, notes=(*report.notes, *_warnings(seen, verdict, config)))

        checkpoint = _Checkpoint(described, before.bins if before else (), published)
        saved = stages.run("checkpoint", lambda: _checkpoint(state, rows, window, learned, plan, config, spec, checkpoint))
        if not processes.is_first:
            return None
        report = end_update(
            config,
            spec,
            saved,
            described(saved),
            Shown(examples=rows.examples.take(np.arange(len(rows.sample))), frame=rows.sample, bins=checkpoint.bins),
            lambda work: stages.run("publish", work),
            lambda: dict(stages.seconds),
        )
        log.info("%s", one_line(report))
        return report


@dataclass
class _Stages:
    """Runs stages and keeps their seconds."""

    runner: StageRunner
    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def run(self, name: str, work: Callable[[], T]) -> T:
        started = self.clock()
        try:
            return self.runner(name, work)
        finally:
            self.seconds[name] = self.clock() - started


class _Checkpoint(NamedTuple):
    """What a checkpoint is made for."""

    described: Callable[[ModelState], UpdateReport]
    """The report of the update that saves a state."""
    bins: tuple[CalibrationBin, ...]
    published: bool


def _deadline(config: UpdateConfig, stages: _Stages, history: list[dict[str, object]], spent_seconds: float) -> Deadline:
    tails = [sum(record["seconds"].get(name, 0.0) for name in AFTER_LEARNING) for record in history]  # type: ignore[attr-defined]
    budget = config.budget
    reserve = reserve_seconds(tails, budget_seconds=budget.seconds, min_reserve_seconds=budget.min_reserve_seconds)
    started = stages.started - spent_seconds
    return Deadline(started=started, budget_seconds=budget.seconds, reserve_seconds=reserve, clock=stages.clock)


def _restore(config: UpdateConfig, spec: DatasetSpec, processes: Processes) -> ModelState:
    """The model, once what an update before was killed in is done."""
    processes.from_first(lambda: end_interrupted(config, spec))
    return restore_or_create(config, spec)


def _find_window(config: UpdateConfig, spec: DatasetSpec, state: ModelState, now: datetime) -> tuple[ClickLog, Window | None]:
    def found() -> Window | None:
        click_log = ClickLog.open_or_create(config.log_path, spec)
        window = next_window(click_log, state.cursor, config.window, now, held_windows(config.model_dir))
        return window and join_clicks(click_log, window, spec, config.window.label_delay_minutes)

    window = state.learner.processes.from_first(found)
    return ClickLog.open_or_create(config.log_path, spec), window


def _check(
    state: ModelState,
    rows: WindowRows,
    window: Window,
    config: UpdateConfig,
    spec: DatasetSpec,
    history: Sequence[Mapping[str, Any]],
) -> Checked:
    """What the window looks like; no alarm where a person has released it."""
    examples = rows.examples
    logged = examples if rows.num_logged == examples.num_rows else examples.take(np.arange(rows.num_logged))
    profile, limits = profile_of(logged, spec, state.memory), config.alarms
    if limits.action == "off" or window.released:
        return Checked(profile=profile, alarms=())
    alarms = alarms_of(
        profile,
        window.start,
        past_of(history),
        deviations=limits.deviations,
        burst_factor=limits.burst_factor,
        min_windows=limits.min_windows,
    )
    return Checked(profile=profile, alarms=alarms)


def _hold_aside(config: UpdateConfig, window: Window, report: UpdateReport, now: datetime) -> UpdateReport:
    """Holds the window aside; the model that serves and what it has consumed stay as they are, and rows that an earlier window
    left wait on.

    What was learned since, and is not proven, is forgotten when the gate rejects it: those windows wait again.
    """
    note_down(config.model_dir, report)
    held = hold_aside(
        config.model_dir,
        start=window.start,
        end=window.end,
        log_version=window.log_version,
        pieces=without(window.pieces, window.carried) or window.pieces,
        kind="gate" if report.outcome == "rejected" else "alarm",
        reason=reason_of(report),
        now=now,
    )
    if report.outcome == "rejected":
        forget_unpublished(config.model_dir)
    note = f"held aside as {held.id}; release or discard it with flows/held.py"
    report = replace(report, notes=(*report.notes, note))
    append_history(config.model_dir, report)
    report = replace(report, notes=(*report.notes, *track(config, report)))
    forget_note(config.model_dir)
    log.warning("%s", verdict_of(report))
    return report


def _warnings(seen: Checked, verdict: GateVerdict | None, config: UpdateConfig) -> Iterator[str]:
    yield from (f"out of line, and learned all the same: {alarm.sentence}" for alarm in seen.alarms)
    if verdict and verdict.decision != "publish" and config.gate.action == "observe":
        yield f"the gate would {verdict.decision}, and is only to observe: {verdict.reason}"


def _judge(
    state: ModelState,
    rows: WindowRows,
    champion_H: F32,
    learned: Learned,
    config: UpdateConfig,
    history: Sequence[Mapping[str, Any]],
) -> tuple[ModelState, GateVerdict | None]:
    """The state with the evidence that it goes on with, and the verdict; none where there is no model to compare with, or where
    a person wants the window to be learned: then a model that is on hold stays so."""
    if not rows.judged:
        return state, None
    evidence = gathered_evidence(state, rows, champion_H, config.gate.max_rows)
    verdict = state.learner.processes.from_first(lambda: gate_verdict(evidence, rows, learned, config, history))
    return replace(state, evidence=evidence), verdict


def _learn(
    state: ModelState,
    rows: WindowRows,
    window: Window,
    config: UpdateConfig,
    spec: DatasetSpec,
    deadline: Deadline,
    progress: Progress,
) -> tuple[WindowRows, Learned, SamplingPlan | None]:
    """What was done, and all rows as they are now, those left out too: new ids may have rows of their own."""
    counted = np.setdiff1d(np.arange(rows.num_logged), rows.held_out, assume_unique=True)
    encoded, ids = admit_ids(state, rows.examples, rows.encoded, spec, hour=window.start, counted_rows=counted)
    rows, training = replace(rows, encoded=encoded, ids=ids), state.learner.config
    learner = state.learner
    fit = StepTimeFit(prior=learner.processes.from_first(lambda: earlier_step_time(read_history(config.model_dir))))
    refuse_too_small(config, deadline, fit.prior)
    policy = batch_policy(training, fit=fit, noise=learner.noise_scale)
    sampled = sample_window(config.sampling, rows.examples, rows.encoded, spec, seed=rows.seed)
    sampled = with_replay(state.replay, sampled, config.sampling, spec, state.ids, seed=rows.seed, hour=window.start)
    sampled = without_rows(sampled, rows.held_out)
    looks, before_R = Looks(), None
    if window.clicks and rows.event_keys is not None:
        came = rows.event_keys[is_correction(rows.examples.labels_R)]
        before_R, known = logits_of(learner, rows.encoded), state.late_clicks
        sampled, looks = known.looking_back(sampled, came, window.end, spec, state.ids, seed=rows.seed, hour=window.start)
    learned = learn(
        learner,
        sampled.window,
        seed=rows.seed,
        policy=policy,
        deadline=deadline,
        progress=progress,
        stratum_R=sampled.stratum_R,
        kept_R=sampled.kept_R,
        probe_rows=config.evaluation.probe_rows,
        mean_weight=sampled.mean_weight,
    )
    moved_R = None if before_R is None else logits_of(learner, rows.encoded) - before_R
    num_past = sampled.window.num_rows - rows.encoded.num_rows
    past = (f"{num_past:,} past rows were learned again",) if num_past else ()
    rows = replace(rows, notes=(*rows.notes, *past), learned=sampled, looks=looks, moved_R=moved_R)
    learned = learned.leaving(rows.held_out)
    return rows, replace(learned, step_time=fit.line if fit.measured else None), sampled.plan


def _checkpoint(
    state: ModelState,
    rows: WindowRows,
    window: Window,
    learned: Learned,
    plan: SamplingPlan | None,
    config: UpdateConfig,
    spec: DatasetSpec,
    checkpoint: "_Checkpoint",
) -> ModelState:
    """The state as saved; its rows are consumed, and if it is published it serves from now on."""
    reached, logged = np.flatnonzero(~learned.unreached_R[: rows.encoded.num_rows]), learned.first(rows.num_logged)
    before = state.moments or RunningMoments.nothing_seen(num_normalised(spec))
    shown = reached[~is_correction(rows.examples.labels_R[reached])]
    state = replace(state, moments=before.after(rows.encoded.raw_dense_NR[:, shown]))
    if config.sampling.replay_share and rows.learned is not None:
        replay = after_window(state.replay, rows.examples, rows.learned, state.memory, reached, seed=rows.seed)
        state = replace(state, replay=replay)
    state = replace(state, late_clicks=_late_clicks(state, rows, window, learned, reached, spec))
    remembered = state.memory.add(rows.examples.take(np.flatnonzero(~logged.unreached_R)), window.start)
    state = replace(state, notes=(*state.notes, *_memory_notes(remembered)))
    processes = state.learner.processes
    if processes.count > 1:
        processes.require_equal("counters, histories, ids or dense weights", fingerprint_of_copies(state))
    expected = as_saved(state, window, logged, config)
    if processes.is_first:
        note_down(config.model_dir, checkpoint.described(expected), checkpoint.bins)
    saved = save(state, window, logged, config, spec, seed=rows.seed, sampling=plan, published=checkpoint.published)
    if processes.is_first:
        freeze(config, spec, saved)
    return saved


def _late_clicks(
    state: ModelState, rows: WindowRows, window: Window, learned: Learned, reached: I64, spec: DatasetSpec
) -> LateClicks:
    """What is known of late clicks, once the window is."""
    if window.clicks is None or rows.event_keys is None or rows.moved_R is None:
        return state.late_clicks
    return state.late_clicks.after(
        rows.examples,
        rows.event_keys,
        window.clicks,
        rows.encoded,
        state.memory.histories(rows.examples),
        rows.looks,
        rows.moved_R,
        reached=reached,
        reached_D=~learned.unreached_R[rows.encoded.num_rows :],
        spec=spec,
    )


def _memory_notes(remembered: MemoryReport) -> Iterator[str]:
    if remembered.evicted_keys:
        parts = ", ".join(f"{keys:,} of {bank}" for bank, keys in remembered.evicted_of.items())
        yield f"{remembered.evicted_keys:,} keys of counters or histories gave way to new ones ({parts}); raise their capacity"
    if remembered.refused_rows:
        yield f"{remembered.refused_rows:,} rows found no room in a counter or history; raise its capacity"
    if remembered.capped_history_events:
        yield f"{remembered.capped_history_events:,} clicks of users with very many were left out of their histories"
