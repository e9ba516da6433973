"""Rows as they arrive, to rows as the click log keeps them.

Enters: Arrow tables with the columns of a landing file, either text (CSV, JSON Lines) or typed (Parquet).
Leaves: the rows that fit the spec, in the schema of the click log; and every other row with its reason.

Everything is decided once per distinct value of a column and then spread over the rows.

Letters: R rows, D distinct values of a column, V values of all lists of a column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.dataset import Categorical, DatasetSpec, LabelColumn, Numeric, TimeColumn
from data_schemas.errors import BrokenFile, SpecError
from data_schemas.hashing import MISSING, combine_hashes, hash_ids, mix64

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]

PARTITION_COLUMNS = ("event_date", "event_hour")
"""Delta partitions by these; they are in the paths, not in the files."""

MAX_ID_BYTES = 1024
"""A string id longer than this rejects its row."""

FUTURE_TOLERANCE = timedelta(minutes=60)
"""Clocks differ: an event may be this far ahead of ours."""

MICROSECONDS_PER_HOUR = 3_600_000_000
_LAST_MICROSECOND = 253_402_300_799_999_999  # 9999-12-31T23:59:59.999999Z
_RAW_BYTES = 4096
_REJECTED_AT_ONCE = 64
"""Rows made into Python objects at a time: a text of a megabyte, which a dictionary holds once, is then one in each row."""
_CLICK = 0x636C69636B
_NULL_NUMBERS = ("", "nan")


@dataclass(frozen=True, kw_only=True)
class RejectedRow:
    """A row that did not enter the click log."""

    row: int | None
    """Number in its file, from 1, header and empty lines not counted; None: the whole file."""
    kind: str
    """The reason without the value: what is counted."""
    reason: str
    """Names the column and the value."""
    raw: str
    """The row as it came, cut to 4 KiB."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    """What became of the rows of one table."""

    accepted: pa.Table
    """In the schema of `click_log_schema`, in the order of the file."""
    rejected: tuple[RejectedRow, ...]
    """In the order of the file."""


def click_log_schema(spec: DatasetSpec) -> pa.Schema:
    """Columns of the click log's Parquet files.

    `event_time`, `label` (absent in a log of clicks only), `event_key` (64-bit hash, the bits of a uint64), `is_click` (only
    where clicks are events of their own, which then have neither features nor the key of their impression, but
    `click_keys` of it), then one column a feature. A missing id or number is null, a missing list is empty.

    >>> from data_schemas.dataset import load_spec
    >>> click_log_schema(load_spec("brunch")).names
    ['event_time', 'label', 'event_key', 'user_id', 'item_id', 'author_id']
    """
    fields = [pa.field("event_time", pa.timestamp("us", tz="UTC"), nullable=False)]
    if spec.has_labels:
        fields.append(pa.field("label", pa.int8(), nullable=False))
    fields.append(pa.field("event_key", pa.int64(), nullable=False))
    if spec.clicks:
        fields.append(pa.field("is_click", pa.bool_(), nullable=False))
    fields += [pa.field(feature.name, _stored_type(feature)) for feature in spec.logged_categorical()]
    fields += [pa.field(feature.name, pa.float32()) for feature in spec.numeric]
    return pa.schema(fields)


def validate(raw: pa.Table, spec: DatasetSpec, *, now: datetime, rows: I64, rows_before: int = 0) -> Validated:
    """Split `raw` into rows that fit the spec and rows that do not.

    Args:
        raw: at least the columns of `spec.source_columns()`; others are ignored.
        now: aware; events more than an hour after it are rejected.
        rows: `[R]` number of each row in its file, from 1, rising.
        rows_before: rows of all files before this one, which `row_order` times count on from.

    Raises:
        BrokenFile: a column is missing, or has a type that can hold no such value.
        SpecError: the time format is not a strptime pattern.
    """
    require_columns(raw.column_names, spec)
    texts = _Columns(raw)
    times = _coerce_times(texts, spec.time, now, rows + rows_before)
    checked = [times]
    label = _coerce_label(texts, spec.label) if spec.label else None
    if label:
        checked.append(label)
    features = {f.name: _coerce_categorical(texts, f) for f in spec.logged_categorical()}
    features |= {f.name: _coerce_numeric(texts, f) for f in spec.numeric}
    key = _event_key(texts, spec, times, [*([label] if label else []), *features.values()])
    checked += [*features.values(), key]
    good_R = ~np.logical_or.reduce([column.problem_R > 0 for column in checked])
    columns = {"event_time": times.values, "event_key": key.values}
    if spec.clicks:
        columns["is_click"] = pa.repeat(False, raw.num_rows)
    if spec.has_labels:
        columns["label"] = label.values if label else pa.repeat(pa.scalar(0, pa.int8()), raw.num_rows)
    columns |= {name: column.values for name, column in features.items()}
    return Validated(accepted=_accepted(columns, spec, good_R), rejected=_rejected(raw, checked, good_R, rows))


def validate_clicks(raw: pa.Table, spec: DatasetSpec, *, now: datetime, rows: I64) -> Validated:
    """`validate` for clicks that are events of their own: rows with a time, a key and nulls.

    Args:
        raw: at least the columns of `spec.of_clicks().source_columns()`.
        spec: with `clicks`.
        now: aware.
        rows: `[R]` number of each row in its file, from 1, rising.
    """
    validated = validate(raw, spec.of_clicks(), now=now, rows=rows)
    found, num_rows = validated.accepted, validated.accepted.num_rows
    own = {
        "event_time": found["event_time"],
        "event_key": pa.array(click_keys(found["event_key"].to_numpy().view(np.uint64)).view(np.int64)),
        "is_click": pa.repeat(True, num_rows),
        "label": pa.repeat(pa.scalar(1, pa.int8()), num_rows),
    }
    schema = click_log_schema(spec)
    columns = [own[field.name] if field.name in own else pa.nulls(num_rows, field.type) for field in schema]
    return replace(validated, accepted=pa.table(columns, schema=schema))


def click_keys(impression_keys_R: U64) -> U64:
    """`[R]` the event keys that clicks on these impressions have in the click log: their own, since both lie in one table."""
    return combine_hashes(impression_keys_R, np.full(len(impression_keys_R), _CLICK, np.uint64))


def require_columns(found: Sequence[str], spec: DatasetSpec) -> None:
    """Check that a file has what the spec names.

    Raises:
        BrokenFile: it does not; the message lists what is missing and what was found.
    """
    missing = [name for name in spec.source_columns() if name not in found]
    if missing:
        raise BrokenFile(
            f"the file lacks the columns {missing} of the spec {spec.name!r}; it has {_shorten(str([*found]), 400)}. "
            "Correct 'column' or [file] in the spec's TOML, or the file, and let it arrive again"
        )
    twice = sorted({name for name in spec.source_columns() if list(found).count(name) > 1})
    if twice:
        raise BrokenFile(f"the file has more than one column called {twice}; give each its own name")


def describe_raw(row: Mapping[str, Any]) -> str:
    """A raw row as JSON of at most 4 KiB, for the quarantine."""
    text = orjson.dumps({name: _printable(value) for name, value in row.items()}, default=str)
    return str(text[:_RAW_BYTES], "utf-8", "ignore")


def quote_value(value: object) -> str:
    """A value as a reason shows it: quoted, and shortened to 60 characters."""
    return _shorten(repr(_printable(value)), 60)


@dataclass(frozen=True, kw_only=True)
class _Coerced:
    """One column, coerced."""

    column: str
    """Name in the file."""
    values: pa.Array
    """`[R]`; null where missing or wrong."""
    problem_R: Codes
    """0: the value is fine; k: `problems[k - 1]`."""
    problems: tuple[str, ...]
    hashes_R: U64
    """Part of an event key: equal for equal values, whatever format they came in."""


class _Columns:
    """The columns of a raw table, each encoded once."""

    def __init__(self, raw: pa.Table) -> None:
        self._raw = raw
        self._texts: dict[str, _Texts] = {}
        self.num_rows = raw.num_rows

    def native(self, name: str) -> pa.Array:
        """`[R]` as it came, in one piece."""
        return _in_one_piece(self._raw.column(name))

    def texts(self, name: str) -> "_Texts":
        """`[R]` as text."""
        if name not in self._texts:
            self._texts[name] = _encode_texts(self.native(name), name)
        return self._texts[name]


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """A text column: distinct values, and which one each row has."""

    distinct: pa.Array
    """`[D] string`; empty where `invalid_D`."""
    invalid_D: npt.NDArray[np.bool_]
    """Not UTF-8."""
    index_R: I64
    """D for a missing value."""

    def spread(self, values_D: pa.Array) -> pa.Array:
        """`[R]` from `[D]`."""
        missing_R = self.index_R == len(self.distinct)
        return values_D.take(pa.array(self.index_R, mask=missing_R if missing_R.any() else None))

    def spread_codes(self, codes_D: Codes, *, missing: int = 0) -> Codes:
        """`[R]` from `[D]`; rows without a value have the code `missing`."""
        codes: Codes = np.append(codes_D, np.uint8(missing))[self.index_R]
        return codes


_NOT_UTF8 = "is not valid UTF-8"


def _stored_type(feature: Categorical) -> pa.DataType:
    single = pa.int64() if feature.type == "integer" else pa.string()
    return pa.list_(single) if feature.many else single


def _in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_null(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _encode_texts(column: pa.Array, name: str) -> _Texts:
    if not _is_text(column.type):
        column = _as_strings(column, name)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    distinct, invalid_D = _decode(encoded.dictionary)
    index_R = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False).astype(np.int64)
    absent_D = pc.is_null(distinct).to_numpy(zero_copy_only=False)
    if absent_D.any():
        index_R[np.append(absent_D, False)[index_R]] = len(distinct)
    return _Texts(distinct=distinct.fill_null(""), invalid_D=invalid_D, index_R=index_R)


def _as_strings(column: pa.Array, name: str) -> pa.Array:
    """Numbers, booleans and times as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BrokenFile(
            f"column {name!r} has type {column.type}, which holds no single id or number; "
            "flatten it, or declare a list of ids with 'many = true'"
        ) from error


