"""What nothing needs any more, while updates run: old hours, old rejected rows, files of no version, old runs.

Enters: the settings and the clock. Leaves: a state folder without it, and a report in bytes; or the report alone.

A file of the click log goes when it is not active, was not taken out lately (an update may be reading it), is not younger than
any ingest (a writer may be about to commit it), and no kept checkpoint of any model names it among its pending rows, nor a
window that is held aside. What a checkpoint consumed need not stay on disk: its rows are followed through the log's commits.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CommitConflict, DataError, TidemarkError, TrackingUnavailable
from pipeline.config import UpdateConfig
from pipeline.data.held import held_windows
from pipeline.data.lake import ClickLog, LogFile, Quarantine
from pipeline.data.lineage import Piece, Rewrite, added_between, carry
from pipeline.data.windows import Cursor, as_time
from pipeline.publishing.checkpoint import (
    OF_CURSOR,
    current_version,
    head_version,
    load_cursor,
    read_manifest,
    undone_versions,
    versions,
)

MAX_ATTEMPTS = 5
"""How often the log's retention is tried again because another process wrote to the log meanwhile."""


@dataclass(frozen=True, kw_only=True)
class VacuumReport:
    """What was removed, or would be."""

    dry_run: bool
    log_rows: int
    """Rows whose hours outlived `maintenance.log_days`; they have left the click log."""
    quarantine_files: int
    """Files of rejected rows that outlived `maintenance.quarantine_days`."""
    files: int
    """Files that were deleted: nothing needs them."""
    bytes: int
    """Of these."""
    files_waiting: int
    """Files that are not active and stay for now: too young, taken out too lately, or pending in a kept checkpoint."""
    bytes_waiting: int
    """Of these."""
    runs: int
    """MLflow runs that were deleted."""
    notes: tuple[str, ...]
    """What was left, and why."""

    def lines(self) -> list[str]:
        """For a terminal or a log."""
        would = "would be " if self.dry_run else ""
        return [
            f"retention: {self.log_rows:,} rows of the click log, {self.quarantine_files:,} files of the quarantine and "
            f"{self.runs:,} runs {would}removed",
            f"vacuum: {self.files:,} files {would}deleted, {self.bytes:,} bytes; {self.files_waiting:,} that are no longer "
            f"active stay for now, {self.bytes_waiting:,} bytes",
            *(f"  {note}" for note in self.notes),
        ]


