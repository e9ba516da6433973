"""Whatever is appended, compacted, learned in part or rolled back: every row is learned exactly once."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.click_log import click_log_schema
from data_schemas.dataset import Categorical, DatasetSpec, Numeric, TimeColumn
from data_schemas.errors import CommitConflict, DataError
from pipeline.config import MaintenanceConfig, WindowConfig
from pipeline.data.compaction import compact
from pipeline.data.lake import ClickLog, LogFile, RowRange
from pipeline.data.lineage import Piece, Rewrite, added_between
from pipeline.data.windows import Cursor, Window, next_window, read_window

SPEC = DatasetSpec(
    name="shop",
    time=TimeColumn(column="at"),
    event_key=("at",),
    categorical=(Categorical(name="item"), Categorical(name="tags", many=True)),
    numeric=(Numeric(name="price"),),
)
HOUR = 473_352  # 2024-01-01T00Z
LATER = datetime(2100, 1, 1, tzinfo=UTC)
EAGER = MaintenanceConfig(compact_files=2, compact_after_hours=0)


@pytest.fixture
def log(tmp_path: Path) -> ClickLog:
    return ClickLog.open_or_create(tmp_path / "log", SPEC)


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


def append(log: ClickLog, first: int, rows: dict[int, int], name: str = "") -> int:
    """Rows numbered from `first` on, so many for each hour; the next number."""
    writer = log.write(name)
    for hour, num_rows in rows.items():
        writer.add(hour, make_rows(num_rows, hour=hour, first=first))
        first += num_rows
    log.append(writer.close(), f"file-{name}-{first}-{log.version}")
    return first


def keys(log: ClickLog, window: Window) -> list[int]:
    return read_window(log, window, ["event_key"]).column("event_key").to_pylist()


def window_of(log: ClickLog, cursor: Cursor) -> Window:
    window = next_window(log, cursor, WindowConfig(), LATER)
    assert window is not None
    return window


def test_rows_and_their_order_stay_in_one_file_with_page_checksums(log: ClickLog) -> None:
    number = 0
    for name in ("c", "a", "b"):
        number = append(log, number, {HOUR: 5, HOUR + 1: 2}, name)
    before = window_of(log, Cursor())
    expected, table = keys(log, before), read_window(log, before, log.schema.names)
    report = compact(log, EAGER)
    assert (report.hours, report.files_before, report.rows) == (2, 6, 21)
    after = window_of(log, Cursor())
    assert len(log.files()) == 2
    assert keys(log, after) == expected
    assert read_window(log, after, log.schema.names).cast(log.schema).equals(table.cast(log.schema))
    assert keys(log, before) == expected, "an update that was reading the old files goes on"
    path = log.root / log.files()[0].path
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=path.name):
        keys(log, after)


def test_what_was_learned_before_a_compaction_is_not_learned_again(log: ClickLog) -> None:
    number = append(log, 0, {HOUR: 4})
    learned = window_of(log, Cursor())
    cursor = learned.cursor_after(np.array([True, False, False, True]))
    append(log, number, {HOUR: 3, HOUR + 1: 2})
    compact(log, EAGER)
    assert len(log.files()) == 2
    window = window_of(log, cursor)
    assert sorted(keys(log, window)) == [0, 3, 4, 5, 6, 7, 8]
    assert window.late_rows == 3, "of the compacted file, two rows were pending and three came late"


def test_the_newest_hours_and_those_of_few_files_are_left_alone(log: ClickLog) -> None:
    number = 0
    for _ in range(3):
        number = append(log, number, {HOUR: 1, HOUR + 5: 1})
    append(log, number, {HOUR + 1: 1})
    assert compact(log, MaintenanceConfig(compact_files=3, compact_after_hours=1)).hours == 1
    assert [file.hour for file in log.files()] == [HOUR, HOUR + 1, *[HOUR + 5] * 3]
    assert compact(log, MaintenanceConfig(compact_files=3, compact_after_hours=1)).hours == 0


def test_a_commit_meanwhile_makes_it_start_over(log: ClickLog, monkeypatch: pytest.MonkeyPatch) -> None:
    number = append(log, append(log, 0, {HOUR: 2}), {HOUR: 2})
    other, rewrite, interrupted = ClickLog.open_or_create(log.root, SPEC), log.rewrite, []

    def late(*args: object, **named: object) -> int:
        if not interrupted:
            interrupted.append(append(other, number, {HOUR: 2}))
        return rewrite(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(log, "rewrite", late)
    assert compact(log, EAGER).files_before == 3
    assert interrupted
    assert sorted(keys(log, window_of(log, Cursor()))) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(CommitConflict):
        append(other, number, {HOUR: 1})


def test_a_rewrite_that_does_not_say_what_became_of_the_rows_is_refused(log: ClickLog) -> None:
    append(log, append(log, 0, {HOUR: 2}), {HOUR: 2})
    files = log.files()
    writer = log.write()
    writer.add(HOUR, make_rows(4))
    log.rewrite([], writer.close(), files, data_change=False)
    with pytest.raises(DataError, match=r"2 files of the click log's version 2 were rewritten .* which rows are new"):
        added_between(log, 2, 3)


def test_a_rewrite_survives_being_written_down() -> None:
    mask = np.random.default_rng(0).random(1000) < 0.5
    origins = (
        Piece(file=LogFile(hour=3, path="a", num_rows=1000), mask=mask),
        Piece(file=LogFile(hour=3, path="b", num_rows=7)),
    )
    for into in (None, LogFile(hour=3, path="c", num_rows=2000)):
        again = Rewrite.from_json(Rewrite(into=into, origins=origins).to_json())
        assert again.into == into
        assert [origin.num_rows for origin in again.origins] == [int(mask.sum()), 7]
        assert again.origins[0].mask is not None
        assert (again.origins[0].mask == mask).all()


Appended = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=3)
Learned = st.sampled_from([0.0, 0.5, 1.0])
Steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), Appended),
        st.tuples(st.just("compact"), st.integers(2, 3)),
        st.tuples(st.just("learn"), Learned),
        st.tuples(st.just("roll back"), st.integers(0, 9)),
    ),
    min_size=6,
    max_size=16,
)


@settings(deadline=None, max_examples=30)
@given(steps=Steps, seed=st.integers(0, 2**32))
def test_every_row_is_learned_once_whatever_is_compacted(steps: list[tuple[str, object]], seed: int) -> None:
    """The reference is a set of row numbers; after the last step everything that waits is learned."""
    folder = Path(mkdtemp())
    try:
        _check(ClickLog.open_or_create(folder, SPEC), steps, np.random.default_rng(seed))
    finally:
        shutil.rmtree(folder)


def _check(log: ClickLog, steps: list[tuple[str, object]], rng: np.random.Generator) -> None:
    number, hours = 0, 0
    kept: list[tuple[Cursor, list[int]]] = [(Cursor(), [])]
    for what, value in [*steps, ("append", [(9, 1)]), *[("learn", 1.0)] * 40]:
        match what, value:
            case "append", list():
                number = append(log, number, {HOUR + hour: rows for hour, rows in dict(value).items()})
                hours = max(hours, *(hour for hour, _ in value))
            case "compact", int():
                compact(log, MaintenanceConfig(compact_files=value, compact_after_hours=0))
            case "learn", float():
                kept.append(_learn(log, *kept[-1], value, rng))
            case _, place:
                kept = kept[: int(str(place)) % len(kept) + 1]
    cursor, learned = kept[-1]
    left = next_window(log, cursor, WindowConfig(), LATER)
    assert left is None
    waiting = [int(key) for piece in cursor.pending for key in _keys_of(log, piece)]
    assert sorted(learned + waiting) == list(range(number))


def _learn(
    log: ClickLog, cursor: Cursor, learned: list[int], share: float, rng: np.random.Generator
) -> tuple[Cursor, list[int]]:
    window = next_window(log, cursor, WindowConfig(max_rows=7), LATER)
    if window is None:
        return cursor, learned
    offered = keys(log, window)
    unreached = rng.random(len(offered)) >= share
    return window.cursor_after(unreached), learned + [key for key, left in zip(offered, unreached, strict=True) if not left]


def _keys_of(log: ClickLog, piece: Piece) -> list[int]:
    (active,) = [file for file in log.files() if file.path == piece.file.path]
    table = log.read([RowRange.whole(active)], ["event_key"])
    return [int(key) for key in table.column("event_key").to_numpy()[piece.rows]]