def _decode(distinct: pa.Array) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    invalid_D = np.zeros(len(distinct), bool)
    try:
        return distinct.cast(pa.string()), invalid_D
    except pa.ArrowInvalid:
        texts = [_decode_one(value) for value in distinct.to_pylist()]
        invalid_D = np.array([text is None for text in texts])
        return pa.array(["" if text is None else text for text in texts], pa.string()), invalid_D


def _decode_one(value: bytes | None) -> str | None:
    try:
        return (value or b"").decode()
    except UnicodeDecodeError:
        return None


def _coerce_categorical(columns: _Columns, feature: Categorical) -> _Coerced:
    if feature.many:
        return _coerce_lists(columns.native(feature.source), feature)
    native = columns.native(feature.source)
    if feature.type == "string":
        return _coerce_strings(columns.texts(feature.source), feature.source)
    if pa.types.is_integer(native.type) and native.type != pa.uint64():
        values = native.cast(pa.int64())
        return _Coerced(
            column=feature.source, values=values, problem_R=_no_problem(values), problems=(), hashes_R=hash_ids(values)
        )
    return _coerce_integers(columns.texts(feature.source), feature.source)


def _coerce_strings(texts: _Texts, column: str) -> _Coerced:
    long_D = pc.greater(pc.binary_length(texts.distinct), MAX_ID_BYTES).to_numpy(zero_copy_only=False)
    problem_D = np.where(texts.invalid_D, 1, np.where(long_D, 2, 0)).astype(np.uint8)
    fitting_D = pc.if_else(pa.array(problem_D > 0), "", texts.distinct)  # a long text is let go, not copied to each row
    values_D = pc.if_else(pc.equal(fitting_D, ""), pa.scalar(None, pa.string()), fitting_D)
    return _Coerced(
        column=column,
        values=texts.spread(values_D),
        problem_R=texts.spread_codes(problem_D),
        problems=(_NOT_UTF8, f"is longer than {MAX_ID_BYTES} bytes"),
        hashes_R=np.append(hash_ids(values_D), MISSING)[texts.index_R],
    )


