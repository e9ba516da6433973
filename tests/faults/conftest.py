"""What the faults came to is printed as a table behind the tests: name of the test, and what it counted."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_schemas.dataset import Categorical, DatasetSpec, LabelColumn, Numeric, TimeColumn
from pipeline.data.ingest import IngestReport, ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange

Tell = Callable[[str], None]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Takes one line for the table."""
    return lambda line: record_property("fault", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table; also of tests that ran in other processes."""
    lines = [
        f"{report.nodeid.partition('::')[2]}: {value}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    if lines:
        terminalreporter.section("faults")
        terminalreporter.write("\n".join(sorted(lines)) + "\n")


SPEC = DatasetSpec(
    name="shop",
    time=TimeColumn(column="at"),
    label=LabelColumn(column="clicked"),
    event_key=("event_id",),
    categorical=(Categorical(name="item"), Categorical(name="tags", many=True)),
    numeric=(Numeric(name="price", lower=0.0),),
)
NOW = datetime(2024, 6, 1, tzinfo=UTC)
START = datetime(2024, 5, 1, tzinfo=UTC)


class Place:
    """A landing folder, a click log and a quarantine."""

    spec, now, start = SPEC, NOW, START

    def __init__(self, root: Path) -> None:
        self.root, self.landing = root, root / "landing"
        self.landing.mkdir(parents=True)
        self.open()

    def open(self) -> None:
        self.log = ClickLog.open_or_create(self.root / "log", SPEC)
        self.quarantine = Quarantine.open_or_create(self.root / "quarantine")

    def arrive(self, name: str, content: bytes) -> None:
        path = self.landing / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def ingest(self) -> IngestReport:
        return ingest_landing(str(self.landing), self.log, self.quarantine, SPEC, now=NOW)

    def rows(self) -> list[dict[str, Any]]:
        """Of the click log, in an order that does not depend on how they came."""
        ranges = [RowRange.whole(file) for file in self.log.files()]
        return sorted(self.log.read(ranges, self.log.schema.names).to_pylist(), key=str)

    def orphans(self) -> set[str]:
        """Files that no commit names."""
        found = {str(path.relative_to(self.log.root)) for path in self.log.root.rglob("part-*.parquet")}
        return found - self.log.active_paths()


def event(number: int, **changed: Any) -> dict[str, Any]:
    """A row as it arrives."""
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
    """Quoted where it must be."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(event(0))
    for row in rows:
        writer.writerow("|".join(map(str, value)) if isinstance(value, list) else value for value in row.values())
    return sink.getvalue().encode(errors="surrogateescape")


def as_json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows) or b"\n"


def as_parquet(rows: Sequence[dict[str, Any]], **how: Any) -> bytes:
    """With page checksums."""
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
    pq.write_table(pa.Table.from_pylist(typed, schema=schema), sink, **({"write_page_checksum": True} | how))
    return bytes(sink.getvalue())


WRITERS = {
    ".csv": as_csv,
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows), mtime=0),
    ".jsonl": as_json_lines,
    ".jsonl.gz": lambda rows: gzip.compress(as_json_lines(rows), mtime=0),
    ".parquet": as_parquet,
}


class Made:
    """What a test makes rows and files with."""

    event = staticmethod(event)
    writers: ClassVar[dict[str, Callable[[Sequence[dict[str, Any]]], bytes]]] = WRITERS
    as_csv, as_json_lines, as_parquet = staticmethod(as_csv), staticmethod(as_json_lines), staticmethod(as_parquet)
    place = Place


@pytest.fixture
def made() -> type[Made]:
    return Made


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


DAY = Path(__file__).with_name("mortal_day.py")


class Machine:
    """Lives days, in processes that can be killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._errors = (root / "stderr").open("w")
        self._server = subprocess.Popen(
            [sys.executable, str(DAY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def ask(self, do: str, *, may_fail: bool = False, **more: Any) -> dict[str, Any]:
        """What became of an order; see the head of `mortal_day.py`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"do": do, "folder": str(self.root / "day"), **more}) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        assert may_fail or answer["ended"] != "failed", (self.root / "stderr").read_text()[-3000:]
        return answer

    def new_day(self) -> None:
        """At the same path as every day before: artifacts in MLflow know where they are."""
        shutil.rmtree(self.root / "day", ignore_errors=True)
        shutil.copytree(self.root / "morning", self.root / "day")

    def close(self) -> None:
        self._server.communicate()
        self._errors.close()

    def first_day(self, *, tracked: bool, rows_per_hour: int) -> tuple[dict[str, Any], float]:
        """What a day comes to that nothing disturbs, and its seconds; the days after it begin like it."""
        for name in ("morning", "day"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        self.ask("lay out", rows_per_hour=rows_per_hour)
        if tracked:
            self.ask("open mlflow")
        (self.root / "day").rename(self.root / "morning")
        self.new_day()
        seconds = float(self.ask("live", tracked=tracked)["seconds"])
        return self.ask("inspect", tracked=tracked)["result"], seconds


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.close()
