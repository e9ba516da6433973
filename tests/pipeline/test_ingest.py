"""From the landing folder to the click log, exactly once."""

import errno
import gzip
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_schemas.dataset import Categorical, DatasetSpec, LabelColumn, Numeric, TimeColumn, load_spec
from data_schemas.errors import CommitConflict, DataError
from data_schemas.hashing import combine_hashes
from pipeline.data import lake, staging
from pipeline.data.event_keys import Repeats, SeenKeys
from pipeline.data.ingest import IngestReport, ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange

SHARED = Path(__file__).parents[2] / "../shared/data"
NOW = datetime(2024, 6, 1, tzinfo=UTC)
START = datetime(2024, 5, 1, tzinfo=UTC)
SPEC = DatasetSpec(
    name="shop",
    time=TimeColumn(column="at"),
    label=LabelColumn(column="clicked"),
    event_key=("event_id",),
    categorical=(Categorical(name="item"), Categorical(name="tags", many=True)),
    numeric=(Numeric(name="price", lower=0.0),),
)


class Place:
    """A landing folder, a click log and a quarantine."""

    def __init__(self, root: Path, spec: DatasetSpec = SPEC) -> None:
        self.root, self.spec = root, spec
        self.landing = root / "landing"
        self.landing.mkdir(parents=True)
        self.open()

    def open(self) -> None:
        self.log = ClickLog.open_or_create(self.root / "log", self.spec)
        self.quarantine = Quarantine.open_or_create(self.root / "quarantine")

    def ingest(self) -> IngestReport:
        return ingest_landing(str(self.landing), self.log, self.quarantine, self.spec, now=NOW)

    def arrive(self, name: str, content: bytes) -> None:
        (self.landing / name).write_bytes(content)

    def table(self) -> list[dict[str, Any]]:
        ranges = [RowRange.whole(file) for file in self.log.files()]
        names = [name for name in self.log.schema.names if name != "event_key"]
        rows = self.log.read(ranges, names).to_pylist()
        return sorted(rows, key=lambda row: json.dumps(row, default=str))

    def orphans(self) -> set[str]:
        found = {str(path.relative_to(self.log.root)) for path in self.log.root.rglob("part-*.parquet")}
        return found - {file.path for file in self.log.files()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def event(number: int, **changed: Any) -> dict[str, Any]:
    row = {
        "event_id": f"e{number}",
        "at": (START + timedelta(minutes=7 * number)).isoformat(),
        "clicked": number % 2,
        "item": f"item-{number % 3}" if number % 4 else None,
        "tags": ["a", "b"][: number % 3],
        "price": number / 4,
    }
    return row | changed


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    def cell(value: Any) -> str:
        return "" if value is None else "|".join(value) if isinstance(value, list) else str(value)

    lines = [",".join(event(0)), *(",".join(cell(value) for value in row.values()) for row in rows)]
    return "\n".join(lines).encode() + b"\n"


def as_json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows) or b"\n"


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    schema = pa.schema(
        [
            ("event_id", pa.string()),
            ("at", pa.timestamp("us", tz="UTC")),
            ("clicked", pa.int8()),
            ("item", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("price", pa.float64()),
        ]
    )
    typed = [row | {"at": datetime.fromisoformat(row["at"])} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(typed, schema=schema), sink)
    return bytes(sink.getvalue())


WRITERS = {
    ".csv": as_csv,
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    ".jsonl": as_json_lines,
    ".parquet": as_parquet,
}


def test_rows_go_to_their_hours_and_are_counted(place: Place) -> None:
    place.arrive("a.csv", as_csv([event(number) for number in range(20)]))
    report = place.ingest()
    assert (report.files_read, report.rows_accepted, report.rows_rejected, report.rows_late) == (1, 20, 0, 0)
    assert [file.num_rows for file in place.log.files()] == [9, 9, 2]
    assert place.table()[0]["event_time"] == START
    assert report.log_version == place.log.version == 1
    assert report.lines()[1] == "rows: 20 accepted (0 late), 0 duplicate, 0 rejected"


def test_the_same_file_twice_changes_nothing(place: Place) -> None:
    place.arrive("a.csv", as_csv([event(number) for number in range(20)]))
    place.ingest()
    version = place.log.version
    place.open()
    report = place.ingest()
    assert (report.files_read, report.files_skipped, report.log_version) == (0, 1, version)


def test_the_same_events_in_another_file_or_format_are_duplicates(place: Place) -> None:
    rows = [event(number) for number in range(20)]
    for name, writer in WRITERS.items():
        place.arrive(f"a{name}", writer(rows))
    report = place.ingest()
    assert (report.rows_accepted, report.rows_duplicate) == (20, 60)
    assert len(place.table()) == 20


def test_late_rows_join_their_own_hour_and_are_counted(place: Place) -> None:
    place.arrive("a.csv", as_csv([event(30)]))
    place.ingest()
    place.arrive("b.csv", as_csv([event(1), event(2), event(31)]))
    report = place.ingest()
    assert (report.rows_accepted, report.rows_late) == (3, 2)
    assert [file.hour for file in place.log.files()] == sorted(file.hour for file in place.log.files())


def test_bad_rows_are_quarantined_with_file_row_and_reason(place: Place) -> None:
    rows = [event(0), event(1, price="cheap"), event(2), event(3, price="-1"), event(4, clicked="")]
    content = as_csv(rows).replace(b"e2,", b"e2,one too many,")
    place.arrive("a.csv", content)
    report = place.ingest()
    assert (report.rows_accepted, report.rows_rejected) == (1, 4)
    assert report.reasons == {
        "price: is not a number": 1,
        "the row has not the 6 values of the header": 1,
        "price: is outside [0, inf]": 1,
        "clicked: is missing: a label is needed": 1,
    }
    found = place.quarantine.rows().to_pylist()
    assert [row["row"] for row in found] == [2, 3, 4, 5]
    assert found[0]["reason"] == "price: is not a number, got 'cheap'"
    assert json.loads(found[0]["raw"])["event_id"] == "e1"
    assert found[0]["file"].endswith("landing/a.csv")
    assert "  1 x price: is not a number" in report.lines()


def test_a_broken_file_is_quarantined_whole_and_stops_nothing(place: Place) -> None:
    rows = [event(number) for number in range(3000)]
    place.arrive("a.csv", as_csv(rows[:10]))
    place.arrive("b.csv.gz", gzip.compress(as_csv(rows))[:-50])
    place.arrive("c.jsonl", b"")
    place.arrive("d.csv", as_csv(rows[10:20]))
    place.arrive("e.xlsx", b"?")
    report = place.ingest()
    assert (report.files_read, report.files_broken, report.files_unknown) == (2, 2, 1)
    assert len(place.table()) == 20
    assert place.orphans() == set()
    whole = [(Path(row["file"]).name, row["row"]) for row in place.quarantine.rows().to_pylist()]
    assert whole == [("b.csv.gz", None), ("c.jsonl", None)]
    assert place.ingest().files_skipped == 4
    place.arrive("b.csv.gz", gzip.compress(as_csv(rows)))
    mended = place.ingest()
    assert (mended.files_read, mended.rows_accepted, mended.rows_duplicate) == (1, 2980, 20)


def test_a_file_that_breaks_late_leaves_no_row_and_no_key(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lake, "ROW_GROUP_ROWS", 5)
    monkeypatch.setattr("pipeline.data.landing.BATCH_ROWS", 10)
    good = as_json_lines([event(number) for number in range(100)])
    monkeypatch.setattr("pipeline.data.landing.MAX_LINE_BYTES", 1000)
    place.arrive("a.jsonl", good + b"x" * 2000)
    place.arrive("b.jsonl", good)
    report = place.ingest()
    assert (report.files_broken, report.rows_accepted, report.rows_duplicate) == (1, 100, 0)
    assert place.orphans() == set()


def test_a_file_without_good_rows_is_remembered(place: Place) -> None:
    place.arrive("a.csv", as_csv([event(1, clicked="maybe")]))
    assert place.ingest().rows_rejected == 1
    again = place.ingest()
    assert (again.files_skipped, again.rows_rejected) == (1, 0)
    assert place.quarantine.rows().num_rows == 1


def test_an_empty_landing_folder_reports_no_files_and_a_missing_one_is_an_error(place: Place) -> None:
    assert place.ingest().files_read == 0
    place.landing.rmdir()
    with pytest.raises(DataError, match="create it"):
        place.ingest()


@pytest.mark.parametrize("dies_in", ["quarantine", "log"])
def test_a_kill_between_the_two_commits_doubles_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    place.arrive("a.csv", as_csv([event(0), event(1, price="cheap")]))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    target = ClickLog if dies_in == "log" else Quarantine
    monkeypatch.setattr(target, "append", die)
    with pytest.raises(KeyboardInterrupt):
        place.ingest()
    monkeypatch.undo()
    place.open()
    report = place.ingest()
    assert (report.rows_accepted, report.rows_rejected) == (1, 1)
    assert (len(place.table()), place.quarantine.rows().num_rows) == (1, 1)


def test_a_full_disk_is_not_the_files_fault(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.arrive("a.csv", as_csv([event(number) for number in range(20)]))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(DataError, match="No space left on device"):
        place.ingest()
    monkeypatch.undo()
    assert place.orphans() == set()
    assert place.quarantine.rows().num_rows == 0
    assert place.ingest().rows_accepted == 20


def test_a_file_that_the_system_withholds_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.arrive("a.csv", as_csv([event(0)]))
    place.arrive("b.csv", as_csv([event(1)]))
    opened = staging.read_batches

    def refuse(file: Any, spec: DatasetSpec) -> Any:
        if file.path.endswith("a.csv"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(file, spec)

    monkeypatch.setattr(staging, "read_batches", refuse)
    report = place.ingest()
    assert (report.files_unreadable, report.files_read) == (1, 1)
    assert any("PermissionError" in line for line in report.lines())
    monkeypatch.undo()
    assert place.ingest().files_read == 1


def test_another_writer_in_between_costs_another_attempt_and_no_duplicate(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [event(number) for number in range(20)]
    place.arrive("a.csv", as_csv(rows))
    rival_landing = place.root / "rival"
    rival_landing.mkdir()
    (rival_landing / "b.csv").write_bytes(as_csv(rows[:5]))
    rival = ClickLog.open_or_create(place.log.root, SPEC)
    append = ClickLog.append

    def be_late(self: ClickLog, *args: Any) -> int:
        if self is place.log and rival.version == 0:
            ingest_landing(str(rival_landing), rival, place.quarantine, SPEC, now=NOW)
        return append(self, *args)

    monkeypatch.setattr(ClickLog, "append", be_late)
    report = place.ingest()
    assert (report.rows_accepted, report.rows_duplicate) == (15, 5)
    assert len(place.table()) == 20
    assert place.orphans() == set()


def test_writers_that_never_stop_are_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.arrive("a.csv", as_csv([event(0)]))

    def lose(*_: object) -> None:
        raise CommitConflict("again")

    monkeypatch.setattr(ClickLog, "append", lose)
    with pytest.raises(DataError, match="one ingest at a time"):
        place.ingest()


def test_rows_without_a_clock_count_on_from_file_to_file(tmp_path: Path) -> None:
    time = TimeColumn(format="row_order", start="2024-05-01T00:00:00Z", rows_per_hour=4)
    place = Place(tmp_path, SPEC.model_copy(update={"time": time}))
    for number in range(3):
        place.arrive(f"{number}.csv", as_csv([event(3 * number + row) for row in range(3)]))
        place.ingest()
    assert [file.num_rows for file in place.log.files()] == [3, 1, 2, 2, 1]


def test_progress_is_told_after_each_file(place: Place) -> None:
    for name in "abc":
        place.arrive(f"{name}.csv", as_csv([]))
    told: list[tuple[int, int]] = []
    ingest_landing(
        str(place.landing), place.log, place.quarantine, SPEC, now=NOW, progress=lambda done, all_: told.append((done, all_))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_seen_keys_equal_a_python_set(place: Place) -> None:
    rng = np.random.default_rng(0)
    seen = SeenKeys(place.log)
    reference: dict[int, set[int]] = {0: set(), 1: set()}
    for _ in range(200):
        hour = int(rng.integers(2))
        keys = rng.integers(0, 3000, rng.integers(1, 60)).astype(np.uint64)
        expected = []
        for key in keys.tolist():
            expected.append(key not in reference[hour])
            reference[hour].add(key)
        assert seen.take_new(hour, keys).tolist() == expected


def test_repeats_are_numbered_within_their_file_and_hour() -> None:
    rng = np.random.default_rng(1)
    repeats = Repeats()
    reference = Counter[tuple[int, int]]()
    for _ in range(200):
        hour = int(rng.integers(2))
        keys = rng.integers(0, 50, rng.integers(1, 60)).astype(np.uint64)
        expected = []
        for key in keys.tolist():
            number = reference[hour, key]
            one = np.array([key], np.uint64)
            expected.append(int(combine_hashes(one, np.array([number], np.uint64))[0]) if number else key)
            reference[hour, key] += 1
        assert repeats.tell_apart(hour, keys).tolist() == expected


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_split_order_format_and_repetition_gives_the_same_table(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "place", ignore_errors=True)
    place = Place(tmp_path / "place")
    wanted = data.draw(st.lists(st.integers(0, 25), unique=True, min_size=1, max_size=15))
    arrivals = data.draw(st.permutations(wanted + data.draw(st.lists(st.sampled_from(wanted), max_size=8))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arrivals)), max_size=4)))
    accepted = 0
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(arrivals)], strict=True)):
        suffix = data.draw(st.sampled_from([".csv", ".parquet", ".csv.gz"]))
        place.arrive(f"{number}{suffix}", WRITERS[suffix]([event(row) for row in arrivals[start:stop]]))
        if data.draw(st.booleans()):
            accepted += place.ingest().rows_accepted
    accepted += place.ingest().rows_accepted
    assert accepted == len(wanted)
    at_once = Place(tmp_path / "place" / "at-once")
    at_once.arrive("all.jsonl", as_json_lines([event(row) for row in wanted]))
    at_once.ingest()
    assert place.table() == at_once.table()