def _coerce_integers(texts: _Texts, column: str) -> _Coerced:
    trimmed = pc.utf8_trim_whitespace(texts.distinct)
    plain_D = pc.match_substring_regex(trimmed, r"^-?[0-9]{1,18}$")
    values_D = pc.if_else(plain_D, trimmed, pa.scalar(None, pa.string())).cast(pa.int64())
    problem_D = np.where(texts.invalid_D, 1, 0).astype(np.uint8)
    odd = np.flatnonzero(~plain_D.to_numpy(zero_copy_only=False) & ~texts.invalid_D)
    if len(odd):
        values_D, problem_D = _parse_odd_integers(trimmed, values_D, problem_D, odd)
    return _Coerced(
        column=column,
        values=texts.spread(values_D),
        problem_R=texts.spread_codes(problem_D),
        problems=(_NOT_UTF8, "is not an integer", "does not fit into 64 bits"),
        hashes_R=np.append(hash_ids(values_D), MISSING)[texts.index_R],
    )


def _parse_odd_integers(texts: pa.Array, values_D: pa.Array, problem_D: Codes, odd: I64) -> tuple[pa.Array, Codes]:
    parsed: list[int | None] = []
    for place, text in zip(odd, texts.take(pa.array(odd)).to_pylist(), strict=True):
        value = None if text.lower() in _NULL_NUMBERS else _whole_number(text)
        if value is None:
            problem_D[place] = 0 if text.lower() in _NULL_NUMBERS else 2
        elif not -(2**63) <= value < 2**63:
            problem_D[place], value = 3, None
        parsed.append(value)
    mask = np.zeros(len(texts), bool)
    mask[odd] = True
    return pc.replace_with_mask(values_D, pa.array(mask), pa.array(parsed, pa.int64())), problem_D


