"""Files that are not what was written: bits that flipped, files cut short, other people's pickles."""

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_schemas.errors import BrokenFile, DataError
from pipeline.data.lake import RowRange
from pipeline.data.landing import list_landing, read_batches

FLIPS = 200
ROWS = 3000


def _with_a_flip(whole: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(whole)
    damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _landed(place: Any) -> pa.Table:
    (file,) = list_landing(str(place.landing)).files
    return pa.concat_tables(batch.columns for batch in read_batches(file, place.spec)).unify_dictionaries()


def _flip_a_landing_file(place: Any, whole: bytes) -> Counter[str]:
    place.arrive("a.parquet", whole)
    expected, rng, seen = _landed(place), np.random.default_rng(5), Counter[str]()
    for _ in range(FLIPS):
        place.arrive("a.parquet", _with_a_flip(whole, rng))
        try:
            seen["without effect" if _landed(place).equals(expected) else "changed"] += 1
        except BrokenFile:
            seen["refused"] += 1
    return seen


def test_no_flipped_bit_of_a_landing_file_with_checksums_is_learned(place: Any, made: Any, tell: Callable[[str], None]) -> None:
    seen = _flip_a_landing_file(place, made.as_parquet([made.event(number) for number in range(ROWS)]))
    tell(f"{FLIPS} flips of a landing file with page checksums: {dict(seen)}")
    assert seen["changed"] == 0
    assert seen["refused"] > FLIPS / 2


def test_flipped_bits_of_a_landing_file_without_checksums_are_refused_or_pass(
    place: Any, made: Any, tell: Callable[[str], None]
) -> None:
    """What its writer left out cannot be made up for: the page of faults says so."""
    rows = [made.event(number) for number in range(ROWS)]
    seen = _flip_a_landing_file(place, made.as_parquet(rows, write_page_checksum=False))
    tell(f"{FLIPS} flips of a landing file whose writer left page checksums out: {dict(seen)}")
    assert seen.total() == FLIPS


def test_no_flipped_bit_of_the_click_log_is_learned(place: Any, made: Any, tell: Callable[[str], None]) -> None:
    place.arrive("a.csv", made.as_csv([made.event(0, event_id=f"e{number}", price=number) for number in range(ROWS)]))
    place.ingest()
    (file,) = place.log.files()
    path, ranges = place.log.root / file.path, [RowRange(file=file, start=0, stop=ROWS)]
    whole, expected = path.read_bytes(), place.log.read(ranges, place.log.schema.names).to_pylist()
    rng, seen = np.random.default_rng(6), Counter[str]()
    for _ in range(FLIPS):
        path.write_bytes(_with_a_flip(whole, rng))
        try:
            same = place.log.read(ranges, place.log.schema.names).to_pylist() == expected
            seen["without effect" if same else "changed"] += 1
        except DataError:
            seen["refused"] += 1
    tell(f"{FLIPS} flips of a file of the click log: {dict(seen)}")
    assert seen["changed"] == 0
    assert seen["refused"] > FLIPS / 2


def test_a_damaged_footer_is_refused_and_does_not_end_the_process(place: Any, made: Any, tell: Callable[[str], None]) -> None:
    """Arrow answers some questions about a corrupt footer with `abort`."""
    whole, rng, seen = made.as_parquet([made.event(number) for number in range(5)]), np.random.default_rng(1), Counter[str]()
    size = int.from_bytes(whole[-8:-4], "little")
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            damaged[len(whole) - 8 - size + int(rng.integers(size))] = int(rng.integers(256))
        place.arrive("a.parquet", bytes(damaged))
        try:
            _landed(place)
            seen["read"] += 1
        except BrokenFile:
            seen["refused"] += 1
    tell(f"{seen.total()} damaged footers: {dict(seen)}")
    assert seen["refused"] > 500


@pytest.mark.parametrize("suffix", [".parquet", ".csv.gz", ".jsonl.gz"])
def test_a_file_that_was_cut_anywhere_enters_whole_or_not_at_all(place: Any, made: Any, suffix: str) -> None:
    whole = made.writers[suffix]([made.event(number) for number in range(300)])
    for cut in np.linspace(0, len(whole) - 1, 40).astype(int).tolist():
        place.arrive(f"cut-{cut}{suffix}", whole[:cut])
    report = place.ingest()
    assert (report.files_broken, report.rows_accepted) == (40, 0)
    assert place.rows() == []
    assert place.orphans() == set()
    place.arrive(f"whole{suffix}", whole)
    assert place.ingest().rows_accepted == 300


INGEST_AND_TELL = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from data_schemas.dataset import Categorical, DatasetSpec, TimeColumn
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine

def peak_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10

tags = Categorical(name="tags", many=True)
spec = DatasetSpec(name="shop", time=TimeColumn(column="at"), event_key=("at",), categorical=(tags,))
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
log, quarantine = ClickLog.open_or_create(sys.argv[1] + "/log", spec), Quarantine.open_or_create(sys.argv[1] + "/quarantine")
before = peak_mib()
report = ingest_landing(sys.argv[1] + "/landing", log, quarantine, spec, now=datetime.now(UTC))
print(report.rows_accepted, report.rows_rejected, peak_mib() - before)
"""


def test_lists_that_repeat_a_long_text_do_not_fill_the_memory(tmp_path: Path, tell: Callable[[str], None]) -> None:
    """A dictionary holds the text once, so that neither rows times columns nor the size of a column shows that."""
    rows, bomb = 20_000, tmp_path / "landing" / "bomb.parquet"
    bomb.parent.mkdir()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * (1 << 20)])
    lists = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), texts)
    times = pa.array(np.arange(rows), pa.timestamp("s", tz="UTC"))
    pq.write_table(pa.table({"at": times, "tags": lists}), bomb, store_schema=False)
    command = [sys.executable, "-c", INGEST_AND_TELL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    accepted, rejected, grown = map(int, done.stdout.split())
    size = bomb.stat().st_size
    tell(f"a list column that unpacks to {rows >> 10} GiB from {size >> 10} KiB: {rejected} rows quarantined, {grown} MiB")
    assert (accepted, rejected) == (0, rows)
    assert grown < 1024


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "ran")))  # noqa: S301 - that it runs is what is tested
    assert (tmp_path / "ran").exists()


def test_a_pickle_in_the_metadata_of_a_parquet_file_is_not_run(place: Any, made: Any, tmp_path: Path) -> None:
    payload = pickle.dumps(Canary(tmp_path / "ran"))
    table = pq.read_table(pa.BufferReader(made.as_parquet([made.event(number) for number in range(10)])))
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    field = table.schema.field("price").with_metadata(extension)
    schema = table.schema.set(table.schema.get_field_index("price"), field).with_metadata(
        {b"pandas": payload, b"payload": payload}
    )
    pq.write_table(table.cast(schema), place.landing / "a.parquet")
    report = place.ingest()
    assert (report.rows_accepted, report.files_broken) in [(10, 0), (0, 1)]
    assert not (tmp_path / "ran").exists()
