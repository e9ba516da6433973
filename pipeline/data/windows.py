"""The next window: which rows of the click log an update learns, and which stay pending.

A model's `Cursor` says what it has consumed: every row of the click log up to `log_version`, but for the `pending` ones.
The next window takes what was added since, late rows included, and what is pending. So every row is learned once, across
kills, retries and missed hours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_schemas.errors import CheckpointError
from pipeline.config import WindowConfig
from pipeline.data.held import HeldWindow
from pipeline.data.lake import ClickLog, RowRange
from pipeline.data.lineage import Mask, Piece, added_between, carry, merged, without

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """What a model has consumed of its click log."""

    log_id: str = ""
    """Identity of the click log; empty: nothing yet."""
    log_version: int | None = None
    """Version of the Delta table; None: nothing yet."""
    window_end: int | None = None
    """Hours since the epoch at which the last window ended."""
    pending: tuple[Piece, ...] = ()
    """Rows of that version which no update has learned."""
    released: tuple[str, ...] = ()
    """Windows that were held aside, released, and learned."""


WAITS = -1
"""In `JoinedClicks.example_W`: the row stays for a later window."""
DONE = -2
"""The row is not learned, and does not come again."""


@dataclass(frozen=True, kw_only=True)
class JoinedClicks:
    """What became of the clicks of a window, where they are events of their own."""

    example_W: npt.NDArray[np.int64]
    """`[window.num_rows]` the example that each row becomes or belongs to: impressions `[0, I)` in their order, then
    corrections; `WAITS` or `DONE` for a click that is neither."""
    clicked_I: Mask
    """Impressions of the window whose click is known."""
    known_until: int
    """Hour until which clicks on impressions of the window are joined; those on earlier ones only until its end."""
    end: int
    """Of the window."""
    click_hour_E: npt.NDArray[np.int64]
    """`[I + corrections]` hour of an example's click; -1 where none is known."""
    corrected: tuple[Piece, ...]
    """Impressions that were learned before their click came: one correction each, in the order of these rows."""
    waiting: int
    """Clicks whose impression is not there yet, or waits itself."""
    unattributed: int
    """Clicks without an impression within `attribution_minutes`."""

    @property
    def num_corrections(self) -> int:
        """Impressions that are corrected."""
        return sum(piece.num_rows for piece in self.corrected)

    def rows_left(self, unreached_E: Mask) -> Mask:
        """`[window.num_rows]` from `[I + corrections]`: a click stays or goes with its impression or correction."""
        fate = np.append(unreached_E, [False, True])  # DONE and WAITS count from the end
        left: Mask = fate[self.example_W]
        return left