def _whole_number(text: str) -> int | None:
    """`12`, `+12`, `12.0` and `1e3` are whole; `12.5` and `1_000` are not."""
    digits = text[1:] if text[:1] in "+-" else text
    if digits.isascii() and digits.isdigit():
        return int(text) if len(digits) <= 100 else 2**63
    number = _real_number(text)
    return int(number) if number is not None and np.isfinite(number) and number == int(number) else None


def _real_number(text: str) -> float | None:
    if "_" in text or not text.isascii():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _coerce_lists(native: pa.Array, feature: Categorical) -> _Coerced:
    lists = native if _is_list(native.type) else _split_texts(_encode_texts(native, feature.source), feature.separator)
    lengths_R = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(lists)
    single = feature.model_copy(update={"many": False, "column": feature.source})
    inner = _coerce_categorical(_Columns(pa.table({feature.source: flat})), single)
    row_V = np.repeat(np.arange(len(lengths_R)), lengths_R)
    first_problem_R = np.zeros(len(lengths_R), np.uint8)
    wrong_V = np.flatnonzero(inner.problem_R)[::-1]
    first_problem_R[row_V[wrong_V]] = inner.problem_R[wrong_V]
    kept_V = pc.is_valid(inner.values).to_numpy(zero_copy_only=False)
    kept_R = np.bincount(row_V[kept_V], minlength=len(lengths_R)).astype(np.int64)
    problems = (*inner.problems, f"has more than {feature.max_length} ids")
    problem_R = np.where((first_problem_R == 0) & (kept_R > feature.max_length), len(problems), first_problem_R)
    if kept_R.sum() >= 2**31:
        raise BrokenFile(f"column {feature.source!r} has {kept_R.sum()} ids in {len(kept_R)} rows, too many to hold at once")
    offsets = np.concatenate([[0], np.cumsum(kept_R)]).astype(np.int32)
    return _Coerced(
        column=feature.source,
        values=pa.ListArray.from_arrays(pa.array(offsets), inner.values.filter(pa.array(kept_V))),
        problem_R=problem_R.astype(np.uint8),
        problems=problems,
        hashes_R=_hash_lists(inner.hashes_R[kept_V], offsets.astype(np.int64)),
    )


def _split_texts(texts: _Texts, separator: str) -> pa.Array:
    """Lists of the raw pieces. A text that is not UTF-8 becomes one such piece, so that its row is rejected."""
    pieces_D = pc.split_pattern(texts.distinct, separator).cast(pa.list_(pa.binary()))
    if texts.invalid_D.any():
        pieces = [[b"\xff"] if wrong else got for got, wrong in zip(pieces_D.to_pylist(), texts.invalid_D, strict=True)]
        pieces_D = pa.array(pieces, pa.list_(pa.binary()))
    return texts.spread(pieces_D)


