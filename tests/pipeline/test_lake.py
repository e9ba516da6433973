"""The click log's Delta table."""

import errno
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from data_schemas.click_log import RejectedRow, click_log_schema
from data_schemas.dataset import Categorical, DatasetSpec, Numeric, TimeColumn
from data_schemas.errors import CommitConflict, DataError, SpecError
from pipeline.data import lake
from pipeline.data.lake import ClickLog, LogFile, Quarantine, RowRange
from pipeline.data.lineage import Piece, added_between

SPEC = DatasetSpec(
    name="shop",
    time=TimeColumn(column="at"),
    event_key=("at",),
    categorical=(Categorical(name="item"), Categorical(name="tags", many=True)),
    numeric=(Numeric(name="price"),),
)
NOW = datetime(2024, 1, 2, tzinfo=UTC)
HOUR = 473_352  # 2024-01-01T00Z


def make_rows(num_rows: int, *, hour: int = HOUR, first: int = 0) -> pa.Table:
    number = np.arange(first, first + num_rows)
    columns = {
        "event_time": pa.array(number + hour * 3_600_000_000).cast(pa.timestamp("us", tz="UTC")),
        "event_key": pa.array(number),
        "item": [f"item-{n % 7}" if n % 5 else None for n in number],
        "tags": [[f"t{n % 3}"] * (n % 4) for n in number],
        "price": pa.array(number, pa.float32()),
    }
    return pa.table(columns, schema=click_log_schema(SPEC))


def write(log: ClickLog, hours: dict[int, int], app_id: str, rows_read: int = 0) -> list[LogFile]:
    writer = log.write()
    for hour, num_rows in hours.items():
        writer.add(hour, make_rows(num_rows, hour=hour))
    files = writer.close()
    log.append(files, app_id, {"landing_file": app_id}, rows_read)
    return files


@pytest.fixture
def log(tmp_path: Path) -> ClickLog:
    return ClickLog.open_or_create(tmp_path / "log", SPEC)


def data_files(log: ClickLog) -> set[str]:
    return {str(path.relative_to(log.root)) for path in log.root.rglob("part-*.parquet")}


def test_what_was_appended_is_read_back(log: ClickLog) -> None:
    assert log.files() == []
    assert log.newest_hour is None
    files = write(log, {HOUR + 1: 20, HOUR: 30}, "f1", rows_read=60)
    assert [(file.hour, file.num_rows) for file in log.files()] == [(HOUR, 30), (HOUR + 1, 20)]
    assert log.files() == sorted(files)
    assert files[0].path.startswith("event_date=2024-01-01/event_hour=0/part-")
    assert (log.version, log.newest_hour, log.rows_read) == (1, HOUR + 1, 60)
    table = log.read([RowRange(file=files[0], start=0, stop=30)], log.schema.names)
    assert table.cast(log.schema).equals(make_rows(30))
    assert pa.types.is_dictionary(table.schema.field("item").type)


def test_a_reopened_log_knows_everything(log: ClickLog) -> None:
    write(log, {HOUR: 3}, "f1", rows_read=4)
    again = ClickLog.open_or_create(log.root, SPEC)
    assert again.files() == log.files()
    assert again.has_ingested("f1")
    assert not again.has_ingested("f2")
    assert again.rows_read == 4


def test_other_readers_of_delta_see_the_same_rows_with_their_partitions(log: ClickLog) -> None:
    write(log, {HOUR + 5: 9}, "f1")
    table = DeltaTable(log.root)
    assert table.metadata().partition_columns == ["event_date", "event_hour"]
    assert pa.table(table.get_add_actions(flatten=True)).column("num_records").to_pylist() == [9]
    assert table.history()[0]["landing_file"] == "f1"


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (99, 101), (100, 200), (250, 333), (0, 333), (333, 333)])
def test_exact_ranges_are_read_across_row_groups(log: ClickLog, monkeypatch: pytest.MonkeyPatch, start: int, stop: int) -> None:
    monkeypatch.setattr(lake, "ROW_GROUP_ROWS", 50)
    (file,) = write(log, {HOUR: 333}, "f1")
    assert pq.read_metadata(log.root / file.path).num_row_groups == 4
    table = log.read([RowRange(file=file, start=start, stop=stop)], ["price", "tags", "item"])
    assert table.column_names == ["price", "tags", "item"]
    expected = make_rows(333).slice(start, stop - start)
    assert [table.column(name).to_pylist() for name in table.column_names] == [
        expected.column(name).to_pylist() for name in table.column_names
    ]


