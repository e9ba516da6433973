"""One update, from the rows that wait in the click log to the published model: the whole story on one screen.

window -> evaluate before learning -> learn until done or out of time -> evaluate -> publish -> report
"""

import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import F32, I64, Examples
from models.id_table import IdFigures
from models.memory import MemoryReport
from pipeline.config import UpdateConfig
from pipeline.data.encode import EncodedWindow, encode, num_normalised
from pipeline.data.lake import ClickLog, RowRange
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.negatives import require_sampler, with_negatives
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import Window, as_time, next_window, read_window
from pipeline.evaluation.metrics import CalibrationBin, Metrics, calibration_bins, measure
from pipeline.evaluation.score import probabilities
from pipeline.evaluation.steadiness import judge_steadiness
from pipeline.lock import alone
from pipeline.model_state import ModelState, admit_ids, restore_or_create, save
from pipeline.outcome import UpdateReport
from pipeline.publishing.predictor import export_predictor, load_predictor, predictor_of
from pipeline.publishing.report import append_history, read_history
from pipeline.training.batch_size import batch_policy
from pipeline.training.budget import Clock, Deadline, earlier_step_time, refuse_too_small, reserve_seconds
from pipeline.training.learn import Learned, Progress, learn
from pipeline.training.plan_notes import plan_notes
from pipeline.training.probes import Probed
from pipeline.training.replay import after_window, with_replay
from pipeline.training.sampling import SampledWindow, sample_window
from pipeline.training.step_time import StepTimeFit
from sampling.plan import SamplingPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

EVALUATION_SHARE = 0.2
"""Share of the budget after which evaluating stops with the rows that it has."""
SAMPLE_ROWS = 5
"""Raw rows that go with the registered model."""
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
    stages = _Stages(stage, clock)
    with alone(config.model_dir):
        history = read_history(config.model_dir)
        state = stages.run("restore", lambda: restore_or_create(config, spec))
        click_log, window = stages.run("find window", lambda: _find_window(config, spec, state, now or datetime.now(UTC)))
        if window is None:
            return None
        deadline = _deadline(config, stages, history)
        rows = stages.run("load", lambda: _load(click_log, window, state, spec, config))
        before, frozen = stages.run("evaluate before learning", lambda: _evaluate_all(state, rows, config, spec, deadline))
        rows, learned, plan = stages.run("learn", lambda: _learn(state, rows, window, config, spec, deadline, progress))
        after = stages.run("evaluate after learning", lambda: _evaluate(state, rows, config, deadline))
        saved = stages.run("checkpoint", lambda: _checkpoint(state, rows, window, learned, plan, config, spec))
        report = _report(config, spec, window, saved, rows, learned, plan, _Scores(before, after, frozen), stages.seconds)
        report = _with_steadiness(report, window, learned, before, after, history)
        append_history(config.model_dir, report)
        note = stages.run("publish", lambda: _publish(config, spec, saved, rows, report, before))
        report = replace(report, seconds=dict(stages.seconds), notes=(*report.notes, *note))
        append_history(config.model_dir, report)
        log.info("%s", _one_line(report))
        return report


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A window's rows in both forms, and those that are evaluated."""

    examples: Examples
    """Those of the click log, then negatives that were drawn, where the log has none."""
    encoded: EncodedWindow
    num_logged: int
    """Rows of the click log: what is counted, remembered and consumed."""
    judged_weights_R: F32
    """Of the rows where they are evaluated."""
    evaluated: I64
    """Rows that are new to the model, in a random order, so that any prefix is a uniform sample of them.

    Rows that an earlier window did not reach are left out: counters know what happened around them by now.
    """
    seed: tuple[int, ...]
    sample: pd.DataFrame
    """The first rows as they stand in the click log."""
    ids: Mapping[str, IdFigures] = field(default_factory=dict)
    """What the window did to admitted ids, once it was counted."""
    notes: tuple[str, ...] = ()
    """What was drawn."""
    learned: SampledWindow | None = None
    """As the rows were learned."""


@dataclass(frozen=True)
class _Score:
    """How probabilities compare with what happened."""

    metrics: Metrics
    bins: tuple[CalibrationBin, ...]
    probabilities: F32


@dataclass(frozen=True)
class _Scores:
    before: _Score | None
    after: _Score | None
    frozen: _Score | None


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
    return click_log, next_window(click_log, state.cursor, config.window, now)