@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of one update, in the order hour, file, row."""

    start: int
    end: int
    """Hours since the epoch, half-open."""
    log_id: str
    log_version: int
    pieces: tuple[Piece, ...]
    late_rows: int
    """New rows whose hour lies before `start`; rows that an earlier window did not reach are not among them."""
    left: tuple[Piece, ...]
    """Rows waiting in the click log for a later window."""
    removed_rows: int = 0
    """Rows that were pending and have left the click log on purpose since."""
    clicks: JoinedClicks | None = None
    """None where clicks are no events of their own."""
    aside: tuple[Piece, ...] = ()
    """Rows of other windows that are held aside, or released and still to be learned."""
    discarded: tuple[Piece, ...] = ()
    """Rows that are never learned."""
    carried: tuple[Piece, ...] = ()
    """Of its rows those that an earlier window left: held out, or out of time."""
    released: str = ""
    """Id of the held window that this is, released by a person; empty for all others."""
    released_before: tuple[str, ...] = ()
    """Released windows that the model has learned."""

    @property
    def num_rows(self) -> int:
        """Of all pieces."""
        return sum(piece.num_rows for piece in self.pieces)

    def cursor_after(self, unreached: Mask | None = None) -> Cursor:
        """The cursor once this window was learned, but for the rows in `unreached`.

        Args:
            unreached: `[num_rows]`; with `clicks`, one an example. None: nothing was left out.
        """
        if self.clicks is not None:
            none = np.zeros(len(self.clicks.clicked_I) + self.clicks.num_corrections, bool)
            unreached = self.clicks.rows_left(none if unreached is None else unreached)
        rest = () if unreached is None or not unreached.any() else tuple(_unreached(self.pieces, unreached))
        return Cursor(
            log_id=self.log_id,
            log_version=self.log_version,
            window_end=self.end,
            pending=(*rest, *self.left),
            released=(*self.released_before, self.released) if self.released else self.released_before,
        )


def next_window(
    log: ClickLog, cursor: Cursor, config: WindowConfig, now: datetime, held: Sequence[HeldWindow] = ()
) -> Window | None:
    """The earliest closed window with rows that the model has not consumed; None if there is none.

    Hours without rows are passed over. Rows that came late for an hour already learned join the next window. Of windows that
    are held aside no row is in it; one that was released is a window of its own, before all others.

    Args:
        log: the click log.
        cursor: what the model has consumed.
        config: length and delay of windows.
        now: aware.
        held: all windows of the model that were ever held aside.

    Raises:
        CheckpointError: the click log is not the one that the cursor speaks of.
    """
    version = log.version
    waiting, aside = waiting_pieces(log, cursor, held)
    pending = _still_there(log, cursor, version)
    gone = [window.id for window in held if window.status == "discarded"]
    window = Window(
        start=0,
        end=0,
        log_id=log.table_id,
        log_version=version,
        pieces=(),
        late_rows=0,
        left=(),
        removed_rows=sum(piece.num_rows for piece in cursor.pending) - sum(piece.num_rows for piece in pending),
        aside=tuple(merged(piece for of, pieces in aside.items() if of not in gone for piece in pieces)),
        discarded=tuple(merged(piece for of in gone for piece in aside.get(of, ()))),
        released_before=cursor.released,
    )
    for chosen in held:
        if chosen.status == "released" and aside.get(chosen.id):
            return _released(window, chosen, aside[chosen.id], waiting, cursor)
    return _regular(window, waiting, pending, cursor, config, now)


def waiting_pieces(
    log: ClickLog, cursor: Cursor, held: Sequence[HeldWindow] = ()
) -> tuple[list[Piece], dict[str, list[Piece]]]:
    """Rows that wait for the model, of closed hours or not; and by its id the rows of each window that is held aside, was
    discarded, or was released and is not learned yet.

    Raises:
        CheckpointError: the click log is not the one that the cursor speaks of.
    """
    version = log.version
    _check_same_log(log, cursor)
    unlearned = [window for window in held if window.id not in cursor.released]
    aside = {window.id: carry(log, window.pieces, window.log_version, version)[0] for window in unlearned}
    added = merged([*_still_there(log, cursor, version), *added_between(log, cursor.log_version, version)])
    return without(added, merged(piece for pieces in aside.values() for piece in pieces)), aside


def _released(window: Window, chosen: HeldWindow, pieces: Sequence[Piece], waiting: Sequence[Piece], cursor: Cursor) -> Window:
    """A released window by itself; time never runs backwards, so one that is older than the last becomes late rows of that."""
    end = max(chosen.end, cursor.window_end or chosen.end)
    start = end - (chosen.end - chosen.start)
    return replace(
        window,
        start=start,
        end=end,
        pieces=tuple(pieces),
        late_rows=sum(piece.num_rows for piece in pieces if piece.file.hour < start),
        left=tuple(waiting),
        aside=tuple(without(window.aside, pieces)),
        released=chosen.id,
    )


def _regular(
    window: Window, waiting: Sequence[Piece], pending: Sequence[Piece], cursor: Cursor, config: WindowConfig, now: datetime
) -> Window | None:
    on_time = [piece.file.hour for piece in waiting if cursor.window_end is None or piece.file.hour >= cursor.window_end]
    if not on_time:
        return None
    end = _aligned_end(min(on_time), config)
    if as_time(end) + timedelta(minutes=config.label_delay_minutes) > now:
        return None
    start = end - config.hours
    taken, left = _cap((piece for piece in waiting if piece.file.hour < end), config.max_rows)
    return replace(
        window,
        start=start,
        end=end,
        pieces=tuple(taken),
        late_rows=_late_rows(taken, pending, cursor, start),
        carried=tuple(without(taken, without(taken, [piece for piece in pending if piece.file.hour < start]))),
        left=(*left, *(piece for piece in waiting if piece.file.hour >= end)),
    )


def read_window(log: ClickLog, window: Window, columns: Sequence[str]) -> pa.Table:
    """The window's rows, in order."""
    return read_pieces(log, window.pieces, columns)


