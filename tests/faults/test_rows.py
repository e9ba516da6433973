"""Rows and files at the edge: what they hold, when they come, how they are named, and how many there are."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_schemas.dataset import load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.update import run_update

EDGES: list[tuple[str, dict[str, Any], str | None]] = [
    ("no finite number", {"price": "inf"}, "price: is not finite"),
    ("no number", {"price": "nan"}, None),
    ("below its bound", {"price": -0.5}, "price: is outside"),
    ("null", {"price": None, "item": None, "tags": None}, None),
    ("a text of a megabyte", {"item": "x" * (1 << 20)}, "item: is longer than 1024 bytes"),
    ("a list of 100,000 ids", {"tags": [f"t{number}" for number in range(100_000)]}, "tags: has more than"),
    ("a label of two", {"clicked": 2}, "clicked:"),
    ("no key", {"event_id": None}, "event_id: is missing"),
    ("a formula", {"item": "=cmd|' /C calc'!A0"}, None),
    ("nested quotes", {"item": 'a "quoted ""b"" c", d\nnext line'}, None),
    ("tomorrow", {"at": "2024-06-02T00:00:00+00:00"}, "at: "),
    ("an hour ahead of its time zone", {"at": "2024-05-31T23:59:59-00:30"}, None),
    ("the leap day", {"at": "2024-02-29T23:30:00+00:00"}, None),
    ("no leap day", {"at": "2023-02-29T12:00:00+00:00"}, "at: "),
    ("before 1970", {"at": "1969-12-31T23:59:59+00:00"}, "at: is before 1970"),
]


@pytest.mark.parametrize(("changed", "reason"), [edge[1:] for edge in EDGES], ids=[edge[0] for edge in EDGES])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_odd_row_is_accepted_as_it_is_or_quarantined_with_its_reason(
    place: Any, made: Any, suffix: str, changed: dict[str, Any], reason: str | None
) -> None:
    place.arrive(f"a{suffix}", made.writers[suffix]([made.event(0), made.event(1, **changed), made.event(2)]))
    report = place.ingest()
    assert (report.rows_accepted, report.rows_rejected) == ((2, 1) if reason else (3, 0)), report.lines()
    if reason:
        (row,) = place.quarantine.rows().to_pylist()
        assert row["row"] == 2
        assert row["reason"].startswith(reason)
        assert len(row["raw"]) <= 4096
    elif "item" in changed:
        assert changed["item"] in [row["item"] for row in place.rows()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_quarantined_with_its_row(place: Any, made: Any, value: float) -> None:
    """Python writes NaN and Infinity into JSON, which has neither."""
    place.arrive("a.jsonl", made.as_json_lines([made.event(0), made.event(1, price=value), made.event(2)]))
    report = place.ingest()
    assert (report.rows_accepted, report.reasons) == (2, {"the line is not JSON": 1})


def test_text_that_is_not_utf_8_is_quarantined_with_its_row(place: Any, made: Any) -> None:
    place.arrive("a.csv", made.as_csv([made.event(0), made.event(1, item="\udcff\udcfe"), made.event(2)]))
    report = place.ingest()
    assert (report.rows_accepted, report.reasons) == (2, {"item: is not valid UTF-8": 1})


def test_a_row_of_another_width_that_is_not_utf_8_refuses_its_file(place: Any, made: Any) -> None:
    """Arrow cannot hand such a row over."""
    place.arrive("a.csv", made.as_csv([made.event(0), made.event(1, item="\udcff"), made.event(2)]).replace(b"\xff", b"\xff,,"))
    report = place.ingest()
    assert (report.files_broken, report.rows_accepted) == (1, 0)
    assert place.quarantine.rows().to_pylist()[0]["reason"].startswith("the file cannot be read")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(order=st.permutations(range(8)), ingests=st.lists(st.integers(1, 7), max_size=3))
def test_any_order_of_arrival_gives_the_same_table(tmp_path: Path, made: Any, order: list[int], ingests: list[int]) -> None:
    """Late, future, of another zone, over a change of daylight-saving time, and on a leap day."""
    zones = ("+00:00", "+05:30", "-08:00")
    starts = (datetime(2024, 2, 28, 22), datetime(2024, 3, 31, 0), datetime(2023, 10, 29, 0), datetime(2024, 5, 31, 22))
    events = [
        made.event(100 * part + number, at=(starts[part % 4] + timedelta(minutes=25 * number)).isoformat() + zones[number % 3])
        for part in range(8)
        for number in range(6)
    ]
    tables = []
    for sequence, stops in ((list(range(8)), [8]), (order, sorted({*ingests, 8}))):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        place = made.place(tmp_path / "place")
        done, rejected = 0, 0
        for stop in stops:
            for part in sequence[done:stop]:
                place.arrive(f"{part}.csv", made.as_csv(events[6 * part : 6 * part + 6]))
            done, rejected = stop, rejected + place.ingest().rows_rejected
        tables.append((place.rows(), rejected))
    assert tables[0] == tables[1]
    assert 0 < len(tables[0][0]) < 48


def test_the_same_file_under_two_names_is_taken_once(place: Any, made: Any) -> None:
    content = made.as_parquet([made.event(number) for number in range(50)])
    place.arrive("a.parquet", content)
    place.arrive("deeper/b.parquet", content)
    os.link(place.landing / "a.parquet", place.landing / "c.parquet")
    (place.landing / "d.parquet").symlink_to(place.landing / "a.parquet")
    report = place.ingest()
    assert (report.rows_accepted, report.rows_duplicate) == (50, 50 * (report.files_read - 1))
    assert report.files_read >= 3
    assert len(place.rows()) == 50


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".csv.gz"])
def test_a_file_that_grows_while_it_is_read_ends_whole(place: Any, made: Any, suffix: str) -> None:
    """Whatever of it was read at first, it is read again once it has changed; no row is lost, none comes twice."""
    whole = made.writers[suffix]([made.event(number) for number in range(200)])
    path, cuts = place.landing / f"growing{suffix}", [len(whole) * part // 5 for part in range(1, 6)]

    def grow() -> None:
        for cut in cuts:
            path.write_bytes(whole[:cut])
            grown.wait(0.02)

    grown = threading.Event()
    path.write_bytes(whole[: cuts[0]])
    writer = threading.Thread(target=grow)
    writer.start()
    while writer.is_alive():
        place.ingest()
    writer.join()
    place.ingest()
    keys = [row["event_key"] for row in place.rows()]
    torn = [row for row in place.quarantine.rows().to_pylist() if row["row"] is not None]
    assert len(keys) == len(set(keys))
    assert 200 <= len(keys) <= 200 + len(cuts)
    assert len(torn) <= len(cuts)


TWO_WRITERS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import SPEC, NOW
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine

root = Path(sys.argv[2])
log, quarantine = ClickLog.open_or_create(root / "log", SPEC), Quarantine.open_or_create(root / "quarantine")
print("ready", flush=True)
sys.stdin.readline()
report = ingest_landing(str(root / sys.argv[3]), log, quarantine, SPEC, now=NOW)
print(json.dumps([report.rows_accepted, report.rows_duplicate]))
"""