def vacuum(config: UpdateConfig, spec: DatasetSpec, *, now: datetime, dry_run: bool = False) -> VacuumReport:
    """Applies every retention of `[maintenance]`, then deletes the files that nothing needs.

    Args:
        config: names the state folder; all of its models are looked at.
        spec: of the click log.
        now: aware.
        dry_run: say what would be done, and do nothing.

    Raises:
        DataError: the disk or a table cannot be written; what was removed before stays removed.
    """
    keep, notes = config.maintenance, list[str]()
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    checkpoints = list(_kept_checkpoints(config, notes))
    rows = 0
    if keep.log_days:
        rows = _retire_hours(log, checkpoints, now - timedelta(days=keep.log_days), notes, dry_run=dry_run)
    rejected: list[str] = []
    if keep.quarantine_days:
        rejected = quarantine.remove_older(now - timedelta(days=keep.quarantine_days), dry_run=dry_run)
    held = [window for folder in _models(config) for window in held_windows(folder) if window.status != "discarded"]
    named = {piece.file.path for kept in checkpoints if kept.cursor for piece in kept.cursor.pending}
    named |= {piece.file.path for window in held for piece in window.pieces}
    swept = [_sweep(table, config, now, named, dry_run=dry_run) for table in (log, quarantine)]
    runs = _delete_runs(config, now - timedelta(days=keep.runs_days), notes, dry_run=dry_run) if keep.runs_days else 0
    files, size, waiting, waiting_size = (sum(column) for column in zip(*swept, strict=True))
    return VacuumReport(
        dry_run=dry_run,
        log_rows=rows,
        quarantine_files=len(rejected),
        files=files,
        bytes=size,
        files_waiting=waiting,
        bytes_waiting=waiting_size,
        runs=runs,
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A kept checkpoint of a model."""

    serves: bool
    cursor: Cursor | None
    """None: it cannot be read."""


def _kept_checkpoints(config: UpdateConfig, notes: list[str]) -> Iterator[_Kept]:
    """Every kept checkpoint of every model of the state folder."""
    for folder in _models(config):
        try:
            serving = current_version(folder)
        except TidemarkError as error:
            notes.append(f"model {folder.name}: {error}")
            yield _Kept(serves=True, cursor=None)
            continue
        head = head_version(folder)
        for number in [*versions(folder), *undone_versions(folder), *([head] if head else [])]:
            serves = number == serving
            try:
                cursor = load_cursor(folder, read_manifest(folder, number, None if serves else OF_CURSOR))
                yield _Kept(serves=serves, cursor=cursor)
            except (TidemarkError, OSError) as error:  # one that was just pruned is missing, too
                notes.append(f"model {folder.name}: {error}")
                yield _Kept(serves=serves, cursor=None)


def _models(config: UpdateConfig) -> list[Path]:
    return sorted(path for path in (config.state_dir / "models").glob("*") if path.is_dir())


def _retire_hours(log: ClickLog, checkpoints: Sequence[_Kept], before: datetime, notes: list[str], *, dry_run: bool) -> int:
    """Rows that left the click log; files with rows that a serving model has not learned stay."""
    serving = [kept.cursor for kept in checkpoints if kept.serves]
    if None in serving:
        notes.append("no hour leaves the click log: what a model waits for cannot be told while its checkpoint cannot be read")
        return 0
    for _ in range(MAX_ATTEMPTS):
        log.refresh()
        old = [file for file in log.files() if as_time(file.hour + 1) <= before]
        needed = {piece.file.path for cursor in serving if cursor for piece in _unlearned(log, cursor)}
        gone = [file for file in old if file.path not in needed]
        try:
            if gone and not dry_run:
                _take_out(log, gone)
        except CommitConflict:
            continue
        if kept := len(old) - len(gone):
            notes.append(f"{kept:,} files of old hours stay in the click log: a model has rows of them still to learn")
        return sum(file.num_rows for file in gone)
    raise DataError(f"other processes kept writing to {log.root}, {MAX_ATTEMPTS} times in a row; vacuum at another time")


def _unlearned(log: ClickLog, cursor: Cursor) -> Iterator[Piece]:
    since = cursor.log_version
    carried, _ = carry(log, cursor.pending, since or 0, log.version)
    yield from carried
    yield from added_between(log, since, log.version)


def _take_out(log: ClickLog, files: list[LogFile]) -> None:
    rewrite = Rewrite(into=None, origins=tuple(Piece(file=file) for file in files))
    log.rewrite([rewrite.to_json()], [], files, data_change=True)


def _sweep(
    table: ClickLog | Quarantine, config: UpdateConfig, now: datetime, named: Collection[str], *, dry_run: bool
) -> tuple[int, int, int, int]:
    """Files deleted and their bytes; files that are not active and stay, and their bytes."""
    keep = config.maintenance
    on_disk = {str(path.relative_to(table.root)): path for path in _data_files(table.root)}
    young = now - timedelta(hours=keep.orphan_hours)
    table.refresh()
    lately = table.removed_since(now - timedelta(hours=keep.removed_files_hours))
    idle = {name: path for name, path in on_disk.items() if name not in table.active_paths()}
    stay = {name for name, path in idle.items() if name in lately or name in named or _changed(path) > young}
    sizes = {name: path.stat().st_size for name, path in idle.items()}
    for name in idle.keys() - stay:
        if not dry_run:
            idle[name].unlink(missing_ok=True)
    gone = sum(sizes[name] for name in idle.keys() - stay)
    return len(idle) - len(stay), gone, len(stay), sum(sizes[name] for name in stay)


def _data_files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("part-*.parquet") if "_delta_log" not in path.parts)


def _changed(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _delete_runs(config: UpdateConfig, before: datetime, notes: list[str], *, dry_run: bool) -> int:
    if not config.tracking.enabled:
        return 0
    from pipeline.publishing.retention import delete_runs  # imports MLflow, which takes a second

    try:
        return delete_runs(config, before, dry_run=dry_run)
    except TrackingUnavailable as error:
        notes.append(f"runs stay: {error}")
        return 0