def test_a_damaged_file_is_not_written_again_and_is_named(log: ClickLog) -> None:
    writer = log.write()
    writer.add(HOUR, make_rows(40))
    (file,) = writer.close()
    path = log.root / file.path
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-.*, which was just written, cannot be read: .* run the ingest again"):
        log.write_again([file], np.arange(40) % 2 == 0, "again")
    assert data_files(log) == {file.path}


def test_row_groups_outside_a_range_are_not_read(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lake, "ROW_GROUP_ROWS", 50)
    (file,) = write(log, {HOUR: 300}, "f1")
    path = log.root / file.path
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(1)
    content[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    path.write_bytes(bytes(content))
    assert log.read([RowRange(file=file, start=200, stop=300)], ["event_key"]).num_rows == 100
    with pytest.raises(DataError, match=path.name):
        log.read([RowRange(file=file, start=0, stop=300)], ["event_key"])


def test_ranges_come_in_the_order_asked_and_none_gives_an_empty_table(log: ClickLog) -> None:
    (file,) = write(log, {HOUR: 10}, "f1")
    table = log.read([RowRange(file=file, start=5, stop=7), RowRange(file=file, start=0, stop=2)], ["event_key"])
    assert table.column("event_key").to_pylist() == [5, 6, 0, 1]
    nothing = log.read([], log.schema.names)
    assert nothing.num_rows == 0
    assert nothing.schema.types == log.read([RowRange(file=file, start=0, stop=1)], log.schema.names).schema.types


def test_a_bit_that_flipped_is_found_and_the_file_named(log: ClickLog) -> None:
    (file,) = write(log, {HOUR: 5000}, "f1")
    path = log.root / file.path
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    found: list[str] = []
    for place in rng.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            table = log.read([RowRange(file=file, start=0, stop=5000)], log.schema.names)
        except DataError as error:
            found.append(str(error))
        else:
            assert table.cast(log.schema).equals(make_rows(5000))
    assert len(found) > 20
    assert all(path.name in message for message in found)


@pytest.mark.parametrize("damage", ["missing", "truncated", "replaced"])
def test_a_file_that_is_not_what_the_log_says_is_named(log: ClickLog, damage: str) -> None:
    (file,) = write(log, {HOUR: 100}, "f1")
    path = log.root / file.path
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        case _:
            pq.write_table(make_rows(99), path)
    with pytest.raises(DataError, match=path.name):
        log.read([RowRange(file=file, start=0, stop=100)], ["price"])


def test_what_was_added_between_two_versions(log: ClickLog) -> None:
    first = write(log, {HOUR: 1}, "f1")
    second = write(log, {HOUR: 2, HOUR + 1: 2}, "f2")
    assert added_between(log, None, 2) == [Piece(file=file) for file in sorted(first + second)]
    assert added_between(log, 1, 2) == [Piece(file=file) for file in sorted(second)]
    assert added_between(log, 2, 2) == []
    assert log.files(1) == first
    with pytest.raises(DataError, match="no version 7"):
        added_between(log, 7, 2)


def test_a_commit_without_files_remembers_its_id(log: ClickLog) -> None:
    assert log.append([], "f1", {}, rows_read=3) == 1
    assert log.has_ingested("f1")
    assert log.rows_read == 3


def test_of_two_writers_the_second_gets_a_conflict_and_can_try_again(log: ClickLog) -> None:
    other = ClickLog.open_or_create(log.root, SPEC)
    write(log, {HOUR: 1}, "f1")
    with pytest.raises(CommitConflict):
        write(other, {HOUR: 1}, "f2")
    assert data_files(log) == {file.path for file in log.files()}
    other.refresh()
    write(other, {HOUR: 1}, "f2")
    log.refresh()
    assert len(log.files()) == 2


def test_many_writers_lose_nothing(log: ClickLog) -> None:
    def write_patiently(name: str) -> None:
        mine = ClickLog.open_or_create(log.root, SPEC)
        for number in range(5):
            while True:
                try:
                    write(mine, {HOUR: 1}, f"{name}-{number}", rows_read=1)
                    break
                except CommitConflict:
                    mine.refresh()

    threads = [threading.Thread(target=write_patiently, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.refresh()
    assert (len(log.files()), log.rows_read) == (15, 15)


def test_the_log_survives_its_checkpoints(log: ClickLog) -> None:
    for number in range(55):
        write(log, {HOUR + number: 1}, f"f{number}")
    assert list((log.root / "_delta_log").glob("*.checkpoint.parquet"))
    again = ClickLog.open_or_create(log.root, SPEC)
    assert len(again.files()) == 55
    assert all(again.has_ingested(f"f{number}") for number in range(55))
    assert len(again.files(3)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"numeric": (Numeric(name="price"), Numeric(name="stars"))}, r"new \['stars'\]"),
        ({"numeric": ()}, r"gone \['price'\]"),
        ({"categorical": (Categorical(name="item", type="integer"), Categorical(name="tags", many=True))}, r"\['item'\]"),
    ],
)
def test_a_changed_spec_is_refused_with_the_way_out(log: ClickLog, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words + ".*state folder"):
        ClickLog.open_or_create(log.root, SPEC.model_copy(update=change))


