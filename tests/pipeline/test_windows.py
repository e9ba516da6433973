"""Every row of the click log is in exactly one window, whatever the order in which rows arrive."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.errors import CheckpointError
from pipeline.config import WindowConfig
from pipeline.data.lake import LogFile
from pipeline.data.lineage import Piece, added_between
from pipeline.data.windows import Cursor, Window, as_time, next_window

LATER = datetime(2100, 1, 1, tzinfo=UTC)


@dataclass
class FakeLog:
    """The part of a click log that windows look at: files by version."""

    commits: list[list[LogFile]] = field(default_factory=list)
    table_id: str = "the log"

    @property
    def version(self) -> int:
        return len(self.commits)

    def files(self, version: int | None = None) -> list[LogFile]:
        return [file for commit in self.commits[: self.version if version is None else version] for file in commit]

    def rewrites(self, old: int, new: int) -> list[dict[str, object]]:
        return []

    def add(self, *hours_and_rows: tuple[int, int]) -> None:
        start = sum(len(commit) for commit in self.commits)
        self.commits.append([LogFile(path=f"{start + i}", hour=h, num_rows=n) for i, (h, n) in enumerate(hours_and_rows)])


def _next(log: FakeLog, cursor: Cursor, now: datetime = LATER, **config: int) -> Window | None:
    return next_window(log, cursor, WindowConfig(**config), now)  # type: ignore[arg-type]


def test_hours_come_in_order_from_one_commit() -> None:
    log = FakeLog()
    log.add((7, 10), (5, 20), (5, 1))
    first = _next(log, Cursor())
    assert first is not None
    assert (first.start, first.end, first.num_rows) == (5, 6, 21)
    second = _next(log, first.cursor_after())
    assert second is not None
    assert (second.start, second.end, second.num_rows) == (7, 8, 10)
    assert _next(log, second.cursor_after()) is None


def test_late_rows_join_the_next_window_and_are_counted() -> None:
    log = FakeLog()
    log.add((5, 20))
    first = _next(log, Cursor())
    assert first is not None
    log.add((3, 4))
    assert _next(log, first.cursor_after()) is None, "late rows alone make no window"
    log.add((6, 9))
    second = _next(log, first.cursor_after())
    assert second is not None
    assert (second.start, second.num_rows, second.late_rows) == (6, 13, 4)


def test_an_hour_is_taken_once_it_is_closed_and_its_labels_had_time() -> None:
    log = FakeLog()
    log.add((5, 20))
    almost, closed = (datetime(1970, 1, 1, 6, minute, tzinfo=UTC) for minute in (14, 15))
    assert _next(log, Cursor(), almost, label_delay_minutes=15) is None
    assert _next(log, Cursor(), closed, label_delay_minutes=15) is not None


def test_a_replaced_log_is_refused() -> None:
    log = FakeLog()
    log.add((5, 20))
    window = _next(log, Cursor())
    assert window is not None
    cursor = window.cursor_after()
    for other in (FakeLog(table_id="another log"), FakeLog()):
        with pytest.raises(CheckpointError, match=r"has consumed version 1 of .* was replaced"):
            _next(other, cursor)


@pytest.mark.parametrize(("hour", "start", "end"), [(0, -22, 2), (1, -22, 2), (2, 2, 26), (25, 2, 26), (26, 26, 50)])
def test_a_day_that_ends_at_two(hour: int, start: int, end: int) -> None:
    log = FakeLog()
    log.add((hour, 3))
    window = _next(log, Cursor(), hours=24, align_hour=2)
    assert window is not None
    assert (window.start, window.end) == (start, end)


def test_rows_over_the_cap_stay_pending() -> None:
    log = FakeLog()
    log.add((5, 20), (5, 20))
    window = _next(log, Cursor(), max_rows=30)
    assert window is not None
    assert window.num_rows == 30
    cursor = window.cursor_after()
    assert [piece.num_rows for piece in cursor.pending] == [10]
    log.add((6, 5))
    after = _next(log, cursor, max_rows=30)
    assert after is not None
    assert (after.num_rows, after.late_rows) == (15, 0), "pending rows were on time"


def test_a_pending_file_that_vanished_is_named() -> None:
    log = FakeLog()
    log.add((5, 20))
    gone = Piece(file=LogFile(path="gone", hour=4, num_rows=3))
    with pytest.raises(CheckpointError, match="3 rows are still to be learned from gone"):
        _next(log, Cursor(log_version=1, window_end=4, pending=(gone,)))


@settings(deadline=None)
@given(
    commits=st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=4), max_size=6),
    reached=st.lists(st.floats(0, 1), min_size=1),
    max_rows=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_every_row_is_learned_once(
    commits: list[list[tuple[int, int]]], reached: list[float], max_rows: int, seed: int
) -> None:
    """Commits arrive between updates, updates run out of time, windows are capped: no row is lost, none comes twice."""
    rng = np.random.default_rng(seed)
    log, cursor, learned = FakeLog(), Cursor(), []
    for turn in range(200):
        if turn < len(commits):
            log.add(*commits[turn])
        elif turn == len(commits):
            log.add((100, 1))  # an hour that closes all the late ones
        window = _next(log, cursor, max_rows=max_rows)
        if window is None:
            continue
        rows = [(piece.file.path, row) for piece in window.pieces for row in _rows(piece)]
        share = reached[turn % len(reached)] if turn < 30 else 1.0
        unreached = rng.random(len(rows)) >= share
        learned += [row for row, left in zip(rows, unreached, strict=True) if not left]
        cursor = window.cursor_after(unreached)
        if log.version > len(commits) and cursor.window_end == 101:
            log.add((cursor.window_end, 1)) if cursor.pending else None
    everything = {(file.path, row) for file in log.files() for row in range(file.num_rows)}
    waiting = {(piece.file.path, row) for piece in cursor.pending for row in _rows(piece)}
    added = added_between(log, cursor.log_version, log.version)  # type: ignore[arg-type]
    waiting |= {(piece.file.path, row) for piece in added for row in _rows(piece)}
    assert len(learned) == len(set(learned))
    assert set(learned) | waiting == everything
    assert not set(learned) & waiting


def _rows(piece: Piece) -> list[int]:
    return list(range(piece.file.num_rows)) if piece.mask is None else np.flatnonzero(piece.mask).tolist()


def test_hours_since_the_epoch_are_utc() -> None:
    assert as_time(24 * 365).isoformat() == "1971-01-01T00:00:00+00:00"
