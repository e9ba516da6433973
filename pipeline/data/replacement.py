"""An hour of the click log, replaced by files that were delivered anew.

Enters: the log, an hour, and a folder with all files of that hour as they should be. Leaves: the hour with the rows of these
files, in one commit that says which of them are rows that it had (by event key). A model that has learned a row does not
learn it again; a row that waited waits on, with the values it has now; rows that are new are learned as late ones; rows that
have left are learned by nobody any more. The log does not remember a row that has left: if it comes back, it is new.

The files are first ingested, by the rules for all files, into a log of their own that is deleted afterwards; what breaks the
declaration goes to the quarantine. One hour is held in memory.
"""

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CommitConflict, ConfigError, DataError
from pipeline.data.ingest import IngestReport, ingest_landing
from pipeline.data.lake import ROW_GROUP_ROWS, ClickLog, LogFile, Quarantine, RowRange
from pipeline.data.lineage import Piece, Rewrite
from pipeline.data.windows import as_time
from pipeline.lock import alone

MAX_ATTEMPTS = 5
"""How often the hour is written again because another process wrote to the log meanwhile."""

Bools = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class ReplacementReport:
    """What became of every row."""

    hour: datetime
    """Start, UTC."""
    ingested: IngestReport
    """What became of the files."""
    kept: int
    """Rows that the hour had and has: a model that learned them does not learn them again."""
    changed: int
    """Of these, rows with another value in some column."""
    added: int
    """Rows that the hour had not; they are learned."""
    removed: int
    """Rows that the hour had and has no more; what a model learned from them it keeps."""
    other_hours: int
    """Rows of the files that belong to other hours; they were left alone."""
    log_version: int

    def lines(self) -> list[str]:
        """For a terminal or a log."""
        unchanged = not (self.changed or self.added or self.removed)
        outcome = (
            f"hour {self.hour:%Y-%m-%d %H:%M} UTC: {self.kept:,} rows stay, {self.changed:,} of them with other values, "
            f"{self.added:,} are new and are learned next, {self.removed:,} have left"
        )
        return [
            *self.ingested.lines(),
            f"{outcome}; the log was like that already" if unchanged else outcome,
            *([f"  {self.other_hours:,} rows of other hours were left alone"] if self.other_hours else []),
        ]


def replace_hour(
    landing: str, hour: int, log: ClickLog, quarantine: Quarantine, spec: DatasetSpec, *, now: datetime
) -> ReplacementReport:
    """Gives an hour of the click log the rows that the files in `landing` have of it.

    Args:
        landing: a folder, local or any fsspec address, with every file of the hour and none besides.
        hour: since 1970-01-01T00Z.
        log: the click log.
        quarantine: takes the rows that break the declaration.
        spec: of both.
        now: aware.

    Raises:
        ConfigError: rows of this data set cannot be told apart by hour and key alone.
        DataError: a file cannot be read, or none has a row of the hour; the log stays as it is.
        UpdateInProgress: another process replaces an hour.
    """
    _refuse_what_cannot_be_replaced(spec)
    folder = log.root.parent / "replacing"
    with alone(folder, "replace an hour"):
        scratch_path = folder / "log"
        shutil.rmtree(scratch_path, ignore_errors=True)  # of a process that was killed
        try:
            scratch = ClickLog.open_or_create(scratch_path, spec)
            quarantine.refresh()
            ingested = ingest_landing(landing, scratch, quarantine, spec, now=now)
            _refuse_missing_files(ingested, landing)
            rows = _rows_of(scratch, [file for file in scratch.files() if file.hour == hour])
            if not rows.num_rows:
                raise DataError(
                    f"no file in {landing!r} has a row of the hour {as_time(hour):%Y-%m-%dT%H}; nothing was replaced. Name "
                    "the hour in UTC, and the folder with its files"
                )
            kept, changed, added, removed = _replace(log, hour, rows, Path(landing).name)
        finally:
            shutil.rmtree(scratch_path, ignore_errors=True)
    return ReplacementReport(
        hour=as_time(hour),
        ingested=ingested,
        kept=kept,
        changed=changed,
        added=added,
        removed=removed,
        other_hours=ingested.rows_accepted - rows.num_rows,
        log_version=log.version,
    )


def _refuse_what_cannot_be_replaced(spec: DatasetSpec) -> None:
    if spec.time.format == "row_order":
        raise ConfigError(
            f"data set {spec.name!r} counts its hours by rows ([time] format 'row_order'): another row would "
            "move all that follow; start a new model and log in another state_dir"
        )
    if spec.clicks is not None:
        raise ConfigError(
            f"data set {spec.name!r} has clicks as events of their own, which belong to impressions of other hours too: its "
            "hours cannot be replaced one by one. Deliver what is missing as one more file"
        )