def _load(click_log: ClickLog, window: Window, state: ModelState, spec: DatasetSpec, config: UpdateConfig) -> _Rows:
    """The window's rows; numbers are normalised by what was seen before it, or by itself if nothing was."""
    table = read_window(click_log, window, columns_to_read(spec))
    seed = (state.learner.config.seed, window.end)

    def encoded(examples: Examples) -> EncodedWindow:
        return encode(examples, spec, state.memory, state.moments, hour=window.start, ids=state.ids)

    drawn = with_negatives(
        to_examples(table, spec),
        spec,
        config.sampling,
        seed=[*seed, 2],
        scores=lambda candidates: _scores(state, encoded(candidates)),
        before=_trailing_rows(click_log, window, spec, config.sampling.negatives_trailing_hours),
    )
    examples = drawn.examples
    new = np.flatnonzero(examples.hour_R >= window.start)
    return _Rows(
        examples=examples,
        encoded=replace(encoded(examples), logit_shifts_R=drawn.shift_R),
        num_logged=drawn.num_logged,
        judged_weights_R=examples.weights_R if drawn.judged_weights_R is None else drawn.judged_weights_R,
        evaluated=np.random.default_rng([*seed, 1]).permutation(new),
        seed=seed,
        sample=_raw_sample(table),
        notes=drawn.notes,
    )


def _trailing_rows(click_log: ClickLog, window: Window, spec: DatasetSpec, trailing_hours: int) -> Examples | None:
    """Rows of the hours before the window, where the settings let negatives come from them."""
    if not trailing_hours:
        return None
    files = [file for file in click_log.files(window.log_version) if window.start - trailing_hours <= file.hour < window.start]
    if not files:
        return None
    ranges = [RowRange(file=file, start=0, stop=file.num_rows) for file in files]
    return to_examples(click_log.read(ranges, columns_to_read(spec)), spec)


def _scores(state: ModelState, encoded: EncodedWindow) -> F32:
    learner = state.learner
    return probabilities(learner.model, learner.dense_weights(averaged=True), encoded, device=learner.device)


def _raw_sample(table: pa.Table) -> pd.DataFrame:
    """A few rows as a caller of the published model would send them."""
    columns = [name for name in table.column_names if name != "label"]
    frame: pd.DataFrame = table.slice(0, SAMPLE_ROWS).select(columns).to_pandas(integer_object_nulls=True)
    frame["event_time"] = frame["event_time"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    return frame.astype({name: "object" for name in columns if isinstance(frame[name].dtype, pd.CategoricalDtype)})


def _evaluate_all(
    state: ModelState, rows: _Rows, config: UpdateConfig, spec: DatasetSpec, deadline: Deadline
) -> tuple[_Score | None, _Score | None]:
    before = _evaluate(state, rows, config, deadline) if state.version > 0 else None
    folder = _frozen_folder(config)
    if before is None or not folder.is_dir() or deadline.learning_seconds_left() <= 0:
        return before, None
    frozen = load_predictor(folder)
    chosen = rows.evaluated[: before.metrics.rows]
    examples = _columns_of(frozen.spec, rows.examples.take(chosen), spec)
    return before, _measure(rows, chosen, frozen.predict_examples(examples))


def _columns_of(old: DatasetSpec, examples: Examples, spec: DatasetSpec) -> Examples:
    """The examples as a model of an older spec, which may have fewer numbers, takes them."""
    numbers = [number.name for number in spec.numeric]
    return replace(examples, numeric_NR=examples.numeric_NR[[numbers.index(number.name) for number in old.numeric]])


def _evaluate(state: ModelState, rows: _Rows, config: UpdateConfig, deadline: Deadline) -> _Score | None:
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
        )
    return _measure(rows, chosen[: len(scored)], scored)


def _measure(rows: _Rows, chosen: I64, scored: F32) -> _Score | None:
    if not len(chosen):
        return None
    labels, users = rows.encoded.labels_R[chosen], rows.encoded.user_R[chosen]
    weights = rows.judged_weights_R[chosen]
    return _Score(measure(labels, scored, users, weights), calibration_bins(labels, scored, weights), scored)


def _learn(
    state: ModelState,
    rows: _Rows,
    window: Window,
    config: UpdateConfig,
    spec: DatasetSpec,
    deadline: Deadline,
    progress: Progress,
) -> tuple[_Rows, Learned, SamplingPlan | None]:
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
    rows: _Rows,
    window: Window,
    learned: Learned,
    plan: SamplingPlan | None,
    config: UpdateConfig,
    spec: DatasetSpec,
) -> ModelState:
    """The state as saved; from now on it serves, and its rows are consumed."""
    reached, logged = np.flatnonzero(~learned.unreached_R[: rows.encoded.num_rows]), learned.first(rows.num_logged)
    before = state.moments or RunningMoments.nothing_seen(num_normalised(spec))
    state = replace(state, moments=before.after(rows.encoded.raw_dense_NR[:, reached]))
    if config.sampling.replay_share and rows.learned is not None:
        replay = after_window(state.replay, rows.examples, rows.learned, state.memory, reached, seed=rows.seed)
        state = replace(state, replay=replay)
    remembered = state.memory.add(rows.examples.take(np.flatnonzero(~logged.unreached_R)), window.start)
    state = replace(state, notes=(*state.notes, *_memory_notes(remembered)))
    saved = save(state, window, logged, config, spec, seed=rows.seed, sampling=plan)
    folder = _frozen_folder(config)
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
    rows: _Rows,
    report: UpdateReport,
    before: _Score | None,
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