def test_an_address_is_refused() -> None:
    with pytest.raises(DataError, match="local folder"):
        ClickLog.open_or_create("s3://bucket/log", SPEC)


def test_rows_of_many_hours_in_any_order_need_few_open_files(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lake, "MAX_OPEN_FILES", 3)
    monkeypatch.setattr(lake, "MAX_BUFFERED_BYTES", 20_000)
    writer = log.write()
    rng = np.random.default_rng(1)
    expected: dict[int, list[int]] = {}
    for step in range(300):
        hour = HOUR + int(rng.integers(20))
        writer.add(hour, make_rows(3, hour=hour, first=3 * step))
        expected.setdefault(hour, []).extend(range(3 * step, 3 * step + 3))
    log.append(writer.close(), "f1")
    for hour, keys in expected.items():
        got = log.keys_of([file for file in log.files() if file.hour == hour])
        assert sorted(got.tolist()) == keys


def test_discarded_files_are_gone(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lake, "ROW_GROUP_ROWS", 10)
    writer = log.write()
    writer.add(HOUR, make_rows(25))
    assert data_files(log)
    writer.discard()
    assert not data_files(log)


def test_a_full_disk_is_said_and_nothing_stays(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lake.os, "fsync", fail)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        write(log, {HOUR: 5}, "f1")
    assert not data_files(log)
    monkeypatch.undo()
    write(log, {HOUR: 5}, "f1")


def test_a_failure_after_the_commit_does_not_undo_it(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = log._create_transaction

    def commit_then_fail(*args: Any) -> None:
        commit(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log, "_create_transaction", commit_then_fail)
    write(log, {HOUR: 5}, "f1")
    assert log.has_ingested("f1")
    assert log.keys_of(log.files()).tolist() == [0, 1, 2, 3, 4]


def rejected(row: int | None, reason: str = "bad") -> RejectedRow:
    return RejectedRow(row=row, kind=reason, reason=reason, raw='{"a":1}')


def test_the_quarantine_takes_the_rows_of_a_file_once(tmp_path: Path) -> None:
    quarantine = Quarantine.open_or_create(tmp_path / "quarantine")
    for _ in range(2):
        writer = quarantine.write("landing/a.csv", NOW)
        writer.add([rejected(1), rejected(5, "worse \ud800")])
        quarantine.append(writer.close(), "f1", "landing/a.csv")
    quarantine.add_broken("landing/b.csv", "empty", "f2", NOW)
    assert quarantine.has_broken("f2")
    assert not quarantine.has_broken("f1")
    rows = Quarantine.open_or_create(tmp_path / "quarantine").rows().to_pylist()
    assert [(row["file"], row["row"], row["reason"]) for row in rows] == [
        ("landing/a.csv", 1, "bad"),
        ("landing/a.csv", 5, "worse \\ud800"),
        ("landing/b.csv", None, "empty"),
    ]
    assert len(list((tmp_path / "quarantine").glob("*.parquet"))) == 2
    assert rows[0]["ingested_at"] == NOW