def _hash_lists(hashes_V: U64, offsets: I64) -> U64:
    """Equal for equal lists; the order of ids counts."""
    lengths_R = np.diff(offsets)
    place_V = np.arange(len(hashes_V)) - np.repeat(offsets[:-1], lengths_R)
    mixed_V = combine_hashes(place_V.astype(np.uint64), hashes_V)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed_V, dtype=np.uint64)])
    hashed: U64 = np.where(lengths_R > 0, mix64(sums[offsets[1:]] - sums[offsets[:-1]]), MISSING)
    return hashed


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    values_R: F64
    """NaN where missing or wrong."""
    problem_R: Codes


_NUMBER_PROBLEMS = (_NOT_UTF8, "is not a number", "is not finite")


def _numbers(columns: _Columns, name: str) -> _Numbers:
    native = columns.native(name)
    if pa.types.is_boolean(native.type):
        native = native.cast(pa.int8())
    if pa.types.is_floating(native.type) or pa.types.is_integer(native.type):
        values_R = native.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        return _Numbers(values_R=values_R, problem_R=np.where(np.isinf(values_R), 3, 0).astype(np.uint8))
    texts = columns.texts(name)
    values_D, problem_D = _parse_numbers(texts)
    return _Numbers(values_R=np.append(values_D, np.nan)[texts.index_R], problem_R=texts.spread_codes(problem_D))


def _parse_numbers(texts: _Texts) -> tuple[F64, Codes]:
    trimmed = pc.utf8_trim_whitespace(texts.distinct)
    plain_D = pc.match_substring_regex(trimmed, r"^-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$")
    cast = pc.if_else(plain_D, trimmed, pa.scalar(None, pa.string())).cast(pa.float64())
    values_D = cast.to_numpy(zero_copy_only=False).astype(np.float64)
    problem_D = np.where(texts.invalid_D, 1, np.where(np.isinf(values_D), 3, 0)).astype(np.uint8)
    odd = np.flatnonzero(~plain_D.to_numpy(zero_copy_only=False) & ~texts.invalid_D)
    for place, text in zip(odd, trimmed.take(pa.array(odd)).to_pylist(), strict=True):
        if text.lower() not in _NULL_NUMBERS:
            number = _real_number(text)
            problem_D[place] = 2 if number is None or np.isnan(number) else 3 if np.isinf(number) else 0
            values_D[place] = np.nan if number is None else number
    return values_D, problem_D


def _coerce_numeric(columns: _Columns, feature: Numeric) -> _Coerced:
    numbers = _numbers(columns, feature.source)
    values_R, problem_R = numbers.values_R, numbers.problem_R
    with np.errstate(invalid="ignore", over="ignore"):
        outside_R = (values_R < feature.lower) | (values_R > feature.upper)
        stored_R = values_R.astype(np.float32)
    too_large_R = np.isinf(stored_R) & np.isfinite(values_R)
    problem_R = np.where((problem_R == 0) & outside_R, 4, problem_R)
    problem_R = np.where((problem_R == 0) & too_large_R, 5, problem_R)
    return _Coerced(
        column=feature.source,
        values=pa.array(stored_R, mask=np.isnan(stored_R)),
        problem_R=problem_R.astype(np.uint8),
        problems=(
            *_NUMBER_PROBLEMS,
            f"is outside [{feature.lower:g}, {feature.upper:g}]",
            "does not fit into a 32-bit float",
        ),
        hashes_R=_hash_numbers(values_R),
    )


def _hash_numbers(values_R: F64) -> U64:
    hashes: U64 = mix64((values_R + 0.0).view(np.uint64))  # + 0.0 makes -0.0 and 0.0 one value
    hashes[np.isnan(values_R)] = MISSING
    return hashes


