"""The click log and its quarantine: two Delta Lake tables on a local file system.

Enters: accepted rows by hour, rejected rows with reasons. Leaves: column-major Arrow tables of exact ranges of rows.

Data files are written here, by pyarrow and with page checksums, and become visible in one atomic commit of the Delta
log; what was written and not committed is never read. Spark, DuckDB or Trino read the tables as they are. Every commit
carries the fingerprint of the landing file that it came from, so that nothing is taken twice.

Only local paths: data files are synchronised to disk before the commit that names them.
"""

import json
import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, Transaction

from data_schemas.click_log import PARTITION_COLUMNS, RejectedRow, click_log_schema
from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CommitConflict, DataError, SpecError
from pipeline.data.read_ahead import ReadAhead

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

ROW_GROUP_ROWS = 65_536
"""Rows of an hour that are gathered before a row group is written."""

MAX_BUFFERED_BYTES = 192 << 20
"""Rows gathered over all hours; beyond it every hour is written out."""

MAX_OPEN_FILES = 64
"""Hours whose files stay open for more row groups; an hour that comes back later gets another file."""

QUARANTINE_ROWS = 8_192
"""Rejected rows that are gathered before they are written."""

TABLE_PROPERTIES = {
    "delta.checkpointInterval": "50",
    "delta.logRetentionDuration": "interval 365 days",
    "delta.setTransactionRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 30 days",
}
"""A model may come back after a year and ask for the version that it knows; fingerprints of files are kept for good."""

_ROWS_READ = "tidemark-rows-read"
"""Application id that every commit of the click log moves. Delta refuses two commits that move it from one version,
which serialises writers: no two of them can miss each other's event keys. Its number is the count of rows read."""

_REWRITES = "tidemark-rewrites"
"""Name in a commit's metadata of what became of the rows of files that it removed; `lineage` reads it."""

_QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
        pa.field("ingested_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, order=True)
class LogFile:
    """One Parquet file of the click log; all its rows are of one hour."""

    hour: int
    """Event time in whole hours since 1970-01-01T00Z."""
    path: str
    """Relative to the table, as in the Delta log."""
    num_rows: int

    @property
    def source(self) -> str:
        """The landing file that it came from, as it stands in the path; empty where nothing was said."""
        found = re.fullmatch(r"part-(.*)-\d{5,}-[0-9a-f-]{36}\.parquet", Path(self.path).name)
        return found[1] if found else ""


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """Rows `[start, stop)` of a file."""

    file: LogFile
    start: int
    stop: int

    @classmethod
    def whole(cls, file: LogFile) -> "RowRange":
        """All rows of a file."""
        return cls(file=file, start=0, stop=file.num_rows)

    @property
    def num_rows(self) -> int:
        """How many."""
        return self.stop - self.start


class _DeltaLog:
    """A Delta table whose files we write ourselves."""

    def __init__(self, table: DeltaTable, root: Path, partition_by: Sequence[str]) -> None:
        self._table = table
        self._root = root
        self._partition_by = list(partition_by)

    @property
    def root(self) -> Path:
        """Folder of the table."""
        return self._root

    @property
    def table_id(self) -> str:
        """Identity of the table: a log that was deleted and made anew has another."""
        return str(self._table.metadata().id)

    @property
    def version(self) -> int:
        """Version that this object sees; `refresh` moves it."""
        return int(self._table.version())

    def refresh(self) -> None:
        """See what other processes have committed."""
        with _blaming_storage(self._root):
            self._table.update_incremental()

    def active_paths(self) -> set[str]:
        """Files of the version that this object sees, relative to `root`."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        return set(actions.column("path").to_pylist()) if actions.num_rows else set()

    def removed_since(self, moment: datetime) -> set[str]:
        """Files that a commit written since has taken out, by the clock of the disk; readers of older versions may be at them.

        Args:
            moment: aware.
        """
        commits = (path for path in (self._root / "_delta_log").glob("*.json") if path.stat().st_mtime >= moment.timestamp())
        lines = (json.loads(line) for path in commits for line in path.read_text(encoding="utf-8").splitlines())
        return {unquote(action["remove"]["path"]) for action in lines if "remove" in action}

    def has_ingested(self, fingerprint: str) -> bool:
        """Whether a commit carries this fingerprint."""
        return self._table.transaction_version(fingerprint) is not None

    def _commit(
        self,
        actions: Sequence[AddAction],
        transactions: Mapping[str, int],
        metadata: Mapping[str, Any],
        removes: Sequence[RemoveAction] = (),
    ) -> int:
        """All or nothing: where it fails, the files of `actions` are removed; they stay where nobody can tell."""
        before = self.version
        try:
            _synchronise([self._root / action.path for action in actions])
            with _blaming_storage(self._root):
                self._create_transaction([*actions, *removes], transactions, metadata)
                self._table.update_incremental()
        except DataError as error:
            if isinstance(error, CommitConflict) or not self._was_committed(transactions):
                for action in actions:
                    (self._root / action.path).unlink(missing_ok=True)
                raise
        log = self._root / "_delta_log"
        _synchronise([log / f"{version:020d}.json" for version in range(before + 1, self.version + 1)])
        return self.version

    def _create_transaction(
        self, actions: Sequence[AddAction | RemoveAction], transactions: Mapping[str, int], metadata: Mapping[str, Any]
    ) -> None:
        properties = CommitProperties(
            custom_metadata=dict(metadata),
            app_transactions=[Transaction(name, version) for name, version in transactions.items()],
        )
        schema = self._table.schema()
        self._table.create_write_transaction(list(actions), "append", schema, self._partition_by, commit_properties=properties)

    def _was_committed(self, transactions: Mapping[str, int]) -> bool:
        """Look, after a failure that may have come after the commit itself (when a checkpoint was written, say)."""
        with _blaming_storage(self._root):
            self._table = DeltaTable(self._root)
        return all(self._table.transaction_version(name) == version for name, version in transactions.items())


class ClickLog(_DeltaLog):
    """Every accepted row, exactly once, by event hour."""

    @classmethod
    def open_or_create(cls, path: str | Path, spec: DatasetSpec) -> Self:
        """The click log at `path`; an empty one, where there is none.

        Raises:
            SpecError: the table there has other columns than `spec`.
            DataError: the folder cannot be used.
        """
        partition = [pa.field("event_date", pa.string()), pa.field("event_hour", pa.int32())]
        schema = pa.schema([*click_log_schema(spec), *partition])
        table, root = _open_or_create(path, schema, PARTITION_COLUMNS, f"click log of {spec.name}")
        return cls(table, root, click_log_schema(spec))

    def __init__(self, table: DeltaTable, root: Path, schema: pa.Schema) -> None:
        super().__init__(table, root, PARTITION_COLUMNS)
        self._schema = schema
        self.read_ahead: ReadAhead | None = None
        """Asked for a file before it is read."""
        self._files: tuple[str, int, list[LogFile]] | None = None
        """Id of the log, a version and its files; a window asks four times, and a year has thousands."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the data files."""
        return self._schema

    @property
    def rows_read(self) -> int:
        """Rows of all landing files so far, good, bad and duplicate."""
        return int(self._table.transaction_version(_ROWS_READ) or 0)

    def files(self, version: int | None = None) -> list[LogFile]:
        """Active files, sorted by hour and path.

        Args:
            version: None for the one that this object sees.

        Raises:
            DataError: there is no such version, or it is no longer kept.
        """
        if version is None or version == self.version:
            if self._files is None or self._files[:2] != (self.table_id, self.version):
                self._files = self.table_id, self.version, _active_files(self._table)
            return list(self._files[2])
        try:
            return _active_files(DeltaTable(self._root, version=version))
        except DeltaError as error:
            raise DataError(
                f"the click log at {self._root} has no version {version} (it is at {self.version}, and keeps a year); "
                "if it was replaced, start the model anew with another state folder"
            ) from error

    def rewrites(self, old: int, new: int) -> Iterator[Mapping[str, Any]]:
        """What the commits after version `old` up to `new` say of files that they wrote anew, in order.

        Raises:
            DataError: one of these commits is no longer kept.
        """
        for version in range(old + 1, new + 1):
            path = self._root / "_delta_log" / f"{version:020d}.json"
            try:
                actions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            except (OSError, ValueError) as error:
                raise DataError(
                    f"commit {version} of the click log at {self._root} cannot be read ({error}); the log keeps a year. "
                    "Restore it from a backup, or start a new model under another model_name"
                ) from error
            for action in actions:
                yield from action.get("commitInfo", {}).get(_REWRITES, ())

    def rewrite(
        self, rewrites: Sequence[Mapping[str, Any]], added: Sequence[LogFile], removed: Sequence[LogFile], *, data_change: bool
    ) -> int:
        """Put files into the place of others, all at once.

        Args:
            rewrites: what `rewrites` will say of it.
            added: as `HourFiles.close` returned them.
            removed: active files, which stay on disk until they are vacuumed.
            data_change: False where the rows stay as they are.

        Returns:
            The new version.

        Raises:
            CommitConflict, DataError: as `append`; `added` are gone then.
        """
        adds = [replace(self._add(file), data_change=data_change) for file in added]
        removes = [
            RemoveAction(
                path=file.path,
                deletion_timestamp=int(time.time() * 1000),
                data_change=data_change,
                partition_values=_partition_of(file.hour),
            )
            for file in removed
        ]
        transactions = {f"rewrite-{uuid.uuid4()}": 1, _ROWS_READ: self.rows_read}
        return self._commit(adds, transactions, {_REWRITES: list(rewrites)}, removes)

    def append(
        self, files: Sequence[LogFile], app_id: str, metadata: Mapping[str, Any] | None = None, rows_read: int = 0
    ) -> int:
        """Make written files part of the log, all at once.

        Args:
            files: as `HourFiles.close` returned them; may be empty, to remember `app_id` alone.
            app_id: what `has_ingested` will know.
            metadata: shown in the table's history.
            rows_read: rows of the landing file, whatever became of them.

        Returns:
            The new version.

        Raises:
            CommitConflict: another process has committed since this object read the log; `refresh`, and write anew.
            DataError: the disk is full, or the log cannot be written. As with a conflict, `files` are gone.
        """
        actions = [self._add(file) for file in files]
        transactions = {app_id: 1, _ROWS_READ: self.rows_read + rows_read}
        return self._commit(actions, transactions, metadata or {})

    def write(self, source: str = "") -> "HourFiles":
        """A writer of files that `append` can commit.

        Args:
            source: names the landing file, and no other; files of an hour are read in the order of their sources, so that
                the same landing files give the same windows in the same order.
        """
        return HourFiles(self._root, self._schema, source)

    def write_again(self, files: Sequence[LogFile], keep_R: npt.NDArray[np.bool_], source: str) -> list[LogFile]:
        """Puts files with some of their rows into the place of files that are in no log yet, and removes those.

        Args:
            files: of one hour, as `HourFiles.close` returned them.
            keep_R: which rows of `files`, one file after the other.
            source: as of `write`.

        Raises:
            DataError: the disk is full, or a file is gone or damaged; `files` are then as they were.
        """
        kept, start = self.write(source), 0
        try:
            for file in files:
                for rows in self._read_row_groups(file):
                    keep = pa.array(keep_R[start : start + rows.num_rows])
                    start += rows.num_rows
                    kept.add(file.hour, rows.filter(keep))
            again = kept.close()
        except BaseException:
            kept.discard()
            raise
        for file in files:
            (self._root / file.path).unlink(missing_ok=True)
        return again

    @property
    def newest_hour(self) -> int | None:
        """The latest hour that has rows, since 1970-01-01T00Z; None for an empty log."""
        files = self.files()
        return files[-1].hour if files else None

    def size_of(self, file: LogFile) -> int:
        """Bytes on disk."""
        return (self._root / file.path).stat().st_size

    def keys_of(self, files: Sequence[LogFile]) -> U64:
        """Event keys of all rows of `files`."""
        ranges = [RowRange.whole(file) for file in files]
        keys = self.read(ranges, ["event_key"]).column("event_key")
        return keys.to_numpy().view(np.uint64) if len(keys) else np.empty(0, np.uint64)

    def read(self, ranges: Sequence[RowRange], columns: Sequence[str]) -> pa.Table:
        """The rows of `ranges`, in that order.

        String columns are dictionary-encoded, one dictionary a chunk; lists of strings are not.

        Row groups outside a range are not read. Every page's checksum is verified.

        Raises:
            DataError: a file is missing or corrupt; it is named.
        """
        encoded = [name for name in columns if pa.types.is_string(self._schema.field(name).type)]
        ahead = [self._taken_ahead(range_, columns) for range_ in ranges]
        parts = [
            self._read_range(range_, list(columns), encoded) if table is None else table
            for range_, table in zip(ranges, ahead, strict=True)
        ]
        return pa.concat_tables(parts) if parts else self._empty(columns)

    def read_parts(self, parts: Iterable[tuple[RowRange, npt.NDArray[np.bool_] | None]], columns: Sequence[str]) -> pa.Table:
        """As `read`, of each range only the rows that its mask has; None: all of them."""
        tables = [self.read([], columns)]
        for rows, mask in parts:
            table = self.read([rows], columns)
            tables.append(table if mask is None else table.filter(pa.array(mask)))
        return pa.concat_tables(tables[1:] or tables)

    def _taken_ahead(self, wanted: RowRange, columns: Sequence[str]) -> pa.Table | None:
        table = self.read_ahead.take(self._root / wanted.file.path, columns) if self.read_ahead else None
        return None if table is None else table.slice(wanted.start, wanted.num_rows)

    def _read_row_groups(self, file: LogFile) -> Iterator[pa.Table]:
        path = self._root / file.path
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as stored:
                for group in range(stored.num_row_groups):
                    yield stored.read_row_group(group).cast(self._schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            raise DataError(
                f"{path}, which was just written, cannot be read: {_first_line(error)}. Nothing was committed; run the ingest "
                "again"
            ) from error

    def row_groups(self, file: LogFile) -> list[RowRange]:
        """The parts of a file that can be read by themselves, in order.

        Raises:
            DataError: the file is missing or corrupt; it is named.
        """
        with self._blaming(file), pq.ParquetFile(self._root / file.path) as parquet:
            metadata = parquet.metadata
            ends = np.cumsum([metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)]).tolist()
        return [RowRange(file=file, start=start, stop=stop) for start, stop in zip([0, *ends], ends, strict=False)]

    def _read_range(self, wanted: RowRange, columns: list[str], encoded: list[str]) -> pa.Table:
        path = self._root / wanted.file.path
        with self._blaming(wanted.file), pq.ParquetFile(path, read_dictionary=encoded, page_checksum_verification=True) as file:
            if file.metadata.num_rows != wanted.file.num_rows:
                raise pa.ArrowInvalid(f"{file.metadata.num_rows} rows instead of {wanted.file.num_rows}")
            groups, skipped = _overlapping(file.metadata, wanted)
            # One group at a time: Arrow cannot read lists of strings that need more than one chunk.
            read = [file.read_row_group(group, columns=columns) for group in groups]
        table = pa.concat_tables(read) if read else self._empty(columns)
        return table.select(columns).slice(wanted.start - skipped, wanted.num_rows)

    @contextmanager
    def _blaming(self, file: LogFile) -> Iterator[None]:
        """Names the file that cannot be read."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            raise DataError(
                f"the click log's file {self._root / file.path} cannot be read: {_first_line(error)}. Restore it from a "
                "backup, or start a new click log and a new model in another state_dir from the landing files"
            ) from error

    def _empty(self, columns: Sequence[str]) -> pa.Table:
        return pa.schema([_encoded_field(self._schema.field(name)) for name in columns]).empty_table()

    def _add(self, file: LogFile) -> AddAction:
        return AddAction(
            path=file.path,
            size=(self._root / file.path).stat().st_size,
            partition_values=_partition_of(file.hour),
            modification_time=int(time.time() * 1000),
            data_change=True,
            stats=json.dumps({"numRecords": file.num_rows}),
        )


class HourFiles:
    """Writes rows of many hours, in any order, in bounded memory; one file an hour, more where hours come and go."""

    def __init__(self, root: Path, schema: pa.Schema, source: str) -> None:
        self._root = root
        self._schema = schema
        self._source = re.sub(r"[^A-Za-z0-9-]+", "-", source)[-80:]
        self._buffers: dict[int, list[pa.Table]] = {}
        self._rows: dict[int, int] = {}
        self._buffered_bytes = 0
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._written: list[LogFile] = []
        self._paths: list[Path] = []

    def add(self, hour: int, rows: pa.Table) -> None:
        """Rows of one hour, in the schema of the log.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        self._buffers.setdefault(hour, []).append(rows)
        self._rows[hour] = self._rows.get(hour, 0) + rows.num_rows
        self._buffered_bytes += rows.nbytes
        if self._rows[hour] >= ROW_GROUP_ROWS:
            self._flush(hour)
        if self._buffered_bytes > MAX_BUFFERED_BYTES:
            for waiting in sorted(self._buffers):
                self._flush(waiting)

    def close(self) -> list[LogFile]:
        """Finish every file. They are on disk, in no log yet, and no longer this writer's to discard."""
        for hour in sorted(self._buffers):
            self._flush(hour)
        while self._open:
            self._finish(*self._open.popitem())
        self._paths.clear()
        return sorted(self._written)

    def discard(self) -> None:
        """Remove every file written since the start; nobody has seen them."""
        for open_file in self._open.values():
            open_file.abandon()
        self._open.clear()
        self._buffers.clear()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _flush(self, hour: int) -> None:
        tables = self._buffers.pop(hour)
        self._buffered_bytes -= sum(table.nbytes for table in tables)
        self._rows[hour] = 0
        if hour not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._finish(*self._open.popitem(last=False))
            moment = _moment_of(hour)
            relative = f"event_date={moment:%Y-%m-%d}/event_hour={moment.hour}"
            relative += f"/part-{self._source}-{len(self._paths):05d}-{uuid.uuid4()}.parquet"
            self._paths.append(self._root / relative)
            self._open[hour] = _OpenFile(self._root, relative, self._schema)
        self._open.move_to_end(hour)
        self._open[hour].write(pa.concat_tables(tables))

    def _finish(self, hour: int, open_file: "_OpenFile") -> None:
        num_rows = open_file.close()
        self._written.append(LogFile(hour=hour, path=open_file.relative, num_rows=num_rows))


class Quarantine(_DeltaLog):
    """Every row and file that did not enter the click log, with the reason."""

    @classmethod
    def open_or_create(cls, path: str | Path) -> Self:
        """The quarantine at `path`; an empty one, where there is none.

        Raises:
            SpecError: the table there is something else.
            DataError: the folder cannot be used.
        """
        table, root = _open_or_create(path, _QUARANTINE_SCHEMA, (), "quarantine")
        return cls(table, root, ())

    def has_broken(self, fingerprint: str) -> bool:
        """Whether the file was quarantined whole, as it was then."""
        return self.has_ingested(f"broken-{fingerprint}")

    def add_broken(self, file: str, reason: str, fingerprint: str, now: datetime) -> None:
        """Remember that a file cannot be read, so that it is not tried again until it changes."""
        rows = self.write(file, now)
        rows.add([RejectedRow(row=None, kind=reason, reason=reason, raw="")])
        self._append(rows.close(), f"broken-{fingerprint}", {"file": file})

    def append(self, written: Sequence[str], fingerprint: str, file: str) -> None:
        """Make the rejected rows of `file` visible; once, however often it is called.

        Raises:
            CommitConflict: another process has quarantined the same file at the same time.
        """
        self._append(written, fingerprint, {"file": file})

    def write(self, file: str, now: datetime) -> "RejectedRows":
        """A writer of rejected rows of `file`."""
        return RejectedRows(self._root, file, now)

    def remove_older(self, moment: datetime, *, dry_run: bool = False) -> list[str]:
        """Takes out the rows of files that came before `moment` (aware); the files, relative to `root`, stay on disk."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        if not actions.num_rows:
            return []
        came = zip(actions.column("path").to_pylist(), actions.column("modification_time").to_pylist(), strict=True)
        old = [path for path, at_ms in came if at_ms < 1000 * moment.timestamp()]
        if old and not dry_run:
            now = int(time.time() * 1000)
            removes = [RemoveAction(path=p, deletion_timestamp=now, data_change=True, partition_values={}) for p in old]
            self._commit([], {f"retention-{uuid.uuid4()}": 1}, {}, removes)
        return old

    def rows(self) -> pa.Table:
        """All of it, newest commits last: `file`, `row`, `reason`, `raw`, `ingested_at`."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        paths = actions.sort_by("modification_time").column("path").to_pylist()
        parts = [pq.read_table(self._root / path, page_checksum_verification=True, partitioning=None) for path in paths]
        return pa.concat_tables(parts) if parts else _QUARANTINE_SCHEMA.empty_table()

    def _append(self, written: Sequence[str], app_id: str, metadata: Mapping[str, Any]) -> None:
        if self.has_ingested(app_id):
            for path in written:
                (self._root / path).unlink(missing_ok=True)
            return
        actions = [
            AddAction(
                path=path,
                size=(self._root / path).stat().st_size,
                partition_values={},
                modification_time=int(time.time() * 1000),
                data_change=True,
                stats=json.dumps({"numRecords": pq.read_metadata(self._root / path).num_rows}),
            )
            for path in written
        ]
        self._commit(actions, {app_id: 1}, metadata)


class RejectedRows:
    """Writes rejected rows in bounded memory."""

    def __init__(self, root: Path, file: str, now: datetime) -> None:
        self._root = root
        self._file = file
        self._now = now
        self._waiting: list[RejectedRow] = []
        self._open: _OpenFile | None = None

    def add(self, rows: Sequence[RejectedRow]) -> None:
        """Rows of the file, in its order.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        self._waiting += rows
        if len(self._waiting) >= QUARANTINE_ROWS:
            self._flush()

    def close(self) -> list[str]:
        """Paths of the files written, relative to the table, and no longer this writer's to discard."""
        if self._waiting:
            self._flush()
        if self._open is None:
            return []
        self._open.close()
        written, self._open = [self._open.relative], None
        return written

    def discard(self) -> None:
        """Remove what was written; nobody has seen it."""
        if self._open is not None:
            self._open.abandon()
            (self._root / self._open.relative).unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._open is None:
            self._open = _OpenFile(self._root, f"part-{uuid.uuid4()}.parquet", _QUARANTINE_SCHEMA)
        columns = {
            "file": [_storable(self._file)] * len(self._waiting),
            "row": [row.row for row in self._waiting],
            "reason": [_storable(row.reason) for row in self._waiting],
            "raw": [row.raw for row in self._waiting],
            "ingested_at": [self._now.astimezone(UTC)] * len(self._waiting),
        }
        self._open.write(pa.table(columns, schema=_QUARANTINE_SCHEMA))
        self._waiting = []


class _OpenFile:
    """A Parquet file that is being written, with page checksums."""

    def __init__(self, root: Path, relative: str, schema: pa.Schema) -> None:
        self.relative = relative
        self._num_rows = 0
        self._path = root / relative
        repeated = [_leaf(field) for field in schema if field.name != "event_key" and not pa.types.is_floating(field.type)]
        with _blaming_storage(root):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._path, schema, compression="snappy", use_dictionary=repeated, write_page_checksum=True
            )

    def write(self, rows: pa.Table) -> None:
        with _blaming_storage(self._path):
            self._writer.write_table(rows, row_group_size=2 * ROW_GROUP_ROWS)
        self._num_rows += rows.num_rows

    def close(self) -> int:
        with _blaming_storage(self._path):
            self._writer.close()
        return self._num_rows

    def abandon(self) -> None:
        """Let go of the file, whatever state it is in; it will be removed."""
        try:
            self._writer.close()
        except (OSError, pa.ArrowException):
            return


