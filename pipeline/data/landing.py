"""The landing folder: files as they arrive, read in batches of bounded size.

Enters: a folder, local or any fsspec address. Leaves: batches of raw columns, text or typed, not yet checked against
the spec; and the rows that could not even be split into columns.

A file that cannot be read to its end raises `BrokenFile`, whatever was yielded before. An `OSError` that leaves here is
the machine's or the network's fault, not the file's.
"""

import csv
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_schemas.click_log import RejectedRow, describe_raw, quote_value, require_columns
from data_schemas.dataset import DatasetSpec
from data_schemas.errors import BrokenFile, DataError

I64 = npt.NDArray[np.int64]
Format = Literal["csv", "jsonl", "parquet"]

SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
"""What a file's name says about its format; text may end in `.gz` as well."""

UNFINISHED_SUFFIXES = (".tmp", ".part", ".crc")
"""Names that others give to what is still being written, or to their own bookkeeping: left alone."""

BATCH_ROWS = 65_536
"""Rows of a JSON Lines or Parquet batch, at most."""

CSV_BLOCK_BYTES = 8 << 20
"""Text of a CSV batch; no row may be longer."""

MAX_LINE_BYTES = 8 << 20
"""A JSON line longer than this breaks its file."""

MAX_PARQUET_CELLS = 2**33
"""Rows times columns of one Parquet file; more is split by its writer."""

MAX_ROWS_PER_BYTE = 50
"""A Parquet file of over a million rows with more rows than this to the byte is a decompression bomb: every event has a
key of its own, and distinct values cannot be packed that tightly."""

MAX_GROUP_BYTES = 2 << 30
"""Uncompressed size of one row group of a Parquet file."""

UNREADABLE = (PermissionError, FileNotFoundError, ConnectionError, TimeoutError, InterruptedError)
"""What a file system raises when it is not the file's content that is at fault."""


@dataclass(frozen=True, kw_only=True)
class LandingFile:
    """A file that arrived."""

    path: str
    """Full path or address."""
    source: str
    """Its name, and 8 hex digits of its path in the landing folder: another for each file of the folder, and the same wherever
    the folder lies."""
    size: int
    """Bytes, as stored."""
    fingerprint: str
    """32 hex digits from path, size and time of change: the same while the file stays as it is."""
    format: Format
    gzipped: bool


@dataclass(frozen=True, kw_only=True)
class Landing:
    """What lies in the landing folder."""

    files: tuple[LandingFile, ...]
    """Sorted by path."""
    unknown: tuple[str, ...]
    """Paths whose suffix names no format that can be read."""


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """Some consecutive rows of a file."""

    columns: pa.Table
    """`[R]`, the columns that the spec needs."""
    rows: I64
    """`[R]` number of each row in its file, from 1."""
    malformed: tuple[RejectedRow, ...] = field(default=())
    """Rows that could not be split into columns."""


