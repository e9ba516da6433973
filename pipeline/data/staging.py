"""One landing file, read and written beside the click log; the part of an ingest that any process of any machine can do.

Enters: a file of the landing folder. Leaves: a `StagedFile`: Parquet files that are in no log yet, one or more an hour,
with every row that the spec accepts; and the rows' event keys, by which whoever commits them knows which are new.

Letters: R rows of a batch.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.click_log import MICROSECONDS_PER_HOUR, RejectedRow, Validated, validate, validate_clicks
from data_schemas.dataset import Clicks, DatasetSpec
from data_schemas.errors import BrokenFile
from pipeline.data.event_keys import Repeats
from pipeline.data.lake import HourFiles, LogFile, RejectedRows
from pipeline.data.landing import LandingFile, RawBatch, read_batches

Bools = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where files are written, and by which declaration and clock; can be sent to another machine that has the same folders."""

    log_root: Path
    log_schema: pa.Schema
    quarantine_root: Path
    spec: DatasetSpec
    now: datetime
    """Aware; the clock that future times are judged by."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Consecutive rows of one hour, as the file has them."""

    hour: int
    """Since 1970-01-01T00Z."""
    keys_R: U64
    around: int
    """In so many hours before and after it, no other row may have the key either."""


@dataclass(frozen=True, kw_only=True)
class StagedFile:
    """Written to its end, in no log yet."""

    landing: LandingFile
    accepted: tuple[LogFile, ...]
    """Sorted; all rows that the spec accepts, new or not. Those of an hour lie in the order of its offers."""
    offers: tuple[Offer, ...]
    """In the order of the file."""
    rejected: tuple[str, ...]
    """Files of the quarantine, relative to it."""
    rows_read: int
    rows_rejected: int
    reasons: Mapping[str, int]
    """Rejected rows by reason, without the values."""


@dataclass(frozen=True, kw_only=True)
class UnstagedFile:
    """Nothing of it was written."""

    landing: LandingFile
    reason: str
    broken: bool
    """True: its content cannot be read. False: it could not be read now."""


def stage_file(file: LandingFile, into: Destination, rows_before: int = 0) -> StagedFile | UnstagedFile:
    """Reads, checks and writes one file.

    Args:
        rows_before: rows of all files before this one, which `row_order` times count on from.

    Raises:
        DataError: the disk is full, or the folders cannot be written; nothing of the file is left there.
    """
    try:
        return _stage(file, into, rows_before)
    except BrokenFile as error:
        return UnstagedFile(landing=file, reason=str(error), broken=True)
    except (OSError, MemoryError) as error:
        reason = f"cannot be opened or read now ({type(error).__name__}: {error})"
        return UnstagedFile(landing=file, reason=reason, broken=False)


def remove(root: Path, paths: Iterable[str]) -> None:
    """Files that no log has, relative to `root`."""
    for path in paths:
        (root / path).unlink(missing_ok=True)


def _stage(file: LandingFile, into: Destination, rows_before: int) -> StagedFile:
    with _writers(file, into) as (accepted, rejected):
        written = _Written()
        only_clicks = _holds_clicks(file, into.spec.clicks)
        for batch in read_batches(file, into.spec.of_clicks() if only_clicks else into.spec):
            parts = list(_validated(batch, into, rows_before, only_clicks=only_clicks))
            rejected.add(written.count(batch, parts))
            for part, around in parts:
                for hour, rows in _by_hour(part.accepted):
                    if into.spec.repeats == "keep":
                        rows = _with_repeats_apart(hour, rows, written.repeats)
                    accepted.add(hour, rows)
                    written.offers.append(Offer(hour=hour, keys_R=_keys(rows), around=around))
        files = accepted.close()
        try:
            rejected_paths = rejected.close()
        except BaseException:
            remove(into.log_root, (written_file.path for written_file in files))
            raise
        return StagedFile(
            landing=file,
            accepted=tuple(files),
            offers=tuple(written.offers),
            rejected=tuple(rejected_paths),
            rows_read=written.rows_read,
            rows_rejected=written.reasons.total(),
            reasons=dict(written.reasons),
        )