REPEATING = SPEC.model_copy(update={"repeats": "keep"})


@pytest.fixture
def repeating(tmp_path: Path) -> Place:
    return Place(tmp_path, REPEATING)


def test_kept_repeats_stay_within_a_file_and_are_duplicates_in_another(repeating: Place) -> None:
    rows = [event(1), event(2), event(1, item="other"), event(1)]
    repeating.arrive("a.csv", as_csv(rows))
    assert repeating.ingest().rows_accepted == 4
    repeating.arrive("a-again.csv", as_csv(rows))
    repeating.arrive("a.jsonl", as_json_lines(rows))
    report = repeating.ingest()
    assert (report.files_skipped, report.rows_accepted, report.rows_duplicate) == (1, 0, 8)
    assert [row["item"] for row in repeating.table() if row["event_time"].minute == 7].count("other") == 1


def test_two_files_that_each_repeat_a_row_give_it_twice(repeating: Place) -> None:
    repeating.arrive("a.csv", as_csv([event(1), event(1), event(2)]))
    repeating.arrive("b.csv", as_csv([event(3), event(1), event(1)]))
    report = repeating.ingest()
    assert (report.rows_accepted, report.rows_duplicate) == (4, 2)


def test_repeats_are_counted_anew_after_a_file_that_breaks(repeating: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.landing.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("pipeline.data.landing.BATCH_ROWS", 10)
    good = as_json_lines([event(1)] * 25)
    repeating.arrive("a.jsonl", good + b"x" * 2000)
    repeating.arrive("b.jsonl", good)
    report = repeating.ingest()
    assert (report.files_broken, report.rows_accepted, report.rows_duplicate) == (1, 25, 0)


def test_a_log_that_begins_to_keep_repeats_knows_its_rows(place: Place) -> None:
    place.arrive("a.csv", as_csv([event(1), event(1), event(2)]))
    assert place.ingest().rows_accepted == 2
    place.spec = REPEATING
    place.arrive("a-again.csv", as_csv([event(1), event(1), event(2)]))
    assert place.ingest().rows_accepted == 1


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_kept_repeats_are_as_many_as_the_file_that_has_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr("pipeline.data.landing.BATCH_ROWS", data.draw(st.integers(1, 6)))
    shutil.rmtree(tmp_path / "place", ignore_errors=True)
    place = Place(tmp_path / "place", REPEATING)
    numbers = st.integers(0, 12)
    files = data.draw(st.lists(st.lists(numbers, max_size=25), min_size=1, max_size=4))
    files += [data.draw(st.permutations(again)) for again in data.draw(st.lists(st.sampled_from(files), max_size=2))]
    accepted = 0
    for number, rows in enumerate(files):
        suffix = data.draw(st.sampled_from([".csv", ".jsonl", ".parquet"]))
        place.arrive(f"{number}{suffix}", WRITERS[suffix]([event(row) for row in rows]))
        if data.draw(st.booleans()):
            accepted += place.ingest().rows_accepted
    accepted += place.ingest().rows_accepted
    most = Counter[int]()
    for rows in files:
        most |= Counter(rows)
    assert accepted == most.total()
    found = Counter(row["event_time"] for row in place.table())
    assert found == {START + timedelta(minutes=7 * number): count for number, count in most.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    suffix=st.sampled_from(sorted(WRITERS)), at=st.floats(0, 1), noise=st.binary(min_size=1, max_size=30), whole=st.booleans()
)
def test_any_bytes_are_accepted_or_quarantined_and_the_other_files_go_on(
    place: Place, suffix: str, at: float, noise: bytes, whole: bool
) -> None:
    content = WRITERS[suffix]([event(number) for number in range(5)])
    middle = int(at * len(content))
    place.arrive(f"noise{suffix}", noise if whole else content[:middle] + noise + content[middle:])
    place.arrive("good.csv", as_csv([event(100)]))
    report = place.ingest()
    assert report.files_read + report.files_broken + report.files_skipped == len(list(place.landing.iterdir()))
    assert any(row["price"] == 25.0 for row in place.table())
    assert place.orphans() == set()


def test_real_hours_of_articles_are_ingested(tmp_path: Path) -> None:
    source = SHARED / "brunch/impressions/2019-02-22T03.parquet"
    if not source.is_file():
        pytest.skip("the brunch data is not beside this checkout")
    place = Place(tmp_path, load_spec("brunch"))
    shutil.copy(source, place.landing)
    report = place.ingest()
    raw = pq.read_table(source)
    assert raw.group_by(["event_time", "user_id", "item_id"]).aggregate([]).num_rows < raw.num_rows
    assert (report.rows_accepted, report.rows_duplicate) == (raw.num_rows, 0)
    assert len(place.log.files()) == 1


def test_real_advertisements_are_ingested_from_their_declaration_alone(tmp_path: Path) -> None:
    if not (SHARED / "amexpert").is_dir():
        pytest.skip("the amexpert data is not beside this checkout")
    place = Place(tmp_path, load_spec("amexpert"))
    report = ingest_landing(str(SHARED / "amexpert"), place.log, place.quarantine, place.spec, now=NOW)
    assert (report.rows_accepted, report.rows_rejected, report.files_read) == (60_228, 0, 1)


def test_files_of_one_name_in_several_folders_are_read_in_the_same_order_wherever_they_lie(tmp_path: Path) -> None:
    orders = []
    for number in range(4):
        place = Place(tmp_path / f"state-{number}")
        for folder in range(6):
            (place.landing / f"host-{folder}").mkdir()
            place.arrive(f"host-{folder}/clicks.csv", as_csv([event(0, event_id=f"of {folder}", price=folder)]))
        place.ingest()
        ranges = [RowRange.whole(file) for file in place.log.files()]
        orders.append(place.log.read(ranges, ["price"]).column("price").to_pylist())
    assert sorted(orders[0]) == list(range(6))
    assert orders[1:] == [orders[0]] * 3