def _open_or_create(
    path: str | Path, schema: pa.Schema, partition_by: Sequence[str], description: str
) -> tuple[DeltaTable, Path]:
    if "://" in str(path):
        raise DataError(f"the {description} must be in a local folder, got {str(path)!r}; landing folders may be remote")
    root = Path(path).resolve()
    with _blaming_storage(root):
        root.mkdir(parents=True, exist_ok=True)
        table = _open_table(root) or _create_table(root, schema, partition_by, description)
    _require_schema(table, schema, root)
    return table, root


def _open_table(root: Path) -> DeltaTable | None:
    try:
        return DeltaTable(root)
    except TableNotFoundError:
        return None


def _create_table(root: Path, schema: pa.Schema, partition_by: Sequence[str], description: str) -> DeltaTable:
    try:
        return DeltaTable.create(
            root,
            Schema.from_arrow(schema),
            mode="error",
            partition_by=list(partition_by),
            description=description,
            configuration=TABLE_PROPERTIES,
        )
    except DeltaError:
        created_meanwhile = _open_table(root)
        if created_meanwhile is None:
            raise
        return created_meanwhile


def _require_schema(table: DeltaTable, schema: pa.Schema, root: Path) -> None:
    stored = {field["name"]: field["type"] for field in json.loads(table.schema().to_json())["fields"]}
    declared = {field["name"]: field["type"] for field in json.loads(Schema.from_arrow(schema).to_json())["fields"]}
    if stored == declared:
        return
    gone = sorted(stored.keys() - declared.keys())
    new = sorted(declared.keys() - stored.keys())
    changed = sorted(name for name in stored.keys() & declared.keys() if stored[name] != declared[name])
    raise SpecError(
        f"the table at {root} was written with another spec: columns gone {gone}, new {new}, of another type "
        f"{changed}. Give the new spec a state folder of its own and ingest the landing files there, or restore the "
        "old spec"
    )