@dataclass(kw_only=True)
class _Written:
    """Of one file so far."""

    rows_read: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    offers: list[Offer] = field(default_factory=list)
    repeats: Repeats = field(default_factory=Repeats)

    def count(self, batch: RawBatch, parts: list[tuple[Validated, int]]) -> list[RejectedRow]:
        """The rejected rows of a batch, in the order of the file."""
        bad = [*batch.malformed, *(row for part, _ in parts for row in part.rejected)]
        bad.sort(key=lambda row: row.row or 0)
        self.rows_read += batch.columns.num_rows + len(batch.malformed)
        self.reasons.update(row.kind for row in bad)
        return bad


@contextmanager
def _writers(file: LandingFile, into: Destination) -> Iterator[tuple[HourFiles, RejectedRows]]:
    """Writers whose files are removed again, if the file cannot be read to its end."""
    accepted = HourFiles(into.log_root, into.log_schema, file.source)
    rejected = RejectedRows(into.quarantine_root, file.path, into.now)
    try:
        yield accepted, rejected
    except BaseException:
        accepted.discard()
        rejected.discard()
        raise


def _validated(batch: RawBatch, into: Destination, rows_before: int, *, only_clicks: bool) -> Iterator[tuple[Validated, int]]:
    """Impressions, and clicks where they are events of their own; with each, the hours around its own that must not have its
    key: a second click on an impression is a duplicate wherever it falls."""
    spec, now, clicks = into.spec, into.now, into.spec.clicks
    if clicks is None:
        yield validate(batch.columns, spec, now=now, rows=batch.rows, rows_before=rows_before), 0
        return
    is_click_R = np.full(len(batch.rows), only_clicks)
    if clicks.column:
        is_click_R = _says(batch.columns.column(clicks.column), clicks.value)
    shown, clicked = ~is_click_R, is_click_R
    if shown.any():
        yield validate(batch.columns.filter(pa.array(shown)), spec, now=now, rows=batch.rows[shown]), 0
    if clicked.any():
        columns = batch.columns.filter(pa.array(clicked))
        yield validate_clicks(columns, spec, now=now, rows=batch.rows[clicked]), clicks.attribution_hours


def _says(column: pa.ChunkedArray, value: str) -> Bools:
    """`[R]` which of a column's values, texts or bytes, plain or in a dictionary, are `value`."""
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    plain = plain if pa.types.is_binary(plain.type) else plain.cast(pa.string()).cast(pa.binary())
    says: Bools = pc.fill_null(pc.equal(plain, pa.scalar(value.encode(), pa.binary())), False).to_numpy()
    return says


def _holds_clicks(file: LandingFile, clicks: Clicks | None) -> bool:
    if clicks is None or not clicks.files:
        return False
    return PurePosixPath(file.path).match(clicks.files)


def _keys(rows: pa.Table) -> U64:
    keys_R: U64 = rows.column("event_key").to_numpy().view(np.uint64)
    return keys_R


def _with_repeats_apart(hour: int, rows: pa.Table, repeats: Repeats) -> pa.Table:
    keys_R = repeats.tell_apart(hour, _keys(rows))
    place = rows.schema.get_field_index("event_key")
    return rows.set_column(place, rows.schema.field(place), pa.array(keys_R.view(np.int64)))


def _by_hour(rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each hour, in order."""
    micros_R = rows.column("event_time").cast(pa.int64()).to_numpy()
    hour_R = micros_R // MICROSECONDS_PER_HOUR
    if not len(hour_R):
        return
    if hour_R.min() == hour_R.max():
        yield int(hour_R[0]), rows
        return
    order = np.argsort(hour_R, kind="stable")
    in_order = rows.take(pa.array(order))
    hours, starts = np.unique(hour_R[order], return_index=True)
    for hour, start, stop in zip(hours.tolist(), starts.tolist(), [*starts.tolist()[1:], len(order)], strict=True):
        yield hour, in_order.slice(start, stop - start)
