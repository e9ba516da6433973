"""Putting an update where people look: its run, its report and its model in MLflow.

Enters: the saved state and the report. Leaves: notes on what could not be reached; an update never fails for its tracking.
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import TidemarkError, TrackingUnavailable
from data_schemas.examples import F32
from pipeline.config import UpdateConfig
from pipeline.data.lake import ClickLog
from pipeline.data.window_rows import sample_of
from pipeline.data.windows import as_hour
from pipeline.evaluation.metrics import CalibrationBin
from pipeline.model_state import ModelState, restore_version
from pipeline.outcome import UpdateReport
from pipeline.publishing.checkpoint import head_version
from pipeline.publishing.plots import update_plots
from pipeline.publishing.predictor import export_predictor, predictor_of
from pipeline.publishing.registry import champion_checkpoint, promote_checkpoint, register_model, withdraw_challenger
from pipeline.publishing.report import as_markdown, read_history
from pipeline.publishing.tracking import Tracker, tables_of

log = logging.getLogger(__name__)

_STAYS = "if the registry names a challenger, it does so until the next update that reaches it: that model was rejected"


def track_only(config: UpdateConfig, report: UpdateReport) -> tuple[str, ...]:
    """Writes the run of an update that made no model, and takes the alias of a challenger that was forgotten away; notes on
    what could not be reached."""
    tracker = Tracker(config)
    run = tracker.log_update(report, texts={"report.md": as_markdown(report)})
    return (*tracker.notes, *_without_forgotten_challenger(config, report, reached=run is not None))


def publish_update(
    config: UpdateConfig,
    spec: DatasetSpec,
    saved: ModelState,
    report: UpdateReport,
    *,
    example: pd.DataFrame,
    example_probabilities: F32,
    bins: tuple[CalibrationBin, ...],
) -> tuple[str, ...]:
    """Writes the run and registers the model as champion, as far as `[tracking]` asks for it.

    Args:
        example: some raw rows of the window, which the registered model is checked and shown with.
        example_probabilities: what the saved state computes for them.
        bins: predicted against seen click rates before learning, for the calibration plot.
    """
    if not config.tracking.enabled:
        return ()
    tracker = Tracker(config)
    images = update_plots(report, read_history(config.model_dir), bins)
    run = tracker.log_update(report, texts={"report.md": as_markdown(report), **tables_of(report)}, images=images)
    notes = tuple(tracker.notes)
    if run is None or not config.tracking.register_model:
        return (*notes, *_without_forgotten_challenger(config, report, reached=run is not None))
    if report.rows_learned == 0:
        notes = (*notes, "no row was learned in time: the champion in the registry stays as it is")
        return (*notes, *_without_forgotten_challenger(config, report, reached=True))
    try:
        _register(config, spec, saved, report, example, example_probabilities)
    except TrackingUnavailable as error:
        log.warning("the model was not registered: %s", error)
        return (*notes, f"the model was not registered ({error}); the next update registers its own")
    return notes


def register_serving(config: UpdateConfig, spec: DatasetSpec, report: UpdateReport) -> tuple[str, ...]:
    """Makes the version that serves the registry's champion, where another is; notes on what could not be done.

    Args:
        config: settings.
        spec: of the model.
        report: of the update that published the version that serves; one that learned no row is not registered.
    """
    if report.rows_learned == 0:
        return ()
    try:
        if champion_checkpoint(config, spec.name) == report.version or promote_checkpoint(config, spec.name, report.version):
            return ()
        click_log = ClickLog.open_or_create(config.log_path, spec)
        examples, frame = sample_of(click_log, spec, as_hour(report.window_start), as_hour(report.window_end))
        if not len(frame):
            return (f"version {report.version} was not registered: no row of its window is in the click log any more",)
        saved = restore_version(config, spec, report.version)
        with saved.learner.averaged():
            probabilities = predictor_of(saved, spec).predict_examples(examples)
        _register(config, spec, saved, report, frame, probabilities)
    except (TidemarkError, OSError) as error:
        log.warning("version %d was not registered: %s", report.version, error)
        return (f"version {report.version} serves and was not registered ({error}); the next update registers its own",)
    return ()


def _register(
    config: UpdateConfig,
    spec: DatasetSpec,
    saved: ModelState,
    report: UpdateReport,
    example: pd.DataFrame,
    example_probabilities: F32,
) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        export_predictor(saved, spec, config.model, folder, table_precision=config.serving.table_precision)
        register_model(config, report, folder, example, example_probabilities)


def _without_forgotten_challenger(config: UpdateConfig, report: UpdateReport, *, reached: bool) -> tuple[str, ...]:
    """The registry names no challenger where no model waits to be proven; what was missed is made up for by the next update."""
    if head_version(config.model_dir) is not None:
        return ()
    if not reached:
        return (_STAYS,) if report.outcome == "rejected" else ()
    try:
        withdraw_challenger(config, report.dataset)
    except TrackingUnavailable as error:
        log.warning("the challenger was not withdrawn: %s", error)
        return (f"{_STAYS} ({error})",)
    return ()
