"""Clicks that are events of their own, joined to their impressions when these are learned.

Enters: a window. Leaves: the same window, knowing which of its impressions were clicked, and which impressions that were
learned as negatives their click now corrects.

The click log keeps both as they came; nothing is rewritten when a click arrives. A click of a window belongs

- to an impression of the same window: that one is learned with label 1. Clicks of the hours after it, as many as
  `label_delay_minutes` has, are taken along. Others stay where they are, even if they are in the log already: what is known of
  a window does not depend on when it is learned;
- to an impression that an update has learned: it is corrected;
- to an impression that waits itself, or that may still arrive: the click waits with it;
- to none within `attribution_minutes`, or to one that was discarded: it is left out, and counted.

How both kinds are learned: `models/loss.py`. In counters and histories a corrected impression counts one click and next to no
impression: it has weight e and label 1/e there.

Letters: W rows of the window, I impressions among them, K rows that are looked through, C clicks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from data_schemas.click_log import click_keys
from data_schemas.dataset import Clicks, DatasetSpec
from data_schemas.errors import ConfigError
from data_schemas.examples import F32, I64, U64, Examples
from pipeline.config import SamplingConfig
from pipeline.data.lake import ClickLog
from pipeline.data.lineage import Mask, Piece
from pipeline.data.windows import DONE, WAITS, JoinedClicks, Window, read_pieces

CORRECTION_WEIGHT = 2.0**-12
_COLUMNS = ("event_key", "event_time", "is_click")
_US_PER_MINUTE = 60_000_000
_US_PER_HOUR = 60 * _US_PER_MINUTE
_NEVER = np.iinfo(np.int64).max


def join_clicks(log: ClickLog, window: Window, spec: DatasetSpec, label_delay_minutes: int = 0) -> Window:
    """The window with `clicks`; as it is, where the data set's clicks are no events of their own.

    Args:
        label_delay_minutes: clicks of so long after the window's end are joined too, in whole hours.
    """
    if spec.clicks is None:
        return window
    own = _Events.read(log, window.pieces)
    known_until = window.end + label_delay_minutes // 60
    with_clicks = _with_known_clicks(log, window, own, spec.clicks, known_until)
    events = own if len(with_clicks.pieces) == len(window.pieces) else _Events.read(log, with_clicks.pieces)
    window = with_clicks
    shown, clicked = np.flatnonzero(~events.is_click), np.flatnonzero(events.is_click)
    example_W = np.full(len(events.keys), WAITS)
    example_W[shown] = np.arange(len(shown))
    matched = _match(events.take(clicked), events.take(shown), spec.clicks)
    example_W[clicked[matched >= 0]] = matched[matched >= 0]
    clicked_I = np.zeros(len(shown), bool)
    clicked_I[matched[matched >= 0]] = True
    rest = clicked[matched < 0]
    click_hour_I = np.full(len(shown), _NEVER)
    np.minimum.at(click_hour_I, matched[matched >= 0], events.time_us[clicked[matched >= 0]] // _US_PER_HOUR)
    corrected, corrected_hour, fate = _look_back(log, window, events.take(rest), spec.clicks)
    example_W[rest] = np.where(fate >= 0, fate + len(shown), fate)
    return replace(
        window,
        clicks=JoinedClicks(
            example_W=example_W,
            clicked_I=clicked_I,
            known_until=known_until,
            end=window.end,
            click_hour_E=np.concatenate([np.where(clicked_I, click_hour_I, -1), corrected_hour]),
            corrected=corrected,
            waiting=int((fate == WAITS).sum()),
            unattributed=int((fate == DONE).sum()),
        ),
    )


def is_correction(labels_R: F32) -> Mask:
    """`[R]` which examples correct others: no other label is above 1."""
    corrects: Mask = labels_R > 1
    return corrects


def as_corrections(examples: Examples) -> Examples:
    """Impressions that were learned as not clicked, as counters and histories count their clicks."""
    weights_R = np.full(examples.num_rows, CORRECTION_WEIGHT, np.float32)
    return replace(examples, labels_R=np.float32(1) / weights_R, weights_R=weights_R)


def require_correctable(spec: DatasetSpec, sampling: SamplingConfig) -> None:
    """Refuses settings under which a late click could not be put right.

    Raises:
        ConfigError: names the setting.
    """
    if spec.clicks is None:
        return
    if sampling.replay_share:
        raise ConfigError(
            f"sampling.replay_share is {sampling.replay_share}, but the clicks of data set {spec.name!r} come later than their "
            "impressions: a held row would be replayed with the label that it had at first; set it to 0"
        )
    if sampling.correction != "weights":
        raise ConfigError(
            f"sampling.correction is {sampling.correction!r}, but the clicks of data set {spec.name!r} come later than their "
            "impressions: an impression is learned in several looks, and no shift of the logits is made for these; set it to "
            "'weights'"
        )


@dataclass(frozen=True, kw_only=True)
class _Events:
    """Rows of the log, as far as the join looks at them."""

    keys: U64
    """Of a click, and of the click that an impression would have."""
    time_us: I64
    is_click: Mask

    @classmethod
    def read(cls, log: ClickLog, pieces: Sequence[Piece]) -> "_Events":
        table = read_pieces(log, pieces, _COLUMNS)
        is_click = table["is_click"].to_numpy()
        keys = table["event_key"].to_numpy().view(np.uint64)
        time_us = table["event_time"].cast(pa.int64()).to_numpy()
        return cls(keys=np.where(is_click, keys, click_keys(keys)), time_us=time_us, is_click=is_click)

    def take(self, rows: I64) -> "_Events":
        return _Events(keys=self.keys[rows], time_us=self.time_us[rows], is_click=self.is_click[rows])


def _match(clicks: _Events, shown: _Events, rule: Clicks) -> I64:
    """`[C]` the place of each click's impression among `shown`, the latest of its key; -1 where there is none in time."""
    found = np.full(len(clicks.keys), -1)
    if not len(shown.keys):
        return found
    order = np.lexsort((shown.time_us, shown.keys))
    place = np.searchsorted(shown.keys[order], clicks.keys, side="right") - 1
    at = order[np.maximum(place, 0)]
    after_us = clicks.time_us - shown.time_us[at]
    fits = (place >= 0) & (shown.keys[at] == clicks.keys) & (after_us >= 0)
    fits &= after_us <= rule.attribution_minutes * _US_PER_MINUTE
    return np.where(fits, at, found)