@contextmanager
def _blaming_storage(place: Path) -> Iterator[None]:
    """Turn failures of the disk and of the Delta log into errors of ours."""
    try:
        yield
    except CommitFailedError as error:
        raise CommitConflict(f"another process wrote to {place} at the same time: {_first_line(error)}; retry") from error
    except (OSError, DeltaError) as error:
        raise DataError(
            f"cannot write to {place}: {_first_line(error)}. Nothing was committed and nothing is lost; free space or "
            "correct the folder's permissions, and run again"
        ) from error


def _synchronise(paths: Sequence[Path]) -> None:
    """Force files and the folders that hold them to disk."""
    folders = {path.parent for path in paths} | {path.parent.parent for path in paths}
    for path in chain(paths, sorted(folders)):
        with _blaming_storage(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _active_files(table: DeltaTable) -> list[LogFile]:
    actions = pa.table(table.get_add_actions(flatten=True))
    if not actions.num_rows:
        return []
    names = ["path", "num_records", "partition.event_date", "partition.event_hour"]
    rows = zip(*(actions.column(name).to_pylist() for name in names), strict=True)
    return sorted(LogFile(hour=_hour_of(date, hour), path=path, num_rows=num) for path, num, date, hour in rows)


def _hour_of(date: str, hour: int) -> int:
    return int(np.datetime64(date, "h").astype(np.int64)) + hour


def _moment_of(hour: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=hour)


def _partition_of(hour: int) -> dict[str, str | None]:
    moment = _moment_of(hour)
    return {"event_date": f"{moment:%Y-%m-%d}", "event_hour": str(moment.hour)}


def _overlapping(metadata: Any, wanted: RowRange) -> tuple[list[int], int]:
    """Row groups that hold rows of the range, and the number of rows before the first of them."""
    ends = np.cumsum([metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
    groups = [int(g) for g in np.flatnonzero((starts < wanted.stop) & (ends > wanted.start))]
    return groups, int(starts[groups[0]]) if groups else wanted.start


def _encoded_field(field: pa.Field) -> pa.Field:
    return field.with_type(pa.dictionary(pa.int32(), pa.string())) if pa.types.is_string(field.type) else field


def _leaf(field: pa.Field) -> str:
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def _storable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
