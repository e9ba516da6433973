"""The end of an update: its place in the history, in MLflow and in the registry, even if it is killed on the way.

    <model_dir>/unfinished.json     the report of an update whose end is not proven

Enters: a report, before what it tells is done. Leaves: a note of it, which goes once all is done. An update that finds a note
looks what became of it: if the model was saved, or the window held aside, it does what is left; if not, the rows wait as
before, and the note goes.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CorruptCheckpoint
from data_schemas.examples import Examples
from pipeline.config import UpdateConfig
from pipeline.data.held import held_windows
from pipeline.data.lake import ClickLog
from pipeline.data.window_rows import sample_of
from pipeline.data.windows import as_hour
from pipeline.evaluation.judge import frozen_folder
from pipeline.evaluation.metrics import CalibrationBin
from pipeline.model_state import ModelState, restore_or_create, restore_version
from pipeline.outcome import LEARNED, UpdateReport
from pipeline.passwords import without_passwords
from pipeline.publishing.checkpoint import (
    current_version,
    forget_unpublished,
    head_version,
    read_manifest,
    settle,
    versions,
    write_durably,
)
from pipeline.publishing.predictor import export_predictor, predictor_of
from pipeline.publishing.report import append_history, as_plain
from pipeline.training.processes import Processes

log = logging.getLogger(__name__)

UNFINISHED = "unfinished.json"
INTERRUPTED = "the process ended before this update was published; the next one published it"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What goes with a registered model, and on its plots."""

    examples: Examples
    frame: pd.DataFrame
    """The same rows, raw."""
    bins: tuple[CalibrationBin, ...] = ()
    """Predicted against seen click rates before learning."""


@dataclass(frozen=True, kw_only=True)
class _Note:
    report: UpdateReport
    bins: tuple[CalibrationBin, ...]


_NOTE = TypeAdapter(_Note)


