"""Putting an update where people look: its run, its report and its model in MLflow.

Enters: the saved state and the report. Leaves: notes on what could not be reached; an update never fails for its tracking.
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import TrackingUnavailable
from data_schemas.examples import F32
from pipeline.config import UpdateConfig
from pipeline.evaluation.metrics import CalibrationBin
from pipeline.model_state import ModelState
from pipeline.outcome import UpdateReport
from pipeline.publishing.checkpoint import head_version
from pipeline.publishing.plots import update_plots
from pipeline.publishing.predictor import export_predictor
from pipeline.publishing.registry import register_model, withdraw_challenger
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
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        export_predictor(saved, spec, config.model, folder)
        try:
            register_model(config, report, folder, example, example_probabilities)
        except TrackingUnavailable as error:
            log.warning("the model was not registered: %s", error)
            return (*notes, f"the model was not registered ({error}); the next update registers its own")
    return notes


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
