"""From the landing folder to the click log, exactly once.

Enters: files of click logs. Leaves: their good rows in the click log, each in its own hour; their bad rows and the
broken files in the quarantine; and a report that accounts for every row and every file.

One file is one commit. The quarantine is committed first, both commits carry the file's fingerprint: after a kill
between the two the file is read again, and nothing is there twice.

Rows with an event key that their hour has already are duplicates. Where the spec keeps repeats, the number of the row
among those of its file with the same hour and key is mixed into the key, except for the first: only a row that an
earlier file had as often is then a duplicate.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.click_log import MICROSECONDS_PER_HOUR, Validated, validate, validate_clicks
from data_schemas.dataset import Clicks, DatasetSpec
from data_schemas.errors import BrokenFile, CommitConflict, DataError
from data_schemas.hashing import combine_hashes
from pipeline.data.lake import ClickLog, HourFiles, LogFile, Quarantine, RejectedRows
from pipeline.data.landing import LandingFile, RawBatch, list_landing, read_batches

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

MAX_ATTEMPTS = 5
"""How often a file is read again because another process wrote to the log meanwhile."""

MAX_TROUBLED_FILES = 20
"""Files that a report names."""

MAX_REMEMBERED_KEYS = 64_000_000
"""Event keys kept in memory between files, 8 bytes each; beyond it they are read from the log again."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of every file and every row."""

    files_read: int
    files_skipped: int
    """Ingested or quarantined before, and unchanged since."""
    files_broken: int
    """Quarantined whole."""
    files_unreadable: int
    """The file system did not give them out; tried again next time."""
    files_unknown: int
    """The name tells no format; left alone."""
    rows_accepted: int
    rows_duplicate: int
    """Their event was in their hour already."""
    rows_late: int
    """Of the accepted, those of an hour before the newest that the log had when their file came."""
    rows_rejected: int
    reasons: Mapping[str, int]
    """Rejected rows by reason, without the values."""
    troubled_files: tuple[str, ...]
    """Up to twenty broken, unreadable or unknown files, each with what is wrong."""
    log_version: int

    def lines(self) -> list[str]:
        """For a terminal or a log."""
        files = (
            f"files: {self.files_read} read, {self.files_skipped} known already, {self.files_broken} broken, "
            f"{self.files_unreadable} unreadable, {self.files_unknown} of unknown format"
        )
        rows = (
            f"rows: {self.rows_accepted} accepted ({self.rows_late} late), {self.rows_duplicate} duplicate, "
            f"{self.rows_rejected} rejected"
        )
        worst = sorted(self.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
        return [files, rows, *(f"  {count} x {reason}" for reason, count in worst), *map("  {}".format, self.troubled_files)]


def ingest_landing(
    landing: str,
    log: ClickLog,
    quarantine: Quarantine,
    spec: DatasetSpec,
    *,
    now: datetime,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Bring everything new under `landing` into the click log.

    Args:
        landing: a local folder or any fsspec address.
        now: aware; the clock that future times are judged by.
        progress: called after each file with the number done and the number of all.

    Raises:
        DataError: there is no such folder, or the log cannot be written (a full disk, say). What was committed before
            stays; the rest comes with the next call.
    """
    log.refresh()
    quarantine.refresh()
    listing = list_landing(landing)
    tally = _Tally(files_unknown=len(listing.unknown))
    tally.troubled += [f"{path}: the name tells no known format" for path in listing.unknown]
    seen = SeenKeys(log)
    for done, file in enumerate(listing.files, start=1):
        _ingest_file(file, _Ingest(log=log, quarantine=quarantine, spec=spec, now=now, seen=seen), tally)
        if progress:
            progress(done, len(listing.files))
    return tally.report(log.version)


class SeenKeys:
    """Event keys by hour: those of the click log, read when first asked for, and those of the file in hand.

    A key is 8 bytes; while a file is read whose repeats are kept, each of its good rows takes 8 bytes more. Keys lie in
    sorted arrays of rising size that are merged as they grow (a log-structured merge tree, O'Neil et al. 1996), so that
    n keys cost n log n however they arrive.
    """

    _files: dict[int, list[LogFile]]
    _hours: set[int]
    _committed: "dict[int, _SortedKeys]"
    _staged: "dict[int, _SortedKeys]"
    _read: "dict[int, _SortedKeys]"

    def __init__(self, log: ClickLog) -> None:
        self._log = log
        self.forget()

    @property
    def newest_hour(self) -> int | None:
        """The latest hour of the log, without the file in hand; None for an empty log."""
        return max(self._hours, default=None)

    def take_new(self, hour: int, keys_R: U64, around: int = 0) -> Bools:
        """`[R]` true for the first row of each key that neither the log nor the file had in that hour; stages them.

        Args:
            hour: of the rows.
            keys_R: their event keys.
            around: nor in so many hours before and after it.
        """
        distinct, first_R = np.unique(keys_R, return_index=True)
        staged = self._staged.setdefault(hour, _SortedKeys())
        new = ~(self._of_log(hour).contain(distinct) | staged.contain(distinct))
        for other in range(hour - around, hour + around + 1):
            if other != hour:
                new &= ~(self._of_log(other).contain(distinct) | self._staged.get(other, _SortedKeys()).contain(distinct))
        staged.add(distinct[new])
        is_new_R = np.zeros(len(keys_R), bool)
        is_new_R[first_R[new]] = True
        return is_new_R

    def tell_repeats_apart(self, hour: int, keys_R: U64) -> U64:
        """`[R]` a key of its own for each row: the first of the file with that key in the hour keeps it."""
        order = np.argsort(keys_R, kind="stable")
        sorted_R = keys_R[order]
        distinct, start_D, count_D = np.unique(sorted_R, return_index=True, return_counts=True)
        read = self._read.setdefault(hour, _SortedKeys())
        number_R = np.empty(len(keys_R), np.uint64)
        number_R[order] = np.arange(len(keys_R)) - np.repeat(start_D - read.count(distinct), count_D)
        read.add(sorted_R)
        return np.where(number_R > 0, combine_hashes(keys_R, number_R), keys_R)

    def commit(self) -> None:
        """The file in hand is in the log."""
        only_ours = self._log.version == self._version + 1
        if not only_ours or sum(len(keys) for keys in self._committed.values()) > MAX_REMEMBERED_KEYS:
            self.forget()
            return
        for hour, keys in self._staged.items():
            self._committed[hour].merge(keys)
            self._hours.add(hour)
        self._staged, self._read = {}, {}
        self._version += 1

    def roll_back(self) -> None:
        """The file in hand did not enter the log."""
        self._staged, self._read = {}, {}

    def forget(self) -> None:
        """Read the log again."""
        self._version = self._log.version
        self._files = {}
        for file in self._log.files():
            self._files.setdefault(file.hour, []).append(file)
        self._hours = set(self._files)
        self._committed, self._staged, self._read = {}, {}, {}

    def _of_log(self, hour: int) -> "_SortedKeys":
        if hour not in self._committed:
            keys = _SortedKeys()
            keys.add(np.sort(self._log.keys_of(self._files.get(hour, []))))
            self._committed[hour] = keys
        return self._committed[hour]


class _SortedKeys:
    """A set, or multiset, of uint64 in sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[U64] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def contain(self, keys: U64) -> Bools:
        """Which of `keys` are in the set."""
        found = np.zeros(len(keys), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[places] == keys
        return found

    def count(self, keys: U64) -> I64:
        """How often each of `keys` was added."""
        counts = np.zeros(len(keys), np.int64)
        for run in self._runs:
            counts += np.searchsorted(run, keys, side="right") - np.searchsorted(run, keys, side="left")
        return counts

    def add(self, keys: U64) -> None:
        """Sorted keys; for a set, none that it has."""
        if not len(keys):
            return
        self._runs.append(keys)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")
            self._runs.append(merged)

    def merge(self, other: "_SortedKeys") -> None:
        """Another set, disjoint from this one."""
        for run in other._runs:
            self.add(run)


@dataclass(frozen=True, kw_only=True)
class _Ingest:
    log: ClickLog
    quarantine: Quarantine
    spec: DatasetSpec
    now: datetime
    seen: SeenKeys


@dataclass(kw_only=True)
class _Counts:
    """Of one file."""

    rows_read: int = 0
    accepted: int = 0
    duplicate: int = 0
    late: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class _Tally:
    """Of all files so far."""

    files_unknown: int
    files_read: int = 0
    files_skipped: int = 0
    files_broken: int = 0
    files_unreadable: int = 0
    rows: _Counts = field(default_factory=_Counts)
    troubled: list[str] = field(default_factory=list)

    def add(self, counts: _Counts) -> None:
        self.files_read += 1
        self.rows.accepted += counts.accepted
        self.rows.duplicate += counts.duplicate
        self.rows.late += counts.late
        self.rows.rejected += counts.rejected
        self.rows.reasons.update(counts.reasons)

    def report(self, log_version: int) -> IngestReport:
        return IngestReport(
            files_read=self.files_read,
            files_skipped=self.files_skipped,
            files_broken=self.files_broken,
            files_unreadable=self.files_unreadable,
            files_unknown=self.files_unknown,
            rows_accepted=self.rows.accepted,
            rows_duplicate=self.rows.duplicate,
            rows_late=self.rows.late,
            rows_rejected=self.rows.rejected,
            reasons=dict(self.rows.reasons),
            troubled_files=tuple(self.troubled[-MAX_TROUBLED_FILES:]),
            log_version=log_version,
        )


def _ingest_file(file: LandingFile, ingest: _Ingest, tally: _Tally) -> None:
    for _ in range(MAX_ATTEMPTS):
        if ingest.log.has_ingested(file.fingerprint) or ingest.quarantine.has_broken(file.fingerprint):
            tally.files_skipped += 1
            return
        try:
            tally.add(_commit_file(file, ingest))
            return
        except BrokenFile as error:
            if _quarantine_file(file, str(error), ingest):
                tally.files_broken += 1
                tally.troubled.append(f"{file.path}: {error}")
                return
        except CommitConflict:
            _catch_up(ingest)
        except (OSError, MemoryError) as error:
            tally.files_unreadable += 1
            tally.troubled.append(f"{file.path}: cannot be opened or read now ({type(error).__name__}: {error})")
            return
    raise DataError(
        f"other processes kept writing to {ingest.log.root} while {file.path} was ingested, {MAX_ATTEMPTS} times in a "
        "row; run one ingest at a time"
    )


def _quarantine_file(file: LandingFile, reason: str, ingest: _Ingest) -> bool:
    """False, if another process got in between."""
    try:
        ingest.quarantine.add_broken(file.path, reason, file.fingerprint, ingest.now)
    except CommitConflict:
        _catch_up(ingest)
        return False
    return True


def _catch_up(ingest: _Ingest) -> None:
    ingest.log.refresh()
    ingest.quarantine.refresh()
    ingest.seen.forget()


def _commit_file(file: LandingFile, ingest: _Ingest) -> _Counts:
    with _writers(file, ingest) as (accepted, rejected):
        counts = _Counts()
        newest_hour = ingest.seen.newest_hour
        only_clicks = _holds_clicks(file, ingest.spec.clicks)
        for batch in read_batches(file, ingest.spec.of_clicks() if only_clicks else ingest.spec):
            for hour, num_rows in _write_batch(batch, ingest, accepted, rejected, counts, only_clicks=only_clicks):
                counts.accepted += num_rows
                counts.late += num_rows if newest_hour is not None and hour < newest_hour else 0
        ingest.quarantine.append(rejected.close(), file.fingerprint, file.path)
        metadata = {"landing_file": file.path, "rows_accepted": counts.accepted, "rows_rejected": counts.rejected}
        ingest.log.append(accepted.close(), file.fingerprint, metadata, counts.rows_read)
        ingest.seen.commit()
        return counts


@contextmanager
def _writers(file: LandingFile, ingest: _Ingest) -> Iterator[tuple[HourFiles, RejectedRows]]:
    """Writers whose files are removed again, if the file does not make it into the log."""
    accepted = ingest.log.write(file.source)
    rejected = ingest.quarantine.write(file.path, ingest.now)
    try:
        yield accepted, rejected
    except BaseException:
        accepted.discard()
        rejected.discard()
        ingest.seen.roll_back()
        raise


def _write_batch(
    batch: RawBatch,
    ingest: _Ingest,
    accepted: HourFiles,
    rejected: RejectedRows,
    counts: _Counts,
    *,
    only_clicks: bool,
) -> Iterator[tuple[int, int]]:
    """Write one batch; yields each hour with the number of rows that were new."""
    parts = list(_validated(batch, ingest, only_clicks=only_clicks))
    bad = [*batch.malformed, *(row for part, _ in parts for row in part.rejected)]
    bad.sort(key=lambda row: row.row or 0)
    rejected.add(bad)
    counts.rows_read += batch.columns.num_rows + len(batch.malformed)
    counts.rejected += len(bad)
    counts.reasons.update(row.kind for row in bad)
    for part, around in parts:
        for hour, rows in _by_hour(part.accepted):
            if ingest.spec.repeats == "keep":
                rows = _with_repeats_apart(hour, rows, ingest.seen)
            new_R = ingest.seen.take_new(hour, rows.column("event_key").to_numpy().view(np.uint64), around)
            num_new = int(new_R.sum())
            counts.duplicate += len(new_R) - num_new
            if num_new:
                accepted.add(hour, rows if num_new == len(new_R) else rows.filter(pa.array(new_R)))
                yield hour, num_new


def _validated(batch: RawBatch, ingest: _Ingest, *, only_clicks: bool) -> Iterator[tuple[Validated, int]]:
    """Impressions, and clicks where they are events of their own; with each, the hours around its own that must not have its
    key: a second click on an impression is a duplicate wherever it falls."""
    spec, now, clicks = ingest.spec, ingest.now, ingest.spec.clicks
    if clicks is None:
        yield validate(batch.columns, spec, now=now, rows=batch.rows, rows_before=ingest.log.rows_read), 0
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


def _with_repeats_apart(hour: int, rows: pa.Table, seen: SeenKeys) -> pa.Table:
    keys_R = seen.tell_repeats_apart(hour, rows.column("event_key").to_numpy().view(np.uint64))
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