def read_pieces(log: ClickLog, pieces: Iterable[Piece], columns: Sequence[str]) -> pa.Table:
    """The rows of `pieces`, in order."""
    return log.read_parts(((RowRange.whole(piece.file), piece.mask) for piece in pieces), columns)


def as_time(hours_since_epoch: int) -> datetime:
    """The UTC time of a whole hour.

    >>> as_time(24).isoformat()
    '1970-01-02T00:00:00+00:00'
    """
    return EPOCH + timedelta(hours=hours_since_epoch)


def as_hour(moment: datetime) -> int:
    """The inverse of `as_time`; minutes are cut off.

    >>> as_hour(as_time(24))
    24
    """
    return (moment - EPOCH) // timedelta(hours=1)


def _check_same_log(log: ClickLog, cursor: Cursor) -> None:
    if cursor.log_id not in ("", log.table_id) or (cursor.log_version or 0) > log.version:
        raise CheckpointError(
            f"the model has consumed version {cursor.log_version} of click log {cursor.log_id}, but the click log there is "
            f"{log.table_id} at version {log.version}: it was replaced or restored. Bring the old one back, or start a new "
            "model under another model_name"
        )


def _late_rows(taken: Iterable[Piece], pending: Iterable[Piece], cursor: Cursor, start: int) -> int:
    if cursor.window_end is None:
        return 0
    waited = {piece.file.path: piece.rows for piece in pending}
    late = (piece for piece in taken if piece.file.hour < start)
    return sum(int((piece.rows & ~waited.get(piece.file.path, np.False_)).sum()) for piece in late)


def _aligned_end(hour: int, config: WindowConfig) -> int:
    return hour + config.hours - (hour - config.align_hour) % config.hours


def _cap(pieces: Iterable[Piece], max_rows: int) -> tuple[list[Piece], list[Piece]]:
    taken: list[Piece] = []
    left: list[Piece] = []
    room = max_rows
    for piece in pieces:
        if piece.num_rows <= room:
            taken.append(piece)
        elif room > 0:
            first, others = piece.split(room)
            taken.append(first)
            left.append(others)
        else:
            left.append(piece)
        room = max(room - piece.num_rows, 0)
    return taken, left


def _still_there(log: ClickLog, cursor: Cursor, version: int) -> list[Piece]:
    pending, lost = carry(log, cursor.pending, cursor.log_version or 0, version)
    for piece in lost:
        raise CheckpointError(
            f"{piece.num_rows} rows are still to be learned from {piece.file.path}, which is no longer in the click "
            "log; restore it, or start a new model under another model_name"
        )
    return pending


def _unreached(pieces: Iterable[Piece], unreached: Mask) -> Iterable[Piece]:
    start = 0
    for piece in pieces:
        stop = start + piece.num_rows
        part = unreached[start:stop]
        start = stop
        if part.all() and piece.mask is None:
            yield piece
        elif part.any():
            mask = np.zeros(piece.file.num_rows, bool)
            mask[np.arange(piece.file.num_rows) if piece.mask is None else np.flatnonzero(piece.mask)] = part
            yield Piece(file=piece.file, mask=mask)
