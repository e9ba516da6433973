"""Held windows: whatever is held, released, discarded, learned or rolled back, a row is learned once or not at all."""

import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CheckpointError
from pipeline.config import MaintenanceConfig, WindowConfig
from pipeline.data.compaction import compact
from pipeline.data.held import decide, held_windows, hold_aside
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.windows import Cursor, Window, next_window, read_window

SPEC = DatasetSpec.model_validate(
    {
        "name": "shop",
        "time": {"column": "at", "format": "unix_seconds"},
        "label": {"column": "clicked"},
        "event_key": ("id",),
        "categorical": ({"name": "id", "type": "integer"},),
    }
)
START = datetime(2024, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=9)


class Shop:
    """A landing folder, its click log, and a model's folder."""

    def __init__(self, folder: Path) -> None:
        self.landing, self.model_dir = folder / "landing", folder / "model"
        self.landing.mkdir(parents=True)
        self.log = ClickLog.open_or_create(folder / "log", SPEC)
        self.quarantine = Quarantine.open_or_create(folder / "quarantine")
        self.rows = 0

    def arrive(self, hour: int, rows: int) -> list[int]:
        keys = list(range(self.rows, self.rows + rows))
        self.rows += rows
        at = (START + timedelta(hours=hour)).timestamp()
        lines = ["id,at,clicked", *(f"{key},{at:.0f},{key % 2}" for key in keys)]
        (self.landing / f"{self.rows:05d}.csv").write_text("\n".join(lines) + "\n")
        ingest_landing(str(self.landing), self.log, self.quarantine, SPEC, now=NOW)
        return keys

    def window(self, cursor: Cursor) -> Window | None:
        return next_window(self.log, cursor, WindowConfig(), NOW, held_windows(self.model_dir))

    def keys(self, window: Window) -> list[int]:
        keys: list[int] = read_window(self.log, window, ["id"])["id"].to_pylist()
        return keys

    def hold(self, window: Window) -> str:
        held = hold_aside(
            self.model_dir,
            start=window.start,
            end=window.end,
            log_version=window.log_version,
            pieces=window.pieces,
            kind="alarm",
            reason="a tenth of the rows",
            now=NOW,
        )
        return held.id


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_the_next_window_goes_on_and_a_released_one_is_learned_once(shop: Shop) -> None:
    bad, good = shop.arrive(0, 3), shop.arrive(1, 2)
    first = shop.window(Cursor())
    assert first is not None
    name = shop.hold(first)
    assert name == "2024-01-01T00"
    second = shop.window(Cursor())
    assert second is not None
    assert shop.keys(second) == good
    cursor = second.cursor_after()
    assert shop.window(cursor) is None
    decide(shop.model_dir, name, "released")
    again = shop.window(cursor)
    assert again is not None
    assert (shop.keys(again), again.released, again.late_rows) == (bad, name, 3)
    assert (again.start, again.end) == (second.start, second.end), "time does not run backwards"
    assert shop.window(again.cursor_after()) is None
    assert again.cursor_after().released == (name,)
    older = shop.window(cursor)
    assert older is not None
    assert older.released == name, "a version before it is offered it again"


def test_a_discarded_window_never_comes_back(shop: Shop) -> None:
    shop.arrive(0, 3)
    window = shop.window(Cursor())
    assert window is not None
    decide(shop.model_dir, shop.hold(window), "discarded")
    assert shop.window(Cursor()) is None


def test_only_a_held_window_can_be_decided_on(shop: Shop) -> None:
    shop.arrive(0, 1)
    window = shop.window(Cursor())
    assert window is not None
    name = shop.hold(window)
    with pytest.raises(CheckpointError, match="held are: 2024-01-01T00"):
        decide(shop.model_dir, "2024-01-01T09", "released")
    decide(shop.model_dir, name, "discarded")
    with pytest.raises(CheckpointError, match="was discarded before"):
        decide(shop.model_dir, name, "released")


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_learned(shop: Shop) -> None:
    shop.arrive(0, 1)
    window = shop.window(Cursor())
    assert window is not None
    path = shop.model_dir / "held" / f"{shop.hold(window)}.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"2024-01-01T00\.json"):
        shop.window(Cursor())


def test_the_same_hour_held_twice_has_two_names(shop: Shop) -> None:
    shop.arrive(0, 2)
    window = shop.window(Cursor())
    assert window is not None
    shop.hold(window)
    shop.arrive(0, 1)
    late = shop.window(Cursor())
    assert late is not None
    assert late.num_rows == 1
    assert shop.hold(late) == "2024-01-01T00-2"
    assert [held.num_rows for held in held_windows(shop.model_dir)] == [2, 1]


Steps = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 4), st.integers(1, 4)),
        st.tuples(
            st.sampled_from(["learn", "learn half", "hold", "hold", "release", "discard", "compact"]), st.just(0), st.just(0)
        ),
        st.tuples(st.just("roll back"), st.integers(0, 5), st.just(0)),
    ),
    min_size=5,
    max_size=16,
)


@settings(deadline=None, max_examples=15)
@given(steps=Steps, seed=st.integers(0, 2**32))
def test_every_row_is_learned_once_or_held_or_discarded(steps: Sequence[tuple[str, int, int]], seed: int) -> None:
    folder = Path(mkdtemp())
    try:
        _check(Shop(folder), steps, np.random.default_rng(seed))
    finally:
        shutil.rmtree(folder)


def _check(shop: Shop, steps: Sequence[tuple[str, int, int]], rng: np.random.Generator) -> None:
    kept: list[tuple[Cursor, Counter[int]]] = [(Cursor(), Counter())]
    set_aside: dict[str, list[int]] = {}
    for what, first, second in steps:
        cursor, learned = kept[-1]
        window = shop.window(cursor)
        held = [found.id for found in held_windows(shop.model_dir) if found.status == "held"]
        match what:
            case "arrive":
                shop.arrive(first, second)
            case "learn" | "learn half" if window is not None:
                unreached = rng.random(window.num_rows) < (0.5 if what == "learn half" else 0.0)
                keys = np.array(shop.keys(window))[~unreached].tolist()
                kept.append((window.cursor_after(unreached), learned + Counter(keys)))
            case "hold" if window is not None and not window.released:
                keys = shop.keys(window)
                set_aside[shop.hold(window)] = keys
            case "release" | "discard" if held:
                decide(shop.model_dir, held[0], "released" if what == "release" else "discarded")
            case "roll back":
                kept = kept[: first % len(kept) + 1]
            case "compact":
                compact(shop.log, MaintenanceConfig(compact_files=2, compact_after_hours=0))
            case _:
                pass
    _drain(shop, kept)
    aside = {key for window in held_windows(shop.model_dir) if window.status != "released" for key in set_aside[window.id]}
    assert kept[-1][1] == Counter(key for key in range(shop.rows) if key not in aside)


def _drain(shop: Shop, kept: list[tuple[Cursor, Counter[int]]]) -> None:
    """Learns all that waits; one row of a later hour at a time, so that late rows have a window to join."""
    for hour in range(10, 13):
        shop.arrive(hour, 1)
        while (window := shop.window(kept[-1][0])) is not None:
            kept.append((window.cursor_after(), kept[-1][1] + Counter(shop.keys(window))))