def _coerce_label(columns: _Columns, label: LabelColumn) -> _Coerced:
    numbers = _label_numbers(columns, label.column)
    problem_R = np.where((numbers.problem_R == 0) & np.isnan(numbers.values_R), 4, numbers.problem_R)
    if label.positive_from == 1.0:
        problem_R = np.where((problem_R == 0) & ~np.isin(numbers.values_R, (0.0, 1.0)), 5, problem_R)
    with np.errstate(invalid="ignore"):
        clicked_R = numbers.values_R >= label.positive_from
    return _Coerced(
        column=label.column,
        values=pa.array(clicked_R.astype(np.int8)),
        problem_R=problem_R.astype(np.uint8),
        problems=(*_NUMBER_PROBLEMS, "is missing: a label is needed", "is neither 0 nor 1"),
        hashes_R=_hash_numbers(numbers.values_R),
    )


def _label_numbers(columns: _Columns, name: str) -> _Numbers:
    """As numbers, with `true` and `false` as 1 and 0."""
    if not _is_text(columns.native(name).type):
        return _numbers(columns, name)
    texts = columns.texts(name)
    lowered = pc.utf8_lower(pc.utf8_trim_whitespace(texts.distinct))
    as_digit = pc.if_else(pc.equal(lowered, "true"), "1", pc.if_else(pc.equal(lowered, "false"), "0", texts.distinct))
    values_D, problem_D = _parse_numbers(_Texts(distinct=as_digit, invalid_D=texts.invalid_D, index_R=texts.index_R))
    return _Numbers(values_R=np.append(values_D, np.nan)[texts.index_R], problem_R=texts.spread_codes(problem_D))


_UNKNOWN = np.iinfo(np.int64).min  # what numpy calls NaT


def _coerce_times(columns: _Columns, time: TimeColumn, now: datetime, row_numbers: I64) -> _Coerced:
    if time.format == "row_order":
        micros_R, problem_R = _times_by_row(time, row_numbers), np.zeros(len(row_numbers), np.uint8)
    else:
        micros_R, problem_R = _times_by_column(columns, time)
    latest = int((now + FUTURE_TOLERANCE).timestamp() * 1_000_000)
    problem_R = np.where((problem_R == 0) & (micros_R > latest), 5, problem_R)
    problem_R = np.where((problem_R == 0) & (micros_R < 0), 6, problem_R).astype(np.uint8)
    values = pa.array(np.where(problem_R == 0, micros_R, 0).astype(np.int64))
    return _Coerced(
        column=time.column or "row number",
        values=values.cast(pa.timestamp("us", tz="UTC")),
        problem_R=problem_R,
        problems=(
            _NOT_UTF8,
            "is missing: a time is needed",
            f"is no time of the format {time.format!r}",
            f"does not exist, or exists twice, in the zone {time.zone!r} (clocks change)",
            "is more than 60 minutes in the future",
            "is before 1970",
        ),
        hashes_R=hash_ids(values),
    )


def _times_by_row(time: TimeColumn, row_numbers: I64) -> I64:
    try:
        start = pd.Timestamp(time.start)
    except ValueError as error:
        raise SpecError(f"time.start: {time.start!r} is no ISO time; write one such as '2014-01-01T00:00:00Z'") from error
    start = start.tz_localize(time.zone) if start.tzinfo is None else start
    start_micros = int(start.timestamp() * 1_000_000)
    return start_micros + (row_numbers - 1) * MICROSECONDS_PER_HOUR // time.rows_per_hour


def _times_by_column(columns: _Columns, time: TimeColumn) -> tuple[I64, Codes]:
    native = columns.native(time.column)
    if pa.types.is_timestamp(native.type) or pa.types.is_date(native.type):
        return _native_times(native, time.zone)
    if time.format in ("unix_seconds", "unix_milliseconds"):
        return _unix_times(_numbers(columns, time.column), 1e6 if time.format == "unix_seconds" else 1e3)
    texts = columns.texts(time.column)
    micros_D, problem_D = _parse_times(texts.distinct, time)
    problem_D = np.where(texts.invalid_D, 1, problem_D).astype(np.uint8)
    return np.append(micros_D, _UNKNOWN)[texts.index_R], texts.spread_codes(problem_D, missing=2)