def test_two_processes_that_write_one_hour_at_once_lose_and_double_nothing(place: Any, made: Any) -> None:
    for name, numbers in (("one", range(60)), ("two", range(30, 90))):
        (place.root / name).mkdir()
        for start in range(0, 60, 20):
            rows = [made.event(number, at="2024-05-01T05:00:00+00:00") for number in list(numbers)[start : start + 20]]
            (place.root / name / f"{name}-{start}.csv").write_bytes(made.as_csv(rows))
    command = [sys.executable, "-c", TWO_WRITERS, str(Path(__file__).parent), str(place.root)]
    both = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in ("one", "two")
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    counts = [json.loads(process.communicate("go\n")[0]) for process in both]
    place.open()
    assert sum(accepted for accepted, _ in counts) == len(place.rows()) == 90
    assert sum(duplicate for _, duplicate in counts) == 30
    assert place.orphans() == set()


def _config(tmp_path: Path, *more: str) -> UpdateConfig:
    places = [f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}", "tracking.enabled=false"]
    return load_config(overrides=[*places, "training.precision='fp32'", "model.hidden=[8]", *more])


def _ingest(config: UpdateConfig) -> None:
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))


@pytest.mark.parametrize("hours", [-26, 26])
def test_a_wall_clock_that_jumps_in_an_update_moves_neither_its_budget_nor_its_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Every reading of `time.time` from the start of learning on is off by more than a day."""
    import time

    write_landing(SyntheticConfig(hours=2, rows_per_hour=300), tmp_path / "landing")
    config = _config(tmp_path)
    _ingest(config)
    now, jumped = time.time, False

    def stage(name: str, work: Callable[[], Any]) -> Any:
        nonlocal jumped
        jumped = jumped or name == "learn"
        return work()

    monkeypatch.setattr(time, "time", lambda: now() + (3600 * hours if jumped else 0))
    first = run_update(config, stage=stage)
    second = run_update(config, stage=stage)
    assert first is not None
    assert second is not None
    assert (first.rows_learned, second.rows_learned) == (first.rows, second.rows)
    assert second.window_start == first.window_end
    assert max(*first.seconds.values(), *second.seconds.values()) < 60
    assert min(*first.seconds.values(), *second.seconds.values()) >= 0


MEMORY_LIMIT_MIB = 1000
"""Above what the imports take; of ingest and update of an hour of 250,000 rows, 20 times the usual one here.

`ru_maxrss` is not asked: a process inherits it from the one that started it."""
UPDATE_AND_TELL = """
import sys
from datetime import UTC, datetime
from pathlib import Path
import torch
torch.set_num_threads(1)
from data_schemas.dataset import load_spec
from pipeline.config import load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.update import run_update

def peak_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10

config = load_config(overrides=sys.argv[1:])
spec = load_spec(config.dataset)
before = peak_mib()
log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
rows = run_update(config).rows_learned
print(rows, before, peak_mib() - before)
"""


@pytest.mark.slow
def test_the_update_of_an_hour_of_twenty_times_as_many_rows_stays_within_its_memory(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    grown = {}
    for factor in (1, 20):
        folder = tmp_path / str(factor)
        write_landing(SyntheticConfig(hours=1, rows_per_hour=20_000 * factor), folder / "landing")
        overrides = [f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}", "tracking.enabled=false"]
        command = [sys.executable, "-c", UPDATE_AND_TELL, *overrides, "training.batch_size=4096"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, imports, more = map(int, done.stdout.split()[-3:])
        grown[factor] = more
        tell(f"{rows} rows: {more} MiB more than the {imports} MiB of the imports")
    assert grown[20] < MEMORY_LIMIT_MIB