def list_landing(landing: str) -> Landing:
    """Every file under `landing`, in its sub-folders too, without hidden and unfinished ones.

    Args:
        landing: a local folder or any fsspec address, such as `s3://bucket/clicks`.

    Raises:
        DataError: there is no such folder, or it cannot be listed.
    """
    try:
        system, root = fsspec.core.url_to_fs(landing)
        system.invalidate_cache()
        if not system.isdir(root):
            raise DataError(f"there is no landing folder {landing!r}; create it, or set 'landing' to where logs arrive")
        entries = system.find(root, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot list the landing folder {landing!r}: {error}; correct 'landing'") from error
    prefix = root.rstrip("/") + "/"
    visible = {path: info for path, info in entries.items() if _is_visible(path.removeprefix(prefix))}
    files = [_describe(system, path, info, path.removeprefix(prefix)) for path, info in sorted(visible.items())]
    unknown = tuple(path for path, found in zip(sorted(visible), files, strict=True) if found is None)
    return Landing(files=tuple(found for found in files if found is not None), unknown=unknown)


def read_batches(file: LandingFile, spec: DatasetSpec) -> Iterator[RawBatch]:
    """The rows of `file`, in order, a bounded number at a time.

    Raises:
        BrokenFile: empty, truncated, corrupt, without a column that the spec names, or of another shape throughout.
        OSError: the file system failed; the file may be good.
    """
    if file.size == 0:
        raise BrokenFile("the file is empty; nothing was written to it")
    with _blaming_content():
        match file.format:
            case "csv":
                yield from _read_csv(file, spec)
            case "jsonl":
                yield from _read_json_lines(file, spec)
            case "parquet":
                yield from _read_parquet(file, spec)


def _is_visible(path: str) -> bool:
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return bool(parts) and not hidden and not path.lower().endswith(UNFINISHED_SUFFIXES)


def _describe(system: Any, path: str, info: dict[str, Any], relative: str) -> LandingFile | None:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    kind = SUFFIXES.get((suffixes[:-1] if gzipped else suffixes)[-1:][0]) if len(suffixes) > gzipped else None
    if kind is None or (gzipped and kind == "parquet"):
        return None
    address = path if _is_local(system) else system.unstrip_protocol(path)
    changed = next((info[name] for name in ("mtime", "etag", "ETag", "LastModified", "updated", "md5") if name in info), "")
    identity = f"{address}|{info['size']}|{changed}"
    source = f"{PurePosixPath(relative).name}-{_digest(relative)[:8]}"
    size, fingerprint = info["size"], _digest(identity)[:32]
    return LandingFile(path=address, source=source, size=size, fingerprint=fingerprint, format=kind, gzipped=gzipped)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


@contextmanager
def _blaming_content() -> Iterator[None]:
    """Turn whatever bad content raises into `BrokenFile`; let failures of the machine pass."""
    try:
        yield
    except (MemoryError, *UNREADABLE):
        raise
    except (pa.ArrowException, zlib.error, EOFError, ValueError, csv.Error) as error:
        raise BrokenFile(f"the file cannot be read: {_first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise BrokenFile(f"the file cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


@contextmanager
def _open(file: LandingFile) -> Iterator[pa.NativeFile]:
    """The file's bytes, unpacked."""
    system, path = fsspec.core.url_to_fs(file.path)
    with pa.OSFile(path) if _is_local(system) else pa.PythonFile(system.open(path, "rb"), mode="r") as stored:
        if not file.gzipped:
            yield stored
            return
        with pa.CompressedInputStream(stored, "gzip") as unpacked:
            yield unpacked


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def _read_csv(file: LandingFile, spec: DatasetSpec) -> Iterator[RawBatch]:
    names = list(spec.file.columns) or _header(file, spec)
    require_columns(names, spec)
    malformed = _MalformedRows(lines_before=0 if spec.file.columns else 1)
    with _open(file) as stream:
        reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(
                use_threads=False, block_size=CSV_BLOCK_BYTES, column_names=list(spec.file.columns) or None
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=spec.file.delimiter, newlines_in_values=True, invalid_row_handler=malformed.collect
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=spec.source_columns(),
                column_types={name: pa.binary() for name in spec.source_columns()},
                strings_can_be_null=False,
            ),
        )
        yield from _number_rows(reader, malformed)


def _header(file: LandingFile, spec: DatasetSpec) -> list[str]:
    with _open(file) as stream:
        start = stream.read(1 << 16)
    text = start.decode("utf-8-sig", errors="replace")  # a byte that is wrong in a row is that row's fault alone
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=spec.file.delimiter)
    return next((row for row in rows if row), [])


class _MalformedRows:
    """Rows with too few or too many values, as the CSV parser meets them: up to a block ahead of the good ones."""

    def __init__(self, *, lines_before: int) -> None:
        self._lines_before = lines_before
        self._waiting: list[RejectedRow] = []

    def collect(self, found: Any) -> str:
        """Called by the parser; `skip` tells it to go on."""
        kind = f"the row has not the {found.expected_columns} values of the header"
        reason = f"the row has {found.actual_columns} values, the header {found.expected_columns}"
        raw = describe_raw({"line": found.text})
        self._waiting.append(RejectedRow(row=found.number - self._lines_before, kind=kind, reason=reason, raw=raw))
        return "skip"

    def number(self, num_good: int, first: int) -> tuple[I64, tuple[RejectedRow, ...]]:
        """Numbers of the next `num_good` rows counted from `first`, and the malformed rows among and before them."""
        among: list[RejectedRow] = []
        skipped = np.array([row.row for row in self._waiting], np.int64)
        # The k-th malformed row from `first` precedes the good rows numbered skipped[k] - first - k and later.
        good_before = skipped - first - np.arange(len(skipped))
        count = int(np.searchsorted(good_before, num_good, side="left"))
        among, self._waiting = self._waiting[:count], self._waiting[count:]
        places = np.arange(num_good)
        shift = np.searchsorted(good_before[:count], places, side="right")
        return first + places + shift, tuple(among)

    def rest(self) -> tuple[RejectedRow, ...]:
        """Those after the last good row."""
        rest, self._waiting = tuple(self._waiting), []
        return rest


def _number_rows(reader: Iterable[pa.RecordBatch], malformed: _MalformedRows) -> Iterator[RawBatch]:
    first, num_good, num_malformed = 1, 0, 0
    empty = None
    for batch in reader:
        rows, among = malformed.number(batch.num_rows, first)
        first += len(rows) + len(among)
        num_good += len(rows)
        num_malformed += len(among)
        empty = batch.slice(0, 0)
        if len(rows) or among:
            yield RawBatch(columns=pa.Table.from_batches([batch]), rows=rows, malformed=among)
    rest = malformed.rest()
    if not num_good and (rest or num_malformed):
        raise BrokenFile(f"no row fits the header: {(rest or among)[0].reason}; check 'delimiter' and 'columns' in [file]")
    if rest and empty is not None:
        yield RawBatch(columns=pa.Table.from_batches([empty]), rows=np.empty(0, np.int64), malformed=rest)