def _native_times(native: pa.Array, zone: str) -> tuple[I64, Codes]:
    has_zone = pa.types.is_timestamp(native.type) and native.type.tz is not None
    micros = native.cast(pa.timestamp("us", tz=native.type.tz if has_zone else None), safe=False).cast(pa.int64())
    micros_R = micros.fill_null(_UNKNOWN).to_numpy(zero_copy_only=False)
    missing_R = native.is_null().to_numpy(zero_copy_only=False)
    if not has_zone:
        distinct, index_R = np.unique(micros_R, return_inverse=True)
        micros_R = _to_utc(distinct, zone)[index_R]
    wrong_R = (micros_R == _UNKNOWN) & ~missing_R
    out_of_range_R = micros_R > _LAST_MICROSECOND
    return micros_R, np.where(missing_R, 2, np.where(wrong_R, 4, np.where(out_of_range_R, 3, 0))).astype(np.uint8)


def _unix_times(numbers: _Numbers, micros_per_unit: float) -> tuple[I64, Codes]:
    with np.errstate(invalid="ignore", over="ignore"):
        micros_R = np.rint(numbers.values_R * micros_per_unit)
    missing_R = np.isnan(micros_R)
    in_range_R = np.abs(micros_R) <= _LAST_MICROSECOND
    problem_R = np.where(missing_R, 2, np.where(in_range_R, 0, 3))
    problem_R = np.where(numbers.problem_R == 1, 1, np.where(numbers.problem_R > 1, 3, problem_R))
    return np.where(in_range_R, micros_R, _UNKNOWN).astype(np.int64), problem_R.astype(np.uint8)


def _parse_times(texts: pa.Array, time: TimeColumn) -> tuple[I64, Codes]:
    trimmed = pc.utf8_trim_whitespace(texts)
    parse = _parse_iso if time.format == "iso" else _parse_pattern
    micros_D, naive_D = parse(trimmed, time.format)
    empty_D = pc.equal(trimmed, "").to_numpy(zero_copy_only=False)
    unreadable_D = (micros_D == _UNKNOWN) & ~empty_D
    micros_D[naive_D] = _to_utc(micros_D[naive_D], time.zone)
    unmapped_D = (micros_D == _UNKNOWN) & ~empty_D & ~unreadable_D
    return micros_D, np.where(empty_D, 2, np.where(unreadable_D, 3, np.where(unmapped_D, 4, 0))).astype(np.uint8)


_ZONE = r"(Z|z|[+-][0-9]{2}(:?[0-9]{2})?)"
_CLOCK = r"[0-9]{2}(:?[0-9]{2}(:?[0-9]{2}([.,][0-9]{1,9})?)?)?"
_ISO = rf"^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}([T ]{_CLOCK}{_ZONE}?)?$"


def _parse_iso(texts: pa.Array, _format: str) -> tuple[I64, npt.NDArray[np.bool_]]:
    fits = pc.match_substring_regex(texts, _ISO)
    zoned = pc.match_substring_regex(texts, r"[T ].*(Z|z|[+-][0-9]{2}(:?[0-9]{2})?)$")
    candidates = pc.if_else(fits, texts, pa.scalar(None, pa.string()))
    parsed = pd.to_datetime(pd.Series(candidates.to_pylist(), dtype=object), format="ISO8601", errors="coerce", utc=True)
    return _micros(parsed), ~zoned.to_numpy(zero_copy_only=False)


def _parse_pattern(texts: pa.Array, pattern: str) -> tuple[I64, npt.NDArray[np.bool_]]:
    try:
        parsed = pd.to_datetime(pd.Series(texts.to_pylist(), dtype=object), format=pattern, errors="coerce", utc=True)
    except ValueError as error:
        raise SpecError(f"time.format: {pattern!r} is no strptime pattern: {error}") from error
    return _micros(parsed), np.full(len(texts), "%z" not in pattern and "%Z" not in pattern)


def _micros(parsed: "pd.Series[Any]") -> I64:
    micros: I64 = parsed.to_numpy(dtype="datetime64[us]").astype(np.int64)
    return micros


def _to_utc(micros: I64, zone: str) -> I64:
    """Local clock times to UTC; unknown where the zone skips or repeats them."""
    if zone == "UTC":
        return micros
    local = pd.DatetimeIndex(micros.astype("datetime64[us]"))
    aware = local.tz_localize(zone, ambiguous="NaT", nonexistent="NaT").tz_convert("UTC").tz_localize(None)
    utc: I64 = aware.to_numpy().astype("datetime64[us]").astype(np.int64)
    return utc


