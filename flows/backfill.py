"""The past, hour by hour: learns the hours from START to END in order, as the hourly job would have.

It can be killed and called again: what was learned is not learned twice.

    python flows/backfill.py 2019-02-22 2019-03-01 --dataset brunch --landing ../shared/data/brunch/impressions
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

from cyclopts import Parameter
from prefect import flow
from rich.console import Console

from data_schemas.errors import ConfigError
from flows.catching_up import Register, ingest_new, learn_waiting, waiting_windows
from flows.history import MeanFigures, after_first, mean_figures, reports_of
from flows.settings import settings_for
from flows.terminal import run_flow, tell
from pipeline.config import UpdateConfig
from pipeline.outcome import UpdateReport
from pipeline.publishing.report import as_table
from pipeline.ranks import Update, on_processes

FIRST_HOURS = 24
"""A new model knows nothing yet: these hours are left out of the means, and the frozen model is the one after them."""


@flow(name="backfill", persist_result=False)
def backfill(
    start: str,
    end: str,
    *,
    config: str | None = None,
    dataset: str | None = None,
    landing: str | None = None,
    state_dir: str | None = None,
    budget_seconds: float | None = None,
    register_model: Annotated[Register, Parameter(name="--register")] = "last",
    wait: float | None = None,
    processes: int | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Ingest what is new in the landing folder, then learn the hours from START to END in order; resumable.

    Args:
        start: First hour, such as 2019-02-22T00; UTC unless it says otherwise.
        end: Hour to stop before.
        config: Settings file (TOML). Without it, and for what it leaves out, the defaults hold.
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        landing: Folder or fsspec address of the click logs.
        state_dir: Folder of everything that is kept: click log, quarantine, checkpoints, MLflow database.
        budget_seconds: Time for one update, from start to published model.
        register_model: Which updates put their model into the registry.
        wait: Seconds to wait where another process has the model; without it, the command ends with exit code 75 at once.
        processes: Processes that train the model together on this machine; the settings say it where this does not.
        overrides: Any other setting, such as training.batch_size=1024; may be given several times.
    """
    first, stop = parse_hour(start), parse_hour(end)
    if first >= stop:
        raise ConfigError(f"END must be after START, got {start} and {end}")
    settings = _settings(config, overrides, dataset, landing, state_dir, budget_seconds, wait, processes)
    on_processes(settings, lambda update: _learn_past(settings, first, stop, register_model, update))


def _learn_past(settings: UpdateConfig, first: datetime, stop: datetime, register: Register, update: Update) -> None:
    ingest_new(settings)
    now = stop + timedelta(minutes=settings.window.label_delay_minutes)
    refuse_earlier_hours(settings, first, now)
    learn_waiting(settings, until=now, register=register, update=update)
    _show([report for report in reports_of(settings.model_dir) if first <= report.window_start < stop])


def parse_hour(text: str) -> datetime:
    """A whole hour, in UTC unless it carries another zone.

    >>> parse_hour("2019-02-22T05").isoformat()
    '2019-02-22T05:00:00+00:00'

    Raises:
        ConfigError: not a time, or not on the hour.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no time; write 2019-02-22 or 2019-02-22T05") from error
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    if time.timestamp() % 3600:
        raise ConfigError(f"{text!r} is not on the hour; write 2019-02-22 or 2019-02-22T05")
    return time


def refuse_earlier_hours(settings: UpdateConfig, first: datetime, now: datetime) -> None:
    """A model learns in order: hours before `first` that it has not learned would be learned now, unasked.

    Raises:
        ConfigError: such hours wait.
    """
    earlier = [start for start in waiting_windows(settings, now) if start < first]
    if earlier:
        raise ConfigError(
            f"the click log has {len(earlier)} windows before START = {first:%Y-%m-%dT%H} that the model "
            f"{settings.model_name!r} has not learned, and it learns in order; start at {earlier[0]:%Y-%m-%dT%H}, or "
            "name another state_dir and a landing folder without them"
        )


def _settings(
    config: str | None,
    overrides: list[str] | None,
    dataset: str | None,
    landing: str | None,
    state_dir: str | None,
    budget_seconds: float | None,
    wait: float | None,
    processes: int | None,
) -> UpdateConfig:
    return settings_for(
        config,
        overrides,
        dataset=dataset,
        landing=landing,
        state_dir=state_dir,
        budget__seconds=budget_seconds,
        lock_wait_seconds=wait,
        processes__count=processes,
        evaluation__frozen_after_updates=FIRST_HOURS,
    )


def _show(reports: list[UpdateReport]) -> None:
    Console().print(as_table(reports))
    later = after_first(FIRST_HOURS, reports)
    if not later:
        tell(f"no hour after the first {FIRST_HOURS}: no means")
        return
    rows = sum(report.before.rows for report in later if report.before)
    tell(f"means before learning of {len(later)} hours after the first {FIRST_HOURS}, {rows:,} rows, weighted by rows:")
    tell(_means("kept fresh", mean_figures(later, lambda report: report.before)))
    tell(_means(f"frozen after {FIRST_HOURS} h", mean_figures(later, lambda report: report.frozen)))


def _means(name: str, means: MeanFigures) -> str:
    if means.auc is None or means.log_loss is None:
        return f"  {name:<20} not measured"
    return f"  {name:<20} AUC {means.auc:.4f}   log loss {means.log_loss:.4f}"


if __name__ == "__main__":
    sys.exit(run_flow(backfill))
