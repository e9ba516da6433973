"""From a landing folder to a fresh model: ingest what is new, then learn every closed window that waits.

Enters: an `UpdateConfig`. Leaves: the report of every update, each as a Prefect artifact too.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal, TypeVar

import pyarrow as pa

from data_schemas.errors import DataError
from flows.alerts import failures_told, tell_of
from flows.artifacts import publish_report
from flows.cluster import run_spread
from flows.history import reports_of
from flows.stages import run_as_task
from flows.terminal import Advance, leads, progress, tell
from pipeline.config import UpdateConfig, spec_of
from pipeline.data.held import held_windows
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange
from pipeline.data.loader import columns_to_read
from pipeline.data.read_ahead import Key, ReadAhead
from pipeline.data.windows import as_hour, as_time
from pipeline.outcome import LEARNED, UpdateReport
from pipeline.publishing.checkpoint import current_version, learned_until
from pipeline.publishing.report import verdict
from pipeline.ranks import Update, on_processes
from pipeline.update import run_update

log = logging.getLogger(__name__)

T = TypeVar("T")

Register = Literal["each", "last", "never"]
"""Which updates put their model into the registry."""
Tell = Callable[[str], None]


def catch_up(
    config: UpdateConfig, *, until: datetime | None = None, register: Register = "each", tell: Tell = tell
) -> list[UpdateReport]:
    """Ingest what is new, then update until no closed window waits, each update within a budget of its own.

    Args:
        config: settings of each update.
        until: taken for now, so that no window that ends later is closed; None: the wall clock.
        register: which updates put their model into the registry; with "last", what serves in the end is its champion,
            whichever update made it.
        tell: takes one line for each thing done.

    Raises:
        TidemarkError: what went wrong and the way out; every update before it stays published.
    """

    def work(update: Update) -> list[UpdateReport]:
        ingest_new(config, tell=tell)
        return learn_waiting(config, until=until, register=register, tell=tell, update=update)

    with failures_told(config, tell) if leads() else nullcontext():
        return on_processes(config, work) or []


def ingest_new(config: UpdateConfig, *, tell: Tell = tell) -> None:
    """Take what is new in the landing folder into the click log, and tell the count of every outcome."""
    spec = spec_of(config)
    log = ClickLog.open_or_create(config.log_path, spec)
    quarantine = Quarantine.open_or_create(config.quarantine_path)
    with progress("ingesting files", total=None) as advance:
        report = run_spread(
            "ingest",
            config.cluster,
            lambda spread: ingest_landing(
                config.landing,
                log,
                quarantine,
                spec,
                now=datetime.now(UTC),
                progress=lambda done, files: advance("", done, files),
                spread=spread,
            ),
        )
    for line in report.lines():
        tell(line)


def learn_waiting(
    config: UpdateConfig,
    *,
    until: datetime | None = None,
    register: Register = "each",
    tell: Tell = tell,
    update: Update = run_update,
) -> list[UpdateReport]:
    """Learn every closed window that waits, in order, and tell a sentence about each."""
    reports: list[UpdateReport] = []
    with progress(f"learning {config.model_name}", total=None) as advance, ReadAhead() as read_ahead:
        while True:
            now = until or datetime.now(UTC)
            windows = waiting_windows(config, now)
            waiting = len(windows)
            advance("", len(reports), len(reports) + waiting)
            registers = register == "each" or (register == "last" and waiting <= 1)
            report = _update(update, config, now, advance, registers=registers, read_ahead=read_ahead, coming=windows[1:2])
            if report is None:
                break
            reports.append(report)
            run_as_task("report", lambda report=report: publish_report(report, config))  # type: ignore[misc]
            for line in (verdict(report), *(f"  {note}" for note in report.notes)):
                tell(line)
            tell_of(report, config, tell)
    if register == "last":
        for note in run_as_task("register what serves", lambda: _register_serving(config)):
            tell(note)
    tell(_summary(config, reports))
    return reports


def waiting_windows(config: UpdateConfig, now: datetime) -> list[datetime]:
    """Starts of the closed windows that the model has not learned, oldest first, but for those without rows and those held
    aside."""
    log = ClickLog.open_or_create(config.log_path, spec_of(config))
    window, since = config.window, learned_until(config.model_dir)
    held = {piece.file.path for held in held_windows(config.model_dir) for piece in held.pieces if piece.rows.all()}
    hours = {file.hour for file in log.files() if (since is None or file.hour >= since) and file.path not in held}
    starts = {as_time(hour - (hour - window.align_hour) % window.hours) for hour in hours}
    length = timedelta(hours=window.hours, minutes=window.label_delay_minutes)
    return sorted(start for start in starts if start + length <= now)


def _update(
    update: Update,
    config: UpdateConfig,
    now: datetime,
    advance: Advance,
    *,
    registers: bool,
    read_ahead: ReadAhead,
    coming: Sequence[datetime],
) -> UpdateReport | None:
    """One update; once its own window is loaded, the files of the `coming` one are read."""

    def stage(name: str, work: Callable[[], T]) -> T:
        advance(name)
        done = run_as_task(name, work)
        if name == "load":
            try:
                read_ahead.expect(reads_of(config, coming))
            except DataError as error:
                log.warning("the next window is not read ahead: %s", error)
        return done

    if not registers:
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"register_model": False})})
    return update(
        config,
        stage=stage,
        now=now,
        progress=lambda done, rows: advance(f"learn {done / max(rows, 1):.0%}"),
        read_ahead=read_ahead,
    )


def reads_of(config: UpdateConfig, windows: Sequence[datetime]) -> dict[Key, Callable[[], pa.Table]]:
    """What loading these windows reads, but for rows that came late or wait: those are few."""
    spec = spec_of(config)
    log, columns = ClickLog.open_or_create(config.log_path, spec), columns_to_read(spec)
    if spec.clicks is not None:
        columns += ["is_click", "event_key"]
    hours = {as_hour(start) + after for start in windows for after in range(config.window.hours)}
    return {
        (log.root / file.path, tuple(columns)): partial(log.read, [RowRange.whole(file)], columns)
        for file in log.files()
        if file.hour in hours
    }


def _register_serving(config: UpdateConfig) -> tuple[str, ...]:
    """The version that serves as the registry's champion, where the last update did not publish; notes on what went wrong."""
    if not (config.tracking.enabled and config.tracking.register_model):
        return ()
    from pipeline.publishing.publish import register_serving  # imports MLflow, which takes a second

    serving = current_version(config.model_dir)
    published = (report for report in reports_of(config.model_dir) if report.outcome == "published")
    made = [report for report in published if report.version == serving]
    return register_serving(config, spec_of(config), made[-1]) if made else ()


def _summary(config: UpdateConfig, reports: Sequence[UpdateReport]) -> str:
    if not reports:
        return f"nothing to do: no closed window waits for the model {config.model_name!r}"
    learned = [report for report in reports if report.outcome in LEARNED]
    windows = _windows(len(learned))
    rows, seconds = sum(report.rows_learned for report in learned), sum(report.total_seconds for report in reports)
    pending = f", {learned[-1].rows_pending:,} rows wait for later windows" if learned and learned[-1].rows_pending else ""
    aside = f"; {_windows(len(reports) - len(learned))} held aside" if len(reports) > len(learned) else ""
    return f"learned {windows}, {rows:,} rows in {seconds:.1f} s{pending}{aside}; {_serving(config, reports[-1])}"


def _windows(number: int) -> str:
    return "1 window" if number == 1 else f"{number} windows"


def _serving(config: UpdateConfig, last: UpdateReport) -> str:
    if last.serving is None:
        return f"version {last.version} of {config.model_name!r} serves"
    return f"version {last.serving} of {config.model_name!r} serves, version {last.version} is not proven yet"
