"""The streams of the comparison, as lists of hours that every system is fed.

Enters: a data set's name and declaration. Leaves: `Hour`s in order of time, encoded as an update encodes them: counters,
histories and normalisation know the earlier windows only. Everything is held in memory, about 1 KB a row where histories are
declared.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_schemas.click_log import validate
from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from models.memory import Memory
from peers.contender import Hour
from pipeline.data.encode import encode
from pipeline.data.landing import list_landing, read_batches
from pipeline.data.loader import HOUR_US, to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream

DATA = Path(__file__).parents[2] / "../shared/data"
AMEXPERT_WINDOW_HOURS = 6
SYNTHETIC_HOURS = (24, 120)
"""About 200,000 and 1 M rows."""
FAR_FUTURE = datetime(2100, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A data set in order of time, and how it is judged unless the command line says otherwise."""

    title: str
    spec: DatasetSpec
    hours: list[Hour]
    warmup_hours: int
    """Predicted and learned, but not judged."""
    search_hours: int
    """Settings are chosen on what comes after the warm-up and before this."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    start: int
    table: pa.Table
    true_probability_R: F32 | None = None


def load_streams(dataset: str, spec: DatasetSpec, *, data: Path | None, hours: int | None) -> Iterator[Stream]:
    """The data set's streams, one after the other; `hours` cuts each.

    Args:
        spec: what is made of its columns.

    Raises:
        SystemExit: the data are not there.
    """
    match dataset:
        case "brunch":
            folder = _existing(data or DATA / "brunch/impressions")
            yield _stream("brunch", spec, _brunch(folder, hours), warmup_hours=24, search_hours=48)
        case "amexpert":
            folder = _existing(data or DATA / "amexpert")
            pieces = _amexpert(folder, spec, hours)
            yield _stream("amexpert", spec, pieces, span_hours=AMEXPERT_WINDOW_HOURS, warmup_hours=24, search_hours=72)
        case "synthetic":
            for length in sorted({min(length, hours or length) for length in SYNTHETIC_HOURS}):
                title = f"synthetic, {length} hours"
                yield _stream(title, spec, _synthetic(spec, length), warmup_hours=1, search_hours=max(length // 2, 2))
        case unknown:
            raise SystemExit(f"DATASET must be brunch, amexpert or synthetic, got {unknown!r}")


def brunch_hours(data: Path | None, spec: DatasetSpec, hours: int) -> Iterator[Hour]:
    """The first hours of brunch, one at a time.

    Raises:
        SystemExit: the data are not there.
    """
    return _encoded(_brunch(_existing(data or DATA / "brunch/impressions"), hours), spec, span_hours=1)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}; name the one that holds the data with --data")
    return folder


def _stream(
    title: str, spec: DatasetSpec, pieces: Iterable[_Piece], *, warmup_hours: int, search_hours: int, span_hours: int = 1
) -> Stream:
    hours = list(_encoded(pieces, spec, span_hours))
    rows = sum(hour.num_rows for hour in hours)
    print(
        f"{title}: {rows:,} rows in {len(hours)} windows, {hours[0].encoded.dense_RN.shape[1]} dense columns", file=sys.stderr
    )
    return Stream(title=title, spec=spec, hours=hours, warmup_hours=warmup_hours, search_hours=search_hours)


def _encoded(pieces: Iterable[_Piece], spec: DatasetSpec, span_hours: int) -> Iterator[Hour]:
    """As `run_update` encodes: what is remembered of a row ends where its window begins."""
    memory, moments = Memory(spec), None
    for piece in pieces:
        examples = to_examples(piece.table, spec)
        encoded = encode(examples, spec, memory, moments, hour=piece.start)
        yield Hour(
            start=piece.start,
            span_hours=span_hours,
            examples=examples,
            encoded=encoded,
            histories=memory.histories(examples),
            true_probability_R=piece.true_probability_R,
        )
        moments = (moments or RunningMoments.nothing_seen(len(encoded.raw_dense_NR))).after(encoded.raw_dense_NR)
        memory.add(examples, piece.start)


def _brunch(folder: Path, hours: int | None) -> Iterator[_Piece]:
    for path in sorted(folder.glob("*.parquet"))[:hours]:
        start = datetime.strptime(path.stem, "%Y-%m-%dT%H").replace(tzinfo=UTC)
        table = pq.read_table(path, read_dictionary=["item_id", "author_id"])
        yield _Piece(start=int(start.timestamp()) // 3600, table=table)


def _amexpert(folder: Path, spec: DatasetSpec, hours: int | None) -> Iterator[_Piece]:
    batches = [batch for file in list_landing(str(folder)).files for batch in read_batches(file, spec)]
    table = pa.concat_tables([validate(b.columns, spec, now=FAR_FUTURE, rows=b.rows).accepted for b in batches])
    window_R = table["event_time"].cast(pa.int64()).to_numpy() // (AMEXPERT_WINDOW_HOURS * HOUR_US)
    first = int(window_R.min())
    for window in range(first, int(window_R.max()) + 1):
        rows = np.flatnonzero(window_R == window)
        if len(rows) and (hours is None or (window - first) * AMEXPERT_WINDOW_HOURS < hours):
            yield _Piece(start=window * AMEXPERT_WINDOW_HOURS, table=table.take(pa.array(rows)))


def _synthetic(spec: DatasetSpec, hours: int) -> Iterator[_Piece]:
    """Repeats are left out, as ingesting leaves them out; late events stay in the hour of their delivery."""
    stream = SyntheticStream(SyntheticConfig(hours=hours))
    for index in range(hours):
        hour = stream.hour(index)
        new_R = ~hour.is_repeat_R
        checked = validate(hour.table.filter(pa.array(new_R)), spec, now=FAR_FUTURE, rows=1 + np.arange(new_R.sum()))
        assert not checked.rejected, checked.rejected[0]
        start = int(hour.start.timestamp()) // 3600
        yield _Piece(start=start, table=checked.accepted, true_probability_R=hour.true_probability_R[new_R])
