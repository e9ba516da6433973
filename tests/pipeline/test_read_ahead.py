"""Files that are read ahead give the rows that reading them now would give, in bounded memory; and no error is lost."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_schemas.click_log import click_log_schema
from data_schemas.dataset import Categorical, DatasetSpec, Numeric, TimeColumn
from data_schemas.errors import DataError
from pipeline.data.lake import ClickLog, LogFile, RowRange
from pipeline.data.read_ahead import Key, ReadAhead

SPEC = DatasetSpec(
    name="shop",
    time=TimeColumn(column="at"),
    event_key=("at",),
    categorical=(Categorical(name="item"), Categorical(name="tags", many=True)),
    numeric=(Numeric(name="price"),),
)
HOUR = 473_352  # 2024-01-01T00Z
COLUMNS = ["event_time", "item", "tags", "price"]


@pytest.fixture
def log(tmp_path: Path) -> ClickLog:
    """Three hours of 50 rows."""
    log = ClickLog.open_or_create(tmp_path / "log", SPEC)
    writer, number = log.write(), np.arange(50)
    for hour in range(HOUR, HOUR + 3):
        columns = {
            "event_time": pa.array(number + hour * 3_600_000_000).cast(pa.timestamp("us", tz="UTC")),
            "event_key": pa.array(number),
            "item": [f"item-{n % 7}" if n % 5 else None for n in number],
            "tags": [[f"t{n % 3}"] * (n % 4) for n in number],
            "price": pa.array(number + hour, pa.float32()),
        }
        writer.add(hour, pa.table(columns, schema=click_log_schema(SPEC)))
    log.append(writer.close(), "file")
    return log


def reads(log: ClickLog, files: list[LogFile]) -> dict[Key, Callable[[], pa.Table]]:
    other = ClickLog.open_or_create(log.root, SPEC)
    return {(log.root / file.path, tuple(COLUMNS)): partial(other.read, [RowRange.whole(file)], COLUMNS) for file in files}


def after_reading(read_ahead: ReadAhead) -> None:
    for future in read_ahead._coming.values():
        future.exception()


def test_the_rows_are_the_same_whole_files_and_parts_of_them(log: ClickLog) -> None:
    ranges = [RowRange(file=file, start=start, stop=stop) for file in log.files() for start, stop in ((0, 50), (7, 30))]
    expected = [log.read([range_], COLUMNS).to_pylist() for range_ in ranges]
    with ReadAhead() as read_ahead:
        read_ahead.expect(reads(log, log.files()[:2]))
        after_reading(read_ahead)
        log.read_ahead = read_ahead
        assert [log.read([range_], COLUMNS).to_pylist() for range_ in ranges] == expected
        assert read_ahead.taken == 4, "two ranges of each of the two files that were expected"
        assert log.read(ranges[:1], ["price"]).num_rows == 50, "other columns are read"
        assert read_ahead.taken == 4


def test_a_file_that_cannot_be_read_is_named_when_it_is_needed(log: ClickLog) -> None:
    first = log.files()[0]
    (log.root / first.path).write_bytes(b"PAR1 and nothing else PAR1")
    with ReadAhead() as read_ahead:
        read_ahead.expect(reads(log, log.files()))
        after_reading(read_ahead)
        log.read_ahead = read_ahead
        with pytest.raises(DataError, match=str(first.path)):
            log.read([RowRange(file=first, start=0, stop=50)], COLUMNS)
        assert read_ahead.taken == 0


def test_memory_is_bounded_and_what_is_beyond_is_read_when_needed(log: ClickLog) -> None:
    with ReadAhead(most_bytes=1) as read_ahead:
        read_ahead.expect(reads(log, log.files()))
        after_reading(read_ahead)
        log.read_ahead = read_ahead
        table = log.read([RowRange(file=file, start=0, stop=50) for file in log.files()], COLUMNS)
        assert table.num_rows == 150
        assert read_ahead.taken == 1, "the first file filled it"


def test_nobody_waits_for_a_file_that_is_not_begun_and_what_was_expected_before_goes(log: ClickLog) -> None:
    begun, going_on = threading.Event(), threading.Event()

    def slowly() -> pa.Table:
        begun.set()
        assert going_on.wait(60)
        return pa.table({})

    first, second = (log.root / file.path for file in log.files()[:2])
    with ReadAhead() as read_ahead:
        read_ahead.expect({(first, ("a",)): slowly, (second, ("a",)): slowly})
        assert begun.wait(60)
        assert read_ahead.take(second, ["a"]) is None
        going_on.set()
        assert read_ahead.take(first, ["a"]) == pa.table({})
        read_ahead.expect({})
        assert read_ahead.take(first, ["a"]) is None