def _report(
    config: UpdateConfig,
    spec: DatasetSpec,
    window: Window,
    saved: ModelState,
    rows: _Rows,
    learned: Learned,
    plan: SamplingPlan | None,
    scores: _Scores,
    seconds: dict[str, float],
) -> UpdateReport:
    before, after, frozen = (score.metrics if score else None for score in (scores.before, scores.after, scores.frozen))
    measured, logged = before or after, learned.first(rows.num_logged)
    return UpdateReport(
        dataset=spec.name,
        model_name=config.model_name,
        outcome="published",
        version=saved.version,
        log_version=window.log_version,
        window_start=as_time(window.start),
        window_end=as_time(window.end),
        rows=window.num_rows,
        late_rows=window.late_rows,
        rows_learned=logged.rows,
        rows_pending=sum(piece.num_rows for piece in saved.cursor.pending if piece.file.hour < window.end),
        batch_size=learned.last_batch_size,
        precision=saved.learner.precision,
        before=before,
        after=after,
        frozen=frozen,
        evaluated_rows=measured.rows if measured else 0,
        seconds=dict(seconds),
        budget_seconds=config.budget.seconds,
        plan=learned.plan,
        loss_curve=learned.loss_curve,
        skipped_steps=learned.skipped_steps,
        git_commit=_git_commit(),
        notes=(
            *saved.notes,
            *saved.learner.sparse_step.notes(),
            *rows.notes,
            *plan_notes(config.training, learned, saved.learner, rows.encoded.num_rows),
            *_notes(window, logged, measured, rows.encoded.num_rows),
            *(plan.notes() if plan else ()),
        ),
        ids=rows.ids,
        sampling=plan,
        rows_thinned=logged.thinned_rows,
        fixed_seconds=learned.step_time.fixed_seconds if learned.step_time else None,
        row_seconds=learned.step_time.row_seconds if learned.step_time else None,
        noise_scale=saved.learner.noise_scale.last,
    )


def _with_steadiness(
    report: UpdateReport,
    window: Window,
    learned: Learned,
    before: _Score | None,
    after: _Score | None,
    history: Sequence[Mapping[str, Any]],
) -> UpdateReport:
    probed = learned.probed or Probed(steps=(), log_losses=(), gradient_norms=())
    figures, diagnosis = judge_steadiness(
        probed.steps,
        probed.log_losses,
        probed.gradient_norms,
        hour=window.start,
        before=before.metrics if before else None,
        probabilities=(before.probabilities, after.probabilities) if before and after else None,
        history=history,
    )
    return replace(report, stability=figures, diagnosis=diagnosis)


def _notes(window: Window, learned: Learned, measured: Metrics | None, num_rows: int) -> Iterator[str]:
    """Everything that was not done as a reader would take for granted."""
    unreached = int(learned.unreached_R.sum())
    if unreached:
        yield f"out of time: {unreached:,} of {window.num_rows:,} rows wait for the next update"
    capped = sum(piece.num_rows for piece in window.left if piece.file.hour < window.end)
    if capped:
        yield f"{capped:,} rows over window.max_rows wait for the next update"
    if window.late_rows:
        yield f"{window.late_rows:,} rows came late, for hours before this window"
    if learned.skipped_steps:
        yield f"{learned.skipped_steps} steps over {learned.skipped_rows:,} rows were skipped, their loss was not finite"
    if measured and measured.rows < num_rows:
        yield f"evaluated on a random {measured.rows:,} of {num_rows:,} rows"
    if measured and measured.auc is None:
        yield f"all {measured.rows:,} evaluated rows are of one class: there is no AUC"


def _one_line(report: UpdateReport) -> str:
    auc = report.before.auc if report.before else None
    return (
        f"{report.window_start:%Y-%m-%dT%H}  {report.rows_learned:,} of {report.rows:,} rows learned, "
        f"version {report.version}, AUC before learning {'-' if auc is None else f'{auc:.4f}'}, "
        f"{report.total_seconds:.1f} of {report.budget_seconds:.0f} s"
    )


def _frozen_folder(config: UpdateConfig) -> Path:
    return config.model_dir / "frozen"


@cache
def _git_commit() -> str:
    """Of the code that runs; empty outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