def note_down(model_dir: Path, report: UpdateReport, bins: Sequence[CalibrationBin] = ()) -> None:
    """Writes down what is about to be done; it is on disk when this returns.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = model_dir / UNFINISHED
    staged = path.with_suffix(".tmp")
    content = {"report": as_plain(report), "bins": as_plain(tuple(bins))}
    write_durably(staged, json.dumps(content).encode())
    staged.replace(path)


def forget_note(model_dir: Path) -> None:
    """All of it is done."""
    (model_dir / UNFINISHED).unlink(missing_ok=True)


def end_update(
    config: UpdateConfig,
    spec: DatasetSpec,
    saved: ModelState,
    report: UpdateReport,
    shown: Shown | None,
    publish_stage: Callable[[Callable[[], tuple[str, ...]]], tuple[str, ...]],
    seconds: Callable[[], dict[str, float]],
) -> UpdateReport:
    """Writes the report, publishes the model, and forgets the note.

    Args:
        config: settings.
        spec: of the model.
        saved: the model.
        report: of the update that saved it.
        shown: None where there is no row to show.
        publish_stage: runs the work that reaches out.
        seconds: of the stages so far.
    """
    append_history(config.model_dir, report)
    notes = publish_stage(lambda: _publish(config, spec, saved, report, shown))
    report = replace(report, seconds=seconds(), notes=(*report.notes, *notes))
    append_history(config.model_dir, report)
    forget_note(config.model_dir)
    return report


def end_interrupted(config: UpdateConfig, spec: DatasetSpec) -> UpdateReport | None:
    """Ends what an update before this one was killed in; its report, or None where nothing was left to do. In one process.

    Raises:
        TidemarkError: the model cannot be restored.
    """
    folder = config.model_dir
    note = _read(folder)
    if note is None:
        return None
    report = replace(note.report, notes=(*note.report.notes, INTERRUPTED))
    ended = _end_held_aside(config, report) if report.outcome not in LEARNED else _end_saved(config, spec, report, note.bins)
    forget_note(folder)
    if ended:
        log.warning("%s: version %d", INTERRUPTED, ended.version)
    return ended


def freeze(config: UpdateConfig, spec: DatasetSpec, saved: ModelState) -> None:
    """Keeps the model as it is now to measure later ones by, where it is the one that the settings name, or the first after it
    that serves: what was not proven, and may be forgotten, is no measure."""
    folder, after = frozen_folder(config), config.evaluation.frozen_after_updates
    if not after or saved.version < after or folder.is_dir() or saved.version == head_version(config.model_dir):
        return
    staged = folder.with_suffix(".tmp")
    if staged.is_dir():
        shutil.rmtree(staged)
    export_predictor(_whole(saved, config, spec), spec, config.model, staged)
    staged.rename(folder)


def _whole(saved: ModelState, config: UpdateConfig, spec: DatasetSpec) -> ModelState:
    """The saved model with all of its tables in this process."""
    return saved if saved.learner.processes.count == 1 else restore_version(config, spec, saved.version)


def _read(folder: Path) -> _Note | None:
    path = folder / UNFINISHED
    try:
        content = json.loads(path.read_bytes())
        return _NOTE.validate_python(content)
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        log.warning("%s cannot be read and is forgotten: %s", path, error)
        forget_note(folder)
        return None


def _end_held_aside(config: UpdateConfig, report: UpdateReport) -> UpdateReport | None:
    what = (as_hour(report.window_start), as_hour(report.window_end), report.log_version, "held")
    windows = held_windows(config.model_dir)
    if what not in [(window.start, window.end, window.log_version, window.status) for window in windows]:
        return None
    if report.outcome == "rejected":
        forget_unpublished(config.model_dir)
    append_history(config.model_dir, report)
    return replace(report, notes=(*report.notes, *track(config, report)))


def _is_saved(config: UpdateConfig, report: UpdateReport) -> bool:
    """Whether the version of the report is there, whole, and not behind the one that serves."""
    folder = config.model_dir
    there = report.version in (versions(folder) if report.outcome == "published" else [head_version(folder)])
    if not there or report.version < (current_version(folder) or 0):
        return False
    try:
        found: bool = read_manifest(folder, report.version).window_end == as_hour(report.window_end)
    except CorruptCheckpoint:
        return False
    return found


def _end_saved(
    config: UpdateConfig, spec: DatasetSpec, report: UpdateReport, bins: tuple[CalibrationBin, ...]
) -> UpdateReport | None:
    if not _is_saved(config, report):
        return None
    settle(config.model_dir, report.version, published=report.outcome == "published", keep=config.keep_checkpoints)
    saved = restore_or_create(config, spec, Processes())
    freeze(config, spec, saved)
    click_log = ClickLog.open_or_create(config.log_path, spec)
    examples, frame = sample_of(click_log, spec, as_hour(report.window_start), as_hour(report.window_end))
    shown = Shown(examples=examples, frame=frame, bins=bins) if len(frame) else None
    return end_update(config, spec, saved, report, shown, lambda work: work(), lambda: dict(report.seconds))


def track(config: UpdateConfig, report: UpdateReport) -> tuple[str, ...]:
    """The run alone, of an update that made no model."""
    if not config.tracking.enabled:
        return ()
    from pipeline.publishing.publish import track_only  # imports MLflow, which takes a second

    return track_only(config, report)


def _publish(
    config: UpdateConfig, spec: DatasetSpec, saved: ModelState, report: UpdateReport, shown: Shown | None
) -> tuple[str, ...]:
    """Puts the report, and the model, where people look; what could not be reached is noted and sent later."""
    if not config.tracking.enabled:
        return ()
    if shown is None:
        return (*track(config, report), "no row of the window is in the click log any more: the model was not registered")
    from pipeline.publishing.publish import publish_update  # imports MLflow, which takes a second

    try:
        saved = _whole(saved, config, spec)
        with saved.learner.averaged():
            example_probabilities = predictor_of(saved, spec).predict_examples(shown.examples)
        return publish_update(
            config,
            spec,
            saved,
            report,
            example=shown.frame,
            example_probabilities=example_probabilities,
            bins=shown.bins,
        )
    except Exception as error:  # the checkpoint serves already: whatever fails here must not make the update look failed
        log.warning("publishing failed", exc_info=True)
        reason = f"{type(error).__name__}: {without_passwords(str(error))}"
        return (f"publishing failed ({reason}); the checkpoint serves, MLflow shows the update before",)