def _read_json_lines(file: LandingFile, spec: DatasetSpec) -> Iterator[RawBatch]:
    lists = {f.source: f.separator for f in spec.logged_categorical() if f.many}
    with _open(file) as stream:
        lines = _number_lines(stream)
        first = list(islice(lines, BATCH_ROWS))
        _require_objects(first, spec)
        for block in chain([first], iter(lambda: list(islice(lines, BATCH_ROWS)), [])):
            yield _parse_lines(block, spec.source_columns(), lists)


def _number_lines(stream: pa.NativeFile) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, numbered from 1."""
    buffered = io.BufferedReader(stream, 1 << 20)
    number = 0
    while line := buffered.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise BrokenFile(f"row {number + 1} is longer than {MAX_LINE_BYTES >> 20} MiB; write one object a line")
        if line.strip():
            number += 1
            yield number, line


def _require_objects(lines: Sequence[tuple[int, bytes]], spec: DatasetSpec) -> None:
    objects = [parsed for _, line in lines if isinstance(parsed := _parse_line(line), dict)]
    if not objects:
        start = quote_value(lines[0][1].strip()) if lines else "nothing"
        raise BrokenFile(f"no line is a JSON object; write one object a line. The file starts with {start}")
    require_columns(list(dict.fromkeys(chain.from_iterable(objects))), spec)


def _parse_line(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return error


def _parse_lines(lines: Sequence[tuple[int, bytes]], names: Sequence[str], lists: dict[str, str]) -> RawBatch:
    rows: list[int] = []
    malformed: list[RejectedRow] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for number, line in lines:
        parsed = _parse_line(line)
        try:
            values = [_as_raw(parsed, name, lists) for name in names]
        except _Unfit as unfit:
            raw = describe_raw({"line": line.strip()})
            malformed.append(RejectedRow(row=number, kind=unfit.kind, reason=unfit.reason, raw=raw))
            continue
        rows.append(number)
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
    types = {name: pa.list_(pa.string()) if name in lists else pa.string() for name in names}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    return RawBatch(columns=table, rows=np.array(rows, np.int64), malformed=tuple(malformed))


class _Unfit(Exception):
    def __init__(self, kind: str, got: object) -> None:
        self.kind = kind
        self.reason = f"{kind}, got {quote_value(got)}"


def _as_raw(parsed: Any, name: str, lists: dict[str, str]) -> str | list[str | None] | None:
    match parsed:
        case orjson.JSONDecodeError():
            raise _Unfit("the line is not JSON", parsed.msg)
        case dict():
            value = parsed.get(name)
        case _:
            raise _Unfit("the line is not a JSON object", parsed)
    if name not in lists:
        return _as_text(value, name)
    if isinstance(value, list):
        return [_as_text(inner, name) for inner in value]
    text = _as_text(value, name)
    return None if text is None else list[str | None](text.split(lists[name]))


def _as_text(value: Any, name: str) -> str | None:
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case _:
            raise _Unfit(f"{name}: is a JSON {type(value).__name__} where one value is expected", value)


def _read_parquet(file: LandingFile, spec: DatasetSpec) -> Iterator[RawBatch]:
    names = spec.source_columns()
    with _open(file) as stream:
        plain = pq.ParquetFile(stream)
        require_columns(plain.schema_arrow.names, spec)
        _refuse_bomb(plain.metadata, file, names)
        reader = pq.ParquetFile(
            stream,
            metadata=plain.metadata,
            read_dictionary=_string_leaves(plain, names),
            page_checksum_verification=True,
        )
        first = 1
        for batch in reader.iter_batches(batch_size=BATCH_ROWS, columns=names):
            rows = np.arange(first, first + batch.num_rows)
            first += batch.num_rows
            yield RawBatch(columns=pa.Table.from_batches([batch]), rows=rows)
        if first - 1 != plain.metadata.num_rows:
            raise BrokenFile(f"the file promises {plain.metadata.num_rows} rows and holds {first - 1}")


def _refuse_bomb(metadata: Any, file: LandingFile, names: Sequence[str]) -> None:
    """A small file can claim, and unpack into, any number of rows: judge it before reading."""
    cells = metadata.num_rows * len(names)
    crowded = metadata.num_rows > max(1_000_000, MAX_ROWS_PER_BYTE * file.size)
    if cells > MAX_PARQUET_CELLS or crowded:
        raise BrokenFile(
            f"the file has {metadata.num_rows} rows in {file.size} bytes, {cells} values in the columns of the spec; "
            f"at most {MAX_PARQUET_CELLS} values, and {MAX_ROWS_PER_BYTE} rows to a byte, are read. Split the file"
        )
    for group in range(metadata.num_row_groups):
        # Not column by column: to ask a column of a footer that is corrupt ends the process, no exception is raised.
        size = metadata.row_group(group).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise BrokenFile(f"row group {group} has {size} bytes, more than {MAX_GROUP_BYTES}; write smaller row groups")


def _string_leaves(plain: pq.ParquetFile, names: Sequence[str]) -> list[str]:
    """String columns, and strings in lists: read as dictionaries, a long text that is repeated is held once."""
    columns = [plain.schema.column(place) for place in range(len(plain.schema))]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY" and column.path.split(".")[0] in names]
