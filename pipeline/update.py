"""One update, from the rows that wait in the click log to the published model: the whole story on one screen.

window -> evaluate before learning -> learn until done or out of time -> evaluate -> publish -> report
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import numpy as np

from data_schemas.dataset import DatasetSpec, load_spec
from models.memory import MemoryReport
from pipeline.config import UpdateConfig
from pipeline.data.clicks import is_correction, join_clicks, require_correctable
from pipeline.data.encode import num_normalised
from pipeline.data.held import held_windows, hold_aside
from pipeline.data.lake import ClickLog
from pipeline.data.negatives import require_sampler
from pipeline.data.normalise import RunningMoments
from pipeline.data.window_rows import WindowRows, load_rows
from pipeline.data.windows import Window, next_window
from pipeline.describe import describe, describe_suspicious, one_line, with_steadiness
from pipeline.evaluation.alarms import Checked, alarms_of, past_of
from pipeline.evaluation.judge import Score, Scores, evaluate, evaluate_before, frozen_folder
from pipeline.evaluation.profile import profile_of
from pipeline.lock import alone
from pipeline.model_state import ModelState, admit_ids, restore_or_create, save
from pipeline.outcome import UpdateReport
from pipeline.publishing.predictor import export_predictor, predictor_of
from pipeline.publishing.report import append_history, read_history, verdict
from pipeline.training.batch_size import batch_policy
from pipeline.training.budget import Clock, Deadline, earlier_step_time, refuse_too_small, reserve_seconds
from pipeline.training.learn import Learned, Progress, learn
from pipeline.training.replay import after_window, with_replay
from pipeline.training.sampling import sample_window
from pipeline.training.step_time import StepTimeFit
from sampling.plan import SamplingPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

AFTER_LEARNING = ("evaluate after learning", "checkpoint", "publish")
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
) -> UpdateReport | None:
    """Learns the next closed window and publishes the model; None where no window waits.

    The model before stays current until the new one is written whole, and the rows stay waiting until then.

    Raises:
        TidemarkError: what went wrong and the way out; the model before still serves.
    """
    spec = load_spec(config.dataset)
    require_sampler(spec, config.sampling)
    require_correctable(spec, config.sampling)
    stages, now = _Stages(stage, clock), now or datetime.now(UTC)
    with alone(config.model_dir):
        history = [record for record in read_history(config.model_dir) if record["outcome"] == "published"]
        state = stages.run("restore", lambda: restore_or_create(config, spec))
        click_log, window = stages.run("find window", lambda: _find_window(config, spec, state, now))
        if window is None:
            return None
        deadline = _deadline(config, stages, history)
        rows = stages.run("load", lambda: load_rows(click_log, window, state, spec, config))
        seen = stages.run("check the data", lambda: _check(state, rows, window, config, spec, history))
        if seen.alarms and config.alarms.action == "hold":
            return stages.run("hold aside", lambda: _hold(state, window, seen, config, spec, stages.seconds, now))
        before, frozen = stages.run("evaluate before learning", lambda: evaluate_before(state, rows, config, spec, deadline))
        rows, learned, plan = stages.run("learn", lambda: _learn(state, rows, window, config, spec, deadline, progress))
        after = stages.run("evaluate after learning", lambda: evaluate(state, rows, config, deadline))
        saved = stages.run("checkpoint", lambda: _checkpoint(state, rows, window, learned, plan, config, spec))
        report = describe(config, spec, window, saved, rows, learned, plan, Scores(before, after, frozen), stages.seconds)
        report = with_steadiness(report, window, learned, before, after, history)
        report = replace(report, profile=seen.profile, alarms=seen.alarms, notes=(*report.notes, *_warnings(seen)))
        append_history(config.model_dir, report)
        note = stages.run("publish", lambda: _publish(config, spec, saved, rows, report, before))
        report = replace(report, seconds=dict(stages.seconds), notes=(*report.notes, *note))
        append_history(config.model_dir, report)
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


def _deadline(config: UpdateConfig, stages: _Stages, history: list[dict[str, object]]) -> Deadline:
    tails = [sum(record["seconds"].get(name, 0.0) for name in AFTER_LEARNING) for record in history]  # type: ignore[attr-defined]
    budget = config.budget
    reserve = reserve_seconds(tails, budget_seconds=budget.seconds, min_reserve_seconds=budget.min_reserve_seconds)
    return Deadline(started=stages.started, budget_seconds=budget.seconds, reserve_seconds=reserve, clock=stages.clock)


def _find_window(config: UpdateConfig, spec: DatasetSpec, state: ModelState, now: datetime) -> tuple[ClickLog, Window | None]:
    click_log = ClickLog.open_or_create(config.log_path, spec)
    window = next_window(click_log, state.cursor, config.window, now, held_windows(config.model_dir))
    return click_log, window and join_clicks(click_log, window, spec)


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
    profile, own = profile_of(logged, spec, state.memory), config.alarms
    if own.action == "off" or window.released:
        return Checked(profile=profile, alarms=())
    alarms = alarms_of(
        profile,
        window.start,
        past_of(history),
        deviations=own.deviations,
        burst_factor=own.burst_factor,
        min_windows=own.min_windows,
    )
    return Checked(profile=profile, alarms=alarms)


def _hold(
    state: ModelState,
    window: Window,
    seen: Checked,
    config: UpdateConfig,
    spec: DatasetSpec,
    seconds: dict[str, float],
    now: datetime,
) -> UpdateReport:
    """Holds the window aside; nothing of it is learned or counted, and the model and what it has consumed stay as they are."""
    held = hold_aside(
        config.model_dir,
        start=window.start,
        end=window.end,
        log_version=window.log_version,
        pieces=window.pieces,
        kind="alarm",
        reason="; ".join(alarm.sentence for alarm in seen.alarms),
        now=now,
    )
    report = describe_suspicious(config, spec, window, state, held.id, seen, seconds)
    append_history(config.model_dir, report)
    if config.tracking.enabled:
        from pipeline.publishing.publish import track_only  # imports MLflow, which takes a second

        report = replace(report, notes=(*report.notes, *track_only(config, report)))
    log.warning("%s", verdict(report))
    return report


def _warnings(seen: Checked) -> Iterator[str]:
    return (f"out of line, and learned all the same: {alarm.sentence}" for alarm in seen.alarms)


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
    encoded, ids = admit_ids(state, rows.examples, rows.encoded, spec, hour=window.start, num_counted=rows.num_logged)
    rows, training = replace(rows, encoded=encoded, ids=ids), config.training
    learner, fit = state.learner, StepTimeFit(prior=earlier_step_time(read_history(config.model_dir)))
    refuse_too_small(config, deadline, fit.prior)
    policy = batch_policy(training, fit=fit, noise_scale=lambda: learner.noise_scale.last)
    sampled = sample_window(config.sampling, rows.examples, rows.encoded, spec, seed=rows.seed)
    sampled = with_replay(state.replay, sampled, config.sampling, spec, state.ids, seed=rows.seed, hour=window.start)
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
    )
    num_past = sampled.window.num_rows - rows.encoded.num_rows
    past = (f"{num_past:,} past rows were learned again",) if num_past else ()
    rows = replace(rows, notes=(*rows.notes, *past), learned=sampled)
    return rows, replace(learned, step_time=fit.line if fit.measured else None), sampled.plan


def _checkpoint(
    state: ModelState,
    rows: WindowRows,
    window: Window,
    learned: Learned,
    plan: SamplingPlan | None,
    config: UpdateConfig,
    spec: DatasetSpec,
) -> ModelState:
    """The state as saved; from now on it serves, and its rows are consumed."""
    reached, logged = np.flatnonzero(~learned.unreached_R[: rows.encoded.num_rows]), learned.first(rows.num_logged)
    before = state.moments or RunningMoments.nothing_seen(num_normalised(spec))
    shown = reached[~is_correction(rows.encoded.labels_R[reached])]
    state = replace(state, moments=before.after(rows.encoded.raw_dense_NR[:, shown]))
    if config.sampling.replay_share and rows.learned is not None:
        replay = after_window(state.replay, rows.examples, rows.learned, state.memory, reached, seed=rows.seed)
        state = replace(state, replay=replay)
    remembered = state.memory.add(rows.examples.take(np.flatnonzero(~logged.unreached_R)), window.start)
    state = replace(state, notes=(*state.notes, *_memory_notes(remembered)))
    saved = save(state, window, logged, config, spec, seed=rows.seed, sampling=plan)
    folder = frozen_folder(config)
    frozen_after = config.evaluation.frozen_after_updates
    if frozen_after and saved.version >= frozen_after and not folder.is_dir():
        staged = folder.with_suffix(".tmp")
        shutil.rmtree(staged, ignore_errors=True)
        export_predictor(saved, spec, config.model, staged)
        staged.rename(folder)
    return saved


def _memory_notes(remembered: MemoryReport) -> Iterator[str]:
    if remembered.evicted_keys:
        yield f"{remembered.evicted_keys:,} keys of counters or histories gave way to new ones; raise their capacity"
    if remembered.refused_rows:
        yield f"{remembered.refused_rows:,} rows found no room in a counter or history; raise its capacity"
    if remembered.capped_history_events:
        yield f"{remembered.capped_history_events:,} clicks of users with very many were left out of their histories"


def _publish(
    config: UpdateConfig,
    spec: DatasetSpec,
    saved: ModelState,
    rows: WindowRows,
    report: UpdateReport,
    before: Score | None,
) -> tuple[str, ...]:
    """Puts the report, and the model, where people look; what could not be reached is noted and sent later."""
    from pipeline.publishing.publish import publish_update  # imports MLflow, which takes a second

    if not config.tracking.enabled:
        return ()
    examples = rows.examples.take(np.arange(len(rows.sample)))
    try:
        with saved.learner.averaged():
            example_probabilities = predictor_of(saved, spec).predict_examples(examples)
        return publish_update(
            config,
            spec,
            saved,
            report,
            example=rows.sample,
            example_probabilities=example_probabilities,
            bins=before.bins if before else (),
        )
    except Exception as error:  # the checkpoint serves already: whatever fails here must not make the update look failed
        log.warning("publishing failed", exc_info=True)
        return (f"publishing failed ({type(error).__name__}: {error}); the checkpoint serves, MLflow shows the update before",)
