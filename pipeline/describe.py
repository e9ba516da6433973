"""What an update did, as an `UpdateReport`: every figure, and everything that was left out in words."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from data_schemas.dataset import DatasetSpec
from pipeline.config import UpdateConfig
from pipeline.data.window_rows import WindowRows
from pipeline.data.windows import Window, as_time
from pipeline.evaluation.alarms import Checked
from pipeline.evaluation.judge import Score, Scores
from pipeline.evaluation.metrics import Metrics
from pipeline.evaluation.steadiness import judge_steadiness
from pipeline.model_state import ModelState
from pipeline.outcome import UpdateReport
from pipeline.training.learn import Learned
from pipeline.training.plan_notes import plan_notes
from pipeline.training.probes import Probed
from sampling.plan import SamplingPlan


def describe(
    config: UpdateConfig,
    spec: DatasetSpec,
    window: Window,
    saved: ModelState,
    rows: WindowRows,
    learned: Learned,
    plan: SamplingPlan | None,
    scores: Scores,
    seconds: dict[str, float],
) -> UpdateReport:
    """The report of an update that learned its window and saved the model."""
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
        rows=rows.num_logged,
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
            *saved.learner.notes(),
            *saved.learner.sparse_step.notes(),
            *rows.notes,
            *plan_notes(config.training, learned, saved.learner, rows.encoded.num_rows),
            *_notes(window, logged, measured, rows),
            *(plan.notes() if plan else ()),
        ),
        ids=rows.ids,
        sampling=plan,
        rows_thinned=logged.thinned_rows,
        rows_held_out=_held_out(rows),
        clicks_known_share=rows.clicks_known_share,
        clicks_corrected=window.clicks.num_corrections if window.clicks else 0,
        fixed_seconds=learned.step_time.fixed_seconds if learned.step_time else None,
        row_seconds=learned.step_time.row_seconds if learned.step_time else None,
        noise_scale=saved.learner.noise_scale.last,
        waiting_share=learned.waiting_share,
    )


def as_rejected(report: UpdateReport, state: ModelState) -> UpdateReport:
    """The report of an update whose model the gate turned away: no row of it is part of a model."""
    version = state.serving if state.serving is not None else state.version
    notes = tuple(note.removesuffix(_LEARNED_LATER) for note in report.notes)
    return replace(report, outcome="rejected", version=version, rows_learned=0, rows_pending=0, rows_held_out=0, notes=notes)


def describe_suspicious(
    config: UpdateConfig, spec: DatasetSpec, window: Window, state: ModelState, seen: Checked, seconds: dict[str, float]
) -> UpdateReport:
    """The report of an update that learned nothing, because of an alarm."""
    return UpdateReport(
        dataset=spec.name,
        model_name=config.model_name,
        outcome="suspicious",
        version=state.serving if state.serving is not None else state.version,
        log_version=window.log_version,
        window_start=as_time(window.start),
        window_end=as_time(window.end),
        rows=window.num_rows,
        late_rows=window.late_rows,
        rows_learned=0,
        rows_pending=0,
        batch_size=0,
        precision=state.learner.precision,
        before=None,
        after=None,
        frozen=None,
        evaluated_rows=0,
        seconds=dict(seconds),
        budget_seconds=config.budget.seconds,
        plan=(),
        loss_curve=(),
        skipped_steps=0,
        git_commit=_git_commit(),
        notes=tuple(alarm.sentence for alarm in seen.alarms),
        profile=seen.profile,
        alarms=seen.alarms,
    )


def with_steadiness(
    report: UpdateReport,
    window: Window,
    learned: Learned,
    before: Score | None,
    after: Score | None,
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


_LEARNED_LATER = "; they are learned with the next window"


def _held_out(rows: WindowRows) -> int:
    return int((rows.held_out < rows.num_logged).sum())


def _notes(window: Window, learned: Learned, measured: Metrics | None, rows: WindowRows) -> Iterator[str]:
    """Everything that was not done as a reader would take for granted."""
    held_out = _held_out(rows)
    if held_out:
        yield f"{held_out:,} rows were held out to judge the model by{_LEARNED_LATER}"
    unreached = int(learned.unreached_R.sum()) - held_out
    if unreached:
        yield f"out of time: {unreached:,} of {rows.num_logged:,} rows wait for the next update"
    capped = sum(piece.num_rows for piece in window.left if piece.file.hour < window.end)
    if capped and window.released:
        yield f"{capped:,} rows wait for the next update: a window that was released is learned by itself"
    elif capped:
        yield f"{capped:,} rows over window.max_rows wait for the next update"
    if window.late_rows:
        yield f"{window.late_rows:,} rows came late, for hours before this window"
    if window.removed_rows:
        yield f"{window.removed_rows:,} rows that were waiting have left the click log: their hour was replaced or outlived it"
    if learned.skipped_steps:
        yield f"{learned.skipped_steps} steps over {learned.skipped_rows:,} rows were skipped, their loss was not finite"
    if measured and measured.rows < len(rows.evaluated):
        yield f"evaluated on a random {measured.rows:,} of {len(rows.evaluated):,} rows"
    if measured and measured.auc is None:
        yield f"all {measured.rows:,} evaluated rows are of one class: there is no AUC"


def one_line(report: UpdateReport) -> str:
    """For the log: what was learned, and what the gate said of it."""
    auc, gate = report.before.auc if report.before else None, ""
    if report.gate:
        gate = f", gate: {report.gate.decision}" + (f" ({report.gate.reason})" if report.gate.decision != "publish" else "")
    if report.serving is not None:
        gate += f", version {report.serving} goes on serving"
    return (
        f"{report.window_start:%Y-%m-%dT%H}  {report.rows_learned:,} of {report.rows:,} rows learned, "
        f"version {report.version}, AUC before learning {'-' if auc is None else f'{auc:.4f}'}, "
        f"{report.total_seconds:.1f} of {report.budget_seconds:.0f} s{gate}"
    )


@cache
def _git_commit() -> str:
    """Of the code that runs; empty outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
