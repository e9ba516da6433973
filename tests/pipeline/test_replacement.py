"""Replaced hours: the log has the new rows, and whatever was learned, held or compacted before, no row is learned twice."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CommitConflict, ConfigError, DataError
from pipeline.config import MaintenanceConfig, WindowConfig
from pipeline.data.compaction import compact
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.replacement import ReplacementReport, replace_hour
from pipeline.data.windows import Cursor, Window, next_window, read_window

DECLARED = {
    "name": "shop",
    "time": {"column": "at", "format": "unix_seconds"},
    "label": {"column": "clicked"},
    "event_key": ("id",),
    "categorical": ({"name": "id", "type": "integer"}, {"name": "tags", "many": True}),
    "numeric": ({"name": "price"},),
}
SPEC = DatasetSpec.model_validate(DECLARED)
START = datetime(2024, 1, 1, tzinfo=UTC)
FIRST = int(START.timestamp()) // 3600
NOW = START + timedelta(days=9)


class Shop:
    """A click log, its landing folder, and a folder for what is delivered anew."""

    def __init__(self, folder: Path, spec: DatasetSpec = SPEC) -> None:
        self.spec, self.landing, self.again, self.root = spec, folder / "landing", folder / "again", folder
        self.landing.mkdir(parents=True)
        self.log = ClickLog.open_or_create(folder / "log", spec)
        self.quarantine = Quarantine.open_or_create(folder / "quarantine")
        self.files = 0

    def write(self, folder: Path, hour: int, rows: Mapping[int, float | str]) -> Path:
        """A file of rows, id by id with their price."""
        self.files += 1
        at = (START + timedelta(hours=hour)).timestamp()
        lines = ["id,at,clicked,tags,price", *(f"{key},{at:.0f},{key % 2},t{key}|u,{price}" for key, price in rows.items())]
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.files:05d}.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    def ingest(self) -> None:
        ingest_landing(str(self.landing), self.log, self.quarantine, self.spec, now=NOW)

    def arrive(self, hour: int, keys: Sequence[int], price: float = 1.0) -> None:
        self.write(self.landing, hour, dict.fromkeys(keys, price))
        self.ingest()

    def replace(self, hour: int, rows: Mapping[int, float | str] | None = None) -> ReplacementReport:
        if rows is not None:
            shutil.rmtree(self.again, ignore_errors=True)
            self.write(self.again, hour, rows)
        return replace_hour(str(self.again), FIRST + hour, self.log, self.quarantine, self.spec, now=NOW)

    def window(self, cursor: Cursor) -> Window | None:
        return next_window(self.log, cursor, WindowConfig(), NOW)

    def keys(self, window: Window) -> list[int]:
        keys: list[int] = read_window(self.log, window, ["id"])["id"].to_pylist()
        return keys

    def prices(self, hour: int) -> dict[int, float]:
        """By id, of a log that is opened anew."""
        log = ClickLog.open_or_create(self.root / "log", self.spec)
        whole = next_window(log, Cursor(), WindowConfig(hours=168, align_hour=0), NOW + timedelta(days=9))
        assert whole
        table = read_window(log, whole, ["id", "price", "event_time"])
        of_hour = [row for row in table.to_pylist() if row["event_time"] == START + timedelta(hours=hour)]
        assert len({row["id"] for row in of_hour}) == len(of_hour)
        return {row["id"]: row["price"] for row in of_hour}


def counts(report: ReplacementReport) -> tuple[int, int, int, int]:
    return report.kept, report.changed, report.added, report.removed


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_rows_stay_change_come_and_go_in_one_commit(shop: Shop) -> None:
    shop.arrive(0, [1, 2, 3])
    shop.arrive(0, [4, 5])
    shop.arrive(1, [9])
    before = shop.log.version
    report = shop.replace(0, {5: 1.0, 2: 7.0, 8: 1.0, 1: 1.0})
    assert counts(report) == (3, 1, 1, 2)
    assert shop.log.version == before + 1
    assert shop.prices(0) == {1: 1.0, 2: 7.0, 5: 1.0, 8: 1.0}
    assert shop.prices(1) == {9: 1.0}
    assert report.lines()[-1] == (
        "hour 2024-01-01 00:00 UTC: 3 rows stay, 1 of them with other values, 1 are new and are learned next, 2 have left"
    )


def test_only_what_is_new_is_learned_of_an_hour_that_was_learned(shop: Shop) -> None:
    shop.arrive(0, [1, 2, 3])
    first = shop.window(Cursor())
    assert first
    cursor = first.cursor_after()
    shop.replace(0, {3: 5.0, 4: 1.0, 1: 1.0})
    shop.arrive(1, [7])
    second = shop.window(cursor)
    assert second
    assert (shop.keys(second), second.late_rows, second.removed_rows) == ([4, 7], 1, 0)
    assert shop.window(second.cursor_after()) is None


def test_rows_that_waited_wait_on_with_their_new_values_and_those_that_left_are_counted(shop: Shop) -> None:
    shop.arrive(0, [1, 2, 3, 4])
    first = shop.window(Cursor())
    assert first
    cursor = first.cursor_after(np.array([False, True, True, False]))
    shop.replace(0, {1: 1.0, 2: 6.0, 4: 1.0})
    shop.arrive(1, [7])
    second = shop.window(cursor)
    assert second
    assert (shop.keys(second), second.removed_rows) == ([2, 7], 1)
    assert read_window(shop.log, second, ["price"])["price"].to_pylist()[0] == 6.0


def test_a_version_that_a_rollback_brings_back_learns_the_hour_as_it_is_now(shop: Shop) -> None:
    shop.arrive(0, [1, 2])
    shop.replace(0, {2: 3.0, 5: 1.0})
    window = shop.window(Cursor())
    assert window
    assert shop.keys(window) == [2, 5]


def test_the_same_files_again_change_nothing(shop: Shop) -> None:
    shop.arrive(0, [1, 2])
    assert counts(shop.replace(0, {1: 1.0, 3: 2.0})) == (1, 0, 1, 1)
    version = shop.log.version
    report = shop.replace(0)
    assert (counts(report), shop.log.version) == ((2, 0, 0, 0), version)
    assert report.lines()[-1].endswith("the log was like that already")
    shutil.copytree(shop.again, shop.landing / "again")
    shop.ingest()
    assert shop.prices(0) == {1: 1.0, 3: 2.0}, "the regular ingest finds duplicates only"


def test_an_hour_that_the_log_has_not_is_filled(shop: Shop) -> None:
    shop.arrive(1, [9])
    assert counts(shop.replace(0, {1: 1.0})) == (0, 0, 1, 0)
    assert shop.prices(0) == {1: 1.0}


def test_rows_of_other_hours_and_bad_rows_are_counted_and_the_first_left_alone(shop: Shop) -> None:
    shop.arrive(0, [1])
    shop.again.mkdir()
    shop.write(shop.again, 0, {1: 1.0, 2: "dear"})
    shop.write(shop.again, 3, {8: 1.0})
    report = shop.replace(0)
    assert (counts(report), report.other_hours, report.ingested.rows_rejected) == ((1, 0, 0, 0), 1, 1)
    assert report.lines()[-1] == "  1 rows of other hours were left alone"
    assert shop.quarantine.rows().num_rows == 1
    assert {file.hour - FIRST for file in shop.log.files()} == {0}


def test_a_file_that_cannot_be_read_stops_it_all(shop: Shop) -> None:
    shop.arrive(0, [1, 2])
    shop.write(shop.again, 0, {1: 1.0})
    (shop.again / "other.parquet").write_bytes(b"PAR1 no")
    for _ in range(2):  # the second time it is known to be broken
        with pytest.raises(DataError, match="their rows would be missing; nothing was replaced"):
            shop.replace(0)
    assert shop.prices(0) == {1: 1.0, 2: 1.0}
    assert not (shop.root / "replacing/log").exists()


def test_files_without_a_row_of_the_hour_are_a_mistake(shop: Shop) -> None:
    shop.arrive(0, [1])
    with pytest.raises(DataError, match=r"no file in .* has a row of the hour 2024-01-01T00"):
        shop.replace(0, {})
    shop.write(shop.again, 5, {1: 1.0})
    with pytest.raises(DataError, match=r"no file in .* has a row of the hour 2024-01-01T00"):
        shop.replace(0)
    assert shop.prices(0) == {1: 1.0}


def test_repeated_rows_are_told_apart_as_the_ingest_does(tmp_path: Path) -> None:
    shop = Shop(tmp_path, DatasetSpec.model_validate(DECLARED | {"repeats": "keep"}))
    path = shop.write(shop.landing, 0, {1: 1.0})
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    shop.ingest()
    assert shop.log.files()[0].num_rows == 2
    assert counts(shop.replace(0, {1: 1.0})) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"time": {"format": "row_order", "start": "2024-01-01", "rows_per_hour": 5}}, "counts its hours by rows"),
        ({"label": None, "clicks": {"files": "clicks-*"}}, "clicks as events of their own"),
    ],
)
def test_data_sets_whose_hours_hang_together_are_refused(shop: Shop, changed: dict[str, object], words: str) -> None:
    spec = DatasetSpec.model_validate(DECLARED | changed)
    with pytest.raises(ConfigError, match=words):
        replace_hour(str(shop.landing), FIRST, shop.log, shop.quarantine, spec, now=NOW)


def test_another_commit_in_between_is_heeded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.arrive(0, [1, 2])
    rewrite, interruptions = ClickLog.rewrite, iter([True])

    def interrupted(log: ClickLog, *given: object, **named: object) -> int:
        if next(interruptions, False):
            other = ClickLog.open_or_create(shop.root / "log", SPEC)
            shop.write(shop.landing, 0, {3: 1.0})
            ingest_landing(str(shop.landing), other, shop.quarantine, SPEC, now=NOW)
        return rewrite(log, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ClickLog, "rewrite", interrupted)
    assert counts(shop.replace(0, {2: 1.0, 3: 9.0})) == (2, 1, 0, 1)
    assert shop.prices(0) == {2: 1.0, 3: 9.0}


def test_a_log_that_never_rests_is_an_error_and_stays_as_it_is(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.arrive(0, [1, 2])

    def refuse(*given: object, **named: object) -> int:
        raise CommitConflict("always")

    monkeypatch.setattr(ClickLog, "rewrite", refuse)
    with pytest.raises(DataError, match="5 times in a row"):
        shop.replace(0, {2: 2.0})
    assert shop.prices(0) == {1: 1.0, 2: 1.0}


Steps = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 2), st.integers(1, 4)),
        st.tuples(st.sampled_from(["replace", "replace"]), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.sampled_from(["learn", "learn half", "compact"]), st.just(0), st.just(0)),
        st.tuples(st.just("roll back"), st.integers(0, 5), st.just(0)),
    ),
    min_size=5,
    max_size=14,
)


@settings(deadline=None, max_examples=25)
@given(steps=Steps, seed=st.integers(0, 2**32))
def test_every_row_is_learned_once_while_hours_are_replaced(steps: Sequence[tuple[str, int, int]], seed: int) -> None:
    folder = Path(mkdtemp())
    try:
        _check(Shop(folder), steps, np.random.default_rng(seed))
    finally:
        shutil.rmtree(folder)


def _check(shop: Shop, steps: Sequence[tuple[str, int, int]], rng: np.random.Generator) -> None:
    kept: list[tuple[Cursor, Counter[int]]] = [(Cursor(), Counter())]
    hours: dict[int, set[int]] = {hour: set() for hour in range(3)}
    fresh = 0
    for what, first, second in steps:
        cursor, learned = kept[-1]
        window = shop.window(cursor)
        match what:
            case "arrive":
                keys = range(fresh, fresh + second)
                shop.arrive(first, keys)
                hours[first] |= set(keys)
                fresh += second
            case "replace":
                stay = {key for key in hours[first] if rng.random() < 0.7} | set(range(fresh, fresh + second))
                fresh += second
                if stay:
                    order = rng.permutation(sorted(stay)).tolist()
                    report = shop.replace(first, {key: float(rng.integers(9)) for key in order})
                    assert report.added == second
                    assert report.removed == len(hours[first] - stay)
                    hours[first] = stay
            case "learn" | "learn half" if window is not None:
                unreached = rng.random(window.num_rows) < (0.5 if what == "learn half" else 0.0)
                keys_learned = np.array(shop.keys(window))[~unreached].tolist()
                kept.append((window.cursor_after(unreached), learned + Counter(keys_learned)))
            case "roll back":
                kept = kept[: first % len(kept) + 1]
            case "compact":
                compact(shop.log, MaintenanceConfig(compact_files=2, compact_after_hours=0))
            case _:
                pass
    shop.arrive(10, [1_000_000])
    while (window := shop.window(kept[-1][0])) is not None:
        kept.append((window.cursor_after(), kept[-1][1] + Counter(shop.keys(window))))
    learned = kept[-1][1]
    assert max(learned.values()) == 1
    assert set().union(*hours.values()) | {1_000_000} <= set(learned)
