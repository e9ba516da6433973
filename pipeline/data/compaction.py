"""Many small files of an hour into one, while updates run.

Enters: the click log. Leaves: the same rows in fewer files, hour by hour, each hour in one commit that takes the old files out,
puts the new one in, and says which rows of it were whose. Old files stay on disk until they are vacuumed, so that an update
that is reading them goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from data_schemas.errors import CommitConflict, DataError
from pipeline.config import MaintenanceConfig
from pipeline.data.lake import ROW_GROUP_ROWS, ClickLog, LogFile, RowRange
from pipeline.data.lineage import Piece, Rewrite

MAX_ATTEMPTS = 5
"""How often an hour is written again because another process wrote to the log meanwhile."""


@dataclass(frozen=True, kw_only=True)
class CompactionReport:
    """What a compaction did."""

    hours: int
    """That were rewritten."""
    files_before: int
    """In these hours."""
    rows: int
    bytes_before: int
    bytes_after: int

    def line(self) -> str:
        """For a terminal or a log."""
        if not self.hours:
            return "compaction: no hour has files enough to be rewritten"
        return (
            f"compaction: {self.files_before:,} files of {self.hours:,} hours became {self.hours:,}, {self.rows:,} rows, "
            f"{self.bytes_before:,} bytes are now {self.bytes_after:,}; the old files stay until they are vacuumed"
        )


def compact(log: ClickLog, config: MaintenanceConfig) -> CompactionReport:
    """Rewrites every hour with at least `config.compact_files` files into one file; the newest hours are left alone.

    Raises:
        DataError: a file cannot be read, or the log cannot be written; hours that were done before stay done.
    """
    log.refresh()
    done: list[tuple[int, int, int, int]] = []
    for hour in [hour for hour, _ in crowded_hours(log, config)]:
        old, new = _compact_hour(log, hour, config)
        if old:
            done.append((len(old), new.num_rows, sum(map(log.size_of, old)), log.size_of(new)))
    files, rows, before, after = (sum(column) for column in zip(*done, strict=True)) if done else (0, 0, 0, 0)
    return CompactionReport(hours=len(done), files_before=files, rows=rows, bytes_before=before, bytes_after=after)


def crowded_hours(log: ClickLog, config: MaintenanceConfig) -> list[tuple[int, list[LogFile]]]:
    """Hours that are old enough and have files enough to be rewritten, each with its files in their order."""
    by_hour = [(hour, list(files)) for hour, files in groupby(log.files(), key=lambda file: file.hour)]
    closed = (log.newest_hour or 0) - config.compact_after_hours
    return [(hour, files) for hour, files in by_hour if hour <= closed and len(files) >= config.compact_files]


def _compact_hour(log: ClickLog, hour: int, config: MaintenanceConfig) -> tuple[Sequence[LogFile], LogFile]:
    """The files that went, and the one that came; nothing went, where another process has compacted the hour."""
    for _ in range(MAX_ATTEMPTS):
        files = dict(crowded_hours(log, config)).get(hour, [])
        if not files:
            return (), LogFile(hour=hour, path="", num_rows=0)
        new = _rewritten(log, hour, files)
        rewrite = Rewrite(into=new, origins=tuple(Piece(file=file) for file in files))
        try:
            log.rewrite([rewrite.to_json()], [new], files, data_change=False)
            return files, new
        except CommitConflict:
            log.refresh()
    raise DataError(
        f"other processes kept writing to {log.root} while hour {hour} was compacted, {MAX_ATTEMPTS} times in a row; compact "
        "at another time"
    )


def _rewritten(log: ClickLog, hour: int, files: Sequence[LogFile]) -> LogFile:
    """One file with the rows of `files`, in no log yet; it is named after the first, to keep its place in the hour."""
    writer = log.write(files[0].source)
    try:
        for range_ in _blocks(files):
            writer.add(hour, log.read([range_], log.schema.names).cast(log.schema))
        (new,) = writer.close()
    except BaseException:
        writer.discard()
        raise
    if new.num_rows != sum(file.num_rows for file in files):
        raise DataError(f"{new.num_rows} rows were written of {sum(file.num_rows for file in files)} of hour {hour}; try again")
    return new


def _blocks(files: Sequence[LogFile]) -> Iterator[RowRange]:
    for file in files:
        for start in range(0, file.num_rows, 2 * ROW_GROUP_ROWS):
            yield RowRange(file=file, start=start, stop=min(start + 2 * ROW_GROUP_ROWS, file.num_rows))