def _event_key(columns: _Columns, spec: DatasetSpec, times: _Coerced, others: Sequence[_Coerced]) -> _Coerced:
    """Hash of the key columns; wrong where all of them are missing, since no two such rows could be told apart."""
    names = spec.source_columns() if spec.event_key == ("*",) else list(spec.event_key)
    by_source = {column.column: column for column in others}
    parts = [times if name == spec.time.column else by_source.get(name) or _raw_key(columns, name) for name in names]
    hashes_R = np.zeros(columns.num_rows, np.uint64)
    missing_R = np.ones(columns.num_rows, bool)
    problem_R = np.zeros(columns.num_rows, np.uint8)
    for part in parts:
        hashes_R = combine_hashes(hashes_R, part.hashes_R)
        missing_R &= part.hashes_R == MISSING
        problem_R |= part.problem_R
    return _Coerced(
        column=" + ".join(names) if len(names) <= 5 else "event key",
        values=pa.array(hashes_R.view(np.int64)),
        problem_R=np.where(problem_R > 0, 1, np.where(missing_R, 2, 0)).astype(np.uint8),
        problems=("is no text that can be hashed", "is missing: an event key is needed"),
        hashes_R=hashes_R,
    )


def _raw_key(columns: _Columns, name: str) -> _Coerced:
    native = columns.native(name)
    if _is_list(native.type) or pa.types.is_struct(native.type) or pa.types.is_map(native.type):
        native = pa.array([None if v is None else orjson.dumps(v, default=str) for v in native.to_pylist()], pa.binary())
        return _hash_texts(_encode_texts(native, name), name)
    return _hash_texts(columns.texts(name), name)


def _hash_texts(texts: _Texts, column: str) -> _Coerced:
    """Texts of any length, of which the hash alone is asked for."""
    values_D = pc.if_else(pc.equal(texts.distinct, ""), pa.scalar(None, pa.string()), texts.distinct)
    return _Coerced(
        column=column,
        values=pa.nulls(len(texts.index_R)),
        problem_R=texts.spread_codes(texts.invalid_D.astype(np.uint8)),
        problems=(_NOT_UTF8,),
        hashes_R=np.append(hash_ids(values_D), MISSING)[texts.index_R],
    )


def _no_problem(values: pa.Array) -> Codes:
    return np.zeros(len(values), np.uint8)


def _accepted(columns: Mapping[str, pa.Array], spec: DatasetSpec, good_R: npt.NDArray[np.bool_]) -> pa.Table:
    schema = click_log_schema(spec)
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    return table if good_R.all() else table.filter(pa.array(good_R))


def _rejected(raw: pa.Table, checked: Sequence[_Coerced], good_R: npt.NDArray[np.bool_], rows: I64) -> tuple[RejectedRow, ...]:
    places = np.flatnonzero(~good_R)
    if not len(places):
        return ()
    found: list[RejectedRow] = []
    for start in range(0, len(places), _REJECTED_AT_ONCE):
        some = places[start : start + _REJECTED_AT_ONCE]
        records = raw.take(pa.array(some)).to_pylist()
        found += [_reject(record, checked, int(place), int(rows[place])) for record, place in zip(records, some, strict=True)]
    return tuple(found)


def _reject(record: Mapping[str, Any], checked: Sequence[_Coerced], place: int, row: int) -> RejectedRow:
    first = next(column for column in checked if column.problem_R[place])
    problem = first.problems[first.problem_R[place] - 1]
    kind = f"{first.column}: {problem}"
    got = f", got {quote_value(record[first.column])}" if first.column in record else ""
    return RejectedRow(row=row, kind=kind, reason=kind + got, raw=describe_raw(record))


def _printable(value: object) -> object:
    """As JSON can have it, texts no longer than a raw row is kept."""
    match value:
        case bytes():
            return value[:_RAW_BYTES].decode(errors="backslashreplace")
        case list():
            return [_printable(inner) for inner in value]
        case dict():
            return {str(name): _printable(inner) for name, inner in value.items()}
        case int() if not -(2**63) <= value < 2**64:
            return str(value)
        case str():
            return value[:_RAW_BYTES].encode(errors="backslashreplace").decode()
        case _:
            return value


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