def _refuse_missing_files(ingested: IngestReport, landing: str) -> None:
    """A file that is not read would take its rows out of the hour."""
    unread = ingested.files_broken + ingested.files_unreadable + ingested.files_unknown + ingested.files_skipped
    if unread:
        shown = "; ".join(ingested.troubled_files) or "quarantined before, and unchanged since"
        raise DataError(
            f"{unread} files in {landing!r} cannot be read ({shown}), and their rows would be missing; nothing was "
            "replaced. Mend them, or take them out of the folder"
        )


def _replace(log: ClickLog, hour: int, rows: pa.Table, source: str) -> tuple[int, int, int, int]:
    """Rows kept, of these changed, added, removed."""
    for _ in range(MAX_ATTEMPTS):
        log.refresh()
        files = [file for file in log.files() if file.hour == hour]
        before = _rows_of(log, files)
        place_O, is_new_N = _matched(_keys(before), _keys(rows))
        kept_O = place_O >= 0
        kept = rows.take(pa.array(place_O[kept_O]))
        changed = _num_changed(before.filter(pa.array(kept_O)), kept)
        counts = int(kept_O.sum()), changed, int(is_new_N.sum()), int((~kept_O).sum())
        if counts[1:] == (0, 0, 0):
            return counts
        hour_rows = pa.concat_tables([kept, rows.filter(pa.array(is_new_N))])
        new = _written(log, hour, hour_rows, files[0].source if files else source)
        starts = np.cumsum([0, *(file.num_rows for file in files)])
        origins = (Piece(file=f, mask=kept_O[start : start + f.num_rows]) for f, start in zip(files, starts, strict=False))
        rewrite = Rewrite(into=new, origins=tuple(origins))
        try:
            log.rewrite([rewrite.to_json()], [new], files, data_change=True)
            return counts
        except CommitConflict:
            continue
    raise DataError(
        f"other processes kept writing to {log.root} while hour {as_time(hour):%Y-%m-%dT%H} was replaced, {MAX_ATTEMPTS} "
        "times in a row; replace it at another time"
    )


def _rows_of(log: ClickLog, files: list[LogFile]) -> pa.Table:
    ranges = [RowRange.whole(file) for file in files]
    return log.read(ranges, log.schema.names).cast(log.schema)


def _keys(rows: pa.Table) -> U64:
    keys: U64 = rows.column("event_key").to_numpy().view(np.uint64)
    return keys


def _matched(old_O: U64, new_N: U64) -> tuple[npt.NDArray[np.int64], Bools]:
    """`[O]` place of each old key among the new ones, -1 for none; `[N]` which new keys are not among the old ones.

    >>> _matched(np.array([7, 3, 9], np.uint64), np.array([9, 5, 7], np.uint64))
    (array([ 2, -1,  0]), array([False,  True, False]))
    """
    order_N = np.argsort(new_N)
    found_O = np.minimum(np.searchsorted(new_N, old_O, sorter=order_N), len(new_N) - 1)
    place_O = np.where(new_N[order_N[found_O]] == old_O, order_N[found_O], -1)
    is_new_N = np.ones(len(new_N), bool)
    is_new_N[place_O[place_O >= 0]] = False
    return place_O, is_new_N


def _num_changed(before: pa.Table, after: pa.Table) -> int:
    """Rows that differ in some column; both in the same order."""
    changed_R = np.zeros(before.num_rows, bool)
    for name in before.column_names:
        old, new = (_comparable(table.column(name)) for table in (before, after))
        differs = pc.fill_null(pc.not_equal(old, new), False)
        changed_R |= pc.or_(differs, pc.xor(old.is_null(), new.is_null())).to_numpy()
    return int(changed_R.sum())


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists as text: Arrow does not compare them."""
    if not pa.types.is_list(column.type):
        return column
    texts = column.cast(pa.list_(pa.string()))
    return pc.binary_join(texts, "\0")


def _written(log: ClickLog, hour: int, rows: pa.Table, source: str) -> LogFile:
    """One file, in no log yet."""
    writer = log.write(source)
    try:
        for start in range(0, rows.num_rows, 2 * ROW_GROUP_ROWS):
            writer.add(hour, rows.slice(start, 2 * ROW_GROUP_ROWS))
        (new,) = writer.close()
    except BaseException:
        writer.discard()
        raise
    return new
