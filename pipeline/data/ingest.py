"""From the landing folder to the click log, exactly once.

Enters: files of click logs. Leaves: their good rows in the click log, each in its own hour; their bad rows and the
broken files in the quarantine; and a report that accounts for every row and every file.

A file is first staged, here or in other processes: read, checked and written beside the log. Then it is one commit; files
are committed in their order, by one process. The quarantine is committed first, both commits carry the file's
fingerprint: after a kill between the two the file is read again, and nothing is there twice.

Rows with an event key that their hour has already are duplicates. Where the spec keeps repeats, the number of the row
among those of its file with the same hour and key is mixed into the key, except for the first: only a row that an
earlier file had as often is then a duplicate.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CommitConflict, DataError
from pipeline.data.event_keys import SeenKeys
from pipeline.data.lake import ClickLog, LogFile, Quarantine
from pipeline.data.landing import LandingFile, list_landing
from pipeline.data.staging import Destination, StagedFile, UnstagedFile, remove, stage_file

Bools = npt.NDArray[np.bool_]

MAX_ATTEMPTS = 5
"""How often a file is read again because another process wrote to the log meanwhile."""

MAX_TROUBLED_FILES = 20
"""Files that a report names."""

Stage = Callable[[LandingFile], StagedFile | UnstagedFile]
Spread = Callable[[Stage, Iterable[LandingFile]], Iterator[StagedFile | UnstagedFile]]
"""As `map`: what the function makes of each file, in their order; it may do so ahead, in other processes and machines."""


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
    spread: Spread = map,
) -> IngestReport:
    """Bring everything new under `landing` into the click log.

    Args:
        landing: a local folder or any fsspec address.
        now: aware; the clock that future times are judged by.
        progress: called after each file with the number done and the number of all.
        spread: where files are staged; by itself, here and one after the other. The log is the same, whatever it is.

    Raises:
        DataError: there is no such folder, or the log cannot be written (a full disk, say). What was committed before
            stays; the rest comes with the next call.
    """
    log.refresh()
    quarantine.refresh()
    listing = list_landing(landing)
    tally = _Tally(files_unknown=len(listing.unknown))
    tally.troubled += [f"{path}: the name tells no known format" for path in listing.unknown]
    ingest = _Ingest(log=log, quarantine=quarantine, spec=spec, now=now, seen=SeenKeys(log))
    new = [file for file in listing.files if not ingest.knows(file)]
    tally.files_skipped += len(listing.files) - len(new)
    if progress and tally.files_skipped:
        progress(tally.files_skipped, len(listing.files))
    # A row's time depends on the files before its own where it is its place in the stream.
    staged = map(ingest.stage, new) if spec.time.format == "row_order" else spread(partial(stage_file, into=ingest.into), new)
    for done, file in enumerate(staged, start=len(listing.files) - len(new) + 1):
        _ingest_file(file, ingest, tally)
        if progress:
            progress(done, len(listing.files))
    return tally.report(log.version)


@dataclass(frozen=True, kw_only=True)
class _Ingest:
    log: ClickLog
    quarantine: Quarantine
    spec: DatasetSpec
    now: datetime
    seen: SeenKeys

    @property
    def into(self) -> Destination:
        return Destination(
            log_root=self.log.root,
            log_schema=self.log.schema,
            quarantine_root=self.quarantine.root,
            spec=self.spec,
            now=self.now,
        )

    def knows(self, file: LandingFile) -> bool:
        return self.log.has_ingested(file.fingerprint) or self.quarantine.has_broken(file.fingerprint)

    def stage(self, file: LandingFile) -> StagedFile | UnstagedFile:
        """In this process, now."""
        return stage_file(file, self.into, self.log.rows_read)

    def catch_up(self) -> None:
        """See what other processes have committed."""
        self.log.refresh()
        self.quarantine.refresh()
        self.seen.forget()


@dataclass(kw_only=True)
class _Counts:
    """Of one file, or of all."""

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

    def leave(self, file: UnstagedFile) -> None:
        self.files_broken += file.broken
        self.files_unreadable += not file.broken
        self.troubled.append(f"{file.landing.path}: {file.reason}")

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


def _ingest_file(staged: StagedFile | UnstagedFile, ingest: _Ingest, tally: _Tally) -> None:
    file = staged.landing
    for attempt in range(MAX_ATTEMPTS):
        if ingest.knows(file):
            tally.files_skipped += 1
            _discard(staged, ingest)
            return
        if attempt:
            staged = ingest.stage(file)
        try:
            if isinstance(staged, StagedFile):
                tally.add(_commit_file(staged, ingest))
                return
            if staged.broken:
                ingest.quarantine.add_broken(file.path, staged.reason, file.fingerprint, ingest.now)
            tally.leave(staged)
            return
        except CommitConflict:
            ingest.catch_up()
    raise DataError(
        f"other processes kept writing to {ingest.log.root} while {file.path} was ingested, {MAX_ATTEMPTS} times in a "
        "row; run one ingest at a time"
    )


def _commit_file(staged: StagedFile, ingest: _Ingest) -> _Counts:
    """Where it fails, nothing of the file is in the log, and nothing waits beside it."""
    file = staged.landing
    try:
        counts, files = _only_new(staged, ingest)
        with _removing(ingest.log.root, [written.path for written in files]):
            ingest.quarantine.append(staged.rejected, file.fingerprint, file.path)
        metadata = {"landing_file": file.path, "rows_accepted": counts.accepted, "rows_rejected": counts.rejected}
        ingest.log.append(files, file.fingerprint, metadata, staged.rows_read)
    except BaseException:
        ingest.seen.roll_back()
        raise
    ingest.seen.commit()
    return counts


def _only_new(staged: StagedFile, ingest: _Ingest) -> tuple[_Counts, list[LogFile]]:
    """The staged files, and in the place of those with duplicates others without."""
    waiting = {written.path for written in staged.accepted}
    with _removing(ingest.log.root, waiting), _removing(ingest.quarantine.root, staged.rejected):
        counts, is_new_by_hour = _judge(staged, ingest)
        files = list[LogFile]()
        for hour, is_new_R in is_new_by_hour.items():
            written = [file for file in staged.accepted if file.hour == hour]
            if not is_new_R.all():
                written = ingest.log.write_again(written, is_new_R, staged.landing.source)
                waiting |= {file.path for file in written}
            files += written
    return counts, sorted(files)


def _judge(staged: StagedFile, ingest: _Ingest) -> tuple[_Counts, dict[int, Bools]]:
    """By hour, which rows are new, in the order in which they are written."""
    newest_hour = ingest.seen.newest_hour
    counts = _Counts(rejected=staged.rows_rejected, reasons=Counter(staged.reasons))
    is_new: dict[int, list[Bools]] = {}
    for offer in staged.offers:
        is_new_R = ingest.seen.take_new(offer.hour, offer.keys_R, offer.around)
        num_new = int(is_new_R.sum())
        counts.accepted += num_new
        counts.duplicate += len(is_new_R) - num_new
        counts.late += num_new if newest_hour is not None and offer.hour < newest_hour else 0
        is_new.setdefault(offer.hour, []).append(is_new_R)
    return counts, {hour: np.concatenate(parts) for hour, parts in is_new.items()}


def _discard(staged: StagedFile | UnstagedFile, ingest: _Ingest) -> None:
    if isinstance(staged, StagedFile):
        remove(ingest.log.root, (written.path for written in staged.accepted))
        remove(ingest.quarantine.root, staged.rejected)


@contextmanager
def _removing(root: Path, paths: Collection[str]) -> Iterator[None]:
    """Where what happens inside fails, these files are removed; `paths` may grow meanwhile."""
    try:
        yield
    except BaseException:
        remove(root, paths)
        raise