def _with_known_clicks(log: ClickLog, window: Window, own: _Events, rule: Clicks, known_until: int) -> Window:
    """The window with the clicks on its impressions, before `known_until`, that lie in rows left for later windows."""
    shown = own.take(np.flatnonzero(~own.is_click))
    if not len(shown.keys):
        return window
    first = int(shown.time_us.min()) // _US_PER_HOUR
    last = min(int(shown.time_us.max()) // _US_PER_HOUR + rule.attribution_hours, known_until - 1)
    pulled: list[Piece] = []
    left: list[Piece] = []
    for piece in window.left:
        if not first <= piece.file.hour <= last:
            left.append(piece)
            continue
        events = _Events.read(log, [piece])
        rows = np.flatnonzero(piece.rows)
        clicked = np.flatnonzero(events.is_click)
        mine = rows[clicked[_match(events.take(clicked), shown, rule) >= 0]]
        mask = np.zeros(piece.file.num_rows, bool)
        mask[mine] = True
        pulled += [Piece(file=piece.file, mask=mask)] if len(mine) else []
        rest = replace(piece, mask=piece.rows & ~mask) if len(mine) else piece
        left += [rest] if rest.num_rows else []
    return replace(window, pieces=(*window.pieces, *pulled), left=tuple(left))


def _look_back(log: ClickLog, window: Window, clicks: _Events, rule: Clicks) -> tuple[tuple[Piece, ...], I64, I64]:
    """Impressions to correct, the hours of their clicks, and `[C]` the place of each click's among their rows, or what else
    becomes of the click."""
    fate = np.full(len(clicks.keys), WAITS)
    expired = clicks.time_us + rule.attribution_minutes * _US_PER_MINUTE < window.end * _US_PER_HOUR
    fate[expired] = DONE
    if not len(clicks.keys):
        return (), np.empty(0, np.int64), fate
    first = int(clicks.time_us.min()) // _US_PER_HOUR - rule.attribution_hours
    last = int(clicks.time_us.max()) // _US_PER_HOUR
    files = [file for file in log.files(window.log_version) if first <= file.hour <= last]
    keys = np.unique(clicks.keys)
    found = [(Piece(file=file), _Events.read(log, [Piece(file=file)])) for file in files]
    places = [np.flatnonzero(~events.is_click & np.isin(events.keys, keys)) for _, events in found]
    shown = _concatenated([events.take(rows) for (_, events), rows in zip(found, places, strict=True)])
    owner = np.repeat(np.arange(len(found)), [len(rows) for rows in places])
    row = np.concatenate(places) if places else np.empty(0, np.int64)
    pieces = [piece for piece, _ in found]
    waits = _are_among((*window.left, *window.pieces, *window.aside), pieces, owner, row)
    never = _are_among(window.discarded, pieces, owner, row)
    matched = _match(clicks, shown, rule)
    has = np.flatnonzero(matched >= 0)
    fate[has] = np.where(waits[matched[has]], WAITS, DONE)
    late = has[~(waits | never)[matched[has]]]
    chosen, first_click = np.unique(matched[late], return_index=True)
    fate[late[first_click]] = np.arange(len(chosen))
    hours = clicks.time_us[late[first_click]] // _US_PER_HOUR
    return tuple(_as_pieces(pieces, owner[chosen], row[chosen])), hours, fate


def _concatenated(parts: Sequence[_Events]) -> _Events:
    empty = _Events(keys=np.empty(0, np.uint64), time_us=np.empty(0, np.int64), is_click=np.empty(0, bool))
    columns = [empty, *parts]
    return _Events(
        keys=np.concatenate([part.keys for part in columns]),
        time_us=np.concatenate([part.time_us for part in columns]),
        is_click=np.concatenate([part.is_click for part in columns]),
    )


def _are_among(some: Iterable[Piece], pieces: Sequence[Piece], owner: I64, row: I64) -> Mask:
    """`[K]` whether a row of a file is among some."""
    waiting: dict[str, Mask] = {}
    for piece in some:
        waiting[piece.file.path] = waiting.get(piece.file.path, np.zeros(piece.file.num_rows, bool)) | piece.rows
    masks = [waiting.get(piece.file.path) for piece in pieces]
    pairs = zip(owner.tolist(), row.tolist(), strict=True)
    return np.array([mask is not None and bool(mask[at]) for mask, at in ((masks[o], r) for o, r in pairs)], bool)


def _as_pieces(pieces: Sequence[Piece], owner: I64, row: I64) -> Iterable[Piece]:
    for place in np.unique(owner):
        mask = np.zeros(pieces[place].file.num_rows, bool)
        mask[row[owner == place]] = True
        yield replace(pieces[place], mask=mask)
